"""The live view of a run, from its directory alone."""
