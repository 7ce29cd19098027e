"""Rows of our step time against each peer's: every side is its own program, and all run in turn in each round.

Lightning and Ignite are installed in `.venv-peers` by `benchmarks/peers/environment.sh`; without it they are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.launching import beside_python, measure, module, on_ranks
from benchmarks.peers.work import Work
from benchmarks.timing import Ratio, ratio_of

ROOT = Path(__file__).parents[2]
PEERS_PYTHON = ROOT / ".venv-peers" / "bin" / "python"

SMALL = Work(0.25, 128, 1, updates=60, warm_up=10)
SMALL_8192 = Work(0.25, 8192, 1, updates=2, warm_up=1)
WHOLE = Work(1.0, 128, 1, updates=6, warm_up=2)
WHOLE_8192 = Work(1.0, 8192, 1, updates=1, warm_up=0)
"""Work for one rank; `rows` also runs it on two."""


@dataclass(frozen=True)
class Peer:
    """A program, the command that starts it on some ranks, and the largest allowed ratio of our step time to its."""

    name: str
    module: str
    command: Callable[[str, int], list[str]]
    ranks: tuple[int, ...]
    bar: Callable[[Work], float | None]


def rows(work: Work, rounds: int) -> Iterator[Ratio]:
    """Yield our step time over each peer's on one rank and on two, and ours on two ranks over half of ours on one."""
    ours: dict[int, list[float]] = {}
    for ranks in (1, 2):
        shared = replace(work, ranks=ranks)
        peers = [peer for peer in _available_peers() if ranks in peer.ranks]
        seconds: dict[str, list[float]] = {peer.name: [] for peer in peers}
        for number in range(rounds):
            for peer in (*peers[number % len(peers) :], *peers[: number % len(peers)]):
                seconds[peer.name].append(seconds_of(peer, shared))
        ours[ranks] = seconds.pop(OURS.name)
        for peer in peers[1:]:
            yield ratio_of(
                f"{_title(work)}, {ranks} rank{'s' * (ranks > 1)}",
                OURS.name,
                peer.name,
                list(zip(ours[ranks], seconds[peer.name], strict=True)),
                peer.bar(shared),
                images=work.batch,
            )
    halves = [one / 2 for one in ours[1]]
    bar = 1 / 0.95 if work.batch == 8192 else None
    pairs = list(zip(ours[2], halves, strict=True))
    yield ratio_of(f"{_title(work)}, scaling", "2 ranks", "half of 1's", pairs, bar, images=work.batch)


def _title(work: Work) -> str:
    return f"width {work.width:g}, batch {work.batch}"


def seconds_of(peer: Peer, work: Work) -> float:
    """Return the seconds of an update of `peer` at `work`."""
    return float(measure([*peer.command(peer.module, work.ranks), *work.arguments()]))


def _alone_or_by_mpirun(name: str, ranks: int) -> list[str]:
    return on_ranks("alone" if ranks == 1 else "mpi", ranks, module(name))


def _by_torchrun(name: str, ranks: int) -> list[str]:
    return [beside_python("torchrun"), "--standalone", f"--nproc-per-node={ranks}", "-m", name]


def _by_itself(name: str, ranks: int) -> list[str]:
    return [str(PEERS_PYTHON), "-m", name]


def _bar_of_limit(work: Work) -> float | None:
    return 1 / 0.97


def _bar_of_peer(work: Work) -> float | None:
    return 1.0


def _bar_of_example(work: Work) -> float | None:
    return 1 / 1.3 if work.batch == 8192 else 1.0


OURS = Peer("dist-train", "benchmarks.peers.ours", _alone_or_by_mpirun, (1, 2), _bar_of_peer)
_PEERS = (
    OURS,
    Peer("bare PyTorch loop", "benchmarks.peers.bare", _alone_or_by_mpirun, (1,), _bar_of_limit),
    Peer("PyTorch DDP, Gloo", "benchmarks.peers.ddp", _by_torchrun, (1, 2), _bar_of_peer),
    Peer("Horovod's example", "benchmarks.peers.horovod_example", _alone_or_by_mpirun, (1, 2), _bar_of_example),
)
_PEERS_IN_OTHER_ENVIRONMENT = (
    Peer("Lightning, DDP", "benchmarks.peers.lightning_ddp", _by_itself, (1, 2), _bar_of_peer),
    Peer("Ignite", "benchmarks.peers.ignite_ddp", _by_itself, (1, 2), _bar_of_peer),
)


def _available_peers() -> tuple[Peer, ...]:
    return (*_PEERS, *_PEERS_IN_OTHER_ENVIRONMENT) if PEERS_PYTHON.exists() else _PEERS
