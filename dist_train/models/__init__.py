"""The networks and losses. `build_model` and `build_loss` return those that a configuration names."""

from dist_train.models.building import Loss, build_loss, build_model, runs_sequentials_whole
from dist_train.models.norms import restoring_buffers
from dist_train.models.trial import check_training

__all__ = ["Loss", "build_loss", "build_model", "check_training", "restoring_buffers", "runs_sequentials_whole"]
