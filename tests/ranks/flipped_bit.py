"""`dist-train`, except that one bit of one rank's weights or noise flips after one step.

`python -m tests.ranks.flipped_bit weights|noise RANK STEP ARGUMENTS...`
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from dist_train.cli.main import main
from dist_train.cluster.launch import current_launch
from dist_train.training.step import TrainingStep


def flip(values: torch.Tensor) -> None:
    values.view(torch.int32)[5] ^= 1 << 3


if __name__ == "__main__":
    target, rank, step = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    make_update = TrainingStep.__call__

    def call(self: TrainingStep, batch: Any, *arguments: Any) -> Any:
        update = make_update(self, batch, *arguments)
        if current_launch().rank == rank:
            if target == "weights" and batch.step + 1 == step:
                flip(self.weights.values)
            if target == "noise" and batch.step + 1 >= step:
                flip(self.noise._draws.values)  # type: ignore[attr-defined]  # the draw that is verified
        return update

    TrainingStep.__call__ = call  # type: ignore[method-assign, assignment]  # the fault under test
    raise SystemExit(main(sys.argv[4:]))
