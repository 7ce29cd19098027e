"""Data-parallel training at very large batch sizes, smoothed by synchronized weight noise."""

from dist_train.config.plugins import register

__all__ = ["register"]
__version__ = "0.1.0"
