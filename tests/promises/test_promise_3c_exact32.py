"""Promise 3 with `comm.reduction: exact32` and `exact16`, also where gradients leap and updates are made again."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.launching import (
    final_checkpoint,
    launch,
    records,
    results,
    small_settings,
    train_alone,
    weights_digest,
    write_config,
)

pytestmark = pytest.mark.ranks

LEAPING = """
import dist_train
import torch
from torch import nn


class Leaping(nn.Module):
    '''A perceptron to which one image in a hundred is a thousand times as bright as the others.'''

    def __init__(self, inputs, classes):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(inputs, 16), nn.ReLU(), nn.Linear(16, classes))

    def forward(self, images):
        inputs = images.flatten(1)
        is_bright = inputs[:, :1] > inputs[:, 1:].amax(1, keepdim=True)
        return self.layers(torch.where(is_bright, 1e3, 1.0) * inputs)


@dist_train.register("models", "leaping")
def leaping(images, width, norm):
    return Leaping(images.shape[0] * images.shape[1] * images.shape[2], images.classes)
"""


def leaping_run(folder: Path, updates: int, reduction: str = "exact32") -> str:
    """Write the settings of a run of so many updates, of seven micro-batches, some with gradients that leap."""
    (folder / "leaping.py").write_text(LEAPING)
    settings = small_settings(
        run={"epochs": 100, "max_steps": updates},
        model={"name": "leaping", "norm": "none"},
        noise={"sharing": "micro_batch"},
        comm={"reduction": reduction, "verify_every": 1},
        optimizer={"clip_norm": 1.0},
        checkpoint={"every_epochs": 0},
        evaluation={"every_epochs": 0},
    )
    del settings["model"]["ghost_size"], settings["model"]["norm_samples"]
    return write_config(folder, {"plugins": ["leaping.py"], **settings})


def repeats(run: Path) -> list[tuple[int, int]]:
    """Return in which updates of `run` the gradient was computed again, and how often."""
    events = [record for record in records(run, "event") if record["event"] == "gradient_repeated"]
    return [(event["step"], event["times"]) for event in events]


@pytest.mark.parametrize("reduction", ["exact32", "exact16"])
def test_the_bits_are_the_same_with_updates_made_again_on_other_numbers_of_ranks_by_other_engines(
    tmp_path: Path, reduction: str
) -> None:
    config = leaping_run(tmp_path, 30, reduction)
    train_alone(config, tmp_path / "alone")
    run = tmp_path / "run"
    for ranks, controller, until in ((5, "mpi", 9), (2, "gloo", 17), (3, "torch", 30)):
        ended = launch(ranks, controller, "train", config, f"run.max_steps={until}", "--run-dir", str(run))
        assert ended.code == 0, ended.output
    assert repeats(run) == repeats(tmp_path / "alone") != []
    assert weights_digest(run) == weights_digest(tmp_path / "alone")
    assert results(run, ["train"]) == results(tmp_path / "alone", ["train"])
    assert final_checkpoint(run)["grid_exponents"] == final_checkpoint(tmp_path / "alone")["grid_exponents"]


@pytest.mark.lengthy
@pytest.mark.parametrize("controller", ["mpi", "gloo", "torch"])
def test_three_hundred_updates_are_the_same_on_any_number_of_ranks_of_an_engine(
    controller: str, tmp_path: Path
) -> None:
    config = leaping_run(tmp_path, 300)
    train_alone(config, tmp_path / "alone")
    for ranks in (2, 3, 5):
        run = tmp_path / f"{ranks}"
        ended = launch(ranks, controller, "train", config, "--run-dir", str(run))
        assert ended.code == 0, ended.output
        assert repeats(run) == repeats(tmp_path / "alone") != []
        assert weights_digest(run) == weights_digest(tmp_path / "alone")
        assert results(run, ["train"]) == results(tmp_path / "alone", ["train"])
