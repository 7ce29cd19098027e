from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from dist_train.monitoring.console import open_logs

logger = logging.getLogger("dist_train.somewhere")


@pytest.fixture(autouse=True)
def the_logger_is_left_as_it_was() -> Iterator[None]:
    root = logging.getLogger("dist_train")
    before, level = list(root.handlers), root.level
    root.setLevel(logging.ERROR)  # a caller's own
    yield
    assert (root.handlers, root.level) == (before, logging.ERROR)
    root.setLevel(level)


def test_a_line_tells_time_level_and_rank(tmp_path: Path) -> None:
    with open_logs(tmp_path, rank=3) as path:
        logger.info("step %d", 7)
        logger.debug("too small to tell")
    assert path == tmp_path / "rank-3.log"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z INFO    rank 3  step 7\n", path.read_text())


def test_warnings_of_rank_0_also_go_to_stderr(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open_logs(tmp_path, rank=0):
        logger.info("only in the file")
        logger.warning("the port is in use")
    assert capsys.readouterr().err == "WARNING: the port is in use\n"
    assert "only in the file" in (tmp_path / "rank-0.log").read_text()


def test_other_ranks_are_silent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open_logs(tmp_path, rank=1):
        logger.warning("the port is in use")
    assert capsys.readouterr().err == ""


def test_a_second_run_in_the_process_logs_into_its_own_file(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
    with open_logs(tmp_path / "a", rank=1):
        logger.info("one")
    with open_logs(tmp_path / "b", rank=1):
        logger.info("two")
    assert "two" not in (tmp_path / "a" / "rank-1.log").read_text()
    assert "one" not in (tmp_path / "b" / "rank-1.log").read_text()


def test_a_run_directory_that_is_away_is_not_made_again(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), open_logs(tmp_path / "away" / "logs", rank=1):
        pass
    assert not (tmp_path / "away").exists()


def test_a_resumed_run_adds_to_the_log(tmp_path: Path) -> None:
    for word in ("one", "two"):
        with open_logs(tmp_path, rank=1):
            logger.info(word)
    assert len((tmp_path / "rank-1.log").read_text().splitlines()) == 2


def test_a_log_on_a_full_disk_says_so_once_and_raises_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rank-1.log").symlink_to("/dev/full")
    with open_logs(tmp_path, rank=1):
        logger.warning("one")
        logger.warning("two")
    assert capsys.readouterr().err.count("cannot be written, logging ends: [Errno 28]") == 1
