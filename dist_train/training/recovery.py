"""How the ranks of an elastic launch continue once they have met anew: who has the newest state, and what is redone.

An update is a pure function of the state, and a rank that was lost took nothing with it that others lack: those that
are left drop the update under way, take the state of the last one that any of them has made, and continue.
docs/recovery.md says why nothing else can happen.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace

from dist_train.checkpoint.state import Progress
from dist_train.cluster.communicator import (
    Communicator,
    Generation,
    GroupBrokenError,
    MeetingRequestedError,
    broadcast_str,
    gather,
)
from dist_train.outcome import FaultError, UsageError
from dist_train.rundir.records import Detail, EvaluationRecord, EventRecord, Record, TrainRecord
from dist_train.training.step import Update

_IDENTITY = ("code", "settings", "data")


@dataclass(frozen=True)
class Standing:
    """How far a rank is: `step` updates are made. `is_settled`: what is due after the last one is done as well.

    `has_state` is false for a rank that joins. `leads`: it writes what rank 0 writes. `identity`: digests of its code,
    settings and data.
    """

    has_state: bool
    step: int
    is_settled: bool
    leads: bool
    identity: tuple[int, ...] = ()

    def row(self) -> list[int]:
        """Return it as numbers that ranks can gather."""
        return [self.has_state, self.step, self.is_settled, self.leads, *self.identity]


@dataclass(frozen=True)
class Agreement:
    """Whose state all continue from, who takes it, and whether what is due after the last update is done again."""

    source: int
    takers: tuple[int, ...]
    is_settled: bool


def agree(standings: Sequence[Standing]) -> Agreement:
    """Return how ranks that stand so, by rank, continue; the same on all.

    Raises:
        FaultError: nobody has a state.
    """
    steps = [standing.step for standing in standings if standing.has_state]
    if not steps:
        raise FaultError("no rank is left that holds the state of the run", code="rank-lost")
    newest = [rank for rank, each in enumerate(standings) if each.has_state and each.step == max(steps)]
    takers = tuple(rank for rank in range(len(standings)) if rank not in newest)
    # What a lost rank 0 was about to write, the next one writes.
    is_settled = standings[0].leads and all(standings[rank].is_settled for rank in newest)
    return Agreement(newest[0], takers, is_settled)


def agree_with_others(comm: Communicator, mine: Standing) -> Agreement:
    """Return how all ranks continue, of which this one stands as `mine` says. All ranks call it.

    Raises:
        UsageError: this rank joins, and runs other code, settings or data than the others.
    """
    rows = gather(comm, mine.row(), "standings")
    standings = [Standing(bool(row[0]), row[1], bool(row[2]), bool(row[3]), tuple(row[4:])) for row in rows]
    agreement = agree(standings)
    if not mine.has_state:
        check_identity(mine, standings[agreement.source])
    return agreement


def check_identity(mine: Standing, theirs: Standing) -> None:
    """Raise UsageError where this rank's code, settings or data are not those of the ranks that it joins."""
    pairs = zip(_IDENTITY, mine.identity, theirs.identity, strict=True)
    differing = [name for name, own, other in pairs if own != other]
    if differing:
        raise UsageError(
            f"this rank cannot join the others: its {' and '.join(differing)} differ from theirs. "
            f"Install the same code, give the same settings and the same files on all nodes",
            code=f"ranks-differ-in-{differing[0]}",
        )


@dataclass(frozen=True)
class LastUpdate:
    """What the newest update was; `progress` as it was right after it, before what is due then."""

    loss: float
    accuracy: float
    gradient_norm: float
    stop_requested: bool
    repeats: int
    seconds: float
    progress: Progress

    @staticmethod
    def of(update: Update, seconds: float, progress: Progress) -> LastUpdate:
        """Return what is kept of `update`, just made in so many seconds."""
        values = update.loss, update.accuracy, update.gradient_norm, update.stop_requested, update.repeats
        return LastUpdate(*values, seconds, replace(progress))


@dataclass(frozen=True)
class SharedState:
    """What continues on all ranks beside tensors."""

    progress: Progress
    micro_size: int
    last: LastUpdate | None


def share(comm: Communicator, mine: SharedState, root: int) -> SharedState:
    """Return that of rank `root`."""
    content = json.loads(broadcast_str(comm, json.dumps(asdict(mine)), "shared state", root))
    last = content["last"]
    if last is not None:
        last = LastUpdate(**{**last, "progress": Progress(**last["progress"])})
    return SharedState(Progress(**content["progress"]), content["micro_size"], last)


class Interruption:
    """What a rank is recovering from, until the first update after it is made; over several generations, if need be."""

    def __init__(self) -> None:
        self.why = ""
        """What broke the last generation, as this rank saw it; empty where nothing did."""
        self._clear()

    def _clear(self) -> None:
        self._since: float | None = None
        self._redone = 0
        self._lost: tuple[str, ...] = ()
        self._joined: tuple[str, ...] = ()
        self._report = ""

    def note(self, error: GroupBrokenError, *, is_redone: bool) -> None:
        """Begin, by `error`; `is_redone`: an update was under way."""
        self.why = "" if isinstance(error, MeetingRequestedError) else str(error)
        if self._since is None:
            self._since = time.monotonic()
            self._redone = int(is_redone and bool(self.why))

    def end_by(self, generation: Generation) -> None:
        """Take note of whom `generation` has lost and won."""
        self._lost += generation.lost
        self._joined += generation.joined
        self._report = self._report or generation.report

    def events(self, comm: Communicator) -> Iterator[tuple[str, dict[str, Detail]]]:
        """End, and yield the events that say so, with their details, now that the first update of `comm` is made."""
        if self._since is None:  # a rank that has just joined
            self._clear()
            return
        common: dict[str, Detail] = {
            "generation": comm.generation,
            "ranks": comm.size,
            "seconds": round(time.monotonic() - self._since, 4),
            "redone": self._redone,
        }
        lost, joined, report = self._lost, self._joined, self._report
        self._clear()
        if lost:
            yield "rank_lost", {"who": "; ".join(lost), **common}
        if joined:
            yield "rank_joined", {"who": "; ".join(joined), **common}
        if not lost and not joined:
            yield "regrouped", {"why": report, **common}


def put_back(progress: Progress, before: Progress) -> None:
    """Make `progress`, which others hold as well, what it was `before`."""
    for each in fields(progress):
        setattr(progress, each.name, getattr(before, each.name))


MOST_RECORDS = 10_000
"""Kept for a rank that takes over: far more than there are between two checkpoints."""


class RecentRecords:
    """What was recorded since the checkpoint before the last one: what a rank that takes over rank 0's place may have
    to write once more. And each record of an update or evaluation counts once, also where it is made again.
    """

    def __init__(self, limit: int) -> None:
        """Keep at most `limit`; 0 keeps nothing, and knows nothing again."""
        self._kept: deque[tuple[int, Record]] = deque(maxlen=limit)
        self._checkpoints = (-1, -1)

    def add(self, record: Record) -> bool:
        """Keep `record`; return whether it is new."""
        is_new = isinstance(record, EventRecord) or all(
            _key(record) != _key(other) for _, other in self._of(record.step)
        )
        if is_new:
            self._kept.append((record.step, record))
        return is_new

    def saved(self, step: int) -> None:
        """Take note that a checkpoint of `step` is being written: what belongs to the one before it is on disk."""
        if step == self._checkpoints[1]:
            return
        self._checkpoints = (self._checkpoints[1], step)
        while self._kept and self._kept[0][0] <= self._checkpoints[0]:
            self._kept.popleft()

    def all(self) -> list[Record]:
        """Return what is kept, in order."""
        return [record for _, record in self._kept]

    def _of(self, step: int) -> list[tuple[int, Record]]:
        found = []
        for entry in reversed(self._kept):
            if entry[0] < step:
                break
            found.append(entry)
        return found


def _key(record: Record) -> tuple[str, int, str]:
    match record:
        case TrainRecord():
            return "train", record.step, ""
        case EvaluationRecord():
            return "eval", record.step, record.split
        case EventRecord():
            return "event", record.step, record.event
