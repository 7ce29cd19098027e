"""`dist-train watch`: on a terminal, in a pipe, and what it ends with."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from dist_train.cli.main import main
from dist_train.outcome import ExitCode
from dist_train.rundir.status import StatusFile
from tests.unit.test_cli_commands import write_config
from tests.waiting import PATIENCE

pytestmark = pytest.mark.usefixtures("threads_as_before")

STYLES = re.compile(r"\x1b\[[0-9;]*m")
SCREEN, BACK, CURSOR = "\x1b[?1049h", "\x1b[?1049l", "\x1b[?25h"


@dataclass
class Watching:
    """The command on a terminal of its own."""

    process: subprocess.Popen[bytes]
    terminal: int
    shown: str = ""

    def until(self, text: str) -> None:
        deadline = time.monotonic() + PATIENCE
        while text not in STYLES.sub("", self.shown):
            left = deadline - time.monotonic()
            assert left > 0, f"{text!r} is not in {self.shown[-2000:]!r}"
            if select.select([self.terminal], [], [], left)[0]:
                self.shown += os.read(self.terminal, 1 << 16).decode(errors="replace")

    def ends(self) -> int:
        """Read to the end and return the exit code."""
        while True:
            try:
                content = os.read(self.terminal, 1 << 16)
            except OSError:  # how Linux says that nobody holds the other end any more
                break
            if not content:
                break
            self.shown += content.decode(errors="replace")
        return self.process.wait(PATIENCE)


@pytest.fixture
def environment() -> Mapping[str, str]:
    """Variables of the command that watches."""
    return {}


@pytest.fixture
def watching(tmp_path: Path, environment: Mapping[str, str]) -> Iterator[tuple[StatusFile, Watching]]:
    """A run that continues, and the command that watches it."""
    status = StatusFile(tmp_path / "status.json", 1)
    status.change("running", step=3, total_steps=10)
    controlling, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "dist_train", "watch", str(tmp_path), "--interval", "0.1"],
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "80", "LINES": "24", **environment},
    )
    os.close(terminal)
    watching = Watching(process, controlling)
    yield status, watching
    process.kill()
    process.wait()
    os.close(controlling)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 0), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_ends_the_view_and_gives_the_terminal_back(
    watching: tuple[StatusFile, Watching], number: signal.Signals, code: int
) -> None:
    _, view = watching
    view.until("step 3/10")
    assert SCREEN in view.shown
    view.process.send_signal(number)
    assert view.ends() == code
    assert view.shown.rindex(BACK) > view.shown.rindex(SCREEN)
    assert view.shown.rindex(CURSOR) > view.shown.rindex("\x1b[?25l")
    assert "Traceback" not in view.shown


def test_it_follows_the_run_and_ends_with_it(watching: tuple[StatusFile, Watching]) -> None:
    status, view = watching
    view.until("step 3/10")
    status.change("running", step=4)
    view.until("step 4/10")
    status.end("finished", ExitCode.FINISHED, "")
    assert view.ends() == 0
    after = view.shown.split(BACK)[-1]
    assert "finished" in after
    assert "4 of 10" in after


@pytest.mark.parametrize("environment", [{"TTY_COMPATIBLE": "0"}, {"FORCE_COLOR": ""}])
def test_where_it_cannot_draw_on_the_terminal_it_shows_the_run_once(watching: tuple[StatusFile, Watching]) -> None:
    _, view = watching
    view.until("step 3/10")
    assert view.ends() == 0
    assert SCREEN not in view.shown


def test_into_a_file_it_shows_the_run_once_even_in_colour(tmp_path: Path) -> None:
    StatusFile(tmp_path / "status.json", 1).change("running", step=3, total_steps=10)
    ended = subprocess.run(
        [sys.executable, "-m", "dist_train", "watch", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        env={**os.environ, "FORCE_COLOR": "1"},
    )
    assert ended.returncode == ExitCode.FINISHED, ended.stderr
    assert ended.stdout.count("3/10") == 1
    assert SCREEN not in ended.stdout


def test_the_reason_of_a_failed_run_is_shown_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    reason = " ".join(f"reason-{number}" for number in range(20))
    StatusFile(tmp_path / "status.json", 1).end("failed", ExitCode.FAULT, reason)
    assert main(["watch", str(tmp_path)]) == ExitCode.FINISHED
    assert f"failed: {reason}" in " ".join(capsys.readouterr().out.split())


def test_what_it_shows_of_a_real_run_are_its_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for size in ("COLUMNS", "LINES"):
        monkeypatch.delenv(size, raising=False)
    run = tmp_path / "tiny"
    assert main(["train", write_config(tmp_path), "--run-dir", str(run)]) == ExitCode.FINISHED
    capsys.readouterr()
    assert main(["watch", str(run), "--once"]) == ExitCode.FINISHED
    told = capsys.readouterr().out
    assert "\x1b" not in told
    for fact in ("tiny  finished", "epoch 2 of 2", "step 6/6", "synthetic, batch 26, 1 rank", "noise smoothout 0.02"):
        assert fact in told, fact
    assert "learning rate" in told
    assert "accuracy  batch" in told


@pytest.mark.parametrize("made", [True, False])
def test_no_run_ends_with_2_and_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str], made: bool) -> None:
    folder = tmp_path / "folder"
    if made:
        folder.mkdir()
    assert main(["watch", str(folder)]) == ExitCode.USAGE
    told = capsys.readouterr()
    assert told.out == ""
    assert len(told.err.splitlines()) == 1
    assert ("[no-run-here]" if made else "[run-missing]") in told.err


@pytest.mark.parametrize("interval", ["0", "-1", "nan", "soon"])
def test_an_interval_that_is_none_ends_with_2(tmp_path: Path, interval: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["watch", str(tmp_path), f"--interval={interval}"])
    assert ended.value.code == 2


def test_a_terminal_without_the_characters_does_not_end_it(tmp_path: Path) -> None:
    StatusFile(tmp_path / "status.json", 1).change("running", step=3, total_steps=10)
    told = subprocess.run(
        [sys.executable, "-m", "dist_train", "watch", str(tmp_path), "--once"],
        env={**os.environ, "PYTHONIOENCODING": "latin-1", "PYTHONUTF8": "0"},
        capture_output=True,
        check=True,
    )
    assert b"step 3/10" in told.stdout
