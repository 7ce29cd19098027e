"""A rank's end of the connection to the authority of an elastic launch: beats, news, and the wait for a generation."""

from __future__ import annotations

import json
import os
import select
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from dist_train.cluster.communicator import Generation, RankLostError
from dist_train.cluster.joining import end_process
from dist_train.cluster.launch import MEMBERSHIP_VARIABLE
from dist_train.cluster.membership_server import (
    BEATS_IN_TIMEOUT,
    SLOT_VARIABLE,
    TOKEN_VARIABLE,
    answer_to,
)

_CONNECT_SECONDS = 10.0
_LOOK_SECONDS = 0.5


class Pulse:
    """Whether a thread that must move on does so: asked by another thread, about once a `period`.

    Between `move` and `rest` the thread must call one of them, or `move_within`, within `limit` seconds. Once it has
    needed more than half of that and came nevertheless, it is slow, and is not judged any more.
    """

    def __init__(self, limit: float, period: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit = limit
        self._period = period
        self._clock = clock
        self._since: float | None = None
        self._awake_since = self._looked = clock()
        self._is_slow = False

    def move(self) -> None:
        """Begin, or continue, what takes long only where the thread hangs."""
        self._note(self._clock())

    def move_within(self) -> None:
        """Continue it, where it has begun."""
        if self._since is not None:
            self._note(self._clock())

    def rest(self) -> None:
        """Begin what may take as long as it takes."""
        self._note(None)

    def hangs(self) -> bool:
        """Whether the thread hangs; nobody does right after the process has slept."""
        now, since = self._clock(), self._since
        if now - self._looked > 2 * self._period + 1.0:
            self._awake_since = now
        self._looked = now
        return since is not None and not self._is_slow and now - max(since, self._awake_since) >= self._limit

    def _note(self, moment: float | None) -> None:
        since, self._since = self._since, moment
        if since is not None and self._clock() - max(since, self._awake_since) > self._limit / 2:
            self._is_slow = True


class Member:
    """This process among those of the launch, from its making to `leave`."""

    def __init__(
        self, timeout: float, environment: Mapping[str, str] = os.environ, end: Callable[[], None] = end_process
    ) -> None:
        """Connect; beats go out often enough for `timeout`. `end` ends a process that is no longer wanted.

        Raises:
            RankLostError: the authority does not answer.
        """
        host, _, port = environment[MEMBERSHIP_VARIABLE].rpartition(":")
        self._beat = min(_LOOK_SECONDS, timeout / BEATS_IN_TIMEOUT)
        self.pulse = Pulse(timeout, self._beat)
        """Of the main thread."""
        self._end = end
        self._sending = threading.Lock()
        self._changed = threading.Condition()
        self._next: Generation | None = None
        self._generation = 0
        self._interruption = ""
        self._ended = ""
        self._is_leaving = False
        self._received = b""
        self.wants_meeting = False
        """Whether ranks wait to be let in."""
        self.on_break: Callable[[], None] = lambda: None
        """Called, in a thread that it must not hold up, when the present generation is over since it broke."""
        try:
            self._socket = socket.create_connection((host, int(port)), _CONNECT_SECONDS)
        except OSError as error:
            raise RankLostError(f"the launcher does not answer at {host}:{port}: {error}") from error
        try:
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            proof = answer_to(environment[TOKEN_VARIABLE], self._read()["text"])
            slot, node = int(environment[SLOT_VARIABLE]), socket.gethostname()
            self._send({"kind": "hello", "proof": proof, "slot": slot, "node": node, "process": os.getpid()})
            self.joins = bool(self._read()["joins"])
            """Whether the run is under way, and this process joins it."""
        except (OSError, ValueError, KeyError) as error:
            self._socket.close()
            raise RankLostError(f"the launcher does not answer at {host}:{port}: {error}") from error
        self.address: str = self._socket.getsockname()[0]
        """This node's address, as the others may reach it."""
        self._socket.settimeout(None)
        self._thread = threading.Thread(target=self._run, name="membership", daemon=True)
        self._thread.start()

    @property
    def interruption(self) -> str:
        """Why the present generation is over; empty while it is not."""
        return self._interruption

    def trains(self) -> None:
        """Say that the run can be continued from this rank's state."""
        self._send({"kind": "trains"})

    def await_generation(self, store_port: int, why: str) -> Generation:
        """Say that this rank has stopped work, and return the next generation once it begins.

        Raises:
            RankLostError: the run cannot continue.
        """
        store = [self.address, store_port]
        self._send({"kind": "ready", "generation": self._generation, "store": store, "why": why})
        with self._changed:
            while self._next is None and not self._ended:
                self._changed.wait(1.0)
            if self._ended:
                raise RankLostError(self._ended)
            assert self._next is not None
            begun, self._next = self._next, None
            return begun

    def leave(self, why: str) -> None:
        """Leave: because the run has ended, or, where `why` says so, because this rank failed."""
        if not self._is_leaving:
            self._is_leaving = True
            self._send({"kind": "leave", "why": why})
            self._thread.join(1.0)
            self._socket.close()

    def _run(self) -> None:
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        due = time.monotonic()
        while True:
            if time.monotonic() >= due:
                due = time.monotonic() + self._beat
                self._send({"kind": "hangs" if self.pulse.hangs() else "beat"})
            if not poll.poll(max(0.0, due - time.monotonic()) * 1000):
                continue
            try:
                content = self._socket.recv(1 << 16)
            except OSError:
                content = b""
            if not content:
                break
            *lines, self._received = (self._received + content).split(b"\n")
            for line in lines:
                self._take(json.loads(line))
        if not self._is_leaving and not self._ended:
            # Others have taken its place: it must not write any more.
            print(
                "dist-train: this rank did not answer and was expelled, or its launcher is gone; it ends [rank-lost]",
                file=sys.stderr,
                flush=True,
            )
            self._end()

    def _take(self, fields: Mapping[str, Any]) -> None:
        with self._changed:
            match fields["kind"]:
                case "break" if fields["generation"] == self._generation:
                    self._interruption = fields["why"]
                    self.on_break()
                case "meet":
                    self.wants_meeting = True
                case "end":
                    self._ended = self._interruption = fields["why"]
                    self.on_break()
                case "members":
                    self._interruption, self.wants_meeting = "", False
                    self._generation = fields["generation"]
                    self._next = Generation(
                        generation=fields["generation"],
                        rank=fields["rank"],
                        size=fields["size"],
                        store=(fields["store"][0], fields["store"][1]),
                        nodes=tuple(fields["nodes"]),
                        lost=tuple(fields["lost"]),
                        report=fields["report"],
                        joined=tuple(fields["joined"]),
                    )
            self._changed.notify_all()

    def _send(self, fields: Mapping[str, Any]) -> None:
        with self._sending:
            try:
                self._socket.sendall(json.dumps(dict(fields)).encode() + b"\n")
            except OSError:  # the thread that reads notices, and decides
                return

    def _read(self) -> Mapping[str, Any]:
        """Return the next line, before the thread reads."""
        while b"\n" not in self._received:
            content = self._socket.recv(1 << 16)
            if not content:
                raise OSError("it has closed the connection")
            self._received += content
        line, _, self._received = self._received.partition(b"\n")
        fields: Mapping[str, Any] = json.loads(line)
        return fields
