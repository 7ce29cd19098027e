"""The ranks of a run: who they are, and what they can say to each other."""
