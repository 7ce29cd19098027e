"""Which processes are the ranks of an elastic launch, generation by generation: the decisions, as pure functions.

The launcher that began the run, its coordinator, holds one `Membership` and alone decides (docs/recovery.md). A
generation is a numbering of the ranks. It ends when one of them is lost or reports that the group is broken, or when
all stop between two updates to let others join. The next one begins when every remaining rank has stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Concatenate, Literal, ParamSpec, TypeAlias

P = ParamSpec("P")
Kind = Literal["break", "meet", "members", "end"]

_TRIES_OF_JOINERS = 2
"""Groups in a row that may break before an update, with nobody lost, before the processes that joined must go."""
_TRIES = 3
"""Groups in a row that may break so before the run ends."""


@dataclass(frozen=True)
class Peer:
    """A connected process."""

    id: int
    slot: int  # orders the processes without a rank
    node: str = ""
    process: int = 0
    store: tuple[str, int] = ("", 0)
    rank: int | None = None  # in the current generation, if it has one
    is_ready: bool = False  # it has stopped work and waits for the next generation
    has_state: bool = False  # it trains, so the run can continue from its state
    is_new: bool = False  # it has joined, and its group has made no update yet

    @property
    def name(self) -> str:
        """Its identifier in messages."""
        return self.named("a rank that was joining" if self.rank is None else f"rank {self.rank}")

    def named(self, who: str) -> str:
        """Return `who` with its node and process."""
        return f"{who} ({self.node}, process {self.process})"


@dataclass(frozen=True)
class Elasticity:
    """How many ranks a run begins with, continues with and accepts, and when ranks are lost and restarted."""

    start_with: int
    min_ranks: int
    max_ranks: int
    restarts: int  # of a lost rank, by each launcher
    timeout: float  # seconds of silence after which a rank is lost


@dataclass(frozen=True)
class Membership:
    """The state of the coordinator."""

    limits: Elasticity
    generation: int = 0
    is_forming: bool = True
    peers: tuple[Peer, ...] = ()
    may_grow: bool = True  # more ranks may still be started
    lost: tuple[str, ...] = ()  # the ranks lost from the current generation, with reasons
    report: str = ""  # how a rank described the failure; this and `lost` are for the next generation's record
    tries: int = 0  # how many generations in a row, this one included, have lost nobody and made no update yet
    stop_requested: bool = False  # all ranks are to save and stop, however few they are
    is_over: bool = False  # a rank has left because the run is done, so none may join any more
    has_ended: bool = False  # the run cannot continue

    @property
    def members(self) -> tuple[Peer, ...]:
        """The remaining ranks of the current generation, by rank."""
        return tuple(sorted((peer for peer in self.peers if peer.rank is not None), key=lambda peer: peer.rank or 0))

    @property
    def joiners(self) -> tuple[Peer, ...]:
        """The processes without a rank, in the order in which they get one."""
        return tuple(sorted((peer for peer in self.peers if peer.rank is None), key=lambda peer: (peer.slot, peer.id)))

    @property
    def has_state(self) -> bool:
        """Whether the run can continue from the state of a connected process."""
        return any(peer.has_state for peer in self.peers)

    @property
    def is_broken(self) -> bool:
        """Whether the current generation is over because it broke, not by agreement."""
        return bool(self.lost or self.report)

    def find(self, peer_id: int) -> Peer | None:
        """Return the peer with that id; None if it is gone."""
        return next((peer for peer in self.peers if peer.id == peer_id), None)


@dataclass(frozen=True)
class Message:
    """A message to a peer: `break` (stop, this generation is over), `meet` (stop after this update, ranks want to
    join), `members` (the next generation), `end` (the run cannot continue).
    """

    to: int
    kind: Kind
    fields: Mapping[str, Any] = field(default_factory=dict)


Decision: TypeAlias = tuple[Membership, tuple[Message, ...]]


Event: TypeAlias = Callable[Concatenate[Membership, P], Decision]
"""A function below: what happened, by its arguments, to the decision about it."""


def decide(state: Membership, event: Event[P], *args: P.args, **kwargs: P.kwargs) -> Decision:
    """Return the state after `event`, and the messages to send; after the end, nothing changes any more."""
    return (state, ()) if state.has_ended else event(state, *args, **kwargs)


def connect(state: Membership, peer: Peer) -> Decision:
    """A process has connected and proved that it belongs to this launch."""
    return replace(state, peers=(*state.peers, peer)), ()


def note_training(state: Membership, peer_id: int, works: bool) -> Decision:
    """A process holds the run's state from now on; `works`: its generation has made an update."""
    state = _with_peer(state, peer_id, has_state=True)
    if works:
        peers = tuple(
            replace(peer, is_new=False) if peer.is_new and peer.rank is not None else peer for peer in state.peers
        )
        state = replace(state, peers=peers, tries=0)
    return state, ()


def set_may_grow(state: Membership, value: bool) -> Decision:
    """Whether launchers may still start ranks has changed to `value`."""
    return _begin_if_ready(replace(state, may_grow=value))


def request_stop(state: Membership) -> Decision:
    """All ranks are to save and stop."""
    return _begin_if_ready(replace(state, stop_requested=True))


def remove(state: Membership, peer_id: int, why: str = "") -> Decision:
    """A process died, hangs or failed (`why`), or left because the run has ended in order (`why` is empty)."""
    gone = state.find(peer_id)
    if gone is None:
        return state, ()
    state = replace(state, peers=tuple(peer for peer in state.peers if peer is not gone))
    if gone.rank is None and state.generation > 0:
        return _begin_if_ready(state)
    state = replace(state, tries=0)
    if not why:
        refusals = tuple(_refuse(peer) for peer in state.joiners if peer.is_ready)
        return _begin_if_ready(replace(state, is_over=True), refusals)
    reason = f"{gone.name} {why}"
    if not (state.has_state or gone.has_state):
        return _end(state, f"{reason} before training began")
    # Only the launcher knows whether it restarts the process: `set_may_grow` follows.
    state = replace(state, is_forming=True, may_grow=True, lost=(*state.lost, reason))
    return _begin_if_ready(state, _break(state, reason))


def mark_ready(
    state: Membership, peer_id: int, generation: int, why: str = "", store: tuple[str, int] = ("", 0)
) -> Decision:
    """A process has stopped work on `generation` and waits for the next; `why`: what broke, empty if nothing did."""
    peer = state.find(peer_id)
    if peer is None or (peer.rank is not None and generation != state.generation):
        return state, ()
    state = _with_peer(state, peer_id, is_ready=True, store=store)
    if peer.rank is None and state.is_over:
        return state, (_refuse(peer),)
    if peer.rank is None:
        if state.is_forming:
            return _begin_if_ready(state)
        # The ranks agree on the update after which they all stop.
        return state, tuple(Message(member.id, "meet") for member in state.members)
    messages: tuple[Message, ...] = ()
    if why:
        messages = () if state.is_broken else _break(state, why)  # once: every rank of a broken group reports it
        state = replace(state, report=state.report or f"{peer.name} reports: {why}")
    return _begin_if_ready(replace(state, is_forming=True), messages)


def _break(state: Membership, why: str) -> tuple[Message, ...]:
    fields = {"generation": state.generation, "why": why}
    return tuple(Message(peer.id, "break", fields) for peer in state.members if not peer.is_ready)


def _begin_if_ready(state: Membership, messages: tuple[Message, ...] = ()) -> Decision:
    """Begin the next generation if every rank has stopped and there are enough ranks."""
    if not state.is_forming:
        return state, messages
    ready = () if state.is_over else tuple(peer for peer in state.joiners if peer.is_ready)
    if state.generation == 0:
        return _begin(state, ready) if len(ready) == state.limits.start_with else (state, messages)
    if state.peers and not state.has_state:
        return _end(state, "; ".join((*state.lost, "no rank is left that holds the state")))
    if not state.members or not all(member.is_ready for member in state.members):
        return state, messages
    if state.report and not state.lost:
        is_new = [member.is_new for member in state.members]
        others_can = any(member.has_state and not member.is_new for member in state.members)
        if state.tries >= _TRIES_OF_JOINERS and any(is_new) and others_can:
            state, refusals = _turn_away(state)
            messages = (*messages, *refusals)
        elif state.tries >= _TRIES:
            return _end(state, f"{_TRIES} groups of the ranks in a row broke before an update: {state.report}")
    following = (*state.members, *ready)[: state.limits.max_ranks]
    # No rank is restarted any more; those that are left finish their work, after at most one more update, and save.
    least = 1 if state.stop_requested or state.is_over else state.limits.min_ranks
    if len(following) < least:
        if state.may_grow:
            return state, messages
        too_few = f"{len(following)} rank{'s are' if len(following) > 1 else ' is'} left of at least {least}"
        return _end(state, "; ".join((*state.lost, too_few)))
    state, announcements = _begin(state, following)
    return state, (*messages, *announcements)


def _begin(state: Membership, following: tuple[Peer, ...]) -> Decision:
    generation = state.generation + 1
    ranks = {peer.id: rank for rank, peer in enumerate(following)}
    fields = {
        "generation": generation,
        "size": len(following),
        "store": following[0].store,
        "nodes": [peer.node for peer in following],
        "lost": list(state.lost),
        "report": state.report,
        "joined": [
            peer.named(f"rank {ranks[peer.id]}") for peer in following if peer.rank is None and state.generation
        ],
    }
    peers = tuple(
        replace(
            peer,
            rank=ranks.get(peer.id),
            is_ready=peer.is_ready and peer.id not in ranks,
            is_new=peer.is_new or (peer.rank is None and peer.id in ranks and state.generation > 0),
        )
        for peer in state.peers
    )
    begun = replace(
        state, generation=generation, is_forming=False, peers=peers, lost=(), report="", tries=state.tries + 1
    )
    return begun, tuple(Message(peer.id, "members", {**fields, "rank": rank}) for rank, peer in enumerate(following))


def _turn_away(state: Membership) -> Decision:
    """Remove the ranks that have joined but cannot get the state: the others work without them."""
    gone = [member for member in state.members if member.is_new]
    why = f"{_TRIES_OF_JOINERS} groups with ranks that joined broke before an update: {state.report}"
    lost = tuple(f"{peer.name} could not connect to the others" for peer in gone)
    peers = tuple(peer for peer in state.peers if peer not in gone)
    messages = tuple(Message(peer.id, "end", {"why": why}) for peer in gone)
    return replace(state, peers=peers, lost=lost, may_grow=True, tries=0), messages


def _refuse(peer: Peer) -> Message:
    return Message(peer.id, "end", {"why": "the run has ended meanwhile"})


def _end(state: Membership, why: str) -> Decision:
    messages = tuple(Message(peer.id, "end", {"why": why}) for peer in state.peers)
    return replace(state, has_ended=True, lost=(why,)), messages


def _with_peer(state: Membership, peer_id: int, **changes: Any) -> Membership:
    peers = tuple(replace(peer, **changes) if peer.id == peer_id else peer for peer in state.peers)
    return replace(state, peers=peers)
