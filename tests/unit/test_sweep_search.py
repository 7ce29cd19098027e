"""Trials of a search: random ones known beforehand, Optuna's asked one after another, each once, by several sweeps."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from dist_train.cli.main import main
from dist_train.config import ConfigError
from dist_train.outcome import ExitCode, UsageError
from dist_train.report.page import render, tables_in_markdown
from dist_train.report.stored_run import read_subject
from dist_train.rundir.metrics_file import JsonLines
from dist_train.rundir.records import EvaluationRecord
from dist_train.rundir.status import StatusFile
from dist_train.sweep.planned_runs import Plan, PlannedRun, optuna_trials, plan_study
from dist_train.sweep.standing import best_trials, publish, standing_of, with_trials
from dist_train.sweep.study_file import OptunaTrials, Search
from tests.raising import raises, raises_problems
from tests.unit.studies import begin_run, finish_run, small_plan, write_study

SPACE: dict[str, Any] = {
    "optimizer.learning_rate": {"kind": "log_uniform", "low": 0.001, "high": 1.0},
    "optimizer.momentum": {"kind": "uniform", "low": 0.5, "high": 0.9},
    "run.epochs": {"kind": "integer", "low": 1, "high": 3},
    "noise.schedule": {"kind": "choice", "values": [{"kind": "constant"}, {"kind": "cosine"}]},
}


def searched(folder: Path, method: str, trials: int = 4, **changes: Any) -> Plan:
    return small_plan(folder, search={"method": method, "trials": trials, "space": SPACE, **changes})


def finish(run: PlannedRun, accuracy: float) -> None:
    """Leave what a finished run does."""
    finish_run(run)
    lines = JsonLines(run.files.metrics)
    lines.record(EvaluationRecord(3, 1.0, "test", 1.0, accuracy, 10, 0.0))
    if run.config.data.validation_size:
        lines.record(EvaluationRecord(3, 1.0, "validation", 1.0, 1 - accuracy, 10, 0.0))
    lines.flush()


def test_random_trials_are_a_function_of_the_seed_and_more_of_them_leave_the_first(tmp_path: Path) -> None:
    plan, again, longer = searched(tmp_path, "random"), searched(tmp_path, "random"), searched(tmp_path, "random", 9)
    assert plan.runs == again.runs
    assert longer.runs[: len(plan.runs)] == plan.runs
    assert searched(tmp_path, "random", seed=1).runs[0].settings != plan.runs[0].settings
    # variants x seeds x trials
    assert [run.number for run in plan.runs] == list(range(1, 17))
    assert plan.runs[0].name == "plain-trial-0-seed-0"
    rates = {run.settings["optimizer.learning_rate"] for run in longer.runs}
    assert len(rates) == 2 * 9
    assert all(0.001 <= rate <= 1 for rate in rates)
    assert {run.settings["run.epochs"] for run in longer.runs} == {1, 2, 3}
    assert {run.settings["noise.schedule"]["kind"] for run in longer.runs} == {"constant", "cosine"}
    assert plan.runs[0].config.optimizer.learning_rate == plan.runs[0].settings["optimizer.learning_rate"]


def test_trials_may_have_the_same_settings(tmp_path: Path) -> None:
    plan = searched(tmp_path, "random", space={"run.epochs": {"kind": "integer", "low": 1, "high": 2}})
    assert len(plan.runs) == 16


def test_optuna_is_asked_trial_by_trial_and_told_the_mean_over_the_seeds(tmp_path: Path) -> None:
    plan = searched(tmp_path, "optuna")
    assert (plan.runs, plan.total) == ((), 16)
    publish(plan)
    plan = with_trials(plan)
    assert [(run.number, run.name) for run in plan.runs] == [(1, "plain-trial-0-seed-0"), (3, "plain-trial-0-seed-1")]
    assert plan.runs[0].settings == plan.runs[1].settings
    for run, accuracy in zip(plan.runs, (0.5, 0.7), strict=True):
        finish(run, accuracy)
    plan = with_trials(plan)
    trials = optuna_trials(plan.study, plan.directory)
    assert trials is not None
    assert trials.without_result("plain") == []
    assert [found.value for found in trials._trials("plain")] == [pytest.approx(0.6)]
    [(variant, value, _)] = best_trials(plan)
    assert variant == "plain"
    assert value == pytest.approx(0.6)
    stored = json.loads((plan.directory / "runs.json").read_text())
    assert [run["name"] for run in stored] == [run.name for run in plan.runs]


def test_what_optuna_suggests_is_a_function_of_the_results(tmp_path: Path) -> None:
    found = []
    for folder in (tmp_path / "one", tmp_path / "two"):
        folder.mkdir()
        search = {"method": "optuna", "trials": 4, "space": SPACE}
        plan = small_plan(folder, search=search, variants={"plain": {}}, seeds=[0])
        while plan.unasked:
            plan = with_trials(plan)
            for run in plan.runs:
                if not run.files.status.exists():
                    finish(run, run.settings["optimizer.momentum"])
        found.append([run.settings for run in plan.runs])
    assert found[0] == found[1]
    momenta = [settings["optimizer.momentum"] for settings in found[0]]
    assert len(set(momenta)) == 4


def test_settings_that_diverge_are_not_suggested_again_and_again(tmp_path: Path) -> None:
    space = {"optimizer.learning_rate": {"kind": "log_uniform", "low": 0.001, "high": 10.0}}
    search = Search.model_validate({"method": "optuna", "trials": 20, "space": space})
    trials = OptunaTrials(search, tmp_path / "trials.log")
    diverged = []
    for number in range(search.trials):
        trials.ask("plain")
        rate = trials.settings("plain")[number]["optimizer.learning_rate"]
        diverged.append(rate > 0.5)
        trials.tell("plain", number, None if diverged[-1] else rate)
    assert sum(diverged[10:]) <= 5, "the first ten are drawn at random"


def test_a_mistaken_override_does_not_fail_the_trials(tmp_path: Path) -> None:
    plan = with_trials(searched(tmp_path, "optuna"))
    for run in plan.runs:
        finish(run, 0.5)
    with_trials(plan_study(plan.file, overrides=["optimizer.weight_decay=0.5"]))
    trials = optuna_trials(plan.study, plan.directory)
    assert trials is not None
    assert trials.without_result("plain") == [0]
    publish(plan)
    assert [trial.value for trial in trials._trials("plain")] == [0.5]


def test_a_trial_whose_records_cannot_be_read_has_not_failed(tmp_path: Path) -> None:
    plan = with_trials(searched(tmp_path, "optuna"))
    for run in plan.runs:
        finish(run, 0.5)
    records = plan.runs[0].files.metrics.rename(tmp_path / "metrics.jsonl")
    publish(plan)
    trials = optuna_trials(plan.study, plan.directory)
    assert trials is not None
    assert trials.without_result("plain") == [0]
    records.rename(plan.runs[0].files.metrics)
    publish(plan)
    assert [trial.value for trial in trials._trials("plain")] == [0.5]


@pytest.mark.parametrize(
    "changes",
    [
        {"objective": "test.loss"},
        {"space": {**SPACE, "noise.amplitude": {"kind": "uniform", "low": 0.0, "high": 0.1}}},
        {"space": {**SPACE, "noise.schedule": {"kind": "choice", "values": [{"kind": "cosine"}]}}},
    ],
)
def test_trials_of_another_search_are_refused_and_left_as_they_are(tmp_path: Path, changes: dict[str, Any]) -> None:
    journal = with_trials(searched(tmp_path, "optuna")).directory / "trials.log"
    before = journal.read_bytes()
    assert len(searched(tmp_path, "optuna", trials=5).runs) == 2
    with raises(UsageError, "search-changed"):
        searched(tmp_path, "optuna", **changes)
    assert journal.read_bytes() == before


def test_a_kill_between_any_two_writes_to_the_journal_is_made_good_by_the_next_trial(tmp_path: Path) -> None:
    plan = with_trials(with_trials(searched(tmp_path, "optuna", seed=3)))
    journal = plan.directory / "trials.log"
    lines = journal.read_bytes().splitlines(keepends=True)
    for kept in range(len(lines)):
        journal.write_bytes(b"".join(lines[:kept]))
        left = searched(tmp_path, "optuna", seed=3)
        while len(left.runs) < len(plan.runs):
            left = with_trials(left)
        assert left.runs == plan.runs


def test_part_of_a_line_in_the_journal_is_dropped_before_the_next_is_appended(tmp_path: Path) -> None:
    plan = with_trials(searched(tmp_path, "optuna"))
    journal = plan.directory / "trials.log"
    whole = journal.read_bytes()
    for length in (len(whole) - 1, len(whole) - 9, 3):
        journal.write_bytes(whole[:length])
        again = with_trials(searched(tmp_path, "optuna"))
        assert searched(tmp_path, "optuna").runs == again.runs == plan.runs


def test_a_journal_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    journal = with_trials(searched(tmp_path, "optuna")).directory / "trials.log"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join([lines[0], lines[1][:9], *lines[2:], *lines]))
    with raises(UsageError, "journal-broken"):
        searched(tmp_path, "optuna")


def test_a_killed_sweep_s_lock_of_the_journal_is_one_that_optuna_breaks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    flush, held = os.fsync, []

    def flush_and_look(descriptor: int) -> None:
        held.append([link.exists() for link in Path("runs/small").glob("*.lock") if link.is_symlink()])
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", flush_and_look)
    with_trials(plan_study(searched(tmp_path, "optuna").file, Path("runs")))
    assert [True] in held
    assert [False] not in held


def test_a_lock_of_the_journal_that_optuna_never_breaks_is_removed(tmp_path: Path) -> None:
    plan = with_trials(searched(tmp_path, "optuna"))
    (plan.directory / "trials.log.lock").symlink_to("runs/small/trials.log")
    assert len(with_trials(plan).runs) > len(plan.runs)


def test_a_trial_that_lacks_settings_gets_them_and_keeps_those_it_has(tmp_path: Path) -> None:
    plan = with_trials(searched(tmp_path, "optuna"))
    trials = optuna_trials(plan.study, plan.directory)
    assert trials is not None
    journal = trials._study("plain")
    # as left by a kill while the trial was written setting by setting
    journal.ask({path: trials._distributions[path] for path in ("optimizer.momentum", "run.epochs")})
    journal.enqueue_trial({"optimizer.momentum": 0.625})
    begun = dict(trials._trials("plain")[1].params)
    assert searched(tmp_path, "optuna").runs == plan.runs
    for number in (5, 9):
        plan = with_trials(plan, number)
    second, third = plan.run(5), plan.run(9)
    assert second is not None
    assert second.settings["run.epochs"] == begun["run.epochs"]
    assert third is not None
    assert third.settings["optimizer.momentum"] == 0.625
    for run in plan.runs:
        finish(run, 0.5)
    publish(plan)
    assert [trial.value for trial in trials._trials("plain")] == [0.5] * 3


def test_a_trial_that_ended_without_all_settings_is_refused(tmp_path: Path) -> None:
    plan = with_trials(searched(tmp_path, "optuna"))
    trials = optuna_trials(plan.study, plan.directory)
    assert trials is not None
    journal = trials._study("plain")
    journal.tell(journal.ask(), 0.5)
    with raises(UsageError, "search-changed"):
        with_trials(plan, 5)


def test_a_trial_whose_settings_do_not_go_together_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # 61 would leave a micro-batch of one sample; among the random samples by which the study is checked there is none
    space = {"batch.micro_size": {"kind": "integer", "low": 57, "high": 62}}
    search = {"method": "optuna", "trials": 4, "seed": 2, "space": space}
    settings = {"model.norm": "batch", "batch.global_size": 62}
    plan = with_trials(small_plan(tmp_path, search=search, settings=settings, seeds=[0], variants={"plain": {}}))
    trials = optuna_trials(plan.study, plan.directory)
    assert trials is not None
    trials._study("plain").enqueue_trial({"batch.micro_size": 61})
    while plan.unasked:
        plan = with_trials(plan)
    assert plan.left_out[2] == "plain-trial-1-seed-0"
    assert len(plan.runs) + len(plan.left_out) == plan.total == 4
    assert main(["sweep", str(plan.file), "--list"]) == ExitCode.FINISHED
    assert "invalid settings: plain-trial-1-seed-0" in capsys.readouterr().out
    for action in ([], ["--arguments"]):  # as a task of an array, for which there is nothing to do
        assert main(["sweep", str(plan.file), "--only", "2", *action]) == ExitCode.FINISHED
        printed = capsys.readouterr()
        assert not printed.out
        assert "plain-trial-1-seed-0 is left out" in printed.err
    with pytest.raises(ConfigError):  # which is not Optuna's fault
        plan_study(plan.file, overrides=["batch.global_size=8"])


def test_a_task_of_an_array_asks_for_the_trials_up_to_its_own(tmp_path: Path) -> None:
    plan = searched(tmp_path, "optuna")
    with_task = with_trials(plan, 10)
    run = with_task.run(10)
    assert run is not None
    assert run.name == "noisy-trial-2-seed-0"
    assert {each.name for each in with_task.runs} == {
        f"noisy-trial-{trial}-seed-{seed}" for trial in range(3) for seed in (0, 1)
    }
    assert with_trials(with_task, 10).runs == with_task.runs


def test_a_journal_that_cannot_be_written_is_not_called_the_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def ask(self: OptunaTrials, variant: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(OptunaTrials, "ask", ask)
    plan = searched(tmp_path, "optuna")
    assert main(["sweep", str(plan.file), "--only", "1", "--arguments"]) == ExitCode.USAGE
    assert str(plan.directory) in capsys.readouterr().err


def test_a_batch_script_gets_the_numbers_and_the_arguments_of_runs_that_are_still_to_be_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    search = {"method": "optuna", "trials": 3, "space": SPACE}
    study = str(write_study(tmp_path, search=search, variants={"plain": {}}, seeds=[0]))
    assert main(["sweep", study, "--array"]) == 0
    assert capsys.readouterr().out == "1-3\n"
    assert main(["sweep", study, "--only", "2", "--arguments"]) == 0
    first = capsys.readouterr().out
    assert "run.name=plain-trial-1-seed-0" in first.splitlines()
    assert main(["sweep", study, "--only", "2", "--arguments"]) == 0
    assert capsys.readouterr().out == first
    assert main(["sweep", study, "--list"]) == 0
    assert "1 runs of trials" in capsys.readouterr().out
    assert main(["sweep", study, "--only", "2", "--array"]) == 0
    assert capsys.readouterr().out == "2\n"
    assert main(["sweep", study, "--only", "2", "--best"]) == 2
    assert "[option-alone]" in capsys.readouterr().err
    assert main(["sweep", study, "--only", "4", "--arguments"]) == 2
    assert "[no-such-run-number]" in capsys.readouterr().err


def test_the_report_of_a_search_names_what_was_searched_and_has_no_baseline(tmp_path: Path) -> None:
    plan = searched(tmp_path, "random", trials=2)
    publish(plan)
    for run in plan.runs:
        finish(run, 0.5 + run.number / 100)
    subject = read_subject(plan.directory)
    tables, page = tables_in_markdown(subject), render(subject)
    for run in plan.runs:
        assert f"{run.family}, trial {run.trial}, learning_rate {run.settings['optimizer.learning_rate']}, " in tables
    assert "baseline" not in tables
    assert "difference" not in page.split("<h2>Every run")[0].lower().split("<body")[1]


def test_finished_and_diverged_runs_that_the_study_does_not_have_are_listed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = small_plan(tmp_path, seeds=[0, 7])
    for run in before.runs[:3]:
        finish(run, 0.5)
    before.runs[3].files.create()
    StatusFile(before.runs[3].files.status, 1).end("failed", ExitCode.DIVERGED, "the loss is not finite")
    plan = small_plan(tmp_path, seeds=[0])
    others = sorted(run.name for run in before.runs[2:])
    assert main(["sweep", str(plan.file), "--list"]) == ExitCode.FINISHED
    assert capsys.readouterr().out.splitlines()[-1].endswith(f": {', '.join(others)}")
    publish(plan)
    subject = read_subject(plan.directory)
    assert subject.others == tuple(others)
    assert all(name in text for name in others for text in (tables_in_markdown(subject), render(subject)))


def test_without_a_finished_trial_there_is_no_best(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    search = {"method": "random", "trials": 2, "objective": "test.accuracy", "space": SPACE}
    plan = small_plan(tmp_path, search=search, variants={"a": {}}, seeds=[0])
    assert main(["sweep", str(plan.file), "--best"]) == ExitCode.FAULT
    printed = capsys.readouterr()
    assert (printed.out, "see --list" in printed.err) == ("", True)
    finish(plan.runs[1], 0.5)
    assert main(["sweep", str(plan.file), "--best"]) == ExitCode.FINISHED
    printed = capsys.readouterr()
    assert json.loads(printed.out)["runs"] == [plan.runs[1].name]
    assert "runs 1 have" in printed.err
    begin_run(plan.runs[0]).change("running")
    with plan.runs[0].files.lock.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert main(["sweep", str(plan.file), "--best"]) == ExitCode.FINISHED
    assert "runs 1 have" in capsys.readouterr().err
    finish(plan.runs[0], 0.4)
    assert main(["sweep", str(plan.file), "--best"]) == ExitCode.FINISHED
    assert capsys.readouterr().err == ""
    plan.runs[0].files.metrics.unlink()
    assert main(["sweep", str(plan.file), "--best"]) == ExitCode.FINISHED
    assert "runs 1 have" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["random", "optuna"])
@pytest.mark.parametrize(
    ("sizes", "named", "objective", "is_warned"),
    [
        ((10, 10), {}, "validation.accuracy", False),
        ((10, None), {}, "test.accuracy", True),
        ((None, None), {}, "test.accuracy", True),
        ((10, 10), {"objective": "test.accuracy"}, "test.accuracy", False),
        ((10, 10), {"objective": "validation.loss"}, "validation.loss", False),
    ],
)
def test_trials_are_compared_on_the_test_split_only_where_there_is_no_other_or_it_is_named(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    method: str,
    sizes: tuple[int | None, int | None],
    named: dict[str, str],
    objective: str,
    is_warned: bool,
) -> None:
    variants = {name: {"settings": {"data.validation_size": size}} for name, size in zip("ab", sizes, strict=True)}
    search = {"method": method, "trials": 1, "space": SPACE, **named}
    plan = small_plan(tmp_path, search=search, variants=variants, settings={"noise.method": "none"}, seeds=[0])
    for each in (plan, with_trials(plan), with_trials(with_trials(plan))):
        assert each.study.search is not None
        assert each.study.search.objective == objective
    study = str(plan.file)
    commands = {
        ("sweep", study, "--list"): 0,
        ("sweep", study, "--best"): 1,
        ("submit", study, "--study", "--dry-run"): 0,
    }
    for command, code in commands.items():
        assert main(list(command)) == code
        assert ("warning: the search compares" in capsys.readouterr().err) == is_warned


@pytest.mark.parametrize(("size", "expected"), [(10, ("validation", 0.75)), (None, ("test", 0.25))])
def test_the_test_accuracy_of_trials_is_not_shown_beside_a_validation_split(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], size: int | None, expected: tuple[str, float]
) -> None:
    search = {"method": "random", "trials": 1, "space": SPACE}
    plan = small_plan(tmp_path, search=search, settings={"data.validation_size": size}, variants={"a": {}}, seeds=[0])
    finish(plan.runs[0], 0.25)
    evaluated = standing_of(plan.runs[0]).evaluated
    assert evaluated is not None
    assert (evaluated.split, evaluated.accuracy) == expected
    assert main(["sweep", str(plan.file)]) == ExitCode.FINISHED
    assert f"{expected[0]} accuracy {expected[1]:.2%}".replace("%", " %") in capsys.readouterr().out


def test_a_search_that_has_begun_by_test_accuracy_stays_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """That was the default before, also beside a validation split."""
    search = {"method": "optuna", "trials": 4, "space": SPACE}
    settings = {"data.validation_size": 10}
    plan = with_trials(small_plan(tmp_path, search={**search, "objective": "test.accuracy"}, settings=settings))
    for run, accuracy in zip(plan.runs, (0.5, 0.7), strict=True):
        finish(run, accuracy)
    plan = with_trials(small_plan(tmp_path, search=search, settings=settings))
    assert len(plan.runs) == 4
    assert [value for _, value, _ in best_trials(plan)] == [pytest.approx(0.6)]
    assert main(["sweep", str(plan.file), "--best"]) == ExitCode.FINISHED
    assert "warning: the search compares" in capsys.readouterr().err
    with raises(UsageError, "search-changed"):
        small_plan(tmp_path, search={**search, "objective": "validation.accuracy"}, settings=settings)


@pytest.mark.parametrize("method", ["random", "optuna"])
@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"space": {"noise.amplitude": {"kind": "log_uniform", "low": 0.0, "high": 1.0}}}, "out-of-range"),
        ({"space": {"noise.amplitude": {"kind": "uniform", "low": 2.0, "high": 1.0}}}, "out-of-range"),
        ({"space": {"noise.amplitud": {"kind": "uniform", "low": 0.0, "high": 1.0}}}, "unknown-key"),
        ({"space": {"run.seed": {"kind": "integer", "low": 0, "high": 9}}}, "set-by-study"),
        ({"space": {"optimizer.momentum": {"kind": "uniform", "low": 1.0, "high": 2.0}}}, "out-of-range"),
        ({"objective": "validation.accuracy"}, "metric-not-measured"),
        ({"trials": 0}, "out-of-range"),
    ],
)
def test_a_search_that_makes_no_sense_is_refused(
    tmp_path: Path, method: str, changes: dict[str, Any], code: str
) -> None:
    with pytest.raises(ConfigError) as raised:
        searched(tmp_path, method, **changes)
    assert code in {problem.code for problem in raised.value.problems}


@pytest.mark.parametrize(
    "override", ["optimizer.momentum=0.5", "noise.schedule.kind=cosine", "noise.schedule={kind: late}", "optimizer={}"]
)
def test_an_override_of_a_setting_that_the_search_sets_is_refused(tmp_path: Path, override: str) -> None:
    plan = searched(tmp_path, "random")
    with raises_problems((override.partition("=")[0], "set-by-study")):
        plan_study(plan.file, overrides=["optimizer.weight_decay=0.5", override])


def test_a_setting_is_in_the_grid_or_in_the_search(tmp_path: Path) -> None:
    with raises_problems(("grid.noise.amplitude", "grid-twice")):
        small_plan(
            tmp_path,
            grid={"noise.amplitude": [0.1]},
            search={
                "method": "random",
                "trials": 1,
                "space": {"noise.amplitude": {"kind": "choice", "values": [1.0, 2.0]}},
            },
        )


def test_without_optuna_the_search_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with raises(UsageError, "optuna-missing"):
        searched(tmp_path, "optuna")
    assert searched(tmp_path, "random").runs
