"""The launchers of other nodes, as the authority of an elastic launch records them.

The authority allots slots to each for its processes, as long as the run's maximum number of ranks permits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import count, islice


@dataclass(frozen=True)
class View:
    """What a launcher knows of the run."""

    members: frozenset[int] = frozenset()  # slots whose processes are ranks
    joiners: frozenset[int] = frozenset()  # slots whose processes wait to become ranks
    has_state: bool = False
    has_ended: bool = False  # the run cannot continue
    code: int | None = None  # the run's exit code, once a rank has ended with one that all ranks share
    stop_requested: bool = False  # all ranks are to save and stop


@dataclass(frozen=True)
class Expelled:
    """A process that was expelled because it does not answer: it must not write any more."""

    slot: int
    process: int


@dataclass
class JoinedNode:
    """The launcher of `node`, connected for `wanted` ranks."""

    node: str
    process: int
    wanted: int
    slots: tuple[int, ...] = ()  # once it may start its ranks
    processes: int = 0  # how many of them are ranks or may become ranks
    sent_view: View | None = None  # the last one
    sent_at: float = 0.0

    @property
    def name(self) -> str:
        """What messages call it."""
        return f"the launcher on {self.node} (process {self.process})"


@dataclass
class JoinedNodes:
    """The launchers of other nodes, by connection. The run begins with `size` ranks and has `most` at most."""

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
        """How many processes of other nodes are ranks or may become ranks."""
        return sum(node.processes for node in self.by_connection.values())

    def refusal(self, wanted: int, here: int) -> str:
        """Return why `wanted` more ranks are too many, beside `here` of this node; empty if they are not."""
        running_or_waiting = (node for node in self.by_connection.values() if node.processes or not node.slots)
        free = self.most - here - sum(node.processes or node.wanted for node in running_or_waiting)
        if wanted <= free:
            return ""
        more = f"{free} more rank{'' if free == 1 else 's'}" if free > 0 else "no more ranks"
        return f"the run takes {more}, not {wanted}: it has at most {self.most} (--max-ranks)"

    def ready_to_start(self, here: int, has_begun: bool) -> Iterator[int]:
        """Yield the connections that may start their ranks: before the run `has_begun`, those that it begins with."""
        for connection, node in self.by_connection.items():
            if not node.slots and (has_begun or here + self.processes + node.wanted <= self.size):
                yield connection

    def allot(self, connection: int, taken: Iterable[int]) -> tuple[int, ...]:
        """Allot slots to `connection` and return them: the first that are not `taken`, this launcher's or another's."""
        used = {*self.own_slots, *taken, *(slot for node in self.by_connection.values() for slot in node.slots)}
        node = self.by_connection[connection]
        node.slots = tuple(islice((slot for slot in count() if slot not in used), node.wanted))
        node.processes = node.wanted
        return node.slots

    def owner(self, slot: int) -> int | None:
        """Return the connection to which `slot` is allotted; None for a slot of this launcher."""
        return next((connection for connection, node in self.by_connection.items() if slot in node.slots), None)
