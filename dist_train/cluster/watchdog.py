"""Ends the run with a message when a rank dies, hangs or is cut off: the others would wait for it for ever.

Every rank sends heartbeats to rank 0, which answers them. A rank that is silent for `timeout` is lost. A thread then
ends the process, since the main thread may be inside an allreduce that never returns; the launcher ends the rest.

A heartbeat needs the GIL, so a rank that holds it for `timeout` without a pause counts as lost. Compiling and loading
libraries can hold it for seconds: use 10 s or more.
"""

from __future__ import annotations

import logging
import math
import os
import secrets
import select
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from dist_train.cluster.communicator import Communicator, RankLostError, broadcast_value, gather_int
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
    interval_of,
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
        self._is_rank_0 = self.comm.rank == 0  # all others send it heartbeats
        self._beat = min(_LONGEST_BEAT, self.timeout / BEATS_IN_TIMEOUT)
        self._monitor = HeartbeatMonitor(timeout=self.timeout, beat=self._beat, now=time.monotonic())
        self._peers: dict[int, str] = {}
        self._addresses: dict[int, Address] = {}
        self._path: int | None = None
        self._answered_at = 0.0
        self._loss_from_rank_0: str | None = None
        self._parting: Kind | None = None
        self._is_probe_due = False
        self._probed_since: float | None = None  # while `absent` waits for those unheard since then
        self._changed = threading.Condition()
        self._node_and_process = f"{socket.gethostname()} {os.getpid()}"
        self._wake = os.eventfd(0)
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._thread.start()

    def await_answer(self, seconds: float) -> bool:
        """Return whether rank 0 and this rank have found each other."""
        if self._is_rank_0:
            return True
        with self._changed:
            return self._changed.wait_for(lambda: self._path is not None, seconds)

    def absent(self, seconds: float = 1.0) -> str:
        """Return the ranks that do not answer within `seconds`, as "rank 3 (node2, process 4242)"; empty if all do.

        For use after a collective has failed: its error does not say which rank is gone. Rank 0 probes all others,
        which probe rank 0. All do so at once, and rank 0's buffer may hold but a part: they try again, not at once.
        """
        if self._parting is not None:
            return ""
        pause = _SEARCH_SECONDS * self._stagger
        with self._changed:
            self._receive()  # what has arrived, maybe from a rank that has died since, is no answer
            self._probed_since = moment = time.monotonic()
            while missing := self._monitor.unheard_since(moment):
                left = moment + seconds - time.monotonic()
                if left <= 0:
                    break
                self._is_probe_due = True
                os.eventfd_write(self._wake, 1)
                self._changed.wait_for(lambda: not self._monitor.unheard_since(moment), min(left, pause))
            self._probed_since = None
            return name_ranks(missing, self._peers) if missing else ""

    @property
    def hears_rank_0(self) -> bool:
        """Whether this is another rank than 0, which has answered and has not left."""
        with self._changed:
            return not self._is_rank_0 and 0 in self._monitor.present

    def close(self, error: BaseException | None = None) -> None:
        """Leave by LEAVE, or by FAIL where `error` is not a stop on request, and end the thread."""
        if self._parting is not None:
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
        self._watch()
        if self._parting is not None:
            self._announce_leave(self._parting)

    def _watch(self) -> None:
        due = time.monotonic()
        interval = interval_of(self.comm.rank, self.comm.size, self._beat)
        awakening, arrival = select.poll(), select.poll()
        awakening.register(self._wake, select.POLLIN)
        arrival.register(self._wake, select.POLLIN)
        arrival.register(self.datagrams, select.POLLIN)
        while self._parting is None:
            awakening.poll(_RECEIVE_PAUSE_SECONDS * 1000 if self._may_pause else 0)
            ready = arrival.poll(max(0.0, due - time.monotonic()) * 1000)
            if any(descriptor == self._wake for descriptor, _ in ready):
                os.eventfd_read(self._wake)
            self._receive()
            if self._is_probe_due:
                self._is_probe_due = False
                self._send_to_peers(Kind.CALL if self._is_rank_0 else Kind.BEAT, since=self._probed_since)
            message = self._loss_from_rank_0
            now = time.monotonic()
            if message is None and now >= due:
                due = now + (interval if self._have_met else _SEARCH_SECONDS)
                if not self._is_rank_0:
                    self._send_to_peers(Kind.BEAT)
                message = self._loss(now)
            if message is not None and self._parting is None:
                self._end_run(message)
                return

    def _end_run(self, message: str) -> None:
        """Report the loss, and end this process."""
        reporting = threading.Thread(target=self._report, args=(message,), daemon=True)
        reporting.start()
        reporting.join(_REPORT_SECONDS)
        if self._is_rank_0:  # which alone can reach the others
            self._send_to_peers(Kind.LOST, message)
        self.end()

    def _report(self, message: str) -> None:
        if self._loss_from_rank_0 is None:  # otherwise rank 0 prints it
            say_on_stderr(f"dist-train: {escaped(message)} [{RankLostError.code}]")
        self.on_loss(message)
        sys.stdout.flush()
        sys.stderr.flush()

    @property
    def _have_met(self) -> bool:
        """Whether rank 0 and this rank, or all others, have found each other."""
        return len(self._peers) == self.comm.size - 1 if self._is_rank_0 else self._path is not None

    @property
    def _may_pause(self) -> bool:
        """Whether only beats are to be expected, which do not come all at once."""
        return self._have_met and self._probed_since is None and not self._monitor.has_any_left

    @property
    def _stagger(self) -> float:
        """A factor on pauses, 1 to 2, so that what ranks have sent at once they do not send again at once."""
        return 1.0 + self.comm.rank / self.comm.size

    def _loss(self, now: float) -> str | None:
        with self._changed:
            silent = self._monitor.silent(now)
            past_deadline = self._monitor.past_deadline(now)
        if silent:
            return loss_message(silent, self._peers, self.timeout)
        if past_deadline is not None:
            return deadline_message(past_deadline, self._peers, self.timeout)
        return None

    def _send_to_peers(self, kind: Kind, text: str | None = None, since: float | None = None) -> None:
        """Send `text` (None: this node and process) from rank 0 to all others that are present, or to rank 0.

        To rank 0 at the address where it has answered, or else at all its addresses. `since`: rank 0 sends only to
        those not heard since then.
        """
        text = self._node_and_process if text is None else text
        if self._is_rank_0:
            for rank in self._monitor.unheard_since(math.inf if since is None else since):
                self._send(Datagram(kind, 0, text=text), self._addresses[rank])
            return
        searching = self._is_searching(time.monotonic())
        for number, path in enumerate(self.paths):
            if searching or number == self._path:
                self._send(Datagram(kind, self.comm.rank, number, text), path)

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
        if self._is_rank_0 == (rank == 0):
            return  # rank 0 hears the others, the others hear rank 0
        match kind:
            case Kind.BEAT:
                self._hear(datagram, now)
                self._addresses[rank] = source
                self._send(Datagram(Kind.ANSWER, 0, datagram.path, self._node_and_process), source)
            case Kind.ANSWER:
                if self._is_searching(now):
                    self._path = datagram.path
                self._answered_at = now
                self._hear(datagram, now)
            case Kind.CALL:
                self._hear(datagram, now)
                self._send_to_peers(Kind.BEAT)
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

    def _announce_leave(self, parting: Kind) -> None:
        """Announce that this rank leaves, until all others have acknowledged it or cannot be reached."""
        arrival = select.poll()
        arrival.register(self.datagrams, select.POLLIN)
        for _ in range(_FAREWELLS):
            self._send_to_peers(parting)
            if not self._monitor.present:
                return
            until = time.monotonic() + _FAREWELL_SECONDS * self._stagger
            while self._monitor.present and (left := until - time.monotonic()) > 0:
                arrival.poll(left * 1000)
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
    own_place = [secrets.token_hex(TOKEN_BYTES), datagrams.getsockname()[1], own_addresses()]
    token, port, addresses = broadcast_value(comm, own_place, "watchdog.address")
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
