"""Benchmarks that launch ranks measure what they say: a start and a resume, and the rows of two ranks."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import overlap
from benchmarks.launched_run import seconds_to_step, write_settings
from benchmarks.start_up import bare_horovod


@pytest.mark.ranks
@pytest.mark.lengthy
def test_a_start_a_resume_and_the_bare_program_take_seconds(tmp_path: Path) -> None:
    config = write_settings(tmp_path, 0.0625)
    first = seconds_to_step(1, config, tmp_path / "run", controller="mpi", ranks=2)
    resumed = seconds_to_step(2, config, tmp_path / "run", controller="mpi", ranks=2)
    assert 0 < first < 100
    assert 0 < resumed < 100
    assert 0 < bare_horovod("mpi") < 100


@pytest.mark.ranks
def test_two_ranks_tell_the_rows_of_the_overlap() -> None:
    rows = list(overlap.rows("gloo", 0.0625, 16, 1))
    assert len(rows) == 4
    assert "2 ranks over gloo" in rows[0].row
