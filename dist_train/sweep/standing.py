"""How the runs of a study stand, and whether one that did not finish is worth starting again."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from dist_train.cluster.launch import current_job, job_states
from dist_train.config import Config, ConfigError, differences, load_config
from dist_train.monitoring import wording
from dist_train.outcome import ExitCode, escaped
from dist_train.rundir import atomic
from dist_train.rundir.paths import RunDirectory
from dist_train.rundir.records import EvaluationRecord, read_last_records
from dist_train.rundir.status import Status, StatusFile, read_status
from dist_train.sweep.planned_runs import PlannedRun
from dist_train.watch.run_table import ALIVE, COLOURS, RunSummary, read_runs

_UNRECOVERABLE = frozenset({ExitCode.USAGE, ExitCode.DIVERGED, ExitCode.DISAGREEMENT})


@dataclass(frozen=True)
class Requeues:
    """Requeues in a row without a new checkpoint, and the step of the newest one at the last of them."""

    without_progress: int = 0
    step: int = 0


@dataclass(frozen=True)
class Decision:
    """Whether to start the run again, and why, in a sentence."""

    requeue: bool
    why: str


def decide(run: Path, limit: int, launch: str | None = None, death: str = "") -> Decision:
    """Decide about `run`, whose last launch (called `launch`, where that is known) has ended, and count.

    `death` is what is known of a rank that was killed: the others may have had no time to write it down. A run that
    has been requeued `limit` times in a row without a new checkpoint is given up: its status says so.
    """
    status = read_status(RunDirectory(run).status)
    if status is not None and launch is not None and status.launch != launch:
        status = replace(status, exit_code=None, reason="the last launch ended before it wrote a status")
    if status is not None and status.exit_code == ExitCode.FINISHED:
        return Decision(False, "the run has finished")
    if status is not None and status.exit_code in _UNRECOVERABLE:
        return Decision(False, f"the run would end in the same way: {status.reason}")
    step = newest_step(run)
    before = read_requeues(run)
    count = before.without_progress if step <= before.step else 0
    if count >= limit:
        reason = _end_of(status, death)
        if limit > 0:
            reason = (
                f"given up after {count} requeue{'s' if count != 1 else ''} in a row without a checkpoint after step "
                f"{step}; the last time: {reason}"
            )
        _give_up(run, status, reason)
        return Decision(False, reason)
    write_requeues(run, Requeues(count + 1, step))
    place = f"from step {step}" if step else "from the beginning"
    return Decision(True, f"continues {place}, requeue {count + 1} of at most {limit} without a new checkpoint")


def newest_step(run: Path) -> int:
    """Return the step of the newest whole checkpoint in `run`; 0 where there is none."""
    return max(RunDirectory(run).checkpoint_steps(), default=0)


def read_requeues(run: Path) -> Requeues:
    """Return what has been counted; nothing where there is no count that can be read."""
    try:
        return Requeues(**json.loads(atomic.read_regular(RunDirectory(run).requeues)))
    except (OSError, ValueError, TypeError):
        return Requeues()


def write_requeues(run: Path, requeues: Requeues) -> None:
    """Write the count down."""
    run.mkdir(mode=0o700, parents=True, exist_ok=True)
    atomic.write_text(RunDirectory(run).requeues, json.dumps(asdict(requeues)) + "\n")


def _end_of(status: Status | None, death: str) -> str:
    cause = f": {death}" if death else ""
    if status is None:
        return f"it ended before it wrote a status{cause}"
    if status.exit_code is None and status.state not in ("failed", "stopped"):
        return f"it died in state {status.state} at step {status.step}{cause}"
    return status.reason or f"it ended in state {status.state} at step {status.step}"


def _give_up(run: Path, status: Status | None, reason: str) -> None:
    """Set the run's status to failed; a requeue by hand begins the count anew."""
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    last = status or StatusFile(RunDirectory(run).status, world_size=0).current
    ended = replace(last, state="failed", exit_code=int(ExitCode.FAULT), reason=reason, updated=now, finished=now)
    run.mkdir(mode=0o700, parents=True, exist_ok=True)
    atomic.write_text(RunDirectory(run).status, json.dumps(asdict(ended), indent=2) + "\n")
    write_requeues(run, Requeues(0, newest_step(run)))


Next = Literal["start", "skip", "busy", "unrecoverable"]
_ENOUGH = 1 << 20  # bytes at the end of metrics.jsonl, in which the last evaluation is found
_JOB_IS_ALIVE = ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "REQUEUED")


@dataclass(frozen=True)
class Standing:
    """How a run stands, and what a sweep does `then`: start it, skip it where it has finished, leave it where another
    process is at it, or report it as unrecoverable. `accuracy` is that of the last evaluation on the test set.
    """

    run: PlannedRun
    state: str
    note: str
    then: Next
    done: float | None = None
    accuracy: float | None = None


def standing_of(run: PlannedRun) -> Standing:
    """Return how `run` stands, from what it left behind."""
    summaries = read_runs(run.directory) if run.directory.is_dir() else ()
    summary = next((summary for summary in summaries if summary.directory == run.directory), None)
    if summary is None:
        return Standing(run, "waiting", "", "start")
    state, note = summary.state, summary.note
    if state in ALIVE and (gone := _job_is_gone(summary)):
        state, note = "lost", gone
    then, why = _next(run, state, note)
    done = summary.step / summary.total_steps if summary.step is not None and summary.total_steps else None
    return Standing(run, state, why, then, done, _last_accuracy(run.files.metrics))


def render(standings: Sequence[Standing]) -> Table:
    """Return the runs as a table."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, header_style="bold")
    table.add_column("number", justify="right", no_wrap=True)
    for heading in ("run", "variant"):
        table.add_column(heading, overflow="fold")
    table.add_column("seed", justify="right", no_wrap=True)
    table.add_column("state", no_wrap=True)
    for heading in ("done", "test accuracy"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("note", overflow="fold")
    for standing in standings:
        run = standing.run
        table.add_row(
            str(run.number),
            Text(escaped(run.name)),
            Text(escaped(run.variant)),
            str(run.seed),
            Text(standing.state, style=COLOURS.get(standing.state, "")),
            "" if standing.done is None else f"{standing.done:.0%}",
            "" if standing.accuracy is None else wording.percent(standing.accuracy),
            Text(escaped(standing.note)),
        )
    return table


def as_ranges(numbers: Sequence[int]) -> str:
    """Return ascending numbers as `sbatch --array` takes them: 1-3,7."""
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)


def _next(run: PlannedRun, state: str, note: str) -> tuple[Next, str]:
    """Return what a sweep does with a run in `state`, and what there is to say of it."""
    if state in ALIVE:
        return "busy", note or "another process is at it"
    began = _begun_config(run)
    changed = differences(began, run.config) if began else []
    anew = f"move {run.directory} away to run it anew"
    # Without a checkpoint there is nothing that the settings must agree with.
    if changed and (state == "finished" or newest_step(run.directory)):
        return "unrecoverable", f"began with other settings ({'; '.join(map(str, changed))}); {anew}"
    if state == "finished":
        same_end = began is None or began.run.max_steps == run.config.run.max_steps
        return ("skip", note) if same_end else ("start", "run.max_steps is another now")
    status = read_status(run.files.status)
    if status is not None and status.exit_code == ExitCode.DIVERGED and not changed:
        return "unrecoverable", f"{note}; {anew}"
    return "start", note


def _begun_config(run: PlannedRun) -> Config | None:
    with suppress(ConfigError):
        return load_config(run.files.config)
    return None


def _job_is_gone(summary: RunSummary) -> str:
    """Return why a run that seems alive is not: its Slurm job has ended, or is ours, requeued."""
    if not summary.slurm_job:
        return ""
    ours = current_job()
    if ours is not None and ours.id == summary.slurm_job:
        return "the job was started again"
    state = job_states([summary.slurm_job]).get(summary.slurm_job, "")
    word = re.match(r"[A-Z_]*", state)
    return f"its job {summary.slurm_job} is {state}" if word and word[0] and word[0] not in _JOB_IS_ALIVE else ""


def _last_accuracy(metrics: Path) -> float | None:
    try:
        records = read_last_records(metrics, _ENOUGH)
    except OSError:
        return None
    tested = [record for record in records if isinstance(record, EvaluationRecord) and record.split == "test"]
    return tested[-1].accuracy if tested else None
