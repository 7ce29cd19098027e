"""Promise 3 with `comm.reduction: exact32` and `exact16`, also where gradients jump and updates are repeated."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.launching import (
    assert_same_run,
    events,
    final_checkpoint,
    mostly_lengthy,
    small_settings,
    train_alone,
    train_ranks,
    write_config,
)

pytestmark = pytest.mark.ranks

JUMPING = """
import dist_train
import torch
from torch import nn


class Jumping(nn.Module):
    '''A perceptron that multiplies one image in a hundred by a thousand.'''

    def __init__(self, inputs, classes):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(inputs, 16), nn.ReLU(), nn.Linear(16, classes))

    def forward(self, images):
        inputs = images.flatten(1)
        is_bright = inputs[:, :1] > inputs[:, 1:].amax(1, keepdim=True)
        return self.layers(torch.where(is_bright, 1e3, 1.0) * inputs)


@dist_train.register("models", "jumping")
def jumping(images, width, norm):
    return Jumping(images.shape[0] * images.shape[1] * images.shape[2], images.classes)
"""


def write_jumping_run(folder: Path, updates: int, reduction: str = "exact32") -> str:
    """Write a configuration of so many updates of seven micro-batches, some with jumping gradients; return its path."""
    (folder / "jumping.py").write_text(JUMPING)
    settings = small_settings(
        run={"epochs": 100, "max_steps": updates},
        model={"name": "jumping", "norm": "none"},
        noise={"sharing": "micro_batch"},
        comm={"reduction": reduction, "verify_every": 1},
        optimizer={"clip_norm": 1.0},
        checkpoint={"every_epochs": 0},
        evaluation={"every_epochs": 0},
    )
    del settings["model"]["ghost_size"], settings["model"]["norm_samples"]
    return write_config(folder, {"plugins": ["jumping.py"], **settings})


def repeats(run: Path) -> list[tuple[int, int]]:
    """Return the updates of `run` whose gradient was repeated, and how often."""
    found = events(run, "gradient_repeated")
    return [(event["step"], event["times"]) for event in found]


@pytest.mark.parametrize("reduction", mostly_lengthy(["exact32", "exact16"]))
def test_repeated_updates_are_bit_identical_on_other_numbers_of_ranks_and_engines(
    tmp_path: Path, reduction: str
) -> None:
    config = write_jumping_run(tmp_path, 30, reduction)
    train_alone(config, tmp_path / "alone")
    run = tmp_path / "run"
    for ranks, controller, dealing, until in (
        (5, "mpi", "even", 9),
        (2, "gloo", "dynamic", 17),
        (3, "torch", "dynamic", 30),
    ):
        train_ranks(ranks, controller, config, run, f"batch.dealing={dealing}", f"run.max_steps={until}")
    assert any(step > 17 for step, _ in repeats(run)), "where micro-batches are claimed"
    assert repeats(run) == repeats(tmp_path / "alone") != []
    assert_same_run(run, tmp_path / "alone", ["train"])
    assert final_checkpoint(run)["grid_exponents"] == final_checkpoint(tmp_path / "alone")["grid_exponents"]


@pytest.mark.lengthy
@pytest.mark.parametrize("controller", ["mpi", "gloo", "torch"])
def test_three_hundred_updates_are_bit_identical_on_any_number_of_ranks(controller: str, tmp_path: Path) -> None:
    config = write_jumping_run(tmp_path, 300)
    train_alone(config, tmp_path / "alone")
    for ranks in (2, 3, 5):
        run = tmp_path / f"{ranks}"
        train_ranks(ranks, controller, config, run)
        assert repeats(run) == repeats(tmp_path / "alone") != []
        assert_same_run(run, tmp_path / "alone", ["train"])
