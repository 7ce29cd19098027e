"""Who has been heard lately, and who is missing. Times are seconds of one monotonic clock."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

_PAUSE = 2.0
"""Beats between two looks, from which on the watcher itself has slept."""
_STREAK = 2.0
"""Beats that others may be short of `timeout` when they are named with the first that is lost."""
_MOST_NAMES = 8


@dataclass(frozen=True)
class Peer:
    """Where a rank runs."""

    node: str
    process: str


class Attendance:
    """The other ranks that one rank watches. A rank is watched from the first time that it is heard."""

    def __init__(self, *, timeout: float, beat: float, now: float) -> None:
        """Begin at `now`; who is silent for `timeout` is lost. `silent` is to be asked once a `beat`, at least."""
        self._timeout = timeout
        self._beat = beat
        self._looked = now
        self._heard: dict[int, float] = {}
        self._left: set[int] = set()
        self._failed: tuple[int, float] | None = None

    def hear(self, rank: int, now: float) -> None:
        """Take note that `rank` lives. Late words of one that has left do not bring it back."""
        if rank not in self._left:
            self._heard[rank] = now

    def leave(self, rank: int) -> None:
        """Take note that `rank` has left, and is not to be missed."""
        self._left.add(rank)
        self._heard.pop(rank, None)

    def fail(self, rank: int, now: float) -> None:
        """Take note that `rank` has left by an error, so that all must end within `timeout`."""
        self.leave(rank)
        if self._failed is None:
            self._failed = (rank, now)

    @property
    def present(self) -> list[int]:
        """The ranks that are watched."""
        return sorted(self._heard)

    def unheard_since(self, moment: float) -> list[int]:
        """Return those that have said nothing since `moment`."""
        return sorted(rank for rank, heard in self._heard.items() if heard < moment)

    def silent(self, now: float) -> list[int]:
        """Return those that are lost; nobody right after the watcher has slept: all get `timeout` anew.

        A node that dies takes several ranks: once one is lost, those that have been silent for nearly as
        long are named with it.
        """
        slept = now - self._looked > _PAUSE * self._beat
        self._looked = now
        if slept:
            self._heard = dict.fromkeys(self._heard, now)
            if self._failed is not None:
                self._failed = (self._failed[0], now)
            return []
        if not any(now - heard >= self._timeout for heard in self._heard.values()):
            return []
        return self.unheard_since(now - self._timeout + _STREAK * self._beat)

    def overstayed(self, now: float) -> int | None:
        """Return the rank whose error should have ended this one by now."""
        if self._failed is None or now - self._failed[1] < self._timeout:
            return None
        return self._failed[0]


def name_ranks(ranks: list[int], peers: Mapping[int, Peer]) -> str:
    """Return "rank 3 (node2, process 4242)", for several likewise; of very many the first, and how many more."""
    named = [f"{rank} ({peers[rank].node}, process {peers[rank].process})" for rank in ranks[:_MOST_NAMES]]
    more = len(ranks) - len(named)
    ending = f" and {more} more" if more else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(named)}{ending}"


def loss_message(ranks: list[int], peers: Mapping[int, Peer], timeout: float) -> str:
    """Return what the user is told when `ranks` are lost."""
    verb = "have" if len(ranks) > 1 else "has"
    return f"{name_ranks(ranks, peers)} {verb} not answered for {timeout:g} s; {_FIX}"


def overstay_message(rank: int, peers: Mapping[int, Peer], timeout: float) -> str:
    """Return what the user is told when a rank still runs `timeout` after `rank` has failed."""
    return f"{name_ranks([rank], peers)} has failed, and the others have not ended within {timeout:g} s; {_FIX}"


_FIX = "the run ends; start the same command again to resume from the last checkpoint"
