"""A seeded campaign of faults against real launches of the program."""
