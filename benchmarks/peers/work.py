"""The work that all peers share: data, sizes, clock. It needs only PyTorch, because some peers run in an environment
without dist_train.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import astuple, dataclass

import torch
from torch import Tensor, nn

from benchmarks.bare_loop import bare_vgg9
from benchmarks.launching import tell

LEARNING_RATE = 0.01
MOMENTUM = 0.9


@dataclass(frozen=True)
class Work:
    """`updates` timed updates of VGG9 of `width` on `batch` samples by all `ranks`, after `warm_up` untimed ones."""

    width: float
    batch: int
    ranks: int
    updates: int
    warm_up: int

    @property
    def micro_batch(self) -> int:
        """Samples of one forward and backward pass."""
        return min(128, self.batch // self.ranks)

    @property
    def passes(self) -> int:
        """Passes of a rank in one update."""
        return self.batch // self.ranks // self.micro_batch

    @property
    def samples(self) -> int:
        """Samples of the data set: at least two updates, and enough for many small ones."""
        return max(2 * self.batch, 4096)

    def arguments(self) -> list[str]:
        """Return the command-line arguments of a peer's program."""
        return [str(value) for value in astuple(self)]


def work_from_arguments() -> Work:
    """Return the work that the command line describes, and set torch to one thread, as for all peers."""
    parser = argparse.ArgumentParser()
    parser.add_argument("width", type=float)
    for name in ("batch", "ranks", "updates", "warm_up"):
        parser.add_argument(name, type=int)
    work = Work(**vars(parser.parse_args()))
    torch.set_num_threads(1)
    return work


def images_and_labels(samples: int) -> tuple[Tensor, Tensor]:
    """Return uint8 images [samples, 3, 32, 32] and labels [samples], the same for all peers."""
    source = torch.Generator().manual_seed(1)
    images = torch.randint(256, (samples, 3, 32, 32), dtype=torch.uint8, generator=source)
    return images, torch.randint(10, (samples,), generator=source)


def vgg9(width: float) -> nn.Module:
    """Return the network, with the same initial weights for all peers."""
    torch.manual_seed(1)
    return bare_vgg9(3, 10, width)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    """Return the optimizer that all peers use."""
    return torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM, nesterov=True)


class Clock:
    """Takes the time at the end of every update."""

    def __init__(self, work: Work) -> None:
        """Count the updates of `work`."""
        self._work = work
        self._ends: list[float] = []

    def update_ended(self) -> bool:
        """Take the time; return whether that was the last update."""
        self._ends.append(time.perf_counter())
        return len(self._ends) > self._work.warm_up + self._work.updates

    def report(self) -> None:
        """Print the mean seconds of the timed updates."""
        ends = self._ends[self._work.warm_up :]
        tell((ends[-1] - ends[0]) / (len(ends) - 1))
