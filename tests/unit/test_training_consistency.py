"""Workers of other code, settings or data than the rest are named, with what differs, before the first step."""

from __future__ import annotations

from pathlib import Path

import pytest

from dist_train.cluster.workers import PeerFailedError
from dist_train.config import parse_config
from dist_train.outcome import UsageError
from dist_train.training import consistency
from dist_train.training.consistency import (
    check_consistent_across_ranks,
    check_same_data,
    code_listing,
    settings_listing,
)
from tests.unit.simulated_workers import SimulatedWorkers, on_workers, results

CONFIG = parse_config({}, source="test")
OTHER = parse_config({"optimizer": {"learning_rate": 0.7}}, source="test")


def told(ended: list[Exception | None]) -> str:
    """Return what the one worker that knows says; the others must know that it failed."""
    own = [error for error in ended if isinstance(error, UsageError) and not isinstance(error, PeerFailedError)]
    assert len(own) == 1, ended
    assert sum(isinstance(error, PeerFailedError) for error in ended) == len(ended) - 1
    return str(own[0])


def test_equal_workers_go_on() -> None:
    assert results(3, lambda workers: check_consistent_across_ranks(workers, CONFIG)) == [None] * 3


@pytest.mark.parametrize("odd", [0, 1, 2])
def test_another_setting_is_named_with_both_values_and_the_worker(odd: int) -> None:
    ended = on_workers(
        3, lambda workers: check_consistent_across_ranks(workers, OTHER if workers.rank == odd else CONFIG)
    )
    message = told(ended)
    assert f"worker {odd} of this launch differs from the others in settings" in message
    assert "optimizer.learning_rate (" in message
    assert "0.7 on worker" in message


def test_of_two_workers_the_one_that_is_not_worker_0_is_named() -> None:
    message = told(
        on_workers(2, lambda workers: check_consistent_across_ranks(workers, OTHER if workers.rank == 0 else CONFIG))
    )
    assert "worker 1 of this launch differs" in message
    assert "0.7 on worker 0" in message


def test_another_source_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "package"
    (package / "inner").mkdir(parents=True)
    (package / "inner" / "module.py").write_text("x = 1\n")
    before = code_listing(package)
    (package / "inner" / "module.py").write_text("x = 2\n")
    listings = [before, before, code_listing(package)]

    def check(workers: SimulatedWorkers) -> None:
        consistency._compare(workers, "code", listings[workers.rank], "install the same on all nodes")

    message = told(on_workers(3, check))
    assert "worker 2 of this launch differs from the others in code" in message
    assert "package/inner/module.py (" in message


def test_the_code_is_every_source_file_and_what_computes() -> None:
    listing = code_listing()
    assert {"dist_train/training/step.py", "dist_train/cluster/workers.py", "torch", "numpy", "Python"} <= set(listing)


def test_every_setting_counts() -> None:
    listing = settings_listing(CONFIG)
    assert {"noise.schedule.kind", "run.seed", "comm.timeout"} <= set(listing)
    changed = {name for name, value in settings_listing(OTHER).items() if listing[name] != value}
    assert changed == {"optimizer.learning_rate"}


def test_other_data_are_named() -> None:
    def check(workers: SimulatedWorkers) -> None:
        check_same_data(workers, "other" if workers.rank == 1 else "same", "fashion-mnist")

    message = told(on_workers(3, check))
    assert "worker 1 of this launch differs from the others in data" in message
    assert "fashion-mnist (other on worker 1, same on worker 0)" in message
