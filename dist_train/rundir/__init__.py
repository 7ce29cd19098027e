"""A run directory: the names of its files, and how each is written and read. Does not need torch."""
