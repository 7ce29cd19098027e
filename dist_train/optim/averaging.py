"""Averages of the weights along the way: an exponential moving one (Polyak), and that of the latest ones (LAWA).

Every rank holds the same weights, and so the same average, without communication.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import reduce
from operator import xor
from typing import Any

from torch import Tensor

from dist_train.config import AveragingSettings
from dist_train.optim.flat_weights import FlatWeights, digest


class Averaging:
    """What a step does for an average of `weights`; here nothing: `none`.

    `kept` [k, n] holds what the average is made of: the first min(k, weights taken) rows. How many were taken is a
    function of the step.
    """

    def __init__(self, settings: AveragingSettings, weights: FlatWeights, steps_per_epoch: int) -> None:
        self.settings = settings
        self._weights = weights
        self._every = settings.every_steps or (1 if settings.kind == "ema" else steps_per_epoch)
        rows = {"none": 0, "ema": 1, "lawa": settings.last}[settings.kind]
        self.kept = weights.values.new_zeros(rows, len(weights.values))

    def __bool__(self) -> bool:
        return len(self.kept) > 0

    def after_update(self, step: int) -> None:
        """Take the weights that update `step`, counted from 0, has made, where it is their turn."""

    def value(self, steps: int) -> Tensor:
        """Return the average after so many updates [n]; the weights themselves before any was taken."""
        rows = self.kept[: self._filled(steps)]
        return mean_of(rows) if len(rows) else self._weights.values

    @contextmanager
    def in_force(self, steps: int) -> Iterator[None]:
        """Let the model compute with the average, within the block."""
        self._weights.compute_with(self._weights.views_of(self.value(steps)))
        try:
            yield
        finally:
            self._weights.compute_with_own()

    def state(self, steps: int) -> list[dict[str, Tensor]]:
        """Return what a checkpoint holds: the rows in use, by the parameters' names."""
        names = [segment.name for segment in self._weights.segments]
        rows = self.kept[: self._filled(steps)]
        return [dict(zip(names, self._weights.views_of(row), strict=True)) for row in rows]

    def load(self, state: Sequence[Mapping[str, Tensor]]) -> None:
        """Take over what `state` returned."""
        for row, tensors in zip(self.kept, state, strict=False):
            for segment, view in zip(self._weights.segments, self._weights.views_of(row), strict=True):
                view.copy_(tensors[segment.name])

    def digest(self) -> int:
        """Return a digest of what is kept; the same on all ranks that agree."""
        return reduce(xor, map(digest, self.kept), 0)  # row by row: a digest takes four times the memory of its row

    def _filled(self, steps: int) -> int:
        return min(len(self.kept), steps // self._every)


class _Ema(Averaging):
    """v <- decay v + (1 - decay) w, beginning with the first weights taken, as torch's AveragedModel does."""

    def after_update(self, step: int) -> None:
        """Move the average towards the weights."""
        if (step + 1) % self._every == 0:
            is_first = step + 1 == self._every
            self.kept[0].lerp_(self._weights.values, 1.0 if is_first else 1.0 - self.settings.decay)


class _Lawa(Averaging):
    """The mean of the latest weights, one each so many updates (Kaddour 2022, arXiv 2209.14981)."""

    def after_update(self, step: int) -> None:
        """Keep the weights in place of the oldest ones."""
        if (step + 1) % self._every == 0:
            self.kept[((step + 1) // self._every - 1) % len(self.kept)].copy_(self._weights.values)


_KINDS: Mapping[str, type[Averaging]] = {"none": Averaging, "ema": _Ema, "lawa": _Lawa}


def build_averaging(settings: AveragingSettings, weights: FlatWeights, steps_per_epoch: int) -> Averaging:
    """Return the average that `settings` name, of `weights`; an epoch is a pass over the data."""
    return _KINDS[settings.kind](settings, weights, steps_per_epoch)


def mean_of(rows: Sequence[Tensor] | Tensor) -> Tensor:
    """Return the mean of `rows`, added in their order: each element's bits do not depend on the others."""
    total = rows[0].clone()
    for row in rows[1:]:
        total.add_(row)
    return total.div_(len(rows))


def averaged_state(average: Mapping[str, Any], model: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the state of the averaged model, from what a checkpoint holds of the average and of the model."""
    kept = average["kept"]
    means = {name: mean_of([row[name] for row in kept]) for name in (kept[0] if kept else ())}
    return {**model, **means, **average["statistics"]}
