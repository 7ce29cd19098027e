"""The loss of a rank: Horovod Elastic against our recovery in place and our restart from the last checkpoint.

`python -m benchmarks.elastic [--repeats N] [--json FILE]`. Two ranks train VGG9 at width 0.25 on two cores over
Gloo on this machine; one of them is killed, or stopped (SIGSTOP), or raises an exception. `dist-train launch
--min-ranks` and Elastic continue by themselves; our launch script is started again with one rank.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.elastic_task import GLOBAL_SIZE, MICRO_SIZE, WIDTH
from benchmarks.launched_run import records_of, weights_digest
from benchmarks.launching import beside_python, children_of, descendants, module, running
from benchmarks.subject import settings
from dist_train.config import dump_config
from dist_train.outcome import UsageError
from dist_train.rundir.records import TrainRecord

_ROOT = Path(__file__).resolve().parent.parent
_VARIABLES = {"HOROVOD_CYCLE_TIME": "5"}
_LAUNCH = str(_ROOT / "launch" / "horovodrun.sh")
STEPS = 24
LOST_AFTER = 8
"""Number of finished updates when the rank is lost."""
STOPPED_TIMEOUT = 15.0
"""`comm.timeout` of our runs; the default is 60 s."""
PATIENCE = 60.0
"""Seconds without an update after which a run counts as hanging."""


@dataclass(frozen=True)
class Loss:
    """The result of a run that lost a rank; seconds are None if no update finished within `PATIENCE`."""

    who: str
    what: str
    next_update: float | None
    """Seconds from the loss to the end of the next update, new or repeated."""
    ended: float | None
    """Seconds from the loss to the end of the launcher, if it ends; the rest is the new start."""
    updates_lost: int | None
    """Number of updates that are repeated."""
    same_bits: bool | None
    """Whether the final weights equal those of an undisturbed run."""


_SIGNALS = {"killed": signal.SIGKILL, "stopped": signal.SIGSTOP}

Steps = Sequence[tuple[int, float]]
"""Finished updates with their times."""


def settle(who: str, what: str, before: Steps, lost_at: float, after: Steps, ended: float | None) -> Loss:
    """Return the result, from the updates `before` the loss at time `lost_at` and those `after` it."""
    if not after:
        return Loss(who, what, None, ended, None, None)
    step, finished = after[0]
    repeated = before[-1][0] - (step - 1)
    return Loss(who, what, finished - lost_at, None if ended is None else ended - lost_at, repeated, None)


def ours(what: str, every_steps: int, folder: Path) -> Loss:
    """Run ours, make it lose a rank by `what`, and start it again with one rank."""
    config = _write_config(folder, every_steps)
    run = folder / "run"
    with running([_LAUNCH, "-np", "2", "train", config], _VARIABLES) as process:
        before = _wait_for_steps(lambda: _our_steps(run), LOST_AFTER, time.time() + PATIENCE)
        rank = _rank_of(process.pid, rank=1)
        lost_at = time.time()
        os.kill(rank, _SIGNALS[what])
        process.wait()
        before, ended = _our_steps(run), time.time()
    with running([_LAUNCH, "-np", "1", "train", config], _VARIABLES) as process:
        process.wait()
    after = [step for step in _our_steps(run) if step[1] > ended]
    return settle(f"restart, checkpoint every {every_steps}", what, before, lost_at, after, ended)


def in_place(what: str, folder: Path) -> Loss:
    """Run ours with recovery in place, and make it lose a rank by `what`."""
    run = folder / "run"
    options = ("launch", "-np", 2, "--min-ranks", 1)
    with running(module("dist_train", *options, "train", _write_config(folder, 20)), _VARIABLES) as process:
        _wait_for_steps(lambda: _our_steps(run), LOST_AFTER, time.time() + PATIENCE)
        rank = max(children_of(process.pid))
        before, lost_at = _our_steps(run), time.time()
        os.kill(rank, _SIGNALS[what])
        process.wait()
    return settle("recovery in place", what, before, lost_at, _our_steps(run)[len(before) :], None)


def elastic(what: str, folder: Path) -> Loss:
    """Run Horovod Elastic and make it lose a rank by `what`."""
    fail_at = LOST_AFTER + 1 if what == "exception" else 0
    with running(_elastic_command(folder, fail_at), _VARIABLES) as process:
        before = _wait_for_steps(lambda: _elastic_steps(folder), LOST_AFTER, time.time() + PATIENCE)
        lost_at = time.time()
        if what != "exception":
            rank = int((folder / "rank-1").read_text())
            before, lost_at = _elastic_steps(folder), time.time()
            os.kill(rank, _SIGNALS[what])
        else:
            before, lost_at = before[:LOST_AFTER], before[LOST_AFTER - 1][1]
        done = len(before)
        # An update in progress may still finish with the lost rank's gradients.
        with suppress(TimeoutError):
            _wait_for_steps(lambda: _elastic_steps(folder), done + 3, time.time() + PATIENCE)
        after = _elastic_steps(folder)[done:]
        deadline = time.time() + (PATIENCE if after else 0)
        while process.poll() is None and not (folder / "digest").exists() and time.time() < deadline:
            time.sleep(0.05)
    if len(after) < 3:
        after = []
    return settle("Horovod Elastic", what, before, lost_at, after, None)


def undisturbed(folder: Path) -> tuple[str, str]:
    """Return the digests of the final weights of our and of an elastic run that lose no rank."""
    with running([_LAUNCH, "-np", "2", "train", _write_config(folder, 20)], _VARIABLES) as process:
        process.wait()
    with running(_elastic_command(folder, 0), _VARIABLES) as process:
        process.wait()
    return our_digest(folder), elastic_digest(folder)


def our_digest(folder: Path) -> str:
    """Return the digest of the weights in the last checkpoint of our run; "none" without one."""
    with suppress(UsageError):
        return weights_digest(folder / "run")
    return "none"


def elastic_digest(folder: Path) -> str:
    """Return the digest of the final weights of the elastic run."""
    path = folder / "digest"
    return path.read_text() if path.exists() else "none"


def _write_config(folder: Path, every_steps: int) -> str:
    config = settings(
        WIDTH,
        GLOBAL_SIZE,
        run={"name": "run", "directory": str(folder), "max_steps": STEPS},
        data={"synthetic_samples": 4 * GLOBAL_SIZE},
        model={"ghost_size": MICRO_SIZE},
        batch={"micro_size": MICRO_SIZE},
        evaluation={"every_epochs": 0},
        checkpoint={"every_epochs": 0, "every_steps": every_steps},
        comm={"timeout": STOPPED_TIMEOUT},
        metrics={"enabled": False},
    )
    path = folder / "config.yaml"
    path.write_text(dump_config(config))
    return str(path)


def _elastic_command(folder: Path, fail_at: int) -> list[str]:
    discovery = folder / "discover.sh"
    discovery.write_text("#!/bin/sh\necho localhost:1\necho 127.0.0.1:1\n")
    discovery.chmod(0o755)
    launcher = [beside_python("horovodrun"), "-np", "2", "--min-np", "1", "--max-np", "2"]
    hosts = ["--host-discovery-script", str(discovery), "--network-interface", "lo"]
    return [*launcher, *hosts, *module("benchmarks.elastic_loop", folder, STEPS, fail_at)]


def _rank_of(pid: int, rank: int) -> int:
    """Return the process of rank `rank` of the launcher `pid`: the first descendant with that HOROVOD_RANK."""
    wanted = f"HOROVOD_RANK={rank}".encode()
    for child in descendants(pid):
        with suppress(FileNotFoundError, ProcessLookupError, PermissionError):
            if wanted in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
                return child
    raise RuntimeError(f"there is no rank {rank} below process {pid}")


def _wait_for_steps(steps: Callable[[], Steps], count: int, deadline: float) -> Steps:
    """Return the updates as soon as there are at least `count`. Raises TimeoutError."""
    while len(done := steps()) < count:
        if time.time() > deadline:
            raise TimeoutError(f"only {len(done)} updates of {count}")
        time.sleep(0.002)
    return done


def _our_steps(run: Path) -> Steps:
    return [(record.step, record.time) for record in records_of(run) if isinstance(record, TrainRecord)]


def _elastic_steps(folder: Path) -> Steps:
    path = folder / "steps"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [(int(line.split()[0]), float(line.split()[1])) for line in lines if line.endswith("\n")]


def _in_folder(run: Callable[[Path], Loss], digest: Callable[[Path], str], expected: str) -> Loss:
    with tempfile.TemporaryDirectory(prefix="elastic-", ignore_cleanup_errors=True) as name:
        loss = run(Path(name))
        return loss if loss.next_update is None else replace(loss, same_bits=digest(Path(name)) == expected)


def measure(repeats: int) -> list[Loss]:
    """Measure all losses, both sides in turn, and return the results."""
    with tempfile.TemporaryDirectory(prefix="elastic-") as folder:
        ours_expected, elastic_expected = undisturbed(Path(folder))
    losses = []
    for _ in range(repeats):
        losses.append(_in_folder(partial(elastic, "killed"), elastic_digest, elastic_expected))
        losses.append(_in_folder(partial(in_place, "killed"), our_digest, ours_expected))
        for every in (1, 5):
            losses.append(_in_folder(partial(ours, "killed", every), our_digest, ours_expected))
    losses.append(_in_folder(partial(in_place, "stopped"), our_digest, ours_expected))
    losses.append(_in_folder(partial(ours, "stopped", 1), our_digest, ours_expected))
    losses.append(_in_folder(partial(elastic, "exception"), elastic_digest, elastic_expected))
    losses.append(_in_folder(partial(elastic, "stopped"), elastic_digest, elastic_expected))
    return losses


def table_of(losses: Sequence[Loss]) -> Table:
    """Return a row for each side and kind of loss: medians, and the number of runs."""
    table = Table(title="A rank of two is lost", title_justify="left")
    for column in ("", "loss", "next update, s", "launcher ended, s", "updates lost", "same bits", "runs"):
        table.add_column(column, justify="left" if column in ("", "loss") else "right")
    for who, what in dict.fromkeys((loss.who, loss.what) for loss in losses):
        same = [loss for loss in losses if (loss.who, loss.what) == (who, what)]
        table.add_row(
            who,
            what,
            _median([loss.next_update for loss in same], f"none in {PATIENCE:g} s"),
            _median([loss.ended for loss in same], "-"),
            _median([loss.updates_lost for loss in same], "-"),
            "-" if same[0].same_bits is None else "yes" if all(loss.same_bits for loss in same) else "no",
            str(len(same)),
        )
    return table


def _median(values: Sequence[float | None], missing: str) -> str:
    known = [value for value in values if value is not None]
    return f"{statistics.median(known):.3g}" if known else missing


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.elastic", description=__doc__)
    parser.add_argument("--repeats", type=int, default=3, help="how often a rank is killed on each side")
    parser.add_argument("--json", type=Path, help="also write every result into this file")
    arguments = parser.parse_args()
    losses = measure(arguments.repeats)
    Console(width=140).print(table_of(losses))
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(loss) for loss in losses], indent=2) + "\n")


if __name__ == "__main__":
    main()
