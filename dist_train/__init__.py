"""Data-parallel training at very large batch sizes, smoothed by synchronized weight noise."""

__version__ = "0.1.0"
