"""Runs submitted by `sbatch slurm/lb_8192.sh`, with two ranks per node."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tests.cluster.cluster import ROOT, Cluster, Job
from tests.cluster.runs import Undisturbed
from tests.launching import status, weights_digest
from tests.waiting import wait_for

_PACED = """
import time
from pathlib import Path
from dist_train.optim.noise import SmoothOut


class Paced(SmoothOut):
    def perturb(self, step):
        if step >= 40 and not Path(__file__).with_name("hurry").exists():
            time.sleep(1.0)
        super().perturb(step)
"""


def paced(folder: Path, **variables: str) -> dict[str, str]:
    """Return `variables` of a job of the long run, which after 40 updates makes one a second, until `hurry(folder)`.

    What a test does in the middle of the run does not come too late then, also on a busy machine.
    """
    return {**variables, "OVERRIDES": f"noise.method={paced_noise(folder)} {variables.get('OVERRIDES', '')}"}


def paced_noise(folder: Path) -> str:
    """Return the noise method that does this."""
    (folder / "paced.py").write_text(_PACED)
    return f"{folder}/paced.py:Paced"


def hurry(folder: Path) -> None:
    """Let the run that is `paced` in `folder` continue without pauses."""
    (folder / "hurry").touch()


class SubmittedRun:
    """A submitted run, and its job."""

    def __init__(self, cluster: Cluster, folder: Path, config: str, *options: str, **environment: str) -> None:
        self.run = folder / "run"
        self._cluster = cluster
        defaults = {
            "CONFIG": config,
            "RUN_DIR": str(self.run),
            "RANKS_PER_NODE": "2",
            "LOSS_SECONDS": "10",
            "GUARD_SECONDS": "5",
        }
        self.job = cluster.sbatch(folder, "lb_8192.sh", *options, **{**defaults, **environment})

    def wait_for(self, condition: Callable[[Mapping[str, Any]], bool]) -> None:
        """Wait until `condition` holds for the run's status, which is empty at first."""
        wait_for(lambda: condition(status(self.run)), lambda: self._cluster.job(self.job).output)

    def wait_for_step(self, step: int) -> None:
        self.wait_for(lambda found: found.get("state") == "running" and found["step"] >= step)

    def wait_for_restarts(self, count: int) -> None:
        """Wait until Slurm has restarted the job at least so many times."""
        wait_for(lambda: self._cluster.job(self.job).restarts >= count, lambda: self._cluster.job(self.job).output)

    def wait(self) -> Job:
        """Wait for the final state of the job and return it."""
        return self._cluster.wait(self.job)

    def wait_for_weights_of(self, undisturbed: Undisturbed) -> Job:
        """Wait for the end of the job, which must finish with the weights of `undisturbed`."""
        ended = self.wait()
        assert_finished_like(ended, self.run, undisturbed)
        return ended


def assert_finished_like(ended: Job, run: Path, undisturbed: Undisturbed) -> None:
    """Check that the job has finished its run with the weights of `undisturbed`."""
    assert (ended.state, ended.code) == ("COMPLETED", 0), ended.output
    assert status(run)["state"] == "finished"
    assert weights_digest(run) == undisturbed.weights


def train_with(folder: Path, module: str) -> dict[str, str]:
    """Return the variables that make jobs train with `module` instead of `dist_train`."""
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
    # mpirun may be beside the Python that `python` replaces.
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {"DIST_TRAIN_PYTHON": str(python), "PYTHONPATH": str(ROOT), "PATH": path}
