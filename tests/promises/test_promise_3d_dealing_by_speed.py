"""Promise 3: every bit is the same as well where micro-batches follow the speed of the ranks, and one is slow."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.launching import launch, records, results, small_settings, train_alone, weights_digest, write_config

STEPS = 24
MILLISECONDS = 50
"""That a micro-batch takes longer on the slow rank: many times what it takes the others, also on a busy machine."""


def shares(run: Path) -> list[tuple[int, list[int]]]:
    """Return the step and the shares of every change, after which `run` recorded it."""
    events = [each for each in records(run, "event") if each["event"] == "dealing"]
    return [(each["step"], [int(count) for count in each["shares"].split()]) for each in events]


def slowed(run: Path, config: str, controller: str, ranks: int, slow: int, until: int) -> None:
    program = ("-m", "tests.ranks.slow_rank", str(slow), str(MILLISECONDS))
    arguments = ("train", config, "batch.dealing=measured", f"run.max_steps={until}", "--run-dir", str(run))
    ended = launch(ranks, controller, *arguments, program=program)
    assert ended.code == 0, ended.output


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A run on one rank, whose 13 micro-batches are dealt evenly."""
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


def test_two_ranks_of_which_one_is_slow_change_no_bit(alone: tuple[str, Path], tmp_path: Path) -> None:
    config, whole = alone
    slowed(tmp_path / "run", config, "torchrun", 2, slow=1, until=STEPS)
    assert weights_digest(tmp_path / "run") == weights_digest(whole)
    assert results(tmp_path / "run") == results(whole)
    moved = [counts for _, counts in shares(tmp_path / "run")]
    assert {sum(counts) for counts in moved} == {13}
    assert min(slow for _, slow in moved) <= 4, "7 and 6 to begin with"


@pytest.mark.lengthy
def test_nor_do_three_that_stop_and_resume_with_another_slow_one(alone: tuple[str, Path], tmp_path: Path) -> None:
    config, whole = alone
    half = STEPS // 2
    slowed(tmp_path / "run", config, "mpi", 3, slow=0, until=half)
    slowed(tmp_path / "run", config, "torchrun", 3, slow=2, until=STEPS)
    assert weights_digest(tmp_path / "run") == weights_digest(whole)
    assert results(tmp_path / "run", ["train"]) == results(whole, ["train"])
    moved = shares(tmp_path / "run")
    # 5, 4 and 4 to begin with
    assert any(counts[0] < min(counts[1:]) for step, counts in moved if step <= half)
    assert any(counts[2] < min(counts[:2]) for step, counts in moved if step > half)
