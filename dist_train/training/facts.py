"""What is known of a run, and of one launch of it, before its first step."""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING

import torch

from dist_train.config import Config
from dist_train.monitoring.records import RunFacts
from dist_train.training.devices import find_gpus, why_no_gpu
from dist_train.training.environment import device_name
from dist_train.training.run_directory import RunDirectory
from dist_train.training.shares import share_of

if TYPE_CHECKING:
    from dist_train.training.trainer import Trainer


def run_facts(trainer: Trainer, directory: RunDirectory, launched: float, revision: str) -> RunFacts:
    """Return the facts of the run of `trainer`, of which a launch began at `launched`, seconds since 1970."""
    config, plan, ranks = trainer.config, trainer.plan, trainer.comm
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
        steps_per_epoch=trainer.learning_rate.steps_per_epoch,
        epochs=trainer.last_step / trainer.learning_rate.steps_per_epoch,
        noise=_noise_in_words(config),
        device=device_in_words(config, trainer.take_step.compute.device),
        start_step=trainer.progress.step,
        controller=ranks.controller,
        rank=ranks.rank,
        micro_batches_of=tuple(len(share_of(config.model, plan, rank, ranks.size)) for rank in range(ranks.size)),
        revision=revision,
        slurm_job=os.environ.get("SLURM_JOB_ID", ""),
        node=socket.gethostname(),
        launched=launched,
    )


def times_requeued() -> int:
    """Return how often Slurm has started this job anew; 0 where it has not, or this is no job."""
    count = os.environ.get("SLURM_RESTART_COUNT", "")
    return int(count) if count.isdecimal() else 0


def _noise_in_words(config: Config) -> str:
    noise = config.noise
    if noise.method == "none":
        return "none"
    return f"{noise.method}, {noise.distribution} {noise.amplitude:g}, {noise.sharing}, {noise.schedule.kind}"


def device_in_words(config: Config, device: torch.device) -> str:
    """Return the device's name; with it, of a GPU, how it keeps to the same bits, and of a CPU, why it is no GPU."""
    remark = why_no_gpu(find_gpus(os.environ))
    if device.type == "cuda":
        exact = ", since comm.reduction is exact" if config.comm.reduction == "exact" else ""
        remark = f"deterministic kernels alone{exact}" if config.precision.deterministic is True else ""
    return "; ".join(filter(None, (device_name(device), remark)))
