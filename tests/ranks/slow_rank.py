"""`dist-train`, except that one rank sleeps after each micro-batch.

`python -m tests.ranks.slow_rank RANK MILLISECONDS ARGUMENTS...`
"""

from __future__ import annotations

import sys
import time
from typing import Any

from dist_train.cli.main import main
from dist_train.cluster.launch import current_launch
from dist_train.training.step import TrainingStep

if __name__ == "__main__":
    rank, milliseconds = int(sys.argv[1]), int(sys.argv[2])
    add_gradient = TrainingStep._add_gradient

    def slow(self: TrainingStep, batch: Any, micro_batch: Any, is_last: bool) -> None:
        add_gradient(self, batch, micro_batch, is_last)
        if current_launch().rank == rank:
            time.sleep(milliseconds / 1000)

    TrainingStep._add_gradient = slow  # type: ignore[method-assign]  # the delay under test
    raise SystemExit(main(sys.argv[3:]))
