"""What all dashboards have in common: variables, links, marks of events; and the JSON in the end."""

from __future__ import annotations

import json

from grafana_foundation_sdk.builders import dashboard
from grafana_foundation_sdk.cog import builder as cog
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import dashboard as model
from grafana_foundation_sdk.models import prometheus as prometheus_model

from dist_train.dashboards.links import TAG, runbook_address, siblings
from dist_train.dashboards.panels import SOURCE


def frame(uid: str, title: str, description: str) -> dashboard.Dashboard:
    """Return an empty dashboard with the project's links; the last hour, every ten seconds."""
    return (
        dashboard.Dashboard(title)
        .uid(uid)
        .description(description)
        .tags([TAG])
        .readonly()
        .tooltip(model.DashboardCursorSync.CROSSHAIR)
        .time("now-1h", "now")
        .refresh("10s")
        .timezone("browser")
        .link(runbook_address())
        .link(siblings())
    )


def source_choice() -> dashboard.DatasourceVariable:
    """Return the variable `datasource`: any Prometheus of the server."""
    return (
        dashboard.DatasourceVariable("datasource")
        .label("Data source")
        .description("The Prometheus that scrapes the runs")
        .type("prometheus")
    )


def one_choice(name: str, label: str, description: str, query: str) -> dashboard.QueryVariable:
    """Return a variable of one value out of those that Prometheus knows in the time shown."""
    return (
        dashboard.QueryVariable(name)
        .label(label)
        .description(description)
        .datasource(SOURCE)
        .query({"query": query, "refId": f"variable-{name}"})
        .refresh(model.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(model.VariableSort.NATURAL_ASC)
    )


def choice(name: str, label: str, description: str, query: str) -> dashboard.QueryVariable:
    """Return a variable of one, several or all values; all to begin with."""
    everything = model.VariableOption(selected=True, text=["All"], value=["$__all"])
    return one_choice(name, label, description, query).multi(True).include_all(True).all_value(".*").current(everything)


class _Query(model.AnnotationTarget):
    """The query of an event's marks; the library knows only that of Grafana's own annotations."""

    def __init__(self, query: prometheus_model.Dataquery) -> None:
        super().__init__()
        self._query = query

    def to_json(self) -> dict[str, object]:
        return self._query.to_json()


class _Built(cog.Builder[model.AnnotationTarget]):
    def __init__(self, target: model.AnnotationTarget) -> None:
        self._target = target

    def build(self) -> model.AnnotationTarget:
        return self._target


def event(name: str, colour: str, expression: str, legend: str) -> dashboard.AnnotationQuery:
    """Return marks wherever `expression` has a value."""
    query = prometheus_model.Dataquery(expr=expression, legend_format=legend, ref_id="event", range_val=True)
    return (
        dashboard.AnnotationQuery()
        .name(name)
        .datasource(SOURCE)
        .enable(True)
        .icon_color(colour)
        .target(_Built(_Query(query)))
    )


def row(title: str) -> dashboard.Row:
    """Return a heading over the panels that follow."""
    return dashboard.Row(title)


def to_json(built: model.Dashboard) -> str:
    """Return a dashboard as JSON, its panels numbered from 1 in their order."""
    for variable in (built.templating.list_val if built.templating else None) or []:
        variable.auto = variable.auto_min = variable.auto_count = None  # of intervals alone, in Grafana's types
    for number, panel in enumerate(built.panels or [], start=1):
        panel.id_val = number
    return json.dumps(built, cls=JSONEncoder, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
