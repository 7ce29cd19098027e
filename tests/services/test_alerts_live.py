"""Alerts about twenty runs of each outcome, from real servers with the shipped rules.

Runs that fail, are killed or hang are reported within a few scrapes; runs that finish or stop never are.
DIST_TRAIN_RUNS_OF_A_KIND reduces their number. `pytest -s` prints the delays from the end of a rule's own delay to its
alert, in scrape intervals and in seconds.
"""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import pytest
import yaml

from tests.launching import small_settings, write_config
from tests.services.expressions import DOCKER, RULES
from tests.services.paced_runs import STEP_SECONDS, PacedRuns
from tests.services.servers import Prometheus, free_port, prometheus
from tests.waiting import is_alive, lines_of

pytestmark = [
    pytest.mark.services,
    pytest.mark.lengthy,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(not shutil.which("prometheus"), reason="needs the Debian package prometheus"),
]

RUNS_PER_OUTCOME = int(os.environ.get("DIST_TRAIN_RUNS_OF_A_KIND", "20"))
ALERTS = {"failed": "DistTrainFailed", "killed": "DistTrainFailed", "hung": "DistTrainStalled"}
"""The expected alerts by outcome; the other outcomes are never reported."""
DELAYS = {"failed": 0.0, "killed": 30.0, "hung": 120.0 + 60.0}
"""Own delays of the rules, in seconds: the time until a run counts as killed, or as stalled, and `for`."""
FEW_SCRAPES = {"failed": 2, "killed": 3, "hung": 2}
"""Scrape intervals: one until the scrape that shows the end, and one until the rules are evaluated; for a killed run,
whose exporter does not say so, one more until the changed target file is read."""
MOST_SCRAPES = 4
"""On a busy machine: one more until a scrape is answered, and one until a changed target file is read."""
GONE_SECONDS = 120.0
"""The longest `for` of the rules about the end of runs."""
LIFETIMES = (2.0, 40.0)
MOST_AT_WORK = 12
"""So many runs leave two cores time for Prometheus, whose delays are measured."""


@dataclass
class MonitoredRun:
    """A run, its planned outcome, and the times of its end and alerts."""

    kind: str
    folder: Path
    processes: tuple[int, ...]
    run_id: str = ""
    due: float = 0.0
    is_signalled: bool = False
    happened: float = 0.0
    reported: dict[tuple[str, int], float] = field(default_factory=dict)
    """The first firing of each alert about it, by alert and number of the server."""

    def delays(self) -> list[float]:
        """Return the seconds from the end of the rule's own delay to the expected alert, of each server."""
        alert, due = ALERTS.get(self.kind), self.happened + DELAYS.get(self.kind, 0.0)
        return [fired - due for (name, _), fired in self.reported.items() if name == alert]


def start_run(runs: PacedRuns, folder: Path, targets: Path, kind: str) -> MonitoredRun:
    """Start a run with the outcome `kind`; one that shall fail has two ranks."""
    folder.mkdir(parents=True)
    steps = 10 + round(random.uniform(*LIFETIMES) / STEP_SECONDS) if kind == "finished" else 10**6
    settings = small_settings(
        run={"epochs": 10**6, "max_steps": steps},
        evaluation={"every_epochs": 10**6},
        comm={"engine": "torch", "timeout": 60},
        metrics={"enabled": True, "port": 0, "every_steps": 1, "targets_directory": str(targets)},
    )
    arguments = ("train", write_config(folder, settings), "--run-dir", str(folder / folder.name))
    ranks = 2 if kind == "failed" else 1
    port, processes = free_port(), []
    for rank in range(ranks):
        rendezvous = {"TORCHELASTIC_RUN_ID": folder.name, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        placement = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        environment = {**rendezvous, **{name: str(value) for name, value in placement.items()}} if ranks > 1 else {}
        processes.append(runs.start(folder / f"{rank}.log", *arguments, environment=environment))
    return MonitoredRun(kind, folder / folder.name, tuple(processes))


def disturb(run: MonitoredRun, targets: Path) -> None:
    """End or stop `run` as its kind says once it is due, and record the time.

    Its lifetime counts from when it has a target file and has made ten steps, which rules need to know their duration.
    """
    now = time.time()
    if run.happened:
        return
    if not run.due:
        if lines_of(run.folder / "metrics.jsonl") < 10 or not list(targets.glob(f"{run.folder.name}-*.json")):
            return
        run.run_id = (run.folder / "run_id").read_text().strip()
        run.due = now + random.uniform(*LIFETIMES)
    if run.kind == "finished":
        run.happened = now if not is_alive(run.processes[0]) else 0.0
    elif now >= run.due:
        ends = {"failed": signal.SIGKILL, "killed": signal.SIGKILL, "hung": signal.SIGSTOP, "stopped": signal.SIGTERM}
        if not run.is_signalled:
            os.kill(run.processes[-1], ends[run.kind])
            run.is_signalled = True
        # One rank is killed; the run has failed once the other has noticed.
        status = run.folder / "status.json"
        if run.kind != "failed":
            run.happened = time.time()
        elif json.loads(status.read_text())["state"] == "failed":
            run.happened = status.stat().st_mtime


@contextmanager
def servers(folder: Path, targets: Path, scrape: int, count: int) -> Iterator[list[Prometheus]]:
    """Run so many Prometheus servers with the shipped settings, except for scrape interval and addresses."""
    settings = yaml.safe_load((DOCKER / "prometheus/prometheus.yml").read_text())
    settings["global"] |= {"scrape_interval": f"{scrape}s"}
    settings["scrape_configs"] = [job for job in settings["scrape_configs"] if job["job_name"] == "dist_train"]
    settings["scrape_configs"][0]["file_sd_configs"][0]["files"] = [f"{targets}/*.json"]
    settings["rule_files"] = [f"{RULES}/*.yml"]
    del settings["alerting"]
    with ExitStack() as stack:
        started = []
        for number in range(count):
            home = folder / f"server{number}"
            home.mkdir()
            (home / "prometheus.yml").write_text(yaml.safe_dump(settings))
            started.append(stack.enter_context(prometheus(home, home / "prometheus.yml")))
        yield started


@pytest.mark.parametrize(("scrape", "count"), [(5, 1), (5, 2), (60, 1), (60, 2)])
def test_failed_runs_are_reported_in_time_and_others_never(scrape: int, count: int, tmp_path: Path) -> None:
    targets = tmp_path / "targets"
    targets.mkdir()
    kinds = ["failed", "killed", "hung", "finished", "stopped"] * RUNS_PER_OUTCOME
    watched: list[MonitoredRun] = []
    runs = PacedRuns()
    last = 0.0
    try:
        with servers(tmp_path, targets, scrape, count) as started:
            while not last or time.time() < last + max(GONE_SECONDS, *DELAYS.values()) + 2 * scrape + 30:
                started_at = time.time()
                at_work = sum(not run.happened for run in watched)
                if len(watched) < len(kinds) and at_work < MOST_AT_WORK:
                    number = len(watched)
                    watched.append(start_run(runs, tmp_path / f"{kinds[number]}{number}", targets, kinds[number]))
                for run in watched:
                    disturb(run, targets)
                by_id = {run.run_id: run for run in watched if run.run_id}
                for number, server in enumerate(started):
                    for alert, run_id in server.alerts():
                        by_id[run_id].reported.setdefault((alert, number), time.time())
                if not last and len(watched) == len(kinds) and all(run.happened for run in watched):
                    last = max(run.happened for run in watched)
                time.sleep(max(0.0, started_at + 1.0 - time.time()))
            for run in watched:
                for alert, number in run.reported:
                    # by the server's own clock, since this loop polls at most every second
                    run.reported[alert, number] = started[number].fired_at(alert, run.run_id)
    finally:
        runs.close()
        for process in (process for run in watched for process in run.processes if is_alive(process)):
            os.kill(process, signal.SIGKILL)
    check(watched, scrape, count)


def check(watched: list[MonitoredRun], scrape: int, count: int) -> None:
    """Print the measured delays, and compare them with the promised ones."""
    wrong = []
    for run in watched:
        alert = ALERTS.get(run.kind)
        expected = {(alert, number) for number in range(count)} if alert else set()
        if set(run.reported) != expected:
            wrong.append((run.folder.name, run.reported))
    intervals: Counter[int] = Counter()
    few = 0
    for kind in dict.fromkeys(run.kind for run in watched):
        runs = [run for run in watched if run.kind == kind]
        seconds = [delay for run in runs for delay in run.delays()]
        spread = f"{min(seconds):.1f} / {median(seconds):.1f} / {max(seconds):.1f} s" if seconds else "-"
        counts = Counter(max(0, math.ceil(delay / scrape)) for delay in seconds)
        intervals += counts
        few += sum(times for scrapes, times in counts.items() if scrapes <= FEW_SCRAPES.get(kind, 0))
        in_scrapes = ", ".join(f"{times} in {scrapes}" for scrapes, times in sorted(counts.items())) or "-"
        print(f"| {scrape} s | {count} | {kind} | {len(runs)} | {len(seconds)} | {in_scrapes} | {spread} |")
    assert not wrong
    assert max(intervals) <= MOST_SCRAPES
    assert few >= 0.9 * intervals.total()
