"""What `benchmarks.scaling` is fitted to: start-up, allreduces and steps of real launches on this machine.

Every worker runs `python -m benchmarks.scaling_measure allreduce` or
`... steps UPDATES WIDTH GLOBAL_SIZE`; worker 0 prints what was measured as JSON. All workers compute with one thread.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.subject import QUIET, open_trainer, settings
from benchmarks.timing import timed
from dist_train.cluster.joining import join_workers
from dist_train.cluster.workers import Workers, broadcast_str

CONTROLLERS = ("mpi", "gloo")
CYCLE_MILLISECONDS = {"mpi": 1.0, "gloo": 5.0}
"""Horovod's own, and what `launch/local.sh` sets."""
ALLREDUCE_WORKERS = (1, 2, 4, 8, 16)
STEP_WORKERS = (1, 2, 4)
_LENGTHS = (1, 1 << 10, 1 << 14, 1 << 17, 1 << 20, 2_789_712)
"""64-bit integers of an allreduce; the last are all of VGG9's gradients."""
SUBJECTS = ((0.25, 256), (0.25, 1024), (1.0, 256))
"""Width and global batch of the steps that are timed; micro-batches of 64, so that four workers have one each."""
MICRO_SIZE = 64
_MARK = "measured: "


@dataclass(frozen=True)
class Startup:
    """Seconds from the launcher's start until all workers have met, and until the launcher has ended."""

    controller: str
    workers: int
    met: float
    whole: float


@dataclass(frozen=True)
class Allreduce:
    """Median and least seconds of the sum of `length` 64-bit integers over the workers.

    `kind` is known (the same name again, as in training) or new (a name that is seen for the first time).
    """

    controller: str
    workers: int
    length: int
    kind: str
    seconds: float
    least: float


@dataclass(frozen=True)
class Step:
    """Median and least seconds of an update."""

    controller: str
    workers: int
    width: float
    global_size: int
    seconds: float
    least: float


@dataclass(frozen=True)
class Measurements:
    """All that was measured on a machine of `cores` cores."""

    machine: str
    date: str
    cores: int
    startups: tuple[Startup, ...]
    allreduces: tuple[Allreduce, ...]
    steps: tuple[Step, ...]


def read_measurements(path: Path) -> Measurements:
    """Return what an earlier `measure` has left in `path`."""
    record = json.loads(path.read_text())
    return Measurements(
        machine=record["machine"],
        date=record["date"],
        cores=record["cores"],
        startups=tuple(Startup(**entry) for entry in record["startups"]),
        allreduces=tuple(Allreduce(**entry) for entry in record["allreduces"]),
        steps=tuple(Step(**entry) for entry in record["steps"]),
    )


def measure(machine: str, updates: int, launches: int) -> Measurements:
    """Launch workers over MPI and Gloo and return what they measured; some minutes.

    Every launch is made `launches` times, but those of more than four workers once.
    """
    startups: list[Startup] = []
    allreduces: list[Allreduce] = []
    steps: list[Step] = []
    for controller in CONTROLLERS:
        for workers in ALLREDUCE_WORKERS:
            times = launches if workers <= max(STEP_WORKERS) else 1
            met, whole, rows = zip(*(_launch(controller, workers, "allreduce") for _ in range(times)), strict=True)
            startups.append(Startup(controller, workers, statistics.median(met), statistics.median(whole)))
            allreduces += [Allreduce(controller, workers, **entry) for entry in _pooled(rows, ("length", "kind"))]
        for width, global_size in SUBJECTS:
            subject = ("steps", str(updates), str(width), str(global_size))
            rounds = [
                {workers: _launch(controller, workers, *subject)[2] for workers in STEP_WORKERS}
                for _ in range(launches)
            ]
            for workers in STEP_WORKERS:
                [entry] = _pooled([each[workers] for each in rounds], ("width", "global_size"))
                steps.append(Step(controller, workers, **entry))
    cores = len(os.sched_getaffinity(0))
    date = time.strftime("%Y-%m-%d")
    return Measurements(machine, date, cores, tuple(startups), tuple(allreduces), tuple(steps))


def _pooled(launches: Sequence[Sequence[Mapping[str, Any]]], keys: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield one entry for each value of `keys`: the median of the launches' medians, the least of all."""
    entries = [entry for launch in launches for entry in launch]
    for key in dict.fromkeys(tuple(entry[name] for name in keys) for entry in entries):
        same = [entry for entry in entries if tuple(entry[name] for name in keys) == key]
        seconds = statistics.median(entry["seconds"] for entry in same)
        yield {**dict(zip(keys, key, strict=True)), "seconds": seconds, "least": min(entry["least"] for entry in same)}


def machine_name() -> str:
    """Return this machine in words."""
    return f"{os.cpu_count()} cores {platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}"


def _launch(controller: str, workers: int, *arguments: str) -> tuple[float, float, list[dict[str, Any]]]:
    """Return the seconds until the workers had met and until the launcher ended, and what they measured."""
    launcher = {
        "gloo": [str(Path(sys.executable).parent / "horovodrun"), "-np", str(workers), "--gloo"],
        "mpi": ["mpirun", "-np", str(workers), "--bind-to", "none", "--oversubscribe"],
    }[controller]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HOROVOD_CYCLE_TIME": str(CYCLE_MILLISECONDS[controller]),
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    }
    program = [sys.executable, "-m", "benchmarks.scaling_measure", *arguments]
    begun = time.time()
    ended = subprocess.run(
        [*launcher, *program],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=600,
    )
    whole = time.time() - begun
    [line] = [line for line in ended.stdout.splitlines() if _MARK in line]
    record = json.loads(line.split(_MARK, 1)[1])
    return record["met"] - begun, whole, record["entries"]


def main() -> None:
    """Measure on every worker, print on the first."""
    workers = join_workers(timeout=600.0, device_type="cpu")
    workers.barrier()
    met = time.time()
    torch.set_num_threads(1)
    if sys.argv[1] == "allreduce":
        entries = list(_allreduces(workers))
    else:
        entries = [_steps(workers, int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4]))]
    workers.barrier()
    if workers.rank == 0:
        print(_MARK + json.dumps({"met": met, "entries": entries}), flush=True)
    workers.close()


def _allreduces(workers: Workers) -> Iterator[dict[str, object]]:
    for kind in ("known", "new"):
        for length in _LENGTHS if kind == "known" else _LENGTHS[:1]:
            repeats = 40 if length <= 1 << 14 else 10
            tensor = torch.zeros(length, dtype=torch.int64)
            seconds = []
            for repeat in range(repeats + 3):
                name = f"{kind}.{length}" + (f".{repeat}" if kind == "new" else "")
                seconds.append(timed(partial(_sum, workers, tensor, name)))
            yield {"length": length, "kind": kind, **_summary(seconds[3:])}


def _sum(workers: Workers, tensor: torch.Tensor, name: str) -> None:
    workers.allreduce_async(tensor, name).wait()


def _steps(workers: Workers, updates: int, width: float, global_size: int) -> dict[str, object]:
    folder = Path(broadcast_str(workers, tempfile.mkdtemp(), "folder"))
    sections = {**QUIET, "batch": {"micro_size": MICRO_SIZE}, "noise": {"method": "smoothout", "amplitude": 1e-4}}
    trainer = open_trainer(settings(width, global_size, **sections), workers, folder / "run")
    trainer.advance()
    seconds = [timed(trainer.advance) for _ in range(updates)]
    trainer.close()
    workers.barrier()
    if workers.rank == 0:
        shutil.rmtree(folder)
    return {"width": width, "global_size": global_size, **_summary(seconds)}


def _summary(seconds: list[float]) -> dict[str, float]:
    return {"seconds": statistics.median(seconds), "least": min(seconds)}


if __name__ == "__main__":
    main()
