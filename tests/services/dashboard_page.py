"""Draws a dashboard's panels in Chromium, from what a live Prometheus answers. Not Grafana: the layout, the
expressions, the units, the legends and the thresholds are the dashboard's, the drawing is ours.
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

from tests.waiting import PATIENCE

_TEMPLATE = Path(__file__).with_name("dashboard_page.html")
_PLACE = "SETTINGS"
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
    """Write the page of `dashboard` over `seconds` until `until` (since 1970; else now), its `variables` filled in."""
    shown = filled(dashboard, {**variables, "__range": f"{seconds}s"})
    settings = json.dumps({"dashboard": shown, "prometheus": prometheus, "seconds": seconds, "until": until})
    template = _TEMPLATE.read_text(encoding="utf-8")
    assert template.count(_PLACE) == 1
    path.write_text(template.replace(_PLACE, settings.replace("</", "<\\/")), encoding="utf-8")


def filled(value: Any, variables: Mapping[str, str]) -> Any:
    """Return `value` with $name, ${name} and ${name:format} replaced in all its strings."""
    if isinstance(value, str):
        return re.sub(r"\$(?:\{(\w+)(?::\w+)?\}|(\w+))", lambda found: _filled(found, variables), value)
    if isinstance(value, Mapping):
        return {name: filled(inner, variables) for name, inner in value.items()}
    if isinstance(value, list):
        return [filled(inner, variables) for inner in value]
    return value


def _filled(found: re.Match[str], variables: Mapping[str, str]) -> str:
    return variables.get(found[1] or found[2], found[0])


def height_of(dashboard: Mapping[str, Any]) -> int:
    """Return the height of the whole page of `dashboard`, in pixels."""
    rows = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in dashboard["panels"])
    return int(rows) * _ROW_HEIGHT + 60


def screenshot(page: Path, picture: Path, *, width: int, height: int) -> None:
    """Save `page` as Chromium shows it."""
    _chromium(f"--window-size={width},{height}", "--hide-scrollbars", f"--screenshot={picture}", page.as_uri())


def series_drawn(page: Path) -> dict[str, int]:
    """Return, by the panel's title, how many series Chromium drew."""
    panels = _Panels()
    panels.feed(_chromium("--dump-dom", page.as_uri()))
    assert panels.is_drawn, "the page was not drawn to its end"
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
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
    flags += ["--disable-background-networking", "--disable-component-update", "--virtual-time-budget=20000"]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = ["chromium", *flags, f"--user-data-dir={profile}", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=PATIENCE).stdout
