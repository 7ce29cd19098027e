"""The trainer's side of the exporter: starts its process, sends to it without blocking, and restarts it if it dies.

A scrape therefore never takes the trainer's interpreter, and no step waits: messages that the process cannot take are
dropped.
"""

from __future__ import annotations

import logging
import math
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from dist_train.monitoring.prometheus import messages
from dist_train.monitoring.prometheus.board import outcome_label
from dist_train.monitoring.prometheus.messages import Begin, Ending, Progress, Serving, Warned
from dist_train.monitoring.prometheus.targets import process_identity, record_outcome
from dist_train.outcome import signal_name
from dist_train.rundir.paths import RunDirectory
from dist_train.rundir.records import Measurement, Observer, Outcome, Record, RunFacts, TrainRecord
from dist_train.rundir.status import LAUNCH_VARIABLE, read_counts

if TYPE_CHECKING:
    from dist_train.config.sections import MetricsSettings

_logger = logging.getLogger(__name__)

_START_SECONDS = 5.0
_END_SECONDS = 3.0
_HUNG_SECONDS = 0.5
_LONGEST_PAUSE = 64.0  # seconds between attempts to restart the process; the first pause is one second, then it doubles
_ROOT = Path(__file__).parents[3]
_CHILD = (
    "import sys; sys.path.insert(0, sys.argv[1]); import dist_train; sys.path.append(sys.path.pop(0)); "
    "from dist_train.monitoring.prometheus.process import main; main(int(sys.argv[2]), int(sys.argv[3]))"
)  # the trainer's copy of the package, before others; but no module beside it in place of another one


class _Link:
    """The exporter's process and the channel to it."""

    def __init__(self) -> None:
        ours, theirs = messages.socket_pair()
        with theirs:
            descriptor = theirs.fileno()
            command = [sys.executable, "-P", "-c", _CHILD, str(_ROOT), str(descriptor), str(os.getpid())]
            null, pipe = subprocess.DEVNULL, subprocess.PIPE
            # It may outlive the launch, until the last values are scraped: launch scripts end what is left by this.
            environment = {name: value for name, value in os.environ.items() if name != LAUNCH_VARIABLE}
            try:
                # It inherits none of the trainer's open files; otherwise a launcher would wait for its end.
                self.process = subprocess.Popen(
                    command,
                    stdin=null,
                    stdout=null,
                    stderr=pipe,
                    env=environment,
                    pass_fds=[descriptor],
                    start_new_session=True,
                )
            except OSError:
                ours.close()
                raise
        self.channel = messages.Channel(ours)

    def close(self, seconds: float) -> str:
        """End the process, killing it after `seconds`; return how it ended, as text."""
        self.channel.close()
        try:
            _, errors = self.process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            _, errors = self.process.communicate()
        status = self.process.returncode
        if status < 0:
            return f"its process was ended by {signal_name(-status)}"
        return errors.decode(errors="replace").strip().rpartition("\n")[2] or f"its process ended with code {status}"


class ExporterError(RuntimeError):
    """The metrics cannot be served; the message says why."""


class Exporter(Observer):
    """Serves a run's metrics from `begin` to `end`, in a process that the constructor starts."""

    def __init__(self, settings: MetricsSettings) -> None:
        self.address: str | None = None  # the URL of the metrics page; None while nothing is served
        self._plan = messages.plan_of(settings)
        self._target: Path | None = None
        self._ending: Ending | None = None
        self._facts: RunFacts | None = None  # set once the run has begun
        self._restarts = 0
        self._restart_at = math.inf
        self._reason = ""
        self._step_sent = -1  # the step of the last record of an update, until `progress` has come to it
        self._link: _Link | None = None
        try:
            self._link = _Link()
        except OSError as error:
            self._reason = f"its process cannot be started: {error}"

    def begin(self, facts: RunFacts) -> None:
        """Serve the run. Raises ExporterError if that is impossible."""
        self._send_begin(facts)
        deadline = time.monotonic() + _START_SECONDS
        while self._link is not None and self.address is None and time.monotonic() < deadline:
            self._listen(deadline - time.monotonic())
        if self._link is None:
            raise ExporterError(self._reason)
        self._facts = facts
        if self.address is None:
            _logger.warning("metrics are not served yet, after %g s; training continues", _START_SECONDS)

    def regroup(self, facts: RunFacts) -> None:
        self._facts = facts
        self._send_begin(facts)

    def record(self, record: Record) -> None:
        if isinstance(record, TrainRecord):
            self._step_sent = record.step
        self._send(record)
        self._listen(0)

    def measurement(self, measurement: Measurement) -> None:
        self._send(measurement)

    def progress(self, step: int) -> None:
        """Send that `step` updates are done. If the process has died, restart it after a pause."""
        if self._link is None and self._facts is not None and time.monotonic() >= self._restart_at:
            self._restarts += 1
            self._reason = ""
            self._schedule_restart()
            with suppress(OSError):
                self._link = _Link()
                self._send_begin(replace(self._facts, start_step=step))
        if step != self._step_sent:
            self._send(Progress(step))
        # Further calls at this step, within an evaluation, show that the run is alive.
        self._step_sent = -1
        if self.address is None:
            self._listen(0)

    def end(self, outcome: Outcome) -> None:
        """Let the last values be pushed and scraped, as configured, and end the process."""
        seconds = _END_SECONDS
        if self._facts is not None:
            self._send(outcome)
            self._await_end()
            seconds = _END_SECONDS if self._ending else _HUNG_SECONDS
        if self._link is not None:
            self._link.close(seconds)
            self._link = None
        self.address = None
        if self._target is not None:  # in case the process could not record the outcome
            try:
                record_outcome(self._target, process_identity(os.getpid()), outcome_label(outcome))
            except OSError as error:
                _logger.warning("the outcome cannot be written to %s: %s", self._target, error.strerror or error)
            self._target = None

    def send_outcome(self, outcome: Outcome) -> None:
        """Send how the run ends, from any thread: its process records it once this one is gone."""
        if self._facts is not None:
            self._send(outcome)

    def _send_begin(self, facts: RunFacts) -> None:
        counts: Mapping[str, int] = {}
        # The file holds all events so far; errors in it are reported by the observer that counts them.
        with suppress(OSError, ValueError):
            counts = read_counts(RunDirectory(facts.run_directory).event_counts)
        self._send(Begin(self._plan, facts, {**counts, "exporter_restarted": self._restarts}))

    def _schedule_restart(self) -> None:
        self._restart_at = time.monotonic() + min(2**self._restarts, _LONGEST_PAUSE)

    def _send(self, message: messages.ToExporter) -> None:
        if self._link is not None:
            try:
                self._link.channel.send(message)
            except OSError:
                self._listen(0)  # handles the end of the process

    def _listen(self, seconds: float) -> None:
        """Handle the process's messages, waiting up to `seconds` for the first."""
        if self._link is None:
            return
        if seconds > 0:
            messages.await_input(seconds, self._link.channel)
        try:
            for answer in self._link.channel.receive():
                match answer:
                    case Serving():
                        if answer.address != self.address:  # the same again: only the target file is another
                            _logger.info("metrics at %s", answer.address)
                        self.address, self._target = answer.address, answer.target
                    case Warned():
                        _logger.warning("%s", answer.text)
                    case Ending():
                        self._ending = answer
        except EOFError:
            self._lose(self._link)
        except ValueError as error:
            # The installed code was replaced between the start of this process and of the exporter's.
            self._reason = f"its process runs another version of the code: {error}"
            self._lose(self._link)

    def _lose(self, link: _Link) -> None:
        """Handle the end of the process. Its target file stays, so that Prometheus sees the target as down."""
        self._link = None
        end = link.close(_END_SECONDS)
        self._reason = self._reason or end
        if self._facts is not None and self._ending is None:
            # Warn once; failed restarts are only logged.
            is_first = self.address is not None or self._restarts == 0
            self.address = None
            self._schedule_restart()
            level = logging.WARNING if is_first else logging.DEBUG
            _logger.log(level, "metrics are no longer served; training continues: %s", self._reason)

    def _await_end(self) -> None:
        deadline = time.monotonic() + _END_SECONDS
        while self._link is not None and time.monotonic() < deadline:
            with suppress(OSError):  # _listen handles the end of the process
                self._link.channel.flush()
            self._listen(0.1 if self._ending is None else max(0.0, deadline - time.monotonic()))
            if self._ending is not None and self._ending.seconds > 0:
                deadline = time.monotonic() + self._ending.seconds + _END_SECONDS
                if self._ending.for_scrape > 0:
                    _logger.info("waiting up to %g s for a scrape of the last values", self._ending.for_scrape)
                self._ending = Ending(0.0, 0.0)
