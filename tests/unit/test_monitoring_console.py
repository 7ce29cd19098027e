from __future__ import annotations

import fcntl
import io
import os
import re
import select
import socket
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TextIO

import pytest

from dist_train.monitoring import console, wording
from dist_train.monitoring.console import PlainLines, TerminalBar, launcher_terminal, open_console
from dist_train.monitoring.wording import Pace
from dist_train.rundir.records import EventRecord, Outcome, RunFacts
from tests.unit.exporting import GROWING
from tests.unit.records import evaluation, train
from tests.waiting import wait_for

FACTS = RunFacts(
    name="lb_[8192]",
    run_directory=Path("runs/lb_8192"),
    model="vgg9",
    data="fashion-mnist",
    parameters=176_106,
    global_size=8192,
    micro_size=256,
    micro_batches=32,
    world_size=2,
    total_steps=210,
    steps_per_epoch=7,
    epochs=30,
    noise="smoothout 0.01",
    start_step=14,
    controller="gloo",
    device="one card",
)
OUTCOME = Outcome(
    "finished",
    "",
    0,
    210,
    30.0,
    151.2,
    0.91,
    0.8741,
    0.879,
    12_345.0,
    Path("runs/lb_8192/checkpoints/step-00000210.pt"),
)


class Terminal:
    """A real pseudo-terminal: `screen` is what the program writes to, `read` what has come through."""

    def __init__(self, columns: int) -> None:
        self._master, slave = os.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 30, columns, 0, 0))
        self.device = os.ttyname(slave)
        self.screen: TextIO = os.fdopen(slave, "w", encoding="utf-8")

    def read(self, seconds: float = 0.1) -> str:
        """Return what was written; the kernel hands it over a moment later, hence the wait."""
        content = b""
        with suppress(OSError):  # the program's end is closed, and all was read
            while select.select([self._master], [], [], seconds)[0]:
                content += os.read(self._master, 1 << 20)
        return content.decode()

    def close(self) -> None:
        with suppress(OSError):
            self.screen.close()
        self.hang_up()

    def hang_up(self) -> None:
        if self._master >= 0:
            os.close(self._master)
        self._master = -1


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Terminal]:
    monkeypatch.setenv("TERM", "xterm-256color")
    pseudo = Terminal(columns=100)
    yield pseudo
    pseudo.close()


def words(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "", text)


def drawn(bar: TerminalBar, step: int, terminal: Terminal) -> str:
    """Return what the bar shows of `step`: it redraws when enough time has passed."""

    def shown() -> str:
        bar.record(train(step, loss=0.4321, accuracy=0.8512, samples_per_second=16_384.0))
        return words(terminal.read())

    return wait_for(shown)


def test_the_bar_shows_progress_and_leaves_the_summary(terminal: Terminal) -> None:
    bar = TerminalBar(terminal.screen)
    bar.begin(replace(FACTS, best_accuracy=0.8))
    bar.record(evaluation(14, accuracy=0.79))
    begun = words(terminal.read())
    assert "best so far" not in begun
    bar.record(evaluation(14, accuracy=0.81))
    bar.record(EventRecord(15, "checkpoint", 0.0, {"file": "x"}))
    shown = begun + words(terminal.read()) + drawn(bar, 21, terminal)
    assert "lb_[8192]: fashion-mnist; vgg9, 176,106 trainable parameters; noise smoothout 0.01" in shown
    assert "batch 8,192 as 32 micro-batches of 256 on 2 ranks (gloo)" in shown
    assert "resuming from step 14" in shown
    assert "epoch    2  step     14  test   loss 0.5000  accuracy 81.00 %  best so far" in shown
    assert "epoch 3/30" in shown
    assert "step 21/210" in shown
    assert "loss 0.4321  accuracy 85.12 %  16,384 images/s  test 81.00 %" in shown
    assert "saved at 15" in shown
    bar.end(OUTCOME)
    summary = words(terminal.read())
    for fact in ("finished", "210 of 210", "91.00 %", "87.41 %", "87.90 %", "12,345", "2:31", "step-00000210.pt"):
        assert fact in summary


def test_no_line_of_the_bar_is_wider_than_the_terminal() -> None:
    narrow = Terminal(columns=60)
    bar = TerminalBar(narrow.screen)
    bar.begin(FACTS)
    narrow.read()
    lines = drawn(bar, 21, narrow).split("\n")
    assert len(lines) == 2
    assert all(0 < len(line) <= 60 for line in lines)
    bar.end(OUTCOME)
    narrow.close()


def test_the_bar_is_redrawn_a_few_times_a_second_whatever_the_pace_of_steps(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr(console, "time", SimpleNamespace(monotonic=lambda: now))
    bar = TerminalBar(terminal.screen)
    bar.begin(FACTS)
    terminal.read()
    shown, seconds = "", 2
    for _ in range(20 * seconds):
        for step in range(15, 115):
            bar.progress(step)
        shown += terminal.read(seconds=0.001)
        now += 0.05
    shown += terminal.read()
    assert 2 * seconds <= shown.count("/210") <= 5 * seconds
    bar.end(OUTCOME)


def test_what_is_printed_during_the_run_stands_above_the_bar_and_streams_are_given_back(terminal: Terminal) -> None:
    streams = sys.stdout, sys.stderr
    bar = TerminalBar(terminal.screen)
    bar.begin(FACTS)
    terminal.read()
    print("a word from elsewhere", file=sys.stderr)
    shown = terminal.read()
    assert shown.index("a word from elsewhere") < shown.index("━")
    bar.end(OUTCOME)
    assert (sys.stdout, sys.stderr) == streams


def test_the_cursor_stays_visible_so_that_a_killed_run_leaves_a_usable_terminal(terminal: Terminal) -> None:
    bar = TerminalBar(terminal.screen)
    bar.begin(FACTS)
    shown = terminal.read()
    assert shown.rfind("\x1b[?25h") > shown.rfind("\x1b[?25l")
    bar.end(OUTCOME)


def test_a_terminal_that_goes_away_is_an_error_of_the_bar_alone(terminal: Terminal) -> None:
    streams = sys.stdout, sys.stderr
    bar = TerminalBar(terminal.screen)
    bar.begin(FACTS)
    terminal.hang_up()
    with pytest.raises(OSError, match="Input/output"):
        bar.record(evaluation(14, accuracy=0.8))
    assert (sys.stdout, sys.stderr) == streams


@pytest.mark.parametrize("terminal_kind", [True, False])
def test_a_run_that_fails_before_its_first_step_shows_no_summary(terminal_kind: bool, terminal: Terminal) -> None:
    observer = TerminalBar(terminal.screen) if terminal_kind else PlainLines(terminal.screen)
    observer.end(OUTCOME)
    assert terminal.read() == ""


def test_a_resume_with_no_step_left_to_do_says_why() -> None:
    page = io.StringIO()
    lines = PlainLines(page)
    lines.begin(FACTS)
    lines.end(replace(OUTCOME, step=250, epoch=35.7))
    assert "250, so run.max_steps=210 left none to do" in page.getvalue()
    assert "35.7 of 35.7" in page.getvalue()


def test_plain_lines_come_at_a_steady_pace_with_every_evaluation_and_event() -> None:
    page, now = io.StringIO(), [0.0]
    lines = PlainLines(page, seconds=10, clock=lambda: now[0])
    lines.begin(FACTS)
    for step in range(15, 57):
        now[0] += 1.0
        lines.record(train(step, loss=0.4321, accuracy=0.8512, samples_per_second=16_384.0))
        lines.progress(step)
    lines.record(evaluation(56, accuracy=0.8741))
    lines.record(EventRecord(56, "corrupt_checkpoint", 0.0, {"file": "a.pt", "size": 3}))
    shown = page.getvalue().splitlines()
    assert shown[2:4] == ["on one card", "resuming from step 14"]
    lines.begin(replace(FACTS, start_step=FACTS.total_steps))
    assert "all steps are done: set another run.name" in page.getvalue()
    steps = [line for line in shown if "images/s" in line]
    assert [line.split("step ")[1].split("/")[0] for line in steps] == ["15", "25", "35", "45", "55"]
    assert steps[1] == ("epoch 4/30  step 25/210  loss 0.4321  accuracy 85.12 %  16,384 images/s  3:05 left")
    assert shown[-2] == "epoch    8  step     56  test   loss 0.5000  accuracy 87.41 %"
    assert shown[-1] == "step 56: corrupt checkpoint (file a.pt, size 3)"
    lines.end(OUTCOME)
    assert " last checkpoint  runs/lb_8192/checkpoints/step-00000210.pt\n" in page.getvalue()
    assert "\x1b" not in page.getvalue()
    assert page.getvalue().isascii()


def test_a_run_goes_on_and_ends_well_when_the_reader_of_its_lines_goes_away(tmp_path: Path) -> None:
    program = (
        "from dist_train.monitoring.console import open_console\n"
        "from dist_train.monitoring.observers import Observers\n"
        "from tests.unit.test_monitoring_console import FACTS, OUTCOME, evaluation\n"
        "observers = Observers([open_console()])\n"
        "observers.begin(FACTS)\n"
        "for step in range(20_000): observers.record(evaluation(step))\n"
        "observers.end(OUTCOME)\n"
        "print('still here')\n"
        "raise SystemExit(7)\n"
    )
    root = str(Path(__file__).parents[2])
    writer = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=root
    )
    assert writer.stdout is not None
    assert writer.stderr is not None
    assert writer.stdout.readline().startswith("lb_[8192]")
    writer.stdout.close()
    errors = writer.stderr.read()
    writer.stderr.close()
    assert writer.wait() == 7
    assert errors.count("PlainLines failed and is disabled; training continues") == 1


@pytest.mark.parametrize(
    ("environment", "kind"),
    [
        ({"TERM": "xterm"}, TerminalBar),
        ({"TERM": "dumb"}, PlainLines),
        ({}, PlainLines),
        ({"TERM": "xterm", "OMPI_COMM_WORLD_RANK": "0"}, PlainLines),
        ({"TERM": "xterm", "PMIX_RANK": "0"}, PlainLines),
    ],
)
def test_a_terminal_gets_a_bar_unless_a_launcher_only_pretends_to_be_one(
    environment: dict[str, str], kind: type, terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", terminal.screen)
    assert isinstance(open_console(environment), kind)


def test_a_pipe_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert isinstance(open_console({"TERM": "xterm"}), PlainLines)


@pytest.mark.parametrize("term", ["xterm", "dumb"])
def test_an_output_that_only_writes_gets_plain_lines(term: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Tee:
        def write(self, text: str) -> None: ...

        def flush(self) -> None: ...

    monkeypatch.setattr(sys, "stdout", Tee())
    assert isinstance(open_console({"TERM": term}), PlainLines)


@pytest.mark.parametrize("term", ["xterm", "dumb"])
@pytest.mark.parametrize("is_closed", [True, False])
def test_a_daemon_without_an_output_gets_nothing(term: str, is_closed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    stream.close()
    monkeypatch.setattr(sys, "stdout", stream if is_closed else None)
    open_console({"TERM": term}).begin(FACTS)


@pytest.mark.parametrize("host", [f"{socket.gethostname()}:", ""])
def test_a_rank_behind_a_launcher_draws_on_the_terminal_that_the_launch_script_names(
    host: str, terminal: Terminal
) -> None:
    address = f"{host}{terminal.device}"
    bar = open_console({"TERM": "xterm", "DIST_TRAIN_TERMINAL": address, "PMIX_RANK": "0"})
    assert isinstance(bar, TerminalBar)
    bar.begin(FACTS)
    bar.end(OUTCOME)
    assert "lb_[8192]" in terminal.read()


def test_the_terminal_of_another_host_or_a_file_is_not_drawn_on(terminal: Terminal, tmp_path: Path) -> None:
    host = socket.gethostname()
    for address in (
        "",
        f"elsewhere:{terminal.device}",
        f"{host}:/dev/null",
        f"{host}:/dev/no-such",
        f"{host}:{tmp_path}",
    ):
        assert launcher_terminal(address) is None


def test_the_pace_is_that_of_the_last_minute() -> None:
    pace = Pace()
    assert pace.seconds_left(100) is None
    for step in range(100):
        pace.mark(step, step * 10.0)
    assert pace.seconds_left(100) == pytest.approx(10)
    for step in range(100, 2_000):
        pace.mark(step, 990 + (step - 99) * 0.5)
    assert pace.seconds_left(2_199) == pytest.approx(100, rel=0.01)
    assert pace.seconds_left(10) == 0


def test_the_pace_is_measured_anew_once_the_clock_was_set_back() -> None:
    pace = Pace()
    for step in range(10):
        pace.mark(step, 3_600.0 + step)
    pace.mark(10, 10.0)
    assert pace.seconds_left(100) is None
    pace.mark(11, 11.0)
    assert pace.seconds_left(100) == pytest.approx(89)


def test_the_time_left_is_that_of_larger_batches_to_come() -> None:
    page, now = io.StringIO(), [0.0]
    lines = PlainLines(page, seconds=10, clock=lambda: now[0])
    lines.begin(replace(FACTS, total_steps=50, stages=GROWING))
    for step in range(10, 21):
        lines.record(train(step))
        now[0] += 1.0
    assert page.getvalue().rstrip().endswith("  3:00 left"), "20 steps of 1 s, and 10 of 16 s"


@pytest.mark.parametrize(("start_step", "is_to_come"), [(0, True), (39, True), (40, False), (45, False)])
def test_a_resumed_run_does_not_say_that_batches_are_to_come_which_it_has_already(
    start_step: int, is_to_come: bool
) -> None:
    told = wording.introduction(replace(FACTS, start_step=start_step, stages=GROWING))
    assert ("then batches of 1,024 from epoch 2" in told) == is_to_come
    assert any("then batches" in line for line in told) == is_to_come


def test_the_reason_of_an_event_is_not_called_so() -> None:
    record = EventRecord(42, "stopped_early", 0.0, {"reason": "test.loss has not improved"})
    assert wording.event(record) == "step 42: stopped early (test.loss has not improved)"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (59.6, "1:00"), (151, "2:31"), (3_751, "1:02:31"), (273_906, "3d 04:05:06"), (-1, "0:00")],
)
def test_durations_read_as_people_write_them(seconds: float, text: str) -> None:
    assert wording.duration(seconds) == text


@pytest.mark.parametrize(("number", "text"), [(0.125, "0.125"), (30.0, "30"), (199.96, "200"), (19_499.6, "19,500")])
def test_epochs_are_never_in_scientific_notation(number: float, text: str) -> None:
    assert wording.epochs(number) == text
    assert wording.introduction(replace(FACTS, epochs=number))[1].count(f"{text} epoch") == 1
