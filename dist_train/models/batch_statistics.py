"""Running statistics of a model's norms that are a function of the global batch alone.

What the norms saw is added up as integers; when the global batch is complete, whoever trains sums these over the
ranks and calls `absorb`. So neither the number of ranks nor the order of micro-batches changes a bit of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor

from dist_train.fixed_point import STATISTICS
from dist_train.models.norms import GroupedBatchNorm

_LIMIT = STATISTICS.term_limit(4096)
"""As many groups as any global batch in use has; their sum cannot leave the range."""


class BatchStatistics:
    """`sums`, int64 [2 C of all norms]: norm by norm the means and the variances, times samples, so far."""

    def __init__(self, norms: Sequence[GroupedBatchNorm], device: torch.device) -> None:
        """Begin a global batch that `norms`, on `device`, are to see."""
        self._norms = tuple(norms)
        self._running = [average for norm in norms for average in (norm.running_mean, norm.running_var)]
        self._lengths = [len(average) for average in self._running]
        self.sums = torch.zeros(sum(self._lengths), dtype=torch.int64, device=device)
        self.out_of_range = torch.zeros((), dtype=torch.bool, device=device)
        """Whether some group's statistics were not finite or too large; a bool on the device."""

    def clear(self) -> None:
        """Begin a global batch."""
        self.forget()
        self.sums.zero_()
        self.out_of_range.zero_()

    def forget(self) -> None:
        """Leave out what was seen since the last `collect`."""
        for norm in self._norms:
            norm.seen.clear()

    def collect(self) -> None:
        """Count the groups that were seen since the last time; after every forward pass that counts."""
        for seen in zip(*(norm.seen for norm in self._norms), strict=True):
            weighted = torch.cat([average for groups in seen for average in (groups.means, groups.variances)], dim=1)
            start = 0
            for size, alike in groupby(seen[0].sizes):
                stop = start + len(list(alike))
                weighted[start:stop].mul_(size)
                start = stop
            # Written so that a NaN, for which no comparison holds, is out of range.
            self.out_of_range |= ~(weighted.abs().amax() < _LIMIT)
            self.sums += STATISTICS.encode(weighted).sum(0)
        self.forget()

    def absorb(self, sums: Tensor, samples: int, momentum: float) -> None:
        """Move the running averages by `momentum` towards the means that `sums` of `samples` samples give.

        `sums` are those of all ranks; momentum 1 replaces the averages.
        """
        means = (STATISTICS.decode(sums) / samples).to(torch.float32)
        if self._norms:
            torch._foreach_lerp_(self._running, list(means.split(self._lengths)), momentum)
