"""A run's console output, as plain lines or a progress bar, and a log file for each rank."""

from __future__ import annotations

import io
import logging
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from rich.box import ROUNDED, Box
from rich.console import Console, Group
from rich.constrain import Constrain
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from dist_train.monitoring import wording
from dist_train.monitoring.wording import Pace
from dist_train.outcome import escaped, printable
from dist_train.rundir.records import (
    EvaluationRecord,
    EventRecord,
    Observer,
    Outcome,
    Record,
    RunFacts,
    TrainRecord,
    better,
)

_WIDTH = 120


class PlainLines(Observer):
    """Writes at most one training line per `seconds`, and a line for every evaluation and event; each is flushed."""

    def __init__(self, stream: TextIO, seconds: float = 10.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._seconds = seconds
        self._clock = clock
        self._next = clock()
        self._pace = Pace()
        self._facts: RunFacts | None = None

    def begin(self, facts: RunFacts) -> None:
        self._facts = facts
        self._write("\n".join(wording.introduction(facts)))

    def record(self, record: Record) -> None:
        """Write `record` as a line, if one is due."""
        assert self._facts is not None, "begin comes first"
        match record:
            case TrainRecord():
                now = self._clock()
                self._pace.mark(self._facts.passes.samples(record.step), now)
                if now >= self._next:
                    self._next = now + self._seconds
                    self._write(wording.update(self._facts, record, self._pace))
            case EvaluationRecord():
                self._write(wording.evaluation(self._facts, record))
            case EventRecord():
                self._write(wording.event(record))

    def end(self, outcome: Outcome) -> None:
        if self._facts is None:
            return
        page = io.StringIO()
        facts = self._facts
        table = summary_table(facts.name, facts.run_directory, facts.total_steps, facts.epochs, outcome, box=None)
        Console(file=page, width=_WIDTH, color_system=None).print(table)
        self._write("\n" + "\n".join(line.rstrip() for line in page.getvalue().splitlines()))

    def _write(self, text: str) -> None:
        try:
            self._stream.write(text + "\n")
            self._stream.flush()
        except BrokenPipeError:
            # Otherwise Python fails at exit, with code 120, to flush the stream's buffer.
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)
            raise


_REDRAW_SECONDS = 0.2
_REDRAW_SHARE = 1 / 300  # largest fraction of the training time spent on drawing
_WIDEST = 110


class _Terminal(Console):
    """A console that raises BrokenPipeError for a closed pipe; by default rich ends the process."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError("the terminal is closed")


class TerminalBar(Observer):
    """A progress bar, redrawn at most five times a second and less often if drawing is slow, without a thread."""

    def __init__(self, terminal: TextIO) -> None:
        self._terminal = terminal
        self._console = _Terminal(file=terminal, force_terminal=True, highlight=False, soft_wrap=False)
        self._live = Live(console=self._console, auto_refresh=False, transient=True)
        self._pace = Pace()
        self._next = 0.0
        self._facts: RunFacts | None = None
        self._step = 0
        self._train: TrainRecord | None = None
        self._tested = self._saved = ""
        self._best: float | None = None

    def begin(self, facts: RunFacts) -> None:
        self._facts = facts
        self._step = facts.start_step
        self._best = facts.best_accuracy
        self._fit()
        for place, line in enumerate(wording.introduction(facts)):
            self._console.print(Text(line, style="dim" if place else "bold"))
        self._live.start()
        # A killed run must not leave the terminal without a cursor.
        self._console.show_cursor(True)
        self._draw()

    def record(self, record: Record) -> None:
        """Update the bar; an evaluation or an event is printed above it."""
        assert self._facts is not None, "begin comes first"
        match record:
            case TrainRecord():
                self._train = record
                self._pace.mark(self._facts.passes.samples(record.step), time.monotonic())
                self.progress(record.step)
            case EvaluationRecord():
                line = Text(wording.evaluation(self._facts, record))
                if record.split == "test":
                    self._tested = wording.percent(record.accuracy)
                    before, self._best = self._best, better(self._best, record)
                    if self._best != before:
                        line.append("  best so far", style="green")
                self._print(line)
            case EventRecord(event="checkpoint"):
                self._saved = f"{record.step:,}"
            case EventRecord():
                self._print(Text(wording.event(record), style="yellow"))

    def progress(self, step: int) -> None:
        """Move the bar, if a redraw is due."""
        self._step = max(self._step, step)
        if time.monotonic() >= self._next:
            self._draw()

    def end(self, outcome: Outcome) -> None:
        """Remove the bar and print the summary, if the run has begun."""
        if self._facts is not None:
            self._stop()
            self._console.print()
            facts = self._facts
            table = summary_table(facts.name, facts.run_directory, facts.total_steps, facts.epochs, outcome, ROUNDED)
            self._console.print(table)
        if self._terminal is not sys.stdout:
            self._terminal.close()

    def _print(self, line: Text) -> None:
        with self._stop_if_closed():
            self._console.print(line)

    def _draw(self) -> None:
        assert self._facts is not None, "begin comes first"
        started = time.monotonic()
        facts, left = self._facts, self._pace.seconds_left(self._facts.planned_samples)
        bar = progress_bar(wording.current_epoch(facts, self._step), self._step, facts.total_steps, left)
        with self._stop_if_closed():
            self._fit()
            self._live.update(Group(Constrain(bar, _WIDEST), self._measurements()), refresh=True)
        finished = time.monotonic()
        self._next = finished + max(_REDRAW_SECONDS, (finished - started) / _REDRAW_SHARE)

    @contextmanager
    def _stop_if_closed(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            self._stop()
            raise

    def _stop(self) -> None:
        """End the live display and restore `sys.stdout` and `sys.stderr`, even if the terminal raises."""
        with suppress(OSError):
            self._live.stop()

    def _fit(self) -> None:
        """Adopt the terminal's width, which the standard streams do not know behind a launcher."""
        with suppress(OSError):
            columns = os.get_terminal_size(self._terminal.fileno()).columns
            if columns > 0:
                self._console.width = columns

    def _measurements(self) -> Text:
        train, line = self._train, Text(no_wrap=True, overflow="ellipsis")
        if train is None:
            return line.append("waiting for the first step", style="dim")
        values = {
            "loss ": f"{train.loss:.4f}",
            "accuracy ": wording.percent(train.accuracy),
            "": f"{wording.rate(train.samples_per_second)} images/s",
            "test ": self._tested,
            "rate ": f"{train.learning_rate:.3g}",
            "noise ": f"{train.noise_amplitude:.2g}" if train.noise_amplitude else "",
            "saved at ": self._saved,
        }
        shown = [Text.assemble((name, "dim"), value) for name, value in values.items() if value]
        return line.append_text(Text("  ").join(shown))


def progress_bar(epoch: str, step: int, total_steps: int | None, seconds_left: float | None) -> Table:
    """Return a line with the epoch, a bar, the step, and the time left if that is known."""
    line = Table.grid(expand=True, padding=(0, 2, 0, 0))
    for ratio in (None, 1, None, None):
        line.add_column(ratio=ratio, no_wrap=True)
    line.add_row(
        Text.assemble(("epoch ", "dim"), (epoch, "bold")),
        ProgressBar(total_steps or 1, step if total_steps else 0, complete_style="green", finished_style="green"),
        Text.assemble(("step ", "dim"), f"{step:,}/{total_steps:,}" if total_steps else f"{step:,}"),
        Text("" if seconds_left is None else f"{wording.duration(seconds_left)} left", style="cyan"),
    )
    return line


def summary_table(
    name: str, run_directory: Path, total_steps: int, epochs: float, outcome: Outcome, box: Box | None
) -> Table:
    """Return a table of how the run `name` ended, one fact per row."""
    table = Table(box=box, show_header=False, title=Text(escaped(name), style="bold"), title_justify="left")
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    colour = {"finished": "green", "stopped": "yellow", "failed": "red"}.get(outcome.state, "white")
    reason = f": {escaped(outcome.reason)}" if outcome.reason else ""
    code = f" (exit code {outcome.exit_code})" if outcome.exit_code else ""
    table.add_row("state", Text.assemble((outcome.state, f"bold {colour}"), reason, code))
    speed = outcome.samples_per_second
    accuracies = {"train": outcome.train_accuracy, "test": outcome.test_accuracy, "best": outcome.best_accuracy}
    steps = f"{outcome.step:,} of {total_steps:,}"
    if outcome.step > total_steps:  # of a resume
        steps = f"{outcome.step:,}, so run.max_steps={total_steps:,} left none to do"
    rows = {
        "steps": steps,
        "epochs": f"{wording.epochs(outcome.epoch)} of {wording.epochs(max(epochs, outcome.epoch))}",
        **{f"{name} accuracy": wording.percent(share) for name, share in accuracies.items() if share is not None},
        "images/s": None if speed is None else wording.rate(speed),
        "time": wording.duration(outcome.seconds),
        "last checkpoint": outcome.last_checkpoint,
        "run directory": run_directory,
    }
    for name, value in rows.items():
        if value is not None:
            table.add_row(name, Text(escaped(str(value))))
    return table


TERMINAL_VARIABLE = "DIST_TRAIN_TERMINAL"  # `[host:]/dev/pts/N`: launchers put a pipe in between


def open_console(environment: Mapping[str, str] = os.environ) -> Observer:
    """Return a bar if the output is a terminal, nothing if there is no output, otherwise plain lines."""
    if sys.stdout is None or getattr(sys.stdout, "closed", False):  # as in a daemon
        return Observer()
    if environment.get("TERM", "dumb") in ("dumb", "unknown"):
        return PlainLines(sys.stdout)
    if terminal := launcher_terminal(environment.get(TERMINAL_VARIABLE, "")):
        return TerminalBar(terminal)
    # mpirun gives every rank a pseudo-terminal even if its own output goes to a file.
    launched = "OMPI_COMM_WORLD_RANK" in environment or "PMIX_RANK" in environment
    # An object of a script in place of the output, such as one that copies it into a file, may only write and flush.
    is_terminal = hasattr(sys.stdout, "isatty") and sys.stdout.isatty()
    return TerminalBar(sys.stdout) if is_terminal and not launched else PlainLines(sys.stdout)


def launcher_terminal(address: str) -> TextIO | None:
    """Open the terminal at `[host:]device`; None if it is on another host or cannot be opened."""
    host, _, device = address.rpartition(":")
    if host in ("", socket.gethostname()) and device.startswith("/dev/"):
        with suppress(OSError):
            descriptor = os.open(device, os.O_WRONLY | os.O_NOCTTY | os.O_CLOEXEC)
            if os.isatty(descriptor):
                return os.fdopen(descriptor, "w", encoding="utf-8")
            os.close(descriptor)
    return None


_LOGGER = "dist_train"


@contextmanager
def open_logs(directory: Path, rank: int) -> Iterator[Path]:
    """Log to the rank's file in `directory`, and rank 0's warnings to stderr; yield the path. Raises OSError."""
    path = directory / f"rank-{rank}.log"
    handlers = [_RankFile(path, rank), *([_Stderr()] if rank == 0 else ())]
    logger = logging.getLogger(_LOGGER)
    level = logger.level
    logger.setLevel(logging.INFO)
    for handler in handlers:
        logger.addHandler(handler)
    try:
        yield path
    finally:
        logger.setLevel(level)
        for handler in handlers:
            logger.removeHandler(handler)
            handler.close()


class _Formatter(logging.Formatter):
    """Removes terminal escape sequences from messages, and passwords from URLs."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


class _RankFile(logging.FileHandler):
    """Appends to the rank's file; on a write error, reports it once and stops."""

    def __init__(self, path: Path, rank: int) -> None:
        super().__init__(path, encoding="utf-8")
        form = _Formatter(f"%(asctime)s.%(msecs)03dZ %(levelname)-7s rank {rank}  %(message)s", "%Y-%m-%dT%H:%M:%S")
        form.converter = time.gmtime
        self.setFormatter(form)

    def close(self) -> None:
        with suppress(OSError):  # the failed write has been reported already
            super().close()

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (the name is logging's)
        logging.getLogger(_LOGGER).removeHandler(self)
        if sys.stderr is not None:
            with suppress(OSError, ValueError):
                reason = sys.exc_info()[1]
                print(f"{self.baseFilename} cannot be written, logging ends: {reason}", file=sys.stderr)


class _Stderr(logging.StreamHandler[TextIO]):
    """Warnings and above, to the current `sys.stderr`, which the progress bar may have replaced."""

    def __init__(self) -> None:
        logging.Handler.__init__(self, logging.WARNING)
        self.setFormatter(_Formatter("%(levelname)s: %(message)s"))

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stderr

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (the name is logging's)
        logging.getLogger(_LOGGER).removeHandler(self)
