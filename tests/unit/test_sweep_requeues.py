"""Whether a run is started again."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_train.launching.preflight import check_folder
from dist_train.outcome import ExitCode, UsageError
from dist_train.rundir.lock import LockRequest
from dist_train.rundir.paths import RunDirectory
from dist_train.rundir.status import StatusFile, load_status, read_status
from dist_train.sweep.requeues import EndedLaunch, decide, read_requeues
from tests.raising import raises
from tests.torture.disk import can_mount
from tests.unit.checkpoint_files import write

_NOISE = "srun: error: node2: tasks 2-3: Killed"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "checkpoints").mkdir()
    return tmp_path


def end(run: Path, code: ExitCode, reason: str = "it broke", launch: str = "") -> None:
    file = StatusFile(run / "status.json", world_size=2)
    file.current = replace(file.current, launch=launch)
    file.progress(step=7)
    file.end("stopped" if code == ExitCode.STOPPED else "failed", code, reason)


def checkpoint(run: Path, step: int) -> None:
    (run / "checkpoints" / f"step-{step:08d}.json").touch()


@pytest.mark.parametrize(
    ("code", "requeued"),
    [
        (ExitCode.FINISHED, False),
        (ExitCode.FAULT, True),
        (ExitCode.USAGE, False),
        (ExitCode.DIVERGED, False),
        (ExitCode.DISAGREEMENT, False),
        (ExitCode.STOPPED, True),
    ],
)
def test_it_depends_on_how_the_run_ended(run: Path, code: ExitCode, requeued: bool) -> None:
    end(run, code)
    assert (decide(run, limit=3).action == "requeue") is requeued


@pytest.mark.parametrize(("file", "code"), [("runs.json", "folder-is-study"), ("config.yaml", "folder-foreign-file")])
@pytest.mark.parametrize("exit_code", [ExitCode.USAGE, ExitCode.FAULT])
def test_a_folder_in_which_a_launch_was_refused_is_refused_again(
    tmp_path: Path, file: str, code: str, exit_code: ExitCode
) -> None:
    (tmp_path / file).write_text("[]")
    decide(tmp_path, 3, EndedLaunch("one", exit_code))
    with raises(UsageError, code):
        check_folder(RunDirectory(tmp_path))


def test_those_who_may_read_the_status_may_read_it_while_the_job_waits(run: Path) -> None:
    end(run, ExitCode.STOPPED)
    (run / "status.json").chmod(0o640)
    decide(run, limit=3)
    assert (run / "status.json").stat().st_mode & 0o777 == 0o640


def test_a_run_without_progress_is_given_up_after_the_limit(run: Path) -> None:
    checkpoint(run, 5)
    # The first crash follows a checkpoint, and so do the three after it, but the same one.
    for _ in range(3):
        end(run, ExitCode.FAULT)
        assert decide(run, limit=3).action == "requeue"
    end(run, ExitCode.FAULT, "rank 1: it broke")
    assert decide(run, limit=3).action == "end"
    status = read_status(run / "status.json")
    assert status is not None
    assert (status.state, status.exit_code, status.step) == ("failed", ExitCode.FAULT, 7)
    assert status.reason == (
        "given up after 3 requeues in a row without a checkpoint after step 5; the last time: rank 1: it broke"
    )


def test_progress_begins_the_count_anew(run: Path) -> None:
    for step in range(1, 10):
        end(run, ExitCode.STOPPED)
        checkpoint(run, step)
        assert decide(run, limit=1).action == "requeue"
    assert read_requeues(RunDirectory(run)).without_progress == 1


def test_a_run_that_resumes_from_an_earlier_checkpoint_has_made_no_progress(run: Path) -> None:
    for step in (5, 9):
        checkpoint(run, step)
    end(run, ExitCode.FAULT)
    assert decide(run, limit=1).action == "requeue"
    (run / "checkpoints" / "step-00000009.json").unlink()  # it was damaged
    assert decide(run, limit=1).action == "end"


def test_progress_is_what_comes_after_the_checkpoint_that_the_run_has_resumed_from(run: Path) -> None:
    for step in (5, 9):
        checkpoint(run, step)
    decide(run, limit=1, restarts=2)
    (run / "checkpoints" / "step-00000009.json").unlink()  # by the user, who distrusts it
    for step in (5, 6, 7, 8):
        checkpoint(run, step)
        end(run, ExitCode.FAULT)
        assert decide(run, limit=1, restarts=2).action == "restart"


def test_a_checkpoint_in_the_fallback_directory_is_progress(tmp_path: Path) -> None:
    files, spare = RunDirectory(tmp_path / "run"), tmp_path / "spare"
    files.create()
    files.config.write_text(f"checkpoint: {{fallback_directory: {spare}}}\n")
    for step in (5, 10):
        end(files.root, ExitCode.FAULT)
        files.fallback(spare).mkdir(parents=True, exist_ok=True)
        write(files.fallback(spare), step)
        decision = decide(files.root, limit=1)
        assert decision.action == "requeue"
        assert f"from step {step}" in decision.why
    assert decide(files.root, limit=1).action == "end"


def test_a_run_that_was_given_up_has_all_its_tries_when_it_is_submitted_again(run: Path) -> None:
    end(run, ExitCode.FAULT)
    assert [decide(run, limit=1).action for _ in range(4)] == ["requeue", "end", "requeue", "end"]


def test_a_run_that_never_wrote_a_status_is_requeued_and_given_up_too(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert decide(run, 1, EndedLaunch("one")).action == "requeue"
    assert decide(run, 1, EndedLaunch("two")).action == "end"
    status = read_status(run / "status.json")
    assert status is not None
    assert status.state == "failed"
    assert status.reason.endswith("the last time: the last launch ended before it wrote a status")


def test_without_requeues_the_reason_is_the_fault_itself_and_names_the_rank_that_was_killed(run: Path) -> None:
    StatusFile(run / "status.json", world_size=4).change("running", step=7)
    death = "rank 3 (node2, process 42) was killed by signal 9"
    assert decide(run, limit=0, launch=EndedLaunch(words=(_NOISE, death))).action == "end"
    status = read_status(run / "status.json")
    assert status is not None
    assert (status.state, status.reason) == ("failed", f"it died in state running at step 7: {death}")


def test_of_a_rank_that_the_others_miss_the_reason_says_that_it_was_killed(run: Path) -> None:
    lost = "rank 3 (node2, process 42) does not answer; a rank was lost, so the others stop"
    StatusFile(run / "status.json", world_size=4).end("failed", ExitCode.FAULT, lost)
    death = "rank 3 (node2, process 42) was killed by signal 9"
    by_the_launcher = "rank 1 (node1, process 7) was killed by signal 9"
    assert decide(run, limit=0, launch=EndedLaunch(words=(by_the_launcher, death))).action == "end"
    assert load_status(run / "status.json").reason == f"{lost}; {death}"


@pytest.mark.parametrize("begun", [True, False])
@pytest.mark.parametrize(
    "memory",
    [
        "slurmstepd: error: Detected 1 oom_kill event in StepId=17.0. Some of the step tasks have been OOM Killed.",
        "slurmstepd: error: Detected 1 oom-kill event(s) in StepId=17.0. Some of your processes may have been killed",
        "srun: error: node2: task 3: Out Of Memory",
    ],
)
def test_the_reason_says_that_slurm_killed_a_rank_for_lack_of_memory(run: Path, memory: str, begun: bool) -> None:
    death = "rank 3 (node2, process 42) was killed by signal 9"
    lost = "rank 3 (node2, process 42) does not answer"
    if begun:
        StatusFile(run / "status.json", world_size=4).end("failed", ExitCode.FAULT, lost)
    decide(run, limit=0, launch=EndedLaunch(words=(death, _NOISE, memory, memory)))
    reason = load_status(run / "status.json").reason
    assert death in reason
    assert reason.count(memory) == 1


def test_without_requeues_a_run_that_has_saved_and_stopped_has_not_failed(run: Path) -> None:
    end(run, ExitCode.STOPPED)
    before = (run / "status.json").read_text()
    decision = decide(run, limit=0)
    assert (decision.action, decision.code) == ("end", ExitCode.STOPPED)
    assert (run / "status.json").read_text() == before


def test_the_outcome_of_an_earlier_launch_does_not_count(run: Path) -> None:
    end(run, ExitCode.DIVERGED, launch="one")
    assert decide(run, limit=3, launch=EndedLaunch("two")).action == "requeue"
    end(run, ExitCode.DIVERGED, launch="one")
    assert decide(run, limit=3, launch=EndedLaunch("one")).action == "end"


def test_an_unreadable_count_is_none(run: Path) -> None:
    (run / "requeues.json").write_text("{")
    end(run, ExitCode.FAULT)
    assert decide(run, limit=1).action == "requeue"


@pytest.mark.parametrize(
    ("code", "words", "reason"),
    [
        (1, "srun: error: Unable to create step for job 5: More processors requested than permitted", "srun: error: "),
        (1, "srun: error: Unable to create step for job 5: Invalid generic resource (gres) specification", "srun: "),
        (1, "srun: error: Invalid MPI type 'foo', --mpi=list for acceptable types", "srun: error: Invalid MPI"),
        (1, "There are not enough slots available in the system to satisfy the 9 slots", "There are not enough"),
        (2, "dist-train: srun started 4 ranks, but Horovod sees 1 [rank-count]", "srun started 4 ranks"),
    ],
)
def test_what_the_launcher_or_the_ranks_refuse_is_not_tried_again(
    tmp_path: Path, code: int, words: str, reason: str
) -> None:
    launch = EndedLaunch(
        "one", code, ("dist-train: warning: noise", words, "srun: error: node1: Exited with exit code 2")
    )
    decision = decide(tmp_path / "run", 3, launch, restarts=3)
    assert (decision.action, decision.code) == ("end", ExitCode.USAGE)
    status = read_status(tmp_path / "run" / "status.json")
    assert status is not None
    assert (status.state, status.exit_code) == ("failed", ExitCode.USAGE)
    assert status.reason.startswith(reason)


def test_a_finished_run_stays_finished_if_a_later_job_is_refused(run: Path) -> None:
    file = StatusFile(run / "status.json", world_size=2)
    file.end("finished", ExitCode.FINISHED, "")
    decision = decide(run, 3, EndedLaunch("another", 2, ("dist-train: it is in use [run-in-use]",)))
    assert (decision.action, decision.code) == ("end", ExitCode.USAGE)
    status = load_status(run / "status.json")
    assert (status.state, status.exit_code, status.reason) == ("finished", ExitCode.USAGE, "it is in use [run-in-use]")


def test_what_may_go_better_the_next_time_is_tried_again(tmp_path: Path) -> None:
    words = ("srun: error: Unable to create step for job 5: Requested nodes are busy",)
    assert decide(tmp_path / "run", 3, EndedLaunch("one", 1, words)).action == "requeue"
    status = read_status(tmp_path / "run" / "status.json")
    assert status is not None
    assert status.state == "stopped"
    assert words[0] in status.reason


@given(st.binary(min_size=1))
def test_messages_in_any_encoding_leave_a_status_that_can_be_read(
    tmp_path_factory: pytest.TempPathFactory, message: bytes
) -> None:
    """Those of the site's programs, or ours, cut within a character."""
    run = tmp_path_factory.mktemp("run")
    words = f"srun: error: {message.decode(errors='surrogateescape')}".splitlines()
    assert decide(run, 1, EndedLaunch("one", 1, words)).action == "requeue"
    assert read_status(run / "status.json") is not None
    assert decide(run, 1, EndedLaunch("two", 1, words)).action == "end"
    assert load_status(run / "status.json").reason.startswith("given up after 1 requeue")


def test_restarts_within_the_job_come_before_requeues(run: Path) -> None:
    end(run, ExitCode.FAULT)
    actions = [decide(run, limit=1, restarts=2).action for _ in range(6)]
    assert actions == ["restart", "restart", "requeue", "restart", "restart", "end"]
    checkpoint(run, 9)
    end(run, ExitCode.FAULT)
    assert decide(run, limit=1, restarts=2).action == "restart"


def test_the_status_of_another_job_at_work_stays(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    end(run, ExitCode.FAULT, launch="theirs")
    lock = LockRequest(RunDirectory(run)).wait(60)
    assert lock is not None
    (run / "run.lock").write_text('{"host": "node9", "pid": 1, "since": "now", "slurm_job": "7"}')
    assert decide(run, 3, EndedLaunch("ours", ExitCode.USAGE, ("dist-train: in use [run-in-use]",))).action == "end"
    status = read_status(run / "status.json")
    assert status is not None
    assert (status.launch, status.reason) == ("theirs", "it broke")
    monkeypatch.setenv("SLURM_JOB_ID", "7")  # the lock is of a rank of the same job that has not ended yet
    assert decide(run, 3, EndedLaunch("ours", ExitCode.USAGE, ("dist-train: in use [run-in-use]",))).action == "end"
    assert load_status(run / "status.json").reason == "in use [run-in-use]"
    lock.release()


@pytest.mark.skipif(not can_mount(), reason="this machine does not let us mount a small disk")
class TestFullDisk:
    """What is decided is written into the space that was set aside."""

    @pytest.fixture
    def full(self, tmp_path: Path) -> Iterator[Path]:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(tmp_path)], check=True)
        (tmp_path / "checkpoints").mkdir()
        RunDirectory(tmp_path).make_reserve()
        end(tmp_path, ExitCode.FAULT, "No space left on device")
        yield tmp_path
        subprocess.run(["umount", str(tmp_path)], check=True)

    def test_the_status_and_the_count_are_written(self, full: Path) -> None:
        fill(full / "ballast")
        assert decide(full, limit=3).action == "requeue"
        assert read_requeues(RunDirectory(full)).without_progress == 1
        status = read_status(full / "status.json")
        assert status is not None
        assert status.state == "stopped"

    def test_without_space_for_a_checkpoint_the_run_ends_with_the_reason(self, full: Path) -> None:
        (full / "checkpoints" / "step-00000005.pt").write_bytes(b"x" * 20_000)
        fill(full / "ballast")
        assert decide(full, limit=3, restarts=3).action == "end"
        status = read_status(full / "status.json")
        assert status is not None
        assert status.state == "failed"
        assert status.reason.startswith("No space left on device; not started again")

    def test_space_for_a_single_checkpoint_suffices(self, full: Path) -> None:
        size = 40 << 10
        (full / "checkpoints" / "step-00000005.pt").write_bytes(b"x" * size)
        (full / "ballast").write_bytes(b"x" * (shutil.disk_usage(full).free - size - size // 2))
        assert decide(full, limit=3).action == "requeue"

    def test_the_fallback_directory_says_how_much_space_a_checkpoint_takes(
        self, full: Path, tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        files, spare = RunDirectory(full), tmp_path_factory.mktemp("spare")
        files.config.write_text(f"checkpoint: {{fallback_directory: {spare}}}\n")
        files.fallback(spare).mkdir(parents=True)
        write(files.fallback(spare), 5)
        fill(full / "ballast")
        assert decide(full, limit=3, restarts=3).action == "end"

    def test_without_any_space_the_decision_is_said_all_the_same(self, full: Path) -> None:
        RunDirectory(full).reserve.unlink()
        fill(full / "ballast")
        decision = decide(full, limit=3)
        assert (decision.action, decision.code) == ("end", ExitCode.FAULT)
        assert "requeues.json" in decision.why


def fill(file: Path) -> None:
    """Write into `file` until the disk is full."""
    with suppress(OSError), file.open("wb", buffering=0) as opened:
        while True:
            opened.write(b"x" * 4096)
