"""Three nodes with two ranks each: all of them, after the loss of one, and with one spare."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.cluster import Cluster, booted_cluster
from tests.cluster.runs import Undisturbed
from tests.cluster.submitted import SubmittedRun, assert_finished_like, hurry, paced
from tests.cluster.test_batch_script import LAUNCHERS
from tests.launching import status
from tests.waiting import wait_for

pytestmark = [pytest.mark.ranks, pytest.mark.services, pytest.mark.lengthy]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with booted_cluster(tmp_path_factory.mktemp("rig"), nodes=3) as cluster:
        yield cluster


def test_three_nodes_without_pmix_are_bit_identical_to_one_rank(
    cluster: Cluster, tmp_path: Path, large_batch: Undisturbed
) -> None:
    variables = {"OVERRIDES": "comm.engine=torch", "MPI": "none"}
    submitted = SubmittedRun(cluster, tmp_path, large_batch.config, "--nodes=3", **variables)
    submitted.wait_for_weights_of(large_batch)
    assert status(submitted.run)["world_size"] == 6


@pytest.mark.parametrize("launcher", list(LAUNCHERS))
def test_run_continues_without_a_lost_node_in_the_same_job(
    launcher: str, cluster: Cluster, tmp_path: Path, long_run: Undisturbed
) -> None:
    variables = paced(tmp_path, **LAUNCHERS[launcher])
    submitted = SubmittedRun(cluster, tmp_path, long_run.config, "--nodes=3", **variables)
    submitted.wait_for_step(35)
    before = status(submitted.run)
    assert (before["world_size"], cluster.batch_host(submitted.job)) == (6, "node1")
    cluster.kill_node("node2")
    started = time.monotonic()
    try:
        submitted.wait_for(lambda found: found["launch"] != before["launch"] and found["step"] >= before["step"])
        print(f"{launcher}: training again {time.monotonic() - started:.1f} s after the loss")
        assert status(submitted.run)["world_size"] == 4
        hurry(tmp_path)
        ended = submitted.wait()
    finally:
        cluster.start_node("node2")
    assert_finished_like(ended, submitted.run, long_run)
    assert ended.restarts == 0, ended.output


def test_spare_node_replaces_a_lost_one(cluster: Cluster, tmp_path: Path, long_run: Undisturbed) -> None:
    variables = paced(tmp_path, **LAUNCHERS["torch"], SPARE_NODES="1")
    submitted = SubmittedRun(cluster, tmp_path, long_run.config, "--nodes=3", **variables)
    submitted.wait_for_step(35)
    first = status(submitted.run)
    assert first["world_size"] == 4
    cluster.kill_node("node2")
    try:
        submitted.wait_for(lambda found: found["launch"] != first["launch"] and found["state"] == "running")
        assert status(submitted.run)["world_size"] == 4
        hurry(tmp_path)
        ended = submitted.wait()
    finally:
        cluster.start_node("node2")
    assert_finished_like(ended, submitted.run, long_run)
    assert ended.restarts == 0, ended.output


def test_spare_node_replaces_an_unusable_one(cluster: Cluster, tmp_path: Path, large_batch: Undisturbed) -> None:
    run = tmp_path / "runs" / "run"
    run.parent.mkdir()
    cluster.on("node2", "mount", "-t", "tmpfs", "tmpfs", str(run.parent), folder=tmp_path)
    try:
        variables = {**LAUNCHERS["torch"], "SPARE_NODES": "1", "RUN_DIR": str(run)}
        ended = SubmittedRun(cluster, tmp_path, large_batch.config, "--nodes=3", **variables).wait()
    finally:
        cluster.on("node2", "umount", str(run.parent), folder=tmp_path)
    assert "dist-train: node2: " in ended.output
    assert_finished_like(ended, run, large_batch)
    assert status(run)["world_size"] == 4


def test_preempted_run_on_three_nodes_resumes(cluster: Cluster, tmp_path: Path, long_run: Undisturbed) -> None:
    variables = paced(tmp_path, **LAUNCHERS["torch"])
    submitted = SubmittedRun(cluster, tmp_path, long_run.config, "--nodes=3", **variables)
    submitted.wait_for_step(20)
    cluster.preempt(3, tmp_path)
    submitted.wait_for_restarts(1)
    hurry(tmp_path)
    submitted.wait_for_weights_of(long_run)
    wait_for(lambda: not cluster.processes(), lambda: f"left behind: {cluster.processes()}")
