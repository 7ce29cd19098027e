"""Runs that are submitted by `sbatch slurm/lb_8192.sh`, two ranks a node."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tests.cluster.cluster import ROOT, Cluster, Job, status
from tests.cluster.runs import Undisturbed
from tests.launching import weights_digest
from tests.waiting import wait_for


class Submitted:
    """A run that was submitted."""

    def __init__(self, cluster: Cluster, folder: Path, config: str, *options: str, **environment: str) -> None:
        self.run = folder / "run"
        self._cluster = cluster
        knobs = {
            "CONFIG": config,
            "RUN_DIR": str(self.run),
            "RANKS_PER_NODE": "2",
            "LOSS_SECONDS": "10",
            "GUARD_SECONDS": "5",
        }
        self.job = cluster.sbatch(folder, "lb_8192.sh", *options, **{**knobs, **environment})

    def wait_for(self, condition: Callable[[Mapping[str, Any]], bool]) -> None:
        """Wait until the run's status, empty where there is none yet, is as `condition` says."""
        wait_for(lambda: condition(status(self.run)), lambda: self._cluster.job(self.job).output)

    def wait_for_step(self, step: int) -> None:
        self.wait_for(lambda found: found.get("state") == "running" and found["step"] >= step)

    def wait(self) -> Job:
        return self._cluster.wait(self.job)


def assert_equal_bit_identically(ended: Job, run: Path, undisturbed: Undisturbed) -> None:
    assert (ended.state, ended.code) == ("COMPLETED", 0), ended.output
    assert status(run)["state"] == "finished"
    assert weights_digest(run) == undisturbed.weights


def training_by(folder: Path, module: str) -> dict[str, str]:
    """Return the variables that let `module` train in our program's place."""
    python = folder / "python"
    python.write_text(
        f"""#!/bin/bash
if [[ $1 == -m && $3 == train ]]; then
    exec {sys.executable} -m {module} "${{@:3}}"
fi
exec {sys.executable} "$@"
"""
    )
    python.chmod(0o755)
    # mpirun may stand beside the Python that `python` takes the place of
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {"DIST_TRAIN_PYTHON": str(python), "PYTHONPATH": str(ROOT), "PATH": path}
