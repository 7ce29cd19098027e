"""Launching a run: `run.train` builds what it needs, finds its ranks and trains."""
