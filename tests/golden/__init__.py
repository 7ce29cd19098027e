"""Twenty recorded losses of a small run: what it computes must not change by accident."""
