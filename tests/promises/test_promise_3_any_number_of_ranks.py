"""Promise 3: runs are bit-identical on any number of ranks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.launching import (
    assert_same_run,
    final_checkpoint,
    mostly_lengthy,
    records,
    small_settings,
    status,
    train_alone,
    train_ranks,
    weights_digest,
    write_config,
)

pytestmark = pytest.mark.ranks

# Four ranks with gloo are tested below and in promise 4.
GROUPS = [
    ("global", 3, "gloo"),
    ("micro_batch", 3, "mpi"),
    ("micro_batch", 4, "torch"),
    ("global", 2, "mpi"),
    ("global", 3, "torch"),
    ("micro_batch", 2, "torch"),
]


def thirty_steps(folder: Path, sharing: str) -> str:
    return write_config(
        folder,
        small_settings(
            run={"max_steps": 30},
            noise={"sharing": sharing},
            comm={"verify_every": 1},
            checkpoint={"every_epochs": 0},
        ),
    )


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, tuple[str, Path]]:
    """Runs of 30 steps on one rank, by sharing of the noise; the global batch of 100 is not a multiple of 3."""
    runs = {}
    for sharing in ("global", "micro_batch"):
        folder = tmp_path_factory.mktemp(sharing)
        config = thirty_steps(folder, sharing)
        train_alone(config, folder / "alone")
        runs[sharing] = config, folder / "alone"
    return runs


@pytest.mark.parametrize(("sharing", "ranks", "controller"), mostly_lengthy(GROUPS))
def test_several_ranks_are_bit_identical_to_one(
    alone: Mapping[str, tuple[str, Path]], tmp_path: Path, sharing: str, ranks: int, controller: str
) -> None:
    config, reference = alone[sharing]
    train_ranks(ranks, controller, config, tmp_path / "run")
    assert status(tmp_path / "run")["world_size"] == ranks
    assert len(records(tmp_path / "run", "train")) == 30
    assert_same_run(tmp_path / "run", reference)


def test_resumes_on_other_numbers_of_ranks_and_engines_are_bit_identical(
    alone: Mapping[str, tuple[str, Path]], tmp_path: Path
) -> None:
    config, whole = alone["micro_batch"]
    run = tmp_path / "run"
    for ranks, controller, until in ((4, "torch", 11), (1, "alone", 15), (2, "gloo", 19), (3, "mpi", 30)):
        train_ranks(ranks, controller, config, run, f"run.max_steps={until}")
    assert_same_run(run, whole, ["train"])


def test_more_ranks_than_micro_batches_are_bit_identical_to_one(tmp_path: Path) -> None:
    config = write_config(tmp_path, small_settings(run={"max_steps": 5}, batch={"micro_size": 64}))
    train_alone(config, tmp_path / "alone")
    train_ranks(3, "torch", config, tmp_path / "torch")
    assert weights_digest(tmp_path / "torch") == weights_digest(tmp_path / "alone")


@pytest.mark.lengthy
def test_float_reduction_agrees_to_a_millionth_in_the_first_step(tmp_path: Path) -> None:
    config = write_config(tmp_path, small_settings(run={"max_steps": 1}, comm={"reduction": "float"}))
    first = []
    for ranks in (1, 3):
        run = tmp_path / f"{ranks}"
        train_alone(config, run) if ranks == 1 else train_ranks(ranks, "mpi", config, run)
        [record] = records(run, "train")
        first.append((record["loss"], record["gradient_norm"], final_checkpoint(run)["model"]["hidden.weight"]))
    for loss, norm, weight in first[1:]:
        assert loss == pytest.approx(first[0][0], rel=1e-6)
        assert norm == pytest.approx(first[0][1], rel=1e-6)
        assert (weight - first[0][2]).abs().max() <= 1e-6 * first[0][2].abs().max()
