from __future__ import annotations

import errno
import html
import io
import json
import math
import os
import pty
import re
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeAlias

import pytest
from rich.console import Console
from rich.table import Table

from dist_train.cli.main import main, parse
from dist_train.monitoring.prometheus.board import Board
from dist_train.outcome import UsageError
from dist_train.rundir.epochs import Epochs
from dist_train.rundir.metrics_file import from_json
from dist_train.rundir.paths import BrokenFileError, RunDirectory
from dist_train.rundir.records import EventRecord, Record
from dist_train.rundir.status import Status, load_status
from dist_train.watch.run import WatchedRun
from dist_train.watch.run_table import RunSummary, as_json, corrected_by_slurm, read_runs, render
from tests.raising import raises
from tests.unit.exporting import FACTS
from tests.unit.records import STEPS_PER_EPOCH, evaluation, train, write_records
from tests.unit.test_config_loading import LAUGHS
from tests.waiting import PATIENCE

DOCS = Path(__file__).parents[2] / "docs"
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


def make_run(directory: Path, records: Sequence[Record] = (), config: str | None = CONFIG, **changes: object) -> Path:
    directory.mkdir(parents=True)
    status: dict[str, object] = {
        "state": "running",
        "step": 80,
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
    status |= changes
    for epochs, steps in (("epoch", status["step"]), ("total_epochs", status["total_steps"])):
        status.setdefault(epochs, steps / STEPS_PER_EPOCH if isinstance(steps, int) else None)
    (directory / "status.json").write_text(json.dumps(status))
    if config is not None:
        (directory / "config.yaml").write_text(config)
    if records:
        write_records(directory, records)
    return directory


def only_run(directory: Path, now: datetime = NOW) -> RunSummary:
    (run,) = read_runs(directory, now)
    return run


def test_a_running_run_shows_progress_best_accuracy_throughput_and_time_left(tmp_path: Path) -> None:
    records: list[Record] = [train(step, time=1000.0 + step * 2.0) for step in range(1, 101)]
    records += [evaluation(step, accuracy=0.8 - step / 1000) for step in (7, 14)]
    records.append(evaluation(14, "train", accuracy=0.99))
    make_run(tmp_path / "lb", records)
    run = only_run(tmp_path)
    assert run.seconds_left == pytest.approx(220.0)
    assert replace(run, seconds_left=None) == RunSummary(
        directory=tmp_path / "lb",
        name="lb",
        state="running",
        note="",
        step=80,
        total_steps=210,
        epoch=80 / STEPS_PER_EPOCH,
        total_epochs=30,
        world_size=2,
        best_accuracy=0.793,
        samples_per_second=100.0,
        model="vgg9",
        data="fashion-mnist",
        global_size=8192,
        noise="smoothout 0.01",
    )


def test_noise_whose_amplitude_is_not_used_is_shown_without_it(tmp_path: Path) -> None:
    make_run(tmp_path / "lb", config="noise: {method: ivon, amplitude: 0.01}\n")
    assert only_run(tmp_path).noise == "ivon"


def test_time_left_does_not_count_the_pause_before_a_resume(tmp_path: Path) -> None:
    before = [train(step, time=step * 2.0) for step in range(1, 41)]
    after = [train(step, time=90_000.0 + step * 2.0) for step in range(41, 46)]
    make_run(tmp_path / "lb", [*before, EventRecord(40, "resumed", 90_080.0, {}), *after], step=45, total_steps=100)
    assert only_run(tmp_path).seconds_left == pytest.approx(2.0 * 55)


GROWING = """\
run: {epochs: 10}
batch: {global_size: 128, micro_size: 128, schedule: [{epoch: 5, global_size: 8192}]}
"""


@pytest.mark.parametrize("step", [100, 319, 320, 321, 323])
@pytest.mark.parametrize("most", [None, 322])
def test_time_left_of_growing_batches_is_that_of_their_samples(step: int, most: int | None, tmp_path: Path) -> None:
    passes = Epochs.of([(0, 128), (5, 8192)], lambda size: 8_200 // size)
    total = min(passes.steps(10), most or passes.steps(10))
    seconds = 0.001  # per sample
    records = [
        train(each, epoch=passes.done(each), time=passes.samples(each) * seconds)
        for each in range(1, min(step, total) + 1)
    ]
    changes = {"step": records[-1].step, "epoch": records[-1].epoch, "total_steps": total, "host": "another-host"}
    changes["total_epochs"] = passes.done(total)
    run = make_run(tmp_path / "grown", records, GROWING, **changes)
    left = (passes.samples(total) - passes.samples(records[-1].step)) * seconds
    assert only_run(tmp_path).seconds_left == pytest.approx(left, rel=0.02)
    watched = WatchedRun(run).look(NOW.timestamp())
    assert watched.seconds_left == pytest.approx(left, rel=0.02)


def test_what_status_json_knows_better_is_taken_from_it(tmp_path: Path) -> None:
    make_run(tmp_path / "lb", [train(1)], best_accuracy=0.9, samples_per_second=5.0)
    run = only_run(tmp_path)
    assert (run.best_accuracy, run.samples_per_second) == (0.9, 5.0)


def test_an_evaluation_that_is_not_finite_is_the_best_nowhere(tmp_path: Path) -> None:
    records = [evaluation(7, accuracy=0.4), evaluation(14, loss=math.nan, accuracy=0.5)]
    path = make_run(tmp_path / "lb", records)
    board = Board(FACTS)
    for record in records:
        board.apply(record)
    best = WatchedRun(path).look().history.best_accuracy()
    assert (only_run(path).best_accuracy, best, board.snapshot().best_accuracy) == (0.4, 0.4, 0.4)


def test_only_the_end_of_the_records_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_run(tmp_path / "lb", [train(step, time=step * 2.0) for step in range(1, 2001)], total_steps=2100)
    parsed: list[str | bytes] = []

    def parse_line(line: str | bytes) -> Record | None:
        parsed.append(line)
        return from_json(line)

    monkeypatch.setattr("dist_train.rundir.metrics_file.from_json", parse_line)
    run = only_run(path)
    assert run.samples_per_second == 100.0
    assert run.seconds_left == pytest.approx(200.0)
    assert len(parsed) < 1000


def test_run_of_another_user_is_a_row_that_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b", "c"):
        make_run(tmp_path / name)
    scandir = os.scandir

    def scan(path: str) -> Iterator[os.DirEntry[str]]:
        if path == str(tmp_path / "b"):  # root may read everything
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", scan)
    monkeypatch.setattr("dist_train.watch.run_table.load_status", _refuse_b)
    assert [(run.name, run.state) for run in read_runs(tmp_path)] == [
        ("a", "running"),
        ("b", "broken"),
        ("c", "running"),
    ]


def _refuse_b(path: Path) -> Status:
    if path.parent.name == "b":
        raise BrokenFileError("status.json cannot be read: Permission denied")
    return load_status(path)


def test_a_table_is_printed_in_any_encoding(tmp_path: Path) -> None:
    make_run(tmp_path / "lb", state="failed", reason="GLHF! \N{BEACH WITH UMBRELLA}")
    command = [sys.executable, "-m", "dist_train", "runs", str(tmp_path)]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    ended = subprocess.run(command, capture_output=True, env=environment, timeout=PATIENCE, cwd=DOCS.parent)
    assert (ended.returncode, ended.stderr) == (0, b"")
    assert b"GLHF! ?" in ended.stdout


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
        [train(1), train(2, time=1.0)],
        state=state,
        pid=2**22 + 1,
        reason="a reason",
        updated="2020-01-01T00:00:00Z",
    )
    run = only_run(tmp_path)
    assert (run.state, run.note, run.seconds_left) == (state, "a reason", None)


@pytest.mark.parametrize(
    ("state", "launch", "patience"), [("starting", "", 10.0), ("running", "4f1c", 60.0), ("stopping", "4f1c", 60.0)]
)
def test_a_run_whose_process_was_killed_is_lost_if_no_other_takes_over(
    state: str, launch: str, patience: float, tmp_path: Path
) -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert process.stdin is not None
    seen = datetime.now(UTC)
    make_run(tmp_path / "lb", state=state, pid=process.pid, launch=launch, updated=seen.isoformat())
    try:
        assert only_run(tmp_path, seen + timedelta(hours=1)).state == state
    finally:
        process.kill()
        process.stdin.close()
        process.wait()
    assert only_run(tmp_path, seen - timedelta(hours=1)).state == "lost", "the clock was ahead"
    assert only_run(tmp_path, seen + timedelta(seconds=patience - 1)).state == state
    run = only_run(tmp_path, seen + timedelta(seconds=patience + 1))
    assert run.state == "lost"
    assert f"its process {process.pid} is gone" in run.note
    assert run.seconds_left is None


@pytest.mark.parametrize("host", [socket.gethostname(), "node7"])
def test_a_lost_run_is_said_to_resume_only_if_it_holds_a_checkpoint(host: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "lb", pid=2**22 + 1, host=host)
    assert "no checkpoint" in only_run(tmp_path, NOW + timedelta(hours=1)).note
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / "step-00000040.json").touch()
    assert only_run(tmp_path, NOW + timedelta(hours=1)).note.endswith("start it again to resume")


def test_a_lost_run_resumes_from_its_fallback_directory(tmp_path: Path) -> None:
    spare = tmp_path / "spare"
    settings = f"checkpoint: {{fallback_directory: {spare}}}"
    run = RunDirectory(make_run(tmp_path / "runs" / "lb", pid=2**22 + 1, config=settings))
    later = NOW + timedelta(hours=1)
    assert str(spare) in only_run(run.root.parent, later).note, "one may be there, on another node"
    assert not run.id.exists(), "a table changes no run"
    run.fallback(spare).mkdir(parents=True)
    (run.fallback(spare) / "step-00000040.json").touch()
    assert only_run(run.root.parent, later).note.endswith("start it again to resume")


def test_another_process_that_has_got_the_number_is_not_taken_for_the_run(tmp_path: Path) -> None:
    make_run(tmp_path / "lb", pid=os.getpid(), started="2020-01-01T00:00:00Z", updated="2020-01-01T00:10:00Z")
    assert only_run(tmp_path).state == "lost"


@pytest.mark.parametrize("place", [{"host": "node7"}, {"host": socket.gethostname(), "pid_namespace": "pid:[1]"}])
@pytest.mark.parametrize("pid", [1, 2**22 + 1])
def test_a_run_on_another_host_or_in_a_container_is_lost_when_it_has_been_silent_for_long(
    pid: int, place: dict[str, str], tmp_path: Path
) -> None:
    run = make_run(tmp_path / "lb", [train(1)], pid=pid, **place)
    os.utime(run / "metrics.jsonl", (0, 0))
    assert only_run(tmp_path, NOW + timedelta(minutes=9)).state == "running"
    late = only_run(tmp_path, NOW + timedelta(minutes=11))
    assert late.state == "lost"
    assert f"silent for 11:00 on {place['host']}" in late.note


@pytest.mark.parametrize(
    ("state", "job", "shown"),
    [
        ("running", "RUNNING", "running"),
        ("running", "PENDING", "lost"),
        ("running", "NODE_FAIL", "lost"),
        ("failed", "PENDING", "stopped"),
        ("failed", "FAILED", "failed"),
        ("finished", "COMPLETING", "finished"),
        ("running", "", "running"),
    ],
)
def test_a_run_and_its_job_never_contradict_each_other(state: str, job: str, shown: str) -> None:
    run = RunSummary(Path("run"), "run", state, "", slurm_job="17")
    [corrected] = corrected_by_slurm([run], {"17": job} if job else {})
    assert corrected.state == shown
    assert bool(corrected.note) is (shown != state)


@pytest.mark.parametrize(("state", "shown"), [("lost", "running"), ("stopping", "stopping"), ("stopped", "stopped")])
def test_a_run_that_slurm_has_suspended_is_not_lost(state: str, shown: str) -> None:
    run = RunSummary(Path("run"), "run", state, "silent for 11:00", slurm_job="17")
    [corrected] = corrected_by_slurm([run], {"17": "SUSPENDED"})
    assert corrected.state == shown
    assert ("SUSPENDED" in corrected.note) is (shown != "stopped")


def test_a_metrics_file_that_grows_is_a_sign_of_life(tmp_path: Path) -> None:
    run = make_run(tmp_path / "lb", [train(1)], host="node7", updated="2020-01-01T00:00:00Z")
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
        ("config.yaml", "run: {name", "config.yaml is not YAML: line 1, column 11"),
        ("config.yaml", "", "config.yaml holds no settings"),
    ],
)
def test_a_broken_directory_is_shown_with_why_beside_the_whole_ones(
    name: str, content: str | None, why: str, tmp_path: Path
) -> None:
    make_run(tmp_path / "whole")
    broken = make_run(tmp_path / "broken", [train(1)])
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


def test_links_to_runs_elsewhere_are_found_and_no_others_followed(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "folder", tmp_path / "elsewhere"
    make_run(folder / "here")
    make_run(elsewhere / "run")
    for name, target in (("link", elsewhere / "run"), ("again", folder / "here"), ("up", tmp_path), ("no", elsewhere)):
        (folder / name).symlink_to(target)
    assert [run.name for run in read_runs(folder)] == ["here", "link"]


def test_a_folder_that_is_not_there_is_an_error_of_the_user(tmp_path: Path) -> None:
    with raises(UsageError, "folder-missing"):
        read_runs(tmp_path / "nowhere")


def run_command(*words: str) -> int:
    arguments = parse(["runs", *words])
    return int(arguments.run(arguments))


def test_the_command_prints_one_whole_line_a_run_into_a_pipe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long_name = "a_study_with_a_long_name/learning_rate=0.4,noise=0.01,sharing=micro_batch/seed=3"
    make_run(
        tmp_path / long_name, state="finished", step=210, epoch=30, best_accuracy=0.8812, samples_per_second=1234.5
    )
    make_run(tmp_path / "z[bold]", state="failed", reason="the loss is not finite at step 80", exit_code=3)
    assert run_command(str(tmp_path)) == 0
    lines = [re.sub(r"\s{2,}", "  ", line.strip()) for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert lines[0] == "run  state  model  data  batch  ranks  epoch  step  done  best  images/s  left  note"
    assert lines[2] == (f"{long_name}  finished  vgg9  fashion-mnist  8,192  2  30  210/210  100%  88.12 %  1,234")
    assert lines[3] == (
        "z[bold]  failed  vgg9  fashion-mnist  8,192  2  11.43  80/210  38%  the loss is not finite at step 80"
    )
    assert len(lines) == 4


def test_a_note_of_any_length_pads_no_row_beyond_some_hundred_characters(tmp_path: Path) -> None:
    make_run(tmp_path / "a", state="failed", reason="word " * 2000)
    table = render(read_runs(tmp_path, NOW))
    assert table.columns[-1].max_width == 600


def test_the_command_says_when_there_are_no_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(str(tmp_path)) == 0
    assert capsys.readouterr().out == f"no runs in {tmp_path}\n"


def test_the_command_looks_into_runs_when_it_is_told_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with raises(UsageError, "folder-missing"):
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
    records = [train(step, time=NOW.timestamp() + step) for step in range(1, 4)]
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
    table = subprocess.run(program, capture_output=True, text=True, check=True, timeout=PATIENCE).stdout
    assert "good" in table
    assert re.search(r"odd +broken", table)


REASON = (
    "rank 1 on node7 (process 4242) does not answer; the others saved nothing since step 160.\n"
    "  Traceback: NCCL communicator was aborted on rank 0. Original reason for failure was: watchdog timeout\n"
) * 4


def thirty_runs(folder: Path) -> Path:
    """Write thirty runs of a study, three of which went wrong: failed, lost, and with a file cut short."""
    for index in range(30):
        variant = ("sb", "lb", "lb-noise-amplitude-0.01", "lb-noise-amplitude-0.1", "lb-sam")[index % 5]
        changes: dict[str, object] = {"state": "finished", "step": 210, "best_accuracy": 0.85 + index / 500}
        if index == 7:
            changes = {"state": "failed", "step": 161, "reason": REASON, "best_accuracy": 0.8731}
        elif index == 12:
            changes = {"pid": 2**22 + 1, "updated": "2026-01-01T00:00:00Z"}
        elif index > 26:
            changes = {"step": 31 + index, "best_accuracy": 0.79}
        begun = [train(step, time=1000.0 + step * 2.0) for step in range(1, 60)] if index > 26 else []
        run = make_run(folder / f"{variant}-seed-{index // 5}", begun, samples_per_second=100.0, **changes)  # type: ignore[arg-type]  # CONFIG stays
        if index == 18:
            (run / "status.json").write_text('{"state": "runn')
    return folder


def page_of(folder: Path, width: int) -> Console:
    """Return what the table of the runs in `folder` is on a terminal of so many columns, recorded."""
    console = Console(width=width, record=True, file=io.StringIO(), force_terminal=True, highlight=False)
    console.print(render(read_runs(folder), width=width))
    return console


@pytest.mark.parametrize("width", [80, 100])
def test_a_narrow_terminal_has_every_name_and_one_line_a_run(width: int, tmp_path: Path) -> None:
    runs = read_runs(thirty_runs(tmp_path))
    lines = page_of(tmp_path, width).export_text().rstrip().splitlines()[2:]
    assert [line.split()[:2] for line in lines] == [[run.name, run.state] for run in runs]
    assert max(map(len, lines)) <= width
    [failed] = [line for line in lines if " failed " in line]
    assert failed.rstrip().endswith("…")
    assert "rank 1 on " in failed


def test_a_name_longer_than_the_terminal_is_folded_and_not_cut(tmp_path: Path) -> None:
    name = "a-study-of-many-settings/" + "x" * 100
    make_run(tmp_path / name, state="failed", reason=REASON)
    lines = page_of(tmp_path, 80).export_text().rstrip().splitlines()[2:]
    assert "".join(line[: len(lines[0].split()[0])].rstrip() for line in lines) == name
    assert " failed " in lines[0]


def test_the_command_keeps_to_the_terminal_s_width(tmp_path: Path) -> None:
    thirty_runs(tmp_path)
    ours, theirs = pty.openpty()
    environment = {**os.environ, "COLUMNS": "80", "TERM": "xterm"}
    with subprocess.Popen(
        [sys.executable, "-m", "dist_train", "runs", str(tmp_path)], stdout=theirs, env=environment
    ) as process:
        os.close(theirs)
        shown = b""
        # how Linux says that nobody holds the other end any more
        with os.fdopen(ours, "rb", buffering=0) as terminal, suppress(OSError):
            while part := terminal.read(1 << 16):
                shown += part
    assert process.returncode == 0
    lines = re.sub(r"\x1b\[[0-9;]*m", "", shown.decode()).rstrip().splitlines()
    assert len([line for line in lines if "-seed-" in line]) == 30
    assert max(map(len, lines)) <= 80


def test_a_pipe_gets_every_column_even_in_colour(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    thirty_runs(tmp_path)
    for name, value in (("FORCE_COLOR", "1"), ("COLUMNS", "40")):
        monkeypatch.setenv(name, value)
    assert main(["runs", str(tmp_path)]) == 0
    shown = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    assert {"run", "data", "images/s", "note"} <= set(shown.splitlines()[0].split())
    assert " ".join(REASON.split())[:500] in shown


def test_the_picture_in_the_docs_is_of_today_s_table(tmp_path: Path) -> None:
    picture = (DOCS / "runs.svg").read_text(encoding="utf-8")
    words = html.unescape(re.sub(r"<style.*?</style>|<[^>]*>", " ", picture, flags=re.DOTALL)).split()
    for word in page_of(thirty_runs(tmp_path), 80).export_text().split():
        assert word in words, "renew it: python -m tests.unit.test_watch_run_table"


def test_json_is_one_document_with_the_whole_reason_and_only_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path / "a", [train(1)], state="failed", reason=REASON, samples_per_second=7.0)
    assert main(["runs", str(tmp_path), "--json"]) == 0

    def refuse(word: str) -> None:
        raise AssertionError(word)

    [run] = json.loads(capsys.readouterr().out, parse_constant=refuse)["runs"]
    assert (run["directory"], run["note"], run["samples_per_second"]) == (str(tmp_path / "a"), REASON, 7.0)
    assert (run["state"], run["step"], run["slurm_state"]) == ("failed", 80, None)
    documented = (DOCS / "watching.md").read_text(encoding="utf-8")
    assert all(f"`{field}`" in documented for field in run)
    odd = RunSummary(tmp_path, "odd", "running", "", samples_per_second=math.nan)
    assert json.loads(as_json([odd], {}), parse_constant=refuse)["runs"][0]["samples_per_second"] is None


def test_json_of_a_folder_without_runs_is_a_document_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"runs": []}


def draw_picture() -> None:
    """Write the picture of docs/watching.md."""
    with TemporaryDirectory() as folder:
        console = page_of(thirty_runs(Path(folder)), 80)
    console.save_svg(str(DOCS / "runs.svg"), title="dist-train runs", unique_id="dist-train-runs")


if __name__ == "__main__":
    draw_picture()
