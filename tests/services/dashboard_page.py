"""Draws a dashboard's panels in Chromium with data of a live Prometheus, without Grafana.

Layout, expressions, units, legends and thresholds are the dashboard's; the drawing is ours.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from tests.services.browser import CHROMIUM_FLAGS
from tests.waiting import PATIENCE

_TEMPLATE = Path(__file__).with_name("dashboard_page.html")
_PLACEHOLDER = "SETTINGS"
_ROW_HEIGHT = 36


def write_page(
    path: Path,
    dashboard: Mapping[str, Any],
    prometheus: str,
    *,
    seconds: int,
    variables: Mapping[str, str],
    until: float | None = None,
) -> None:
    """Write the page of `dashboard` with these `variables`, over `seconds` until `until` (since 1970; else now)."""
    dashboard = replace_variables(dashboard, {**variables, "__range": f"{seconds}s"})
    settings = json.dumps({"dashboard": dashboard, "prometheus": prometheus, "seconds": seconds, "until": until})
    template = _TEMPLATE.read_text(encoding="utf-8")
    assert template.count(_PLACEHOLDER) == 1
    path.write_text(template.replace(_PLACEHOLDER, settings.replace("</", "<\\/")), encoding="utf-8")


def replace_variables(value: Any, variables: Mapping[str, str]) -> Any:
    """Return `value` with $name, ${name} and ${name:format} replaced in all its strings."""
    if isinstance(value, str):
        return re.sub(r"\$(?:\{(\w+)(?::\w+)?\}|(\w+))", lambda found: _variable(found, variables), value)
    if isinstance(value, Mapping):
        return {name: replace_variables(inner, variables) for name, inner in value.items()}
    if isinstance(value, list):
        return [replace_variables(inner, variables) for inner in value]
    return value


def _variable(found: re.Match[str], variables: Mapping[str, str]) -> str:
    return variables.get(found[1] or found[2], found[0])


def height_of(dashboard: Mapping[str, Any]) -> int:
    """Return the height of the whole page of `dashboard`, in pixels."""
    rows = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in dashboard["panels"])
    return int(rows) * _ROW_HEIGHT + 60


def screenshot(page: Path, picture: Path, *, width: int, height: int) -> None:
    """Save `page` as Chromium shows it."""
    _chromium(f"--window-size={width},{height}", "--hide-scrollbars", f"--screenshot={picture}", page.as_uri())


def series_drawn(page: Path) -> dict[str, int]:
    """Return the number of series that Chromium drew, by the title of the panel."""
    panels = _Panels()
    panels.feed(_chromium("--dump-dom", page.as_uri()))
    assert panels.is_drawn, "the page was not drawn completely"
    return panels.series


class _Panels(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.series: dict[str, int] = {}
        self.is_drawn = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        if "data-panel" in attributes:
            self.series[attributes["data-panel"] or ""] = int(attributes["data-series"] or 0)
        self.is_drawn |= attributes.get("data-drawn") == "yes"


def _chromium(*arguments: str) -> str:
    flags = [*CHROMIUM_FLAGS, "--virtual-time-budget=20000"]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = ["chromium", *flags, f"--user-data-dir={profile}", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=PATIENCE).stdout
