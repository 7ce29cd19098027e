"""Three nodes, two ranks each: all of them, what is left when one is lost, and one that is kept in reserve."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.cluster import Cluster, status, what_is_missing
from tests.cluster.runs import Undisturbed
from tests.cluster.submitted import Submitted, assert_equal_bit_identically
from tests.cluster.test_batch_script import STARTED
from tests.waiting import wait_for

pytestmark = [pytest.mark.ranks, pytest.mark.services, pytest.mark.lengthy]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    missing = what_is_missing()
    if missing:
        pytest.skip(missing)
    cluster = Cluster(tmp_path_factory.mktemp("rig"), nodes=3)
    yield cluster
    cluster.down()


def test_three_nodes_without_pmix_end_as_one_rank_does(
    cluster: Cluster, tmp_path: Path, large_batch: Undisturbed
) -> None:
    knobs = {"OVERRIDES": "comm.engine=torch", "MPI": "none"}
    submitted = Submitted(cluster, tmp_path, large_batch.config, "--nodes=3", **knobs)
    ended = submitted.wait()
    assert_equal_bit_identically(ended, submitted.run, large_batch)
    assert status(submitted.run)["world_size"] == 6


@pytest.mark.parametrize("by", list(STARTED))
def test_a_lost_node_costs_no_requeue(by: str, cluster: Cluster, tmp_path: Path, long_run: Undisturbed) -> None:
    submitted = Submitted(cluster, tmp_path, long_run.config, "--nodes=3", **STARTED[by])
    submitted.wait_for_step(50)
    before = status(submitted.run)
    assert (before["world_size"], cluster.batch_host(submitted.job)) == (6, "node1")
    cluster.kill_node("node2")
    begun = time.monotonic()
    try:
        submitted.wait_for(lambda found: found["launch"] != before["launch"] and found["step"] >= before["step"])
        print(f"{by}: training again {time.monotonic() - begun:.1f} s after the loss")
        assert status(submitted.run)["world_size"] == 4
        ended = submitted.wait()
    finally:
        cluster.start_node("node2")
    assert_equal_bit_identically(ended, submitted.run, long_run)
    assert ended.restarts == 0, ended.output


def test_a_spare_node_takes_the_place_of_a_lost_one(cluster: Cluster, tmp_path: Path, long_run: Undisturbed) -> None:
    knobs = {**STARTED["torch"], "SPARE_NODES": "1"}
    submitted = Submitted(cluster, tmp_path, long_run.config, "--nodes=3", **knobs)
    submitted.wait_for_step(50)
    first = status(submitted.run)
    assert first["world_size"] == 4
    cluster.kill_node("node2")
    try:
        submitted.wait_for(lambda found: found["launch"] != first["launch"] and found["state"] == "running")
        assert status(submitted.run)["world_size"] == 4
        ended = submitted.wait()
    finally:
        cluster.start_node("node2")
    assert_equal_bit_identically(ended, submitted.run, long_run)
    assert ended.restarts == 0, ended.output


def test_a_node_that_cannot_work_with_the_others_is_left_out_where_there_is_a_spare_one(
    cluster: Cluster, tmp_path: Path, large_batch: Undisturbed
) -> None:
    run = tmp_path / "runs" / "run"
    run.parent.mkdir()
    cluster.on("node2", "mount", "-t", "tmpfs", "tmpfs", str(run.parent), folder=tmp_path)
    try:
        knobs = {**STARTED["torch"], "SPARE_NODES": "1", "RUN_DIR": str(run)}
        ended = Submitted(cluster, tmp_path, large_batch.config, "--nodes=3", **knobs).wait()
    finally:
        cluster.on("node2", "umount", str(run.parent), folder=tmp_path)
    assert "dist-train: node2: " in ended.output
    assert_equal_bit_identically(ended, run, large_batch)
    assert status(run)["world_size"] == 4


def test_preempted_on_three_nodes_it_resumes(cluster: Cluster, tmp_path: Path, long_run: Undisturbed) -> None:
    submitted = Submitted(cluster, tmp_path, long_run.config, "--nodes=3", **STARTED["torch"])
    submitted.wait_for_step(20)
    urgent = cluster.run(
        "sbatch", "--partition=high", "--exclusive", "--nodes=3", "--output=/dev/null", "--wrap=true", folder=tmp_path
    )
    assert urgent.returncode == 0, urgent.stderr
    ended = submitted.wait()
    assert ended.restarts >= 1
    assert_equal_bit_identically(ended, submitted.run, long_run)
    wait_for(lambda: not cluster.processes(), lambda: f"left behind: {cluster.processes()}")
