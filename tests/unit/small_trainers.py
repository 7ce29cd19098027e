"""A trainer of a tiny run on synthetic images, built as the program builds it, on any group of ranks."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from dist_train.checkpoint.files import Contents
from dist_train.checkpoint.state import Progress, TrainState
from dist_train.cluster.communicator import Communicator
from dist_train.config import AveragingSettings, Config, NoiseSettings, parse_config
from dist_train.launching.assembly import assemble
from dist_train.launching.preflight import ResumePoint
from dist_train.launching.session import Session
from dist_train.monitoring.observers import Observers
from dist_train.optim.averaging import Averaging
from dist_train.optim.flat_weights import FlatWeights
from dist_train.optim.noise import build_noise
from dist_train.rundir.paths import RunDirectory
from dist_train.rundir.records import Observer
from dist_train.training.reduction import GradientReduction, set_up_reduction
from dist_train.training.stopping import StopRequests
from dist_train.training.trainer import Trainer

SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "run": {"name": "small", "epochs": 2},
    "data": {"name": "synthetic", "synthetic_samples": 100, "synthetic_shape": [1, 8, 8]},
    "model": {"width": 0.03125, "ghost_size": 4, "norm_samples": 30},
    "batch": {"global_size": 26, "micro_size": 6},
    "noise": {"method": "smoothout", "amplitude": 0.02},
    "optimizer": {"learning_rate": 0.05},
    "precision": {"threads": 1},
    "evaluation": {"batch_size": 9, "train_samples": 20},
    "metrics": {"enabled": False},
}
"""Three updates an epoch, of five micro-batches: four of 6 samples and one of 2."""


def small_config(**sections: Mapping[str, Any]) -> Config:
    """Return the settings of the tiny run, changed by `sections`."""
    names = {*SETTINGS, *sections}
    merged = {name: {**SETTINGS.get(name, {}), **sections.get(name, {})} for name in names}
    return parse_config(merged, source="test")


def build_trainer(
    config: Config,
    folder: Path,
    comm: Communicator,
    *,
    observers: Sequence[Observer] = (),
    contents: Contents | None = None,
) -> Trainer:
    """Return the trainer of `config` on one of `ranks`, its run directory in `folder`."""
    directory = RunDirectory(folder)
    if comm.rank == 0:
        directory.create()
    session = Session(directory, comm, Observers(observers))
    return assemble(ResumePoint(config, contents), session, StopRequests())


def state_of(network: nn.Module, weights: FlatWeights, optimizer: Optimizer) -> TrainState:
    """Return the state of a run without noise and averages."""
    noise = build_noise(NoiseSettings(), weights, seed=0, total_steps=1, rank=0)
    return TrainState(network, weights, optimizer, Averaging(AveragingSettings(), weights, 1), noise)


def build_reduction(weights: FlatWeights, comm: Communicator, micro_batches: int, **settings: Any) -> GradientReduction:
    """Return the reduction over `comm` that the `comm` section `settings` names, for batches of single samples."""
    batch = {"global_size": micro_batches, "micro_size": 1}
    config = parse_config({"model": {"norm": "none"}, "batch": batch, "comm": settings}, source="test")
    noise = build_noise(config.noise, weights, seed=0, total_steps=1, rank=comm.rank)
    return set_up_reduction(config, weights, noise, comm, Progress())


def state_bits(model: nn.Module) -> dict[str, bytes]:
    """Return every tensor of the state of `model` as bytes, to compare bit-identically."""
    return {name: tensor.contiguous().numpy().tobytes() for name, tensor in model.state_dict().items()}


def gradient_bits(trainer: Trainer) -> bytes:
    """Return the flat gradient as bytes."""
    gradients: torch.Tensor = trainer.training_step.weights.gradients
    return gradients.numpy().tobytes()


def seed_all(seed: int) -> None:
    """Seed the global generators of torch, Python and NumPy."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


def drawn() -> tuple[float, float, float]:
    """Draw from the three."""
    return float(torch.rand(())), random.random(), float(np.random.random())
