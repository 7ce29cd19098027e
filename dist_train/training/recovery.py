"""How the ranks of an elastic launch continue after they have formed a new group.

An update is a pure function of the state, so a lost rank takes nothing with it. The remaining ranks drop the update in
progress, take the newest state that any of them has, and continue. docs/recovery.md shows why no other case can occur.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from dist_train.checkpoint.state import Progress
from dist_train.cluster.communicator import (
    Communicator,
    Generation,
    GroupBrokenError,
    RendezvousRequestedError,
    broadcast_str,
    broadcast_value,
    gather,
)
from dist_train.optim.noise import Noise
from dist_train.outcome import FaultError, PeerFailedError, UsageError
from dist_train.rundir.metrics_file import RecordKey, from_json, record_key, to_json
from dist_train.rundir.records import Detail, Record
from dist_train.training.trainer import LastUpdate, Trainer

_IDENTITY = ("code", "settings", "data", "observers")


@dataclass(frozen=True)
class RankState:
    """The state of a rank, which has made `step` updates.

    `has_state` is false for a rank that joins. `is_step_complete`: the records, evaluation and checkpoint due after the
    last update are done. `is_writer`: the rank writes records and checkpoints, as rank 0 does. `identity`: digests of
    its code, settings and data, and whether observers or settings want measurements, in which all ranks take part.
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
    """Rank `source` sends its state to the ranks `receivers`.

    `is_step_complete`: the work due after its last update need not be done again.
    """

    source: int
    receivers: tuple[int, ...]
    is_step_complete: bool


def plan_recovery(states: Sequence[RankState]) -> Recovery:
    """Return how ranks with these states, by rank, continue, the same on all. Raises FaultError if none has a state."""
    steps = [state.step for state in states if state.has_state]
    if not steps:
        raise FaultError("no rank is left that holds the state of the run", code="rank-lost")
    newest = [rank for rank, state in enumerate(states) if state.has_state and state.step == max(steps)]
    receivers = tuple(rank for rank in range(len(states)) if rank not in newest)
    # A rank that is new as rank 0, or has not made the last update itself, has not written what is due after it.
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
class SharedState:
    """State that all ranks share, apart from tensors."""

    progress: Progress
    micro_size: int
    last_update: LastUpdate | None


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
        self.why = "" if isinstance(error, RendezvousRequestedError) else str(error)
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

    Only rank 0 knows which of them it has written. Repeated records are recognized: redone work is recorded once.
    """

    def __init__(self, limit: int) -> None:
        """Keep at most `limit` records."""
        self._limit = limit
        self._kept: OrderedDict[RecordKey, Record] = OrderedDict()

    def add(self, record: Record) -> bool:
        """Keep `record`; return whether it is new."""
        key = record_key(record)
        if key in self._kept:
            return False
        self._kept[key] = record
        if len(self._kept) > self._limit:
            self._kept.popitem(last=False)
        return True

    def share(self, comm: Communicator, root: int, *, takes: bool) -> None:
        """Add the records of rank `root`, if this rank `takes` them. All ranks call it."""
        mine = "\n".join(map(to_json, self.all())) if comm.rank == root else ""
        lines = broadcast_str(comm, mine, "records", root)
        for record in map(from_json, lines.split("\n") if takes else ()):
            if record is not None:
                self.add(record)

    def all(self) -> list[Record]:
        """Return the kept records in order."""
        return list(self._kept.values())


@dataclass
class ElasticTrainer(Trainer):
    """Trains on the ranks of an elastic launch: when some are lost or join, it recovers and continues."""

    regroup: Callable[[ElasticTrainer, Generation], None] = lambda trainer, generation: None
    """Hands the role of rank 0 to another rank, if it was lost: see `launching/run.py`."""
    identity: tuple[int, ...] = ()
    """Digests of code, settings and data, and whether ranks measure; a rank that joins must have the same."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.recent = RecentRecords(MAX_RECORDS)
        self._interruption = Interruption()
        self._has_state = not self.comm.is_joining
        self._last_update: LastUpdate | None = None
        self._is_step_complete = True
        """Whether the records, evaluation and checkpoint due after the last update are done."""
        self._has_last_noise = True
        """Whether this rank still holds the noise of the last update."""

    def _train(self) -> None:
        if self._has_state:
            self.comm.note_working_group()
        work = super()._train if self._has_state else self._recover_and_train
        while True:
            try:
                return work()
            except GroupBrokenError as error:
                work = self._recover_and_train
                self._interruption.note(error, update_is_redone=self._is_step_complete)

    def _recover_and_train(self) -> None:
        try:
            self._recover()
        except PeerFailedError as error:  # that rank ends with its own error
            raise GroupBrokenError(str(error)) from error
        if self._last_update is not None and not self._is_step_complete:
            self._complete_step(self._last_update)
        super()._train()

    def advance(self) -> None:
        """Make one update and what is due after it, as `Trainer` does; raise GroupBrokenError if ranks wait to join."""
        if (update := self._make_update()) is not None:
            self._complete_step(update)
            if update.rendezvous_requested and self.has_work:
                raise RendezvousRequestedError("ranks join")

    def _make_update(self) -> LastUpdate | None:
        before = replace(self.progress)
        try:
            update = super()._make_update()
        except GroupBrokenError:
            # The interrupted update may have changed the loss scale or the grids of its sums.
            assign_progress(self.progress, before)
            raise
        if update is not None:
            self._last_update, self._is_step_complete, self._has_last_noise = update, False, True
            for name, details in self._interruption.events(self.comm):
                self.event(name, **details)
                self.comm.note_working_group()
        return update

    def _complete_step(self, update: LastUpdate) -> None:
        """Do the work due after the last update; again, if a rank was lost meanwhile."""
        super()._complete_step(update)
        self._is_step_complete = True

    def _verify(self, noise: Noise | None) -> None:
        super()._verify(noise if self._has_last_noise else None)

    def _finish_saving(self) -> None:
        for name, details in self._interruption.events(self.comm):
            self.event(name, **details)
        super()._finish_saving()

    def _record(self, record: Record) -> None:
        """Record on rank 0; the other ranks keep a copy in case they take over from it."""
        if self.recent.add(record):
            super()._record(record)

    def _recover(self) -> None:
        """Form a new group of the remaining and joining ranks; continue from the newest state that any of them has."""
        self.time_limit.interrupt()
        generation = self.comm.rendezvous(self._interruption.why, self._interruption.add)
        # What follows may replace the weights and, in an evaluation that is redone, the norms' statistics.
        self.training_step.wait_for_checkpoint_copy()
        if self.measuring:
            self.measuring.drop()
        is_writer = self.saving.writer is not None
        mine = RankState(self._has_state, self.progress.step, self._is_step_complete, is_writer, self.identity)
        recovery = agree_on_recovery(self.comm, mine)
        own = SharedState(self.progress, self.plan.micro_size, self._last_update)
        shared = broadcast_value(self.comm, own, "shared state", recovery.source)
        if recovery.receivers:
            # Rank 0 itself does again what is due after the last update.
            takes = self.comm.rank in recovery.receivers and not is_writer
            self.recent.share(self.comm, recovery.source, takes=takes)
            self.state.broadcast(self.comm, recovery.source)
            self._has_state = True
            self.comm.note_state()
        last = self._last_update = shared.last_update
        self._is_step_complete = recovery.is_step_complete or last is None
        assign_progress(self.progress, shared.progress if last is None or self._is_step_complete else last.progress)
        # Ranks that received the state, or had begun the next update, do not have the noise of the last one.
        self._has_last_noise = False
        self._statistics_step = self._verified_step = None
        self._averaged.forget()
        self.training_step.noise.rank = self.comm.rank
        self._divide_work(shared.micro_size)
        self.regroup(self, generation)
