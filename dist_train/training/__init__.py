"""The training of a run: `train(config, run_directory)`."""

from dist_train.training.run import train

__all__ = ["train"]
