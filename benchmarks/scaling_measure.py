"""The measurements that `benchmarks.scaling` fits: start-up, allreduces and steps of real launches on this machine.

Every rank runs `python -m benchmarks.scaling_measure allreduce` or
`... steps UPDATES WIDTH GLOBAL_SIZE`; rank 0 prints the measurements. All ranks compute with one thread.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.launching import measure as measure_launch
from benchmarks.launching import module, on_ranks
from benchmarks.ranks import shared_folder, tell_measured
from benchmarks.subject import QUIET, open_trainer, settings
from benchmarks.timing import timed
from dist_train.cluster.communicator import Communicator

CONTROLLERS = ("mpi", "gloo", "torch")
"""Horovod over MPI, Horovod over Gloo, and torch.distributed over Gloo, started by torchrun."""
CYCLE_MILLISECONDS = {"mpi": 1.0, "gloo": 5.0, "torch": 0.0}
"""Horovod's cycle; torch.distributed has none."""
RANKS = (1, 2, 4, 8, 16)
_MAX_REPEATED_RANKS = 4
"""Launches of up to this many ranks are repeated."""
_LENGTHS = (1, 1 << 10, 1 << 14, 1 << 17, 1 << 20, 2_789_712)
"""Numbers of 64-bit integers of an allreduce; the last is the number of VGG9's gradients."""
SUBJECTS = ((0.25, 256), (0.25, 1024), (1.0, 256))
"""Width and global batch of the timed steps, in micro-batches of 64; each rank has at least one."""
MICRO_SIZE = 64


@dataclass(frozen=True)
class Startup:
    """Seconds from the launcher's start until all ranks are connected, and until the launcher has ended."""

    controller: str
    ranks: int
    met: float
    whole: float


@dataclass(frozen=True)
class Allreduce:
    """Median and minimum seconds of the sum of `length` 64-bit integers over the ranks.

    `kind` is known (a name used before, as in training) or new (a name used for the first time).
    """

    controller: str
    ranks: int
    length: int
    kind: str
    seconds: float
    least: float


@dataclass(frozen=True)
class Step:
    """Median and minimum seconds of an update."""

    controller: str
    ranks: int
    width: float
    global_size: int
    seconds: float
    least: float


@dataclass(frozen=True)
class Measurements:
    """Everything measured on a machine of `cores` cores; other programs used the share `others` of their time."""

    machine: str
    date: str
    cores: int
    others: float
    startups: tuple[Startup, ...]
    allreduces: tuple[Allreduce, ...]
    steps: tuple[Step, ...]


def read_measurements(path: Path) -> Measurements:
    """Return the measurements that an earlier `measure` stored in `path`."""
    record = json.loads(path.read_text())
    return Measurements(
        machine=record["machine"],
        date=record["date"],
        cores=record["cores"],
        others=record["others"],
        startups=tuple(Startup(**entry) for entry in record["startups"]),
        allreduces=tuple(Allreduce(**entry) for entry in record["allreduces"]),
        steps=tuple(Step(**entry) for entry in record["steps"]),
    )


def measure(machine: str, updates: int, launches: int) -> Measurements:
    """Launch ranks over every engine in turn, and return their measurements; takes some minutes.

    Every launch is repeated `launches` times, but launches of more than four ranks are made once.
    """
    cores = len(os.sched_getaffinity(0))
    started, busy, ours = time.monotonic(), _busy_seconds(), _our_seconds()
    startups: list[Startup] = []
    allreduces: list[Allreduce] = []
    steps: list[Step] = []
    for ranks in RANKS:
        times = launches if ranks <= _MAX_REPEATED_RANKS else 1
        for controller, launched in _in_turn(times, ranks, "allreduce").items():
            met, whole, rows = zip(*launched, strict=True)
            startups.append(Startup(controller, ranks, statistics.median(met), statistics.median(whole)))
            allreduces += [Allreduce(controller, ranks, **entry) for entry in _pooled(rows, ("length", "kind"))]
        for width, global_size in SUBJECTS:
            if ranks <= global_size // MICRO_SIZE:
                for controller, launched in _in_turn(times, ranks, "steps", updates, width, global_size).items():
                    [entry] = _pooled([entries for _, _, entries in launched], ("width", "global_size"))
                    steps.append(Step(controller, ranks, **entry))
    elapsed, busy, ours = time.monotonic() - started, _busy_seconds() - busy, _our_seconds() - ours
    others = max(0.0, busy - ours) / (elapsed * cores)
    order = {controller: place for place, controller in enumerate(CONTROLLERS)}
    startups.sort(key=lambda row: order[row.controller])
    allreduces.sort(key=lambda row: order[row.controller])
    steps.sort(key=lambda row: (order[row.controller], SUBJECTS.index((row.width, row.global_size))))
    date = time.strftime("%Y-%m-%d")
    return Measurements(machine, date, cores, others, tuple(startups), tuple(allreduces), tuple(steps))


def _in_turn(times: int, ranks: int, *arguments: object) -> dict[str, list[tuple[float, float, list[dict[str, Any]]]]]:
    """Launch over the engines in turn, `times` times, and return the results of `_launch` for each."""
    rounds = [{controller: _launch(controller, ranks, *arguments) for controller in CONTROLLERS} for _ in range(times)]
    return {controller: [each[controller] for each in rounds] for controller in CONTROLLERS}


def _busy_seconds() -> float:
    """Return the CPU seconds that all processes of this machine have used so far."""
    user, nice, system = Path("/proc/stat").read_text().split()[1:4]
    return (int(user) + int(nice) + int(system)) / os.sysconf("SC_CLK_TCK")


def _our_seconds() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def _pooled(launches: Sequence[Sequence[Mapping[str, Any]]], keys: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield one entry for each value of `keys`: the median of the launches' medians, and the minimum of all."""
    entries = [entry for launch in launches for entry in launch]
    for key in dict.fromkeys(tuple(entry[name] for name in keys) for entry in entries):
        same = [entry for entry in entries if tuple(entry[name] for name in keys) == key]
        seconds = statistics.median(entry["seconds"] for entry in same)
        yield {**dict(zip(keys, key, strict=True)), "seconds": seconds, "least": min(entry["least"] for entry in same)}


def machine_name() -> str:
    """Return a description of this machine."""
    return f"{os.cpu_count()} cores {platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}"


def _launch(controller: str, ranks: int, *arguments: object) -> tuple[float, float, list[dict[str, Any]]]:
    """Return the seconds until the ranks were connected and until the launcher ended, and their measurements."""
    variables = {"HOROVOD_CYCLE_TIME": str(CYCLE_MILLISECONDS[controller])}
    program = module("benchmarks.scaling_measure", *arguments)
    started = time.time()
    record = measure_launch(on_ranks(controller, ranks, program), variables)
    return record["met"] - started, time.time() - started, record["entries"]


def _measured_on(comm: Communicator) -> Mapping[str, object]:
    """Return what `_launch` asks for on the command line, and when the ranks were connected."""
    comm.barrier()
    met = time.time()
    torch.set_num_threads(1)
    if sys.argv[1] == "allreduce":
        entries = list(_allreduces(comm))
    else:
        entries = [_steps(comm, int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4]))]
    comm.barrier()
    return {"met": met, "entries": entries}


def _allreduces(comm: Communicator) -> Iterator[dict[str, object]]:
    for kind in ("known", "new"):
        for length in _LENGTHS if kind == "known" else _LENGTHS[:1]:
            repeats = 40 if length <= 1 << 14 else 10
            tensor = torch.zeros(length, dtype=torch.int64)
            seconds = []
            for repeat in range(repeats + 3):
                name = f"{kind}.{length}" + (f".{repeat}" if kind == "new" else "")
                seconds.append(timed(partial(_sum, comm, tensor, name)))
            yield {"length": length, "kind": kind, **_summary(seconds[3:])}


def _sum(comm: Communicator, tensor: torch.Tensor, name: str) -> None:
    comm.allreduce_async(tensor, name).wait()


def _steps(comm: Communicator, updates: int, width: float, global_size: int) -> dict[str, object]:
    sections = {**QUIET, "batch": {"micro_size": MICRO_SIZE}, "noise": {"method": "smoothout", "amplitude": 1e-4}}
    with shared_folder(comm) as folder:
        trainer = open_trainer(settings(width, global_size, **sections), comm, folder / "run")
        trainer.advance()
        seconds = [timed(trainer.advance) for _ in range(updates)]
        trainer.close()
    return {"width": width, "global_size": global_size, **_summary(seconds)}


def _summary(seconds: list[float]) -> dict[str, float]:
    return {"seconds": statistics.median(seconds), "least": min(seconds)}


if __name__ == "__main__":
    tell_measured(_measured_on)
