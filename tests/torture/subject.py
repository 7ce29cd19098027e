"""The disturbed run: a model of a few thousand weights, with some hundred updates of a few milliseconds."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from tests.archives import write_fashion_mnist
from tests.launching import results, small_settings, weights_digest

Data = Literal["synthetic", "cached"]

STEPS_PER_EPOCH = 4
_BATCH = 16
_ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class FinalState:
    """The weights' digest and the records of a finished run."""

    digest: str
    results: str


@dataclass(frozen=True)
class Subject:
    """A run's configuration, data, number of updates and environment."""

    config: Path
    data: Data
    steps: int
    code: Path
    """The folder of a copy of the program, which later edits do not change."""
    cache: Path

    def arguments(self, run: Path, *overrides: str) -> list[str]:
        """Return the arguments that train in `run`."""
        return ["train", str(self.config), "--run-dir", str(run), *overrides]

    def environment(self) -> dict[str, str]:
        """Return the variables that a launch needs."""
        folder = self.config.parent
        return {
            "DIST_TRAIN_CACHE": str(self.cache),
            "OMP_NUM_THREADS": "1",
            "TORTURE_DATA": str(folder / "data"),
            "TORTURE_OTHER_DATA": str(folder / "other"),
        }


def make_subject(folder: Path, code: Path, data: Data, epochs: int) -> Subject:
    """Write the configuration, and cached data, into the new `folder`."""
    folder.mkdir(parents=True)
    samples = STEPS_PER_EPOCH * _BATCH + 2
    sections: dict[str, Any] = {
        "run": {"name": "tortured", "epochs": epochs},
        "model": {"width": 0.03125, "ghost_size": 4, "norm_samples": 16},
        "batch": {"global_size": _BATCH, "micro_size": 8},
        "noise": {"method": "smoothout", "amplitude": 0.02, "sharing": "micro_batch", "schedule": {"kind": "cosine"}},
        "schedule": {"warmup_epochs": 2, "decay": "cosine"},
        "checkpoint": {"every_epochs": 0, "every_steps": 5},
        "evaluation": {"every_epochs": 10, "batch_size": 64, "train_samples": 16},
        "comm": {"timeout": 12.0, "verify_every": 20},
        "metrics": {"enabled": False},
    }
    if data == "cached":
        for name in ("data", "other"):
            root = folder / name
            root.mkdir()
            write_fashion_mnist(root, "train", samples if name == "data" else samples + 1)
            write_fashion_mnist(root, "test", 20)
        sections["data"] = {"name": "fashion-mnist", "root": str(folder / "data")}
    else:
        sections["data"] = {"name": "synthetic", "synthetic_samples": samples, "synthetic_shape": [1, 8, 8]}
    settings = small_settings(**sections)
    if data == "cached":
        settings["data"] = sections["data"]
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return Subject(path, data, epochs * STEPS_PER_EPOCH, code, folder / "cache")


def copy_code(folder: Path) -> Path:
    """Copy the program and these tests into the new `folder`; return it."""
    for name in ("dist_train", "tests"):
        shutil.copytree(_ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "golden"))
    return folder


def final_state(run: Path) -> FinalState:
    """Return the final state of `run`."""
    return FinalState(weights_digest(run), json.dumps(results(run), sort_keys=True))
