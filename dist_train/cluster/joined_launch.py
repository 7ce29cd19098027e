"""A launcher's connection to the launcher of another node, the coordinator, whose run it joins.

Both prove that they know the token before this launcher runs the command that it is sent. Its ranks then connect to the
coordinator themselves; they end if the coordinator is gone or silent.
"""

from __future__ import annotations

import json
import math
import os
import select
import socket
import stat
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from dist_train.cluster.heartbeats import BEATS_IN_TIMEOUT, SuspensionDetector
from dist_train.cluster.local_launch import say
from dist_train.cluster.membership_server import ENDS_OF_A_RUN, TOKEN_VARIABLE, View
from dist_train.cluster.messages import MessageConnection
from dist_train.outcome import FaultError, UsageError
from dist_train.rundir import atomic

_VIEW = TypeAdapter(View)
_WAIT_SECONDS = 1.0


@dataclass(frozen=True)
class Entry:
    """Where the coordinator listens, and the token that it demands."""

    host: str
    port: int
    token: str


def entry_of(place: str, environment: Mapping[str, str] = os.environ) -> Entry:
    """Return the entry at `place`: HOST:PORT, or the file that the coordinator wrote. Raises UsageError."""
    host, _, port = place.rpartition(":")
    if host and port.isdecimal() and "/" not in host:
        token = environment.get(TOKEN_VARIABLE, "")
        if not token:
            raise UsageError(
                f"--join {place}: the token is missing: set {TOKEN_VARIABLE}, or name the file join-*.json of the run "
                f"directory in place of the address",
                code="join-token",
            )
        return Entry(host.strip("[]"), int(port), token)
    path = Path(place)
    try:
        with atomic.open_regular(path) as file:
            mode = os.fstat(file.fileno()).st_mode
            fields = json.loads(file.read())
        host, _, port = str(fields["address"]).rpartition(":")
        entry = Entry(host.strip("[]"), int(port), str(fields["token"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"--join takes HOST:PORT, or the file join-*.json in the directory of a run whose launcher has --listen "
            f"and is running, not {place} ({getattr(error, 'strerror', None) or 'it is no such file'})",
            code="join-place",
        ) from error
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise UsageError(f"{path}: others can read its token; run: chmod 600 {path}", code="join-token")
    return entry


class RemoteCoordinator:
    """A connection to the coordinator on another node, for a block; it has no thread: call `poll` often."""

    def __init__(self, entry: Entry, count: int) -> None:
        """Connect for `count` ranks; both sides prove that they know the token. Raises UsageError."""
        self.awaits_others = False
        self._view = View()
        self._code: int | None = None
        self.expelled: list[tuple[int, int]] = []  # slots and processes of this node: they must not write any more
        self._processes = count
        self._launch_spec: Mapping[str, Any] | None = None
        place = f"{entry.host}:{entry.port}"
        try:
            self._connection = MessageConnection(entry.host, entry.port)
        except (OSError, OverflowError) as error:
            raise UsageError(
                f"no launcher answers at {place} ({error}): the run has ended, or this node cannot reach that address",
                code="join-unanswered",
            ) from error
        node = os.environ.get("SLURMD_NODENAME", "") or socket.gethostname()
        try:
            limits = self._connection.introduce(entry.token, {"node": node, "ranks": count})
            self.timeout = float(limits["timeout"])
            self._connection.socket.settimeout(self.timeout)
        except (OSError, ValueError, KeyError, TypeError) as error:
            self._connection.socket.close()
            raise UsageError(
                f"what listens at {place} does not know this token, or is no launcher: use the token of the launch "
                f"that is running there",
                code="join-token",
            ) from error
        self._heard = time.monotonic()
        self._beat = self.timeout / BEATS_IN_TIMEOUT
        self._suspensions = SuspensionDetector(self._beat, self._heard)
        self._due = 0.0

    @property
    def view(self) -> View:
        """What the coordinator has sent about the run, with the exit code that this node's ranks may know earlier."""
        return self._view if self._view.code is not None else replace(self._view, code=self._code)

    def await_start(self) -> Mapping[str, Any]:
        """Return what to launch, once the coordinator sends it. Raises UsageError or FaultError."""
        announced_at = time.monotonic() + _WAIT_SECONDS
        self._handle_messages()  # which came with the proof
        while self._launch_spec is None:
            self.poll(_WAIT_SECONDS)
            if time.monotonic() > announced_at:
                announced_at = math.inf
                say("waiting until the run has begun")
        return self._launch_spec

    def poll(self, seconds: float) -> None:
        """Handle the messages that arrive within `seconds`, and send a beat if it is due. Raises FaultError."""
        if select.select([self._connection.socket], [], [], min(seconds, self._beat))[0]:
            try:
                self._connection.receive()
            except OSError:
                raise _lost("is gone") from None
            self._heard = time.monotonic()
            self._handle_messages()
        now = time.monotonic()
        if self._suspensions.was_suspended(now):  # the coordinator may have sent beats meanwhile
            self._heard = now
        if now - self._heard >= self.timeout:
            raise _lost(f"has not answered for {self.timeout:g} s")
        if now >= self._due:
            self._due = now + self._beat
            self._connection.send({"kind": "beat"})

    def expect(self, processes: int) -> None:
        """Report how many processes are ranks or may become ranks, if that has changed."""
        if processes != self._processes:
            self._processes = processes
            self._connection.send({"kind": "processes", "count": processes})

    def note_code(self, code: int) -> None:
        """Report the exit code of a process to the coordinator."""
        if self._code is None and code in ENDS_OF_A_RUN:
            self._code = code
        self._connection.send({"kind": "ended", "code": code})

    def first_failure(self) -> int | None:
        """Return None: only this node's own ranks matter, and the launcher knows those."""
        return None

    def ask_to_stop(self) -> None:
        """Ask the coordinator to make all launchers stop their ranks."""
        self._connection.send({"kind": "stop"})

    def abandon(self) -> None:
        """Do nothing: this launcher waits for its own ranks only."""

    def __enter__(self) -> RemoteCoordinator:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.send({"kind": "leave"})
        self._connection.socket.close()

    def _handle_messages(self) -> None:
        for fields in self._connection.messages():
            match fields["kind"]:
                case "welcome":
                    self._launch_spec = fields
                case "refused":
                    raise UsageError(fields["why"], code="join-refused")
                case "expelled":
                    self.expelled.append((fields["slot"], fields["process"]))
                case "view":
                    self._view = _VIEW.validate_python(fields)


def _lost(what: str) -> FaultError:
    return FaultError(f"the launcher that began the run {what}: the ranks of this node end", code="rank-lost")
