"""Launching a run: `train(config, run_directory)` builds what it needs, finds its ranks and trains."""

from dist_train.launching.run import train

__all__ = ["train"]
