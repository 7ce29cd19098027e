"""Rules and settings of Prometheus and Alertmanager, checked with their own tools."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from dashboard_generator.links import ALERTS, runbook_path
from dashboard_generator.runbook import sections

from dist_train.monitoring.prometheus.board import COUNTED
from dist_train.monitoring.prometheus.metrics import METRICS
from tests.launching import mostly_lengthy
from tests.services.expressions import (
    DASHBOARDS,
    DOCKER,
    RULES,
    dashboard_queries,
    filled,
    metric_names,
    rules,
    variables,
)
from tests.services.servers import alertmanager, fetch, webhook
from tests.waiting import PATIENCE, wait_for

ROOT = Path(__file__).parents[2]
TESTS = sorted((DOCKER / "prometheus" / "tests").glob("*.yml"))
ALERT_RULES = {name: rule for name, rule in rules() if "alert" in rule}
RECORDED = [name for name, rule in rules() if "record" in rule]

promtool = pytest.mark.skipif(not shutil.which("promtool"), reason="needs the Debian package prometheus")
pytestmark = pytest.mark.services


def run(*command: str | Path) -> str:
    """Return the output of a tool, which must succeed."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@promtool
def test_promtool_accepts_settings_and_rules() -> None:
    assert "is valid prometheus config" in run("promtool", "check", "config", DOCKER / "prometheus" / "prometheus.yml")
    output = run("promtool", "check", "rules", "--lint=all", "--lint-fatal", *sorted(RULES.glob("*.yml")))
    assert output.count("SUCCESS") == len(list(RULES.glob("*.yml")))


@promtool
@pytest.mark.parametrize("path", TESTS, ids=lambda path: path.stem)
def test_alerts_fire_only_when_they_should(path: Path) -> None:
    assert "SUCCESS" in run("promtool", "test", "rules", path)


def healthy_twin(run: str, interval: int, length: int = 2000) -> list[dict[str, str]]:
    """Return the series of a healthy run that differs from `run` only by its id."""
    constant = {
        'up{job="dist_train", rank="0", run, outcome=""}': 1,
        'dist_train_state{run, state="running"}': 1,
        "dist_train_launch_timestamp_seconds{run}": 0,
        "dist_train_samples_per_second{run}": 1000,
        "dist_train_planned_samples{run}": 5_000_000,
        "dist_train_planned_epochs{run}": 100,
        "dist_train_world_size{run}": 2,
        "dist_train_micro_batches{run}": 64,
        "dist_train_stall_timeout_seconds{run}": 120,
        'dist_train_rank_busy_ratio{run, rank="0", node="n0"}': 1,
        'dist_train_rank_busy_ratio{run, rank="1", node="n1"}': 1,
        'dist_train_rank_busy_seconds{run, rank="0", node="n0"}': 0.1,
        'dist_train_rank_busy_seconds{run, rank="1", node="n1"}': 0.1,
        'dist_train_rank_device_memory_bytes{run, rank="1", node="n1"}': 50,
        'dist_train_rank_device_memory_limit_bytes{run, rank="1", node="n1"}': 100,
        "dist_train_disk_free_bytes{run}": 10**12,
        "dist_train_checkpoint_size_bytes{run}": 1000,
        "dist_train_checkpoint_interval_steps{run}": 1000,
        "dist_train_time_limit_timestamp_seconds{run}": 10**9,
        "dist_train_time_left_seconds{run}": 60,
        'dist_train_accuracy_ratio{run, split="test"}': 0.5,
        "dist_train_best_accuracy_ratio{run}": 0.5,
        **{f"dist_train_{event}_total{{run}}": 0 for event in ("not_finite", "disagreements", "requeues")},
        "dist_train_checkpoint_failures_total{run}": 0,
        'dist_train_events_total{run, event="corrupt_checkpoint"}': 0,
        **{f'dist_train_events_before_launch{{run, event="{event}"}}': 0 for event in COUNTED},
    }
    clocks = ("last_progress_timestamp_seconds", "checkpoint_timestamp_seconds", "step_duration_seconds_sum")
    moving = [f"dist_train_{name}{{run}}" for name in (*clocks, "step_duration_seconds_count")]
    values = {name: f"{value}x{length}" for name, value in constant.items()}
    values |= dict.fromkeys(moving, f"0+{interval}x{length}")
    twin = f'run="{run}", run_id="twin"'
    return [{"series": re.sub(r"\brun\b", twin, name, count=1), "values": value} for name, value in values.items()]


def with_twins(path: Path, folder: Path, change: Callable[[str], str] = str) -> Path:
    """Return the tests of `path` with a healthy twin of each run, and with rules changed by `change`."""
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    content["rule_files"] = []
    for rule_file in sorted(RULES.glob("*.yml")):
        changed = folder / rule_file.name
        changed.write_text(change(rule_file.read_text(encoding="utf-8")), encoding="utf-8")
        content["rule_files"].append(str(changed))
    for test in content["tests"]:
        test.pop("promql_expr_test", None)
        names = {found[1] for each in test["input_series"] if (found := re.search(r'\brun="(\w+)"', each["series"]))}
        interval = 60 if test["interval"] in ("1m", "60s") else int(test["interval"].removesuffix("s"))
        for name in sorted(names):
            test["input_series"] += healthy_twin(name, interval)
    written = folder / "twins.yml"
    written.write_text(yaml.safe_dump(content), encoding="utf-8")
    return written


@promtool
@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=[] if path.stem == "ends" else pytest.mark.lengthy, id=path.stem) for path in TESTS],
)
def test_healthy_run_of_the_same_name_does_not_change_alerts(path: Path, tmp_path: Path) -> None:
    assert "SUCCESS" in run("promtool", "test", "rules", with_twins(path, tmp_path))


@promtool
@pytest.mark.parametrize(
    ("written", "replacement"), mostly_lengthy([("on (run, run_id)", "on (run)"), ("by (run, run_id)", "by (run)")])
)
def test_rules_without_run_ids_would_confuse_runs_of_one_name(written: str, replacement: str, tmp_path: Path) -> None:
    tests = with_twins(
        DOCKER / "prometheus/tests/progress.yml", tmp_path, lambda rules: rules.replace(written, replacement)
    )
    command = ["promtool", "test", "rules", str(tests)]
    assert subprocess.run(command, capture_output=True, check=False).returncode != 0


@promtool
@pytest.mark.parametrize(
    ("written", "replacement", "healthy"),
    mostly_lengthy(
        [
            ("on (run, run_id) run:dist_train_checkpoint_age_seconds:limit", "7200", "steps of 60 s"),
            ("1.1 * quantile", "0 * quantile", "nobody waits for it"),
            ("on (run, run_id) max by (run, run_id) (dist_train_stall_timeout_seconds)", "120", "steps of 60 s"),
            (
                "on (run, run_id) max by (run, run_id) (dist_train_stall_timeout_seconds)",
                "120",
                "the first step compiles",
            ),
            ("unless on (run, run_id) dist_train_state", "", "resumed in the next Slurm job"),
            ("and ignoring (state)", "or ignoring (state)", "resumed in the next Slurm job"),
            ('finished|failed"}[1d]) == 1', 'finished|failed"}[1d]) == 2', "target file could not be removed"),
            ('{state="running"}) == 1', '{state="running"}) >= 0', "it is stopping"),
            ("[1d:1m] offset 15m", "[1m:1m] offset 15m", "events of an earlier launch"),
            ("dist_train_events_before_launch{", "missing{", "more than a day after events"),
            (
                "max by (run, run_id) (max_over_time(dist_train_world_size[1h]))",
                "dist_train_world_size",
                "half of the ranks",
            ),
            (
                "max by (run, run_id) (max_over_time(dist_train_micro_batches[1h]))",
                "dist_train_micro_batches",
                "the batch an eighth",
            ),
            ("and on (run, run_id) run:dist_train_active:max == 1", "", "requeued often, and over"),
        ],
        keep=3,
    ),
)
def test_coarser_rule_would_give_a_false_alarm(written: str, replacement: str, healthy: str, tmp_path: Path) -> None:
    shutil.copytree(DOCKER / "prometheus", tmp_path / "prometheus")
    path = tmp_path / "prometheus" / "rules" / "alerts.yml"
    text = path.read_text(encoding="utf-8")
    assert written in text
    path.write_text(text.replace(written, replacement), encoding="utf-8")
    tests = [str(tmp_path / "prometheus" / "tests" / name) for name in ("healthy.yml", "days.yml")]
    command = ["promtool", "test", "rules", f"--run={healthy}", *tests]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "alertname: DistTrain" in done.stdout + done.stderr


def check_values(
    series: dict[str, str],
    query: str,
    expected: dict[int, dict[str, str]],
    folder: Path,
    name: str = "a",
    function: str = "",
) -> None:
    """Check `query` of a dashboard, of the run `name`, at times in seconds.

    `series` are scraped every 15 s, as in promtool's tests. With a `function` over time, that of the query over the
    last five minutes is checked: `@ end()` is then the end of a range, as in Grafana.
    """
    [written] = [
        text
        for path in DASHBOARDS.glob("*.json")
        for title, text in dashboard_queries(json.loads(path.read_text(encoding="utf-8")))
        if title == query
    ]
    expression = filled(written, variables(name))
    if function:
        expression = f"{function}(({expression})[5m:15s])"
    expectations = [
        {
            "expr": expression,
            "eval_time": f"{moment}s",
            "exp_samples": [{"labels": labels, "value": float(value)} for labels, value in samples.items()],
        }
        for moment, samples in expected.items()
    ]
    inputs = [{"series": name, "values": values} for name, values in series.items()]
    test = {"interval": "15s", "input_series": inputs, "promql_expr_test": expectations}
    path = folder / "dashboard.yml"
    path.write_text(yaml.safe_dump({"evaluation_interval": "1s", "tests": [test]}), encoding="utf-8")
    assert "SUCCESS" in run("promtool", "test", "rules", path)


A_RUN = 'run="a", run_id="1f"'


@promtool
def test_a_run_whose_batch_grew_has_one_bar(tmp_path: Path) -> None:
    kinds = [f'{{global_batch="{size}", model="m", noise="none", {A_RUN}}}' for size in (64, 512)]
    series = {
        f"dist_train_epoch{{{A_RUN}}}": "0+1x20",
        f"dist_train_run_info{kinds[0]}": "1x5 stale",
        f"dist_train_run_info{kinds[1]}": "_x6 1x14",
    }
    check_values(series, "Epochs done/A", {80: {kinds[0]: "5"}, 280: {kinds[1]: "18"}}, tmp_path)


@promtool
def test_a_run_of_which_every_rank_is_scraped_has_one_curve_although_its_batch_grew(tmp_path: Path) -> None:
    kinds = {rank: f'global_batch="{size}", model="m", noise="none"' for rank, size in ((0, 512), (1, 64))}
    infos = {f'dist_train_run_info{{{A_RUN}, rank="{rank}", {kind}}}': "1x20" for rank, kind in kinds.items()}
    series = {f"dist_train_distance_from_initial{{{A_RUN}}}": "0.5x20", **infos}
    check_values(series, "Distance from the start by ${x:text}/B", {120: {f"{{{kinds[0]}, {A_RUN}}}": "0.5"}}, tmp_path)


@promtool
@pytest.mark.parametrize("name", ["lr0.1", "lr-1e+0"])
def test_the_dashboard_of_one_run_shows_no_run_of_a_similar_name(name: str, tmp_path: Path) -> None:
    series = {f'dist_train_epoch{{run="{run}", run_id="1f"}}': "1x20" for run in (name, "lr0-1")}
    check_values(series, "Epoch/A", {120: {f'{{run="{name}", run_id="1f"}}': "1"}}, tmp_path, name)


@promtool
def test_no_run_is_at_work_once_all_are_gone(tmp_path: Path) -> None:
    series = {f"run:dist_train_active:max{{{A_RUN}}}": "1x4 stale"}
    check_values(series, "At work/A", {60: {"{}": "1"}, 120: {"{}": "0"}}, tmp_path)


@promtool
def test_the_last_step_of_a_lost_run_is_ever_longer_ago(tmp_path: Path) -> None:
    series = {
        f"dist_train_last_progress_timestamp_seconds{{{A_RUN}}}": "0+15x4 stale",
        f"run:dist_train_heard_timestamp_seconds:max{{{A_RUN}}}": "0+15x4 stale",
    }
    query, labels = "Since the last step/A", f"{{{A_RUN}}}"
    check_values(series, query, {60: {labels: "0"}, 240: {labels: "180"}}, tmp_path)
    ended = {f"run:dist_train_ended_timestamp_seconds:max{{{A_RUN}}}": "_x5 75+15x20"}
    check_values(series | ended, query, {60: {labels: "0"}, 240: {}}, tmp_path)


@promtool
def test_the_job_and_node_of_a_lost_run_are_those_of_its_latest_launch(tmp_path: Path) -> None:
    places = [f'{{{A_RUN}, slurm_job="{job}", node="n{job}"}}' for job in (1, 2)]
    launches = ("5x4 stale", "_x6 90x4 stale")
    series = {f"dist_train_launch_timestamp_seconds{of}": each for of, each in zip(places, launches, strict=True)}
    expected = {60: {places[0]: "5"}, 240: {places[1]: "90"}}
    check_values(series, "Job and node/A", expected, tmp_path, function="max_over_time")


@promtool
def test_the_slowest_ranks_of_a_run_that_has_ended_are_shown(tmp_path: Path) -> None:
    ranks = [f'{{{A_RUN}, rank="{rank}", node="n"}}' for rank in range(7)]
    series = {f"run_rank:dist_train_rank_busy_ratio:avg5m{of}": f"{rank}x4 stale" for rank, of in enumerate(ranks)}
    expected = {of: str(rank) for rank, of in enumerate(ranks) if rank >= 2}
    query = "Slowest ranks: time for a micro-batch/A"
    check_values(series, query, {60: expected, 240: expected}, tmp_path, function="max_over_time")


@promtool
def test_every_event_is_marked_whenever_it_was_scraped(tmp_path: Path) -> None:
    counts = {f"dist_train_checkpoints_total{{{A_RUN}}}": "0x4 1x10"}
    mark = {f"{{{A_RUN}}}": "1"}
    check_values(counts, "mark Checkpoints", {67: {}, 82: mark, 112: {}}, tmp_path)
    launches = {f"dist_train_launch_timestamp_seconds{{{A_RUN}}}": "_x4 5x4 stale _x3 150x8"}
    first, second = ({f"{{{A_RUN}}}": str(launch)} for launch in (5, 150))
    check_values(launches, "mark Launches", {67: first, 82: {}, 187: {}, 202: second, 217: {}}, tmp_path)


@pytest.mark.skipif(not shutil.which("amtool"), reason="needs the Debian package prometheus-alertmanager")
def test_amtool_accepts_the_settings_of_alertmanager() -> None:
    assert "SUCCESS" in run("amtool", "check-config", DOCKER / "alertmanager" / "alertmanager.yml")


@pytest.mark.skipif(not shutil.which("amtool"), reason="needs the Debian package prometheus-alertmanager")
@pytest.mark.parametrize("reason", ["DistTrainNotFinite", "DistTrainDisagreement"])
def test_failure_is_told_beside_its_reason(reason: str, tmp_path: Path) -> None:
    settings = (DOCKER / "alertmanager" / "alertmanager.yml").read_text(encoding="utf-8")
    config, address = tmp_path / "alertmanager.yml", tmp_path / "webhook_url"
    config.write_text(settings.replace("/etc/alertmanager/webhook_url", str(address)), encoding="utf-8")
    names = (reason, "DistTrainFailed", "DistTrainAccuracyFalling")
    severities = {name: ALERT_RULES[name]["labels"] for name in names}
    firing = [{"labels": {"alertname": name, "run": "a", "run_id": "1f", **severities[name]}} for name in names]
    with webhook() as hook:
        address.write_text(hook.url, encoding="utf-8")
        with alertmanager(tmp_path, config) as server:
            headers = {"Content-Type": "application/json"}
            request = urllib.request.Request(f"http://{server}/api/v2/alerts", json.dumps(firing).encode(), headers)
            urllib.request.urlopen(request, timeout=PATIENCE).close()

            def inhibited() -> set[str]:
                alerts = json.loads(fetch(f"http://{server}/api/v2/alerts"))
                return {alert["labels"]["alertname"] for alert in alerts if alert["status"]["inhibitedBy"]}

            assert wait_for(inhibited, "what follows is inhibited") == {"DistTrainAccuracyFalling"}
            for name in (reason, "DistTrainFailed"):
                wait_for(partial(hook.received, name, "a", "firing"), f"{name} is told")


def expectations() -> list[dict[str, Any]]:
    """Return all expectations of the rules' tests."""
    return [
        expectation
        for path in TESTS
        for test in yaml.safe_load(path.read_text(encoding="utf-8"))["tests"]
        for expectation in test.get("alert_rule_test", [])
    ]


@pytest.mark.parametrize("alert", ALERTS)
def test_alert_is_tested_both_ways_and_documented(alert: str) -> None:
    rule = ALERT_RULES[alert]
    tested = [bool(expectation["exp_alerts"]) for expectation in expectations() if expectation["alertname"] == alert]
    assert set(tested) == {True, False}
    assert set(rule["annotations"]) == {"summary", "description", "runbook_url"}
    assert "$labels.run" in rule["annotations"]["summary"]
    assert "$labels.run" in rule["annotations"]["description"]
    assert rule["labels"]["severity"] in {"critical", "warning"}
    assert "for" in rule
    assert rule["annotations"]["runbook_url"].endswith(runbook_path(alert))
    text = sections((ROOT / "docs" / "runbook.md").read_text(encoding="utf-8"))[alert]
    assert re.findall(r"\*\*(.+?)\.\*\*", text) == ["Means", "Look at", "Do"]


def test_table_of_alerts_is_complete() -> None:
    assert set(ALERT_RULES) == set(ALERTS)


def test_rules_use_known_metrics_and_names_with_their_level() -> None:
    known = {"up", *RECORDED}
    for metric in METRICS:
        suffixes = ("_bucket", "_sum", "_count") if str(metric.kind) == "histogram" else ("",)
        known |= {metric.name + suffix for suffix in suffixes}
    for name, rule in rules():
        for metric_name in metric_names(rule["expr"]):
            assert any(re.fullmatch(metric_name, each) for each in known), f"{name}: {metric_name}"
    for name in RECORDED:
        assert re.fullmatch(r"run(_part|_rank)?:dist_train_[a-z_]+:[a-z0-9_]+", name)


def test_inhibitions_name_alerts_that_exist() -> None:
    settings = yaml.safe_load((DOCKER / "alertmanager" / "alertmanager.yml").read_text(encoding="utf-8"))
    named = set(re.findall(r"DistTrain\w+", str(settings["inhibit_rules"])))
    assert named <= set(ALERTS)
    assert "DistTrainExporterGone" in named


@pytest.mark.parametrize("name", ["compose.yaml", "compose.gpu.yaml"])
def test_compose_file_follows_the_specification(name: str) -> None:
    run(
        str(Path(sys.executable).with_name("check-jsonschema")),
        "--builtin-schema",
        "vendor.compose-spec",
        DOCKER / name,
    )
