"""Benchmarks that launch ranks: start-up times, the overlap, two ranks against two programs."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import overlap, together
from benchmarks.launched_run import seconds_to_step, write_settings
from benchmarks.start_up import bare_horovod


@pytest.mark.ranks
@pytest.mark.lengthy
def test_start_up_benchmark_times_start_resume_and_bare_program(tmp_path: Path) -> None:
    config = write_settings(tmp_path, 0.0625)
    first = seconds_to_step(1, config, tmp_path / "run", controller="mpi", ranks=2)
    resumed = seconds_to_step(2, config, tmp_path / "run", controller="mpi", ranks=2)
    assert 0 < first < 100
    assert 0 < resumed < 100
    assert 0 < bare_horovod("mpi") < 100


@pytest.mark.ranks
def test_overlap_benchmark_has_four_rows_for_two_ranks() -> None:
    rows = list(overlap.rows("gloo", 0.0625, 16, 1))
    assert len(rows) == 4
    assert "2 ranks over gloo" in rows[0].row


@pytest.mark.ranks
@pytest.mark.lengthy
def test_two_ranks_are_compared_with_two_programs() -> None:
    rows = [*together.rows(0.0625, 32, 2)]
    for mean, slower, wait in (rows[:3], rows[3:]):  # even shares, dynamic ones
        assert mean.pairs == slower.pairs == wait.pairs == 2
        assert mean.amount_theirs <= slower.amount_theirs
        assert 0 < wait.median < 1
