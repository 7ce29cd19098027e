"""Checks of whether a job's nodes can work together: `dist-train doctor --cluster`, and batch scripts that use it."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.cluster import Cluster
from tests.cluster.runs import Undisturbed
from tests.cluster.submitted import SubmittedRun, assert_finished_like
from tests.cluster.test_batch_script import LAUNCHERS

pytestmark = [pytest.mark.ranks, pytest.mark.services]
_DOCTOR = f"{sys.executable} -m dist_train doctor --cluster"


@pytest.fixture
def docker_bridge(cluster: Cluster, tmp_path: Path) -> Iterator[None]:
    """An interface with the same address on all nodes, like Docker's bridge."""
    adding = "ip link add docker0 type bridge && ip addr add 172.17.0.1/16 dev docker0 && ip link set docker0 up"
    for node in cluster.nodes:
        assert cluster.on(node, "sh", "-c", adding, folder=tmp_path).returncode == 0
    yield
    for node in cluster.nodes:
        cluster.on(node, "ip", "link", "del", "docker0", folder=tmp_path)


@pytest.fixture
def other_host_names(cluster: Cluster, tmp_path: Path) -> Iterator[None]:
    """Nodes whose host names are not their names in Slurm, as in clouds."""
    known = cluster.on("node1", "cat", "/etc/hosts", folder=tmp_path).stdout
    hosts = tmp_path / "hosts"
    hosts.write_text(re.sub(r"^([0-9.]+) (node[0-9])$", r"\1 \2 ip-\2", known, flags=re.MULTILINE))
    for node in cluster.nodes:
        renaming = f"mount --bind {hosts} /etc/hosts && hostname ip-{node}"
        assert cluster.on(node, "sh", "-c", renaming, folder=tmp_path).returncode == 0
    yield
    for node in cluster.nodes:
        cluster.on(node, "sh", "-c", f"hostname {node}; umount /etc/hosts", folder=tmp_path)


@pytest.fixture
def unknown_names(cluster: Cluster, tmp_path: Path) -> Iterator[None]:
    """Nodes that do not know each other by name."""
    known = cluster.on("node1", "cat", "/etc/hosts", folder=tmp_path).stdout
    for node in cluster.nodes:
        hosts = tmp_path / f"hosts-{node}"
        hosts.write_text(re.sub(rf"^[0-9.]+ (?!{node}$)node[0-9]\n", "", known, flags=re.MULTILINE))
        assert cluster.on(node, "mount", "--bind", str(hosts), "/etc/hosts", folder=tmp_path).returncode == 0
    yield
    for node in cluster.nodes:
        cluster.on(node, "umount", "/etc/hosts", folder=tmp_path)


def run_doctor(cluster: Cluster, folder: Path, command: str) -> dict[str, list[tuple[str, str]]]:
    """Run `doctor --cluster` in a job on both nodes; return state and text of its checks by name."""
    options = ("--nodes=2", "--exclusive", "--wait", "--output=out", f"--wrap={command} --json")
    cluster.run("sbatch", *options, folder=folder)
    checks: dict[str, list[tuple[str, str]]] = {}
    for check in json.loads((folder / "out").read_text())["checks"]:
        checks.setdefault(check["name"], []).append((check["state"], f"{check['detail']} {check['fix']}"))
    return checks


def test_identical_nodes_pass_all_checks(cluster: Cluster, tmp_path: Path) -> None:
    checks = run_doctor(cluster, tmp_path, _DOCTOR)
    assert {state for found in checks.values() for state, _ in found} == {"fine"}
    assert checks.keys() == {"Slurm", "node1", "node2"}


@pytest.mark.lengthy
@pytest.mark.usefixtures("other_host_names")
def test_nodes_with_other_host_names_pass_all_checks(cluster: Cluster, tmp_path: Path) -> None:
    checks = run_doctor(cluster, tmp_path, _DOCTOR)
    assert {state for found in checks.values() for state, _ in found} == {"fine"}


def _with_slow_node2(folder: Path, seconds: int) -> str:
    """Return the check, with Python on node2 starting `seconds` late."""
    (folder / "sitecustomize.py").write_text(
        "import os, time\nif 'SLURM_STEP_ID' in os.environ and os.uname().nodename == 'node2':\n"
        f"    time.sleep({seconds})\n"
    )
    return f"PYTHONPATH={folder}:$PYTHONPATH {_DOCTOR}"


@pytest.mark.lengthy
def test_node_that_starts_python_slowly_passes(cluster: Cluster, tmp_path: Path) -> None:
    checks = run_doctor(cluster, tmp_path, _with_slow_node2(tmp_path, 18))
    assert {state for found in checks.values() for state, _ in found} == {"fine"}


@pytest.mark.lengthy
def test_node_that_never_starts_python_does_not_answer(cluster: Cluster, tmp_path: Path) -> None:
    checks = run_doctor(cluster, tmp_path, _with_slow_node2(tmp_path, 600))
    assert [state for state, _ in checks["node1"]] == ["fine"]
    assert [state for state, _ in checks["node2"]] == ["fails"]
    assert "does not answer (nothing within 32 s)" in checks["node2"][0][1]


@pytest.mark.lengthy
@pytest.mark.usefixtures("docker_bridge")
def test_unusable_interface_is_reported_with_a_usable_one(cluster: Cluster, tmp_path: Path) -> None:
    checks = run_doctor(cluster, tmp_path, f"NETWORK_INTERFACE=docker0 {_DOCTOR}")
    assert ("note", "NETWORK_INTERFACE=eth0") in [(state, text.split()[-1]) for state, text in checks["node1, node2"]]
    assert [state for state, _ in checks["node2"]] == ["fine", "fails"]
    assert "172.17.0.1" in checks["node2"][1][1]


@pytest.mark.lengthy
def test_node_without_the_shared_folder_is_named(cluster: Cluster, tmp_path: Path) -> None:
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    cluster.on("node2", "mount", "-t", "tmpfs", "tmpfs", str(hidden), folder=tmp_path)
    checks = run_doctor(cluster, tmp_path, f"{_DOCTOR} {hidden}")
    cluster.on("node2", "umount", str(hidden), folder=tmp_path)
    assert [state for state, _ in checks["node1"]] == ["fine"]
    assert [state for state, _ in checks["node2"]] == ["fine", "fails"]


@pytest.mark.lengthy
@pytest.mark.parametrize("launcher", list(LAUNCHERS))
@pytest.mark.usefixtures("docker_bridge")
def test_job_uses_a_network_that_all_nodes_share(
    launcher: str, cluster: Cluster, tmp_path: Path, large_batch: Undisturbed
) -> None:
    submitted = SubmittedRun(cluster, tmp_path, large_batch.config, **LAUNCHERS[launcher])
    ended = submitted.wait()
    assert "NETWORK_INTERFACE=eth0" in ended.output
    assert_finished_like(ended, submitted.run, large_batch)


@pytest.mark.lengthy
@pytest.mark.usefixtures("unknown_names")
def test_torch_ranks_meet_on_nodes_that_do_not_know_each_other_by_name(
    cluster: Cluster, tmp_path: Path, large_batch: Undisturbed
) -> None:
    submitted = SubmittedRun(cluster, tmp_path, large_batch.config, MAX_REQUEUES="0", **LAUNCHERS["torch"])
    submitted.wait_for_weights_of(large_batch)


@pytest.mark.lengthy
def test_torch_ranks_meet_on_nodes_whose_own_names_are_loopback(
    cluster: Cluster, tmp_path: Path, large_batch: Undisturbed
) -> None:
    # Only within the ranks: the test's Slurm itself needs the names.
    known = cluster.on("node1", "cat", "/etc/hosts", folder=tmp_path).stdout
    for node in cluster.nodes:
        hosts = re.sub(rf"^[0-9.]+ {node}$", f"127.0.1.1 {node}", known, flags=re.MULTILINE)
        (tmp_path / f"hosts-{node}").write_text(hosts)
    python = tmp_path / "python"
    python.write_text(
        "#!/bin/sh\n"
        f'[ -n "$SLURM_STEP_ID" ] || exec {sys.executable} "$@"\n'
        f"exec unshare --mount sh -c 'mount --bind {tmp_path}/hosts-$(uname -n) /etc/hosts && "
        f"""exec {sys.executable} "$@"' sh "$@"\n"""
    )
    python.chmod(0o755)
    environment = {**LAUNCHERS["torch"], "DIST_TRAIN_PYTHON": str(python)}
    submitted = SubmittedRun(cluster, tmp_path, large_batch.config, **environment)
    submitted.wait_for_weights_of(large_batch)
