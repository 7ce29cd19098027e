"""What a sweep does with a run, by the run's state and that of its Slurm job."""

from __future__ import annotations

import fcntl
import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import yaml
from rich.console import Console

from dist_train.cli.main import main
from dist_train.config.resuming import with_setting
from dist_train.outcome import ExitCode
from dist_train.rundir.lock import pid_namespace
from dist_train.rundir.status import State, StatusFile
from dist_train.sweep.planned_runs import plan_study
from dist_train.sweep.standing import Standing, render, standing_of, standings_of
from tests.unit.studies import begin_run, finish_run, small_plan, write_study


@pytest.fixture
def squeue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Replace `squeue` by a program that prints given lines; return the file with the arguments of each call."""

    def put(lines: str) -> Path:
        program, calls = tmp_path / "squeue", tmp_path / "calls"
        program.write_text(f"#!/bin/sh\necho \"$*\" >> '{calls}'\necho '{lines}'\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))
        return calls

    return put


@pytest.mark.parametrize(
    ("state", "job_state", "ours", "expected"),
    [
        ("running", "RUNNING", "", ("running", "busy")),
        ("running", "PENDING", "", ("lost", "busy")),
        ("running", "NODE_FAIL", "", ("lost", "start")),
        ("stopped", "PENDING", "", ("stopped", "busy")),
        ("stopped", "CANCELLED", "", ("stopped", "start")),
        ("stopped", "PENDING", "17", ("stopped", "start")),
        ("failed", "REQUEUED", "", ("stopped", "busy")),
        ("finished", "PENDING", "", ("finished", "skip")),
    ],
)
def test_a_run_is_judged_beside_its_job(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    squeue: Callable[[str], Path],
    state: State,
    job_state: str,
    ours: str,
    expected: tuple[str, str],
) -> None:
    squeue(f"17 {job_state}")
    run = small_plan(tmp_path).runs[0]
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    begin_run(run).change(state)
    monkeypatch.setenv("SLURM_JOB_ID", ours)
    standing = standing_of(run)
    assert (standing.state, standing.then) == expected


@pytest.mark.parametrize("namespace", [pid_namespace(), "pid:[1]"], ids=["killed", "in a container that is gone"])
def test_a_run_that_was_killed_is_started_at_once(tmp_path: Path, namespace: str) -> None:
    run = small_plan(tmp_path).runs[0]
    status = begin_run(run)
    status.change("running")
    run.files.status.write_text(replace(status.current, pid=2**22 + 1, pid_namespace=namespace).to_json())
    with run.files.lock.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert standing_of(run).then == "busy"
    assert (standing_of(run).state, standing_of(run).then) == ("lost", "start")


def test_a_run_that_slurm_has_suspended_for_long_is_not_started_again(
    tmp_path: Path, squeue: Callable[[str], Path]
) -> None:
    squeue("17 SUSPENDED")
    run = small_plan(tmp_path).runs[0]
    status = begin_run(run)
    status.change("running")
    silent = replace(status.current, host="node7", slurm_job="17", updated="2020-01-01T00:00:00Z")
    run.files.status.write_text(silent.to_json())
    assert (standing_of(run).state, standing_of(run).then) == ("running", "busy")


def test_a_killed_run_without_a_checkpoint_is_not_said_to_continue(tmp_path: Path) -> None:
    run = small_plan(tmp_path).runs[0]
    assert standing_of(run).announcement == "starts"
    status = begin_run(run)
    status.change("running", step=98, epoch=0.98, total_epochs=1.0)
    run.files.status.write_text(replace(status.current, pid=2**22 + 1).to_json())
    run.files.lock.touch()
    for steps, start, note in (((), "starts again", "no checkpoint"), ((49,), "continues (lost, 98% done)", "resume")):
        for step in steps:
            run.files.checkpoint(step).with_suffix(".json").touch()
        standing = standing_of(run)
        assert start in standing.announcement
        assert standing.note.endswith(note)


def test_a_run_whose_only_checkpoint_is_in_its_fallback_directory_continues(tmp_path: Path) -> None:
    spare = tmp_path / "spare"
    plain = {"settings": {"noise.method": "none", "checkpoint.fallback_directory": str(spare)}}
    run = small_plan(tmp_path, variants={"plain": plain}).runs[0]
    begin_run(run).end("failed", ExitCode.FAULT, "the disk is full")
    assert "without a checkpoint" in standing_of(run).announcement
    run.files.fallback(spare).mkdir(parents=True)
    (run.files.fallback(spare) / "step-00000040.json").touch()
    assert standing_of(run).announcement.startswith("continues")
    run.files.save_config(with_setting(run.config, "run.seed", 7))
    assert standing_of(run).then == "mismatch"


def test_a_diverged_run_does_not_wait_for_its_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, squeue: Callable[[str], Path]
) -> None:
    squeue("17 PENDING")
    run = small_plan(tmp_path).runs[0]
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    begin_run(run).end("failed", ExitCode.DIVERGED, "the loss is not finite")
    monkeypatch.delenv("SLURM_JOB_ID")
    assert standing_of(run).then == "diverged"
    squeue("17 CANCELLED")
    run.files.save_config(with_setting(run.config, "run.seed", 7))
    assert standing_of(run).then == "start", "the settings of the plan may not diverge"


def test_slurm_is_asked_once_for_the_jobs_of_all_runs_that_have_not_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, squeue: Callable[[str], Path]
) -> None:
    calls = squeue("17 PENDING\n18 CANCELLED")
    plan = small_plan(tmp_path)
    states: list[State] = ["stopped", "stopped", "finished"]
    for job, state, run in zip((17, 18, 19), states, plan.runs[:3], strict=True):
        monkeypatch.setenv("SLURM_JOB_ID", str(job))
        begin_run(run).change(state)
    monkeypatch.delenv("SLURM_JOB_ID")
    assert [standing.then for standing in standings_of(plan.runs)] == ["busy", "start", "skip", "start"]
    [call] = calls.read_text().splitlines()
    assert call.endswith("--jobs=17,18")


@pytest.mark.parametrize(
    ("restarts", "host", "expected"),
    [
        ("", "", ("running", "busy")),
        ("", "elsewhere", ("running", "busy")),
        ("1", "", ("running", "busy")),
        ("1", "elsewhere", ("lost", "start")),
    ],
)
def test_a_run_of_our_own_job_is_at_work_unless_the_job_was_restarted_on_another_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, restarts: str, host: str, expected: tuple[str, str]
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
    run = small_plan(tmp_path).runs[0]
    run.directory.mkdir(parents=True)
    current = replace(StatusFile(run.files.status, 1).current, state="running")
    run.files.status.write_text(replace(current, host=host or current.host).to_json())
    standing = standing_of(run)
    assert (standing.state, standing.then) == expected


@pytest.mark.parametrize(
    ("restarts", "task", "number", "name"),
    [
        ("1", "2", "2", "noisy-seed-0"),
        ("", "2", "2", "plain-seed-0"),
        ("1", "2", "5", "plain-seed-1"),
        ("1", "", "2", "plain-seed-0"),
    ],
)
def test_a_requeued_task_keeps_its_run_if_the_study_has_another_variant_by_then(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    restarts: str,
    task: str,
    number: str,
    name: str,
) -> None:
    variants = {"plain": {"settings": {"noise.method": "none"}}, "noisy": {"settings": {"noise.amplitude": 0.02}}}
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    begun = small_plan(tmp_path, variants=variants).runs[1]
    begin_run(begun).end("stopped", ExitCode.STOPPED, "")
    monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "16")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", task)
    study = write_study(tmp_path, variants={"first": {"settings": {"noise.amplitude": 0.5}}, **variants})
    assert main(["sweep", str(study), "--only", number, "--arguments"]) == ExitCode.FINISHED
    assert f"run.name={name}" in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    ("state", "changes", "then"),
    [
        ("finished", {}, "skip"),
        ("finished", {"run.max_steps": 3}, "mismatch"),
        ("finished", {"run.max_steps": 5}, "start"),
        ("finished", {"run.max_steps": None}, "start"),
        ("finished", {"early_stopping.patience": 2}, "mismatch"),
        ("finished", {"early_stopping.patience": None}, "start"),
        ("finished", {"early_stopping.patience": 4}, "start"),
        ("stopped", {"run.max_steps": 3}, "mismatch"),
        ("stopped", {"run.max_steps": 5}, "start"),
        ("stopped", {"early_stopping.patience": 2}, "start"),
    ],
)
def test_a_run_that_began_with_another_length(
    tmp_path: Path, state: Literal["finished", "stopped"], changes: dict[str, object], then: str
) -> None:
    settings = {"run.max_steps": 4, "early_stopping.patience": 3}
    before = small_plan(tmp_path, settings=settings).runs[0]
    status = begin_run(before)
    (before.files.checkpoints / "step-00000004.json").touch()
    status.progress(step=4)
    status.end(state, ExitCode.FINISHED if state == "finished" else ExitCode.STOPPED, "")
    assert standing_of(small_plan(tmp_path, settings={**settings, **changes}).runs[0]).then == then


@pytest.mark.parametrize("content", ["run: {no_such_setting: 1}\n", "model: {name: gone.py:net}\n", None])
def test_a_finished_run_whose_settings_cannot_be_read_does_not_count(tmp_path: Path, content: str | None) -> None:
    run = small_plan(tmp_path).runs[0]
    finish_run(run)
    if content is None:
        run.files.config.unlink()
    else:
        run.files.config.write_text(content)
    assert standing_of(run).then == "mismatch"


def test_a_run_counts_in_a_project_that_was_moved_with_its_plug_ins(tmp_path: Path) -> None:
    (tmp_path / "before").mkdir()
    (tmp_path / "before/nets.py").write_text("def net(images, width, norm): ...\n")
    variants = {"a": {"settings": {"noise.method": "none"}}}
    study = write_study(tmp_path / "before", variants=variants)
    base = yaml.safe_load((tmp_path / "before/base.yaml").read_text())
    base["run"].pop("directory")
    (tmp_path / "before/base.yaml").write_text(yaml.safe_dump({**base, "model": {"name": "nets.py:net"}}))
    finish_run(plan_study(study, tmp_path / "before/runs").runs[0])
    moved = (tmp_path / "before").rename(tmp_path / "after")
    assert standing_of(plan_study(moved / study.name, moved / "runs").runs[0]).then == "skip"


@pytest.mark.parametrize(
    ("width", "headings"),
    [
        (200, ["run", "number", "variant", "seed", "state", "done", "accuracy", "note"]),
        (80, ["run", "number", "state", "done", "note"]),
        (70, ["run", "number", "state", "done", "note"]),
        (60, ["run", "state", "note"]),
    ],
)
def test_a_list_keeps_names_whole_on_a_narrow_terminal(tmp_path: Path, width: int, headings: list[str]) -> None:
    first, second, *_ = small_plan(tmp_path, variants={"noise-amplitude-0.01": {}}).runs
    note = "the loss is not finite; move runs/small away to run it from the start"
    standings = [Standing(first, "running", "", "busy", 0.5), Standing(second, "failed", note, "mismatch")]
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(render(standings, width))
    heading, _, *lines = console.export_text().splitlines()
    assert heading.split() == headings
    assert all(run.name in line.split() for run, line in zip((first, second), lines, strict=False))
    assert max(map(len, lines)) <= width
    folded = "".join(line[heading.index("note") :].strip() for line in lines[1:])
    assert folded.replace(" ", "") == note.replace(" ", "")
