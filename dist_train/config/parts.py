"""What sections and records are made of: formats of images, kinds of numbers, epochs."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field


@dataclass(frozen=True)
class ImageFormat:
    """What a model must know of a data set: (channels, height, width) of an image, and the classes."""

    shape: tuple[int, int, int]
    classes: int


DATA_SETS: Mapping[str, ImageFormat] = MappingProxyType(
    {
        "fashion-mnist": ImageFormat((1, 28, 28), 10),
        "cifar10": ImageFormat((3, 32, 32), 10),
        "cifar100": ImageFormat((3, 32, 32), 100),
        "synthetic": ImageFormat((3, 32, 32), 10),
    }
)
"""Format by name; the synthetic set's is its default, which `data.synthetic_*` overrides."""


PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Fraction = Annotated[float, Field(gt=0, le=1)]


class Section(BaseModel):
    """A part of the configuration: frozen, and closed to keys that it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def options_of(setting: str) -> Any:
    """Return the field for the settings of the plug-in that `setting` names."""
    return Field(
        default_factory=dict,
        description=f"Settings of the plug-in that {setting} names.",
        examples=[{"depth": 3}],
    )


@dataclass(frozen=True)
class Stage:
    """From `epoch` on, whose first update is `step`, `steps_per_epoch` batches of `global_size` make a pass."""

    epoch: int
    step: int
    global_size: int
    steps_per_epoch: int


@dataclass(frozen=True)
class Epochs:
    """The stages of a run, in order, the first one from its beginning; the last one has no end."""

    stages: tuple[Stage, ...]

    @classmethod
    def of(cls, sizes: Iterable[tuple[int, int]], steps_per_epoch: Callable[[int], int]) -> Epochs:
        """Return those of the global batches `sizes`, each with the epoch that it begins with, 0 for the first.

        `steps_per_epoch` gives the whole batches of a size in a pass.
        """
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
        """Return the epoch of update `step`, and its place in it; all counted from 0."""
        stage = self.stage(step)
        epoch, index = divmod(step - stage.step, stage.steps_per_epoch)
        return stage.epoch + epoch, index

    def done(self, steps: int) -> float:
        """Return the epochs done after so many updates."""
        stage = self.stage(steps)
        return stage.epoch + (steps - stage.step) / stage.steps_per_epoch

    def steps(self, epochs: int) -> int:
        """Return the updates of so many epochs."""
        stage = self.stages[bisect_right(self.stages, epochs, key=lambda stage: stage.epoch) - 1]
        return stage.step + (epochs - stage.epoch) * stage.steps_per_epoch

    def samples(self, steps: int) -> int:
        """Return the samples that so many updates have used."""
        ends = (*(stage.step for stage in self.stages[1:]), steps)
        pairs = zip(self.stages, ends, strict=True)
        return sum(max(0, min(end, steps) - stage.step) * stage.global_size for stage, end in pairs)
