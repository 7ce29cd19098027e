"""Rows of the bytes that a rank hands over for sums in an update, gradients and tally: counted, not timed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import Tensor

from benchmarks.subject import QUIET, open_trainer, settings
from benchmarks.timing import Ratio, ratio_of
from dist_train.cluster.communicator import Pending, SingleProcess

_MB = 1e6
_BAR = 1.01


class CountingCommunicator(SingleProcess):
    """One rank that counts the bytes of all allreduces."""

    def __init__(self) -> None:
        self.sent = 0

    def allreduce_async(self, tensor: Tensor, name: str) -> Pending:
        """Count `tensor`, the sum of one rank."""
        self.sent += tensor.nbytes
        return super().allreduce_async(tensor, name)


def bytes_per_update(**comm: str) -> int:
    """Return the bytes of VGG9's third update, width 1, one micro-batch of 128, with the settings `comm`."""
    counting = CountingCommunicator()
    with TemporaryDirectory() as folder:
        sections = {**QUIET, "comm": {"verify_every": 0, **comm}}
        trainer = open_trainer(settings(1.0, 128, **sections), counting, Path(folder) / "run")
        for _ in range(2):
            trainer.advance()
        counting.sent = 0
        trainer.advance()
    return counting.sent


def rows() -> Iterator[Ratio]:
    """Yield each exact reduction beside floats of as many bits; `exact`, which has none, beside float32."""
    floats = {
        "float": bytes_per_update(reduction="float"),
        "float, fp16": bytes_per_update(reduction="float", compression="fp16"),
    }
    for ours, theirs, bar in (("exact", "float", None), ("exact32", "float", _BAR), ("exact16", "float, fp16", _BAR)):
        amounts = [(bytes_per_update(reduction=ours) / _MB, floats[theirs] / _MB)]
        yield ratio_of("bytes of an update, VGG9 width 1", ours, theirs, amounts, bar, unit="MB")
