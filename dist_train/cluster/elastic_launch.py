"""Several ranks on this machine that may die, hang, be started anew and join: `dist-train launch --min-ranks`."""

from __future__ import annotations

import os
import secrets
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from subprocess import Popen

from dist_train.cluster.local_launch import STOP_SIGNALS, Ranks, rank_environment, say, start_rank
from dist_train.cluster.membership_server import MembershipServer
from dist_train.outcome import ExitCode

_POLL_SECONDS = 0.05
_FIRST_PAUSE_SECONDS = 0.5
_LONGEST_PAUSE_SECONDS = 30.0
"""Between the end of a rank and its next start; twice as long as the one before where that start came to nothing."""
_START_TIMEOUTS = 4
"""Timeouts within which a process that was started anew must have come; loading torch takes seconds."""
_ENDS_OF_A_RUN = (ExitCode.FINISHED, ExitCode.STOPPED, ExitCode.DIVERGED, ExitCode.DISAGREEMENT)
"""What all ranks agree on: who ends so is not missed. The first that some rank has is the launch's."""


@dataclass(frozen=True)
class Elasticity:
    """The run continues with `fewest` ranks or more; a rank that is lost is started anew up to `restarts` times.

    `timeout`: seconds of silence after which a rank is lost.
    """

    fewest: int
    restarts: int
    timeout: float


def launch_elastic(command: Sequence[str], size: int, elasticity: Elasticity) -> int:
    """Run `command` as `size` ranks on this machine to their end, and return the exit code of the run.

    As `launch_ranks`, but for a rank that is lost: the others continue without it, and it is started anew. Call it
    from a process without threads.

    Returns:
        How the ranks ended that brought the run to an end; where none did, as `launch_ranks`.
    """
    watched = STOP_SIGNALS | {signal.SIGCHLD}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, watched)
    environment = {"DIST_TRAIN_LAUNCH": secrets.token_hex(8), **os.environ}
    server = MembershipServer(size, elasticity.fewest, size, elasticity.timeout, say=say)

    def start(slot: int) -> Popen[bytes]:
        place = {"MASTER_PORT": "0", **server.variables(slot)}
        return start_rank(command, rank_environment(environment, slot, size, place), mask)

    ranks = _ElasticRanks(size, start, server, elasticity.restarts)
    try:
        return ranks.wait(watched)
    finally:
        ranks.kill()
        server.close()
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


class _ElasticRanks(Ranks):
    """The processes by slot; a slot has several one after the other."""

    def __init__(
        self, size: int, start: Callable[[int], Popen[bytes]], server: MembershipServer, restarts: int
    ) -> None:
        super().__init__([start(slot) for slot in range(size)])
        self._start = start
        self._server = server
        self._restarts = restarts
        self._started = [0] * size
        self._in_vain = [0] * size
        self._due: dict[int, float] = {}
        self._joining: dict[int, float] = {}
        """When those were started that are not ranks yet."""
        self._codes: list[int] = []

    def kill(self) -> None:
        """End whatever still runs."""
        for process in self._processes:
            process.kill()

    def _is_running(self) -> bool:
        return super()._is_running() or bool(self._due)

    def _await_signal(self, watched: set[signal.Signals]) -> signal.struct_siginfo | None:
        self._server.poll(_POLL_SECONDS)
        for expelled in self._server.take_expelled():
            if self._processes[expelled.slot].pid == expelled.process:
                self._processes[expelled.slot].kill()
        self._start_what_is_due()
        self._end_those_who_do_not_come()
        living = len(self._processes) - len(self._ended)
        self._server.expect_more(bool(self._due) or living > len(self._server.state.members))
        return signal.sigtimedwait(watched, 0)

    def _start_what_is_due(self) -> None:
        if self._asked_at is not None or self._has_ended:
            self._due.clear()
        for slot in [slot for slot, due in self._due.items() if time.monotonic() >= due]:
            del self._due[slot]
            self._processes[slot] = self._start(slot)
            self._ended.discard(slot)
            self._joining[slot] = time.monotonic()

    def _end_those_who_do_not_come(self) -> None:
        for member in self._server.state.members:
            self._joining.pop(member.slot, None)
            self._in_vain[member.slot] = 0
        come = {joiner.slot for joiner in self._server.state.joiners}  # whose silence is noticed
        latest = time.monotonic() - _START_TIMEOUTS * self._server.timeout
        for slot in [slot for slot, begun in self._joining.items() if begun < latest and slot not in come]:
            del self._joining[slot]
            self._processes[slot].kill()

    @property
    def _has_ended(self) -> bool:
        return self._server.state.has_ended or any(code in _ENDS_OF_A_RUN for code in self._codes)

    def _end_the_lost(self) -> None:
        """Nobody: who hangs is expelled."""

    def _note_end(self, rank: int, code: int) -> None:
        super()._note_end(rank, code)
        self._codes.append(code)
        self._joining.pop(rank, None)
        if self._has_ended:
            self._end_those_who_join()
        is_worthwhile = code != ExitCode.USAGE and self._server.state.has_state and not self._has_ended
        if is_worthwhile and self._started[rank] < self._restarts:
            pause = min(_LONGEST_PAUSE_SECONDS, _FIRST_PAUSE_SECONDS * 2 ** self._in_vain[rank])
            self._started[rank] += 1
            self._in_vain[rank] += 1
            self._due[rank] = time.monotonic() + pause

    def _end_those_who_join(self) -> None:
        for slot in self._joining:
            self._processes[slot].kill()

    def _code(self) -> int:
        agreed = (code for code in _ENDS_OF_A_RUN if code in self._codes)
        return next(agreed, super()._code())
