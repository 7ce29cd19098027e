"""One launch at a time in a run directory: the second is told who is there, and a dead owner keeps nobody out."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import pytest

from dist_train.outcome import FaultError, UsageError
from dist_train.rundir.lock import Holder, LockRequest, RunLock, process_runs
from dist_train.rundir.paths import RunDirectory
from tests.raising import raises
from tests.waiting import PATIENCE

_HOLD = """
import fcntl, sys, time
file = open(sys.argv[1], "w")
fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(600)
"""


def lock(root: Path, *, patience: float = 0.0, lease: float = 0.0) -> RunLock:
    held = LockRequest(RunDirectory(root), patience=patience, lease=lease).wait(600)
    assert held is not None
    return held


@contextmanager
def held_by_another(root: Path) -> Iterator[subprocess.Popen[str]]:
    """Have another process hold the lock of `root`."""
    process = subprocess.Popen([sys.executable, "-c", _HOLD, str(root / "run.lock")], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def test_the_second_is_refused_and_told_who_is_there(tmp_path: Path) -> None:
    (tmp_path / "run.lock").write_text(f"{'an earlier launch with longer names' * 9}\n")
    first = lock(tmp_path)
    with raises(UsageError, "run-in-use") as refused:
        lock(tmp_path)
    assert f"process {os.getpid()} on {socket.gethostname()}" in str(refused.value)
    first.release()


def test_a_dead_owner_does_not_keep_it(tmp_path: Path) -> None:
    with held_by_another(tmp_path) as other:
        other.send_signal(signal.SIGKILL)
        other.wait()
        lock(tmp_path).release()


def test_an_owner_that_is_about_to_end_is_waited_for(tmp_path: Path) -> None:
    with held_by_another(tmp_path) as other:
        threading.Timer(0.3, other.kill).start()
        lock(tmp_path, patience=60).release()
        assert other.wait() == -signal.SIGKILL


def test_waiting_in_turns_for_an_owner_leaves_nothing_open(tmp_path: Path) -> None:
    with held_by_another(tmp_path):
        request, before = LockRequest(RunDirectory(tmp_path), patience=60), os.listdir("/proc/self/fd")
        assert request.wait(0) is None
        assert os.listdir("/proc/self/fd") == before


def test_it_can_be_taken_again_once_it_is_released(tmp_path: Path) -> None:
    for _ in range(2):
        lock(tmp_path).release()


def test_what_a_process_starts_does_not_inherit_it(tmp_path: Path) -> None:
    held = lock(tmp_path)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        held.release()
        lock(tmp_path).release()
    finally:
        child.kill()
        child.wait()


def test_a_requeued_job_waits_for_the_lease_of_the_node_that_it_ran_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run.lock"
    path.write_text(json.dumps({"host": "node-that-died", "pid": 1, "since": "2026", "slurm_job": "77"}))
    descriptor = os.open(path, os.O_RDWR)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        monkeypatch.setenv("SLURM_JOB_ID", "77")
        begun = time.monotonic()
        with raises(FaultError, "run-in-use"):  # the job is requeued
            lock(tmp_path, lease=0.4)
        assert time.monotonic() - begun >= 0.4
        monkeypatch.setenv("SLURM_JOB_ID", "78")
        begun = time.monotonic()
        with raises(UsageError, "run-in-use"):
            lock(tmp_path, lease=60.0)
        assert time.monotonic() - begun < 30
    finally:
        os.close(descriptor)


def test_a_rank_of_the_same_job_on_this_node_that_takes_long_to_end_is_a_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    former = lock(tmp_path)
    with raises(FaultError, "run-in-use"):  # the run is started again
        lock(tmp_path, lease=60.0)
    former.release()


def test_a_lock_file_that_says_nothing_is_still_a_lock(tmp_path: Path) -> None:
    first = lock(tmp_path)
    (tmp_path / "run.lock").write_bytes(b"\xff{")
    with raises(UsageError, "run-in-use"):
        lock(tmp_path)
    first.release()


def test_without_locks_a_warning_says_that_nobody_is_kept_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    held = lock(tmp_path)
    held.check()
    held.release()
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_a_file_server_that_fails_lets_nobody_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", fail)
    with pytest.raises(OSError, match="Input/output error"):
        lock(tmp_path)


def test_a_directory_made_anew_is_not_the_one_that_was_locked(tmp_path: Path) -> None:
    root = tmp_path / "run"
    root.mkdir()
    held = lock(root)
    held.check()
    root.rename(tmp_path / "away")
    with pytest.raises(FileNotFoundError):
        held.check()
    root.mkdir()
    other = lock(root)
    with pytest.raises(OSError, match="replaced"):
        held.check()
    other.release()
    held.release()


def test_a_file_that_was_deleted_by_itself_is_made_again(tmp_path: Path) -> None:
    held, path = lock(tmp_path), tmp_path / "run.lock"
    told = path.read_bytes()
    path.unlink()
    held.check()
    assert json.loads(path.read_bytes())["pid"] == json.loads(told)["pid"]
    with raises(UsageError, "run-in-use"):
        lock(tmp_path)
    path.unlink()
    other = lock(tmp_path)
    with pytest.raises(OSError, match="another launch"):
        held.check()
    other.release()
    held.release()
    lock(tmp_path).release()


def test_a_check_by_another_thread_meanwhile_is_not_deceived(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held, path = lock(tmp_path), tmp_path / "run.lock"
    held._holder = Holder("here", os.getpid(), "an hour ago")
    path.write_text(json.dumps(asdict(held._holder)))
    has_looked, is_made, flock, copy = threading.Event(), threading.Event(), fcntl.flock, os.dup2

    def flock_late(descriptor: int, operation: int) -> None:
        if threading.current_thread() is not threading.main_thread():
            has_looked.set()
            is_made.wait(0.2)
        flock(descriptor, operation)

    def copy_and_pause(one: int, other: int, inheritable: bool = True) -> None:
        copy(one, other, inheritable)
        is_made.set()
        wait([checked], PATIENCE)

    with ThreadPoolExecutor() as pool, monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", flock_late)
        patch.setattr(os, "dup2", copy_and_pause)
        checked = pool.submit(held.check)
        assert has_looked.wait(PATIENCE)
        path.unlink()
        held.check()
        checked.result()
    held.release()


def test_a_lock_that_the_file_server_has_taken_back_is_noticed_if_another_launch_got_it(tmp_path: Path) -> None:
    held = lock(tmp_path)
    holder = (tmp_path / "run.lock").read_bytes()
    fcntl.flock(held._descriptor, fcntl.LOCK_UN)  # as for a client that was cut off for longer than its lease
    held.check()
    with raises(UsageError, "run-in-use"):
        lock(tmp_path)
    fcntl.flock(held._descriptor, fcntl.LOCK_UN)
    with held_by_another(tmp_path), pytest.raises(OSError, match="another launch"):
        held.check()
    (tmp_path / "run.lock").write_bytes(holder.replace(b'"pid": ', b'"pid": 1'))  # of one that has ended since
    with pytest.raises(OSError, match="another launch"):
        held.check()
    held.release()


def test_it_does_not_become_an_old_file_that_is_purged(tmp_path: Path) -> None:
    held, path = lock(tmp_path), tmp_path / "run.lock"
    os.utime(path, (0, 0))
    held.check()
    assert path.stat().st_mtime > 0
    held.release()


def test_a_process_that_has_ended_or_that_has_the_pid_of_an_earlier_one_is_not_the_one_that_was_seen() -> None:
    now = time.time()
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        assert process_runs(process.pid, now)
        assert not process_runs(process.pid, now - 60)
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert not process_runs(process.pid, now), "a zombie"


def test_only_the_user_may_read_the_lock(tmp_path: Path) -> None:
    lock(tmp_path).release()
    assert (tmp_path / "run.lock").stat().st_mode & 0o777 == 0o600
