"""Promise 4: noise is the same on every rank, and leaves no trace."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dist_train.config import parse_config
from dist_train.models import build_model
from tests.launching import (
    final_checkpoint,
    launch,
    mostly_lengthy,
    records,
    small_settings,
    status,
    train_ranks,
    weights_digest,
    write_config,
)


@pytest.mark.ranks
@pytest.mark.parametrize(("sharing", "controller"), mostly_lengthy([("micro_batch", "mpi"), ("global", "gloo")]))
def test_fifty_noisy_steps_at_learning_rate_0_keep_the_initial_weights(
    tmp_path: Path, sharing: str, controller: str
) -> None:
    settings = small_settings(
        run={"epochs": 7, "max_steps": 50},
        optimizer={"learning_rate": 0.0},
        noise={"sharing": sharing, "amplitude": 0.05},
        # Every step compares weights and noise of all ranks, and ends the run if they differ.
        comm={"verify_every": 1},
    )
    train_ranks(2, controller, write_config(tmp_path, settings), tmp_path / "run")
    assert all(record["noise_amplitude"] == 0.05 for record in records(tmp_path / "run", "train"))
    saved = final_checkpoint(tmp_path / "run")["model"]
    for name, parameter in build_model(parse_config(settings, source="test")).named_parameters():
        assert torch.equal(saved[name], parameter), name


@pytest.mark.ranks
@pytest.mark.parametrize(("target", "method"), mostly_lengthy([("weights", "smoothout"), ("noise", "langevin")]))
def test_flipped_bit_on_one_of_three_ranks_ends_the_run_with_4(tmp_path: Path, target: str, method: str) -> None:
    settings = small_settings(comm={"verify_every": 4}, batch={"global_size": 96}, noise={"method": method})
    ended = launch(
        3,
        "mpi",
        "train",
        write_config(tmp_path, settings),
        "--run-dir",
        str(tmp_path / "run"),
        program=["-m", "tests.ranks.flipped_bit", target, "1", "6"],
    )
    assert ended.code == 4, ended.output
    assert f"[{target}-differ]" in ended.output
    after = status(tmp_path / "run")
    assert (after["state"], after["exit_code"]) == ("failed", 4)
    assert 6 <= after["step"] <= 8


@pytest.mark.ranks
@pytest.mark.lengthy
def test_four_ranks_have_bit_identical_weights_after_200_steps(tmp_path: Path) -> None:
    settings = small_settings(
        run={"epochs": 25, "max_steps": 200},
        noise={"scale": "filter"},
        comm={"verify_every": 1},
        evaluation={"every_epochs": 0},
        checkpoint={"every_epochs": 0},
    )
    folder = tmp_path / "digests"
    folder.mkdir()
    train_ranks(
        4,
        "mpi",
        write_config(tmp_path, settings),
        tmp_path / "run",
        program=["-m", "tests.ranks.own_weights", str(folder)],
    )
    assert status(tmp_path / "run")["step"] == 200
    digests = [path.read_text() for path in sorted(folder.iterdir())]
    assert len(digests) == 4
    assert set(digests) == {weights_digest(tmp_path / "run")}
