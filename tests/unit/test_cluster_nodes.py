"""The check of a job's nodes, on one machine: each node is a thread, all of them at the loopback address."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from dist_train.cluster.nodes import NodeReport, report_node


def meet(folder: Path, nodes: list[str], late: dict[str, float], over: threading.Event) -> dict[str, NodeReport]:
    """Return the reports of the nodes that come, `late` by so many seconds."""
    (folder / "nodes").write_text("\n".join(nodes))
    (folder / "lock").touch()

    def report(node: str) -> NodeReport:
        time.sleep(late[node])
        return report_node(folder, over.is_set, {"SLURMD_NODENAME": node, "NETWORK_INTERFACE": "lo"})

    with ThreadPoolExecutor(len(late)) as pool:
        return dict(zip(late, pool.map(report, late), strict=True))


def test_nodes_wait_for_a_late_one(tmp_path: Path) -> None:
    reports = meet(tmp_path, ["node1", "node2", "node3"], {"node1": 0, "node2": 1, "node3": 0}, threading.Event())
    assert [report.unreachable for report in reports.values()] == [{}, {}, {}]


def test_nodes_report_when_the_survey_is_over_though_one_never_comes(tmp_path: Path) -> None:
    over = threading.Event()
    timer = threading.Timer(1.0, over.set)
    timer.start()
    reports = meet(tmp_path, ["node1", "node2", "node3"], {"node1": 0, "node2": 0}, over)
    assert [report.unreachable for report in reports.values()] == [{}, {}]
    assert not timer.is_alive()
