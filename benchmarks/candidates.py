"""Rows of settings that might make a step of VGG9 faster, each against the step without it: `--only candidates`.

For environment variables each side runs in its own process:
`python -m benchmarks.candidates WIDTH GLOBAL_SIZE UPDATES` prints the seconds of an update.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from ctypes.util import find_library
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.launching import measure, module, on_ranks, running
from benchmarks.ranks import shared_folder, tell_measured
from benchmarks.subject import QUIET, open_trainer, settings
from benchmarks.timing import Ratio, compare, ratio_of, timed
from dist_train.cluster.communicator import Communicator, SingleProcess
from dist_train.cluster.devices import device_type
from dist_train.training.compute import share_of_threads

_WIDTH, _GLOBAL_SIZE, _UPDATES = 0.25, 128, 10
_ENDLESS = 1_000_000  # updates of a process that is killed once the other one has been measured


@dataclass(frozen=True)
class Candidate:
    """Environment variables for our side, on `ranks` ranks over MPI; those in `both` are set on both sides.

    With `is_shared` another process with the same variables trains on the same cores meanwhile.
    """

    name: str
    variables: Mapping[str, str]
    ranks: int = 1
    both: Mapping[str, str] = field(default_factory=dict)
    is_shared: bool = False


@dataclass(frozen=True)
class Missing:
    """A candidate that cannot be measured here, and the reason."""

    name: str
    reason: str


TWO_THREADS: Mapping[str, str] = {"OMP_NUM_THREADS": "2"}
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "compiled": {"compile": True},
    "channels_last": {"channels_last": True},
    "bfloat16": {"compute": "bfloat16"},
    "bfloat16 channels_last": {"compute": "bfloat16", "channels_last": True},
}


def rows(pairs: int) -> Iterator[Ratio]:
    """Yield a row for each candidate; those that cannot be measured here are reported and left out.

    The environment variables concern CPUs: allocators, threads, and communication in memory.
    """
    for candidate in from_environment(find_library) if device_type() == "cpu" else ():
        if isinstance(candidate, Missing):
            print(f"{candidate.name} is left out: {candidate.reason}", file=sys.stderr)
        else:
            yield _environment_row(candidate, pairs)
    yield from setting_rows(pairs)


def from_environment(find: Callable[[str], str | None]) -> Iterator[Candidate | Missing]:
    """Yield candidates set by environment variables; `find` locates a shared library, as `find_library` does."""
    yield _preloaded("jemalloc", find("jemalloc"))
    yield _preloaded("tcmalloc", find("tcmalloc_minimal") or find("tcmalloc"))
    yield Candidate("OMP_NUM_THREADS=2", TWO_THREADS)
    passive = {"OMP_WAIT_POLICY": "passive"}
    yield Candidate("OMP_WAIT_POLICY=passive, 2 threads", passive, both=TWO_THREADS)
    yield Candidate("OMP_WAIT_POLICY=passive, 2 threads, shared cores", passive, both=TWO_THREADS, is_shared=True)
    if find("iomp5"):
        intel = {"LD_PRELOAD": str(find("iomp5")), **TWO_THREADS}
        yield Candidate("KMP_BLOCKTIME=0, 2 threads, preloaded OpenMP", {"KMP_BLOCKTIME": "0"}, both=intel)
    else:
        yield Missing("KMP_BLOCKTIME", "neither Intel's OpenMP nor LLVM's is installed, and GNU's has no such time")
    for milliseconds in ("0.1", "5"):
        yield Candidate(f"HOROVOD_CYCLE_TIME={milliseconds}", {"HOROVOD_CYCLE_TIME": milliseconds}, ranks=2)
    yield Candidate("HOROVOD_FUSION_THRESHOLD=0", {"HOROVOD_FUSION_THRESHOLD": "0"}, ranks=2)


def setting_rows(pairs: int) -> Iterator[Ratio]:
    """Yield the rows of our settings, in one process, without the time of compilation."""
    for name, precision in SETTINGS.items():
        with tempfile.TemporaryDirectory() as folder:
            without = {"threads": 1, "channels_last": False}
            changed = settings(_WIDTH, _GLOBAL_SIZE, precision={**without, **precision}, **QUIET)
            ours = open_trainer(changed, SingleProcess(), Path(folder) / "changed")
            plain = settings(_WIDTH, _GLOBAL_SIZE, precision=without, **QUIET)
            theirs = open_trainer(plain, SingleProcess(), Path(folder) / "plain")
            sides = (name, ours.advance), ("without", theirs.advance)
            yield compare(_title(name), *sides, pairs=pairs, bar=None, warm_up=3, images=_GLOBAL_SIZE)
            ours.close()
            theirs.close()


def _preloaded(name: str, library: str | None) -> Candidate | Missing:
    if library is None:
        return Missing(name, f"the library lib{name} is not installed")
    return Candidate(name, {"LD_PRELOAD": library})


def _environment_row(candidate: Candidate, pairs: int) -> Ratio:
    with_ours = {**candidate.both, **candidate.variables}
    seconds = [(_seconds(candidate, with_ours), _seconds(candidate, candidate.both)) for _ in range(pairs)]
    return ratio_of(_title(candidate.name), candidate.name, "without", seconds, None, images=_GLOBAL_SIZE)


def _seconds(candidate: Candidate, variables: Mapping[str, str]) -> float:
    """Return the seconds of an update with `variables`."""

    def program(updates: int) -> list[str]:
        trained = module("benchmarks.candidates", _WIDTH, _GLOBAL_SIZE, updates)
        return on_ranks("mpi" if candidate.ranks > 1 else "alone", candidate.ranks, trained)

    with running(program(_ENDLESS), variables) if candidate.is_shared else nullcontext():
        return float(measure(program(_UPDATES), variables))


def _title(name: str) -> str:
    return f"candidate {name}, width {_WIDTH:g}, batch {_GLOBAL_SIZE}"


def seconds_of_an_update(comm: Communicator, width: float, global_size: int, updates: int) -> float:
    """Train as one of the ranks, with the environment's number of threads, and return the time."""
    precision = {"threads": share_of_threads(comm)}
    batch = {"micro_size": max(1, global_size // comm.size)}
    config = settings(width, global_size, precision=precision, batch=batch, **QUIET)
    with shared_folder(comm) as folder:
        trainer = open_trainer(config, comm, folder / "run")
        for _ in range(3):
            trainer.advance()
        seconds = median(timed(trainer.advance) for _ in range(updates))
        trainer.close()
    return seconds


if __name__ == "__main__":
    width, global_size, updates = sys.argv[1:]
    tell_measured(lambda comm: seconds_of_an_update(comm, float(width), int(global_size), int(updates)), device_type())
