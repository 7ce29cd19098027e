"""A progress bar on a terminal: two lines at the foot, evaluations and events above them."""

from __future__ import annotations

import os
import sys
import time
from contextlib import suppress
from typing import TextIO

from rich.box import ROUNDED
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from dist_train.monitoring import wording
from dist_train.monitoring.pace import Pace
from dist_train.monitoring.records import (
    EvaluationRecord,
    EventRecord,
    Measurement,
    Outcome,
    Record,
    RunFacts,
    TrainRecord,
)
from dist_train.monitoring.summary import summary_table

_REDRAW_SECONDS = 0.2
_REDRAW_SHARE = 1 / 300
"""The most of the training's time that drawing may take."""
_WIDEST = 110


class TerminalBar:
    """Redraws at most five times a second, and more seldom where drawing is slow. No thread of its own."""

    def __init__(self, terminal: TextIO) -> None:
        self._terminal = terminal
        self._console = _Terminal(file=terminal, force_terminal=True, highlight=False, soft_wrap=False)
        self._live = Live(console=self._console, auto_refresh=False, transient=True)
        self._pace = Pace()
        self._next = 0.0
        self._facts: RunFacts | None = None
        self._step = 0
        self._train: TrainRecord | None = None
        self._test: EvaluationRecord | None = None
        self._best = 0.0
        self._saved: int | None = None

    def begin(self, facts: RunFacts) -> None:
        """Say what is about to be trained, and draw the bar."""
        self._facts = facts
        self._step = facts.start_step
        self._fit()
        first, *rest = wording.introduction(facts)
        self._console.print(Text(first, style="bold"))
        for line in rest:
            self._console.print(Text(line, style="dim"))
        self._live.start()
        # a run that is killed must not leave a terminal without a cursor
        self._console.show_cursor(True)
        self._draw()

    def record(self, record: Record) -> None:
        """Take `record` into the bar; an evaluation or an event is printed above it."""
        assert self._facts is not None, "begin comes first"
        match record:
            case TrainRecord():
                self._train = record
                self._pace.mark(record.step, time.monotonic())
                self.progress(record.step)
            case EvaluationRecord():
                self._print(self._evaluation(self._facts, record))
            case EventRecord(event="checkpoint"):
                self._saved = record.step
            case EventRecord():
                self._print(Text(wording.event(record), style="yellow"))

    def measurement(self, measurement: Measurement) -> None:
        """Do nothing: this is for charts."""

    def progress(self, step: int) -> None:
        """Move the bar, where it is time to."""
        self._step = max(self._step, step)
        if time.monotonic() >= self._next:
            self._draw()

    def sync(self) -> None:
        """Do nothing: nothing here is kept."""

    def end(self, outcome: Outcome) -> None:
        """Take the bar away and print the summary, of a run that has begun."""
        if self._facts is not None:
            self._stop()
            self._console.print()
            self._console.print(summary_table(self._facts, outcome, box=ROUNDED))
        if self._terminal is not sys.stdout:
            self._terminal.close()

    def _evaluation(self, facts: RunFacts, record: EvaluationRecord) -> Text:
        line = Text(wording.evaluation(facts, record))
        if record.split == "test":
            self._test = record
            if record.accuracy > self._best:
                self._best = record.accuracy
                line.append("  best so far", style="green")
        return line

    def _print(self, line: Text) -> None:
        try:
            self._console.print(line)
        except OSError:
            self._stop()
            raise

    def _draw(self) -> None:
        started = time.monotonic()
        try:
            self._fit()
            self._live.update(self._view(), refresh=True)
        except OSError:
            self._stop()
            raise
        finished = time.monotonic()
        self._next = finished + max(_REDRAW_SECONDS, (finished - started) / _REDRAW_SHARE)

    def _stop(self) -> None:
        """End the live display and give `sys.stdout` and `sys.stderr` back, whatever the terminal says."""
        with suppress(OSError):
            self._live.stop()

    def _fit(self) -> None:
        """Follow the size of the terminal; behind a launcher the standard streams do not know it."""
        with suppress(OSError):
            columns = os.get_terminal_size(self._terminal.fileno()).columns
            if columns > 0:
                self._console.width = columns

    def _view(self) -> Group:
        facts = self._facts
        assert facts is not None, "begin comes first"
        seconds = self._pace.seconds_left(facts.total_steps)
        left = Text("") if seconds is None else Text(f"{wording.duration(seconds)} left", style="cyan")
        bar = Table.grid(expand=True, padding=(0, 2, 0, 0))
        bar.width = min(self._console.width, _WIDEST)
        for ratio in (None, 1, None, None):
            bar.add_column(ratio=ratio, no_wrap=True)
        bar.add_row(
            Text.assemble(("epoch ", "dim"), (wording.current_epoch(facts, self._step), "bold")),
            ProgressBar(facts.total_steps, self._step, complete_style="green", finished_style="green"),
            Text.assemble(("step ", "dim"), f"{self._step:,}/{facts.total_steps:,}"),
            left,
        )
        return Group(bar, self._measurements())

    def _measurements(self) -> Text:
        train = self._train
        line = Text(no_wrap=True, overflow="ellipsis")
        if train is None:
            return line.append("waiting for the first step", style="dim")
        pairs = [
            ("loss ", f"{train.loss:.4f}"),
            ("accuracy ", wording.percent(train.accuracy)),
            ("", f"{wording.rate(train.samples_per_second)} images/s"),
        ]
        if self._test is not None:
            pairs.append(("test ", wording.percent(self._test.accuracy)))
        pairs.append(("rate ", f"{train.learning_rate:.3g}"))
        if train.noise_amplitude:
            pairs.append(("noise ", f"{train.noise_amplitude:.2g}"))
        if self._saved is not None:
            pairs.append(("saved at ", f"{self._saved:,}"))
        for name, value in pairs:
            line.append(name, style="dim").append(value).append("  ")
        line.rstrip()
        return line


class _Terminal(Console):
    """A console that reports a closed pipe as what it is; the library's own way is to end the process."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError("the terminal is closed")
