from __future__ import annotations

import io
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TypeAlias

import pytest
from rich.console import Console
from rich.table import Table

from dist_train.cli.main import parse
from dist_train.outcome import UsageError
from dist_train.rundir.records import EvaluationRecord, Record, TrainRecord, to_json
from dist_train.watch.run_table import RunSummary, read_runs, render
from tests.unit.test_config_loading import LAUGHS

NOW = datetime.now(UTC)
Content: TypeAlias = str | bytes | tuple[str, str]
CONFIG = """\
run: {name: lb}
data: {name: fashion-mnist}
model: {name: vgg9}
batch: {global_size: 8192}
noise: {method: smoothout, amplitude: 0.01}
a_section_of_a_later_version: {key: 1}
"""


def train(step: int, when: float) -> TrainRecord:
    return TrainRecord(step, step / 7, 0.5, 0.5, 0.1, 0.0, 1.0, 0.5, 16_384.0, when)


def make_run(directory: Path, records: Sequence[Record] = (), config: str | None = CONFIG, **changes: object) -> Path:
    directory.mkdir(parents=True)
    status: dict[str, object] = {
        "state": "running",
        "step": 80,
        "epoch": 11,
        "total_steps": 210,
        "world_size": 2,
        "reason": "",
        "exit_code": None,
        "launch": "horovodrun",
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": "2024-01-01T00:00:00Z",
        "updated": NOW.isoformat(),
        "finished": None,
        "best_accuracy": None,
        "samples_per_second": None,
    }
    (directory / "status.json").write_text(json.dumps({**status, **changes}))
    if config is not None:
        (directory / "config.yaml").write_text(config)
    if records:
        (directory / "metrics.jsonl").write_text("".join(to_json(record) + "\n" for record in records))
    return directory


def only_run(directory: Path, now: datetime = NOW) -> RunSummary:
    (run,) = read_runs(directory, now)
    return run


def test_a_running_run_shows_progress_best_accuracy_throughput_and_time_left(tmp_path: Path) -> None:
    records: list[Record] = [train(step, 1000.0 + step * 2.0) for step in range(1, 101)]
    records += [EvaluationRecord(step, 1.0, "test", 0.5, 0.8 - step / 1000, 10, 0.0) for step in (7, 14)]
    records.append(EvaluationRecord(14, 2.0, "train", 0.5, 0.99, 10, 0.0))
    make_run(tmp_path / "lb", records)
    assert only_run(tmp_path) == RunSummary(
        directory=tmp_path / "lb",
        name="lb",
        state="running",
        note="",
        step=80,
        total_steps=210,
        epoch=11,
        world_size=2,
        best_accuracy=0.793,
        samples_per_second=16_384.0,
        seconds_left=220.0,
        model="vgg9",
        data="fashion-mnist",
        global_size=8192,
        noise="smoothout 0.01",
    )


def test_what_status_json_knows_better_is_taken_from_it(tmp_path: Path) -> None:
    make_run(tmp_path / "lb", [train(1, 0.0)], best_accuracy=0.9, samples_per_second=5.0)
    run = only_run(tmp_path)
    assert (run.best_accuracy, run.samples_per_second) == (0.9, 5.0)


def test_a_run_that_has_not_done_a_step_is_shown(tmp_path: Path) -> None:
    make_run(tmp_path / "lb", state="starting", step=0, epoch=0, total_steps=None)
    run = only_run(tmp_path)
    assert (run.state, run.step, run.total_steps, run.seconds_left, run.best_accuracy) == (
        "starting",
        0,
        None,
        None,
        None,
    )


def test_a_run_that_failed_before_its_settings_were_saved_says_why_it_failed(tmp_path: Path) -> None:
    make_run(tmp_path / "lb", config=None, state="failed", reason="the data are missing")
    run = only_run(tmp_path)
    assert (run.state, run.note, run.model) == ("failed", "the data are missing", None)


@pytest.mark.parametrize("state", ["finished", "failed", "stopped"])
def test_a_run_that_has_ended_keeps_its_state_however_old_and_has_no_time_left(state: str, tmp_path: Path) -> None:
    make_run(
        tmp_path / "lb",
        [train(1, 0.0), train(2, 1.0)],
        state=state,
        pid=2**22 + 1,
        reason="a reason",
        updated="2020-01-01T00:00:00Z",
    )
    run = only_run(tmp_path)
    assert (run.state, run.note, run.seconds_left) == (state, "a reason", None)


@pytest.mark.parametrize("state", ["starting", "running", "stopping"])
def test_a_run_whose_process_was_killed_is_lost(state: str, tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert process.stdin is not None
    make_run(tmp_path / "lb", state=state, pid=process.pid, updated=datetime.now(UTC).isoformat())
    try:
        assert only_run(tmp_path).state == state
    finally:
        process.kill()
        process.stdin.close()
        process.wait()
    run = only_run(tmp_path)
    assert run.state == "lost"
    assert run.note == f"its process {process.pid} is gone; start it again to resume"
    assert run.seconds_left is None


def test_another_process_that_has_got_the_number_is_not_taken_for_the_run(tmp_path: Path) -> None:
    make_run(tmp_path / "lb", pid=os.getpid(), started="2020-01-01T00:00:00Z", updated="2020-01-01T00:10:00Z")
    assert only_run(tmp_path).state == "lost"


def test_a_run_on_another_host_is_lost_when_it_has_been_silent_for_long(tmp_path: Path) -> None:
    run = make_run(tmp_path / "lb", [train(1, 0.0)], host="node7", pid=1)
    os.utime(run / "metrics.jsonl", (0, 0))
    assert only_run(tmp_path, NOW + timedelta(minutes=9)).state == "running"
    late = only_run(tmp_path, NOW + timedelta(minutes=11))
    assert (late.state, late.note) == ("lost", "silent for 11:00 on node7; start it again to resume")


def test_a_metrics_file_that_grows_is_a_sign_of_life(tmp_path: Path) -> None:
    run = make_run(tmp_path / "lb", [train(1, 0.0)], host="node7", updated="2020-01-01T00:00:00Z")
    os.utime(run / "metrics.jsonl", (NOW.timestamp(), NOW.timestamp()))
    assert only_run(tmp_path).state == "running"


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("status.json", None, "no status.json"),
        ("status.json", '{"state": "runn', "status.json is no status"),
        ("status.json", "[]", "status.json is no status"),
        ("status.json", '{"state": "flying", "step": 1}', "status.json is no status"),
        ("status.json", '{"state": "running"}', "status.json is no status"),
        ("config.yaml", "run: {name", "config.yaml is not YAML"),
        ("config.yaml", "", "config.yaml holds no settings"),
    ],
)
def test_a_broken_directory_is_shown_with_why_beside_the_whole_ones(
    name: str, content: str | None, why: str, tmp_path: Path
) -> None:
    make_run(tmp_path / "whole")
    broken = make_run(tmp_path / "broken", [train(1, 0.0)])
    if content is None:
        (broken / name).unlink()
    else:
        (broken / name).write_text(content)
    first, second = read_runs(tmp_path, NOW)
    assert (first.name, first.state) == ("broken", "broken")
    assert why in first.note
    assert (second.name, second.state) == ("whole", "running")


def test_runs_are_found_at_any_depth_in_order_and_not_inside_runs(tmp_path: Path) -> None:
    for name in ("study/b/seed1", "study/a/seed0", "alone"):
        make_run(tmp_path / name)
    (tmp_path / "alone" / "checkpoints" / "checkpoints").mkdir(parents=True)
    (tmp_path / "data").mkdir()
    assert [run.name for run in read_runs(tmp_path)] == ["alone", "study/a/seed0", "study/b/seed1"]
    assert [run.name for run in read_runs(tmp_path / "alone")] == ["alone"]


def test_a_folder_that_is_not_there_is_an_error_of_the_user(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no folder"):
        read_runs(tmp_path / "nowhere")


def run_command(*words: str) -> int:
    arguments = parse(["runs", *words])
    return int(arguments.run(arguments))


def test_the_command_prints_one_whole_line_a_run_into_a_pipe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long_name = "a_study_with_a_long_name/learning_rate=0.4,noise=0.01,sharing=micro_batch/seed=3"
    make_run(
        tmp_path / long_name,
        state="finished",
        step=210,
        epoch=30,
        best_accuracy=0.8812,
        samples_per_second=1234.5,
    )
    make_run(tmp_path / "z[bold]", state="failed", reason="the loss is not finite at step 80", exit_code=3)
    assert run_command(str(tmp_path)) == 0
    lines = [re.sub(r"\s{2,}", "  ", line.strip()) for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert lines[0] == "run  state  model  data  batch  ranks  epoch  step  done  best  images/s  left  note"
    assert lines[2] == (f"{long_name}  finished  vgg9  fashion-mnist  8,192  2  30  210/210  100%  88.12 %  1,234")
    assert lines[3] == (
        "z[bold]  failed  vgg9  fashion-mnist  8,192  2  11  80/210  38%  the loss is not finite at step 80"
    )
    assert len(lines) == 4


def test_the_command_says_when_there_are_no_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(str(tmp_path)) == 0
    assert capsys.readouterr().out == f"no runs in {tmp_path}\n"


def test_the_command_looks_into_runs_when_it_is_told_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="there is no folder runs"):
        run_command()


def as_text(table: Table) -> str:
    page = io.StringIO()
    Console(file=page, width=200).print(table)
    return page.getvalue()


def test_slurm_s_states_of_the_jobs_stand_beside_the_runs_own() -> None:
    runs = (RunSummary(Path("a"), "a", "running", "", slurm_job="7"), RunSummary(Path("b"), "b", "finished", ""))
    shown = as_text(render(runs, {"7": "PENDING"}))
    assert "slurm" in shown
    assert "7 PENDING" in shown
    assert "slurm" not in as_text(render(runs, {}))


STATUS_NUMBERS = ("step", "epoch", "total_steps", "world_size", "pid", "best_accuracy", "samples_per_second")
RECORD_NUMBERS = ("step", "epoch", "accuracy", "samples_per_second", "time")
BEYOND = ("Infinity", "-Infinity", "NaN", "1e999", "9" * 400)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.yaml", "[" * 20_000),
        ("config.yaml", "".join(f"{' ' * depth}a:\n" for depth in range(2_000))),
        ("config.yaml", LAUGHS),
        ("config.yaml", "run: &run {name: *run}"),
        ("config.yaml", "!!set {a, b}"),
        ("config.yaml", b"\xff\xfe\x00"),
        ("status.json", b"\xff\xfe\x00"),
        ("status.json", "[" * 100_000),
        *(("status.json", (field, number)) for field in STATUS_NUMBERS for number in BEYOND),
    ],
)
def test_one_broken_directory_is_one_row_that_says_so(name: str, content: Content, tmp_path: Path) -> None:
    good, odd = beside_a_good_one(name, content, tmp_path)
    assert (good.state, odd.name, odd.state) == ("running", "odd", "broken")
    assert name in odd.note


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.yaml", "run: 2024-13-45"),
        ("config.yaml", "run: {name: 2024-02-30}"),
        ("config.yaml", f"batch: {{global_size: 0x{'f' * 10_000}}}"),
        *(("status.json", (field, '"0001-01-01T00:00:00"')) for field in ("started", "updated")),
        *(("metrics.jsonl", (field, number)) for field in RECORD_NUMBERS for number in BEYOND),
        ("metrics.jsonl", "[" * 100_000),
        ("metrics.jsonl", '{"kind": "event", "step": 1, "time": 1, "event": ' + "[" * 100_000),
    ],
)
def test_a_value_that_means_nothing_takes_no_table_down(name: str, content: Content, tmp_path: Path) -> None:
    good, odd = beside_a_good_one(name, content, tmp_path)
    assert (good.state, odd.state) == ("running", "running")


def beside_a_good_one(name: str, content: Content, folder: Path) -> tuple[RunSummary, ...]:
    """Return the rows of a good run, and of one whose file `name` has other content, or one other value."""
    records = [train(step, NOW.timestamp() + step) for step in range(1, 4)]
    make_run(folder / "good", records)
    path = make_run(folder / "odd", records, best_accuracy=0.5, samples_per_second=1.5) / name
    if isinstance(content, tuple):
        field, value = content
        content = re.sub(rf'"{field}": ("[^"]*"|[^,}}\n]+)', f'"{field}": {value}', path.read_text())
        assert value in content
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    rows = read_runs(folder, NOW)
    assert "odd" in as_text(render(rows))
    return rows


@pytest.mark.parametrize("name", ["config.yaml", "status.json", "metrics.jsonl"])
def test_a_pipe_where_a_file_should_be_keeps_nobody_waiting(name: str, tmp_path: Path) -> None:
    make_run(tmp_path / "good")
    path = make_run(tmp_path / "odd") / name
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    program = [sys.executable, "-m", "dist_train", "runs", str(tmp_path)]
    table = subprocess.run(program, capture_output=True, text=True, check=True, timeout=60).stdout
    assert "good" in table
    assert re.search(r"odd +broken", table)
