"""Twenty runs of each end, watched by real servers with the shipped rules: who fails, dies or hangs is reported within
a few scrapes, who finishes or stops never.

DIST_TRAIN_RUNS_OF_A_KIND makes them fewer. The table of what was measured is printed (`pytest -s`): how many intervals
between scrapes passed from the end of a rule's own delay to its alert, and the seconds.
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

OF_A_KIND = int(os.environ.get("DIST_TRAIN_RUNS_OF_A_KIND", "20"))
ALERTS = {"failed": "DistTrainFailed", "killed": "DistTrainFailed", "hung": "DistTrainStalled"}
"""Of those that are to be reported; the others end as they should."""
DELAYS = {"DistTrainFailed": 0.0, "DistTrainStalled": 120.0 + 60.0}
"""Seconds that a rule waits by itself: what it takes for standing still, and its `for`."""
FEW_SCRAPES = 2
"""Intervals: one until the scrape that shows the end, and one until Prometheus evaluates its rules."""
MOST_SCRAPES = 4
"""On a busy machine: one more until a scrape is answered, and one until Prometheus reads a changed target file."""
GONE_SECONDS = 120.0
"""The longest `for` of the rules that look at the end of a run."""
LIVES = (2.0, 40.0)


@dataclass
class Watched:
    """A run, and when what happened to it."""

    kind: str
    folder: Path
    processes: tuple[int, ...]
    run_id: str = ""
    due: float = 0.0
    is_hit: bool = False
    happened: float = 0.0
    reported: dict[tuple[str, int], float] = field(default_factory=dict)
    """When each alert about it fired first, by its name and the server's number."""

    def delays(self) -> list[float]:
        """Return the seconds from the end of the rule's own delay to the expected alert, for each server."""
        alert = ALERTS.get(self.kind)
        return [fired - self.happened - DELAYS[name] for (name, _), fired in self.reported.items() if name == alert]


def start_run(runs: PacedRuns, folder: Path, targets: Path, kind: str) -> Watched:
    """Start a run that `kind` is to befall; one that is to fail has two ranks."""
    folder.mkdir(parents=True)
    steps = 10 + round(random.uniform(*LIVES) / STEP_SECONDS) if kind == "finished" else 10**6
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
        meeting = {"TORCHELASTIC_RUN_ID": folder.name, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        environment = {**meeting, **{name: str(value) for name, value in place.items()}} if ranks > 1 else {}
        processes.append(runs.start(folder / f"{rank}.log", *arguments, environment=environment))
    return Watched(kind, folder / folder.name, tuple(processes))


def attend(run: Watched, targets: Path) -> None:
    """Do to `run` what its kind says once its time has come, and note when it happened.

    Its life begins when Prometheus can find it, and it has made ten steps: rules know by then how long they take.
    """
    now = time.time()
    if run.happened:
        return
    if not run.due:
        if lines_of(run.folder / "metrics.jsonl") < 10 or not list(targets.glob(f"{run.folder.name}-*.json")):
            return
        run.run_id = (run.folder / "run_id").read_text().strip()
        run.due = now + random.uniform(*LIVES)
    if run.kind == "finished":
        run.happened = now if not is_alive(run.processes[0]) else 0.0
    elif now >= run.due:
        ends = {"failed": signal.SIGKILL, "killed": signal.SIGKILL, "hung": signal.SIGSTOP, "stopped": signal.SIGTERM}
        if not run.is_hit:
            os.kill(run.processes[-1], ends[run.kind])
            run.is_hit = True
        # a rank is killed, and the run has failed once the other one has noticed
        status = run.folder / "status.json"
        if run.kind != "failed":
            run.happened = time.time()
        elif json.loads(status.read_text())["state"] == "failed":
            run.happened = status.stat().st_mtime


@contextmanager
def servers(folder: Path, targets: Path, scrape: int, count: int) -> Iterator[list[Prometheus]]:
    """Run so many Prometheus, with what is shipped but for the interval of scrapes and their own addresses."""
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
def test_every_bad_end_is_reported_in_time_and_no_good_one_ever(scrape: int, count: int, tmp_path: Path) -> None:
    targets = tmp_path / "targets"
    targets.mkdir()
    kinds = ["failed", "killed", "hung", "finished", "stopped"] * OF_A_KIND
    watched: list[Watched] = []
    runs = PacedRuns()
    last = 0.0
    try:
        with servers(tmp_path, targets, scrape, count) as started:
            while not last or time.time() < last + max(GONE_SECONDS, *DELAYS.values()) + 2 * scrape + 30:
                begun = time.time()
                if len(watched) < len(kinds):
                    place = len(watched)
                    watched.append(start_run(runs, tmp_path / f"{kinds[place]}{place}", targets, kinds[place]))
                for run in watched:
                    attend(run, targets)
                by_id = {run.run_id: run for run in watched if run.run_id}
                for number, server in enumerate(started):
                    for alert, run_id in server.alerts():
                        by_id[run_id].reported.setdefault((alert, number), time.time())
                if not last and len(watched) == len(kinds) and all(run.happened for run in watched):
                    last = max(run.happened for run in watched)
                time.sleep(max(0.0, begun + 1.0 - time.time()))
            for run in watched:
                for alert, number in run.reported:
                    # by the server's own clock: this loop looks every second or less often
                    run.reported[alert, number] = started[number].fired_at(alert, run.run_id)
    finally:
        runs.close()
        for process in (process for run in watched for process in run.processes if is_alive(process)):
            os.kill(process, signal.SIGKILL)
    check(watched, scrape, count)


def check(watched: list[Watched], scrape: int, count: int) -> None:
    """Print what was measured, and compare it with what is promised."""
    wrong = []
    for run in watched:
        alert = ALERTS.get(run.kind)
        expected = {(alert, number) for number in range(count)} if alert else set()
        if set(run.reported) != expected:
            wrong.append((run.folder.name, run.reported))
    intervals: Counter[int] = Counter()
    for kind in dict.fromkeys(run.kind for run in watched):
        runs = [run for run in watched if run.kind == kind]
        seconds = [delay for run in runs for delay in run.delays()]
        spread = f"{min(seconds):.1f} / {median(seconds):.1f} / {max(seconds):.1f} s" if seconds else "-"
        counts = Counter(max(0, math.ceil(delay / scrape)) for delay in seconds)
        intervals += counts
        in_scrapes = ", ".join(f"{times} in {scrapes}" for scrapes, times in sorted(counts.items())) or "-"
        print(f"| {scrape} s | {count} | {kind} | {len(runs)} | {len(seconds)} | {in_scrapes} | {spread} |")
    assert not wrong
    assert max(intervals) <= MOST_SCRAPES
    assert sum(times for scrapes, times in intervals.items() if scrapes <= FEW_SCRAPES) >= 0.9 * intervals.total()
