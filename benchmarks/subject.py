"""Our trainer, advanced update by update so that it can be timed against something else."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dist_train.cluster.communicator import Communicator
from dist_train.config import Config, parse_config
from dist_train.launching.assembly import assemble
from dist_train.launching.preflight import ResumePoint
from dist_train.launching.session import Session, build_observers
from dist_train.rundir.paths import RunDirectory
from dist_train.training.stopping import StopRequests
from dist_train.training.trainer import Trainer

QUIET: Mapping[str, Mapping[str, Any]] = {
    "metrics": {"enabled": False, "every_steps": 1_000_000},
    "evaluation": {"every_epochs": 0},
    "checkpoint": {"every_epochs": 0},
    "comm": {"verify_every": 0},
}
"""Settings for updates only: no metrics, evaluations, checkpoints or agreement checks."""


def settings(width: float, global_size: int, **sections: Mapping[str, Any]) -> Config:
    """Return the configuration of VGG9 on synthetic CIFAR-sized images, without noise, ghost norm over 128."""
    base: dict[str, dict[str, Any]] = {
        "run": {"name": "bench", "epochs": 1_000},
        "data": {"name": "synthetic", "synthetic_samples": max(2 * global_size, 4096)},
        "model": {"name": "vgg9", "width": width},
        "batch": {"global_size": global_size, "micro_size": min(128, global_size)},
        "optimizer": {"learning_rate": 0.01},
        "precision": {"threads": 1},
    }
    for name, values in sections.items():
        base[name] = {**base.get(name, {}), **values}
    return parse_config(base, source="benchmark")


def open_trainer(config: Config, comm: Communicator, directory: Path) -> Trainer:
    """Return the trainer of `config` in a new run directory, ready for its first update."""
    run = RunDirectory(directory)
    run.create()
    session = Session(run, comm, build_observers(config.metrics, run, comm.rank))
    trainer = assemble(ResumePoint(config), session, StopRequests())
    session.trainer = trainer
    session.begin(ResumePoint(config))
    return trainer
