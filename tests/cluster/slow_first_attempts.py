"""`dist-train`, except that it sleeps before each gradient until Slurm has requeued the job ATTEMPTS times.

`python -m tests.cluster.slow_first_attempts ATTEMPTS ARGUMENTS...`
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any

from dist_train.cli.main import main
from dist_train.training.step import TrainingStep

if __name__ == "__main__":
    attempts = int(sys.argv[1])
    add_gradient = TrainingStep._add_gradient

    def slow(self: TrainingStep, batch: Any, micro_batch: Any, is_last: bool) -> None:
        if int(os.environ.get("SLURM_RESTART_COUNT", "0")) < attempts:
            time.sleep(0.7)  # fewer than 100 of 300 updates in a minute, Slurm's shortest time limit
        add_gradient(self, batch, micro_batch, is_last)

    TrainingStep._add_gradient = slow  # type: ignore[method-assign]  # the delay that the test needs
    raise SystemExit(main(sys.argv[2:]))
