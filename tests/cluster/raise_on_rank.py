"""`dist-train`, except that one rank raises an exception at one step.

`python -m tests.cluster.raise_on_rank RANK STEP ARGUMENTS...`
"""

from __future__ import annotations

import sys
from typing import Any

from dist_train.cli.main import main
from dist_train.cluster.launch import current_launch
from dist_train.training.step import TrainingStep

if __name__ == "__main__":
    rank, step = map(int, sys.argv[1:3])
    add_gradient = TrainingStep._add_gradient

    def failing(self: TrainingStep, batch: Any, micro_batch: Any, is_last: bool) -> None:
        if batch.step + 1 == step and current_launch().rank == rank:
            raise OSError("the disk of this node is gone")
        add_gradient(self, batch, micro_batch, is_last)

    TrainingStep._add_gradient = failing  # type: ignore[method-assign]  # the fault under test
    raise SystemExit(main(sys.argv[3:]))
