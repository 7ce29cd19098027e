"""The networks. `build_model(config)` returns the one that a configuration names."""

from dist_train.models.building import build_model, check_training, restoring_buffers, runs_sequentials_whole

__all__ = ["build_model", "check_training", "restoring_buffers", "runs_sequentials_whole"]
