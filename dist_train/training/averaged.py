"""The network with averaged weights, which is evaluated and saved beside the network itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from dist_train.models.norms import running_statistics
from dist_train.optim.averaging import Averaging


class AveragedModel:
    """`network` with the weights of `averaging` and norm statistics that belong to these weights.

    The running statistics of the training belong to other weights. As Izmailov et al. do for weight averages
    (arXiv 1803.05407), they are recomputed at the averaged weights, once per step, from the samples that
    `model.norm_samples` chooses.
    """

    def __init__(self, network: nn.Module, averaging: Averaging, recompute: Callable[[], None]) -> None:
        """`recompute` replaces the statistics in the network; all ranks call it together."""
        self._averaging = averaging
        self._recompute = recompute
        self._buffers = running_statistics(network)
        self._statistics: dict[str, Tensor] = {}
        self._statistics_step: int | None = None

    def __bool__(self) -> bool:
        return bool(self._averaging)

    @contextmanager
    def in_force(self, steps: int) -> Iterator[None]:
        """Within the block, let the network use the average after `steps` updates."""
        original = _cloned(self._buffers)
        try:
            with self._averaging.in_force(steps):
                if self._statistics_step != steps and self._buffers:
                    self._recompute()
                    self._statistics, self._statistics_step = _cloned(self._buffers), steps
                else:
                    _copy(self._statistics, self._buffers)
                yield
        finally:
            _copy(original, self._buffers)

    def forget(self) -> None:
        """Recompute the statistics at their next use, even within the same step."""
        self._statistics_step = None

    def contents(self, steps: int) -> Mapping[str, Any]:
        """Return what a checkpoint keeps of the average; empty without averaging."""
        if not self:
            return {}
        with self.in_force(steps):
            return {"kept": self._averaging.state(steps), "statistics": self._statistics}


def _cloned(buffers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in buffers.items()}


def _copy(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
    for name, value in source.items():
        target[name].copy_(value)
