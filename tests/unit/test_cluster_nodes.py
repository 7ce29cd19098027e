"""The check of a job's nodes, on one machine: each node is a thread, all of them at the loopback address."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from dist_train.cluster import nodes
from dist_train.cluster.heartbeats import resolve
from dist_train.cluster.nodes import NodeReport, as_line, report_node, survey_nodes
from dist_train.outcome import UsageError
from tests.ipv6 import needs_ipv6
from tests.raising import raises

Reached = tuple[int, Mapping[str, str]]
"""How many of the other nodes one reaches, and why it does not reach some."""


def meet(folder: Path, late: dict[str, float], is_over: Callable[[], bool] = lambda: False) -> list[Reached]:
    """Let those of three nodes meet that come, `late` by so many seconds."""
    (folder / "nodes").write_text("node1\nnode2\nnode3")
    (folder / "lock").touch()

    def report(node: str) -> NodeReport:
        time.sleep(late[node])
        return report_node(folder, is_over, {"SLURMD_NODENAME": node, "NETWORK_INTERFACE": "lo"})

    with ThreadPoolExecutor(len(late)) as pool:
        return [(report.reached, report.unreachable) for report in pool.map(report, late)]


def test_nodes_wait_for_a_late_one(tmp_path: Path) -> None:
    assert meet(tmp_path, {"node1": 0, "node2": 1, "node3": 0}) == [(2, {})] * 3


def test_nodes_report_when_the_survey_is_over_though_one_never_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[str] = []
    reach = nodes._reach

    def try_to_reach(folder: Path, peer: str, interface: str) -> str:
        tried.append(peer)
        return reach(folder, peer, interface)

    monkeypatch.setattr(nodes, "_reach", try_to_reach)
    assert meet(tmp_path, {"node1": 0, "node2": 0}, lambda: len(tried) == 2) == [(1, {})] * 2


def test_nodes_whose_names_the_others_do_not_know_are_reached_at_their_addresses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = socket.gethostname()
    monkeypatch.setattr(nodes, "_resolve", lambda name: "127.0.0.1" if name == own else "")
    assert meet_by_name(tmp_path) == [(1, {}), (1, {})]


@needs_ipv6
def test_nodes_whose_names_have_only_ipv6_addresses_are_reached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nodes, "_resolve", lambda name: resolve("::1"))
    assert meet_by_name(tmp_path) == [(1, {}), (1, {})]


def meet_by_name(folder: Path) -> list[Reached]:
    """Let two nodes meet at the addresses of their names."""
    (folder / "nodes").write_text("node1 node2")
    (folder / "lock").touch()
    with ThreadPoolExecutor(2) as pool:
        variables = ({"SLURMD_NODENAME": name} for name in ("node1", "node2"))
        reports = [*pool.map(lambda found: report_node(folder, lambda: False, found), variables)]
    return [(report.reached, report.unreachable) for report in reports]


def survey(folder: Path, reports: Sequence[NodeReport], monkeypatch: pytest.MonkeyPatch) -> Mapping[str, str]:
    """Return the text of each node's last fault, from its report."""

    monkeypatch.setattr(nodes, "command_output", lambda *command: " ".join(report.node for report in reports))
    monkeypatch.setattr(nodes, "_output", lambda command, seconds: ("\n".join(map(as_line, reports)), ""))
    found = survey_nodes(folder, {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[0-19]"})
    return {node: fault.text for fault in found.faults for node in fault.nodes}


def test_a_node_whose_report_is_of_another_version_is_named_with_its_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = NodeReport("node1", time.time(), {}, "10.0.0.1", {"dist_train": "1.0", "horovod": ""}, 0, reached=1)
    later = replace(own, node="node2", versions={"dist_train": "2.0", "triton": "3.5"})
    lines = [as_line(own), as_line(later).replace("{", '{"cores": 4, ', 1), '["of the node\'s shell"]', "7"]
    monkeypatch.setattr(nodes, "command_output", lambda *command: "node1 node2")
    monkeypatch.setattr(nodes, "_output", lambda command, seconds: ("\n".join(lines), ""))
    found = survey_nodes(tmp_path, {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[1-2]"})
    assert [(fault.nodes, fault.text) for fault in found.faults] == [
        (("node2",), "dist_train: 2.0, where the others have 1.0")
    ]


def test_lines_of_a_node_s_shell_that_are_no_utf8_do_not_end_the_survey() -> None:
    output, errors = nodes._output(["sh", "-c", "printf 'caf\\351\\n'; printf 'caf\\351\\n' >&2"], 30.0)
    assert (output, errors) == ("caf\ufffd\n", "caf\ufffd\n")


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with raises(UsageError, "run-directory-unwritable"):
        survey_nodes(tmp_path / "file" / "runs", {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node1"})


def test_srun_is_not_told_to_label_the_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_LABELIO", "1")
    assert nodes._output(["sh", "-c", "echo ${SLURM_LABELIO:-none}"], 30.0) == ("none\n", "")


def test_node_that_reaches_no_other_is_named_among_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reports = [
        NodeReport(f"node{number}", time.time(), {}, f"10.0.0.{number}", {}, 0, reached=16) for number in range(20)
    ]
    assert survey(tmp_path, reports, monkeypatch) == {}
    cut_off = replace(reports[3], reached=0, unreachable={f"node{number}": "timed out" for number in range(4, 20)})
    faults = survey(tmp_path, [*reports[:3], cut_off, *reports[4:]], monkeypatch)
    assert faults == {"node3": "reaches no other node: timed out"}


def test_node_whose_own_name_is_loopback_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    node = NodeReport("node1", time.time(), {"eth0": "10.0.0.1"}, "10.0.0.1", {}, 0, reached=1)
    other = NodeReport("node2", time.time(), {"eth0": "10.0.0.2"}, "127.0.1.1", {}, 0, reached=1)
    assert list(survey(tmp_path, [node, other], monkeypatch)) == ["node2"]


@pytest.mark.parametrize(("visible", "gpus"), [("", 0), ("-1", 0), ("NoDevFiles", 0), ("0,3", 2)])
def test_gpus_of_a_node_are_counted(visible: str, gpus: int, tmp_path: Path) -> None:
    report = report_node(tmp_path, lambda: True, {"NETWORK_INTERFACE": "lo", "CUDA_VISIBLE_DEVICES": visible})
    assert report.gpus == gpus


def test_of_two_different_nodes_the_second_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Several differences, as the result must not depend on the order of a set.
    packages = [f"package{number}" for number in range(8)]
    first = NodeReport("node1", time.time(), {}, "10.0.0.1", dict.fromkeys(packages, "1.0"), 0, reached=1)
    second = replace(first, node="node2", versions=dict.fromkeys(packages, "2.0"))
    assert list(survey(tmp_path, [first, second], monkeypatch)) == ["node2"]
