"""The state of a study's runs, what to do with each next, and the results reported to an Optuna search."""

from __future__ import annotations

import json
import math
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean
from typing import Literal

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from dist_train.cluster.launch import JOB_IS_ALIVE, current_job, job_states
from dist_train.config import ConfigError, differences, load_config
from dist_train.monitoring import wording
from dist_train.outcome import ExitCode, escaped, writing
from dist_train.rundir import atomic
from dist_train.rundir.paths import DISK_FULL, RunDirectory, read_holder
from dist_train.rundir.records import EvaluationRecord, read_last_records, read_records
from dist_train.rundir.status import State, Status, StatusFile, read_status
from dist_train.sweep.planned_runs import Plan, PlannedRun, optuna_trials, plan_study, write_plan
from dist_train.sweep.study_file import OptunaTrials
from dist_train.watch.run_table import ALIVE, COLOURS, RunSummary, read_runs

_UNRECOVERABLE = frozenset({ExitCode.USAGE, ExitCode.DIVERGED, ExitCode.DISAGREEMENT})

_REFUSAL = re.compile(
    r"Unable to create step .*: (More processors|Requested (node config|partition|time)|Memory required|Job .*violates)"
    r"|Invalid (generic resource|MPI type|--|node name|numeric|account|partition|distribution)|\bunrecogni[sz]ed option"
    r"|cannot find mpi plugin|not enough slots|more processes than|Please correct your command line"
)
"""Messages of srun and mpirun about a launch that they would refuse again."""
_KILLED = re.compile(r"was killed by signal|^srun: error: .*: tasks? .*: Killed$")
_NO_CAUSE = re.compile(r"-*$|dist-train: warning|srun: (job|Job|Step|jobid)\b|srun: error: .*: Exited with exit code")
_MOST_LINES = 3
_LARGEST_PROBE = 1 << 20


@dataclass(frozen=True)
class Requeues:
    """Requeues in a row without a new checkpoint, the last one's step, and the restarts in the job since."""

    without_progress: int = 0
    step: int = 0
    restarts: int = 0


@dataclass(frozen=True)
class EndedLaunch:
    """What a batch script knows of the ended launch: its id, exit code, and the last lines of launcher and ranks."""

    id: str | None = None
    code: int | None = None
    words: Sequence[str] = ()

    @property
    def was_refused(self) -> bool:
        """Whether the same launch would be refused again, by the ranks or by the launcher."""
        return self.code == ExitCode.USAGE or any(map(_REFUSAL.search, self.words))

    @property
    def cause(self) -> str:
        """The most informative lines: about a killed rank, from dist-train, or else from the launcher."""
        lines = [line for line in self.words if not _NO_CAUSE.match(line)]
        killed = [line for line in lines if _KILLED.search(line)]
        # The parent process of the rank that died first is more exact than srun, which reports all tasks of a node.
        exact = [line for line in killed if not line.startswith("srun")]
        ours = [line.removeprefix("dist-train: ") for line in lines if line.startswith("dist-train: ")]
        return "; ".join((exact[:1] or killed or ours[:1] or list(dict.fromkeys(lines)))[:_MOST_LINES])


Action = Literal["requeue", "restart", "end"]


@dataclass(frozen=True)
class Decision:
    """What the batch script does next: requeue its job, restart the run within the job, or end with `code`; and why."""

    action: Action
    why: str
    code: ExitCode = ExitCode.FINISHED


def decide(run: Path, limit: int, launch: EndedLaunch = EndedLaunch(), restarts: int = 0) -> Decision:
    """Decide what follows the ended launch of `run`, and update the counts.

    The run is restarted within its job up to `restarts` times, then requeued up to `limit` times in a row without a new
    checkpoint, then given up. The decision is written to the run's status, unless another job is running it.
    """
    files = RunDirectory(run)
    status = read_status(files.status)
    is_silent = status is None or (launch.id is not None and status.launch != launch.id)
    if is_silent and launch.was_refused:
        return _give_up(files, status, launch.cause or "the ranks refused to start", ExitCode.USAGE)
    if status is not None and is_silent:
        status = replace(status, state="stopped", exit_code=None, reason="")
    if status is not None and status.exit_code == ExitCode.FINISHED:
        return Decision("end", "the run has finished", ExitCode.FAULT)
    if status is not None and status.exit_code in _UNRECOVERABLE:
        return Decision("end", f"the run would end the same way again: {status.reason}", ExitCode.FAULT)
    reason = _end_of(status, launch.cause, is_silent)
    if not _has_room(files):
        why = f"{reason}; not started again, since the disk of {run} is full: free space, and submit it again"
        return _give_up(files, status, why, ExitCode.FAULT)
    step = newest_step(run)
    before = read_requeues(run)
    if step > before.step:
        before = Requeues(step=step)
    count = before.without_progress
    place = f"from step {step}" if step else "from the beginning"
    try:
        if before.restarts < restarts:
            write_requeues(run, replace(before, restarts=before.restarts + 1))
            return Decision("restart", f"continues {place}, restart {before.restarts + 1} of at most {restarts}")
        if count >= limit:
            write_requeues(run, Requeues(0, step))
            if limit > 0:
                reason = (
                    f"given up after {count} requeue{'s' if count != 1 else ''} in a row without a checkpoint after "
                    f"step {step}; the last time: {reason}"
                )
            return _give_up(files, status, reason, ExitCode.FAULT)
        write_requeues(run, Requeues(count + 1, step))
    except OSError as error:
        why = f"{reason}; not started again, since {files.requeues} cannot be written: {error.strerror}"
        return _give_up(files, status, why, ExitCode.FAULT)
    _write_end(files, status, "stopped", f"{reason}; to be started again", ExitCode.STOPPED)
    return Decision(
        "requeue", f"continues {place}, requeue {count + 1} of at most {limit} without a new checkpoint; {reason}"
    )


def newest_step(run: Path) -> int:
    """Return the step of the newest complete checkpoint in `run`; 0 if there is none."""
    return max(RunDirectory(run).checkpoint_steps(), default=0)


def read_requeues(run: Path) -> Requeues:
    """Return the stored counts; zeros if there are none or they cannot be read."""
    try:
        return Requeues(**json.loads(atomic.read_regular(RunDirectory(run).requeues)))
    except (OSError, ValueError, TypeError):
        return Requeues()


def write_requeues(run: Path, requeues: Requeues) -> None:
    """Store the counts, on a full disk in the reserved space. Raises OSError."""
    run.mkdir(mode=0o700, parents=True, exist_ok=True)
    files = RunDirectory(run)
    files.spend_reserve(lambda: atomic.write_text(files.requeues, json.dumps(asdict(requeues)) + "\n"))


def _has_room(files: RunDirectory) -> bool:
    """Whether another checkpoint seems to fit; writes a probe, because a quota shows only on writing."""
    try:
        size = max((path.stat().st_size for path in files.checkpoints.glob("step-*.pt")), default=0)
        if size == 0:
            return True
        with tempfile.TemporaryFile(dir=files.checkpoints) as probe:
            probe.write(secrets.token_bytes(min(size, _LARGEST_PROBE)))
            probe.flush()
            os.fsync(probe.fileno())
            return shutil.disk_usage(files.checkpoints).free + probe.tell() >= size
    except OSError as error:
        return error.errno not in DISK_FULL


def _end_of(status: Status | None, cause: str, is_silent: bool) -> str:
    cause = f": {cause}" if cause else ""
    if status is None or is_silent:
        return f"the last launch ended before it wrote a status{cause}"
    if status.exit_code is None and status.state not in ("failed", "stopped"):
        return f"it died in state {status.state} at step {status.step}{cause}"
    return status.reason or f"it ended in state {status.state} at step {status.step}"


def _give_up(files: RunDirectory, status: Status | None, reason: str, code: ExitCode) -> Decision:
    _write_end(files, status, "failed", reason, code)
    return Decision("end", reason, code)


def _write_end(files: RunDirectory, status: Status | None, state: State, reason: str, code: ExitCode) -> None:
    """Write the run's status, unless another job is running it; on a disk error the old status stays."""
    job = current_job()
    holder = read_holder(files.lock)
    if holder is not None and holder.slurm_job != (job.id if job else ""):
        return
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    last = status or StatusFile(files.status, world_size=0).current
    ended = replace(last, state=state, exit_code=int(code), reason=reason, updated=now, finished=now)
    with suppress(OSError):
        files.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        files.spend_reserve(lambda: atomic.write_text(files.status, json.dumps(asdict(ended), indent=2) + "\n"))


Next = Literal["start", "skip", "busy", "unrecoverable"]
_ENOUGH = 1 << 20  # bytes at the end of metrics.jsonl, in which the last evaluation is found


@dataclass(frozen=True)
class Standing:
    """The state of a run, its last test accuracy, and what a sweep does `then` (skip: it has finished)."""

    run: PlannedRun
    state: str
    note: str
    then: Next
    done: float | None = None
    accuracy: float | None = None


def standing_of(run: PlannedRun) -> Standing:
    """Return the standing of `run`, read from its files."""
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
    for heading in ("number", "run", "variant", "seed", "state", "done", "test accuracy", "note"):
        if heading in ("run", "variant", "note"):
            table.add_column(heading, overflow="fold")
        else:
            table.add_column(heading, justify="left" if heading == "state" else "right", no_wrap=True)
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


def numbers_left(plan: Plan, runs: Sequence[PlannedRun]) -> str:
    """Return the numbers of the `runs` to be started and of trials not suggested yet, as ranges; empty if none."""
    return as_ranges(sorted([*(run.number for run in runs if standing_of(run).then == "start"), *plan.unasked]))


def as_ranges(numbers: Sequence[int]) -> str:
    """Return ascending numbers in the syntax of `sbatch --array`, such as 1-3,7."""
    ranges: list[list[int]] = []
    for number in numbers:
        if not ranges or number != ranges[-1][1] + 1:
            ranges.append([number, number])
        ranges[-1][1] = number
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)


def _next(run: PlannedRun, state: str, note: str) -> tuple[Next, str]:
    """Return what a sweep does with a run in `state`, and the note about it."""
    if state in ALIVE:
        return "busy", note or "another process is running it"
    began = None
    with suppress(ConfigError):
        began = load_config(run.files.config)
    changed = differences(began, run.config) if began else []
    fix = f"move {run.directory} away to run it from the start"
    # Without a checkpoint there is nothing that the settings must match.
    if changed and (state == "finished" or newest_step(run.directory)):
        return "unrecoverable", f"it was started with other settings ({'; '.join(map(str, changed))}); {fix}"
    if state == "finished":
        same_end = began is None or began.run.max_steps == run.config.run.max_steps
        return ("skip", note) if same_end else ("start", "run.max_steps has changed")
    status = read_status(run.files.status)
    if status is not None and status.exit_code == ExitCode.DIVERGED and not changed:
        return "unrecoverable", f"{note}; {fix}"
    return "start", note


def _job_is_gone(summary: RunSummary) -> str:
    """Return why a run marked as active is not: its Slurm job has ended, or is this job, requeued. Empty: it is."""
    if not summary.slurm_job:
        return ""
    ours = current_job()
    if ours is not None and ours.id == summary.slurm_job:
        return "the job was started again"
    state = job_states([summary.slurm_job]).get(summary.slurm_job, "")
    word = re.match(r"[A-Z_]*", state)
    return f"its job {summary.slurm_job} is {state}" if word and word[0] and word[0] not in JOB_IS_ALIVE else ""


def _last_accuracy(metrics: Path) -> float | None:
    try:
        records = read_last_records(metrics, _ENOUGH)
    except OSError:
        return None
    tested = [record for record in records if isinstance(record, EvaluationRecord) and record.split == "test"]
    return tested[-1].accuracy if tested else None


def renewed(plan: Plan) -> Plan:
    """Return `plan` with the runs of all trials that Optuna has suggested so far."""
    return plan_study(plan.file, plan.directory.parent, plan.overrides, plan)


def publish(plan: Plan) -> None:
    """Write the plan into the study's folder; in an Optuna search, first report results and renew the plan.

    Raises UsageError if the folder cannot be written.
    """
    trials = optuna_trials(plan.study, plan.directory)
    fix = "choose another folder with --directory (submit: --run-dir)"
    with writing(plan.directory, fix), trials.locked() if trials else nullcontext():
        if trials:
            plan = renewed(plan)
            _report_results(plan, trials)
        write_plan(plan)


def with_trials(plan: Plan, number: int | None = None) -> Plan:
    """Report all results to Optuna and return `plan` with one more trial, if any are left.

    With the `number` of a run not known yet, ask for trials until that run is known.
    """
    trials = optuna_trials(plan.study, plan.directory)
    if trials is None:
        return plan
    with trials.locked():
        plan = renewed(plan)
        _report_results(plan, trials)
        wanted = min(plan.unasked, default=0) if number is None else number
        while wanted in plan.unasked:
            trials.ask(plan.unasked[wanted])
            plan = renewed(plan)
            if number is None:
                break
        write_plan(plan)
    return plan


def _report_results(plan: Plan, trials: OptunaTrials) -> None:
    groups: dict[tuple[str, int], list[PlannedRun]] = {}
    for run in plan.runs:
        assert run.trial is not None
        groups.setdefault((run.searched, run.trial), []).append(run)
    untold = {(variant, trial) for variant in {variant for variant, _ in groups} for trial in trials.untold(variant)}
    for variant, trial in sorted(untold & groups.keys()):
        runs = groups[variant, trial]
        ends = [standing_of(run).then for run in runs]
        if "unrecoverable" in ends:
            trials.tell(variant, trial, None)
        elif all(end == "skip" for end in ends):
            trials.tell(variant, trial, objective_of(plan, runs))


def objective_of(plan: Plan, runs: Sequence[PlannedRun]) -> float | None:
    """Return the mean over `runs` of the objective at their last evaluation; None if one has no finite value."""
    assert plan.study.search is not None
    split, _, name = plan.study.search.objective.partition(".")
    values = []
    for run in runs:
        last = math.nan
        with suppress(OSError):
            for record in read_records(run.files.metrics):
                if isinstance(record, EvaluationRecord) and record.split == split:
                    last = getattr(record, name)
        values.append(last)
    return fmean(values) if values and all(map(math.isfinite, values)) else None


def best_trials(plan: Plan) -> Iterator[tuple[str, float, Sequence[PlannedRun]]]:
    """Yield each variant's best finished trial: the variant, the objective, the trial's runs."""
    search = plan.study.search
    if search is None:
        return
    sign = -1.0 if search.objective.endswith(".loss") else 1.0
    for variant in dict.fromkeys(run.searched for run in plan.runs):
        found = []
        for trial in range(search.trials):
            runs = [run for run in plan.runs if (run.searched, run.trial) == (variant, trial)]
            is_finished = runs and all(standing_of(run).then == "skip" for run in runs)
            if is_finished and (value := objective_of(plan, runs)) is not None:
                found.append((value, runs))
        if found:
            value, runs = max(found, key=lambda it: sign * it[0])
            yield variant, value, runs
