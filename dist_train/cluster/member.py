"""A rank's connection to the coordinator of an elastic launch: heartbeats, messages, and the wait for a generation."""

from __future__ import annotations

import os
import select
import socket
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import TypeAdapter

from dist_train.cluster.communicator import Generation, RankLostError
from dist_train.cluster.heartbeats import BEATS_IN_TIMEOUT, SuspensionDetector
from dist_train.cluster.launch import MEMBERSHIP_VARIABLE, TOKEN_VARIABLE
from dist_train.cluster.messages import MessageConnection
from dist_train.cluster.rendezvous import end_process
from dist_train.outcome import say_on_stderr

_GENERATION = TypeAdapter(Generation)
_LONGEST_BEAT_SECONDS = 5.0  # as for the watchdog: the launcher hears all ranks
_LONGEST_CHECK_SECONDS = 0.5
_SLACK_SECONDS = 1.0  # the thread that beats may have to wait for the interpreter


class Pulse:
    """Detects that a thread hangs; another thread calls `hangs` about once per `period`.

    Between `move` and `rest` the thread must call one of them, or `move_within`, every `limit` seconds. A thread that
    once took more than half of that and still continued is slow, and never counts as hanging again.
    """

    def __init__(self, limit: float, period: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit = limit
        self._clock = clock
        self._since: float | None = None
        self._awake_since = clock()
        self._suspensions = SuspensionDetector(period, self._awake_since, _SLACK_SECONDS)
        self._is_slow = False

    def move(self) -> None:
        """Report progress in work that takes longer than the limit only if the thread hangs."""
        self._note(self._clock())

    def move_within(self) -> None:
        """Report progress if such work is under way."""
        if self._since is not None:
            self._note(self._clock())

    def rest(self) -> None:
        """Report that what follows may take any time."""
        self._note(None)

    def hangs(self) -> bool:
        """Whether the thread hangs; never right after the whole process was suspended."""
        now, since = self._clock(), self._since
        if self._suspensions.was_suspended(now):
            self._awake_since = now
        return since is not None and not self._is_slow and now - max(since, self._awake_since) >= self._limit

    def _note(self, moment: float | None) -> None:
        since, self._since = self._since, moment
        if since is not None and self._clock() - max(since, self._awake_since) > self._limit / 2:
            self._is_slow = True


class Member:
    """This process as one of the launch's, until `leave`."""

    def __init__(
        self, timeout: float, environment: Mapping[str, str] = os.environ, end: Callable[[], None] = end_process
    ) -> None:
        """Connect, and beat often enough for `timeout`; `end` ends this process if expelled.

        Raises RankLostError; UsageError if the launcher is of another version.
        """
        host, _, port = environment[MEMBERSHIP_VARIABLE].rpartition(":")
        self._beat = min(_LONGEST_BEAT_SECONDS, timeout / BEATS_IN_TIMEOUT)
        self._check = min(_LONGEST_CHECK_SECONDS, self._beat)
        self.pulse = Pulse(timeout, self._check)  # of the main thread
        self._end = end
        self._changed = threading.Condition()
        self._next: Generation | None = None
        self._generation = 0
        self.interruption = ""  # why the current generation is over; empty while it is not
        self._end_reason = ""
        self._is_leaving = False
        self.wants_rendezvous = False  # whether ranks are waiting to join
        self.on_break: Callable[[], None] = lambda: None  # called, from a thread not to be blocked, when it breaks
        fields = {"slot": int(environment["RANK"]), "node": socket.gethostname()}
        try:
            self._connection = MessageConnection(host, int(port))
            welcome = self._connection.introduce(environment[TOKEN_VARIABLE], fields)
        except OSError as error:
            raise RankLostError(f"the launcher does not answer at {host}:{port}: {error}") from error
        self.joins = bool(welcome["joins"])  # a run that is under way
        self.most_ranks = int(welcome["most"])  # that there may be at a time
        self.address: str = self._connection.socket.getsockname()[0]  # this node's address on the network of the launch
        self._connection.socket.settimeout(None)
        self._thread = threading.Thread(target=self._run, name="membership", daemon=True)
        self._thread.start()

    def report_state(self, *, works: bool) -> None:
        """Report that the run can continue from this rank's state; `works`: and that its generation works."""
        self._connection.send({"kind": "trains", "works": works})

    def await_generation(self, store_port: int, why: str) -> Generation:
        """Report that this rank has stopped work, and return the next generation once it begins.

        `store_port`: port of this rank's store, where the others meet if it becomes rank 0. `why`: what broke the
        current generation, if anything. Raises RankLostError if the run cannot continue.
        """
        store = [self.address, store_port]
        self._connection.send({"kind": "ready", "generation": self._generation, "store": store, "why": why})
        with self._changed:
            self._changed.wait_for(lambda: self._next is not None or self._end_reason)
            if self._end_reason:
                raise RankLostError(self._end_reason)
            assert self._next is not None
            generation, self._next = self._next, None
            return generation

    def leave(self, why: str) -> None:
        """Leave because the run has ended (`why` is empty), or because this rank failed (`why` says how)."""
        if not self._is_leaving:
            self._is_leaving = True
            self._connection.send({"kind": "leave", "why": why})
            self._thread.join(1.0)
            self._connection.socket.close()

    def _run(self) -> None:
        poll = select.poll()
        poll.register(self._connection.socket, select.POLLIN)
        due = beat_due = time.monotonic()
        while True:
            if (now := time.monotonic()) >= due:
                due = now + self._check
                if self.pulse.hangs():
                    self._connection.send({"kind": "hangs"})
                elif now >= beat_due:
                    beat_due = now + self._beat
                    self._connection.send({"kind": "beat"})
            if not poll.poll(max(0.0, due - time.monotonic()) * 1000):
                continue
            try:
                self._connection.receive()
            except OSError:
                break
            for message in self._connection.messages():
                self._handle(message)
        if not self._is_leaving and not self._end_reason:
            # The others continue without this rank: it must not write any more.
            say_on_stderr(
                "dist-train: this rank did not answer and was expelled, or its launcher is gone; it ends [rank-lost]"
            )
            self._end()

    def _handle(self, fields: Mapping[str, Any]) -> None:
        with self._changed:
            match fields["kind"]:
                case "break" if fields["generation"] == self._generation:
                    self.interruption = fields["why"]
                    self.on_break()
                case "meet":
                    self.wants_rendezvous = True
                case "end":
                    self._end_reason = self.interruption = fields["why"]
                    self.on_break()
                case "members":
                    self.interruption, self.wants_rendezvous = "", False
                    self._generation = fields["generation"]
                    self._next = _GENERATION.validate_python(fields)
            self._changed.notify_all()
