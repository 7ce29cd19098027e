"""Whether a run is started again."""

from __future__ import annotations

from pathlib import Path

import pytest

from dist_train.outcome import ExitCode
from dist_train.rundir.status import StatusFile, read_status
from dist_train.sweep.standing import decide, read_requeues


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "checkpoints").mkdir()
    return tmp_path


def end(run: Path, code: ExitCode, reason: str = "it broke", launch: str = "") -> None:
    file = StatusFile(run / "status.json", world_size=2)
    file.progress(step=7, launch=launch)
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
    assert decide(run, limit=3).requeue is requeued


def test_a_run_without_progress_is_given_up_after_the_limit(run: Path) -> None:
    checkpoint(run, 5)
    # The first crash follows a checkpoint, and so do the three after it, but the same one.
    for _ in range(3):
        end(run, ExitCode.FAULT)
        assert decide(run, limit=3).requeue
    end(run, ExitCode.FAULT, "rank 1: it broke")
    assert not decide(run, limit=3).requeue
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
        assert decide(run, limit=1).requeue
    assert read_requeues(run).without_progress == 1


def test_a_run_that_was_given_up_has_all_its_tries_when_it_is_submitted_again(run: Path) -> None:
    end(run, ExitCode.FAULT)
    assert [decide(run, limit=1).requeue for _ in range(4)] == [True, False, True, False]


def test_a_run_that_never_wrote_a_status_is_requeued_and_given_up_too(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert decide(run, limit=1).requeue
    assert not decide(run, limit=1).requeue
    status = read_status(run / "status.json")
    assert status is not None
    assert status.state == "failed"
    assert status.reason.endswith("the last time: it ended before it wrote a status")


def test_without_requeues_the_reason_is_the_fault_itself_and_names_the_rank_that_was_killed(run: Path) -> None:
    StatusFile(run / "status.json", world_size=4).change("running", step=7)
    death = "rank 3 (node2, process 42) was killed by signal 9"
    assert not decide(run, limit=0, death=death).requeue
    status = read_status(run / "status.json")
    assert status is not None
    assert (status.state, status.reason) == ("failed", f"it died in state running at step 7: {death}")


def test_the_outcome_of_an_earlier_launch_does_not_count(run: Path) -> None:
    end(run, ExitCode.DIVERGED, launch="one")
    assert decide(run, limit=3, launch="two").requeue
    assert not decide(run, limit=3, launch="one").requeue


def test_an_unreadable_count_is_none(run: Path) -> None:
    (run / "requeues.json").write_text("{")
    end(run, ExitCode.FAULT)
    assert decide(run, limit=1).requeue
