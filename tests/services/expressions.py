"""The queries of dashboards and rules, in a form that has data for a healthy run."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import promql_parser
import yaml

DOCKER = Path(__file__).parents[2] / "docker"
DASHBOARDS = DOCKER / "grafana" / "dashboards"
RULES = DOCKER / "prometheus" / "rules"

NEEDS_A_DEVICE = ("_device_", "_time_limit_")
"""Parts of the names of metrics that exist only for ranks with a device, or jobs with a time limit."""

_ENDED = re.compile(r'outcome(!=""|=~?"[^"]+")')

_FILTERS = re.compile(r"(?<![=!~])(==|!=|[<>]=?)(?![~=\"])|\b(and|or|unless)\b")


def needs_a_device(expression: str) -> bool:
    """Whether `expression` has data only for runs with a device or a time limit."""
    return any(part in expression for part in NEEDS_A_DEVICE)


def variables(run: str, run_id: str = ".*") -> dict[str, str]:
    """Return values of the variables of Grafana and of the dashboards, with one run selected."""
    return {
        "datasource": "prometheus",
        "run": run,
        "run_id": run_id,
        "split": ".*",
        "noise": ".*",
        "x": "dist_train_step",
        "__rate_interval": "30s",
        "__interval": "15s",
        "__range": "5m",
    }


def filled(text: str, values: Mapping[str, str]) -> str:
    """Return `text` with $name and ${name} replaced; KeyError names an unknown variable.

    The id ".*" stands for all, on the dashboard of one run too, which compares ids exactly.
    """
    return re.sub(r"\$(?:\{(\w+)\}|(\w+))", lambda found: values[found[1] or found[2]], text).replace(
        'run_id=".*"', 'run_id=~".*"'
    )


def dashboard_queries(dashboard: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield name and unchanged expression of every query of panels and annotations."""
    for panel in dashboard.get("panels", []):
        for target in panel.get("targets", []):
            yield f"{panel['title']}/{target['refId']}", target["expr"]
    for mark in dashboard.get("annotations", {}).get("list", []):
        if "target" in mark:
            yield f"mark {mark['name']}", mark["target"]["expr"]


def rules() -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield name and contents of every rule."""
    for path in sorted(RULES.glob("*.yml")):
        for group in yaml.safe_load(path.read_text(encoding="utf-8"))["groups"]:
            for rule in group["rules"]:
                yield rule.get("record") or rule["alert"], rule


def dashboard_expressions(run: str, run_id: str = ".*") -> dict[str, str]:
    """Return the queries of all dashboards by a name for messages, except those about devices.

    Conditions of annotations are split into their operands, like those of alerts.
    """
    return {name: text for name, text in _expressions(run, run_id).items() if not needs_a_device(text)}


def device_expressions(run: str) -> dict[str, str]:
    """Return the queries of all dashboards about devices, by a name for messages."""
    return {name: text for name, text in _expressions(run, ".*").items() if needs_a_device(text)}


def _expressions(run: str, run_id: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for path in sorted(DASHBOARDS.glob("*.json")):
        for name, written in dashboard_queries(json.loads(path.read_text(encoding="utf-8"))):
            expression = filled(written, variables(run, run_id))
            if name.startswith("mark ") and "ALERTS" not in expression:
                for place, operand in enumerate(operands(expression)):
                    found[f"{path.stem}: {name} {place}"] = operand
            elif not name.startswith("mark "):
                found[f"{path.stem}: {name}"] = expression
    return found


def rule_expressions() -> dict[str, str]:
    """Return the expressions of recording rules, and the operands of alerts that have data for a healthy run."""
    found: dict[str, str] = {}
    for name, rule in rules():
        # A healthy run has no outcome yet.
        expression = rule["expr"].replace('dist_train_outcome{outcome=~"failed|diverged"}', "dist_train_outcome")
        expression = _ENDED.sub('outcome=""', expression).replace("_ended_timestamp", "_heard_timestamp")
        parts = {name: expression} if "record" in rule else _numbered(name, operands(expression))
        found |= {part: text for part, text in parts.items() if not needs_a_device(text)}
    return found


def _numbered(name: str, expressions: list[str]) -> dict[str, str]:
    return {f"{name} {place}": expression for place, expression in enumerate(expressions)}


def operands(expression: str) -> list[str]:
    """Return the operands of comparisons, `and`, `or` and `unless` in `expression`.

    The whole is empty for a healthy run; an operand that is empty as well has a misspelt name or label. Operands
    without a series are omitted, and so are `offset` modifiers.
    """
    present = re.sub(r"\s+offset\s+\w+", "", expression)
    return list(dict.fromkeys(_operands(promql_parser.parse(re.sub(r"\[(\w+):\w+\]", r"[\1:15s]", present)))))


def _operands(node: promql_parser.Expr) -> Iterator[str]:
    text = node.prettify()
    if not any(True for _ in selectors(node)):
        return
    if not _FILTERS.search(_without_strings(text)):
        yield text
        return
    for child in _children(node):
        yield from _operands(child)


def selectors(node: promql_parser.Expr) -> Iterator[promql_parser.VectorSelector]:
    """Yield the selectors of series in `node`."""
    if isinstance(node, promql_parser.VectorSelector):
        yield node
    elif isinstance(node, promql_parser.MatrixSelector):
        yield node.vector_selector
    else:
        for child in _children(node):
            yield from selectors(child)


def metric_names(expression: str) -> set[str]:
    """Return the names, or patterns of names, of the metrics that `expression` selects."""
    names = set()
    for selector in selectors(promql_parser.parse(expression)):
        by_label = [matcher.value for matcher in selector.matchers.matchers if matcher.name == "__name__"]
        names.add(selector.name or by_label[0])
    return names


def _children(node: promql_parser.Expr) -> list[promql_parser.Expr]:
    match node:
        case promql_parser.BinaryExpr():
            return [node.lhs, node.rhs]
        case promql_parser.Call():
            return [argument for argument in node.args if isinstance(argument, promql_parser.Expr)]
        case promql_parser.AggregateExpr():
            return [node.expr]
        case promql_parser.ParenExpr() | promql_parser.SubqueryExpr() | promql_parser.UnaryExpr():
            return [node.expr]
        case _:
            return []


def _without_strings(text: str) -> str:
    return re.sub(r'"[^"]*"', '""', text)
