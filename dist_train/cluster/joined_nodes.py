"""The launchers of other nodes, as the authority of an elastic launch keeps account of them.

Each has slots of its own for its processes, which the authority allots; what it may have is limited by the most ranks
that the run takes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import count, islice


@dataclass(frozen=True)
class View:
    """What a launcher knows of the run: the slots whose processes are ranks, and those that wait to become one.

    `code` is how the run has ended, once a rank has ended as all of them do; `has_ended`: it cannot continue.
    `stop_requested`: all ranks are to save and stop.
    """

    members: frozenset[int] = frozenset()
    joiners: frozenset[int] = frozenset()
    has_state: bool = False
    has_ended: bool = False
    code: int | None = None
    stop_requested: bool = False


@dataclass(frozen=True)
class Expelled:
    """A process that does not answer and is no longer one of the run: it must not write any more."""

    slot: int
    process: int


@dataclass
class JoinedNode:
    """The launcher of `node` that has connected for `wanted` ranks; it has `slots` once it may start them.

    `processes`: how many of them are ranks or may become ones. `told`, `told_at`: the view that it has, and when it
    last heard something.
    """

    node: str
    process: int
    wanted: int
    slots: tuple[int, ...] = ()
    processes: int = 0
    told: View | None = None
    told_at: float = 0.0

    @property
    def name(self) -> str:
        """What messages call it."""
        return f"the launcher on {self.node} (process {self.process})"


@dataclass
class JoinedNodes:
    """The launchers by connection. The run has `size` ranks when it begins, and `most` at most."""

    size: int
    most: int
    own_slots: range
    by_connection: dict[int, JoinedNode] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """The nodes whose launchers are connected."""
        return tuple(sorted(node.node for node in self.by_connection.values()))

    @property
    def processes(self) -> int:
        """How many processes of other nodes are ranks or may become ones."""
        return sum(node.processes for node in self.by_connection.values())

    def refusal(self, wanted: int, here: int) -> str:
        """Return why `wanted` ranks more are too many, beside `here` of this node; empty where they are not."""
        room = self.most - here - sum(node.processes or node.wanted for node in self._all_that_may_start())
        if wanted <= room:
            return ""
        more = f"{room} more rank{'' if room == 1 else 's'}" if room > 0 else "no more ranks"
        return f"the run takes {more}, not {wanted}: it has at most {self.most} (--max-ranks)"

    def ready_to_start(self, here: int, has_begun: bool) -> Iterator[int]:
        """Yield the connections that have waited and may start their ranks now.

        Until the run `has_begun`, only those that it begins with: who joins takes the state of who trains.
        """
        for connection, node in self.by_connection.items():
            if not node.slots and (has_begun or here + self.processes + node.wanted <= self.size):
                yield connection

    def allot(self, connection: int, taken: Iterable[int]) -> tuple[int, ...]:
        """Return the slots that `connection` gets: the first that are neither ours, nor another's, nor `taken`."""
        used = {*self.own_slots, *taken, *(slot for node in self.by_connection.values() for slot in node.slots)}
        node = self.by_connection[connection]
        node.slots = tuple(islice((slot for slot in count() if slot not in used), node.wanted))
        node.processes = node.wanted
        return node.slots

    def owner(self, slot: int) -> int | None:
        """Return the connection whose slot it is; None where it is none of another node's."""
        found = (connection for connection, node in self.by_connection.items() if slot in node.slots)
        return next(found, None)

    def _all_that_may_start(self) -> Iterator[JoinedNode]:
        """Yield those whose ranks run, or wait for their start."""
        yield from (node for node in self.by_connection.values() if node.processes or not node.slots)
