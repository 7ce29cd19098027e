"""The dashboards as they are shipped: made by the code, of known metrics, in Grafana's own types."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from dashboard_generator.__main__ import generate
from dashboard_generator.links import ALERTS, RUNBOOK, runbook_path
from dashboard_generator.runbook import sections

from dist_train.monitoring.prometheus.metrics import METRICS
from tests.services.expressions import DASHBOARDS, DOCKER, dashboard_queries, filled, metric_names, rules, variables

ROOT = Path(__file__).parents[2]
MARKDOWN = (ROOT / "docs" / "runbook.md").read_text(encoding="utf-8")
SHIPPED = {path.name: json.loads(path.read_text(encoding="utf-8")) for path in sorted(DASHBOARDS.glob("*.json"))}
SCHEMA = json.loads((ROOT / "tests" / "services" / "grafana_dashboard.schema.json").read_text(encoding="utf-8"))
CHECK = jsonschema.Draft7Validator(SCHEMA)

OF_ONE_RANK = {
    "dist_train_resident_memory_bytes",
    "dist_train_device_memory_bytes",
    "dist_train_device_utilization_ratio",
}
"""Shown for all ranks at once by the metrics `dist_train_rank_...`."""

dashboard = pytest.mark.parametrize("name", sorted(SHIPPED))


def known_metrics() -> set[str]:
    series = {"up", "ALERTS"} | {name for name, rule in rules() if "record" in rule}
    for metric in METRICS:
        suffixes = ("_bucket", "_sum", "_count") if str(metric.kind) == "histogram" else ("",)
        series |= {metric.name + suffix for suffix in suffixes}
    return series


def panels(name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = SHIPPED[name]["panels"]
    return found


def test_the_files_are_what_the_code_makes() -> None:
    assert {path.name: path.read_text(encoding="utf-8") for path in DASHBOARDS.glob("*.json")} == generate(MARKDOWN)


@dashboard
def test_every_expression_is_of_known_metrics_and_variables(name: str) -> None:
    known = known_metrics()
    declared = {one["name"] for one in SHIPPED[name].get("templating", {}).get("list", [])}
    for title, expression in dashboard_queries(SHIPPED[name]):
        used = set(re.findall(r"\$\{?(\w+)", expression))
        assert {variable for variable in used if not variable.startswith("__")} <= declared, title
        assert metric_names(filled(expression, variables("a"))) <= known, title


def test_every_metric_is_on_a_dashboard() -> None:
    shown: set[str] = set()
    for content in SHIPPED.values():
        for _, expression in dashboard_queries(content):
            shown |= metric_names(filled(expression, variables("a")))
    recorded = {name: metric_names(rule["expr"]) for name, rule in rules() if "record" in rule}
    while behind := {metric for name in shown & set(recorded) for metric in recorded[name]} - shown:
        shown |= behind
    plain = {re.sub("_(bucket|sum|count)$", "", metric) for metric in shown}
    # how a run ended, dashboards read from the alerts and the target's labels; alerts alone tell launches' events apart
    left_out = {"dist_train_outcome", "dist_train_events_before_launch"}
    not_shown = {metric.name for metric in METRICS if not any(re.fullmatch(name, metric.name) for name in plain)}
    assert not_shown == OF_ONE_RANK | left_out


@dashboard
def test_panels_lie_side_by_side(name: str) -> None:
    places = [panel["gridPos"] for panel in panels(name)]
    assert all(place["x"] + place["w"] <= 24 for place in places)
    for one, other in combinations(places, 2):
        apart_across = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        apart_down = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert apart_across or apart_down, (one, other)


@dashboard
def test_every_panel_has_a_number_and_says_what_it_shows(name: str) -> None:
    numbers = [panel["id"] for panel in panels(name)]
    assert numbers == list(range(1, len(numbers) + 1))
    for panel in panels(name):
        assert panel["title"]
        if panel["type"] not in ("row", "text"):
            assert panel["description"], panel["title"]
            assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
            assert panel["fieldConfig"]["defaults"]["thresholds"]["steps"], panel["title"]
            assert panel["targets"], panel["title"]
            assert all(target["legendFormat"] for target in panel["targets"]), panel["title"]


def test_links_lead_to_the_section_of_their_alert() -> None:
    titles = {panel["id"]: panel["title"] for panel in panels("runbook.json")}
    for alert in ALERTS:
        number = re.fullmatch(rf"/d/{RUNBOOK}\?viewPanel=(\d+)#{alert.lower()}", runbook_path(alert))
        assert number
        assert titles[int(number[1])] == alert
    linked = {link["url"] for name in SHIPPED for panel in panels(name) for link in panel.get("links", [])}
    assert linked <= {runbook_path(alert) for alert in ALERTS}
    assert len(linked) >= 8


def test_the_runbook_names_panels_by_their_titles() -> None:
    titles = {panel["title"] for name in SHIPPED for panel in panels(name)}
    paragraphs = re.findall(r"\*\*Look at\.\*\*(.*?)\n\n", MARKDOWN, flags=re.DOTALL)
    named = {text for each in paragraphs for text in re.findall(r"\*([^*]+)\*", " ".join(each.split()))}
    assert named - titles == {"status"}  # what `dist-train runs` shows, as the page says


def test_every_section_of_the_runbook_is_an_alert() -> None:
    assert [title for title in sections(MARKDOWN) if title] == list(ALERTS)


@dashboard
def test_a_dashboard_is_of_grafana_s_types(name: str) -> None:
    assert [error.message for error in CHECK.iter_errors(SHIPPED[name])] == []


def _curves(content: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = next(panel for panel in content["panels"] if panel["type"] == "timeseries")
    return found


def _stat(content: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = next(panel for panel in content["panels"] if panel["type"] == "stat")
    return found


FAULTS: dict[str, Callable[[dict[str, Any]], object]] = {
    "unit is a number": lambda one: _curves(one)["fieldConfig"]["defaults"].update(unit=5),
    "misspelt field": lambda one: _curves(one).update(desciption="what it shows"),
    "misspelt field of the dashboard": lambda one: one.update(titel="one run"),
    "legend of an unknown kind": lambda one: _curves(one)["options"]["legend"].update(displayMode="tabel"),
    "unknown option of a panel": lambda one: _curves(one)["options"].update(lineWidth=1),
    "option of another kind of panel": lambda one: _stat(one)["options"].update(
        tooltip={"mode": "multi", "sort": "asc"}
    ),
    "unknown colour mode": lambda one: _stat(one)["options"].update(colorMode="foreground"),
    "unknown setting of lines": lambda one: _curves(one)["fieldConfig"]["defaults"]["custom"].update(thickness=2),
    "line of an unknown style": lambda one: _curves(one)["fieldConfig"]["defaults"]["custom"].update(drawStyle="dots"),
    "query without its letter": lambda one: _curves(one)["targets"][0].pop("refId"),
    "query without an expression": lambda one: _curves(one)["targets"][0].pop("expr"),
    "threshold without a colour": lambda one: _stat(one)["fieldConfig"]["defaults"]["thresholds"]["steps"][0].pop(
        "color"
    ),
    "place without a width": lambda one: _curves(one)["gridPos"].pop("w"),
    "unknown kind of panel": lambda one: _curves(one).update(type="timeserie"),
    "kind of variable": lambda one: one["templating"]["list"][1].update(type="querry"),
    "refresh of a variable": lambda one: one["templating"]["list"][1].update(refresh=7),
    "mark without a colour": lambda one: one["annotations"]["list"][0].pop("iconColor"),
    "link of an unknown kind": lambda one: one["links"][0].update(type="url"),
}


@pytest.mark.parametrize("fault", sorted(FAULTS))
def test_a_planted_fault_is_found(fault: str) -> None:
    content = copy.deepcopy(SHIPPED["one_run.json"])
    FAULTS[fault](content)
    assert content != SHIPPED["one_run.json"]
    assert not CHECK.is_valid(content)


def test_the_versions_are_those_that_were_checked() -> None:
    services = yaml.safe_load((DOCKER / "compose.yaml").read_text(encoding="utf-8"))["services"]
    images = {name: service["image"].rsplit(":", 1)[1] for name, service in services.items()}
    assert f"@grafana/schema {images['grafana']}." in SCHEMA["$comment"]
    source = yaml.safe_load((DOCKER / "grafana/provisioning/datasources/prometheus.yml").read_text(encoding="utf-8"))
    assert f"v{source['datasources'][0]['jsonData']['prometheusVersion']}" == images["prometheus"]


def _mounts() -> Iterator[tuple[Path, str]]:
    services = yaml.safe_load((DOCKER / "compose.yaml").read_text(encoding="utf-8"))["services"]
    for service in services.values():
        for volume in service["volumes"]:
            if found := re.match(r"(?:\$\{\w+:-)?(\./[^:}]+)\}?:(/[^:]+)", volume):
                yield DOCKER / found[1], found[2]


def test_what_compose_mounts_is_there_and_where_the_settings_look() -> None:
    mounts = {inside: path for path, inside in _mounts()}
    assert len(mounts) == 6
    assert all(path.exists() for path in mounts.values())
    provider = yaml.safe_load((DOCKER / "grafana/provisioning/dashboards/dist_train.yml").read_text(encoding="utf-8"))
    assert mounts[provider["providers"][0]["options"]["path"]] == DASHBOARDS
