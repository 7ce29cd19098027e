"""MIN_RANKS: a run of three nodes continues without those that are lost, and takes them back, in one job."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.cluster import Cluster, status, what_is_missing
from tests.cluster.runs import Undisturbed
from tests.cluster.submitted import Submitted, assert_equal_bit_identically
from tests.launching import records
from tests.waiting import wait_for

pytestmark = [pytest.mark.ranks, pytest.mark.services, pytest.mark.lengthy]

SLOW = """
import time
from pathlib import Path
from dist_train.optim.noise import SmoothOut


class Slow(SmoothOut):
    def perturb(self, step):
        if not Path(__file__).with_name("hurry").exists():
            time.sleep(0.3)
        super().perturb(step)
"""
"""A noise method as `smoothout` is, that takes its time until there is a file `hurry`."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    missing = what_is_missing()
    if missing:
        pytest.skip(missing)
    cluster = Cluster(tmp_path_factory.mktemp("rig"), nodes=3)
    yield cluster
    cluster.down()


def knobs(folder: Path, **more: str) -> Mapping[str, str]:
    """Return the variables of an elastic job whose run is slow until there is a file `hurry` in `folder`."""
    (folder / "slow.py").write_text(SLOW)
    overrides = f"comm.timeout=10 noise.method={folder}/slow.py:Slow metrics.enabled=true"
    return {"OVERRIDES": overrides, "MIN_RANKS": "2", "GUARD_SECONDS": "5", **more}


def has(ranks: int) -> Callable[[Mapping[str, Any]], bool]:
    return lambda found: found.get("state") == "running" and found["world_size"] == ranks


def nodes_in_metrics(cluster: Cluster, run: Path) -> list[str]:
    """Return the nodes of the ranks, by rank, as the run's metrics name them."""
    scrape = "import urllib.request as u; print(u.urlopen('http://127.0.0.1:9810/metrics').read().decode())"
    page = cluster.on(status(run)["host"], sys.executable, "-c", scrape, folder=run).stdout
    found = re.findall(r'^dist_train_rank_busy_seconds\{.*\bnode="(\w+)".*\} ', page, re.MULTILINE)
    assert found, page[:2000]
    return found


def who(run: Path, event: str) -> list[str]:
    """Return the nodes of the ranks that were lost or have joined, in order."""
    told = [each["who"] for each in records(run, "event") if each["event"] == event]
    return [node for text in told for node in re.findall(r"rank \d+ \((node\d), process \d+\)", text)]


def test_a_node_is_lost_and_comes_back_twice_in_one_job(
    cluster: Cluster, tmp_path: Path, long_run: Undisturbed
) -> None:
    submitted = Submitted(cluster, tmp_path, long_run.config, "--nodes=3", **knobs(tmp_path))
    submitted.wait_for(has(6))
    first = status(submitted.run)
    begun = time.monotonic()
    cluster.cut_power("node2")
    submitted.wait_for(has(4))
    print(f"without node2 after {time.monotonic() - begun:.1f} s")
    cluster.boot("node2")
    begun = time.monotonic()
    submitted.wait_for(has(6))
    print(f"with node2 again after {time.monotonic() - begun:.1f} s")
    wait_for(lambda: len(nodes_in_metrics(cluster, submitted.run)) == 6)
    assert nodes_in_metrics(cluster, submitted.run)[-2:] == ["node2", "node2"]  # who joins has the last numbers
    # Back before anybody has missed it.
    generation = status(submitted.run)["generation"]
    cluster.cut_power("node3")
    cluster.boot("node3")
    begun = time.monotonic()
    submitted.wait_for(lambda found: has(6)(found) and found["generation"] >= generation + 2)
    print(f"with node3 again after {time.monotonic() - begun:.1f} s")
    (tmp_path / "hurry").touch()
    ended = submitted.wait()
    assert_equal_bit_identically(ended, submitted.run, long_run)
    assert ended.restarts == 0, ended.output
    ending = status(submitted.run)
    assert (ending["launch"], ending["world_size"]) == (first["launch"], 6), ended.output
    assert who(submitted.run, "rank_lost") == ["node2", "node2", "node3", "node3"]
    assert sorted(who(submitted.run, "rank_joined")) == ["node2", "node2", "node3", "node3"]
    wait_for(lambda: not cluster.processes(), lambda: f"left behind: {cluster.processes()}")


def test_a_spare_node_takes_part_in_place_of_one_that_is_lost_for_good(
    cluster: Cluster, tmp_path: Path, long_run: Undisturbed
) -> None:
    submitted = Submitted(cluster, tmp_path, long_run.config, "--nodes=3", **knobs(tmp_path, SPARE_NODES="1"))
    submitted.wait_for(has(4))
    first = status(submitted.run)
    cluster.kill_node("node2")
    try:
        submitted.wait_for(has(2))
        submitted.wait_for(has(4))
        (tmp_path / "hurry").touch()
        ended = submitted.wait()
    finally:
        cluster.start_node("node2")
    assert_equal_bit_identically(ended, submitted.run, long_run)
    assert (ended.restarts, status(submitted.run)["launch"]) == (0, first["launch"]), ended.output
    assert who(submitted.run, "rank_joined") == ["node3", "node3"]


def test_with_too_few_ranks_left_the_job_is_requeued(cluster: Cluster, tmp_path: Path, long_run: Undisturbed) -> None:
    submitted = Submitted(cluster, tmp_path, long_run.config, "--nodes=3", **knobs(tmp_path, MIN_RANKS="5"))
    submitted.wait_for(has(6))
    cluster.kill_node("node2")
    wait_for(lambda: cluster.job(submitted.job).restarts == 1, lambda: cluster.job(submitted.job).output)
    cluster.start_node("node2")
    (tmp_path / "hurry").touch()
    ended = submitted.wait()
    assert_equal_bit_identically(ended, submitted.run, long_run)
    assert "4 ranks are left of at least 5" in ended.output


def test_preempted_and_without_its_first_node_it_resumes(
    cluster: Cluster, tmp_path: Path, long_run: Undisturbed
) -> None:
    submitted = Submitted(cluster, tmp_path, long_run.config, "--nodes=3", **knobs(tmp_path))
    submitted.wait_for_step(5)
    urgent = cluster.run(
        "sbatch", "--partition=high", "--exclusive", "--nodes=3", "--output=/dev/null", "--wrap=true", folder=tmp_path
    )
    assert urgent.returncode == 0, urgent.stderr
    wait_for(lambda: cluster.job(submitted.job).restarts == 1, lambda: cluster.job(submitted.job).output)
    saved = status(submitted.run)
    assert saved["state"] == "stopped", cluster.job(submitted.job).output
    submitted.wait_for(lambda found: has(6)(found) and found["step"] > saved["step"])
    assert cluster.batch_host(submitted.job) == "node1"
    cluster.kill_node("node1")
    wait_for(lambda: cluster.job(submitted.job).restarts == 2, lambda: cluster.job(submitted.job).output)
    cluster.start_node("node1")
    (tmp_path / "hurry").touch()
    ended = submitted.wait()
    assert_equal_bit_identically(ended, submitted.run, long_run)
