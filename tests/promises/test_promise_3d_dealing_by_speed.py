"""Promise 3 where ranks have different speeds: shares follow them, or each rank takes what it is ready for."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.launching import (
    assert_same_run,
    events,
    launch,
    mostly_lengthy,
    small_settings,
    train_alone,
    write_config,
)

STEPS = 24
MILLISECONDS = 50
"""Delay of each micro-batch on the slow rank: many times the others' duration, even on a busy machine."""


def shares(run: Path) -> list[tuple[int, list[int]]]:
    """Return the step and the new shares of every redistribution that `run` recorded."""
    found = events(run, "dealing")
    return [(each["step"], [int(count) for count in each["shares"].split()]) for each in found]


def train_with_slow_rank(
    run: Path, config: str, controller: str, ranks: int, slow: int, until: int, dealing: str = "measured"
) -> None:
    program = ("-m", "tests.ranks.slow_rank", str(slow), str(MILLISECONDS))
    arguments = ("train", config, f"batch.dealing={dealing}", f"run.max_steps={until}", "--run-dir", str(run))
    ended = launch(ranks, controller, *arguments, program=program)
    assert ended.code == 0, ended.output


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A run on one rank with 13 micro-batches, and its configuration."""
    folder = tmp_path_factory.mktemp("alone")
    settings = small_settings(
        run={"max_steps": STEPS},
        batch={"micro_size": 8},
        noise={"sharing": "micro_batch"},
        comm={"verify_every": 1},
        checkpoint={"every_epochs": 0},
    )
    config = write_config(folder, settings)
    train_alone(config, folder / "alone")
    return config, folder / "alone"


def test_two_ranks_with_one_slow_are_bit_identical_to_one(alone: tuple[str, Path], tmp_path: Path) -> None:
    config, whole = alone
    train_with_slow_rank(tmp_path / "run", config, "torchrun", 2, slow=1, until=STEPS)
    assert_same_run(tmp_path / "run", whole)
    changes = [counts for _, counts in shares(tmp_path / "run")]
    assert {sum(counts) for counts in changes} == {13}
    assert min(slow for _, slow in changes) <= 4, "shares begin with 7 and 6"


@pytest.mark.lengthy
def test_resume_with_another_slow_rank_is_bit_identical(alone: tuple[str, Path], tmp_path: Path) -> None:
    config, whole = alone
    half = STEPS // 2
    train_with_slow_rank(tmp_path / "run", config, "mpi", 3, slow=0, until=half)
    train_with_slow_rank(tmp_path / "run", config, "torchrun", 3, slow=2, until=STEPS)
    assert_same_run(tmp_path / "run", whole, ["train"])
    changes = shares(tmp_path / "run")
    # Shares begin with 5, 4 and 4.
    assert any(counts[0] < min(counts[1:]) for step, counts in changes if step <= half)
    assert any(counts[2] < min(counts[:2]) for step, counts in changes if step > half)


@pytest.mark.parametrize(("controller", "ranks"), mostly_lengthy([("torchrun", 3), ("mpi", 2)]))
def test_ranks_that_take_micro_batches_are_bit_identical_to_one(
    alone: tuple[str, Path], tmp_path: Path, controller: str, ranks: int
) -> None:
    config, whole = alone
    train_with_slow_rank(tmp_path / "run", config, controller, ranks, slow=0, until=STEPS, dealing="dynamic")
    assert_same_run(tmp_path / "run", whole)


@pytest.mark.lengthy
def test_a_resume_on_other_ranks_that_take_micro_batches_is_bit_identical(
    alone: tuple[str, Path], tmp_path: Path
) -> None:
    config, whole = alone
    train_with_slow_rank(tmp_path / "run", config, "gloo", 2, slow=1, until=STEPS // 2, dealing="dynamic")
    train_with_slow_rank(tmp_path / "run", config, "torchrun", 3, slow=2, until=STEPS, dealing="dynamic")
    assert_same_run(tmp_path / "run", whole, ["train"])
