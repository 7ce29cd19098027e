"""Time until the next finished update when a run loses a rank, and when a rank joins again.

`python -m benchmarks.recovery [--kills N] [--stops N] [--pairs N]`. Three ranks train VGG9 at width 0.25 over Gloo
under `dist-train launch --min-ranks --restarts`; one of them is killed or stopped at a random moment, and restarted by
the launcher. Then the same run without faults, with and without `--min-ranks`, in turn.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.launched_run import records_of
from benchmarks.launching import children_of, module, running
from benchmarks.subject import settings
from dist_train.config import dump_config
from dist_train.rundir.records import EventRecord, TrainRecord

TIMEOUT = 5.0
"""`comm.timeout`: how long the ranks wait for a stopped one."""
PATIENCE = 120.0
_STEPS_OF_A_PAIR = 60
_WARM_UP = 10


@dataclass(frozen=True)
class Row:
    """The seconds of one kind of event, without the update that is made or repeated meanwhile."""

    what: str
    seconds: tuple[float, ...]


def measure_faults(kills: int, stops: int, folder: Path) -> list[Row]:
    """Return the cost of losing a rank by SIGKILL and by SIGSTOP, and of a rank joining."""
    chosen = random.Random(0)
    found: dict[str, list[float]] = {"killed": [], "stopped": [], "joined": []}
    run = folder / "run"
    with _launch(folder, ["-np", "3", "--min-ranks", "1", "--restarts", "1000"], epochs=100_000) as process:
        _wait_for(lambda: len(records_of(run)) > _WARM_UP)
        for number in (signal.SIGKILL,) * kills + (signal.SIGSTOP,) * stops:
            time.sleep(chosen.uniform(0.5, 1.0))
            before = len(_events(run, "rank_lost"))
            victim = chosen.choice(sorted(children_of(process.pid)))
            hit = time.time()
            os.kill(victim, number)
            _wait_for(lambda: len(_events(run, "rank_lost")) > before)  # noqa: B023  # called before the next turn
            lost = _events(run, "rank_lost")[before]
            took = lost.time - hit - _update_seconds(run, lost.step)
            is_stop = number == signal.SIGSTOP
            found["stopped" if is_stop else "killed"].append(took - (TIMEOUT if is_stop else 0.0))
            _wait_for(lambda: len(_events(run, "rank_joined")) > before)  # noqa: B023
            joined = _events(run, "rank_joined")[before]
            found["joined"].append(float(joined.details["seconds"] or 0) - _update_seconds(run, joined.step))
    names = {
        "killed": "SIGKILL to the next finished update, without the update",
        "stopped": f"SIGSTOP to the next finished update, without the update and comm.timeout ({TIMEOUT:g} s)",
        "joined": "a rank joins: from the meeting to the next finished update, without the update",
    }
    return [Row(names[kind], tuple(seconds)) for kind, seconds in found.items() if seconds]


def measure_pairs(pairs: int, folder: Path) -> Row:
    """Return the ratios of the median update with `--min-ranks` to the one without."""
    ratios = []
    for pair in range(pairs):
        medians = {}
        options = {"elastic": ["--min-ranks", "1"], "plain": []}
        for name in sorted(options, reverse=pair % 2 == 1):
            place = folder / f"{name}-{pair}"
            place.mkdir()
            with _launch(place, ["-np", "2", *options[name]], max_steps=_STEPS_OF_A_PAIR) as process:
                process.wait()
            updates = [each for each in records_of(place / "run") if isinstance(each, TrainRecord)]
            medians[name] = statistics.median(each.step_seconds for each in updates[_WARM_UP:])
        ratios.append(medians["elastic"] / medians["plain"])
    return Row("no faults: median update with --min-ranks over without", tuple(ratios))


def table_of(rows: Sequence[Row]) -> Table:
    """Return a table with median, minimum and maximum of each row."""
    table = Table(title="Recovery in place", title_justify="left")
    for column in ("", "median", "least", "most", "runs"):
        table.add_column(column, justify="left" if not column else "right")
    for row in rows:
        numbers = (statistics.median(row.seconds), min(row.seconds), max(row.seconds))
        table.add_row(row.what, *(f"{number:.3f}" for number in numbers), str(len(row.seconds)))
    return table


def _launch(folder: Path, options: Sequence[str], **run: int) -> AbstractContextManager[subprocess.Popen[bytes]]:
    written = settings(
        0.25,
        96,
        run={"name": "run", "directory": str(folder), **run},
        data={"synthetic_samples": 1024},
        model={"ghost_size": 16},
        batch={"micro_size": 16},
        evaluation={"every_epochs": 0},
        checkpoint={"every_epochs": 0, "every_steps": 50},
        comm={"timeout": TIMEOUT},
        metrics={"enabled": False},
    )
    config = folder / "config.yaml"
    config.write_text(dump_config(written))
    return running(module("dist_train", "launch", *options, "train", config), {})


def _events(run: Path, name: str) -> list[EventRecord]:
    return [each for each in records_of(run) if isinstance(each, EventRecord) and each.event == name]


def _update_seconds(run: Path, step: int) -> float:
    """Return the seconds of update `step`, once it is recorded."""

    def recorded_seconds() -> float:
        updates = (each for each in records_of(run) if isinstance(each, TrainRecord) and each.step == step)
        return next((each.step_seconds for each in updates), 0.0)

    return _wait_for(recorded_seconds)


def _wait_for(value: Callable[[], float]) -> float:
    """Return the first value that is not 0. Raises TimeoutError."""
    deadline = time.time() + PATIENCE
    while not (found := value()):
        if time.time() > deadline:
            raise TimeoutError("the run does not continue")
        time.sleep(0.02)
    return found


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--stops", type=int, default=5)
    parser.add_argument("--pairs", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="recovery-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        rows = measure_faults(arguments.kills, arguments.stops, folder) if arguments.kills + arguments.stops else []
        rows += [measure_pairs(arguments.pairs, folder)] if arguments.pairs else []
    Console(width=120).print(table_of(rows))


if __name__ == "__main__":
    main()
