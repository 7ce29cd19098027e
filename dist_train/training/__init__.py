"""The training of a run: `train(config, run_directory)`."""

from dist_train.training.training import train

__all__ = ["train"]
