"""A run on two ranks, monitored with the shipped settings of Prometheus, Alertmanager, rules and dashboards."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from time import time as seconds_since_1970
from typing import Any

import pytest
import yaml

from tests.launching import descendants, kill, records, small_settings, start, write_config
from tests.services.browser import needs_chromium, picture_folder
from tests.services.dashboard_page import height_of, screenshot, series_drawn, write_page
from tests.services.expressions import (
    dashboard_expressions,
    device_expressions,
    filled,
    needs_a_device,
    rule_expressions,
    variables,
)
from tests.services.servers import Prometheus, Webhook, alertmanager, prometheus, webhook
from tests.unit.exporting import FACTS, ON_A_DEVICE, STOPPED, measurement, serving
from tests.waiting import PATIENCE, wait_for

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "docker"
RUN = "watched"

pytestmark = [
    pytest.mark.services,
    pytest.mark.ranks,
    pytest.mark.skipif(
        not (shutil.which("prometheus") and shutil.which("prometheus-alertmanager")),
        reason="needs the Debian packages prometheus and prometheus-alertmanager",
    ),
]


@dataclass(frozen=True)
class MonitoredRun:
    """A run and the servers that monitor it."""

    run: Path
    job: subprocess.Popen[str]
    targets: Path
    prometheus: Prometheus
    webhook: Webhook


def rank_processes(job: subprocess.Popen[str]) -> list[int]:
    """Return the processes of the two ranks of `job`, without processes that they started."""
    ours = [pid for pid in descendants(job.pid) if is_rank(pid)]
    return [pid for pid in ours if not is_rank(parent(pid))]


def is_rank(pid: int) -> bool:
    """Whether `pid` runs a rank's program, not the shell that starts it."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[1:4] == [b"-m", b"dist_train", b"train"]
    except FileNotFoundError:
        return False


def parent(pid: int) -> int:
    """Return the parent process of `pid`."""
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")")[-1].split()[1])


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MonitoredRun]:
    folder = tmp_path_factory.mktemp("watched")
    targets = folder / "targets"
    targets.mkdir()
    settings = watched_settings(targets)
    run = folder / RUN
    with (
        webhook() as hook,
        alertmanager(folder, alertmanager_config(folder, hook.url)) as alerts,
        prometheus(folder, prometheus_config(folder, targets, alerts)) as server,
    ):
        job = start(2, "gloo", "train", write_config(folder, settings), "--run-dir", str(run))
        try:
            yield MonitoredRun(run, job, targets, server, hook)
        finally:
            kill(job)


def watched_settings(targets: Path) -> dict[str, Any]:
    """Return the settings of an endless small run with its target file in `targets`."""
    return small_settings(
        run={"epochs": 1_000_000},
        checkpoint={"every_epochs": 5},
        metrics={"enabled": True, "port": 0, "targets_directory": str(targets)},
    )


def prometheus_config(folder: Path, targets: Path, alerts: str) -> Path:
    """Return the shipped configuration with this test's addresses and shorter intervals."""
    settings = yaml.safe_load((SHIPPED / "prometheus/prometheus.yml").read_text())
    settings["global"] |= {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "500ms"}
    [job] = [job for job in settings["scrape_configs"] if job["job_name"] == "dist_train"]
    job["file_sd_configs"] = [{"files": [f"{targets}/*.json"], "refresh_interval": "1s"}]
    settings["scrape_configs"] = [job]
    settings["alerting"]["alertmanagers"] = [{"static_configs": [{"targets": [alerts]}]}]
    settings["rule_files"] = [
        str(rules_file(folder, path)) for path in sorted((SHIPPED / "prometheus/rules").iterdir())
    ]
    path = folder / "prometheus.yml"
    path.write_text(yaml.safe_dump(settings))
    return path


def rules_file(folder: Path, shipped: Path) -> Path:
    """Return a copy of shipped rules that report a stalled run after seconds."""
    rules = yaml.safe_load(shipped.read_text())
    for group in rules["groups"]:
        group.pop("interval", None)
        for rule in group["rules"]:
            if rule.get("alert") == "DistTrainStalled":
                timeout = "max by (run, run_id) (dist_train_stall_timeout_seconds)"
                assert timeout in rule["expr"]
                rule["expr"] = rule["expr"].replace(timeout, f"clamp_max({timeout}, 6)")
                rule["for"] = "0s"
    path = folder / shipped.name
    path.write_text(yaml.safe_dump(rules))
    return path


def alertmanager_config(folder: Path, url: str) -> Path:
    """Return the shipped configuration with this test's receiver and shorter intervals."""
    settings = yaml.safe_load((SHIPPED / "alertmanager/alertmanager.yml").read_text())
    for receiver in settings["receivers"]:
        for hook in receiver.get("webhook_configs", []):
            hook.pop("url_file", None)
            hook["url"] = url
    for route in [settings["route"], *settings["route"].get("routes", [])]:
        route |= {"group_wait": "0s", "group_interval": "1s"}
    path = folder / "alertmanager.yml"
    path.write_text(yaml.safe_dump(settings))
    return path


def test_prometheus_finds_the_run_by_its_target_file(watched: MonitoredRun) -> None:
    wait_for(lambda: watched.prometheus.query("dist_train_accuracy_ratio{split='test'}"), "the first evaluation")

    def healthy_target() -> dict[str, str] | None:
        [target] = watched.prometheus.ask("targets")["activeTargets"]
        labels: dict[str, str] = target["labels"]
        return labels if target["health"] == "up" else None

    labels = wait_for(healthy_target, "a successful scrape")
    assert (labels["run"], labels["rank"], labels["job"]) == (RUN, "0", "dist_train")
    [(info, _)] = wait_for(lambda: watched.prometheus.query("dist_train_run_info"))
    assert info["run"] == RUN
    [(_, size)] = wait_for(lambda: watched.prometheus.query("dist_train_world_size"))
    assert size == 2


def test_prometheus_has_the_recorded_values(watched: MonitoredRun) -> None:
    def many_steps() -> list[tuple[float, float]] | None:
        steps = watched.prometheus.history("dist_train_step").get("", [])
        return steps if len(steps) >= 12 else None

    steps = dict(wait_for(many_steps, "a dozen scrapes"))
    trained = {record["step"]: record for record in records(watched.run, "train")}
    series = {
        ("loss", "batch"): "dist_train_loss",
        ("accuracy", "batch"): "dist_train_accuracy_ratio",
        ("learning_rate", ""): "dist_train_learning_rate",
        ("noise_amplitude", ""): "dist_train_noise_amplitude",
        ("gradient_norm", ""): "dist_train_gradient_norm",
    }
    for (name, split), metric in series.items():
        samples = [(time, value) for time, value in watched.prometheus.history(metric)[split] if time in steps]
        assert len(samples) >= 10
        for time, value in samples:
            assert value == trained[int(steps[time])][name], (metric, steps[time])
    evaluated = records(watched.run, "eval")
    for name, metric in (("loss", "dist_train_loss"), ("accuracy", "dist_train_accuracy_ratio")):
        history = watched.prometheus.history(metric)
        for split in ("train", "test"):
            for time, value in history[split]:
                if time in steps:
                    assert value in latest(evaluated, split, name, steps[time]), (metric, split, steps[time])


def latest(evaluated: list[dict[str, Any]], split: str, name: str, step: float) -> list[float]:
    """Return the last two values up to `step`, whose own evaluation may not have finished."""
    return [record[name] for record in evaluated if record["split"] == split and record["step"] <= step][-2:]


def test_every_expression_of_dashboards_and_rules_has_data(watched: MonitoredRun) -> None:
    expressions = {**dashboard_expressions(RUN), **rule_expressions()}
    assert len(expressions) > 30
    wait_for_data(watched.prometheus, expressions)
    assert watched.prometheus.firing() == set()


def test_every_expression_about_devices_has_data_for_such_a_rank(watched: MonitoredRun, tmp_path: Path) -> None:
    run = tmp_path / "on_a_device"
    facts = replace(FACTS, name=run.name, run_directory=run, time_limit=2e9)
    with serving(facts, STOPPED, targets_directory=watched.targets) as exporter:
        exporter.measurement(replace(measurement(15), ranks=(ON_A_DEVICE, ON_A_DEVICE)))
        expressions = device_expressions(run.name)
        assert expressions
        wait_for_data(watched.prometheus, expressions)


def test_panels_of_64_ranks_have_few_series_and_ranks_have_their_nodes(watched: MonitoredRun, tmp_path: Path) -> None:
    run = tmp_path / "many_ranks"
    nodes = tuple(f"n{rank // 8}" for rank in range(64))
    # Not the id of the run on a device, whose outcome this one would take away as its own earlier one.
    facts = replace(FACTS, name=run.name, run_directory=run, run_id="64" * 8, world_size=64, nodes=nodes, node="n0")
    ranks = tuple(ON_A_DEVICE._replace(busy_seconds=0.2 + 0.001 * (37 * rank % 64)) for rank in range(64))
    slow = 45  # 37 * 45 % 64 == 1: it would be among the fastest
    ranks = (*ranks[:slow], ON_A_DEVICE._replace(busy_seconds=0.4), *ranks[slow + 1 :])
    with serving(facts, STOPPED, targets_directory=watched.targets) as exporter:
        exporter.measurement(replace(measurement(15), ranks=ranks))
        ratio = f'run_rank:dist_train_rank_busy_ratio:avg5m{{run="{run.name}"}}'
        found = wait_for(lambda: watched.prometheus.query(ratio), "the rules")
        assert len(found) == 64
        assert {(labels["rank"], labels["node"]) for labels, _ in found} == {(str(r), n) for r, n in enumerate(nodes)}
        [(slowest, _)] = watched.prometheus.query(f"topk(1, {ratio})")
        assert (slowest["rank"], slowest["node"]) == (str(slow), nodes[slow])
        dashboard = json.loads((SHIPPED / "grafana/dashboards/one_run.json").read_text())
        for panel in dashboard["panels"]:
            drawn = [series_of(watched.prometheus, target["expr"], run.name) for target in panel.get("targets", [])]
            assert sum(drawn) <= 12, panel["title"]


def sums_over_runs(expression: str) -> bool:
    """Whether `expression` aggregates over the ids of runs."""
    without_matchers = re.sub(r"\{[^}]*\}", "", expression)
    return bool(re.search(r"\b(sum|count|quantile)\b", without_matchers)) and "run_id" not in without_matchers


def series_of(server: Prometheus, expression: str, run: str) -> int:
    """Return the number of series of `expression` over the last minute."""
    now = seconds_since_1970()
    values = variables(run)
    found = server.ask("query_range", query=filled(expression, values), start=now - 60, end=now, step=1)["result"]
    return len(found)


@pytest.mark.lengthy
def test_panels_and_rules_distinguish_two_runs_of_one_name(watched: MonitoredRun, tmp_path: Path) -> None:
    twin = tmp_path / RUN
    config = write_config(tmp_path, watched_settings(watched.targets))
    job = start(2, "gloo", "train", config, "--run-dir", str(twin))
    try:
        files = [run / "run_id" for run in (watched.run, twin)]
        wait_for(lambda: all(file.is_file() for file in files), "both runs")
        first, second = (file.read_text().strip() for file in files)
        assert first != second
        ids = {first, second}
        expressions = {**dashboard_expressions(RUN), **rule_expressions()}
        mixed: dict[str, Any] = {}

        def all_distinguished() -> bool:
            mixed.clear()
            for name, text in expressions.items():
                found = {labels["run_id"] for labels, _ in watched.prometheus.query(text) if "run_id" in labels}
                # Rules also have data of the runs of earlier tests.
                if not ids <= found and not sums_over_runs(text):
                    mixed[name] = (text, found)
            return not mixed

        wait_for(all_distinguished, lambda: json.dumps({name: str(why) for name, why in mixed.items()}, indent=1))
        for run_id in ids:
            for name, text in dashboard_expressions(RUN, run_id).items():
                found = {labels.get("run_id", run_id) for labels, _ in watched.prometheus.query(text)}
                assert found == {run_id}, name

        assert watched.prometheus.firing() == set()
        ranks = rank_processes(job)
        for pid in ranks:
            os.kill(pid, signal.SIGSTOP)
        wait_for(lambda: watched.prometheus.firing_runs("DistTrainStalled") == {second}, "the alert about the second")
        for pid in ranks:
            os.kill(pid, signal.SIGKILL)
        wait_for(lambda: watched.prometheus.firing_runs("DistTrainFailed") == {second}, "the alert about the second")
        assert not watched.prometheus.firing_runs("DistTrainStalled")
        assert not watched.prometheus.firing_runs("DistTrainExporterGone")
    finally:
        kill(job)
    for path in watched.targets.glob("*.json"):
        if second in path.read_text():
            path.unlink()
    wait_for(lambda: not watched.prometheus.firing(), "the end of the alerts")


def wait_for_data(server: Prometheus, expressions: Mapping[str, str]) -> None:
    """Wait until `server` has data for all expressions; the error names those without."""
    missing: dict[str, str] = {}

    def all_answered() -> bool:
        missing.clear()
        missing.update({name: text for name, text in expressions.items() if not server.query(text)})
        return not missing

    try:
        wait_for(all_answered, "every expression")
    except AssertionError as error:
        raise AssertionError(f"no data for {json.dumps(missing, indent=1)}") from error


@needs_chromium
@pytest.mark.parametrize("name", ["one_run", "all_runs"])
def test_every_panel_is_drawn_from_the_live_prometheus(watched: MonitoredRun, name: str, tmp_path: Path) -> None:
    dashboard = json.loads((SHIPPED / f"grafana/dashboards/{name}.json").read_text())
    dashboard["panels"] = [panel for panel in dashboard["panels"] if not shows_devices_only(panel)]
    page, picture = tmp_path / f"{name}.html", picture_folder(tmp_path) / f"{name}.png"
    empty: list[str] = []
    chosen = variables(RUN, (watched.run / "run_id").read_text().strip())

    def all_are_drawn() -> bool:
        write_page(page, dashboard, watched.prometheus.url, seconds=60, variables=chosen)
        empty[:] = [title for title, series in series_drawn(page).items() if not series]
        return not empty

    # Prometheus may not have scraped twice yet.
    wait_for(all_are_drawn, lambda: f"no data in {empty}")
    screenshot(page, picture, width=1400, height=height_of(dashboard))
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 20_000


def shows_devices_only(panel: Mapping[str, Any]) -> bool:
    """Whether `panel` is empty on a machine without a GPU."""
    targets = panel.get("targets", [])
    return bool(targets) and all(needs_a_device(target["expr"]) for target in targets)


def test_webhook_is_told_when_a_run_stalls_and_continues(watched: MonitoredRun) -> None:
    ranks = rank_processes(watched.job)
    assert len(ranks) == 2
    for pid in ranks:
        os.kill(pid, signal.SIGSTOP)
    try:
        alert = wait_for(lambda: watched.webhook.received("DistTrainStalled", RUN, "firing"), "the alert")
    finally:
        for pid in ranks:
            os.kill(pid, signal.SIGCONT)
    assert RUN in alert["annotations"]["summary"]
    wait_for(lambda: watched.webhook.received("DistTrainStalled", RUN, "resolved"), "the alert's end")


def test_target_file_has_the_outcome_of_the_run(watched: MonitoredRun) -> None:
    assert list(watched.targets.glob("*.json"))
    for pid in rank_processes(watched.job):
        os.kill(pid, signal.SIGTERM)
    watched.job.communicate(timeout=PATIENCE)
    [labels] = wait_for(
        lambda: [labels for labels, _ in watched.prometheus.query(f"up{{run='{RUN}', outcome!=''}}")],
        "the outcome in Prometheus",
    )
    assert labels["outcome"] == "stopped"
    assert not watched.prometheus.firing() & {"DistTrainFailed", "DistTrainExporterGone"}
    assert watched.prometheus.query("last_over_time(dist_train_state{state='running'}[5m])")
