"""Ranks of this node for a run that another node's launcher has begun: `dist-train launch --join`.

The launcher connects to that one, the authority, proves that it knows the token, and has the authority prove the same
before it runs what it is told. Its ranks then connect to the authority themselves. Without the authority its ranks are
nothing: where it is gone or silent they end.
"""

from __future__ import annotations

import hmac
import json
import os
import secrets
import select
import socket
import stat
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from dist_train.cluster.elastic_launch import OurProcesses, run_ranks
from dist_train.cluster.joined_nodes import Expelled, View
from dist_train.cluster.launch import MEMBERSHIP_VARIABLE
from dist_train.cluster.local_launch import say
from dist_train.cluster.membership_server import (
    BEATS_IN_TIMEOUT,
    ENDS_OF_A_RUN,
    SLOT_VARIABLE,
    TOKEN_VARIABLE,
    answer_of_authority,
    answer_to,
)
from dist_train.outcome import FaultError, UsageError
from dist_train.rundir import atomic
from dist_train.rundir.status import LAUNCH_VARIABLE

_CONNECT_SECONDS = 10.0
_WAIT_SECONDS = 1.0


@dataclass(frozen=True)
class Entry:
    """Where the authority listens, and the secret that lets in."""

    host: str
    port: int
    token: str


def entry_of(place: str, environment: Mapping[str, str] = os.environ) -> Entry:
    """Return the entry that `place` means: HOST:PORT, with the token in the environment, or the authority's file.

    Raises:
        UsageError: it means none, or others can read the token.
    """
    host, _, port = place.rpartition(":")
    if host and port.isdecimal() and "/" not in host:
        token = environment.get(TOKEN_VARIABLE, "")
        if not token:
            raise UsageError(
                f"--join {place}: the token is missing: set {TOKEN_VARIABLE}, or name the file join-*.json of the run "
                f"directory in place of the address",
                code="join-token",
            )
        return Entry(host, int(port), token)
    path = Path(place)
    try:
        with atomic.open_regular(path) as file:
            mode = os.fstat(file.fileno()).st_mode
            fields = json.loads(file.read())
        host, _, port = str(fields["address"]).rpartition(":")
        entry = Entry(host, int(port), str(fields["token"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"--join takes HOST:PORT, or the file join-*.json in the directory of a run whose launcher has --listen "
            f"and is at work, not {place} ({getattr(error, 'strerror', None) or 'it is no such file'})",
            code="join-place",
        ) from error
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise UsageError(f"{path}: others can read its token; run: chmod 600 {path}", code="join-token")
    return entry


def launch_joining(entry: Entry, count: int) -> int:
    """Run `count` ranks on this machine of the run that begins or is under way at `entry`, to their end.

    Returns:
        How the run has ended; where it continues without these ranks, how the first of them failed.

    Raises:
        UsageError: nobody answers there, the token is another, or the run takes no more ranks.
        FaultError: the connection broke.
    """
    with RemoteAuthority(entry, count) as authority:
        order = authority.await_start()
        try:
            os.chdir(order["folder"])
        except OSError as error:
            raise UsageError(
                f"the run was started in {order['folder']}, which this node does not have ({error.strerror}): all "
                f"nodes need the same folders",
                code="join-folder",
            ) from error
        environment = {**os.environ, LAUNCH_VARIABLE: order["launch"]}
        own = {TOKEN_VARIABLE: entry.token, MEMBERSHIP_VARIABLE: f"{entry.host}:{entry.port}"}

        def place(slot: int) -> Mapping[str, str]:
            number = {"WORLD_SIZE": str(order["size"]), SLOT_VARIABLE: str(slot)}
            return {**own, **number, "MASTER_PORT": "0"}

        ours = OurProcesses(order["words"], order["slots"], environment, place)
        return run_ranks(ours, authority, order["restarts"])


class RemoteAuthority:
    """The authority on another node, by one connection; without a thread, so that `poll` must be called often.

    A context manager, which lets go of the connection in order.
    """

    def __init__(self, entry: Entry, count: int) -> None:
        """Connect for `count` ranks, and have both sides prove that they know the token.

        Raises:
            UsageError: nobody answers at `entry`, or the token is another.
        """
        self.awaits_others = False
        self._view = View()
        self._code: int | None = None
        self.timeout = _CONNECT_SECONDS
        self._received = b""
        self._expelled: list[Expelled] = []
        self._processes = count
        self._order: Mapping[str, Any] | None = None
        self._refusal = ""
        place = f"{entry.host}:{entry.port}"
        try:
            self._socket = socket.create_connection((entry.host, entry.port), _CONNECT_SECONDS)
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except (OSError, OverflowError) as error:
            raise UsageError(
                f"no launcher answers at {place} ({error}): the run has ended, or this node cannot reach that address",
                code="join-unanswered",
            ) from error
        try:
            self._prove(entry.token, count)
        except (OSError, ValueError, KeyError, TypeError) as error:
            self._socket.close()
            raise UsageError(
                f"the launcher at {place} does not know this token, or is none: take the token of the launch that is "
                f"at work there",
                code="join-token",
            ) from error
        self._heard = self._polled = time.monotonic()
        self._due = 0.0

    def _prove(self, token: str, count: int) -> None:
        challenge = secrets.token_hex(16)
        proof = answer_to(token, str(self._read()["text"]))
        hello = {"kind": "hello", "proof": proof, "challenge": challenge, "node": _node_name()}
        self._send({**hello, "process": os.getpid(), "ranks": count})
        fields = self._read()
        if not hmac.compare_digest(str(fields["proof"]), answer_of_authority(token, challenge)):
            raise ValueError("the proof is wrong")
        self.timeout = float(fields["timeout"])
        self._socket.settimeout(self.timeout)
        self._take_lines(b"")

    @property
    def view(self) -> View:
        """What is known of the run, with what this node's ranks know before the authority does."""
        return self._view if self._view.code is not None else replace(self._view, code=self._code)

    def await_start(self) -> Mapping[str, Any]:
        """Return what to start, once it may be started.

        Raises:
            UsageError: the run takes no more ranks.
            FaultError: the connection broke.
        """
        since = time.monotonic()
        is_announced = False
        while self._order is None:
            if self._refusal:
                raise UsageError(self._refusal, code="join-refused")
            self.poll(_WAIT_SECONDS)
            if not is_announced and time.monotonic() - since > _WAIT_SECONDS:
                is_announced = True
                say("waiting until the run has begun")
        return self._order

    def poll(self, seconds: float) -> None:
        """Take what has come, waiting up to `seconds`, and beat.

        Raises:
            FaultError: the authority is gone or silent.
        """
        beat = self.timeout / BEATS_IN_TIMEOUT
        if select.select([self._socket], [], [], min(seconds, beat))[0]:
            self._receive()
        now = time.monotonic()
        slept, self._polled = now - self._polled > 2 * beat, now
        if slept:  # nobody's silence counts
            self._heard = now
        if now - self._heard >= self.timeout:
            raise _lost(f"has not answered for {self.timeout:g} s")
        if now >= self._due:
            self._due = now + beat
            self._send({"kind": "beat"})

    def expect(self, processes: int) -> None:
        """Tell the authority how many processes are ranks or may become ones, where that has changed."""
        if processes != self._processes:
            self._processes = processes
            self._send({"kind": "processes", "count": processes})

    def take_expelled(self) -> list[Expelled]:
        """Return whom it has expelled of this node since the last call."""
        expelled, self._expelled = self._expelled, []
        return expelled

    def note_code(self, code: int) -> None:
        """Tell the authority how a process has ended."""
        if self._code is None and code in ENDS_OF_A_RUN:
            self._code = code
        self._send({"kind": "ended", "code": code})

    def first_failure(self) -> int | None:
        """Return None: this launcher knows its own ranks."""
        return None

    def ask_to_stop(self) -> None:
        """Nothing: the ranks that are asked agree with all others."""

    def abandon(self) -> None:
        """Nothing: this launcher waits for its own ranks alone."""

    def __enter__(self) -> RemoteAuthority:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._send({"kind": "leave"})
        self._socket.close()

    def _receive(self) -> None:
        try:
            content = self._socket.recv(1 << 16)
        except OSError:
            content = b""
        if not content:
            raise _lost("is gone")
        self._heard = time.monotonic()
        self._take_lines(content)

    def _take_lines(self, content: bytes) -> None:
        *lines, self._received = (self._received + content).split(b"\n")
        for line in lines:
            self._take(json.loads(line))

    def _take(self, fields: Mapping[str, Any]) -> None:
        match fields["kind"]:
            case "welcome":
                self._order = fields
            case "refused":
                self._refusal = fields["why"]
            case "expelled":
                self._expelled.append(Expelled(fields["slot"], fields["process"]))
            case "view":
                members, joiners = frozenset(fields["members"]), frozenset(fields["joiners"])
                rest = {name: fields[name] for name in ("has_state", "has_ended", "code", "stop_requested")}
                self._view = View(members, joiners, **rest)

    def _read(self) -> Mapping[str, Any]:
        while b"\n" not in self._received:
            content = self._socket.recv(1 << 16)
            if not content:
                raise OSError("it has closed the connection")
            self._received += content
        line, _, self._received = self._received.partition(b"\n")
        fields: Mapping[str, Any] = json.loads(line)
        return fields

    def _send(self, fields: Mapping[str, Any]) -> None:
        try:
            self._socket.sendall(json.dumps(dict(fields)).encode() + b"\n")
        except OSError:  # noticed where it is read
            return


def _node_name() -> str:
    """Return what Slurm calls this node, or else the node itself."""
    return os.environ.get("SLURMD_NODENAME", "") or socket.gethostname()


def _lost(what: str) -> FaultError:
    return FaultError(f"the launcher that began the run {what}: the ranks of this node end", code="rank-lost")
