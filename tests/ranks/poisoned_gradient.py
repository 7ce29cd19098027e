"""`dist-train`, except that one rank's gradient is NaN in one step.

`python -m tests.ranks.poisoned_gradient RANK STEP ARGUMENTS...`
"""

from __future__ import annotations

import sys
from typing import Any

from dist_train.cli.main import main
from dist_train.cluster.launch import current_launch
from dist_train.training.step import TrainingStep

if __name__ == "__main__":
    rank, step = int(sys.argv[1]), int(sys.argv[2])
    add_gradient = TrainingStep._add_gradient

    def poisoned(self: TrainingStep, batch: Any, micro_batch: Any, is_last: bool) -> None:
        if current_launch().rank == rank and batch.step + 1 == step:
            self.model.get_parameter("classifier.bias").data.fill_(float("nan"))
        add_gradient(self, batch, micro_batch, is_last)

    TrainingStep._add_gradient = poisoned  # type: ignore[method-assign]  # the fault under test
    raise SystemExit(main(sys.argv[3:]))
