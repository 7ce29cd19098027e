"""What the ranks tell each other in every step, in one small sum of integers."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dist_train.cluster.communicator import Communicator, Pending
from dist_train.fixed_point import LOSSES
from dist_train.models.batch_statistics import BatchStatistics

_LOSS, _CORRECT, _SAMPLES, _OUT_OF_RANGE, _OUT_OF_MEMORY, _STOP, _SLOTS = range(7)

_TERM_LIMIT = LOSSES.term_limit(4096)
"""As many micro-batches as any global batch or split in use has; their sum cannot leave the range."""


@dataclass(frozen=True)
class TallyResult:
    """The sum over all ranks: mean loss and accuracy of `samples` samples, and how many ranks say what."""

    loss: float
    accuracy: float
    samples: int
    out_of_range: int
    out_of_memory: int
    stop: int
    statistics: torch.Tensor
    """The sums of `BatchStatistics`."""


class Tally:
    """Counts on the device, without waiting for it, until `result` is asked for."""

    def __init__(self, comm: Communicator, statistics: BatchStatistics, device: torch.device) -> None:
        """Count on `device`, together with `statistics`."""
        self._comm = comm
        self._statistics = statistics
        self._counts = torch.zeros(_SLOTS, dtype=torch.int64, device=device)
        self._samples = 0
        self._sent = self._counts
        self._pending: Pending | None = None

    def clear(self) -> None:
        """Begin anew, the norms' statistics too."""
        self._counts.zero_()
        self._samples = 0
        self._statistics.clear()

    def add(self, loss_sum: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """Count a micro-batch: the sum of its losses, and how many of its `labels` the `logits` get right."""
        loss = loss_sum.detach().to(torch.float64)
        finite = loss.abs() < _TERM_LIMIT
        # An assignment to an element would copy it onto itself.
        self._counts[_LOSS].add_(LOSSES.encode(torch.where(finite, loss, 0.0)))
        self._counts[_OUT_OF_RANGE].add_(~finite)
        self._counts[_CORRECT].add_((logits.argmax(dim=1) == labels).sum())
        self._samples += len(labels)

    def send(
        self, *, out_of_range: torch.Tensor | None = None, out_of_memory: bool = False, stop: bool = False
    ) -> None:
        """Start the sum over the ranks, with what this rank has to say beside its counts."""
        if out_of_range is not None:
            self._counts[_OUT_OF_RANGE].add_(out_of_range)
        self._counts[_OUT_OF_RANGE].add_(self._statistics.out_of_range)
        self._counts[_SAMPLES] = self._samples
        self._counts[_OUT_OF_MEMORY] = int(out_of_memory)
        self._counts[_STOP] = int(stop)
        self._sent = torch.cat([self._counts, self._statistics.sums])
        self._pending = self._comm.allreduce_async(self._sent, "tally")

    def result(self) -> TallyResult:
        """Wait for the sum and return it."""
        assert self._pending is not None, "nothing was sent"
        self._pending.wait()
        counts: list[int] = self._sent[:_SLOTS].tolist()
        samples = counts[_SAMPLES]
        return TallyResult(
            loss=counts[_LOSS] * 2.0**-LOSSES.bits / samples if samples else 0.0,
            accuracy=counts[_CORRECT] / samples if samples else 0.0,
            samples=samples,
            out_of_range=counts[_OUT_OF_RANGE],
            out_of_memory=counts[_OUT_OF_MEMORY],
            stop=counts[_STOP],
            statistics=self._sent[_SLOTS:],
        )
