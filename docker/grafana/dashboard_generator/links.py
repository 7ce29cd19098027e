"""The dashboards' UIDs on a Grafana server, and the links between them."""

from __future__ import annotations

from grafana_foundation_sdk.builders import dashboard
from grafana_foundation_sdk.models import dashboard as model

TAG = "dist_train"
ONE_RUN = "dist-train-one-run"
ALL_RUNS = "dist-train-all-runs"
RUNBOOK = "dist-train-runbook"

ALERTS = (
    "DistTrainStalled",
    "DistTrainNotFinite",
    "DistTrainAccuracyFalling",
    "DistTrainThroughputDown",
    "DistTrainRankSlow",
    "DistTrainCheckpointOld",
    "DistTrainCheckpointFailing",
    "DistTrainExporterGone",
    "DistTrainDisagreement",
    "DistTrainRequeued",
    "DistTrainFailed",
    "DistTrainDeviceMemory",
    "DistTrainDiskNearlyFull",
    "DistTrainCheckpointCorrupt",
    "DistTrainTimeLimitNear",
)
"""In the runbook's order."""


def runbook_path(alert: str) -> str:
    """Return the path of an alert's runbook section, without the server."""
    return f"/d/{RUNBOOK}?viewPanel={ALERTS.index(alert) + 2}#{alert.lower()}"


def runbook_link(alert: str) -> dashboard.DashboardLink:
    """Return a link to an alert's runbook section."""
    link = _to_runbook(f"What to do: {alert}", "The runbook's section", runbook_path(alert))
    return link.target_blank(True)


def runbook_address() -> dashboard.DashboardLink:
    """Return a link to the whole runbook."""
    return _to_runbook("Runbook", "What each alert means, and what to do", f"/d/{RUNBOOK}")


def _to_runbook(title: str, tooltip: str, path: str) -> dashboard.DashboardLink:
    link = dashboard.DashboardLink(title).type(model.DashboardLinkType.LINK)
    return link.icon("question-circle").tooltip(tooltip).url(path)


def siblings() -> dashboard.DashboardLink:
    """Return a menu of the project's dashboards that keeps the time range and the chosen runs."""
    return (
        dashboard.DashboardLink("dist-train")
        .type(model.DashboardLinkType.DASHBOARDS)
        .icon("external link")
        .tooltip("The other dashboards")
        .tags([TAG])
        .as_dropdown(True)
        .include_vars(True)
        .keep_time(True)
    )
