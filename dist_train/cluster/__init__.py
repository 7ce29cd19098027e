"""The ranks of a run: how they are launched, communicate, and notice or survive lost ranks."""
