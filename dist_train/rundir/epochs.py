"""A run's passes over the data: which updates make up an epoch, where the global batch changes during the run."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """A part of a run with one global batch: from `epoch` on, which begins at update `step`, an epoch has
    `steps_per_epoch` updates of `global_size` samples.
    """

    epoch: int
    step: int
    global_size: int
    steps_per_epoch: int


@dataclass(frozen=True)
class Epochs:
    """The stages of a run, in order; the first begins with the run, the last is open-ended."""

    stages: tuple[Stage, ...]

    @classmethod
    def of(cls, sizes: Iterable[tuple[int, int]], steps_per_epoch: Callable[[int], int]) -> Epochs:
        """Return the stages for `sizes`, pairs of a first epoch (of the first pair: 0) and a global batch size."""
        stages: list[Stage] = []
        for epoch, size in sizes:
            before = stages[-1] if stages else Stage(0, 0, size, 0)
            step = before.step + (epoch - before.epoch) * before.steps_per_epoch
            stages.append(Stage(epoch, step, size, steps_per_epoch(size)))
        return cls(tuple(stages))

    def number(self, step: int) -> int:
        """Return the number of the stage that update `step` belongs to, both counted from 0."""
        return bisect_right(self.stages, step, key=lambda stage: stage.step) - 1

    def stage(self, step: int) -> Stage:
        """Return the stage that update `step`, counted from 0, belongs to."""
        return self.stages[self.number(step)]

    def place(self, step: int) -> tuple[int, int]:
        """Return the epoch of update `step` and its index within that epoch; all counted from 0."""
        stage = self.stage(step)
        epoch, index = divmod(step - stage.step, stage.steps_per_epoch)
        return stage.epoch + epoch, index

    def done(self, steps: int) -> float:
        """Return the epochs done after `steps` updates."""
        stage = self.stage(steps)
        return stage.epoch + (steps - stage.step) / stage.steps_per_epoch

    def steps(self, epochs: int) -> int:
        """Return the number of updates in the first `epochs` epochs."""
        stage = self.stages[bisect_right(self.stages, epochs, key=lambda stage: stage.epoch) - 1]
        return stage.step + (epochs - stage.epoch) * stage.steps_per_epoch

    def samples(self, steps: int) -> int:
        """Return the number of samples that the first `steps` updates use."""
        ends = (*(stage.step for stage in self.stages[1:]), steps)
        pairs = zip(self.stages, ends, strict=True)
        return sum(max(0, min(end, steps) - stage.step) * stage.global_size for stage, end in pairs)
