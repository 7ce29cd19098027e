"""The exporter's process: serves what the trainer sends, keeps the target file alive, pushes the last values."""

from __future__ import annotations

import math
import os
import re
import select
import shutil
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Lock, Thread

from prometheus_client import push_to_gateway

from dist_train.monitoring.prometheus import targets
from dist_train.monitoring.prometheus.board import KILLED, Board, Snapshot, outcome_label, stands_still
from dist_train.monitoring.prometheus.http_server import Site, bind, read_credentials, tls_context
from dist_train.monitoring.prometheus.messages import Begin, Channel, Ending, Progress, Serving, Warned
from dist_train.monitoring.prometheus.page import Families, MetricsPage
from dist_train.rundir.records import Measurement, Outcome, Record, TrainRecord, from_json

PUSH_SECONDS = 5.0
RECENT_SECONDS = 60.0
"""Whoever scraped so lately is waited for with the last values."""

_LOOK_SECONDS = 1.0
_DISK_SECONDS = 30.0
_PAUSE_SECONDS = 0.02
"""Between readings of the socket, so that fast steps do not wake this process at each one."""
_POLITENESS = 10
_DYING_SECONDS = 60.0
"""A process that was killed closes its socket first; it can take long to give back its memory, and then be gone."""


def main(descriptor: int, trainer: int) -> None:
    """Serve what comes over the socket `descriptor`, until it ends or the process `trainer` does."""
    # Be out of the way: of signals, which are the trainer's; of its cores; of everybody who computes.
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    with suppress(OSError):  # a container may forbid it; then it is served all the same
        os.nice(_POLITENESS)
        # a launcher binds a rank to its cores, which this process takes over; the kernel keeps to what is allowed
        os.sched_setaffinity(0, range(os.cpu_count() or 1))
    channel = Channel(socket.socket(fileno=descriptor))
    try:
        begin = _await_begin(channel, trainer)
        if begin is not None:
            with suppress(OSError):  # `ps` and `top` show whose exporter this is, in the kernel's 15 characters
                name = f"metrics {re.sub('[^!-~]', '_', begin.facts.name)}"[:15]
                Path("/proc/self/comm").write_text(name, encoding="ascii")
            _Service(channel, trainer, begin).run()
    except Exception as error:  # the trainer reports the last line
        raise SystemExit(str(error) if isinstance(error, OSError | ValueError) else repr(error)) from error


def _await_begin(channel: Channel, trainer: int) -> Begin | None:
    while os.getppid() == trainer:
        select.select([channel], [], [], _LOOK_SECONDS)
        try:
            for message in channel.receive():
                assert isinstance(message, Begin)
                return message
        except EOFError:
            break
    return None


def _push(gateway: str, now: Snapshot) -> str:
    """Push the values of `now` to the Pushgateway at the URL `gateway`; return what went wrong, or nothing.

    They replace the run's own group: job, run and run id, and the rank other than 0.
    """
    facts = now.facts
    group = {"run": facts.name, "run_id": facts.run_id} | ({"rank": str(facts.rank)} if facts.rank else {})
    try:
        push_to_gateway(gateway, targets.JOB, Families(now), group, PUSH_SECONDS)
    except Exception as error:  # urllib lets through whatever a broken server provokes
        return str(getattr(error, "reason", None) or error) or type(error).__name__
    return ""


class _Service:
    def __init__(self, channel: Channel, trainer: int, begin: Begin) -> None:
        self._channel = channel
        self._lock = Lock()
        self._outcome: Outcome | None = None
        self._is_over = False
        self._wake = os.eventfd(0)
        self._trainer = trainer
        self._plan = plan = begin.plan
        self._facts = begin.facts
        self._board = Board(begin.facts, begin.counts)
        self._target: targets.TargetFile | None = None
        self._touched = time.monotonic()
        self._disk_due = -math.inf
        rendered = MetricsPage(self._board)

        def page() -> bytes:
            self._take()
            return rendered.render()

        def health() -> bool:
            self._take()
            return not stands_still(self._board.snapshot(), time.time())

        # the setting's own port is rank 0's
        port = plan.port if begin.facts.rank == 0 or plan.port == 0 else plan.port + 1
        self._server = bind(plan.host, port, Site(page, health, read_credentials(plan), tls_context(plan)))
        if begin.facts.rank == 0 and port not in (0, self._server.server_port):
            self._warn(f"metrics port {port} is in use; metrics are at port {self._server.server_port}")

    def run(self) -> None:
        Thread(target=self._server.serve_forever, args=(_LOOK_SECONDS,), name="http", daemon=True).start()
        try:
            self._enter_target()
            host = self._plan.host_for_others(self._facts.node)
            address = f"{self._plan.scheme}://{host}:{self._server.server_port}/metrics"
            self._channel.send(Serving(address, None if self._target is None else self._target.path))
            self._board.recall(_history(self._facts.run_directory / "metrics.jsonl"))
            while self._outcome is None and not self._is_over and os.getppid() == self._trainer:
                select.select([self._channel.fileno(), self._wake], [], [], _LOOK_SECONDS)
                self._take()
                self._heartbeat()
                self._look_at_the_disk()
                time.sleep(_PAUSE_SECONDS)
            if self._outcome is not None:
                self._end(self._outcome)
        finally:
            target, self._target = self._target, None
            if target is not None and (outcome := self._how_it_ended()):
                # First: Prometheus drops a target, last scrape or not, whose file has changed.
                if outcome == KILLED:
                    self._board.killed()
                    self._await_scrape()
                with self._warning(f"the target file {target.path} cannot say how the run ended"):
                    target.end(outcome)

    def _take(self) -> None:
        """Take messages onto the board; a scrape does so too, and sees all that was sent before it."""
        with self._lock:
            if self._is_over:
                return
            try:
                for message in self._channel.receive():
                    match message:
                        case Begin():
                            self._board.regroup(message.facts)
                        case Progress():
                            self._board.progress(message.step)
                        case Measurement():
                            self._board.measurement(message)
                        case Outcome():
                            self._board.end(message)
                            self._outcome = message
                            os.eventfd_write(self._wake, 1)
                        case _:
                            assert isinstance(message, Record), "the trainer sends nothing else"
                            self._board.record(message)
            except EOFError:
                self._is_over = True
                os.eventfd_write(self._wake, 1)

    def _enter_target(self) -> None:
        directory = self._plan.targets_directory
        if directory is None:
            return
        process = targets.identity_of(self._trainer)
        exporter = targets.identity_of(os.getpid())
        target = targets.target_file(self._plan, self._facts, self._server.server_port, process, exporter)
        with self._warning(f"Prometheus will not find this run: no target file in {directory}"):
            target.write()
            self._target = target
            if warning := targets.remove_stale(directory, resumed=self._facts.run_id).warning:
                self._warn(f"{directory}: {warning}")

    def _heartbeat(self) -> None:
        if self._target is None or time.monotonic() - self._touched < targets.HEARTBEAT_SECONDS:
            return
        self._touched = time.monotonic()
        target, self._target = self._target, None
        with self._warning(f"Prometheus may lose sight of this run: {target.path} cannot be touched"):
            target.touch()
            self._target = target

    def _look_at_the_disk(self) -> None:
        if self._facts.rank == 0 and time.monotonic() >= self._disk_due:
            self._disk_due = time.monotonic() + _DISK_SECONDS
            with suppress(OSError):
                self._board.disk(shutil.disk_usage(self._facts.run_directory).free)

    def _how_it_ended(self) -> str:
        """Return the outcome; nothing where the trainer lives, and this process alone ends."""
        if self._outcome is not None:
            return outcome_label(self._outcome)
        deadline = time.monotonic() + _DYING_SECONDS
        while os.getppid() == self._trainer and self._is_over and time.monotonic() < deadline:
            time.sleep(_PAUSE_SECONDS)
        return "" if os.getppid() == self._trainer else KILLED

    def _end(self, outcome: Outcome) -> None:
        """Push the last values, and wait for a scrape of them where one is likely."""
        # a run that was stopped is about to be killed
        patience = self._patience() if outcome.state in ("finished", "failed") else 0.0
        ended = time.monotonic()
        gateway = self._plan.pushgateway
        self._channel.send(Ending(max(patience, PUSH_SECONDS) if gateway else patience, patience))
        if gateway and (reason := _push(gateway, self._board.snapshot())):
            self._warn(f"the Pushgateway at {gateway} did not take the last values: {reason}")
        while time.monotonic() < ended + patience and os.getppid() == self._trainer:
            self._take()  # the trainer may end unannounced
            if self._is_over or self._server.all_have_scraped(ended, RECENT_SECONDS):
                return
            time.sleep(_PAUSE_SECONDS)

    def _patience(self) -> float:
        """Return how long to wait for one more scrape, in seconds."""
        last = self._server.last_scrape
        is_scraped = last is not None and time.monotonic() - last < RECENT_SECONDS
        return self._plan.last_scrape_seconds if is_scraped else 0.0

    def _await_scrape(self) -> None:
        """Wait for a scrape where the trainer is no longer there to be waited for."""
        ended = time.monotonic()
        deadline = ended + self._patience()
        while time.monotonic() < deadline and not self._server.all_have_scraped(ended, RECENT_SECONDS):
            time.sleep(_PAUSE_SECONDS)

    @contextmanager
    def _warning(self, text: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._warn(f"{text}: {error.strerror or error}")

    def _warn(self, text: str) -> None:
        with suppress(OSError):  # nobody is there to hear
            self._channel.send(Warned(text))


def _history(path: Path) -> Iterator[Record]:
    """Yield the evaluations and checkpoints of earlier launches."""
    with suppress(OSError):
        for line in path.read_bytes().split(b"\n"):
            # most lines are of steps, and there can be millions
            if b'"eval"' in line or b'"checkpoint"' in line:
                record = from_json(line)
                if record is not None and not isinstance(record, TrainRecord):
                    yield record
