"""Ends the run with a message when a rank dies, hangs or is cut off: the others would wait for it for ever.

Rank 0 hears a beat of every other rank and answers it. Who is silent for `timeout` is lost. The process
ends from a thread, since the main one may be deep in an allreduce that never returns; the launcher ends the rest.

A beat needs Python's global lock, so a rank that holds it for `timeout` without pause counts as lost. Compiling
and loading libraries can hold it for seconds: 10 s and more are sensible.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import socket
import sys
import threading
from collections.abc import Callable
from types import TracebackType

from dist_train.cluster.addresses import open_datagrams, own_addresses, reachable_from
from dist_train.cluster.communicator import Communicator, broadcast_str, gather
from dist_train.cluster.heartbeats import TOKEN_BYTES, Kind
from dist_train.cluster.watch import Endpoint, Watch
from dist_train.outcome import ExitCode, UsageError, exit_code_of

SHORTEST_TIMEOUT = 3.0
"""Seconds; a busy machine can keep a healthy process waiting for longer than less."""

_MEETING_SECONDS = 10.0
_TELLING_SECONDS = 5.0
"""For writing the message and the status, which can hang as well: a full pipe, a file system that is gone."""

_logger = logging.getLogger("dist_train.cluster")


class Watchdog:
    """Watches from its making to `close`; for a group of one it does nothing. Also a context manager."""

    def __init__(self, watch: Watch | None) -> None:
        self._watch = watch
        self._process = os.getpid()

    def absent(self, seconds: float = 1.0) -> str:
        """Return who does not answer within `seconds`, as "rank 3 (node2, process 4242)", or nothing.

        For a rank whose collective has failed: the error does not say who is gone.
        """
        return self._watch.absent(seconds) if self._watch else ""

    def close(self, error: BaseException | None = None) -> None:
        """Take leave, so that nobody misses this rank; a second call does nothing.

        After an `error` of one rank the others must end within `timeout` too.
        """
        watch, self._watch = self._watch, None
        # a forked child has the object, but neither the thread nor a place among the ranks
        if watch is not None and os.getpid() == self._process:
            fails = error is not None and exit_code_of(error) != ExitCode.STOPPED
            watch.close(Kind.FAIL if fails else Kind.LEAVE)

    def __enter__(self) -> Watchdog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close(error)


def end_process() -> None:
    """End this process at once, with exit code 1."""
    os._exit(ExitCode.FAULT)


def start_watchdog(
    comm: Communicator, *, timeout: float, on_loss: Callable[[str], None], end: Callable[[], None] = end_process
) -> Watchdog:
    """Let all ranks watch each other; every rank must call it.

    When one is silent for `timeout` seconds, the others say so, call `on_loss(message)` and `end()`, in a thread.
    Ranks that datagrams do not get through to are not watched; a warning names them.

    Raises:
        UsageError: `timeout` is too short to tell a slow rank from a lost one; on all ranks.
    """
    if comm.size == 1:
        return Watchdog(None)
    if timeout < SHORTEST_TIMEOUT:
        raise UsageError(
            f"comm.timeout={timeout:g} is too short to tell a slow rank from a lost one: "
            f"set {SHORTEST_TIMEOUT:g} or more, or keep the 60 s"
        )
    datagrams = open_datagrams()
    endpoint = _endpoint(comm, datagrams)

    def lost(message: str, is_found: bool) -> None:
        _within(_TELLING_SECONDS, lambda: _tell(message, is_found, on_loss))
        watch.tell_others(message)
        end()

    watch = Watch(endpoint, datagrams, timeout, lost)
    met = watch.await_answer(min(_MEETING_SECONDS, timeout / 2))
    unmet = [rank for rank, (missed,) in enumerate(gather(comm, [not met], "watchdog.met")) if missed]
    if unmet and comm.rank == 0:
        _logger.warning(
            "no datagrams (UDP) get through between rank 0 and rank %s: nobody will notice when these hang",
            ", ".join(map(str, unmet)),
        )
    return Watchdog(watch)


def _endpoint(comm: Communicator, datagrams: socket.socket) -> Endpoint:
    """Return this rank's place, with the token and the addresses that rank 0 chooses."""
    port = datagrams.getsockname()[1]
    text = json.dumps([secrets.token_hex(TOKEN_BYTES), port, own_addresses()])
    token, port, addresses = json.loads(broadcast_str(comm, text, "watchdog.address"))
    reachable = (reachable_from(datagrams, address) for address in addresses)
    paths = tuple(None if address is None else (address, port) for address in reachable)
    return Endpoint(bytes.fromhex(token), comm.rank, comm.size, paths)


def _tell(message: str, is_found: bool, on_loss: Callable[[str], None]) -> None:
    if is_found:  # else rank 0 has said it, for all
        print(f"dist-train: {message}", file=sys.stderr)
    on_loss(message)
    sys.stdout.flush()
    sys.stderr.flush()


def _within(seconds: float, action: Callable[[], None]) -> None:
    """Do `action`, and wait no longer than `seconds` for it."""
    thread = threading.Thread(target=action, name="watchdog-tells", daemon=True)
    thread.start()
    thread.join(seconds)
