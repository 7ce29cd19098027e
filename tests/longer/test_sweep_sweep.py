"""Sweeps: order of runs, failures, continuing and stopping."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from dist_train import start_up
from dist_train.cli.main import main
from dist_train.cluster.launch import Launch, current_launch
from dist_train.config import dump_config
from dist_train.outcome import ExitCode
from dist_train.rundir.status import StatusFile
from dist_train.start_up import own_command
from dist_train.sweep.planned_runs import Plan, PlannedRun, plan_study
from dist_train.sweep.standing import as_ranges, publish, standing_of
from dist_train.sweep.sweep import Launcher, Tally, lock_for_sweep, summary, sweep, threads_per_rank
from tests.unit.studies import small_plan, write_study
from tests.waiting import PATIENCE

DIVERGES = {"settings": {"model.norm": "none", "model.width": 0.25, "optimizer.learning_rate": 1e30}}

OPTUNA = {
    "method": "optuna",
    "trials": 1,
    "space": {"optimizer.momentum": {"kind": "uniform", "low": 0.5, "high": 0.9}},
}


@dataclass(frozen=True)
class Shell(Launcher):
    """Runs a shell command instead of training, in the folder of each run; $NAME is the run's name."""

    line: str = "exit 0"

    def command(self, plan: Plan, run: PlannedRun) -> list[str]:
        return ["/bin/sh", "-c", f"cd '{run.directory}'; NAME={run.name}; {self.line}"]


class Messages(list[str]):
    def __call__(self, text: str) -> None:
        self.append(text)


def run_all(plan: Plan, line: str, jobs: int = 1, say: Messages | None = None) -> Tally:
    return sweep(plan, plan.runs, jobs, Shell(line=line), say if say is not None else Messages())


def write_run(run: PlannedRun, state: str, code: ExitCode | None = None, reason: str = "", **fields: object) -> None:
    """Write the files of a run in `state`."""
    run.directory.mkdir(parents=True)
    (run.directory / "config.yaml").write_text(dump_config(run.config))
    path = run.directory / "status.json"
    status = replace(StatusFile(path, 1).current, state=state, exit_code=code, reason=reason, **fields)  # type: ignore[arg-type]
    path.write_text(status.to_json())


def folder_files(plan: Plan) -> list[str]:
    return [(plan.directory / name).read_text() for name in ("study.yaml", "runs.json")]


def names(runs: Sequence[PlannedRun]) -> list[str]:
    return [run.name for run in runs]


class TestOrder:
    def test_runs_are_started_in_order(self, tmp_path: Path) -> None:
        plan = small_plan(tmp_path)
        tally = run_all(plan, "echo $NAME >> ../order")
        assert (plan.directory / "order").read_text().split() == names(plan.runs)
        assert names(tally.finished) == names(plan.runs)
        assert tally.exit_code == ExitCode.FINISHED

    def test_number_of_concurrent_runs_is_limited(self, tmp_path: Path) -> None:
        plan = small_plan(tmp_path, seeds=[0, 1, 2])
        # Each run counts the running ones, including itself.
        run_all(plan, "touch ../here-$$; ls .. | grep -c here- >> ../counts; sleep 0.3; rm ../here-$$", jobs=2)
        counts = [int(word) for word in (plan.directory / "counts").read_text().split()]
        assert (len(counts), max(counts)) == (6, 2)

    @pytest.mark.parametrize(
        "variables",
        [
            {"SLURM_STEP_ID": "0", "SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "PMI_RANK": "3", "PMI_SIZE": "4"},
            {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3"},
            {"MV2_COMM_WORLD_SIZE": "4"},
            {"HOROVOD_SIZE": "4", "HOROVOD_RANK": "3"},
            {"TORCHELASTIC_RUN_ID": "x", "RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "n", "MASTER_PORT": "1"},
            {"RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "n", "MASTER_PORT": "1"},
        ],
    )
    def test_runs_are_no_ranks_of_the_sweep_s_own_launch(
        self, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]
    ) -> None:
        for name, value in {**variables, "SLURM_JOB_ID": "17"}.items():
            monkeypatch.setenv(name, value)
        environment = Launcher().environment()
        assert current_launch(environment) == Launch("alone", 1, 0)
        assert environment["SLURM_JOB_ID"] == "17"

    def test_cores_are_divided_among_runs(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(12)))
        monkeypatch.setattr(start_up, "_CGROUP", tmp_path)
        assert [threads_per_rank(*shares) for shares in ((1, 1), (2, 3), (5, 5))] == [12, 2, 1]
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        assert Launcher(threads=5).environment()["OMP_NUM_THREADS"] == "5"
        monkeypatch.setenv("OMP_NUM_THREADS", "3")
        assert Launcher(threads=5).environment()["OMP_NUM_THREADS"] == "3"

    @pytest.mark.parametrize(("ranks", "launch"), [(1, []), (3, ["launch", "-np", "3"])])
    def test_several_ranks_are_started_by_launch(self, ranks: int, launch: list[str], tmp_path: Path) -> None:
        plan = small_plan(tmp_path)
        command = Launcher(ranks).command(plan, plan.runs[0])
        program = own_command(*launch, "train", str(plan.base_file))
        assert command[command.index(program[0]) :][: len(program)] == program

    def test_runs_start_where_setpriv_lacks_an_option(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        plan = small_plan(tmp_path)
        assert Launcher().command(plan, plan.runs[0])[0] == "setpriv"
        (tmp_path / "setpriv").write_text("#!/bin/sh\nexit 1\n")
        (tmp_path / "setpriv").chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))
        assert Launcher().command(plan, plan.runs[0])[: len(own_command())] == own_command()


class TestFailures:
    def test_failed_run_is_reported_and_others_continue(self, tmp_path: Path) -> None:
        plan = small_plan(tmp_path)
        tally = run_all(plan, "[ $NAME != noisy-seed-0 ] || { echo 'dist-train: no data' >&2; exit 2; }")
        assert len(tally.finished) == 3
        assert "  2 noisy-seed-0: no data" in summary(tally)
        assert tally.exit_code == ExitCode.FAULT

    def test_what_stops_every_run_is_said_once(self, tmp_path: Path) -> None:
        plan = small_plan(tmp_path)
        tally = run_all(plan, "echo 'dist-train: no data' >&2; exit 2")
        same = "1 plain-seed-0, 2 noisy-seed-0, 3 plain-seed-1, 4 noisy-seed-1: no data"
        assert summary(tally) == ["0 runs finished", "4 failed:", f"  {same}"]

    def test_killed_run_is_reported_with_its_signal(self, tmp_path: Path) -> None:
        plan = small_plan(tmp_path)
        tally = run_all(plan, "[ $NAME != plain-seed-1 ] || kill -KILL $$")
        assert "  3 plain-seed-1: ended by SIGKILL" in summary(tally)

    def test_run_that_cannot_be_started_is_reported(self, tmp_path: Path) -> None:
        plan = small_plan(tmp_path)
        plan.directory.mkdir(parents=True)
        plan.runs[0].directory.touch()
        tally = run_all(plan, "exit 0")
        assert tally.failed[0][1].startswith("cannot be started: ")
        assert len(tally.finished) == 3

    def test_run_that_cannot_be_started_is_unlocked(self, tmp_path: Path) -> None:
        plan = small_plan(tmp_path)
        plan.runs[0].directory.mkdir(parents=True)
        plan.runs[0].files.output_log.parent.touch()
        tally = run_all(plan, "exit 0")
        assert tally.failed[0][1].startswith("cannot be started: ")
        lock = lock_for_sweep(plan.runs[0])
        assert lock is not None
        os.close(lock)

    def test_run_that_finishes_with_other_settings_than_planned_is_reported(self, tmp_path: Path) -> None:
        plan = small_plan(tmp_path)
        changed = small_plan(tmp_path, settings={"optimizer.momentum": 0.5})
        for run in changed.runs[:2]:
            write_run(run, "finished", ExitCode.FINISHED)
            run.directory.rename(tmp_path / run.name)
        tally = run_all(plan, f"cp {tmp_path}/$NAME/*.* . || true")
        assert names([run for run, _ in tally.failed]) == names(plan.runs[:2])
        assert names(tally.finished) == names(plan.runs[2:])
        assert tally.exit_code == ExitCode.FAULT

    def test_diverged_run_is_reported_and_not_started_again(self, tmp_path: Path) -> None:
        plan = small_plan(tmp_path)
        write_run(plan.runs[1], "failed", ExitCode.DIVERGED, "the loss is not finite")
        tally = run_all(plan, "touch started")
        assert not (plan.runs[1].directory / "started").exists()
        (run, reason) = tally.failed[0]
        assert run.number == 2
        assert reason.startswith("the loss is not finite; move ")
        assert len(tally.finished) == 3


class TestContinuing:
    def test_finished_runs_are_skipped_and_others_started(self, tmp_path: Path) -> None:
        plan = small_plan(tmp_path, seeds=[0, 1, 2])
        write_run(plan.runs[0], "finished", ExitCode.FINISHED)
        write_run(plan.runs[1], "failed", ExitCode.FAULT, "a rank died")
        write_run(plan.runs[2], "stopped", ExitCode.STOPPED)
        write_run(plan.runs[3], "running", host="elsewhere", updated="2020-01-01T00:00:00+00:00")
        say = Messages()
        tally = run_all(plan, "touch started", say=say)
        started = [run.number for run in plan.runs if (run.directory / "started").exists()]
        # Run 4 runs elsewhere, since its status was just written.
        assert started == [2, 3, 5, 6]
        assert names([run for run, _ in tally.busy]) == ["noisy-seed-1"]
        assert say[0] == "1/6 plain-seed-0: finished before"
        assert tally.exit_code == ExitCode.STOPPED

    def test_run_is_not_reused_for_other_settings(self, tmp_path: Path) -> None:
        before = small_plan(tmp_path)
        for run in before.runs:
            write_run(run, "finished", ExitCode.FINISHED)
        after = small_plan(tmp_path, settings={"optimizer.momentum": 0.5})
        standing = standing_of(after.runs[0])
        assert standing.then == "mismatch"
        assert "optimizer.momentum: 0.9 when the run began, 0.5 now" in standing.note
        assert run_all(after, "exit 0").exit_code == ExitCode.FAULT

    def test_advice_is_to_lengthen_a_finished_run_of_fewer_epochs(self, tmp_path: Path) -> None:
        plan = small_plan(tmp_path)
        run, unfinished, *_ = plan.runs
        write_run(run, "finished", ExitCode.FINISHED)
        write_run(unfinished, "stopped", ExitCode.STOPPED)
        unfinished.files.checkpoints.mkdir()
        (unfinished.files.checkpoints / "step-00000001.json").touch()
        command = f"dist-train train {run.directory}/config.yaml run.epochs=7 --run-dir {run.directory}"
        longer = plan_study(plan.file, overrides=["run.epochs=7"])
        assert standing_of(longer.runs[0]).note.endswith(command)
        others = plan_study(plan.file, overrides=["run.epochs=7", "optimizer.momentum=0.5"])
        for standing in (standing_of(longer.runs[1]), standing_of(others.runs[0])):
            assert standing.then == "mismatch"
            assert "lengthen it" not in standing.note

    def test_plan_that_fits_no_run_does_not_replace_the_study_s_files(self, tmp_path: Path) -> None:
        plan = small_plan(tmp_path)
        publish(plan)
        for run in plan.runs:
            write_run(run, "finished", ExitCode.FINISHED)
        before = folder_files(plan)
        mistaken = plan_study(plan.file, overrides=["run.epochs=7"])
        publish(mistaken)
        assert folder_files(plan) == before
        shutil.rmtree(plan.runs[0].directory)
        publish(mistaken, only=2)
        assert folder_files(plan) == before
        publish(mistaken)
        assert "run.epochs=7" in folder_files(plan)[1]
        publish(small_plan(tmp_path, title="New"))
        assert "title: New" in folder_files(plan)[0]

    @pytest.mark.parametrize("changes", [{}, {"search": OPTUNA, "seeds": [0], "variants": {"plain": {}}}])
    def test_sweep_that_ends_leaves_the_plan_of_a_later_one(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
    ) -> None:
        study = str(write_study(tmp_path, **changes))
        later = tmp_path / "later"
        later.mkdir()
        plan = plan_study(write_study(later, title="Later", **changes), tmp_path / "runs")

        def sweep_meanwhile(*_: object) -> Tally:
            publish(plan)
            return Tally()

        monkeypatch.setattr("dist_train.sweep.sweep.sweep", sweep_meanwhile)
        main(["sweep", study])
        assert "title: Later" in folder_files(plan)[0]

    def test_finished_run_with_more_steps_continues(self, tmp_path: Path) -> None:
        write_run(small_plan(tmp_path, settings={"run.max_steps": 2}).runs[0], "finished", ExitCode.FINISHED)
        assert standing_of(small_plan(tmp_path, settings={"run.max_steps": 4}).runs[0]).then == "start"

    def test_run_of_another_sweep_is_left_to_it(self, tmp_path: Path) -> None:
        plan = small_plan(tmp_path)
        lock = lock_for_sweep(plan.runs[0])
        assert lock is not None
        try:
            tally = run_all(plan, "exit 0")
        finally:
            os.close(lock)
        assert tally.busy == [(plan.runs[0], "another sweep is running it")]
        assert len(tally.finished) == 3
        assert tally.exit_code == ExitCode.STOPPED

    def test_finished_run_whose_state_another_sweep_reads_counts_as_finished(self, tmp_path: Path) -> None:
        plan = small_plan(tmp_path)
        write_run(plan.runs[0], "finished", ExitCode.FINISHED)
        lock = lock_for_sweep(plan.runs[0])
        assert lock is not None
        try:
            tally = run_all(plan, "exit 0")
        finally:
            os.close(lock)
        assert names(tally.finished) == names(plan.runs)
        assert tally.exit_code == ExitCode.FINISHED

    def test_lock_is_released_at_the_end_of_a_run(self, tmp_path: Path) -> None:
        plan = small_plan(tmp_path)
        for _ in range(2):
            assert run_all(plan, "exit 0").busy == []


class TestStopping:
    def test_running_runs_save_and_stop_and_no_other_starts(self, tmp_path: Path) -> None:
        plan = small_plan(tmp_path)
        both = "touch ../up-$NAME; while [ $(ls .. | grep -c up-) -lt 2 ]; do sleep 0.05; done"
        line = f"trap 'exit 75' TERM; {both}; kill -TERM {os.getpid()}; while :; do sleep 0.05; done"
        say = Messages()
        tally = run_all(plan, line, jobs=2, say=say)
        # tally.stopped is in the order of their ends
        assert sorted(names([run for run, _ in tally.stopped])) == sorted(names(plan.runs[:2]))
        assert names(tally.left) == names(plan.runs[2:])
        assert tally.exit_code == ExitCode.STOPPED
        assert "asked to stop: waiting for 2 runs to save and end" in say
        assert summary(tally)[-2:] == ["2 runs not started", "the same command continues"]
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL

    def test_second_signal_kills_the_runs(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("dist_train.sweep.sweep._INSIST_SECONDS", 0.3)
        plan = small_plan(tmp_path)
        sweep_process = os.getpid()
        line = f"trap '' TERM; kill -INT {sweep_process}; sleep 0.6; kill -INT {sweep_process}; exec sleep 600"
        started_at = time.monotonic()
        tally = run_all(plan, line)
        assert time.monotonic() - started_at < PATIENCE
        assert tally.exit_code == ExitCode.STOPPED

    def test_launcher_that_takes_the_second_signal_for_the_first_gets_another(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("dist_train.sweep.sweep._INSIST_SECONDS", 0.3)
        plan, sweep_process = small_plan(tmp_path), os.getpid()
        ask_twice = f"kill -INT {sweep_process}; sleep 0.6; kill -INT {sweep_process}"
        line = f"n=0; trap 'n=$((n + 1))' TERM; {ask_twice}; while [ $n -lt 3 ]; do sleep 0.05; done; exit 1"
        tally = sweep(plan, plan.runs, 1, Shell(ranks=2, line=line), Messages())
        assert names([run for run, _ in tally.failed]) == names(plan.runs[:1])


def test_numbers_are_written_as_slurm_ranges() -> None:
    assert as_ranges([]) == ""
    assert as_ranges([1]) == "1"
    assert as_ranges([1, 2, 3, 7, 9, 10]) == "1-3,7,9-10"


class TestCommand:
    def test_real_runs_are_trained_and_skipped(self, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
        variants = {"plain": {"settings": {"noise.method": "none"}}, "diverges": DIVERGES}
        study = str(write_study(tmp_path, variants=variants, seeds=[0]))
        runs = tmp_path / "runs" / "small"
        assert main(["sweep", study, "--only", "1"]) == 0
        assert "noise none" in capfd.readouterr().out
        assert [path.name for path in runs.glob("*-seed-*")] == ["plain-seed-0"]
        assert main(["sweep", study, "--array"]) == 0
        assert capfd.readouterr().out == "2\n"
        assert main(["sweep", study, "--only", "1", "--arguments"]) == 0
        printed = capfd.readouterr()
        assert (printed.out, "has finished" in printed.err) == ("", True)

        assert main(["sweep", study]) == ExitCode.FAULT
        printed = capfd.readouterr()
        assert "1/2 plain-seed-0: finished before, test accuracy" in printed.out
        assert "1 run finished\n1 failed:\n  2 diverges-seed-0: " in printed.out
        assert "[step-not-finite]" in (runs / "diverges-seed-0" / "logs" / "output.log").read_text()

        assert main(["sweep", study, "--list"]) == 0
        rows = [line.split() for line in capfd.readouterr().out.splitlines() if "seed-0" in line]
        assert [row[:5] for row in rows] == [
            ["plain-seed-0", "1", "plain", "0", "finished"],
            ["diverges-seed-0", "2", "diverges", "0", "failed"],
        ]
        records = [json.loads(line) for line in (runs / "plain-seed-0" / "metrics.jsonl").read_text().splitlines()]
        accuracy = [record["accuracy"] for record in records if record.get("split") == "test"][-1]
        assert rows[0][6] == f"{accuracy * 100:.2f}"
        assert main(["sweep", study, "--array"]) == ExitCode.FAULT

    def test_arguments_of_a_run_are_one_per_line(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        study = str(write_study(tmp_path))
        assert main(["sweep", study, "--only", "2", "--arguments", "--directory", str(tmp_path / "other")]) == 0
        assert capsys.readouterr().out.splitlines() == [
            "train",
            str(tmp_path / "base.yaml"),
            "noise.amplitude=0.02",
            "run.name=noisy-seed-0",
            f"run.directory={tmp_path}/other/small",
            "run.seed=0",
        ]

    def test_bad_study_or_number_exits_with_2_before_anything_starts(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        good = str(write_study(tmp_path))
        assert main(["sweep", good, "--only", "5"]) == ExitCode.USAGE
        assert "[no-such-run-number]" in capsys.readouterr().err
        assert main(["sweep", good, "--arguments"]) == ExitCode.USAGE
        (tmp_path / "file").touch()
        assert main(["sweep", good, "--directory", str(tmp_path / "file")]) == ExitCode.USAGE
        assert "[output-unwritable]" in capsys.readouterr().err
        assert main(["sweep", good, "noise.amplitud=1"]) == ExitCode.USAGE
        bad = str(write_study(tmp_path, settings={"noise.amplitud": 1}))
        assert main(["sweep", bad]) == ExitCode.USAGE
        assert not (tmp_path / "runs").exists()
