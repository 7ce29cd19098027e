"""The runbook as a dashboard of text, so that the alerts' links work on a server without internet."""

from __future__ import annotations

import re

from grafana_foundation_sdk.models import dashboard as model

from dashboard_generator.frame import frame
from dashboard_generator.links import ALERTS, RUNBOOK
from dashboard_generator.panels import words


def sections(markdown: str) -> dict[str, str]:
    """Return the text under each heading of the second level, by heading; that before the first, under ''."""
    head, *rest = re.split(r"^## +(.+)$", markdown, flags=re.MULTILINE)
    found = {"": re.sub(r"^# .*$", "", head, count=1, flags=re.MULTILINE).strip()}
    return found | {title.strip(): text.strip() for title, text in zip(rest[::2], rest[1::2], strict=True)}


def build(markdown: str) -> model.Dashboard:
    """Return the dashboard made from the runbook; KeyError names an alert without a section."""
    found = sections(markdown)
    built = frame(RUNBOOK, "dist-train: runbook", "What each alert means, what to look at, what to do.")
    built.with_panel(words("About", _without_links(found[""]), 24, 6))
    for alert in ALERTS:
        built.with_panel(words(alert, _without_links(found[alert]), 12, 11))
    return built.build()


def _without_links(text: str) -> str:
    """Return `text` with links into the repository as plain words: there is no such file on the server."""
    return re.sub(r"\[([^\]]+)\]\((?!https?:)[^)]+\)", r"\1", text)
