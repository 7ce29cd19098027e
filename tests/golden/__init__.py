"""Recorded losses of a small run, which must not change by accident."""
