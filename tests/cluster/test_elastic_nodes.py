"""MIN_RANKS: a run on three nodes continues without lost nodes, which rejoin in the same job."""

from __future__ import annotations

import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.cluster import Cluster, booted_cluster
from tests.cluster.runs import Undisturbed
from tests.cluster.submitted import SubmittedRun, assert_finished_like, hurry, paced
from tests.launching import events, status
from tests.waiting import wait_for

pytestmark = [pytest.mark.ranks, pytest.mark.services, pytest.mark.lengthy]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with booted_cluster(tmp_path_factory.mktemp("rig"), nodes=3) as cluster:
        yield cluster


def variables(folder: Path, **more: str) -> Mapping[str, str]:
    """Return the variables of an elastic job, `paced` in `folder`."""
    defaults = {"OVERRIDES": "comm.timeout=10 metrics.enabled=true", "MIN_RANKS": "2", "GUARD_SECONDS": "5"}
    return paced(folder, **{**defaults, **more})


def has_ranks(ranks: int) -> Callable[[Mapping[str, Any]], bool]:
    return lambda found: found.get("state") == "running" and found["world_size"] == ranks


def nodes_in_metrics(cluster: Cluster, run: Path) -> list[str]:
    """Return the node of each rank from the run's metrics; none while the exporter has no measurement."""
    scrape = "import urllib.request as u; print(u.urlopen('http://127.0.0.1:9810/metrics').read().decode())"
    page = cluster.on(status(run)["host"], sys.executable, "-c", scrape, folder=run).stdout
    return re.findall(r'^dist_train_rank_busy_seconds\{.*\bnode="(\w+)".*\} ', page, re.MULTILINE)


def nodes_of_ranks(run: Path, event: str) -> list[str]:
    """Return the nodes of the ranks of all events with this name, in order."""
    texts = [each["who"] for each in events(run, event)]
    return [node for text in texts for node in re.findall(r"rank \d+ \((node\d), process \d+\)", text)]


def test_lost_nodes_rejoin_in_the_same_job(cluster: Cluster, tmp_path: Path, long_run: Undisturbed) -> None:
    submitted = SubmittedRun(cluster, tmp_path, long_run.config, "--nodes=3", **variables(tmp_path))
    submitted.wait_for(has_ranks(6))
    first = status(submitted.run)
    started = time.monotonic()
    cluster.cut_power("node2")
    submitted.wait_for(has_ranks(4))
    print(f"without node2 after {time.monotonic() - started:.1f} s")
    cluster.boot("node2")
    started = time.monotonic()
    submitted.wait_for(has_ranks(6))
    print(f"with node2 again after {time.monotonic() - started:.1f} s")
    wait_for(lambda: len(nodes_in_metrics(cluster, submitted.run)) == 6)
    assert nodes_in_metrics(cluster, submitted.run)[-2:] == ["node2", "node2"]  # joining ranks get the last numbers
    # This node is back before its loss is detected.
    generation = status(submitted.run)["generation"]
    cluster.cut_power("node3")
    cluster.boot("node3")
    started = time.monotonic()
    submitted.wait_for(lambda found: has_ranks(6)(found) and found["generation"] >= generation + 2)
    print(f"with node3 again after {time.monotonic() - started:.1f} s")
    hurry(tmp_path)
    ended = submitted.wait_for_weights_of(long_run)
    assert ended.restarts == 0, ended.output
    ending = status(submitted.run)
    assert (ending["launch"], ending["world_size"]) == (first["launch"], 6), ended.output
    assert nodes_of_ranks(submitted.run, "rank_lost") == ["node2", "node2", "node3", "node3"]
    assert sorted(nodes_of_ranks(submitted.run, "rank_joined")) == ["node2", "node2", "node3", "node3"]
    wait_for(lambda: not cluster.processes(), lambda: f"left behind: {cluster.processes()}")


def test_spare_node_replaces_a_lost_one(cluster: Cluster, tmp_path: Path, long_run: Undisturbed) -> None:
    submitted = SubmittedRun(cluster, tmp_path, long_run.config, "--nodes=3", **variables(tmp_path, SPARE_NODES="1"))
    submitted.wait_for(has_ranks(4))
    first = status(submitted.run)
    cluster.kill_node("node2")
    try:
        submitted.wait_for(lambda found: has_ranks(4)(found) and found["generation"] > first["generation"])
        hurry(tmp_path)
        ended = submitted.wait()
    finally:
        cluster.start_node("node2")
    assert_finished_like(ended, submitted.run, long_run)
    assert (ended.restarts, status(submitted.run)["launch"]) == (0, first["launch"]), ended.output
    assert nodes_of_ranks(submitted.run, "rank_joined") == ["node3", "node3"]


def test_job_with_too_few_ranks_left_is_requeued(cluster: Cluster, tmp_path: Path, long_run: Undisturbed) -> None:
    submitted = SubmittedRun(cluster, tmp_path, long_run.config, "--nodes=3", **variables(tmp_path, MIN_RANKS="5"))
    submitted.wait_for(has_ranks(6))
    cluster.kill_node("node2")
    submitted.wait_for_restarts(1)
    assert status(submitted.run)["state"] == "stopped"
    cluster.start_node("node2")
    hurry(tmp_path)
    ended = submitted.wait_for_weights_of(long_run)
    assert "4 ranks are left of at least 5" in ended.output


def test_run_starts_where_users_cannot_reach_slurmd(cluster: Cluster, tmp_path: Path, long_run: Undisturbed) -> None:
    # Our batch script reads slurmd's port from scontrol: here one at which nothing listens.
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(
        f'#!/bin/sh\n[ "$*" != "show config" ] || exec echo SlurmdPort = 9\nexec {shutil.which("scontrol")} "$@"\n'
    )
    scontrol.chmod(0o755)
    hurry(tmp_path)
    path = f"{scontrol.parent}:{os.environ['PATH']}"
    submitted = SubmittedRun(cluster, tmp_path, long_run.config, "--nodes=3", **variables(tmp_path, PATH=path))
    ended = submitted.wait_for_weights_of(long_run)
    assert "node1, node2, node3 cannot be reached on slurmd's port 9" in ended.output


def test_run_resumes_after_a_preemption_and_the_loss_of_its_first_node(
    cluster: Cluster, tmp_path: Path, long_run: Undisturbed
) -> None:
    submitted = SubmittedRun(cluster, tmp_path, long_run.config, "--nodes=3", **variables(tmp_path))
    submitted.wait_for_step(5)
    cluster.preempt(3, tmp_path)
    submitted.wait_for_restarts(1)
    submitted.wait_for(lambda found: has_ranks(6)(found) and bool(events(submitted.run, "resumed")))
    assert cluster.batch_host(submitted.job) == "node1"
    preempted = cluster.job(submitted.job).restarts
    cluster.kill_node("node1")
    submitted.wait_for_restarts(preempted + 1)
    cluster.start_node("node1")
    hurry(tmp_path)
    ended = submitted.wait_for_weights_of(long_run)
    assert "asked to stop after step" in ended.output
