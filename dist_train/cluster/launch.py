"""What the launcher has said about this process, read from its environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from dist_train.outcome import UsageError


@dataclass(frozen=True)
class Launch:
    """The launcher that started this process, the number of ranks that it was asked for, our number."""

    launcher: str
    size: int
    rank: int


def read_launch(environment: Mapping[str, str]) -> Launch:
    """Return how this process was launched: by horovodrun, mpirun, srun, or alone.

    Raises:
        UsageError: the environment asks Horovod for what is known to crash or to part the ranks.
    """
    if "OMPI_COMM_WORLD_SIZE" in environment:
        launch = Launch("mpirun", int(environment["OMPI_COMM_WORLD_SIZE"]), int(environment["OMPI_COMM_WORLD_RANK"]))
        _refuse_gloo_under_mpi(environment)
        return launch
    # A batch script has SLURM_NTASKS too; only the tasks of srun have a step of their own.
    if "SLURM_STEP_ID" in environment and "SLURM_PROCID" in environment and "HOROVOD_RANK" not in environment:
        return Launch("srun", int(environment.get("SLURM_STEP_NUM_TASKS", "1")), int(environment["SLURM_PROCID"]))
    if "HOROVOD_SIZE" in environment:
        return Launch("horovodrun", int(environment["HOROVOD_SIZE"]), int(environment["HOROVOD_RANK"]))
    return Launch("alone", 1, 0)


def current_launch() -> Launch:
    """Return how this very process was launched."""
    return read_launch(os.environ)


def _refuse_gloo_under_mpi(environment: Mapping[str, str]) -> None:
    for name in ("HOROVOD_CONTROLLER", "HOROVOD_CPU_OPERATIONS"):
        if environment.get(name, "").lower() == "gloo":
            raise UsageError(f"{name}=gloo does not work under mpirun: unset it, or start with horovodrun --gloo")
