"""How far a run is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from dist_train.cluster.communicator import Communicator, broadcast_str
from dist_train.training.checkpoints import Contents


@dataclass
class Progress:
    """All that a checkpoint needs beside the weights and the optimizer's state; accuracies are in [0, 1]."""

    step: int = 0
    best_accuracy: float | None = None
    evaluated_step: int | None = None
    """Where `test_accuracy` was measured."""
    best_saved_step: int | None = None
    best_saved_accuracy: float | None = None
    """The best checkpoint: of those saved at an evaluation the one with the highest test accuracy."""
    test_accuracy: float | None = None
    train_accuracy: float | None = None
    loss_scale: float | None = None
    updates_since_overflow: int | None = None
    """Since the loss scale was last changed; both where there is one, in float16."""
    non_finite_step: int | None = None
    """The latest step after which an evaluation, or the weights, were not finite; its checkpoint is never the best."""

    def metrics(self) -> Mapping[str, float | int | None]:
        """Return what a checkpoint keeps of it beside the step."""
        return {name: value for name, value in asdict(self).items() if name != "step"}

    def note_non_finite(self) -> None:
        """Take in that the evaluation of this step is not finite: it has no accuracy."""
        self.non_finite_step = self.step
        self.train_accuracy = self.test_accuracy = None

    def note_accuracy(self, split: str, accuracy: float) -> None:
        """Take in the accuracy of an evaluation just made."""
        if split == "train":
            self.train_accuracy = accuracy
            return
        self.test_accuracy, self.evaluated_step = accuracy, self.step
        if self.best_accuracy is None or accuracy > self.best_accuracy:
            self.best_accuracy = accuracy

    def note_saved(self) -> None:
        """Take in that a checkpoint of this step is being saved."""
        if self.test_accuracy is None or self.evaluated_step != self.step:
            return
        if self.best_saved_accuracy is None or self.test_accuracy > self.best_saved_accuracy:
            self.best_saved_step, self.best_saved_accuracy = self.step, self.test_accuracy


def restored_progress(contents: Contents) -> Progress:
    """Return the progress that a checkpoint holds."""
    known = {name: contents.metrics.get(name) for name in Progress().metrics()}
    return Progress(step=contents.step, **known)  # type: ignore[arg-type]  # as metrics() wrote them


def shared_progress(comm: Communicator, progress: Progress) -> Progress:
    """Return rank 0's progress."""
    fields = json.loads(broadcast_str(comm, json.dumps(asdict(progress)), "progress"))
    return Progress(**fields)
