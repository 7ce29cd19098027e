"""The network with averaged weights, to be evaluated and saved beside the network itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from dist_train.models.norms import running_statistics
from dist_train.optim.averaging import Averaging


class AveragedModel:
    """`network` with the weights of `averaging`, and norm statistics of its own.

    Running averages of the training belong to other weights: they are recomputed at the averaged ones, once a step,
    as Izmailov et al. do for averages of weights (arXiv 1803.05407), from the samples that noise has them recomputed.
    """

    def __init__(self, network: nn.Module, averaging: Averaging, recompute: Callable[[], None]) -> None:
        """Have `recompute` replace the statistics in the network; all ranks call it together."""
        self._averaging = averaging
        self._recompute = recompute
        self._buffers = running_statistics(network)
        self._taken: dict[str, Tensor] = {}
        self._taken_at: int | None = None

    def __bool__(self) -> bool:
        return bool(self._averaging)

    @contextmanager
    def in_force(self, steps: int) -> Iterator[None]:
        """Let the network compute with the average after so many updates, within the block."""
        own = _copied(self._buffers)
        try:
            with self._averaging.in_force(steps):
                if self._taken_at != steps and self._buffers:
                    self._recompute()
                    self._taken, self._taken_at = _copied(self._buffers), steps
                else:
                    _copy(self._taken, self._buffers)
                yield
        finally:
            _copy(own, self._buffers)

    def forget(self) -> None:
        """Recompute the statistics when they are needed next, also where they are those of the step."""
        self._taken_at = None

    def contents(self, steps: int) -> Mapping[str, Any]:
        """Return what a checkpoint holds of it; nothing where nothing is averaged."""
        if not self:
            return {}
        with self.in_force(steps):
            return {"kept": self._averaging.state(steps), "statistics": self._taken}


def _copied(buffers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in buffers.items()}


def _copy(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
    for name, value in source.items():
        target[name].copy_(value)
