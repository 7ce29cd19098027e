"""The protocol of recovery as a small world whose every interleaving is visited.

The coordinator's and the ranks' decisions are the program's own (`membership.decide`, `recovery.agree`). Modelled is
what lies between them: processes that die at any moment, messages in transit, sums that complete on one rank and fail
on another.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from dist_train.cluster.membership import (
    Elasticity,
    Membership,
    Message,
    Peer,
    connect,
    decide,
    mark_ready,
    note_training,
    remove,
    request_stop,
    set_may_grow,
)
from dist_train.training.recovery import RankState, plan_recovery

Mode = Literal["works", "waits", "stopped", "done", "ended", "dead"]
Kind = Literal["standings", "state", "sum", "barrier"]
Event = tuple[Any, ...]
"""A function of `membership.py`, and its arguments after the state."""


class Rank(NamedTuple):
    """A process. `kind` is the operation, number `place` of its generation, that it starts next or waits for."""

    mode: Mode
    generation: int = 1
    rank: int = 0
    size: int = 3
    place: int = 0
    kind: Kind = "sum"
    step: int = 0
    has_state: bool = True
    is_interrupted: bool = False
    wants_rendezvous: bool = False
    is_asked_to_stop: bool = False
    has_stopped: bool = False
    """Whether all ranks have agreed, in their last update, to stop after it."""
    inbox: tuple[tuple[str, int, int, int], ...] = ()
    """Lines from the coordinator, or a signal: what, generation, rank, size."""
    outbox: tuple[Event, ...] = ()


class Brought(NamedTuple):
    """What a rank has brought to an operation."""

    kind: Kind
    step: int
    has_state: bool
    wants_rendezvous: bool
    is_asked_to_stop: bool
    has_stopped: bool


class World(NamedTuple):
    """Everything. `operations`: what was brought, by generation, place and rank."""

    ranks: tuple[Rank, ...]
    coordinator: Membership
    operations: frozenset[tuple[tuple[int, int, int], Brought]] = frozenset()
    deaths: int = 0
    joins: int = 0
    breaks: int = 0


@dataclass(frozen=True)
class Limits:
    """How far the world goes: so many updates, deaths, and processes that join; whether it may be asked to stop.

    The ranks wait for others if there are fewer than `min_ranks`. So many operations fail though nobody is lost.
    """

    last_step: int
    deaths: int
    joins: int
    min_ranks: int = 1
    stops: bool = False
    breaks: int = 0


def beginning(size: int, limits: Limits) -> World:
    """Return the world in which `size` ranks have met, and hold the same state."""
    peers = tuple(Peer(number, number, rank=number, has_state=True) for number in range(size))
    ranks = tuple(Rank("works", rank=number, size=size) for number in range(size))
    elasticity = Elasticity(size, limits.min_ranks, max(size, 2), 0, 5.0)
    return World(ranks, Membership(elasticity, generation=1, is_forming=False, peers=peers))


def steps(world: World, limits: Limits) -> Iterator[World]:
    """Yield what can happen next of itself."""
    processes = sum(rank.mode not in ("done", "ended", "dead") for rank in world.ranks)
    if limits.min_ranks > 1 and world.coordinator.may_grow and processes <= len(world.coordinator.members):
        yield _decide(world, (set_may_grow, False))  # the launcher restarts none
    for number, rank in enumerate(world.ranks):
        if rank.outbox:
            yield _deliver_to_coordinator(world, number)
        if rank.inbox:
            yield _deliver_to_rank(world, number)
        if rank.mode == "works":
            yield _stop(world, number, "broken") if rank.is_interrupted else _bring(world, number)
        if rank.mode == "waits":
            if len(_brought(world, rank)) == rank.size:
                yield _complete(world, number, limits)
            if rank.is_interrupted or _has_lost(world, rank):
                yield _stop(world, number, "broken")


def faults(world: World, limits: Limits) -> Iterator[World]:
    """Yield what can be done to it next."""
    if world.deaths < limits.deaths:
        for number, rank in enumerate(world.ranks):
            if rank.mode in ("works", "waits", "stopped"):
                # What it has sent last may arrive or not.
                for kept in {rank.outbox, ()}:
                    dead = rank._replace(mode="dead", inbox=(), outbox=(*kept, (remove, number, "died")))
                    yield _with(world, number, dead)._replace(deaths=world.deaths + 1)
    if world.breaks < limits.breaks:
        for number, rank in enumerate(world.ranks):
            if rank.mode == "waits" and rank.size > 1 and not rank.is_interrupted:
                yield _stop(world, number, "broken")._replace(breaks=world.breaks + 1)
    if limits.stops and not (world.coordinator.stop_requested or world.coordinator.has_ended):
        signalled = (rank._replace(inbox=(*rank.inbox, ("stop", 0, 0, 0))) for rank in world.ranks)
        yield _decide(world._replace(ranks=tuple(signalled)), (request_stop,))
    if world.joins < limits.joins and world.coordinator.may_grow and not world.coordinator.stop_requested:
        number = len(world.ranks)
        joiner = Rank(
            "stopped", generation=0, has_state=False, outbox=((connect, Peer(number, number)), (mark_ready, number, 0))
        )
        yield world._replace(ranks=(*world.ranks, joiner), joins=world.joins + 1)


def check_end(world: World, limits: Limits) -> None:
    """Check a world in which nothing more happens of itself."""
    for rank in world.ranks:
        is_killed = world.coordinator.has_ended and not rank.has_state  # by its launcher, which knows that
        assert is_killed or rank.mode in ("done", "ended", "dead"), f"it hangs: {world}"
        assert rank.mode != "done" or rank.has_stopped or rank.step == limits.last_step
        is_last_work = world.coordinator.stop_requested or world.coordinator.is_over
        may_end = (limits.min_ranks > 1 and not is_last_work) or world.breaks >= (2 if world.joins else 3)
        assert rank.mode != "ended" or not rank.has_state or may_end, f"the state was sent away: {world}"
    assert len({rank.step for rank in world.ranks if rank.mode == "done"}) <= 1, f"they end in two states: {world}"


def explore(size: int, limits: Limits) -> int:
    """Visit every world that can come about, and return their number."""
    seen = {beginning(size, limits)}
    todo = list(seen)
    while todo:
        world = todo.pop()
        following = list(steps(world, limits))
        if not following:
            check_end(world, limits)
        for each in map(_without_the_past, (*following, *faults(world, limits))):
            if each not in seen:
                seen.add(each)
                todo.append(each)
    return len(seen)


def _without_the_past(world: World) -> World:
    """Return the world without operations that nobody will look at again: worlds that differ in them are one."""
    current = {(rank.generation, rank.place) for rank in world.ranks if rank.mode in ("works", "waits")}
    return world._replace(operations=frozenset(each for each in world.operations if each[0][:2] in current))


def _with(world: World, number: int, rank: Rank) -> World:
    return world._replace(ranks=(*world.ranks[:number], rank, *world.ranks[number + 1 :]))


def _brought(world: World, rank: Rank) -> dict[int, Brought]:
    return {key[2]: brought for key, brought in world.operations if key[:2] == (rank.generation, rank.place)}


def _has_lost(world: World, rank: Rank) -> bool:
    """Whether a rank of its group is no more, so that the group's operations may fail."""
    return any(each.generation == rank.generation and each.mode in ("dead", "done") for each in world.ranks)


def _bring(world: World, number: int) -> World:
    rank = world.ranks[number]
    mine = Brought(
        *(rank.kind, rank.step, rank.has_state, rank.wants_rendezvous, rank.is_asked_to_stop, rank.has_stopped)
    )
    for other in _brought(world, rank).values():
        assert other.kind == mine.kind, f"operations are mixed up: {world}"
        assert mine.kind in ("standings", "state") or other.step == mine.step, f"updates are mixed up: {world}"
    operations = world.operations | {((rank.generation, rank.place, rank.rank), mine)}
    return _with(world, number, rank._replace(mode="waits"))._replace(operations=operations)


def _complete(world: World, number: int, limits: Limits) -> World:
    rank = world.ranks[number]
    brought = _brought(world, rank)
    following = rank._replace(mode="works", place=rank.place + 1)
    match rank.kind:
        case "standings":
            recovery = plan_recovery([RankState(b.has_state, b.step, True, True) for _, b in sorted(brought.items())])
            kind: Kind = "state" if recovery.receivers else _work(rank.step, rank.has_stopped, limits)
            return _with(world, number, following._replace(kind=kind))
        case "state":
            newest, has_stopped = max((b.step, b.has_stopped) for b in brought.values() if b.has_state)
            assert newest >= rank.step, f"an update is lost: {world}"
            work = _work(newest, has_stopped, limits)
            taken = following._replace(step=newest, has_state=True, has_stopped=has_stopped, kind=work)
            return _with(world, number, taken._replace(outbox=(*taken.outbox, (note_training, number, False))))
        case "sum":
            step = rank.step + 1
            has_stopped = any(b.is_asked_to_stop for b in brought.values())
            made = following._replace(step=step, has_stopped=has_stopped, kind=_work(step, has_stopped, limits))
            if limits.breaks:
                made = made._replace(outbox=(*made.outbox, (note_training, number, True)))
            world = _with(world, number, made)
            if made.kind == "sum" and any(b.wants_rendezvous for b in brought.values()):
                return _stop(world, number, "")
            return world
        case "barrier":
            return _with(world, number, rank._replace(mode="done", outbox=(*rank.outbox, (remove, number))))


def _work(step: int, has_stopped: bool, limits: Limits) -> Kind:
    return "sum" if step < limits.last_step and not has_stopped else "barrier"


def _stop(world: World, number: int, why: str) -> World:
    rank = world.ranks[number]
    ready: Event = (mark_ready, number, rank.generation, why)
    return _with(world, number, rank._replace(mode="stopped", outbox=(*rank.outbox, ready)))


def _deliver_to_coordinator(world: World, number: int) -> World:
    rank = world.ranks[number]
    return _decide(_with(world, number, rank._replace(outbox=rank.outbox[1:])), rank.outbox[0])


def _decide(world: World, event: Event) -> World:
    coordinator, messages = decide(world.coordinator, *event)
    world = world._replace(coordinator=coordinator)
    for message in messages:
        receiver = world.ranks[message.to]
        if receiver.mode not in ("dead", "done"):
            world = _with(world, message.to, receiver._replace(inbox=(*receiver.inbox, _line(message))))
    return world


def _line(message: Message) -> tuple[str, int, int, int]:
    fields = message.fields
    return message.kind, fields.get("generation", 0), fields.get("rank", 0), fields.get("size", 0)


def _deliver_to_rank(world: World, number: int) -> World:
    rank = world.ranks[number]
    (kind, generation, given, size), *rest = rank.inbox
    rank = rank._replace(inbox=tuple(rest))
    match kind:
        case "break" if generation == rank.generation:
            rank = rank._replace(is_interrupted=True)
        case "meet":
            rank = rank._replace(wants_rendezvous=True)
        case "stop":
            rank = rank._replace(is_asked_to_stop=True)
        case "end" if rank.mode not in ("dead", "done"):
            rank = rank._replace(mode="ended")
        case "members":
            assert rank.mode == "stopped", f"a generation begins without a rank that works: {world}"
            rank = Rank(
                *("works", generation, given, size, 0, "standings", rank.step, rank.has_state, False, False),
                *(rank.is_asked_to_stop, rank.has_stopped, rank.inbox),
            )
    return _with(world, number, rank)
