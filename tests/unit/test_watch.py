"""A run seen from its directory: what is shown of it, at every size and in every state."""

from __future__ import annotations

import errno
import io
import itertools
import json
import math
import os
import re
import shutil
import socket
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest
from rich.console import Console

from dist_train.outcome import ExitCode, UsageError
from dist_train.rundir.epochs import Epochs
from dist_train.rundir.metrics_file import to_json
from dist_train.rundir.paths import RunDirectory
from dist_train.rundir.records import EventRecord, Measurement, RankMeasurement, Record, StepParts
from dist_train.rundir.status import RanksFile, StatusFile
from dist_train.watch.run import History, Snapshot, WatchedRun, find_run
from dist_train.watch.run_table import seconds_left
from dist_train.watch.view import frame, plan, summary
from tests.raising import raises
from tests.unit.records import evaluation, train, write_records
from tests.waiting import PATIENCE, wait_for

NOW = datetime(2024, 5, 6, 12, 0, tzinfo=UTC).timestamp()
CONFIG = "data: {name: fashion-mnist}\nmodel: {name: vgg9}\nbatch: {global_size: 8192}\n"
STEPS = 40
PER_EPOCH = 10


def records(steps: int = STEPS, seconds: float = 2.0, last: float = NOW) -> list[Record]:
    """Return a run of `steps` updates, one each `seconds`, the last one made at `last`."""
    made: list[Record] = []
    for step in range(1, steps + 1):
        when, epoch = last - (steps - step) * seconds, step / PER_EPOCH
        made.append(
            train(
                step,
                epoch=epoch,
                loss=4.0 / step,
                accuracy=0.7,
                learning_rate=0.125,
                noise_amplitude=0.01,
                gradient_norm=1.5,
                step_seconds=0.25,
                samples_per_second=32_768.0,
                time=when,
            )
        )
        if step % PER_EPOCH == 0:
            made.append(evaluation(step, "train", epoch=epoch, loss=3.0 / step, accuracy=0.8, time=when))
            made.append(evaluation(step, epoch=epoch, loss=3.5 / step, accuracy=0.6 + step / 1000, time=when))
            made.append(EventRecord(step, "checkpoint", when, {"bytes": 10}))
    return made


def write_status(directory: Path, **changes: object) -> None:
    status = {
        "state": "running",
        "step": STEPS,
        "epoch": STEPS / PER_EPOCH,
        "total_steps": 100,
        "total_epochs": 100 / PER_EPOCH,
        "world_size": 4,
        "reason": "",
        "exit_code": None,
        "launch": "",
        "host": "another-host",
        "pid": 7,
        "started": datetime.fromtimestamp(NOW - 600, UTC).isoformat(),
        "updated": datetime.fromtimestamp(NOW, UTC).isoformat(),
        "finished": None,
        "best_accuracy": None,
        "samples_per_second": 30_000.0,
    }
    (directory / "status.json").write_text(json.dumps({**status, **changes}))


def write_ranks(directory: Path, count: int) -> None:
    """Write as many ranks, of which the second is the slowest."""
    ranks = tuple(
        RankMeasurement(0.9 if rank == 1 else 0.3 + rank / 10_000, 0.05, 2**31, math.nan, math.nan, math.nan)
        for rank in range(count)
    )
    parts = StepParts(0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    RanksFile(directory / "ranks.json").measurement(Measurement(STEPS, NOW, 0.9, parts, 1.0, 1.0, ranks))


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A run that continues, on another host."""
    run = tmp_path / "demo"
    (run / "checkpoints").mkdir(parents=True)
    for step in (30, 40):
        (run / "checkpoints" / f"step-{step:08}.json").write_text("{}")
    (run / "config.yaml").write_text(CONFIG)
    write_records(run, records())
    write_status(run)
    write_ranks(run, 4)
    return run


def look(directory: Path, now: float = NOW + 3.0) -> Snapshot:
    return WatchedRun(directory).look(now)


def drawn(run: Snapshot, columns: int = 100, rows: int = 36) -> str:
    console = Console(file=io.StringIO(), width=columns, height=rows, color_system=None, force_terminal=False)
    console.print(frame(run, columns, rows), height=rows)
    text = console.file.getvalue()  # type: ignore[attr-defined]  # it is a StringIO
    lines = text.splitlines()
    assert len(lines) == rows
    assert max(map(len, lines)) <= columns
    return str(text)


def words(text: str) -> str:
    """Return `text` with single spaces, to look for facts whatever their columns are."""
    return re.sub(r"\s+", " ", text)


@pytest.mark.parametrize(("columns", "rows"), [(100, 40), (60, 36)])
def test_a_terminal_that_has_ascii_alone_shows_frames_and_curves(directory: Path, columns: int, rows: int) -> None:
    page = io.BytesIO()
    console = Console(file=io.TextIOWrapper(page, "ascii"), width=columns, height=rows, color_system=None)
    console.print(frame(look(directory), columns, rows), height=rows)
    console.file.flush()
    lines = page.getvalue().decode("ascii").splitlines()
    assert len([line for line in lines if re.search(r"\|[ +xo]*\+\+[ +xo]*\|", line)]) > 1
    assert len([line for line in lines if re.search(r"\+-{20,}\+", line)]) > 3


class TestFacts:
    def test_a_running_run_shows_how_far_and_how_well(self, directory: Path) -> None:
        shown = words(drawn(look(directory)))
        for fact in (
            "demo running",
            "vgg9, fashion-mnist, batch 8,192, 4 ranks",
            "epoch 4 of 10",
            "step 40/100",
            "2:00 left",
            "last activity 3 s ago on another-host, process 7",
            "loss batch 0.1 train 0.075 test 0.0875",
            "accuracy batch 70.0 % train 80.0 % test 64.0 %",
            "images/s 32,768",
            "step time 250 ms",
            "learning rate 0.125",
            "noise 0.01",
            "gradient norm 1.5",
            "best test 64.00 %",
            "step 40, 3 s ago (2 kept)",
        ):
            assert fact in shown, fact

    def test_images_per_second_are_those_of_the_time_that_the_updates_took(self, directory: Path) -> None:
        made = [train(step, step_seconds=step, samples_per_second=120 / step, time=NOW) for step in (1, 3)]
        write_records(directory, made)
        assert "images/s 60 " in words(drawn(look(directory)))

    @pytest.mark.parametrize(("seconds", "text"), [(0.0005, "0.5 ms"), (0.9998, "1,000 ms"), (2_468.0, "2,468 s")])
    def test_the_time_of_a_step_is_never_in_scientific_notation(
        self, seconds: float, text: str, directory: Path
    ) -> None:
        write_records(directory, [train(1, step_seconds=seconds, time=NOW)])
        assert f"step time {text} " in words(drawn(look(directory)))

    def test_the_slowest_rank_is_marked(self, directory: Path) -> None:
        shown = words(drawn(look(directory)))
        assert "ranks at step 40" in shown
        assert "1 900 ms 50 ms 2.0 GiB slowest" in shown
        assert shown.count("slowest") == 1

    def test_of_a_thousand_ranks_the_slowest_and_a_summary_are_shown(self, directory: Path) -> None:
        write_ranks(directory, 1024)
        shown = drawn(look(directory), 140, 60)
        assert "1 900 ms 50 ms 2.0 GiB slowest" in words(shown)
        assert "1,024 ranks (least, median, most): busy 300 ms, 351 ms, 900 ms" in words(shown)
        listed = re.findall(r"│ +(\d+) +\d+ ms +50 ms", shown)
        assert listed == ["1", *(str(rank) for rank in range(1023, 1014, -1))]

    def test_ranks_of_an_earlier_launch_are_not_shown(self, directory: Path) -> None:
        write_status(directory, started=datetime.fromtimestamp(NOW + 60, UTC).isoformat())
        assert look(directory).ranks is None

    def test_events_are_shown_with_their_age_and_checkpoints_are_not_among_them(self, directory: Path) -> None:
        event = EventRecord(20, "not_finite", NOW - 57.0, {"rank": 3})
        write_records(directory, [*records(), event])
        shown = words(drawn(look(directory)))
        assert "1 min ago step 20: not finite (rank 3)" in shown
        assert ": checkpoint (" not in shown

    def test_numbers_that_are_not_finite_are_said_so_and_drawn_as_gaps(self, directory: Path) -> None:
        nan = math.nan
        made = [*records(), train(41, epoch=4.1, loss=nan, gradient_norm=nan, time=NOW)]
        write_records(directory, made)
        shown = words(drawn(look(directory)))
        assert "loss batch not finite" in shown
        assert "gradient norm not finite" in shown

    def test_a_single_loss_that_is_astronomical_is_shown_as_a_number(self, directory: Path) -> None:
        write_records(directory, [train(1, epoch=0.1, loss=1e17, time=NOW)])
        assert "loss batch 1e+17" in words(drawn(look(directory)))

    @pytest.mark.parametrize("size", [(60, 20), (60, 50), (80, 24), (89, 30), (90, 24), (100, 35), (250, 80)])
    @pytest.mark.parametrize("ranks", [0, 1, 4, 1024])
    def test_whatever_the_size_the_essentials_are_there(
        self, directory: Path, size: tuple[int, int], ranks: int
    ) -> None:
        (directory / "ranks.json").unlink()
        if ranks:
            write_ranks(directory, ranks)
        page = drawn(look(directory), *size)
        for name in ("images/s", "learning rate", "gradient norm"):
            assert re.search(rf"{name}[^\S\n]+\d", page), f"{name} and its value are on two lines"
        shown = words(page)
        for fact in ("demo running", "step 40/100", "2:00 left", "last activity", "test 0.0875", "images/s"):
            assert fact in shown, fact
        assert re.search(r"accuracy (batch )?70\.0", shown)
        assert re.search("[\u2801-\u28ff]{2}", shown), "no curve"

    def test_a_curve_of_zeros_beside_a_logarithmic_axis_is_left_out(self, directory: Path) -> None:
        losses = [train(step, epoch=step / PER_EPOCH, loss=10.0 ** -(step % 4), time=NOW) for step in range(1, 21)]
        zeros = [evaluation(step, split, loss=0.0, time=NOW) for step in (10, 20) for split in ("train", "test")]
        write_records(directory, [*losses, *zeros])
        assert "train 0 test 0" in words(drawn(look(directory)))

    @pytest.mark.parametrize("columns", [1, 3, 4, 6, 7, 12, 20])
    def test_a_terminal_too_narrow_for_curves_is_no_error(self, directory: Path, columns: int) -> None:
        for rows in (8, 15, 30, 50):
            drawn(look(directory), columns, rows)

    def test_a_run_that_has_done_nothing_yet_is_shown_too(self, directory: Path) -> None:
        (directory / "metrics.jsonl").unlink()
        (directory / "ranks.json").unlink()
        (directory / "checkpoints").rename(directory / "moved")
        write_status(
            directory, state="starting", step=0, epoch=0.0, total_steps=None, total_epochs=None, samples_per_second=None
        )
        shown = words(drawn(look(directory)))
        assert "demo starting" in shown
        assert "nothing measured yet" in shown
        assert "checkpoints none yet" in shown


class TestPlan:
    @pytest.mark.parametrize("columns", [40, 60, 89, 90, 200])
    @pytest.mark.parametrize("ranks", [0, 1, 16, 1024])
    def test_parts_fill_the_height_and_never_more(self, columns: int, ranks: int) -> None:
        for rows in range(1, 100):
            parts = plan(columns, rows, ranks)
            heights = (parts.curves, parts.accuracy, parts.rates, parts.ranks, parts.events)
            assert min(heights) >= 0
            assert sum(heights) == max(0, rows - 5)
            if rows >= 20:
                assert parts.curves >= 7
                assert parts.rates >= 2


class TestSilence:
    @pytest.mark.parametrize(
        ("pace", "silence", "is_long"),
        [(2.0, 50.0, False), (2.0, 70.0, True), (30.0, 140.0, False), (30.0, 170.0, True)],
    )
    def test_silence_is_long_against_the_run_s_own_pace(
        self, directory: Path, pace: float, silence: float, is_long: bool
    ) -> None:
        write_records(directory, records(seconds=pace))
        run = look(directory, NOW + silence)
        assert run.silent is is_long
        assert ("no activity for" in drawn(run)) is is_long

    def test_it_says_for_how_long(self, directory: Path) -> None:
        assert "no activity for 3 min on another-host" in drawn(look(directory, NOW + 180.0))

    def test_time_between_two_launches_is_nobody_s_pace(self, directory: Path) -> None:
        resumed = EventRecord(STEPS, "resumed", NOW + 100_000.0, {})
        later = [
            train(step, epoch=step / PER_EPOCH, time=NOW + 100_000.0 + 2 * (step - STEPS))
            for step in range(STEPS + 1, STEPS + 6)
        ]
        write_records(directory, [*records(), resumed, *later])
        run = look(directory, NOW + 100_010.0)
        assert run.seconds_left == pytest.approx(2.0 * 55)
        assert run.history.longest_gap() == pytest.approx(2.0)

    def test_a_clock_that_is_wrong_is_not_silence_while_things_change(self, directory: Path) -> None:
        watched, an_hour_on = WatchedRun(directory), NOW + 3600.0
        assert watched.look(an_hour_on).silent
        with (directory / "metrics.jsonl").open("a") as file:
            file.write(to_json(train(41, epoch=4.1, time=NOW)) + "\n")
        run = watched.look(an_hour_on + 1.0)
        assert not run.silent
        assert run.silence is not None
        assert run.silence < 1.0

    @pytest.mark.parametrize("changes", [False, True])
    def test_silence_of_a_run_whose_clock_is_ahead_is_reported(self, directory: Path, changes: bool) -> None:
        watched, half_an_hour_ago = WatchedRun(directory), NOW - 1800.0
        silence = watched.look(half_an_hour_ago).silence
        assert silence is not None
        assert silence < PATIENCE
        if changes:
            write_records(directory, records(41))
            watched.look(half_an_hour_ago)
        wait_for(lambda: (watched.look(half_an_hour_ago).silence or 0.0) > 0.05)

    def test_a_process_of_this_host_that_is_gone_is_lost(self, directory: Path) -> None:
        write_status(directory, host=socket.gethostname(), pid=2**22 + 1)
        assert look(directory, NOW + 3.0).state == "running"
        run = look(directory, NOW + 20.0)
        assert (run.state, run.is_over) == ("lost", True)
        assert "its process 4194305 is gone" in drawn(run)

    def test_a_process_of_this_host_that_lives_is_not(self, directory: Path) -> None:
        status = StatusFile(directory / "status.json", 4)
        status.change("running", step=STEPS, total_steps=100)
        assert status.current.pid == os.getpid()
        assert WatchedRun(directory).look(time.time() + 3600.0).state == "running"


class TestFollowing:
    def test_a_status_that_could_not_be_read_once_is_read_again(self, directory: Path) -> None:
        path = directory / "status.json"
        write_status(directory, state="finished", exit_code=0)
        content, stamp = path.read_bytes(), path.stat().st_mtime_ns
        write_status(directory)
        watched = WatchedRun(directory)
        assert watched.look(NOW).state == "running"
        for found, state in ((b"?" * len(content), "running"), (content, "finished")):
            path.write_bytes(found)  # the same file, size and time: all that changes is that it can be read
            os.utime(path, ns=(stamp, stamp))
            assert watched.look(NOW).state == state

    def test_new_records_are_added_to_the_old(self, directory: Path) -> None:
        write_records(directory, records()[:20])
        watched = WatchedRun(directory)
        few = watched.look(NOW).history.latest[-1].step
        write_records(directory, records())
        run = watched.look(NOW)
        assert few < STEPS == run.history.latest[-1].step
        assert len(run.history.train) == STEPS

    def test_a_run_that_is_rewound_shows_only_what_is_left(self, directory: Path) -> None:
        watched = WatchedRun(directory)
        watched.look(NOW)
        write_records(directory, records(20))
        write_status(directory, step=20, epoch=2.0)
        run = watched.look(NOW)
        assert run.step == 20
        assert [point.step for point in run.history.train] == list(range(1, 21))
        assert len(run.history.evaluations["test"]) == 2

    def test_torn_lines_are_passed_over(self, directory: Path) -> None:
        lines = (directory / "metrics.jsonl").read_text().splitlines(keepends=True)
        (directory / "metrics.jsonl").write_text("".join([*lines[:5], lines[5][:30] + "\n", *lines[6:]]) + '{"kind')
        run = look(directory)
        assert len(run.history.train) == STEPS - 1
        assert run.problem == ""

    def test_a_run_whose_directory_is_gone_stays_as_it_was_and_is_then_over(self, directory: Path) -> None:
        watched, later = WatchedRun(directory), NOW + PATIENCE
        watched.look(NOW)
        directory.rename(directory.with_name("moved"))
        run = watched.look(later)
        assert "directory is gone" in drawn(run)
        assert (run.state, run.step, run.silence) == ("running", STEPS, PATIENCE)
        assert run.checkpoints == (30, 40)
        directory.with_name("moved").rename(directory)
        run = watched.look(later)
        assert (run.problem, run.step, run.silence) == ("", STEPS, PATIENCE)
        shutil.rmtree(directory)
        looks = itertools.takewhile(lambda run: not run.is_over, (watched.look(later) for _ in range(100)))
        assert 2 <= len(list(looks)) <= 10
        assert watched.look(later).state == "lost"

    def test_checkpoints_that_cannot_be_listed_for_a_moment_end_no_view(
        self, directory: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        watched = WatchedRun(directory)
        watched.look(NOW)

        def fail(run: RunDirectory) -> tuple[int, ...]:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(run.checkpoints))

        monkeypatch.setattr(RunDirectory, "checkpoint_steps", fail)
        run = watched.look(NOW)
        assert "checkpoints cannot be read" in drawn(run)
        assert run.checkpoints == (30, 40)
        write_status(directory, host=socket.gethostname(), pid=4_194_305)
        assert look(directory, NOW + 100).state == "running", "that it is lost is said once its checkpoints are known"

    def test_a_run_without_a_readable_status_is_shown_and_said_so(self, directory: Path) -> None:
        (directory / "status.json").unlink()
        shown = drawn(look(directory))
        assert "unknown: status.json is missing" in shown
        assert "step 40" in shown

    def test_a_long_run_is_read_and_drawn_within_a_second(self, directory: Path) -> None:
        steps, per_epoch = 100_000, 1_000
        lines = []
        for step in range(1, steps + 1):
            lines.append(
                f'{{"kind": "train", "step": {step}, "epoch": {step / per_epoch}, "loss": 0.5, "accuracy": 0.75, '
                f'"learning_rate": 0.1, "noise_amplitude": 0.01, "gradient_norm": 1.25, "step_seconds": 0.1, '
                f'"samples_per_second": 81920.0, "time": {NOW - (steps - step) / 10}}}\n'
            )
            if step % per_epoch == 0:
                lines.append(to_json(evaluation(step, epoch=step / per_epoch, accuracy=0.8, time=NOW)) + "\n")
        (directory / "metrics.jsonl").write_text("".join(lines))
        seconds = []  # the least of three: other programs share the caches
        for _ in range(3):
            begun = time.process_time()
            run = WatchedRun(directory).look(NOW)
            drawn(run)
            seconds.append(time.process_time() - begun)
        assert min(seconds) < 1.0
        assert len(run.history.evaluations["test"]) == steps // per_epoch
        assert [record.step for record in run.history.latest] == list(range(steps - 59, steps + 1))
        points = run.history.train
        assert len(points) < 10_000
        assert points[-1].step > 0.99 * steps


class TestEnd:
    def test_a_run_that_has_ended_is_over_and_summed_up(self, directory: Path) -> None:
        watched = WatchedRun(directory)
        assert not watched.look(NOW).is_over
        finished = datetime.fromtimestamp(NOW, UTC).isoformat()
        write_status(directory, state="failed", reason="the loss is not finite", exit_code=3, finished=finished)
        run = watched.look(NOW + 99.0)
        assert run.is_over
        assert run.seconds_left is None
        (directory / "ranks.json").unlink()
        assert "not measured yet" not in drawn(watched.look(NOW + 99.0))
        console = Console(file=io.StringIO(), width=400)
        console.print(summary(run, box=None))
        told = words(console.file.getvalue())  # type: ignore[attr-defined]  # it is a StringIO
        for fact in (
            "state failed: the loss is not finite (exit code 3)",
            "steps 40 of 100",
            "train accuracy 80.00 %",
            "best accuracy 64.00 %",
            "time 10:00",
            "step-00000040.pt",
        ):
            assert fact in told, fact

    @pytest.mark.parametrize("state", ["finished", "stopped", "failed"])
    def test_silence_after_the_end_is_not_remarked_upon(self, directory: Path, state: str) -> None:
        write_status(directory, state=state, exit_code=int(ExitCode.FINISHED))
        run = look(directory, NOW + 600.0)
        assert not run.silent
        assert "ended 10 min ago" in drawn(run)


class TestFinding:
    def test_a_directory_or_a_name_below_runs(
        self, directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert find_run(directory) == directory
        (tmp_path / "runs").mkdir()
        directory.rename(tmp_path / "runs" / "demo")
        monkeypatch.chdir(tmp_path)
        assert find_run(Path("demo")) == Path("runs/demo")

    def test_what_is_no_run_is_refused_with_the_fix(self, tmp_path: Path) -> None:
        with raises(UsageError, "run-missing"):
            find_run(Path("nowhere"))
        with raises(UsageError, "no-run-here"):
            find_run(tmp_path)


class TestGrowingBatches:
    @pytest.mark.parametrize("seen_later", ["record", "status"])
    def test_epoch_is_that_of_the_last_update_not_in_proportion_to_updates(
        self, seen_later: str, tmp_path: Path
    ) -> None:
        passes = Epochs.of([(0, 128), (5, 8192)], lambda size: 8192 // size)
        run = tmp_path / "grown"
        run.mkdir()
        (run / "config.yaml").write_text(
            "run: {epochs: 10}\nbatch: {global_size: 128, schedule: [{epoch: 5, global_size: 8192}]}\n"
        )
        at = {"record": 320, "status": 320, seen_later: 323}
        write_records(run, [train(step, epoch=passes.done(step), time=NOW) for step in range(1, at["record"] + 1)])
        write_status(run, step=at["status"], epoch=passes.done(at["status"]), total_steps=325, total_epochs=10)
        seen = look(run)
        assert (seen.step, seen.epoch, seen.total_epochs) == (323, 8.0, 10)


class TestHistory:
    def test_of_many_batches_few_are_kept(self) -> None:
        history = History()
        for at in range(0, 30_000, 500):
            records = (train(step, epoch=step / 10, loss=2.0 * step, time=NOW) for step in range(at + 1, at + 501))
            history.take([to_json(record).encode() for record in records])
        assert 2_048 <= len(history.train) <= 4_096
        assert history.train[-1].step > 29_500
        gaps = {b.step - a.step for a, b in itertools.pairwise(history.train)}
        assert len(gaps) == 1, gaps

    def test_lines_that_are_no_records_change_nothing(self) -> None:
        history = History()
        history.take([b"", b"{", b"[]", b'{"kind": "train"}', b'{"kind": "of another version"}'])
        assert history.train == []
        assert history.best_accuracy() is None
        assert seconds_left(history.latest, 10) is None
