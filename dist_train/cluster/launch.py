"""The launch of this process, read from its environment; and Slurm's jobs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import zlib
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime
from importlib.util import find_spec
from typing import Literal

from dist_train.config.sections import Engine
from dist_train.outcome import UsageError
from dist_train.rundir.status import LAUNCH_VARIABLE

MEMBERSHIP_VARIABLE = "DIST_TRAIN_MEMBERSHIP"  # where the ranks of an elastic launch find its coordinator: HOST:PORT
TOKEN_VARIABLE = "DIST_TRAIN_MEMBERSHIP_TOKEN"  # nosec B105  # the token that the coordinator demands of them
LISTEN_FD = "DIST_TRAIN_LISTEN_FD"  # rank 0's listening socket for the store; -1 for the other ranks

_SLURM_SETTINGS = frozenset({"SLURM_CLUSTERS", "SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_JWT", "SLURM_TIME_FORMAT"})
"""Variables of Slurm that configure its commands; all others describe a job."""
_LAUNCHER_PREFIXES = ("OMPI_", "PMIX_", "PMI_", "MV2_COMM_WORLD_", "HOROVOD_RANK", "HOROVOD_SIZE", "TORCHELASTIC_")
_STEP_AND_TORCH_VARIABLES = frozenset({"SLURM_STEP_ID", "SLURM_PROCID", "RANK", "WORLD_SIZE"})
_SLURM_PORTS = range(15000, 30000)  # below Linux's ephemeral ports
_NAMES_OF_STEP = ("SLURM_JOB_ID", "SLURM_STEP_ID", LAUNCH_VARIABLE)
_LONGEST_COMMENT = 1000


@dataclass(frozen=True)
class StoreAddress:
    """Where the ranks of a launch meet: a store of torch.distributed."""

    host: str
    port: int
    prefix: str = "dist_train"  # separates launches that share a store
    serves: bool = False  # whether this process serves it: one of the ranks, or none where the launcher does
    listen_fd: int | None = None  # the listening socket of the rank that serves it, if it has one already


@dataclass(frozen=True)
class Launch:
    """The launcher of this process, its number of ranks and its rank; `store`: where the ranks can meet by torch."""

    launcher: str
    size: int
    rank: int
    store: StoreAddress | None = None


IN_CALLBACK: ContextVar[bool] = ContextVar("in_callback", default=False)
"""Whether an observer is being called: on rank 0 alone, where meeting the other ranks would never end."""


def current_launch(environment: Mapping[str, str] = os.environ) -> Launch:
    """Return the launch by horovodrun, mpirun, srun, torchrun, dist-train launch, env://, or none. Raises UsageError.

    env:// is torch's name for variables that something else has set, such as Kubeflow's PyTorchJob.
    """
    # torchrun may itself run within a Slurm step, or be started by mpirun, one on each node.
    if LISTEN_FD in environment or "TORCHELASTIC_RUN_ID" in environment:
        launcher = "dist-train launch" if LISTEN_FD in environment else "torchrun"
        return Launch(launcher, int(environment["WORLD_SIZE"]), int(environment["RANK"]), _store_of_torch(environment))
    if "OMPI_COMM_WORLD_SIZE" in environment:
        for name in ("HOROVOD_CONTROLLER", "HOROVOD_CPU_OPERATIONS"):
            if environment.get(name, "").lower() == "gloo":
                raise UsageError(
                    f"{name}=gloo does not work under mpirun: unset it, or start with horovodrun --gloo",
                    code="gloo-under-mpirun",
                )
        return Launch("mpirun", int(environment["OMPI_COMM_WORLD_SIZE"]), int(environment["OMPI_COMM_WORLD_RANK"]))
    # of MPICH, Intel MPI, Cray PALS; of MVAPICH2's mpirun_rsh
    counts = {name: environment.get(name, "") for name in ("PMI_SIZE", "MV2_COMM_WORLD_SIZE")}
    other_mpi_sizes = {name: int(count) for name, count in counts.items() if count.isdecimal() and int(count) > 1}
    names_rank = "RANK" in environment and environment.get("WORLD_SIZE", "1") != "1"
    # A batch script has SLURM_NTASKS, too; only srun's tasks have a step of their own.
    if "SLURM_STEP_ID" in environment and "SLURM_PROCID" in environment and "HOROVOD_RANK" not in environment:
        size = int(environment.get("SLURM_STEP_NUM_TASKS", "1"))
        # Other launchers may run within a step: in an interactive one, or as a task on each node, as mpirun of Intel
        # MPI does. With srun --mpi=pmi2, PMI_SIZE is the step's size.
        if {size, *other_mpi_sizes.values()} == {size} and (size > 1 or not names_rank):
            return Launch("srun", size, int(environment["SLURM_PROCID"]), _store_of_slurm(environment))
    if "HOROVOD_SIZE" in environment:
        return Launch("horovodrun", int(environment["HOROVOD_SIZE"]), int(environment["HOROVOD_RANK"]))
    if names_rank:
        ranks, rank = environment["WORLD_SIZE"], environment["RANK"]
        if missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if not environment.get(name)]:
            raise UsageError(
                f"RANK and WORLD_SIZE={ranks} are set, but not {missing[0]}, where the ranks meet: "
                f"set it too, or unset RANK to train with one rank",
                code="launch-variables",
            )
        if not (ranks.isdecimal() and rank.isdecimal() and int(rank) < int(ranks)):
            raise UsageError(
                f"RANK={rank} and WORLD_SIZE={ranks} must be numbers, the first below the second: "
                f"correct them, or unset RANK to train with one rank",
                code="launch-variables",
            )
        return Launch("env://", int(ranks), int(rank), _store_of_torch(environment))
    for name, count in other_mpi_sizes.items():
        raise UsageError(
            f"{name}={count}: this mpirun is not Open MPI's, and its ranks cannot meet: start with dist-train "
            f"launch, srun, torchrun or Open MPI's mpirun, or unset {name} to train with one rank",
            code="launcher-unsupported",
        )
    return Launch("alone", 1, 0)


def without_launcher(environment: Mapping[str, str]) -> dict[str, str]:
    """Return `environment` without the variables by which launchers give a process its rank."""
    return {
        name: value
        for name, value in environment.items()
        if not name.startswith(_LAUNCHER_PREFIXES) and name not in _STEP_AND_TORCH_VARIABLES
    }


def is_elastic() -> bool:
    """Whether ranks of this launch may leave and join."""
    return MEMBERSHIP_VARIABLE in os.environ


def engine_of(launcher: str, asked: Engine) -> Literal["horovod", "torch"]:
    """Return the engine under `launcher` if comm.engine is `asked`."""
    if asked != "auto":
        return asked
    needs_horovod = launcher in ("horovodrun", "mpirun")
    return "horovod" if needs_horovod or (launcher == "srun" and is_installed("horovod")) else "torch"


def is_installed(module: str) -> bool:
    """Whether `module` can be found, without loading it; a mere folder of that name is none."""
    spec = find_spec(module)
    return spec is not None and spec.origin is not None


def _store_of_torch(environment: Mapping[str, str]) -> StoreAddress:
    listen_fd = int(environment.get(LISTEN_FD, "-1"))
    run = f"{environment.get('TORCHELASTIC_RUN_ID', '')}.{environment.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    return StoreAddress(
        environment["MASTER_ADDR"],
        _port(environment["MASTER_PORT"]),
        prefix=f"dist_train.{run}",
        serves=int(environment["RANK"]) == 0 and environment.get("TORCHELASTIC_USE_AGENT_STORE", "") != "True",
        listen_fd=listen_fd if listen_fd >= 0 else None,
    )


def _store_of_slurm(environment: Mapping[str, str]) -> StoreAddress | None:
    """Return the first node of the step and a port derived from its id; MASTER_ADDR and MASTER_PORT take precedence.

    Batch scripts add a random number, without which other users could tell the port beforehand. The first process there
    serves the store. It need not be rank 0: Slurm 26.05 orders ranks by the network's topology.
    """
    nodes = environment.get("SLURM_STEP_NODELIST", "")
    first = re.match(r"([^\[,]+)(?:\[(\w+))?", nodes)
    if first is None and "MASTER_ADDR" not in environment:
        return None
    host = "".join(part or "" for part in first.groups()) if first else ""
    step = ".".join(environment[name] for name in _NAMES_OF_STEP if name in environment)
    port = _SLURM_PORTS[zlib.crc32(step.encode()) % len(_SLURM_PORTS)]
    address, port = environment.get("MASTER_ADDR", host), _port(environment.get("MASTER_PORT", str(port)))
    serves = (environment.get("SLURM_NODEID"), environment.get("SLURM_LOCALID")) == ("0", "0")
    return StoreAddress(address, port, prefix=f"dist_train.{step}", serves=serves)


def _port(text: str) -> int:
    if not (text.isdecimal() and int(text) < 2**16):  # 0 for ranks of an elastic launch, which meet elsewhere
        raise UsageError(f"MASTER_PORT={text} is no port: set a number below 65536", code="launch-variables")
    return int(text)


@dataclass(frozen=True)
class SlurmJob:
    """The job of a process, its end by its time limit (seconds since 1970) if known, and Slurm's restarts of it.

    `name` selects the job in squeue and scontrol: the id of an array's last task is also that of the whole array.
    `is_requeued`: its batch script requeues it if the run has saved and stopped, as at the time limit.
    """

    id: str
    name: str
    end: float | None
    restarts: int
    is_requeued: bool = False


def current_job(environment: Mapping[str, str] = os.environ) -> SlurmJob | None:
    """Return the Slurm job that `environment` belongs to; None outside Slurm."""
    job = environment.get("SLURM_JOB_ID", "")
    if not job:
        return None
    array, task = environment.get("SLURM_ARRAY_JOB_ID", ""), environment.get("SLURM_ARRAY_TASK_ID", "")
    name = f"{array}_{task}" if array and task else job
    end, restarts = environment.get("SLURM_JOB_END_TIME", ""), environment.get("SLURM_RESTART_COUNT", "")
    return SlurmJob(
        id=job,
        name=name,
        end=int(end) if end.isdecimal() else None,
        restarts=int(restarts) if restarts.isdecimal() else 0,
        is_requeued=environment.get("DIST_TRAIN_REQUEUE") == "1",
    )


JOB_WAITS = frozenset({"PENDING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT"})
JOB_IS_ALIVE = JOB_WAITS | {"RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED"}  # states of jobs that run or will run


def job_states(jobs: Sequence[str]) -> dict[str, str]:
    """Return the state (PENDING, RUNNING, COMPLETING, ...) of those of `jobs` that Slurm still knows."""
    if not jobs:
        return {}
    # squeue accepts an unknown id among several, but not alone.
    # %A is an array task's own job id, as in its environment; %i is not. An array's id selects all of its tasks.
    lines = _squeue("--states=all", "--format=%A %T", f"--jobs={','.join(jobs)}")
    states = dict(line.split(maxsplit=1) for line in lines.splitlines() if " " in line)
    return {job: state for job, state in states.items() if job in jobs}


def array_states(arrays: Sequence[str]) -> dict[str, str]:
    """Return those of the job `arrays` that have tasks which wait or run, each with the state of one of them."""
    lines = _squeue("--format=%F %T", f"--jobs={','.join(arrays)}") if arrays else ""
    return dict(line.split(maxsplit=1) for line in lines.splitlines() if " " in line)


def job_end(job: str, seconds: float = 20.0) -> float | None:
    """Return when the time limit ends `job`, in seconds since 1970; None if Slurm does not say within `seconds`."""
    try:
        return datetime.fromisoformat(_squeue("--format=%e", f"--jobs={job}", seconds=seconds)).timestamp()
    except ValueError:
        return None


def _squeue(*options: str, seconds: float = 20.0) -> str:
    # The user's own SQUEUE_PARTITION, for example, would hide jobs.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SQUEUE_")}
    environment["SLURM_TIME_FORMAT"] = "standard"
    return command_output("squeue", "--noheader", *options, seconds=seconds, env=environment)


def comment_on_job(text: str, environment: Mapping[str, str] = os.environ) -> None:
    """Set our job's comment to `text`, for squeue and sacct; does nothing if Slurm refuses."""
    job = current_job(environment)
    if job is not None:
        line = " ".join(text.split())[:_LONGEST_COMMENT]
        command_output("scontrol", "update", f"jobid={job.name}", f"comment={line}")


def submit(script: str, options: Sequence[str]) -> str:
    """Submit the batch script with `options`, which override its own, and return the job's id. Raises UsageError."""
    if shutil.which("sbatch") is None:
        raise UsageError(
            "sbatch is missing: submit from a login node of the cluster, or use --dry-run", code="sbatch-missing"
        )
    # From within a job, sbatch would pass on that job's variables, of which Slurm sets only some anew.
    is_in_job = "SLURM_JOB_ID" in os.environ
    environment = {
        name: value
        for name, value in os.environ.items()
        if not (is_in_job and name.startswith("SLURM_")) or name in _SLURM_SETTINGS
    }
    ended = subprocess.run(
        ["sbatch", "--parsable", *options],
        input=script,
        capture_output=True,
        encoding="utf-8",
        errors="surrogateescape",  # of what the site's plug-ins print: the job may have been submitted
        env=environment,
    )
    if ended.returncode != 0:
        raise UsageError(f"sbatch refuses the job: {ended.stderr.strip()}", code="sbatch-refused")
    # A site's own sbatch may print a banner before the id.
    return ended.stdout.strip().rpartition("\n")[2].split(";")[0]


def command_output(
    *command: str, seconds: float = 20.0, stderr: int = subprocess.DEVNULL, env: Mapping[str, str] | None = None
) -> str:
    """Return what the command prints; empty if it is missing, fails or does not answer within `seconds`."""
    none, pipe = subprocess.DEVNULL, subprocess.PIPE
    try:
        ended = subprocess.run(
            command, stdin=none, stdout=pipe, stderr=stderr, text=True, timeout=seconds, check=True, env=env
        )
    except (OSError, ValueError, subprocess.SubprocessError):
        return ""
    return ended.stdout.strip()
