"""Pitfalls of Horovod, MPI and Gloo, and how the real program handles them."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from dist_train.rundir.lock import LockRequest
from dist_train.rundir.paths import RunDirectory
from tests.launching import (
    assert_same_run,
    kill,
    launch,
    mostly_lengthy,
    records,
    small_settings,
    start,
    status,
    train_alone,
    train_ranks,
    weights_digest,
    write_config,
)
from tests.waiting import PATIENCE

pytestmark = pytest.mark.ranks


def test_precision_layout_clipping_augmentation_and_schedules_are_bit_identical(tmp_path: Path) -> None:
    config = write_config(
        tmp_path,
        small_settings(
            run={"max_steps": 10},
            data={"augment": "crop-flip", "normalize": True},
            precision={"threads": 1, "compute": "bfloat16", "channels_last": True},
            optimizer={"clip_norm": 0.5, "weight_decay": 1e-3},
            schedule={
                "scaling": "linear",
                "base_batch": 50,
                "warmup_epochs": 1,
                "decay": "step",
                "milestones": [1],
            },
        ),
    )
    train_alone(config, tmp_path / "alone")
    train_ranks(2, "mpi", config, tmp_path / "two")
    assert_same_run(tmp_path / "two", tmp_path / "alone")


@pytest.mark.lengthy
def test_ranks_wait_for_the_lock_of_a_dead_node_beyond_the_stall_timeout(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    timeout = 6
    config = write_config(tmp_path, small_settings(run={"max_steps": 2}, comm={"timeout": timeout}))
    lock = LockRequest(RunDirectory(run)).wait(0)
    assert lock is not None
    # What a file server shows for a while after a node of the same job has died.
    (run / "run.lock").write_text('{"host": "node9", "pid": 1, "since": "then", "slurm_job": "7"}')
    process = start(2, "mpi", "train", config, "--run-dir", str(run), extra={"SLURM_JOB_ID": "7"})
    release = threading.Timer(timeout + 2, lock.release)
    try:
        assert process.stdout is not None
        assert any("waiting up to" in line for line in process.stdout), "the ranks ended without waiting"
        release.start()
        output, _ = process.communicate(timeout=PATIENCE)
    finally:
        kill(process)
        if release.ident is not None:
            release.join()
    assert process.returncode == 0, output
    assert status(run)["state"] == "finished"


@pytest.mark.parametrize("option", mostly_lengthy([{"op": "adasum"}, {"compression": "fp16"}]))
def test_adasum_and_fp16_compression_learn(tmp_path: Path, option: dict[str, str]) -> None:
    settings = small_settings(comm={"reduction": "float", **option, "verify_every": 1}, noise={"method": "none"})
    train_ranks(2, "mpi", write_config(tmp_path, settings), tmp_path / "run")
    losses = [record["loss"] for record in records(tmp_path / "run", "train")]
    assert losses[-1] < 0.8 * losses[0]


def test_adasum_over_gloo_on_a_cpu_is_refused(tmp_path: Path) -> None:
    settings = small_settings(comm={"reduction": "float", "op": "adasum"}, noise={"method": "none"})
    ended = launch(2, "gloo", "train", write_config(tmp_path, settings), "--run-dir", str(tmp_path / "run"))
    assert ended.output.count("[adasum-without-mpi]") == 1
    assert status(tmp_path / "run")["exit_code"] == 2


@pytest.mark.parametrize("variable", mostly_lengthy(["HOROVOD_CONTROLLER", "HOROVOD_CPU_OPERATIONS"]))
def test_gloo_under_mpirun_is_refused_instead_of_crashing(tmp_path: Path, variable: str) -> None:
    config = write_config(tmp_path, small_settings())
    ended = launch(2, "mpi", "train", config, "--run-dir", str(tmp_path / "run"), extra={variable: "gloo"})
    assert ended.code == 2
    assert "[gloo-under-mpirun]" in ended.output
    assert "Traceback" not in ended.output


def test_broadcast_keeps_weights_in_their_buffer(tmp_path: Path) -> None:
    ended = launch(2, "mpi", program=["-m", "tests.ranks.broadcast_state"])
    assert ended.code == 0, ended.output
    assert ended.output.count("equal") == 2


def test_diverged_run_exits_with_3_and_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    config = write_config(tmp_path, small_settings(checkpoint={"every_steps": 1}, model={"norm": "none"}))
    run = tmp_path / "run"
    train_alone(config, run, "run.max_steps=2")
    before = weights_digest(run)
    ended = launch(
        2,
        "mpi",
        "train",
        config,
        "--run-dir",
        str(run),
        program=["-m", "tests.ranks.poisoned_gradient", "1", "4"],
    )
    assert ended.code == 3, ended.output
    assert "Traceback" not in ended.output
    after = status(run)
    assert (after["state"], after["exit_code"], after["step"]) == ("failed", 3, 3)
    assert "[step-not-finite]" in ended.output
    assert str(run / "checkpoints" / "step-00000003.pt") in after["reason"]
    assert weights_digest(run) != before


SLOW = """
import time
from pathlib import Path
from dist_train.rundir.records import Observer


class Slow(Observer):
    def __init__(self, directory):
        self.directory = directory

    def end(self, outcome):
        time.sleep(8)
        Path(self.directory, "uploaded").touch()
"""
"""A logger that takes its time at the end, as a tracker does, or the exporter that waits for a last scrape."""


DIVERGING = {"optimizer": {"learning_rate": 1e30}}
REFUSED = {"noise": {"method": "smoothout", "exclude": ["gone.*"]}}


@pytest.mark.parametrize(
    ("controller", "timeout", "sections", "code", "message"),
    # horovodrun kills the others 5 s after the first has ended; the watchdog of rank 0 after two thirds of `timeout`
    mostly_lengthy(
        [
            ("gloo", 60, DIVERGING, 3, "[step-not-finite]"),
            ("gloo", 60, REFUSED, 2, "[no-such-weight]"),
            ("torch", 9, DIVERGING, 3, "[step-not-finite]"),
        ]
    ),
)
def test_with_an_error_that_all_ranks_have_none_leaves_before_rank_0_is_done(
    tmp_path: Path, controller: str, timeout: int, sections: Mapping[str, Mapping[str, Any]], code: int, message: str
) -> None:
    plugin, run = tmp_path / "slow.py", tmp_path / "run"
    plugin.write_text(SLOW)
    loggers = {"loggers": [{"name": f"{plugin}:Slow"}]}
    config = write_config(tmp_path, small_settings(**sections, comm={"timeout": timeout}, metrics=loggers))
    ended = launch(2, controller, "train", config, "--run-dir", str(run))
    assert (run / "uploaded").exists(), ended.output
    assert ended.output.count(message) == 1, ended.output
    assert status(run)["exit_code"] == code
