"""launch/mpirun.sh with a host file and launch/horovodrun.sh, over ssh."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from dist_train.outcome import ExitCode
from tests.cluster.cluster import ROOT, Cluster
from tests.cluster.runs import Undisturbed
from tests.launching import status, weights_digest

pytestmark = [pytest.mark.ranks, pytest.mark.services]


@pytest.mark.lengthy
def test_mpirun_with_a_host_file_is_bit_identical_to_one_rank(
    cluster: Cluster, tmp_path: Path, large_batch: Undisturbed
) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("node1 slots=2\nnode2 slots=2\n")
    _check(cluster, tmp_path, large_batch, "mpirun.sh", "-np", "4", "--hostfile", str(hosts))


@pytest.mark.lengthy
def test_horovodrun_over_ssh_is_bit_identical_to_one_rank(
    cluster: Cluster, tmp_path: Path, large_batch: Undisturbed
) -> None:
    _check(cluster, tmp_path, large_batch, "horovodrun.sh", "-np", "4", "-H", "node1:2,node2:2")


@pytest.mark.lengthy
def test_horovodrun_names_a_host_that_ssh_does_not_reach(
    cluster: Cluster, tmp_path: Path, large_batch: Undisturbed
) -> None:
    script = str(ROOT / "launch/horovodrun.sh")
    command = (script, "-H", "node1:1,node9:1", "train", large_batch.config, "--run-dir", str(tmp_path / "run"))
    ended = cluster.on("node1", *command, folder=tmp_path)
    assert ended.returncode == ExitCode.FAULT
    assert "ssh cannot reach node9 without a password" in ended.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.lengthy
def test_promise_7_horovodrun_forwards_sigterm_to_other_hosts(
    cluster: Cluster, tmp_path: Path, long_run: Undisturbed
) -> None:
    run = tmp_path / "run"
    script = str(ROOT / "launch/horovodrun.sh")
    command = (script, "-H", "node1:1,node2:1", "train", long_run.config, "run.epochs=10000", "--run-dir", str(run))
    # On the login node, which has no ranks.
    stopped_in_training = f"""
        {shlex.join(command)} &
        while kill -0 $! && ! grep -qs '"state": "running"' {run}/status.json; do sleep 0.1; done
        kill -TERM $!
        wait $!
    """
    ended = cluster.run("bash", "-c", stopped_in_training, folder=tmp_path)
    assert ended.returncode == ExitCode.STOPPED, ended.stdout + ended.stderr
    assert status(run)["state"] == "stopped"


def _check(cluster: Cluster, folder: Path, undisturbed: Undisturbed, script: str, *options: str) -> None:
    run = folder / "run"
    command = (str(ROOT / "launch" / script), *options, "train", undisturbed.config, "--run-dir", str(run))
    ended = cluster.on("node1", *command, folder=folder)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert status(run)["world_size"] == 4
    assert weights_digest(run) == undisturbed.weights
