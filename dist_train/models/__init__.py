"""The networks. `build_model(config)` returns the one that a configuration names."""

from dist_train.models.building import build_model, warn_of_changing_buffers

__all__ = ["build_model", "warn_of_changing_buffers"]
