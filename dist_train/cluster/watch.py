"""The thread that beats for one rank and listens to the others."""

from __future__ import annotations

import os
import select
import selectors
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from dist_train.cluster.addresses import Address
from dist_train.cluster.attendance import Attendance, Peer, loss_message, name_ranks, overstay_message
from dist_train.cluster.heartbeats import LARGEST, Datagram, Kind, decode, encode

_BEATS_IN_TIMEOUT = 6
_LONGEST_BEAT = 5.0
_SEARCH_SECONDS = 0.2
"""Between beats until rank 0 has answered."""
_LOST_SIGHT = 2.5
"""Beats without an answer, after which all addresses of rank 0 are tried again."""
_REST_SECONDS = 0.1
"""After taking what has come, so that very many ranks do not wake rank 0 for each of their beats."""
_FAREWELLS = 3
_FAREWELL_SECONDS = 0.2


@dataclass(frozen=True)
class Endpoint:
    """A rank's place among the `size` of a launch; `paths` are rank 0's addresses as this rank may use them."""

    token: bytes
    rank: int
    size: int
    paths: tuple[Address | None, ...] = ()

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, whom all others beat to."""
        return self.rank == 0


class Watch:
    """Beats, and calls `lost(message, is_found)` in its own thread when a rank is lost, then ends.

    `is_found` is false where rank 0 has told this one.
    """

    def __init__(
        self, endpoint: Endpoint, datagrams: socket.socket, timeout: float, lost: Callable[[str, bool], None]
    ) -> None:
        """Start; the socket is this object's from now on. `timeout` is in seconds."""
        self._endpoint = endpoint
        self._datagrams = datagrams
        self._timeout = timeout
        self._beat = min(_LONGEST_BEAT, timeout / _BEATS_IN_TIMEOUT)
        self._lost = lost
        self._attendance = Attendance(timeout=timeout, beat=self._beat, now=time.monotonic())
        self._places: dict[int, Peer] = {}
        self._addresses: dict[int, Address] = {}
        self._path: int | None = None
        self._answered = 0.0
        self._told: str | None = None
        self._parting: Kind | None = None
        self._is_calling = False
        self._changed = threading.Condition()
        self._place = f"{socket.gethostname()} {os.getpid()}"
        self._wake = os.eventfd(0)
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._thread.start()

    def await_answer(self, seconds: float) -> bool:
        """Return whether rank 0 and this rank have found each other."""
        if self._endpoint.is_first:
            return True
        with self._changed:
            return self._changed.wait_for(lambda: self._path is not None, seconds)

    def absent(self, seconds: float) -> str:
        """Call the roll, for so long at most: return who does not answer, as a user may be told; else nothing.

        Rank 0 calls all, the others call rank 0.
        """
        moment = time.monotonic()
        with self._changed:
            self._is_calling = True
            os.eventfd_write(self._wake, 1)
            self._changed.wait_for(lambda: not self._attendance.unheard_since(moment), seconds)
            missing = self._attendance.unheard_since(moment)
            return name_ranks(missing, self._places) if missing else ""

    def close(self, parting: Kind) -> None:
        """Take leave of the others, and end."""
        self._parting = parting
        os.eventfd_write(self._wake, 1)
        self._thread.join()
        self._datagrams.close()
        os.close(self._wake)

    def tell_others(self, message: str) -> None:
        """Let all others end with `message`; only rank 0 knows how to reach them. For the thread in `lost`."""
        if self._endpoint.is_first:
            for rank in self._attendance.present:
                self._send(Datagram(Kind.LOST, 0, text=message), self._addresses[rank])

    def _run(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._datagrams, selectors.EVENT_READ)
            selector.register(self._wake, selectors.EVENT_READ)
            self._watch(selector)
            if self._parting is not None:
                self._take_leave(self._parting, selector)

    def _watch(self, selector: selectors.BaseSelector) -> None:
        due = time.monotonic()
        awakening = select.poll()
        awakening.register(self._wake, select.POLLIN)
        while self._parting is None:
            awakening.poll(self._rest() * 1000)
            ready = selector.select(max(0.0, due - time.monotonic()))
            if any(key.fd == self._wake for key, _ in ready):
                os.eventfd_read(self._wake)
            self._receive()
            self._answer_calls()
            message, is_found = self._told, False
            now = time.monotonic()
            if message is None and now >= due:
                due = now + self._tick(now)
                message, is_found = self._loss(now), True
            if message is not None and self._parting is None:
                self._lost(message, is_found)
                return

    def _rest(self) -> float:
        """Return the seconds for which to let lie what comes: none while ranks wait to be met."""
        have_met = len(self._places) == self._endpoint.size - 1 if self._endpoint.is_first else self._path is not None
        return _REST_SECONDS if have_met else 0.0

    def _tick(self, now: float) -> float:
        """Beat, and return the seconds to the next."""
        if self._endpoint.is_first:
            return self._beat
        self._send_up(Kind.BEAT, now)
        return _SEARCH_SECONDS if self._path is None else self._beat

    def _loss(self, now: float) -> str | None:
        with self._changed:
            silent = self._attendance.silent(now)
            overstayed = self._attendance.overstayed(now)
        if silent:
            return loss_message(silent, self._places, self._timeout)
        if overstayed is not None:
            return overstay_message(overstayed, self._places, self._timeout)
        return None

    def _send_up(self, kind: Kind, now: float) -> None:
        """Send to rank 0: where it has answered, else to all its addresses."""
        searching = self._is_searching(now)
        for number, path in enumerate(self._endpoint.paths):
            if path is not None and (searching or number == self._path):
                self._send(Datagram(kind, self._endpoint.rank, number, self._place), path)

    def _answer_calls(self) -> None:
        if not self._is_calling:
            return
        self._is_calling = False
        if not self._endpoint.is_first:
            self._send_up(Kind.BEAT, time.monotonic())
            return
        for rank in self._attendance.present:
            self._send(Datagram(Kind.CALL, 0, text=self._place), self._addresses[rank])

    def _receive(self) -> None:
        """Take all that has come."""
        with self._changed:
            while True:
                try:
                    data, source = self._datagrams.recvfrom(LARGEST)
                except BlockingIOError:
                    break
                datagram = decode(self._endpoint.token, data)
                if datagram is not None and datagram.rank < self._endpoint.size:
                    self._take(datagram, source[:2])
            self._changed.notify_all()

    def _take(self, datagram: Datagram, source: Address) -> None:
        now, rank, kind = time.monotonic(), datagram.rank, datagram.kind
        if self._endpoint.is_first == (rank == 0):
            return  # rank 0 hears the others, the others hear rank 0
        match kind:
            case Kind.BEAT:
                self._hear(datagram, now)
                self._addresses[rank] = source
                self._send(Datagram(Kind.ANSWER, 0, datagram.path, self._place), source)
            case Kind.ANSWER:
                if self._is_searching(now) and datagram.path < len(self._endpoint.paths):
                    self._path = datagram.path
                self._answered = now
                self._hear(datagram, now)
            case Kind.CALL:
                self._hear(datagram, now)
                self._send_up(Kind.BEAT, now)
            case Kind.LEAVE | Kind.FAIL:
                if kind is Kind.FAIL and rank in self._places:
                    self._attendance.fail(rank, now)
                self._attendance.leave(rank)
                self._send(Datagram(Kind.FAREWELL, self._endpoint.rank), source)
            case Kind.FAREWELL:
                self._attendance.leave(rank)
            case Kind.LOST:
                self._told = datagram.text

    def _is_searching(self, now: float) -> bool:
        return self._path is None or now - self._answered > _LOST_SIGHT * self._beat

    def _hear(self, datagram: Datagram, now: float) -> None:
        self._attendance.hear(datagram.rank, now)
        node, _, process = datagram.text.rpartition(" ")
        self._places[datagram.rank] = Peer(node, process)

    def _take_leave(self, parting: Kind, selector: selectors.BaseSelector) -> None:
        """Say goodbye until all have heard it, or cannot be reached."""
        selector.unregister(self._wake)
        for _ in range(_FAREWELLS):
            if not self._endpoint.is_first:
                self._send_up(parting, time.monotonic())
            for rank in self._attendance.present if self._endpoint.is_first else ():
                self._send(Datagram(parting, 0), self._addresses[rank])
            if not self._attendance.present:
                return
            until = time.monotonic() + _FAREWELL_SECONDS
            while self._attendance.present and (left := until - time.monotonic()) > 0:
                selector.select(left)
                self._receive()

    def _send(self, datagram: Datagram, address: Address) -> None:
        with suppress(OSError):  # as good as lost on the way: the next beat, or the silence, tells
            self._datagrams.sendto(encode(self._endpoint.token, datagram), address)
