"""`dist-train`, except that the rank is killed whenever it reaches one step.

`python -m tests.cluster.crash_at_step STEP ARGUMENTS...`
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from dist_train.cli.main import main
from dist_train.training.step import TrainingStep

if __name__ == "__main__":
    step = int(sys.argv[1])
    add_gradient = TrainingStep._add_gradient

    def dying(self: TrainingStep, batch: Any, micro_batch: Any, is_last: bool) -> None:
        if batch.step + 1 == step:
            os.kill(os.getpid(), signal.SIGKILL)
        add_gradient(self, batch, micro_batch, is_last)

    TrainingStep._add_gradient = dying  # type: ignore[method-assign]  # the fault under test
    raise SystemExit(main(sys.argv[2:]))
