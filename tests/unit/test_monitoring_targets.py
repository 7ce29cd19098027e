from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from dist_train.cli.main import main
from dist_train.config import load_config
from dist_train.launching.run import train
from dist_train.monitoring.prometheus import targets
from dist_train.monitoring.prometheus.board import outcome_label
from dist_train.monitoring.prometheus.messages import ServingPlan
from dist_train.monitoring.prometheus.targets import (
    TargetFile,
    process_identity,
    record_outcome,
    remove_stale,
    target_file,
)
from dist_train.rundir.paths import RunDirectory
from dist_train.rundir.records import Outcome
from tests.unit.exporting import FACTS, LEFT, OUTCOME, STOPPED, serving
from tests.unit.foreign_files import give_away
from tests.waiting import wait_for


def plan(directory: Path, host: str = "127.0.0.1", advertised: str | None = None, tls: bool = False) -> ServingPlan:
    certificate = Path("certificate.pem") if tls else None
    return ServingPlan(
        host, 9810, certificate_file=certificate, targets_directory=directory, advertised_host=advertised
    )


def mine(
    directory: Path, name: str = "demo", rank: int = 0, process: str | None = None, exporter: str | None = None
) -> TargetFile:
    facts = replace(FACTS, name=name, rank=rank, run_directory=directory / "runs" / name)
    process = process or process_identity(os.getpid())
    target = target_file(plan(directory), facts, 9811, process, exporter or process)
    target.write()
    return target


def gone(directory: Path, name: str = "gone", exporter: str | None = None) -> TargetFile:
    with subprocess.Popen(["sleep", "60"]) as child:
        process = process_identity(child.pid)
        child.kill()
    return mine(directory, name, process=process, exporter=exporter)


def end(target: TargetFile, outcome: str) -> None:
    record_outcome(target.path, target.process, outcome)


def age(path: Path, seconds: float) -> None:
    os.utime(path, (time.time() - seconds,) * 2)


def test_the_file_says_where_and_what(tmp_path: Path) -> None:
    target = target_file(plan(tmp_path, "0.0.0.0", tls=True), FACTS, 9811, "host pid:[1] 12 34", "host pid:[1] 13 35")
    assert json.loads(target.content) == [
        {
            "targets": ["node1:9811"],
            "labels": {
                "job": "dist_train",
                "run": 'a "run"\\',
                "run_id": "0123456789abcdef",
                "slurm_job": "4711",
                "node": "node1",
                "rank": "0",
                "__param_run_id": "0123456789abcdef",
                "__scheme__": "https",
                "__dist_train_process": "host pid:[1] 12 34",
                "__dist_train_exporter": "host pid:[1] 13 35",
            },
        }
    ]
    assert target.path.name.startswith("a__run__-")


@pytest.mark.parametrize(
    ("host", "advertised", "address"),
    [
        ("127.0.0.1", None, "127.0.0.1:9811"),
        ("0.0.0.0", None, "node1:9811"),
        ("::", None, "node1:9811"),
        ("fd00::1", None, "[fd00::1]:9811"),
        ("0.0.0.0", "node1.cluster.example", "node1.cluster.example:9811"),
    ],
)
def test_the_address_is_one_that_others_reach(host: str, advertised: str | None, address: str, tmp_path: Path) -> None:
    target = target_file(plan(tmp_path, host, advertised), FACTS, 9811, process_identity(1), process_identity(1))
    assert json.loads(target.content)[0]["targets"] == [address]


def test_everybody_may_read_the_file_whatever_the_user_s_own_files_are(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        assert mine(tmp_path).path.stat().st_mode & 0o777 == 0o644
    finally:
        os.umask(before)


def test_runs_and_ranks_have_files_of_their_own(tmp_path: Path) -> None:
    paths = {
        mine(tmp_path).path,
        mine(tmp_path, rank=1).path,
        mine(tmp_path, "other").path,
        target_file(plan(tmp_path), replace(FACTS, name="demo"), 9811, process_identity(1), process_identity(1)).path,
    }
    assert len(paths) == 4


def test_runs_of_the_same_path_on_different_file_systems_have_files_of_their_own(tmp_path: Path) -> None:
    with (
        serving(targets_directory=tmp_path),
        serving(replace(FACTS, run_id="fedcba9876543210"), targets_directory=tmp_path),
    ):
        assert len(list(tmp_path.glob("*.json"))) == 2


def test_a_temporary_file_has_a_name_that_nobody_guesses_and_prometheus_does_not_look_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names: set[Path] = set()
    replace_file = os.replace

    def look(temporary: Path, path: Path) -> None:
        assert temporary.read_text()
        assert temporary.suffix != ".json"
        names.add(temporary)
        replace_file(temporary, path)

    monkeypatch.setattr(os, "replace", look)
    mine(tmp_path)
    mine(tmp_path)
    assert len(names) == 2


def test_only_what_is_ours_and_gone_is_removed(tmp_path: Path) -> None:
    living, dead, silent = mine(tmp_path), gone(tmp_path), mine(tmp_path, "silent")
    far = mine(tmp_path, "far", process="elsewhere pid:[1] 1 2")
    far_and_silent = mine(tmp_path, "far2", process="elsewhere pid:[1] 1 2")
    age(silent.path, 301)
    age(far.path, 200)
    age(far_and_silent.path, 301)
    others = {
        "hand-made.json": '[{"targets": ["a:1"]}]',
        "demo-0123abcd-0.json": '[{"targets": ["a:1"], "labels": {"job": "node"}}]',
        "demo-0123abcd-1.json": "[]",
        "demo-0123abcd-2.json": "{torn",
        "notes.txt": "",
        "copy-of.json": dead.content,
    }
    for name, content in others.items():
        (tmp_path / name).write_text(content)
        age(tmp_path / name, 1e6)
    assert set(remove_stale(tmp_path)[0]) == {dead.path, silent.path, far_and_silent.path}
    assert {path.name for path in tmp_path.iterdir()} == {living.path.name, far.path.name, *others}


def test_the_first_rank_of_each_node_alone_removes_what_is_gone(tmp_path: Path) -> None:
    silent, facts = mine(tmp_path, "silent"), replace(FACTS, nodes=("node1", "node1", "node2"))
    age(silent.path, 301)
    with serving(replace(facts, rank=1), targets_directory=tmp_path):
        assert silent.path.exists()
    with serving(replace(facts, rank=2, node="node2"), targets_directory=tmp_path):
        assert not silent.path.exists()


def test_a_run_that_begins_says_that_one_that_has_just_died_was_killed(tmp_path: Path) -> None:
    dead, before = gone(tmp_path), mine(tmp_path, "before", process=process_identity(os.getpid())[:-1])
    age(before.path, 301)
    assert remove_stale(tmp_path, resumed="another")[0] == [before.path]
    assert labels_of(dead.path)["outcome"] == "killed"
    end(dead, "failed")
    assert labels_of(dead.path)["outcome"] == "killed", "what was said first stays"
    assert remove_stale(tmp_path, resumed=FACTS.run_id)[0] == [dead.path]


@pytest.mark.parametrize("resumed", ["another", ""])
def test_it_is_left_to_a_living_exporter_to_say_how_its_run_ended(resumed: str, tmp_path: Path) -> None:
    dead = gone(tmp_path, exporter=process_identity(os.getpid()))
    assert remove_stale(tmp_path, resumed=resumed)[0] == []
    assert dead.path.read_text() == dead.content


def test_a_process_of_the_same_number_is_another_one(tmp_path: Path) -> None:
    process = process_identity(os.getpid())
    target = mine(tmp_path, process=f"{process.rpartition(' ')[0]} 1")
    assert remove_stale(tmp_path)[0] == [target.path]


def labels_of(path: Path) -> dict[str, str]:
    [group] = json.loads(path.read_text())
    labels: dict[str, str] = group["labels"]
    return labels


def test_the_end_of_a_launch_leaves_the_file_of_the_next_one(tmp_path: Path) -> None:
    before = mine(tmp_path, process="elsewhere pid:[1] 1 2")
    now = mine(tmp_path)
    assert now.path == before.path
    end(before, "stopped")
    assert now.path.read_text() == now.content
    end(now, "finished")
    end(now, "killed")
    assert labels_of(now.path)["outcome"] == "finished", "what was said first stays"
    now.path.unlink()
    end(now, "finished")
    assert not now.path.exists()


def test_an_ended_run_has_the_labels_that_it_had_and_no_address_that_another_may_take(tmp_path: Path) -> None:
    target = mine(tmp_path)
    [before] = json.loads(target.path.read_text())
    end(target, "failed")
    [after] = json.loads(target.path.read_text())
    assert after["targets"] == ["127.0.0.1:0"]
    assert after["labels"] == {**before["labels"], "outcome": "failed", "instance": before["targets"][0]}


def test_of_an_ended_run_rank_0_s_file_alone_stays(tmp_path: Path) -> None:
    first, second = mine(tmp_path), mine(tmp_path, rank=1)
    for target in (first, second):
        end(target, "finished")
    assert labels_of(first.path)["outcome"] == "finished"
    assert not second.path.exists()


@pytest.mark.parametrize(
    ("outcome", "label"),
    [
        (OUTCOME, "finished"),
        (STOPPED, "stopped"),
        (replace(OUTCOME, state="failed", exit_code=1), "failed"),
        (replace(OUTCOME, state="failed", exit_code=3), "diverged"),
        (LEFT, "killed"),
    ],
)
def test_the_label_says_how_the_run_ended(outcome: Outcome, label: str) -> None:
    assert outcome_label(outcome) == label


def test_what_says_how_a_run_ended_stays_for_a_while_or_until_the_run_is_back(tmp_path: Path) -> None:
    process = process_identity(os.getpid()).rpartition(" ")[0] + " 1"
    recent, old = mine(tmp_path, "recent", process=process), mine(tmp_path, "old", process=process)
    for target in (recent, old):
        end(target, "failed")
    age(old.path, targets.ENDED_SECONDS + 1)
    assert remove_stale(tmp_path)[0] == [old.path]
    assert remove_stale(tmp_path, resumed="another")[0] == []
    assert remove_stale(tmp_path, resumed=FACTS.run_id)[0] == [recent.path]


def test_rank_with_another_number_moves_its_file_but_not_that_of_its_successor(tmp_path: Path) -> None:
    def ranks() -> list[str]:
        return [path.stem.rpartition("-")[2] for path in sorted(tmp_path.glob("*.json"))]

    with serving(replace(FACTS, rank=2), targets_directory=tmp_path) as exporter:
        assert ranks() == ["2"]
        exporter.regroup(replace(FACTS, rank=1))
        wait_for(lambda: ranks() == ["1"])
        (path,) = tmp_path.glob("*.json")
        theirs = path.read_text().replace(process_identity(os.getpid()), "another pid:[1] 2 3")
        path.write_text(theirs)
        exporter.regroup(replace(FACTS, rank=3))
        wait_for(lambda: ranks() == ["1", "3"])
    assert path.read_text() == theirs


def test_a_touched_file_is_new_and_one_that_was_removed_comes_back(tmp_path: Path) -> None:
    target = mine(tmp_path)
    age(target.path, 1000)
    target.touch()
    assert time.time() - target.path.stat().st_mtime < 60
    target.path.unlink()
    target.touch()
    assert target.path.read_text() == target.content


def test_the_heartbeat_is_well_within_the_time_that_is_allowed() -> None:
    assert targets.HEARTBEAT_SECONDS * 3 < targets.STALE_SECONDS


def test_the_command_cleans_where_the_runs_are_entered(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "targets"
    folder.mkdir()
    living, dead, seen, just_ended = mine(folder), gone(folder), mine(folder, "seen"), mine(folder, "just_ended")
    for target in (seen, just_ended):
        end(target, "failed")
    age(seen.path, targets.SEEN_SECONDS + 1)
    for name in ("one", "two"):
        run = tmp_path / "runs" / name
        run.mkdir(parents=True)
        (run / "status.json").write_text("{}")
        (run / "config.yaml").write_text(f"metrics:\n  targets_directory: {folder}\n")
    assert main(["runs", "--clean", str(tmp_path / "runs")]) == 0
    assert capsys.readouterr().out == f"removed {dead.path}\nremoved {seen.path}\n"
    assert living.path.exists()
    assert just_ended.path.exists()
    assert main(["runs", "--clean", str(tmp_path / "runs")]) == 0
    assert capsys.readouterr().out == f"nothing to clean in {folder}\n"


def test_a_relative_folder_is_that_of_the_run_and_no_other_is_cleaned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mine_now, former, elsewhere = (tmp_path / name for name in ("mine", "former", "elsewhere"))
    dead = [gone(folder / "targets") for folder in (mine_now, former, elsewhere)]
    monkeypatch.chdir(mine_now)
    run = RunDirectory(tmp_path / "runs" / "one")
    config = load_config("dist_train:configs/smoke.yaml", ["metrics.targets_directory=targets", "run.max_steps=1"])
    train(config, run.root)
    before = tmp_path / "runs" / "of_an_older_version"
    before.mkdir()
    (before / "status.json").write_text("{}")
    (before / "config.yaml").write_text("metrics:\n  targets_directory: targets\n")
    monkeypatch.chdir(elsewhere)
    assert main(["runs", "--clean", str(tmp_path / "runs")]) == 0
    assert [target.path.exists() for target in dead] == [False, True, True]
    assert "targets is not cleaned" in capsys.readouterr().err


def test_a_foreign_thing_in_the_folder_is_skipped_with_a_warning_and_hangs_nobody(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, run = tmp_path / "targets", tmp_path / "runs" / "one"
    folder.mkdir()
    run.mkdir(parents=True)
    (run / "status.json").write_text("{}")
    (run / "config.yaml").write_text(f"metrics:\n  targets_directory: {folder}\n")
    dead = gone(folder)
    elsewhere = tmp_path / "elsewhere.json"
    elsewhere.write_text(dead.content)
    os.mkfifo(folder / "fifo-0123abcd-0.json")
    (folder / "link-0123abcd-0.json").symlink_to(elsewhere)
    (folder / "deep-0123abcd-0.json").write_text("[" * 50_000)
    (folder / "large-0123abcd-0.json").write_text(dead.content + " " * 100_000)
    left = {"fifo-0123abcd-0.json", "link-0123abcd-0.json", "deep-0123abcd-0.json", "large-0123abcd-0.json"}
    their = folder / "their-0123abcd-0.json"
    their.write_text(dead.content)
    if give_away(their):
        left.add(their.name)
    else:
        their.unlink()
    with hanging_is_an_error():
        assert main(["runs", "--clean", str(tmp_path / "runs")]) == 0
    printed = capsys.readouterr()
    assert printed.out == f"removed {dead.path}\n"
    assert all(name in printed.err for name in left - {"deep-0123abcd-0.json"})
    assert {path.name for path in folder.iterdir()} == left
    assert elsewhere.exists()
    _, warning = remove_stale(folder, resumed="another")
    assert "link-0123abcd-0.json" in warning
    assert "of another user" not in warning, "runs of several users share the folder"


@pytest.mark.parametrize(("number", "is_skipped"), [(errno.EPERM, True), (errno.EACCES, False)])
def test_a_file_that_only_its_owner_may_remove_does_not_keep_the_others(
    number: int, is_skipped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = gone(tmp_path, "first"), gone(tmp_path, "second")
    unlink = Path.unlink

    def refuse(path: Path, missing_ok: bool = False) -> None:
        if path == first.path:  # what the kernel says of a sticky bit is EPERM, of a read-only folder EACCES
            raise PermissionError(number, os.strerror(number), path)
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", refuse)
    if not is_skipped:
        with pytest.raises(PermissionError):
            remove_stale(tmp_path)
        return
    removed, skipped = remove_stale(tmp_path)
    assert removed == [second.path]
    assert skipped.startswith(f"skipped target files: {first.path.name} (")


@contextmanager
def hanging_is_an_error() -> Iterator[None]:
    def hang(*_: object) -> None:
        raise AssertionError("it hangs")

    before = signal.signal(signal.SIGALRM, hang)
    signal.alarm(30)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("make", ["link", "fifo"])
def test_what_somebody_put_in_our_file_s_place_is_neither_followed_nor_touched(make: str, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("untouched")
    age(victim, 1000)
    before = victim.stat()
    target = mine(tmp_path / "targets")
    target.path.unlink()
    if make == "link":
        target.path.symlink_to(victim)
        found = errno.ELOOP
    else:
        os.mkfifo(target.path)
        found = errno.EINVAL
    with hanging_is_an_error():
        for visit in (target.touch, partial(end, target, "finished")):
            with pytest.raises(OSError, check=lambda error: error.errno == found):
                visit()
        target.write()
    assert target.path.read_text() == target.content
    assert not target.path.is_symlink()
    assert (victim.read_text(), victim.stat().st_mtime) == ("untouched", before.st_mtime)


def test_the_command_says_where_no_run_is_entered(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", "--clean", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"no run in {tmp_path} has metrics.targets_directory set: nothing to clean\n"
    assert main(["runs", "--clean", str(tmp_path / "nowhere")]) == 2
