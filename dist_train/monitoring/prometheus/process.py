"""The exporter's process: serves what the trainer sends, keeps the target file fresh, and pushes the last values."""

from __future__ import annotations

import math
import os
import re
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Lock, Thread

from prometheus_client import delete_from_gateway, push_to_gateway

from dist_train.monitoring.prometheus import messages, targets
from dist_train.monitoring.prometheus.board import KILLED, Board, is_stalled, outcome_label
from dist_train.monitoring.prometheus.http_server import CANNOT_LISTEN, Site, bind, read_credentials, tls_context
from dist_train.monitoring.prometheus.metrics import Families, MetricsPage
from dist_train.rundir.metrics_file import TRAIN_LINE, from_json
from dist_train.rundir.records import EvaluationRecord, EventRecord, Outcome, Record, RunFacts

PUSH_SECONDS = 5.0
RECENT_SECONDS = 60.0  # who scraped so shortly before the end is waited for, to get the last values

_LOOK_SECONDS = 1.0
_DISK_SECONDS = 30.0
_RECHECK_SECONDS = 2.0
_PAUSE_SECONDS = 0.02  # pause between reads of the socket, so that fast steps do not wake this process every time
_NICENESS = 10
_DYING_SECONDS = 60.0  # how long a killed trainer may exist after its socket has closed, while its memory is freed


def main(descriptor: int, trainer: int) -> None:
    """Serve what arrives at the socket `descriptor` until it closes or the process `trainer` ends."""
    # Signals are for the trainer. This process must not take its cores or slow down those that compute.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    with suppress(OSError):  # a container may forbid it, which does no harm
        os.nice(_NICENESS)
        # Leave the cores that a launcher bound the rank to; the kernel restricts the set to the allowed cores.
        os.sched_setaffinity(0, range(os.cpu_count() or 1))
    channel = messages.Channel(socket.socket(fileno=descriptor))
    try:
        begin = _await_begin(channel, trainer)
        if begin is not None:
            with suppress(OSError):  # show the run's name in `ps` and `top`; the kernel allows 15 characters
                name = f"metrics {re.sub('[^!-~]', '_', begin.facts.name)}"[:15]
                Path("/proc/self/comm").write_text(name, encoding="ascii")
            _Service(channel, trainer, begin).run()
    except Exception as error:  # the trainer reports the last line
        raise SystemExit(str(error) if isinstance(error, OSError | ValueError) else repr(error)) from error


def _await_begin(channel: messages.Channel, trainer: int) -> messages.Begin | None:
    while os.getppid() == trainer:
        messages.await_input(_LOOK_SECONDS, channel)
        try:
            for message in channel.receive():
                assert isinstance(message, messages.Begin)
                return message
        except EOFError:
            break
    return None


def _group(facts: RunFacts) -> dict[str, str]:
    """Return the key of the run's group on a Pushgateway, besides the job: run, run id, and the rank if it is not 0."""
    return {"run": facts.name, "run_id": facts.run_id} | ({"rank": str(facts.rank)} if facts.rank else {})


def _gateway_error(request: Callable[..., None], *arguments: object) -> str:
    """Send a request to a Pushgateway; return the error, or an empty string."""
    try:
        request(*arguments, timeout=PUSH_SECONDS)
    except Exception as error:  # a broken server can raise almost anything in urllib
        return str(getattr(error, "reason", None) or error) or type(error).__name__
    return ""


class _Service:
    def __init__(self, channel: messages.Channel, trainer: int, begin: messages.Begin) -> None:
        self._channel = channel
        self._lock = Lock()
        self._sending = Lock()
        self._outcome: Outcome | None = None
        self._is_over = False
        self._wake = os.eventfd(0)
        self._trainer = trainer
        self._plan = plan = begin.plan
        self._facts = begin.facts
        self._board = Board(begin.facts, begin.counts)
        self._target: targets.TargetFile | None = None  # once it has been written
        self._is_failing = False  # whether the last access to it failed
        self._heartbeat_due = math.inf
        self._disk_due = -math.inf
        self._forgetting = Thread(target=self._forget_earlier_values, name="pushgateway", daemon=True)
        self._gateway_failure = ""
        rendered = MetricsPage(self._board)

        def page() -> bytes:
            self._receive()
            return rendered.render()

        def health() -> bool:
            self._receive()
            return not is_stalled(self._board.snapshot(), time.time())

        # The configured port is rank 0's.
        port = plan.port if begin.facts.rank == 0 or plan.port == 0 else plan.port + 1
        site = Site(page, health, read_credentials(plan), tls_context(plan), begin.facts.run_id)
        try:
            self._server = bind(plan.host, port, site)
        except OSError as error:
            raise OSError(f"{plan.host}:{port} cannot be served ({error.strerror}); {CANNOT_LISTEN}") from error
        if begin.facts.rank == 0 and port not in (0, self._server.server_port):
            self._warn(f"metrics port {port} is in use; metrics are at port {self._server.server_port}")

    def run(self) -> None:
        Thread(target=self._server.serve_forever, args=(_LOOK_SECONDS,), name="http", daemon=True).start()
        if self._plan.pushgateway:
            self._forgetting.start()
        try:
            self._announce()
            self._board.recall(_history(self._facts))
            while self._outcome is None and not self._is_over and os.getppid() == self._trainer:
                messages.await_input(_LOOK_SECONDS, self._channel, self._wake)
                self._receive()
                self._follow_rank()
                self._heartbeat()
                self._measure_disk()
                time.sleep(_PAUSE_SECONDS)
            if self._outcome is not None:
                self._end(self._outcome)
        finally:
            if self._target is not None and (outcome := self._final_outcome()):
                # Wait for the scrape first: Prometheus drops a target as soon as its file changes.
                if self._outcome is None:
                    self._board.killed()
                    self._await_scrape(time.monotonic(), self._patience())
                with self._warning(f"the outcome cannot be written to the target file {self._target.path}"):
                    targets.record_outcome(self._target.path, self._target.process, outcome)

    def _receive(self) -> None:
        """Apply received messages to the board. A scrape calls this too, so it sees everything sent before it."""
        with self._lock:
            if self._is_over:
                return
            try:
                for message in self._channel.receive():
                    assert isinstance(message, messages.ToExporter), "the trainer sends nothing else"
                    self._board.apply(message)
                    if isinstance(message, Outcome):
                        self._outcome = message
                        os.eventfd_write(self._wake, 1)
            except EOFError:
                self._is_over = True
                os.eventfd_write(self._wake, 1)

    def _announce(self) -> None:
        """Say where the metrics are, to Prometheus and to the trainer."""
        self._target = None
        if (directory := self._plan.targets_directory) is not None:
            process = targets.process_identity(self._trainer)
            exporter = targets.process_identity(os.getpid())
            port = self._server.server_port
            target = targets.target_file(self._plan, self._facts, port, process, exporter)
            self._heartbeat_due = time.monotonic() + targets.HEARTBEAT_SECONDS
            with self._warning(f"Prometheus will not find this run: no target file in {directory}"):
                target.write()
                self._target = target
                # Another rank that starts now may have taken the file for one of an earlier launch, and removed it.
                self._heartbeat_due = time.monotonic() + _RECHECK_SECONDS
            # One rank of each node, which knows what runs there: each cleaner opens the files of all ranks.
            is_cleaner = self._facts.node not in self._facts.nodes[: self._facts.rank]
            if self._target is not None and is_cleaner:
                with self._warning(f"target files of runs that are gone may stay in {directory}"):
                    _, skipped = targets.remove_stale(directory, resumed=self._facts.run_id)
                    if skipped:
                        self._warn(f"{directory}: {skipped}")
        host = self._plan.host_for_others(self._facts.node)
        address = f"{self._plan.scheme}://{host}:{self._server.server_port}/metrics"
        self._send(messages.Serving(address, None if self._target is None else self._target.path))

    def _follow_rank(self) -> None:
        """Move the target file if the rank has another number since ranks were lost."""
        facts = self._board.snapshot().facts
        if facts.rank != self._facts.rank:
            self._facts, before = facts, self._target
            self._announce()
            if before is not None:
                with suppress(OSError):  # the file may be gone
                    before.remove()

    def _heartbeat(self) -> None:
        if time.monotonic() < self._heartbeat_due:
            return
        if self._target is None:
            self._announce()
            return
        self._heartbeat_due = time.monotonic() + targets.HEARTBEAT_SECONDS
        with self._warning(f"Prometheus may lose sight of this run: {self._target.path} cannot be touched"):
            self._target.touch()

    def _measure_disk(self) -> None:
        if self._facts.rank == 0 and time.monotonic() >= self._disk_due:
            self._disk_due = time.monotonic() + _DISK_SECONDS
            with suppress(OSError):
                self._board.disk(shutil.disk_usage(self._facts.run_directory).free)

    def _final_outcome(self) -> str:
        """Return the outcome; empty if only this process ends and the trainer still lives."""
        if self._outcome is not None:
            return outcome_label(self._outcome)
        deadline = time.monotonic() + _DYING_SECONDS
        while os.getppid() == self._trainer and self._is_over and time.monotonic() < deadline:
            time.sleep(_PAUSE_SECONDS)
        return "" if os.getppid() == self._trainer else KILLED

    def _end(self, outcome: Outcome) -> None:
        """Push the last values, and wait for a scrape of them if one is likely."""
        # A stopped run will be killed soon, so it does not wait.
        waits = outcome.state in ("finished", "failed") and not outcome.is_left
        patience = self._patience() if waits else 0.0
        ended = time.monotonic()
        gateway = self._plan.pushgateway
        self._send(messages.Ending(max(patience, 2 * PUSH_SECONDS) if gateway else patience, patience))
        if gateway:
            self._forgetting.join(PUSH_SECONDS)
            now = self._board.snapshot()
            failure = _gateway_error(push_to_gateway, gateway, targets.JOB, Families(now), _group(now.facts))
            if failure not in ("", self._gateway_failure):
                self._warn(f"the Pushgateway at {gateway} did not take the last values: {failure}")
        self._await_scrape(ended, patience)

    def _forget_earlier_values(self) -> None:
        """Delete what an earlier launch has pushed: rules would take it for this launch's values."""
        gateway = self._plan.pushgateway
        self._gateway_failure = _gateway_error(delete_from_gateway, gateway, targets.JOB, _group(self._facts))
        if self._gateway_failure:
            self._warn(
                f"the Pushgateway at {gateway} may keep values of an earlier launch, and not take the last ones: "
                f"{self._gateway_failure}"
            )

    def _patience(self) -> float:
        last = self._server.last_scrape
        is_scraped = last is not None and time.monotonic() - last < RECENT_SECONDS
        return self._plan.last_scrape_seconds if is_scraped else 0.0

    def _await_scrape(self, ended: float, patience: float) -> None:
        """Wait until all scrapers have read the values as of `ended` (monotonic), at most `patience` seconds after."""
        while time.monotonic() < ended + patience and not self._server.all_have_scraped(ended, RECENT_SECONDS):
            time.sleep(_PAUSE_SECONDS)

    @contextmanager
    def _warning(self, text: str) -> Iterator[None]:
        """Warn of an error of the target file, once until an access to it succeeds."""
        try:
            yield
        except OSError as error:
            if not self._is_failing:
                self._warn(f"{text}: {error.strerror or error}")
            self._is_failing = True
        else:
            self._is_failing = False

    def _warn(self, text: str) -> None:
        self._send(messages.Warned(text))

    def _send(self, message: messages.FromExporter) -> None:
        """Send `message` to the trainer, if it still lives."""
        with self._sending, suppress(OSError):
            self._channel.send(message)


def _history(facts: RunFacts) -> Iterator[Record]:
    """Yield the evaluations and checkpoints so far, and the events since the launch began.

    The latter are there if an earlier process of this launch has died.
    """
    with suppress(OSError), (facts.run_directory / "metrics.jsonl").open("rb") as lines:
        for line in lines:
            match None if line.startswith(TRAIN_LINE) else from_json(line):
                case EvaluationRecord() | EventRecord(event="checkpoint") as record:
                    yield record
                case EventRecord() as record if record.time >= facts.launched:
                    yield record
