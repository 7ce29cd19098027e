"""A search by Optuna while it runs: results are told, new trials asked, and the plan gets their runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from statistics import fmean

from dist_train.rundir.records import EvaluationRecord, read_records
from dist_train.sweep.planned_runs import Plan, PlannedRun, optuna_trials, plan_study, write_plan
from dist_train.sweep.search import OptunaTrials
from dist_train.sweep.standing import standing_of


def renewed(plan: Plan) -> Plan:
    """Return `plan` as its study stands now: with the runs of all trials that have been asked."""
    return plan_study(plan.file, plan.directory.parent, plan.overrides, plan)


def with_next_trial(plan: Plan) -> Plan:
    """Return `plan` with one trial more, where some are left, once Optuna knows all results."""
    return _asked(plan, None)


def with_run(plan: Plan, number: int) -> Plan:
    """Return `plan` with the run of this number, and with the trials before its own."""
    return _asked(plan, number) if number in plan.unasked else plan


def publish(plan: Plan) -> None:
    """Write the plan into the study's folder; of a search by Optuna as it stands now, whose results it is told."""
    trials = optuna_trials(plan.study, plan.directory)
    if trials is None:
        write_plan(plan)
        return
    with trials.locked():
        plan = renewed(plan)
        _tell(plan, trials)
        write_plan(plan)


def _asked(plan: Plan, number: int | None) -> Plan:
    trials = optuna_trials(plan.study, plan.directory)
    if trials is None:
        return plan
    with trials.locked():
        plan = renewed(plan)
        _tell(plan, trials)
        while plan.unasked and (number is None or number in plan.unasked):
            trials.ask(plan.unasked[min(plan.unasked) if number is None else number])
            plan = renewed(plan)
            if number is None:
                break
        write_plan(plan)
    return plan


def _tell(plan: Plan, trials: OptunaTrials) -> None:
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
    """Return the mean objective of `runs`, each its last evaluation's; None where one has none that is finite."""
    assert plan.study.search is not None
    split, _, name = plan.study.search.objective.partition(".")
    values = []
    for run in runs:
        last: float | None = None
        with suppress(OSError):
            for record in read_records(run.files.metrics):
                if isinstance(record, EvaluationRecord) and record.split == split:
                    last = getattr(record, name)
        values.append(last)
    known = [value for value in values if value is not None and abs(value) < float("inf")]
    return fmean(known) if known and len(known) == len(values) else None


def best_trials(plan: Plan) -> Iterator[tuple[str, float, Sequence[PlannedRun]]]:
    """Yield for each variant its best finished trial: the variant, the objective, the trial's runs."""
    search = plan.study.search
    if search is None:
        return
    sign = -1.0 if search.objective.endswith(".loss") else 1.0
    for variant in dict.fromkeys(run.searched for run in plan.runs):
        found = []
        for trial in range(search.trials):
            runs = [run for run in plan.runs if (run.searched, run.trial) == (variant, trial)]
            if runs and all(standing_of(run).then == "skip" for run in runs):
                value = objective_of(plan, runs)
                found += [] if value is None else [(value, runs)]
        if found:
            value, runs = max(found, key=lambda it: sign * it[0])
            yield variant, value, runs
