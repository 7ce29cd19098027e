"""`dist-train launch --min-ranks`: the loss of rank 0, too few ranks, and ranks that join."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from pathlib import Path

import pytest

from dist_train.outcome import ExitCode
from tests.elastic import HELD, ElasticRun
from tests.launching import (
    assert_same_run,
    events,
    final_checkpoint,
    records,
    small_settings,
    status,
    train_alone,
    write_config,
)
from tests.ranks.stand_in_nccl import stand_in_environment
from tests.waiting import PATIENCE, is_alive, wait_for, wait_for_lines, wait_until_gone

pytestmark = pytest.mark.ranks

SETTINGS = small_settings(
    run={"epochs": 24}, comm={"verify_every": 1, "timeout": 60}, metrics={"enabled": True, "port": 0, "ranks": "all"}
)


def write_held_config(folder: Path) -> str:
    """Write `SETTINGS` and the plug-in `HELD` into `folder`, and return the path of the settings."""
    plugin = folder / "held.py"
    plugin.write_text(HELD)
    return write_config(folder, {**SETTINGS, "noise": {**SETTINGS["noise"], "method": f"{plugin}:Held"}})


def test_another_rank_replaces_rank_0_and_finishes(tmp_path: Path) -> None:
    config, run = write_held_config(tmp_path), tmp_path / "run"
    with ElasticRun(config, run, 2, ("--min-ranks", "1")) as launch:
        wait_for_lines(run / "metrics.jsonl", 4)
        # as of a checkpoint that rank 0 was writing
        partial = run / "checkpoints" / ".step-00000002.pt.0123456789abcdef.part"
        partial.touch()
        lost = launch.send(0, signal.SIGKILL)
        (tmp_path / "go-on").touch()
        ended = launch.wait()
    assert ended.code == ExitCode.FINISHED, ended.output
    assert not partial.exists()
    train_alone(config, tmp_path / "undisturbed", "metrics.enabled=false")
    assert_same_run(run, tmp_path / "undisturbed")
    (event,) = events(run, "rank_lost")
    assert f"process {lost}" in event["who"]
    assert (event["generation"], event["ranks"]) == (2, 1)
    assert event["redone"] in (0, 1)
    ending = status(run)
    assert (ending["state"], ending["world_size"], ending["generation"]) == ("finished", 1, 2)


DYING = """
import os
import signal
from dist_train.rundir.records import Observer


class Dying(Observer):
    def __init__(self, directory):
        pass

    def record(self, record):
        is_saved = record.step == 4 and getattr(record, "event", "") == "checkpoint"
        if is_saved and os.environ["RANK"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)
"""
"""A logger that kills rank 0 once the checkpoint of step 4 is written and recorded."""


def test_work_that_rank_0_had_done_is_neither_written_nor_counted_again(tmp_path: Path) -> None:
    plugin = tmp_path / "dying.py"
    plugin.write_text(DYING)
    settings = small_settings(
        run={"max_steps": 6},
        checkpoint={"every_steps": 4, "keep": 9, "background": False},
        metrics={"loggers": [{"name": f"{plugin}:Dying"}]},
    )
    run = tmp_path / "run"
    with ElasticRun(write_config(tmp_path, settings), run, 2, ("--min-ranks", "1")) as launch:
        ended = launch.wait()
    assert ended.code == ExitCode.FINISHED, ended.output
    recorded = Counter(event["event"] for event in records(run, "event"))
    assert recorded == {"checkpoint": 2, "rank_lost": 1}
    assert json.loads((run / "counts.json").read_text()) == recorded
    (first, _) = events(run, "checkpoint")
    assert (run / "checkpoints" / first["path"]).stat().st_mtime < first["time"]


OWN_STATE = """
from pathlib import Path

import torch


def build(settings, groups):
    parameters = [each for group in groups for each in group.parameters]
    optimizer = torch.optim.RMSprop(parameters, lr=settings.learning_rate)
    if any(Path(__file__).parent.glob("run/checkpoints/step-*.pt")):
        optimizer.state[parameters[0]]["own"] = torch.ones(1)
    return optimizer
"""
"""An optimizer with a tensor in its state, on ranks that join, which the others do not have."""


@pytest.mark.lengthy
def test_a_rank_that_fails_while_the_ranks_regroup_does_not_end_the_others(tmp_path: Path) -> None:
    plugin = tmp_path / "own_state.py"
    plugin.write_text(OWN_STATE)
    settings = {**ENDLESS, "optimizer": {"name": f"{plugin}:build"}}
    config, run = write_config(tmp_path, settings), tmp_path / "run"
    with ElasticRun(config, run, 2, ("--min-ranks", "1", "--restarts", "1")) as launch:
        wait_for(lambda: any(run.glob("checkpoints/step-*.pt")), lambda: launch.log.read_text()[-3000:])
        launch.send(1, signal.SIGKILL)
        wait_for(lambda: "plugin-result" in launch.log.read_text(), lambda: launch.log.read_text()[-3000:])
        step = launch.step()
        wait_for(
            lambda: launch.step() > step + 8 or launch.process.poll() is not None,
            lambda: launch.log.read_text()[-3000:],
        )
        launch.process.send_signal(signal.SIGTERM)
        ended = launch.wait()
    assert ended.code == ExitCode.STOPPED, ended.output


@pytest.mark.lengthy
def test_ranks_on_gpus_abort_nccl_and_continue(tmp_path: Path) -> None:
    config, run = write_config(tmp_path, ENDLESS), tmp_path / "run"
    extra = stand_in_environment(tmp_path)
    with ElasticRun(config, run, 3, ("--min-ranks", "1", "--restarts", "2"), extra) as launch:
        wait_for_lines(run / "metrics.jsonl", 4)
        for count, slot in enumerate((1, 0), start=1):
            launch.send(slot, signal.SIGKILL)
            wait_for(lambda: len(launch.joined()) == count, lambda: launch.log.read_text()[-3000:])  # noqa: B023
        launch.process.send_signal(signal.SIGTERM)
        ended = launch.wait()
    assert ended.code == ExitCode.STOPPED, ended.output
    assert ended.output.count("stand-in for NCCL connected") == 3 + 2 + 3 + 2 + 3
    last = final_checkpoint(run)["step"]
    train_alone(config, tmp_path / "undisturbed", f"run.max_steps={last}")
    assert_same_run(run, tmp_path / "undisturbed", ["train"])


@pytest.mark.lengthy
def test_a_rank_lost_while_gpus_connect_does_not_end_the_others(tmp_path: Path) -> None:
    config, run = write_config(tmp_path, ENDLESS), tmp_path / "run"
    with ElasticRun(config, run, 3, ("--min-ranks", "1"), stand_in_environment(tmp_path)) as launch:
        wait_for_lines(run / "metrics.jsonl", 4)
        tmp_path.joinpath(f"die-{launch.slots()[2]}").touch()
        launch.send(1, signal.SIGKILL)
        wait_for(
            lambda: status(run)["world_size"] == 1 or launch.process.poll() is not None,
            lambda: launch.log.read_text()[-3000:],
        )
        launch.process.send_signal(signal.SIGTERM)
        ended = launch.wait()
    assert ended.code == ExitCode.STOPPED, ended.output


HANGING = """
import os
import time
from pathlib import Path
from dist_train.optim.noise import SmoothOut


class Hanging(SmoothOut):
    def perturb(self, step):
        if (order := Path(__file__).with_name(f"hang-{os.getpid()}")).exists():
            order.write_text(str(time.time()))
            time.sleep(3600)
        super().perturb(step)

    def state(self):
        if (order := Path(__file__).with_name(f"pause-{os.getpid()}")).exists():
            order.unlink()
            time.sleep(8)
        return super().state()
"""
"""A noise method like `smoothout` that hangs in an update, or pauses before a checkpoint, where a file tells it to."""


@pytest.mark.lengthy
def test_rank_with_a_hanging_main_thread_is_expelled_and_a_busy_one_is_not(tmp_path: Path) -> None:
    plugin = tmp_path / "hanging.py"
    plugin.write_text(HANGING)
    settings = small_settings(
        run={"epochs": 50_000},
        noise={"method": f"{plugin}:Hanging"},
        comm={"verify_every": 1, "timeout": 5},
        launch={"min_ranks": 1},
    )
    config, run = write_config(tmp_path, settings), tmp_path / "run"
    with ElasticRun(config, run, 2, ()) as launch:
        wait_for_lines(run / "metrics.jsonl", 4)
        saving = tmp_path / f"pause-{launch.slots()[0]}"
        saving.touch()
        wait_for(lambda: not saving.exists())
        step = launch.step()
        wait_for(lambda: launch.step() > step + 3, lambda: launch.log.read_text()[-3000:])
        assert status(run)["world_size"] == 2
        order = tmp_path / f"hang-{launch.slots()[1]}"
        order.touch()
        wait_for(lambda: status(run)["world_size"] == 1, lambda: launch.log.read_text()[-3000:])
        launch.process.send_signal(signal.SIGTERM)
        ended = launch.wait()
    assert ended.code == ExitCode.STOPPED, ended.output
    (event,) = events(run, "rank_lost")
    assert "has not moved on for 5 s" in event["who"]
    assert event["time"] - float(order.read_text()) < 60.0, "noticed by its pulse, not by the limit of an operation"


def test_too_few_ranks_end_the_launch_and_the_same_command_resumes(tmp_path: Path) -> None:
    config, run = write_held_config(tmp_path), tmp_path / "run"
    with ElasticRun(config, run, 3, ("--min-ranks", "3")) as launch:
        wait_for(lambda: list((run / "checkpoints").glob("*.json")), "a checkpoint")
        launch.send(1, signal.SIGKILL)
        (tmp_path / "go-on").touch()
        ended = launch.wait()
    assert ended.code == ExitCode.FAULT, ended.output
    assert "2 ranks are left of at least 3" in status(run)["reason"]
    with ElasticRun(config, run, 2, ("--min-ranks", "1")) as launch:
        ended = launch.wait()
    assert ended.code == ExitCode.FINISHED, ended.output
    assert status(run)["state"] == "finished"
    assert [event["step"] >= 8 for event in events(run, "resumed")] == [True]


def test_too_few_ranks_that_are_asked_to_stop_save_and_end(tmp_path: Path) -> None:
    config, run = write_config(tmp_path, ENDLESS), tmp_path / "run"
    with ElasticRun(config, run, 2, ("--min-ranks", "2", "--restarts", "3")) as launch:
        wait_for_lines(run / "metrics.jsonl", 4)
        launch.send(1, signal.SIGKILL)
        launch.process.send_signal(signal.SIGTERM)
        ended = launch.wait()
    assert ended.code == ExitCode.STOPPED, ended.output
    (event,) = events(run, "rank_lost")
    assert final_checkpoint(run)["step"] >= event["step"], "with the update that the loss interrupted"


ENDLESS = small_settings(run={"epochs": 50_000}, comm={"verify_every": 1, "timeout": 10})
LISTENING = ("--listen", "127.0.0.2", "--restarts", "3")


@pytest.mark.lengthy
def test_ranks_of_other_launchers_join_and_leave_bit_identically(tmp_path: Path) -> None:
    config, run = write_config(tmp_path, ENDLESS), tmp_path / "run"
    options = ("--min-ranks", "1", "--max-ranks", "3", *LISTENING)
    with ElasticRun(config, run, 1, options) as launch:

        def wait_for_ranks(count: int) -> None:
            wait_for(lambda: status(run)["world_size"] == count, lambda: launch.log.read_text()[-3000:])

        wait_for_lines(run / "metrics.jsonl", 4)
        with launch.join(2) as first:
            wait_for_ranks(3)
            with launch.join(1) as refused:
                answer = refused.wait()
            assert answer.code == ExitCode.USAGE
            assert "[join-refused]" in answer.output
            assert "it has at most 3 (--max-ranks)" in answer.output

            def wait_for_replacement_of(lost: int) -> None:
                def is_whole() -> bool:
                    living = set(launch.slots().values())
                    return lost not in living and len(living) == 3 and living - launch.joined() <= initial

                wait_for(is_whole, lambda: launch.log.read_text()[-3000:])

            initial = set(launch.slots().values())
            lost = first.pids()[0]
            os.kill(lost, signal.SIGKILL)
            wait_for_replacement_of(lost)
            # A rank of the other launcher replaces rank 0.
            wait_for_replacement_of(launch.send(0, signal.SIGKILL))
            hanging = first.pids()[1]
            os.kill(hanging, signal.SIGSTOP)
            wait_for_replacement_of(hanging)

            left = first.pids()
            first.process.kill()
            wait_until_gone(left)
            wait_for_ranks(1)
        with launch.join(1) as second:
            wait_for_ranks(2)
            assert is_alive(second.process.pid)
            launch.process.send_signal(signal.SIGTERM)
            ended, other = launch.wait(), second.wait()
    assert (ended.code, other.code) == (ExitCode.STOPPED, ExitCode.STOPPED), ended.output + other.output
    assert not list(run.glob("join-*"))
    last = final_checkpoint(run)["step"]
    train_alone(config, tmp_path / "undisturbed", f"run.max_steps={last}")
    assert_same_run(run, tmp_path / "undisturbed", ["train"])


def test_a_rank_that_cannot_connect_to_the_others_does_not_keep_them_from_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, run = write_config(tmp_path, ENDLESS), tmp_path / "run"
    with ElasticRun(config, run, 1, ("--min-ranks", "1", "--max-ranks", "2", "--listen", "127.0.0.2")) as launch:
        wait_for_lines(run / "metrics.jsonl", 4)
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", "none")  # of the rank that joins
        with launch.join(1) as joined:
            refused = joined.wait()
        step = launch.step()
        wait_for(lambda: launch.step() > step + 8, lambda: launch.log.read_text()[-3000:])
        launch.process.send_signal(signal.SIGTERM)
        ended = launch.wait()
    assert (refused.code, ended.code) == (ExitCode.USAGE, ExitCode.STOPPED), refused.output + ended.output


@pytest.mark.lengthy
def test_launcher_without_ranks_starts_with_those_that_join(tmp_path: Path) -> None:
    config, run = write_config(tmp_path, SETTINGS), tmp_path / "run"
    options = ("--start-with", "2", "--min-ranks", "1", *LISTENING)
    with ElasticRun(config, run, 0, options) as launch, launch.join(1) as one, launch.join(1) as other:
        ended = [each.wait() for each in (launch, one, other)]
    assert [each.code for each in ended] == [ExitCode.FINISHED] * 3, [each.output for each in ended]
    ending = status(run)
    assert (ending["state"], ending["world_size"], ending["generation"]) == ("finished", 2, 1)


@pytest.mark.parametrize("asked", [0, 1])
def test_a_launch_that_waits_for_its_ranks_stops_at_once(tmp_path: Path, asked: int) -> None:
    # By itself the launch would wait longer than this test does.
    config, run = write_config(tmp_path, small_settings(comm={"timeout": PATIENCE})), tmp_path / "run"
    with ElasticRun(config, run, 1, ("--start-with", "3", *LISTENING)) as launch, launch.join(1) as joined:
        wait_for(lambda: len(launch.slots()) == 2, lambda: launch.log.read_text())
        (launch, joined)[asked].process.send_signal((signal.SIGTERM, signal.SIGINT)[asked])
        ended = [each.wait() for each in (launch, joined)]
    assert [each.code for each in ended] == [ExitCode.STOPPED] * 2, [each.output for each in ended]
    assert not (run / "status.json").exists()


def test_joined_launches_end_when_the_first_launcher_is_killed(tmp_path: Path) -> None:
    config, run = write_config(tmp_path, ENDLESS), tmp_path / "run"
    with ElasticRun(config, run, 1, ("--max-ranks", "2", *LISTENING)) as launch:
        wait_for_lines(run / "metrics.jsonl", 4)
        with launch.join(1) as joined:
            wait_for(lambda: status(run)["world_size"] == 2)
            launch.process.kill()
            ended = joined.wait()
    assert ended.code == ExitCode.FAULT
    assert "[rank-lost]" in ended.output
