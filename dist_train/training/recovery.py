"""How the ranks of an elastic launch continue after they have formed a new group.

An update is a pure function of the state, so a lost rank takes nothing with it. The remaining ranks drop the update in
progress, take the newest state that any of them has, and continue. docs/recovery.md shows why no other case can occur.
"""

from __future__ import annotations

import json
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

from pydantic import TypeAdapter

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
from dist_train.rundir.records import Detail, Record, RecordKey, TrainRecord, from_json, record_key, to_json

_IDENTITY = ("code", "settings", "data", "observers")


@dataclass(frozen=True)
class RankState:
    """How far a rank has come: it has made `step` updates.

    `has_state` is false for a rank that joins. `is_step_complete`: the records, evaluation and checkpoint due after the
    last update are done. `is_writer`: the rank writes records and checkpoints, as rank 0 does. `identity`: digests of
    its code, settings and data, and whether observers or settings want measurements, which all ranks take part in.
    """

    has_state: bool
    step: int
    is_step_complete: bool
    is_writer: bool
    identity: tuple[int, ...] = ()

    def row(self) -> list[int]:
        """Return it as numbers that ranks can gather."""
        return [self.has_state, self.step, self.is_step_complete, self.is_writer, *self.identity]


@dataclass(frozen=True)
class Recovery:
    """Rank `source` sends its state to the ranks `receivers`; the work after its last update may be done again."""

    source: int
    receivers: tuple[int, ...]
    is_step_complete: bool


def plan_recovery(states: Sequence[RankState]) -> Recovery:
    """Return how ranks with these states, by rank, continue; the same on all ranks.

    Raises FaultError if no rank has a state.
    """
    steps = [state.step for state in states if state.has_state]
    if not steps:
        raise FaultError("no rank is left that holds the state of the run", code="rank-lost")
    newest = [rank for rank, state in enumerate(states) if state.has_state and state.step == max(steps)]
    receivers = tuple(rank for rank in range(len(states)) if rank not in newest)
    # A rank 0 that is new, or that has not made the last update itself, has not written what is due after it.
    has_written = newest[0] == 0 and states[0].is_writer
    is_step_complete = has_written and all(states[rank].is_step_complete for rank in newest)
    return Recovery(newest[0], receivers, is_step_complete)


def agree_on_recovery(comm: Communicator, mine: RankState) -> Recovery:
    """Return how all ranks continue, given this rank's state. All ranks call it.

    Raises UsageError if this rank joins with other code, settings or data than the others have, or without observers
    that they measure for.
    """
    rows = gather(comm, mine.row(), "standings")
    states = [RankState(bool(row[0]), row[1], bool(row[2]), bool(row[3]), tuple(row[4:])) for row in rows]
    recovery = plan_recovery(states)
    pairs = zip(_IDENTITY, mine.identity, states[recovery.source].identity, strict=True)
    if not mine.has_state and (differing := [name for name, here, there in pairs if here != there]):
        raise UsageError(
            f"this rank cannot join the others: its {' and '.join(differing)} differ from theirs. "
            f"Install the same code, use the same settings and files on all nodes, and pass observers on all ranks",
            code=f"ranks-differ-in-{differing[0]}",
        )
    return recovery


@dataclass(frozen=True)
class LastUpdate:
    """The last update and its record; `progress` is a copy made right after it, before any evaluation."""

    record: TrainRecord
    stop_requested: bool
    repeats: int
    progress: Progress


@dataclass(frozen=True)
class SharedState:
    """State that all ranks share, apart from tensors."""

    progress: Progress
    micro_size: int
    last_update: LastUpdate | None


_SHARED_STATE = TypeAdapter(SharedState)


def broadcast_shared_state(comm: Communicator, mine: SharedState, root: int) -> SharedState:
    """Return the state of rank `root`. All ranks call it."""
    return _SHARED_STATE.validate_json(broadcast_str(comm, json.dumps(asdict(mine)), "shared state", root))


class Interruption:
    """What a rank is recovering from, until the next update or the end of the run; it may span several generations."""

    def __init__(self) -> None:
        self.why = ""
        """What broke the last generation, as this rank saw it; empty if nothing did."""
        self._clear()

    def _clear(self) -> None:
        self._since: float | None = None
        self._redone = 0
        self._lost: tuple[str, ...] = ()
        self._joined: tuple[str, ...] = ()
        self._report = ""

    def note(self, error: GroupBrokenError, *, update_is_redone: bool) -> None:
        """Begin, or continue, with `error`; `update_is_redone`: an update was in progress."""
        self.why = "" if isinstance(error, MeetingRequestedError) else str(error)
        if self._since is None:
            self._since = time.monotonic()
            self._redone = int(update_is_redone and bool(self.why))

    def add(self, generation: Generation) -> None:
        """Note which ranks `generation` has lost and which have joined."""
        self._lost += generation.lost
        self._joined += generation.joined
        self._report = self._report or generation.report

    def events(self, comm: Communicator) -> Iterator[tuple[str, dict[str, Detail]]]:
        """End with an update of `comm`, or with the run; yield the names and details of the events to record."""
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


def assign_progress(progress: Progress, values: Progress) -> None:
    """Copy `values` into `progress`, an object that others refer to."""
    vars(progress).update(vars(values))


MAX_RECORDS = 10_000
"""Records kept in case a rank takes over from rank 0: far more than there are between two checkpoints."""


class RecentRecords:
    """The latest records, which a rank that takes over from rank 0 may have to write again.

    Rank 0 alone knows which of them it could write. Tells repeated records apart: work that is redone is recorded once.
    """

    def __init__(self, limit: int) -> None:
        """Keep at most `limit` records. With 0 none is kept, and each counts as new."""
        self._limit = limit
        self._kept: OrderedDict[RecordKey, Record] = OrderedDict()

    def add(self, record: Record) -> bool:
        """Keep `record`; return whether it is new."""
        if self._limit == 0:
            return True
        key = record_key(record)
        if key in self._kept:
            return False
        self._kept[key] = record
        if len(self._kept) > self._limit:
            self._kept.popitem(last=False)
        return True

    def share(self, comm: Communicator, root: int, *, takes: bool) -> None:
        """Add those of rank `root` if this rank `takes` them. All ranks call it."""
        mine = "\n".join(map(to_json, self.all())) if comm.rank == root else ""
        lines = broadcast_str(comm, mine, "records", root)
        for record in map(from_json, lines.split("\n") if takes else ()):
            if record is not None:
                self.add(record)

    def all(self) -> list[Record]:
        """Return the kept records in order."""
        return list(self._kept.values())
