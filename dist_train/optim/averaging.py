"""Weight averages: an exponential moving average (EMA), and the mean of the latest weights (LAWA).

All ranks hold the same weights, and so the same average, without communication.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from operator import xor
from typing import Any

from torch import Tensor, nn

from dist_train.config import AveragingSettings
from dist_train.models.norms import running_statistics
from dist_train.optim.flat_weights import FlatWeights, digest


class Averaging:
    """The average of `weights` that `settings` select, updated after each step; an epoch is a pass over the data.

    ema: v <- decay v + (1 - decay) w, initialized with the first weights included, as in torch's AveragedModel. lawa:
    the mean of the latest weights, taken at regular intervals (Kaddour 2022, arXiv 2209.14981). `kept` [k, n] holds the
    weights that make the average. Rows are filled in order; the step determines how many are.
    """

    def __init__(self, settings: AveragingSettings, weights: FlatWeights, steps_per_epoch: int) -> None:
        self.settings = settings
        self.weights = weights
        self._every = settings.every_steps or (1 if settings.kind == "ema" else steps_per_epoch)
        rows = {"none": 0, "ema": 1, "lawa": settings.last}[settings.kind]
        self.kept = weights.values.new_zeros(rows, len(weights.values))

    def __bool__(self) -> bool:
        return len(self.kept) > 0

    def after_update(self, step: int) -> None:
        """Include the weights after update `step`, counted from 0, if they are due."""
        number, rest = divmod(step + 1, self._every)
        if rest or not self:
            return
        if self.settings.kind == "ema":
            self.kept[0].lerp_(self.weights.values, 1.0 if number == 1 else 1.0 - self.settings.decay)
        else:
            self.kept[(number - 1) % len(self.kept)].copy_(self.weights.values)

    def value(self, steps: int) -> Tensor:
        """Return the average after `steps` updates [n]; the weights themselves if it includes none yet."""
        rows = self.kept[: self._filled(steps)]
        return mean_of(rows) if len(rows) else self.weights.values

    def share_of_first(self, steps: int) -> float:
        """Return the share in the ema after `steps` updates of the first weights that it includes; 0 if it is none."""
        included = max(1, steps // self._every)
        return float(self.settings.decay ** (included - 1)) if self.settings.kind == "ema" else 0.0

    def state(self, steps: int) -> list[dict[str, Tensor]]:
        """Return what a checkpoint holds: for each row in use, tensors by the parameters' names."""
        return [self.weights.named(row) for row in self.kept[: self._filled(steps)]]

    def load(self, state: Sequence[Mapping[str, Tensor]]) -> None:
        """Restore what `state` returned."""
        for row, tensors in zip(self.kept, state, strict=False):
            for name, view in self.weights.named(row).items():
                view.copy_(tensors[name])

    def digest(self) -> int:
        """Return a digest of `kept`, equal on ranks that agree."""
        return reduce(xor, map(digest, self.kept), 0)  # row by row: a digest needs four times the memory of its input

    def _filled(self, steps: int) -> int:
        return min(len(self.kept), steps // self._every)


@dataclass(eq=False)
class AveragedModel:
    """`network` with the weights of `averaging` and norm statistics that belong to these weights.

    The running statistics of the training belong to other weights. As Izmailov et al. do for weight averages
    (arXiv 1803.05407), they are recomputed at the averaged weights, once per step, from the samples that
    `model.norm_samples` chooses: by `recompute`, which all ranks call together.
    """

    network: nn.Module
    averaging: Averaging
    recompute: Callable[[], None]

    def __post_init__(self) -> None:
        self._buffers = running_statistics(self.network)
        self._statistics: dict[str, Tensor] = {}
        self._statistics_step: int | None = None

    def __bool__(self) -> bool:
        return bool(self.averaging)

    @contextmanager
    def in_force(self, steps: int) -> Iterator[None]:
        """Within the block, let the network use the average after `steps` updates."""
        weights, original = self.averaging.weights, _cloned(self._buffers)
        weights.compute_with(weights.views_of(self.averaging.value(steps)))
        try:
            if self._statistics_step != steps and self._buffers:
                self.recompute()
                self._statistics, self._statistics_step = _cloned(self._buffers), steps
            else:
                _copy(self._statistics, self._buffers)
            yield
        finally:
            weights.compute_with_values()
            _copy(original, self._buffers)

    def forget(self) -> None:
        """Recompute the statistics at their next use, even within the same step."""
        self._statistics_step = None

    def contents(self, steps: int) -> Mapping[str, Any]:
        """Return what a checkpoint keeps of the average; empty without averaging."""
        if not self:
            return {}
        with self.in_force(steps):
            return {"kept": self.averaging.state(steps), "statistics": self._statistics}


def mean_of(rows: Sequence[Tensor] | Tensor) -> Tensor:
    """Return the mean of `rows`, summed in order: each element depends on its own values alone, on any device."""
    total = rows[0].clone()
    for row in rows[1:]:
        total.add_(row)
    # Divided by a tensor: by a number, CUDA would multiply by its reciprocal, unlike the CPU that reads checkpoints.
    return total.div_(total.new_full((), len(rows)))


def averaged_state(average: Mapping[str, Any], model: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the state dict of the averaged model, from a checkpoint's `average` and `model`."""
    kept = average["kept"]
    means = {name: mean_of([row[name] for row in kept]) for name in (kept[0] if kept else ())}
    return {**model, **means, **average["statistics"]}


def _cloned(buffers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in buffers.items()}


def _copy(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
    for name, value in source.items():
        target[name].copy_(value)
