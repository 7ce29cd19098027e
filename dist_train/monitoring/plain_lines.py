"""Progress as plain lines at a steady pace, for files, pipes and batch systems."""

from __future__ import annotations

import io
import os
import time
from collections.abc import Callable
from typing import TextIO

from rich.console import Console

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

_WIDTH = 120


class PlainLines:
    """Writes one line each `seconds` at most, and one for every evaluation and event; each is flushed."""

    def __init__(self, stream: TextIO, seconds: float = 10.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._seconds = seconds
        self._clock = clock
        self._next = clock()
        self._pace = Pace()
        self._facts: RunFacts | None = None

    def begin(self, facts: RunFacts) -> None:
        """Say what is about to be trained."""
        self._facts = facts
        self._write("\n".join(wording.introduction(facts)))

    def record(self, record: Record) -> None:
        """Write `record` as a line, where it is time for one."""
        assert self._facts is not None, "begin comes first"
        match record:
            case TrainRecord():
                now = self._clock()
                self._pace.mark(record.step, now)
                if now >= self._next:
                    self._next = now + self._seconds
                    self._write(self._line(self._facts, record))
            case EvaluationRecord():
                self._write(wording.evaluation(self._facts, record))
            case EventRecord():
                self._write(wording.event(record))

    def measurement(self, measurement: Measurement) -> None:
        """Do nothing: this is for charts."""

    def progress(self, step: int) -> None:
        """Do nothing: lines come from records."""

    def sync(self) -> None:
        """Do nothing: every line is flushed."""

    def end(self, outcome: Outcome) -> None:
        """Write the summary, of a run that has begun."""
        if self._facts is None:
            return
        page = io.StringIO()
        table = summary_table(self._facts, outcome, box=None)
        Console(file=page, width=_WIDTH, color_system=None).print(table)
        self._write("\n" + "\n".join(line.rstrip() for line in page.getvalue().splitlines()))

    def _line(self, facts: RunFacts, record: TrainRecord) -> str:
        left = self._pace.seconds_left(facts.total_steps)
        epoch = wording.current_epoch(facts, record.step)
        return (
            f"epoch {epoch}  step {record.step:,}/{facts.total_steps:,}  loss {record.loss:.4f}  "
            f"accuracy {wording.percent(record.accuracy)}  {wording.rate(record.samples_per_second)} images/s"
            + (f"  {wording.duration(left)} left" if left is not None else "")
        )

    def _write(self, text: str) -> None:
        try:
            self._stream.write(text + "\n")
            self._stream.flush()
        except BrokenPipeError:
            self._close_the_pipe()
            raise

    def _close_the_pipe(self) -> None:
        """Let what is left in the stream's buffer go nowhere, or Python's exit fails on it with code 120."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)
