"""The same training with the libraries that a user could choose instead, each written as in its documentation."""
