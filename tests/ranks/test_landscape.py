"""Landscapes on several ranks: the same files on any number of ranks, also after a kill."""

from __future__ import annotations

from pathlib import Path

import pytest

from dist_train.cli.main import main
from tests.launching import kill, launch, start
from tests.waiting import wait_for

pytestmark = [pytest.mark.ranks, pytest.mark.usefixtures("threads_as_before")]


def command(run: Path, output: Path) -> list[str]:
    settings = ["--points", "11", "--samples", "60", "--batch-size", "7"]
    return ["landscape", "plane", str(run), *settings, "--output", str(output)]


def files(output: Path) -> dict[str, bytes]:
    [folder] = output.iterdir()
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def finished_points(output: Path) -> int:
    return sum(path.read_text().count('"point"') for path in output.glob("*/partial/rank-*.jsonl"))


@pytest.mark.lengthy
def test_files_are_equal_on_any_number_of_ranks_also_after_a_kill(trained_run: Path, tmp_path: Path) -> None:
    assert main(command(trained_run, tmp_path / "1")) == 0
    expected = files(tmp_path / "1")
    assert set(expected) == {"points.csv", "settings.json", "figure.svg", "figure.pdf", "figure.png"}
    assert expected["points.csv"].count(b"\n") == 1 + 2 * 121
    for ranks, controller in ((2, "torch"), (3, "mpi")):
        ended = launch(ranks, controller, *command(trained_run, tmp_path / f"{ranks}"))
        assert ended.code == 0, ended.output
        assert files(tmp_path / f"{ranks}") == expected

    killed = start(2, "mpi", *command(trained_run, tmp_path / "killed"))
    try:
        wait_for(lambda: killed.poll() is not None or finished_points(tmp_path / "killed") >= 3, "three points")
        assert killed.poll() is None, killed.stdout and killed.stdout.read()
    finally:
        kill(killed)
    kept = finished_points(tmp_path / "killed")
    assert 3 <= kept < 121
    assert "points.csv" not in [path.name for path in (tmp_path / "killed").glob("*/*")]
    again = launch(3, "mpi", *command(trained_run, tmp_path / "killed"))
    assert again.code == 0, again.output
    assert files(tmp_path / "killed") == expected


def test_usage_error_is_reported_once_and_exits_with_2(trained_run: Path) -> None:
    ended = launch(2, "mpi", "landscape", "direction", str(trained_run), "--exclude", "nothing")
    assert ended.code == 2, ended.output
    assert ended.output.count("no-such-weight") == 1
