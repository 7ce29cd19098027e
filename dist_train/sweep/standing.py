"""The state of a study's runs, what to do with each next, and the results reported to an Optuna search."""

from __future__ import annotations

import math
import shlex
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Literal

from rich.table import Table

from dist_train.cluster.launch import JOB_WAITS, current_job, job_states
from dist_train.config import Config, differences, differing_lengths, parse_config
from dist_train.config.loading import read_mapping
from dist_train.config.plugins import with_places_of
from dist_train.config.resuming import Difference
from dist_train.monitoring import wording
from dist_train.outcome import ExitCode, UsageError, escaped, writing
from dist_train.rundir.lock import is_locked
from dist_train.rundir.metrics_file import read_last_records
from dist_train.rundir.paths import RunDirectory
from dist_train.rundir.records import EvaluationRecord
from dist_train.rundir.status import Status, read_status
from dist_train.sweep.planned_runs import Plan, PlannedRun, optuna_trials, plan_study, write_plan
from dist_train.sweep.study_file import OptunaTrials
from dist_train.watch.run_state import ALIVE, corrected_by_job, how_to_continue
from dist_train.watch.run_table import COLOURS, Column, RunSummary, read_runs, table_of

Next = Literal["start", "skip", "busy", "diverged", "mismatch"]
_LENGTH = ["run.epochs"]
_OTHER_FOLDER = "choose another folder with --directory"
_ENOUGH = 1 << 20  # bytes at the end of metrics.jsonl, in which the last evaluation is found


@dataclass(frozen=True)
class Standing:
    """The state of a run, how it was last `evaluated`, and what a sweep does `then`.

    That is on the test split, of a search's trial on the validation split, if it has one: tests are for the best trial.
    A finished run is skipped; one that has diverged, or does not match the plan, is not started.
    """

    run: PlannedRun
    state: str
    note: str
    then: Next
    done: float | None = None
    evaluated: EvaluationRecord | None = None

    @property
    def announcement(self) -> str:
        """How a sweep announces that it starts the run."""
        if self.state == "waiting":
            return "starts"
        if not self.run.files.checkpoint_steps(self.run.config.checkpoint.fallback_directory):
            return f"starts again ({self.state}, without a checkpoint)"
        return f"continues ({self.state}{f', {self.done:.0%} done' if self.done else ''})"


def standings_of(runs: Sequence[PlannedRun]) -> list[Standing]:
    """Return the standings of `runs`, read from their files; Slurm is asked once for all of their jobs."""
    summaries = [_summary_of(run) for run in runs]
    ours = current_job()
    jobs = {each.slurm_job for each in summaries if each is not None and each.state != "finished"}
    states = job_states(sorted(jobs - {"", ours.id if ours is not None else ""}))
    return [_standing(run, summary, states) for run, summary in zip(runs, summaries, strict=True)]


def standing_of(run: PlannedRun) -> Standing:
    """Return the standing of `run`, read from its files."""
    return standings_of([run])[0]


def _summary_of(run: PlannedRun) -> RunSummary | None:
    summaries = read_runs(run.directory) if run.directory.is_dir() else ()
    return next((summary for summary in summaries if summary.directory == run.directory), None)


def _standing(run: PlannedRun, summary: RunSummary | None, states: Mapping[str, str]) -> Standing:
    if summary is None:
        return Standing(run, "waiting", "", "start")
    state, note, waits = _corrected_by_job(summary, states)
    is_compared = run.trial is not None and run.config.measures("validation.accuracy")
    evaluated = _last_evaluation(run, "validation" if is_compared else "test")
    if state in ALIVE and _was_killed(run):  # tables wait for a rank that takes over; the next launch does not
        state, note = "lost", f"its process is gone; {how_to_continue(run.files)}"
    standing = Standing(run, state, note, "busy" if waits else "start", summary.done, evaluated)
    if state in ALIVE:
        return replace(standing, then="busy", note=note or "another process is running it")
    began, fault = None, ""
    try:
        began = _settings_at_start(run)
    except UsageError as error:
        fault = " ".join(str(error).split())
    changed = differences(began, run.config) if began else []
    lengths = differing_lengths(began, run.config) if began else []
    if began and state == "finished" and _patience(run.config) < _patience(began):
        # with more it continues where it stopped, but with less it would have stopped earlier
        changed += [each for each in lengths if each.path == "early_stopping.patience"]
    status = read_status(run.files.status)
    fix = f"move {run.directory} away to run it from the start"
    if mismatch := _mismatch(run, state, status, changed, fault):
        longer = run.config.run.epochs
        if began and state == "finished" and longer > began.run.epochs and [each.path for each in changed] == _LENGTH:
            words = ["dist-train", "train", run.files.config, f"run.epochs={longer}", "--run-dir", run.directory]
            fix += f"; or lengthen it: {shlex.join(map(str, words))}"
        return replace(standing, then="mismatch", note=f"{mismatch}; {fix}")
    if state == "finished" and lengths:
        paths = " and ".join(each.path for each in lengths)
        return replace(standing, note=f"{paths} {'have' if len(lengths) > 1 else 'has'} changed")
    if state == "finished":
        return replace(standing, then="skip")
    if status is not None and status.exit_code == ExitCode.DIVERGED and not changed:
        return replace(standing, then="diverged", note=f"{note}; {fix}")
    return standing


def _mismatch(run: PlannedRun, state: str, status: Status | None, changed: Sequence[Difference], fault: str) -> str:
    """Return how the plan contradicts what `run` has done with settings that have `changed`; empty if it does not."""
    steps = run.files.checkpoint_steps(run.config.checkpoint.fallback_directory)
    # Without a checkpoint there is nothing that the settings must match.
    if changed and (state == "finished" or any(steps)):
        return f"it was started with other settings ({'; '.join(map(str, changed))})"
    trained = max([0, *steps, *([status.step] if status and state == "finished" else [])])
    most = run.config.run.max_steps
    if most is not None and trained > most:
        return f"it has trained {trained} steps, more than run.max_steps={most}"
    return f"the settings that it was started with cannot be read: {fault}" if state == "finished" and fault else ""


def render(standings: Sequence[Standing], width: int | None = None) -> Table:
    """Return the runs as a table of at most `width` characters, in which notes are folded; names are complete."""
    accuracies = ["" if each.evaluated is None else wording.percent(each.evaluated.accuracy) for each in standings]
    styles = [COLOURS.get(each.state, "") for each in standings]
    columns = [
        Column("number", [str(each.run.number) for each in standings], 4),
        Column("variant", [escaped(each.run.variant) for each in standings], 1, "left"),
        Column("seed", [str(each.run.seed) for each in standings], 0),
        Column("state", [each.state for each in standings], 5, "left", styles),
        Column("done", ["" if each.done is None else f"{each.done:.0%}" for each in standings], 2),
        Column("accuracy", accuracies, 3),
    ]
    names, notes = [escaped(each.run.name) for each in standings], [escaped(each.note) for each in standings]
    return table_of(names, columns, notes, width, "fold")


def numbers_left(runs: Sequence[PlannedRun], unasked: Iterable[int]) -> str:
    """Return the numbers of the `runs` to be started and of those `unasked`, as ranges; empty if none."""
    left = (standing.run.number for standing in standings_of(runs) if standing.then == "start")
    return as_ranges(sorted([*left, *unasked]))


def numbers_without_result(plan: Plan) -> str:
    """Return the numbers of a search's runs that have neither diverged nor the objective, as ranges.

    These are unfinished, have other settings than the plan, or records that cannot be read.
    """

    def lacks(standing: Standing) -> bool:
        has_result = standing.then == "skip" and objective_of(plan, [standing.run]) is not None
        return not has_result and standing.then != "diverged"

    lacking = (standing.run.number for standing in standings_of(plan.runs) if lacks(standing))
    return as_ranges(sorted([*lacking, *plan.unasked]))


def run_of_requeued_task(plan: Plan, number: int) -> PlannedRun | None:
    """Return the run that task `number` of our array has begun before Slurm requeued it; None if there is none.

    Another run may have this number by now, if a variant or a seed was added to the study.
    """
    job = current_job()
    if job is None or not job.restarts or not job.name.endswith(f"_{number}"):
        return None
    begun = (run for run in plan.runs if (status := read_status(run.files.status)) and status.slurm_job == job.id)
    return next(begun, None)


def as_ranges(numbers: Sequence[int]) -> str:
    """Return ascending numbers in the syntax of `sbatch --array`, such as 1-3,7."""
    ranges: list[list[int]] = []
    for number in numbers:
        if not ranges or number != ranges[-1][1] + 1:
            ranges.append([number, number])
        ranges[-1][1] = number
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)


def _settings_at_start(run: PlannedRun) -> Config:
    """Return the settings in the run's directory, with plug-ins where the plan has them. Raises UsageError."""
    given = run.config.model_dump(mode="json")
    settings = {**read_mapping(run.files.config), "metrics": given["metrics"]}  # which may change
    return parse_config(with_places_of(settings, given, Config), source=str(run.files.config))


def _was_killed(run: PlannedRun) -> bool:
    """Whether the process of an active run of this host is gone, also one of a container's: nobody holds its lock."""
    status = read_status(run.files.status)
    return status is not None and status.host == socket.gethostname() and is_locked(run.files.lock) is False


def _patience(config: Config) -> float:
    patience = config.early_stopping.patience
    return math.inf if patience is None else patience


def _corrected_by_job(summary: RunSummary, states: Mapping[str, str]) -> tuple[str, str, bool]:
    """Return the run's state and note, corrected by the state of its Slurm job, and whether that job will start it."""
    state, note, job = summary.state, summary.note, summary.slurm_job
    if state == "finished" or not job:
        return state, note, False
    ours = current_job()
    if ours is not None and ours.id == job:
        # Its ranks on other nodes ended when the job was requeued; of a process of this node the state is known.
        status = read_status(RunDirectory(summary.directory).status)
        was_elsewhere = status is None or status.host != socket.gethostname()
        if state in ALIVE and ours.restarts and was_elsewhere:
            return "lost", "the job was started again", False
        return state, note, False
    job_state = states.get(job, "")
    waits = job_state in JOB_WAITS
    if waits and state == "stopped":
        note = "; ".join(filter(None, (note, f"its job {job} is {job_state}")))
    return *corrected_by_job(state, note, job, job_state), waits


def _last_evaluation(run: PlannedRun, split: str) -> EvaluationRecord | None:
    try:
        records = read_last_records(run.files.metrics, _ENOUGH)
    except OSError:
        return None
    found = (record for record in reversed(records) if isinstance(record, EvaluationRecord) and record.split == split)
    return next(found, None)


def renewed(plan: Plan) -> Plan:
    """Return `plan` with the runs of all trials that Optuna has suggested so far."""
    return plan_study(plan.file, plan.directory.parent, plan.overrides, plan)


def publish(plan: Plan, only: int | None = None) -> None:
    """Write the plan into the study's folder; in an Optuna search, first report results and renew the plan.

    The folder's files stay if all runs, or the one with the number `only`, were started with other settings: the
    report needs the plan that they belong to.

    Raises UsageError if the folder cannot be written.
    """
    trials = optuna_trials(plan.study, plan.directory)
    with writing(plan.directory, _OTHER_FOLDER), trials.locked() if trials else nullcontext():
        if trials:
            plan = renewed(plan)
            _report_results(plan, trials)
        chosen = [run for run in plan.runs if only in (None, run.number)]
        if plan.unasked or not all(standing.then == "mismatch" for standing in standings_of(chosen)):
            write_plan(plan)


def with_trials(plan: Plan, number: int | None = None) -> Plan:
    """Report all results to Optuna and return `plan` with one more trial, if any are left.

    With the `number` of a run not known yet, ask for trials until that run is known.

    Raises UsageError if the folder cannot be written.
    """
    trials = optuna_trials(plan.study, plan.directory)
    if trials is None:
        return plan
    with writing(plan.directory, _OTHER_FOLDER), trials.locked():
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
    without_result = {variant: trials.without_result(variant) for variant in {run.searched for run in plan.runs}}
    groups: dict[tuple[str, int], list[Standing]] = {}
    for standing in standings_of([run for run in plan.runs if run.trial in without_result[run.searched]]):
        assert standing.run.trial is not None
        groups.setdefault((standing.run.searched, standing.run.trial), []).append(standing)
    for variant, trial in sorted(groups):
        standings = groups[variant, trial]
        following = {standing.then for standing in standings}
        if "mismatch" in following:
            continue  # the plan may be the mistaken one, and Optuna takes no result back
        if "diverged" in following:
            trials.tell(variant, trial, None)
        elif following == {"skip"}:
            value = objective_of(plan, [standing.run for standing in standings])
            if value is not None:  # its records may be readable again later
                trials.tell(variant, trial, value)


def objective_of(plan: Plan, runs: Sequence[PlannedRun]) -> float | None:
    """Return the mean over `runs` of the objective at their last evaluation; None if one has no finite value."""
    assert plan.study.search is not None
    split, _, name = plan.study.search.objective.partition(".")
    values = [getattr(_last_evaluation(run, split), name, math.nan) for run in runs]
    return fmean(values) if values and all(map(math.isfinite, values)) else None


def best_trials(plan: Plan) -> Iterator[tuple[str, float, Sequence[PlannedRun]]]:
    """Yield each variant's best finished trial: the variant, the objective, the trial's runs."""
    search = plan.study.search
    if search is None:
        return
    finished = {standing.run.number for standing in standings_of(plan.runs) if standing.then == "skip"}
    sign = -1.0 if search.objective.endswith(".loss") else 1.0
    for variant in dict.fromkeys(run.searched for run in plan.runs):
        found = []
        for trial in range(search.trials):
            runs = [run for run in plan.runs if (run.searched, run.trial) == (variant, trial)]
            is_finished = runs and all(run.number in finished for run in runs)
            if is_finished and (value := objective_of(plan, runs)) is not None:
                found.append((value, runs))
        if found:
            value, runs = max(found, key=lambda it: sign * it[0])
            yield variant, value, runs
