"""The same training work by the means that a user could pick instead, each as its documentation shows it."""
