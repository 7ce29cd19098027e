"""The networks. `build_model(config)` returns the one that a configuration names."""

from dist_train.models.building import build_model

__all__ = ["build_model"]
