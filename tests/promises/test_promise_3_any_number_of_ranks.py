"""Promise 3: the number of ranks does not change a bit of the run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.launching import (
    final_checkpoint,
    launch,
    mostly_lengthy,
    records,
    results,
    small_settings,
    status,
    train_alone,
    weights_digest,
    write_config,
)

pytestmark = pytest.mark.ranks

# Four under gloo: below, and in promise 4.
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
    """By sharing, a run of 30 steps on one rank; its global batch of 100 samples is no multiple of 3."""
    made = {}
    for sharing in ("global", "micro_batch"):
        folder = tmp_path_factory.mktemp(sharing)
        config = thirty_steps(folder, sharing)
        train_alone(config, folder / "alone")
        made[sharing] = config, folder / "alone"
    return made


@pytest.mark.parametrize(("sharing", "ranks", "controller"), mostly_lengthy(GROUPS, 3))
def test_every_bit_is_the_same(
    alone: Mapping[str, tuple[str, Path]], tmp_path: Path, sharing: str, ranks: int, controller: str
) -> None:
    config, reference = alone[sharing]
    ended = launch(ranks, controller, "train", config, "--run-dir", str(tmp_path / "run"))
    assert ended.code == 0, ended.output
    assert status(tmp_path / "run")["world_size"] == ranks
    assert len(records(tmp_path / "run", "train")) == 30
    assert weights_digest(tmp_path / "run") == weights_digest(reference)
    assert results(tmp_path / "run") == results(reference)


def test_also_when_a_run_stops_on_four_and_resumes_on_one_then_three_by_another_engine(
    alone: Mapping[str, tuple[str, Path]], tmp_path: Path
) -> None:
    config, whole = alone["micro_batch"]
    run = tmp_path / "run"
    for ranks, controller, until in ((4, "torch", 11), (1, "alone", 15), (2, "gloo", 19), (3, "mpi", 30)):
        ended = launch(ranks, controller, "train", config, f"run.max_steps={until}", "--run-dir", str(run))
        assert ended.code == 0, ended.output
    assert weights_digest(run) == weights_digest(whole)
    assert results(run, ["train"]) == results(whole, ["train"])


def test_also_with_more_ranks_than_micro_batches(tmp_path: Path) -> None:
    config = write_config(tmp_path, small_settings(run={"max_steps": 5}, batch={"micro_size": 64}))
    train_alone(config, tmp_path / "alone")
    ended = launch(3, "torch", "train", config, "--run-dir", str(tmp_path / "torch"))
    assert ended.code == 0, ended.output
    assert weights_digest(tmp_path / "torch") == weights_digest(tmp_path / "alone")


def test_float_reduction_agrees_in_the_first_step_to_a_millionth(tmp_path: Path) -> None:
    config = write_config(tmp_path, small_settings(run={"max_steps": 1}, comm={"reduction": "float"}))
    first = []
    for ranks, controller in ((1, "alone"), (2, "torch"), (3, "mpi")):
        run = tmp_path / f"{ranks}"
        ended = launch(ranks, controller, "train", config, "--run-dir", str(run))
        assert ended.code == 0, ended.output
        [record] = records(run, "train")
        first.append((record["loss"], record["gradient_norm"], final_checkpoint(run)["model"]["hidden.weight"]))
    for loss, norm, weight in first[1:]:
        assert loss == pytest.approx(first[0][0], rel=1e-6)
        assert norm == pytest.approx(first[0][1], rel=1e-6)
        assert (weight - first[0][2]).abs().max() <= 1e-6 * first[0][2].abs().max()
