"""What a launch records about itself: revision, versions, device, and the facts known before the first step."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

import dist_train
from dist_train.cluster.devices import find_gpus, why_no_gpu
from dist_train.cluster.inspection import installed_version, loaded_mpi_version
from dist_train.cluster.launch import command_output
from dist_train.config import Config
from dist_train.rundir.paths import RunDirectory
from dist_train.rundir.records import RunFacts
from dist_train.training.micro_batches import share_of

if TYPE_CHECKING:
    from dist_train.training.trainer import Trainer

_GIT_SECONDS = 5.0


def revision(root: Path = Path(dist_train.__file__).parents[1]) -> str:
    """Return dist_train's version, and its commit if `root` is a git repository: `0.1.0 (063e7bc-dirty)`."""
    commit = ""
    if (root / ".git").exists():
        # git describe must not write to a repository that others may share.
        git = ("git", "--no-optional-locks", "-C", str(root))
        commit = command_output(*git, "describe", "--always", "--dirty", "--exclude=*", seconds=_GIT_SECONDS)
    return f"{dist_train.__version__} ({commit})" if commit else dist_train.__version__


def launch_environment(revision: str, controller: str, device: torch.device) -> dict[str, str]:
    """Return names and versions for `status.json`; `controller`: the backend of the ranks, which decides about MPI."""
    return {
        "dist_train": revision,
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": installed_version("torchvision") or "not installed",
        "Horovod": installed_version("horovod") or "not installed",
        "MPI": (loaded_mpi_version() or "unknown") if controller == "mpi" else f"not used ({controller})",
        "NumPy": np.__version__,
        "device": device_name(device),
    }


def device_name(device: torch.device, processors: Path = Path("/proc/cpuinfo")) -> str:
    """Return the name of the GPU, or of the CPU according to `processors`, or else the CPU's architecture."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = processors.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    # some architectures lack this line
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.machine()


def run_facts(
    trainer: Trainer, directory: RunDirectory, launched: float, revision: str, run_id: str, nodes: tuple[str, ...]
) -> RunFacts:
    """Return the facts of the run of `trainer`; `launched`: when this launch began, in seconds since 1970."""
    config, plan, ranks = trainer.config, trainer.plan, trainer.comm
    noise, device = config.noise, trainer.take_step.compute.device
    noise_parts = (
        *(noise.method, f"{noise.distribution} {noise.amplitude:g}", noise.sharing, noise.schedule.kind),
        f"draws {noise.draws}" if noise.draws > 1 else "",
        "antithetic" if noise.antithetic else "",
        f"mix {noise.mix:g}" if noise.mix < 1 else "",
    )
    return RunFacts(
        name=directory.root.name,
        run_directory=directory.root,
        model=f"{config.model.name}, width {config.model.width:g}, {config.model.norm} norm",
        data=config.data.name,
        parameters=trainer.take_step.weights.count,
        global_size=plan.global_size,
        micro_size=plan.micro_size,
        micro_batches=len(plan.micro_batches),
        world_size=ranks.size,
        total_steps=trainer.last_step,
        steps_per_epoch=trainer.epochs.stage(min(trainer.progress.step, trainer.last_step - 1)).steps_per_epoch,
        epochs=trainer.epochs.done(trainer.last_step),
        stages=trainer.epochs.stages if len(trainer.epochs.stages) > 1 else (),
        noise="none" if noise.method == "none" else ", ".join(filter(None, noise_parts)),
        device=describe_device(config, device),
        start_step=trainer.progress.step,
        controller=ranks.controller,
        rank=ranks.rank,
        micro_batches_of=tuple(len(share_of(config.model, plan, rank, ranks.size)) for rank in range(ranks.size)),
        revision=revision,
        slurm_job=os.environ.get("SLURM_JOB_ID", ""),
        node=nodes[ranks.rank],
        nodes=nodes,
        launched=launched,
        run_id=run_id,
        device_memory=torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0,
        time_limit=trainer.time_limit.end or 0.0,
        generation=ranks.generation,
    )


def describe_device(config: Config, device: torch.device) -> str:
    """Return the device's name; for a GPU, also whether its kernels are deterministic; for a CPU, why it is no GPU."""
    remark = why_no_gpu(find_gpus(os.environ))
    if device.type == "cuda":
        reason = f", since comm.reduction is {config.comm.reduction}" if config.comm.is_exact else ""
        remark = f"deterministic kernels alone{reason}" if config.precision.deterministic is True else ""
    return "; ".join(filter(None, (device_name(device), remark)))
