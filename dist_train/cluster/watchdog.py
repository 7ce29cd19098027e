"""Ends the run with a message when a rank dies, hangs or is cut off: the others would wait for it for ever.

Every rank sends heartbeats to rank 0, which answers them. A rank that is silent for `timeout` is lost. A thread then
ends the process, since the main thread may be inside an allreduce that never returns; the launcher ends the rest.

A heartbeat needs the GIL, so a rank that holds it for `timeout` without a pause counts as lost. Compiling and loading
libraries can hold it for seconds: use 10 s or more.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import select
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from dist_train.cluster.communicator import Communicator, RankLostError, broadcast_str, gather_int
from dist_train.cluster.heartbeats import (
    BEATS_IN_TIMEOUT,
    LARGEST,
    TOKEN_BYTES,
    Address,
    Datagram,
    HeartbeatMonitor,
    Kind,
    deadline_message,
    decode,
    encode,
    loss_message,
    name_ranks,
    open_datagrams,
    own_addresses,
    reachable_from,
)
from dist_train.cluster.rendezvous import end_process
from dist_train.outcome import ExitCode, escaped, exit_code_of, say_on_stderr

_LONGEST_BEAT = 5.0
_SEARCH_SECONDS = 0.2  # between beats until rank 0 has answered
_SEARCH_AGAIN = 2.5  # after this many beats without an answer, all addresses of rank 0 are tried again
_RECEIVE_PAUSE_SECONDS = 0.1  # between receptions, so that many ranks do not wake rank 0 for each beat
_FAREWELLS = 3
_FAREWELL_SECONDS = 0.2
_MEETING_SECONDS = 10.0
_REPORT_SECONDS = 5.0  # time to write the message and the status, which can hang, too: a full pipe, a lost file system

_logger = logging.getLogger("dist_train.cluster")


@dataclass(eq=False, repr=False)  # the token is a secret
class Watchdog:
    """Watches the other ranks until `close`; a context manager.

    Sends heartbeats; when a rank is lost, reports it, calls `on_loss(message)` and ends the process by `end`.
    """

    comm: Communicator
    token: bytes
    paths: Sequence[Address]  # rank 0's addresses in the form that the socket `datagrams` takes
    datagrams: socket.socket
    timeout: float
    on_loss: Callable[[str], None]
    end: Callable[[], None]

    def __post_init__(self) -> None:
        self._is_first = self.comm.rank == 0  # all others send it heartbeats
        self._beat = min(_LONGEST_BEAT, self.timeout / BEATS_IN_TIMEOUT)
        self._monitor = HeartbeatMonitor(timeout=self.timeout, beat=self._beat, now=time.monotonic())
        self._peers: dict[int, str] = {}
        self._addresses: dict[int, Address] = {}
        self._path: int | None = None
        self._answered_at = 0.0
        self._loss_from_rank_0: str | None = None
        self._parting: Kind | None = None
        self._is_probing = False
        self._changed = threading.Condition()
        self._process = os.getpid()
        self._node_and_process = f"{socket.gethostname()} {self._process}"
        self._wake = os.eventfd(0)
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._thread.start()

    def await_answer(self, seconds: float) -> bool:
        """Return whether rank 0 and this rank have found each other."""
        if self._is_first:
            return True
        with self._changed:
            return self._changed.wait_for(lambda: self._path is not None, seconds)

    def absent(self, seconds: float = 1.0) -> str:
        """Return the ranks that do not answer within `seconds`, as "rank 3 (node2, process 4242)"; empty if all do.

        For use after a collective has failed: its error does not say which rank is gone. Rank 0 probes all others,
        which probe rank 0.
        """
        if self._parting is not None:
            return ""
        moment = time.monotonic()
        with self._changed:
            self._is_probing = True
            os.eventfd_write(self._wake, 1)
            self._changed.wait_for(lambda: not self._monitor.unheard_since(moment), seconds)
            missing = self._monitor.unheard_since(moment)
            return name_ranks(missing, self._peers) if missing else ""

    def close(self, error: BaseException | None = None) -> None:
        """Leave by LEAVE, or by FAIL where `error` is not a stop on request, and end the thread."""
        # a forked child has the object, but not the thread, and is no rank
        if self._parting is not None or os.getpid() != self._process:
            return
        fails = error is not None and exit_code_of(error) != ExitCode.STOPPED
        self._parting = Kind.FAIL if fails else Kind.LEAVE
        os.eventfd_write(self._wake, 1)
        self._thread.join()
        self.datagrams.close()
        os.close(self._wake)

    def __enter__(self) -> Watchdog:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        self.close(error)

    def _run(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self.datagrams, selectors.EVENT_READ)
            selector.register(self._wake, selectors.EVENT_READ)
            self._watch(selector)
            if self._parting is not None:
                self._announce_leave(self._parting, selector)

    def _watch(self, selector: selectors.BaseSelector) -> None:
        due = time.monotonic()
        awakening = select.poll()
        awakening.register(self._wake, select.POLLIN)
        while self._parting is None:
            awakening.poll(self._receive_pause() * 1000)
            ready = selector.select(max(0.0, due - time.monotonic()))
            if any(key.fd == self._wake for key, _ in ready):
                os.eventfd_read(self._wake)
            self._receive()
            self._probe_peers()
            message = self._loss_from_rank_0
            now = time.monotonic()
            if message is None and now >= due:
                due = now + self._send_beat(now)
                message = self._loss(now)
            if message is not None and self._parting is None:
                self._end_run(message)
                return

    def _end_run(self, message: str) -> None:
        """Report the loss, and end this process."""
        reporting = threading.Thread(target=self._report, args=(message,), daemon=True)
        reporting.start()
        reporting.join(_REPORT_SECONDS)
        if self._is_first:  # which alone can reach the others
            self._send_from_rank_0(Kind.LOST, message)
        self.end()

    def _report(self, message: str) -> None:
        if self._loss_from_rank_0 is None:  # otherwise rank 0 prints it
            say_on_stderr(f"dist-train: {escaped(message)} [{RankLostError.code}]")
        self.on_loss(message)
        sys.stdout.flush()
        sys.stderr.flush()

    def _receive_pause(self) -> float:
        """Return the seconds to wait before receiving again: none until the ranks have found each other."""
        have_met = len(self._peers) == self.comm.size - 1 if self._is_first else self._path is not None
        return _RECEIVE_PAUSE_SECONDS if have_met else 0.0

    def _send_beat(self, now: float) -> float:
        """Send a beat to rank 0, and return the seconds until the next one."""
        if self._is_first:
            return self._beat
        self._send_to_rank_0(Kind.BEAT, now)
        return _SEARCH_SECONDS if self._path is None else self._beat

    def _loss(self, now: float) -> str | None:
        with self._changed:
            silent = self._monitor.silent(now)
            past_deadline = self._monitor.past_deadline(now)
        if silent:
            return loss_message(silent, self._peers, self.timeout)
        if past_deadline is not None:
            return deadline_message(past_deadline, self._peers, self.timeout)
        return None

    def _send_to_rank_0(self, kind: Kind, now: float) -> None:
        """Send to the address where rank 0 has answered, or else to all its addresses."""
        searching = self._is_searching(now)
        for number, path in enumerate(self.paths):
            if searching or number == self._path:
                self._send(Datagram(kind, self.comm.rank, number, self._node_and_process), path)

    def _send_from_rank_0(self, kind: Kind, text: str = "") -> None:
        """Send to all other ranks that are present."""
        for rank in self._monitor.present:
            self._send(Datagram(kind, 0, text=text), self._addresses[rank])

    def _probe_peers(self) -> None:
        if not self._is_probing:
            return
        self._is_probing = False
        if self._is_first:
            self._send_from_rank_0(Kind.CALL, self._node_and_process)
        else:
            self._send_to_rank_0(Kind.BEAT, time.monotonic())

    def _receive(self) -> None:
        with self._changed:
            while True:
                try:
                    data, source = self.datagrams.recvfrom(LARGEST)
                except BlockingIOError:
                    break
                datagram = decode(self.token, data)
                if datagram is not None and datagram.rank < self.comm.size:
                    self._handle(datagram, source[:2])
            self._changed.notify_all()

    def _handle(self, datagram: Datagram, source: Address) -> None:
        now, rank, kind = time.monotonic(), datagram.rank, datagram.kind
        if self._is_first == (rank == 0):
            return  # rank 0 hears the others, the others hear rank 0
        match kind:
            case Kind.BEAT:
                self._hear(datagram, now)
                self._addresses[rank] = source
                self._send(Datagram(Kind.ANSWER, 0, datagram.path, self._node_and_process), source)
            case Kind.ANSWER:
                if self._is_searching(now) and datagram.path < len(self.paths):
                    self._path = datagram.path
                self._answered_at = now
                self._hear(datagram, now)
            case Kind.CALL:
                self._hear(datagram, now)
                self._send_to_rank_0(Kind.BEAT, now)
            case Kind.LEAVE | Kind.FAIL:
                if kind is Kind.FAIL and rank in self._peers:
                    self._monitor.fail(rank, now)
                else:
                    self._monitor.leave(rank)
                self._send(Datagram(Kind.FAREWELL, self.comm.rank), source)
            case Kind.FAREWELL:
                self._monitor.leave(rank)
            case Kind.LOST:
                self._loss_from_rank_0 = datagram.text

    def _is_searching(self, now: float) -> bool:
        return self._path is None or now - self._answered_at > _SEARCH_AGAIN * self._beat

    def _hear(self, datagram: Datagram, now: float) -> None:
        self._monitor.hear(datagram.rank, now)
        node, _, process = datagram.text.rpartition(" ")
        self._peers[datagram.rank] = f"{node}, process {process}"

    def _announce_leave(self, parting: Kind, selector: selectors.BaseSelector) -> None:
        """Announce that this rank leaves, until all others have acknowledged it or cannot be reached."""
        selector.unregister(self._wake)
        for _ in range(_FAREWELLS):
            if self._is_first:
                self._send_from_rank_0(parting)
            else:
                self._send_to_rank_0(parting, time.monotonic())
            if not self._monitor.present:
                return
            until = time.monotonic() + _FAREWELL_SECONDS
            while self._monitor.present and (left := until - time.monotonic()) > 0:
                selector.select(left)
                self._receive()

    def _send(self, datagram: Datagram, address: Address) -> None:
        with suppress(OSError):  # the same as a datagram lost on the way: the next beat or the timeout decides
            self.datagrams.sendto(encode(self.token, datagram), address)


def start_watchdog(
    comm: Communicator,
    *,
    timeout: float,
    on_loss: Callable[[str], None] = lambda message: None,
    end: Callable[[], None] = end_process,
) -> Watchdog | None:
    """Make all ranks watch each other; every rank must call it. None for a single rank, and in an elastic launch.

    When a rank is silent for `timeout` seconds, the others report it, then call `on_loss(message)` and `end()`, in a
    thread. Ranks that datagrams do not reach are not watched; a warning names them.
    """
    if comm.size == 1 or comm.is_elastic:  # the coordinator of an elastic launch watches its ranks itself
        return None
    datagrams = open_datagrams()
    own_place = json.dumps([secrets.token_hex(TOKEN_BYTES), datagrams.getsockname()[1], own_addresses()])
    token, port, addresses = json.loads(broadcast_str(comm, own_place, "watchdog.address"))
    paths = [(reachable_from(datagrams, address), port) for address in addresses]
    watchdog = Watchdog(comm, bytes.fromhex(token), paths, datagrams, timeout, on_loss, end)
    try:
        met = watchdog.await_answer(min(_MEETING_SECONDS, timeout / 2))
        unmet = [rank for rank, missed in enumerate(gather_int(comm, not met, "watchdog.met")) if missed]
    except BaseException as error:
        watchdog.close(error)
        raise
    if unmet and comm.rank == 0:
        _logger.warning(
            "no datagrams (UDP) get through between rank 0 and rank %s: nobody will notice when these hang",
            ", ".join(map(str, unmet)),
        )
    return watchdog
