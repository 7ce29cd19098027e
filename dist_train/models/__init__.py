"""The networks. `build_model(config)` returns the one that a configuration names."""

from dist_train.models.building import build_model, runs_sequentials_whole
from dist_train.models.norms import restoring_buffers
from dist_train.models.trial import check_training

__all__ = ["build_model", "check_training", "restoring_buffers", "runs_sequentials_whole"]
