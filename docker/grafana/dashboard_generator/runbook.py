"""The runbook as a text dashboard, so that the alerts' links work on a server without internet access."""

from __future__ import annotations

import re

from grafana_foundation_sdk.models import dashboard as model

from dashboard_generator.frame import frame
from dashboard_generator.links import ALERTS, RUNBOOK
from dashboard_generator.panels import words


def sections(markdown: str) -> dict[str, str]:
    """Return the text under each second-level heading, keyed by heading; the text before the first has the key ''."""
    head, *rest = re.split(r"^## +(.+)$", markdown, flags=re.MULTILINE)
    found = {"": re.sub(r"^# .*$", "", head, count=1, flags=re.MULTILINE).strip()}
    return found | {title.strip(): text.strip() for title, text in zip(rest[::2], rest[1::2], strict=True)}


def build(markdown: str) -> model.Dashboard:
    """Return the dashboard of the runbook. Raises KeyError for an alert without a section."""
    found = sections(markdown)
    built = frame(RUNBOOK, "dist-train: runbook", "What each alert means, what to look at, what to do.")
    built.with_panel(words("About", _without_links(found[""]), 24, 7))
    for alert in ALERTS:
        built.with_panel(words(alert, _without_links(found[alert]), 12, 11))
    return built.build()


def _without_links(text: str) -> str:
    """Return `text` with links into the repository as plain text, because the server does not have these files."""
    return re.sub(r"\[([^\]]+)\]\((?!https?:)[^)]+\)", r"\1", text)
