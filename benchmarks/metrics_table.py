"""The table of metrics in `docs/monitoring.md`; `python -m benchmarks.metrics_table PAGE` writes it."""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.document import markdown_table, replaced_between
from dist_train.monitoring.prometheus.metrics import METRICS, Metric

_HEAD = ("metric", "kind", "labels", "unit", "meaning", "page of")


def metrics_markdown() -> str:
    """Return the table: name, kind, labels, unit, meaning, and the ranks whose page has the metric."""
    return markdown_table(_HEAD, map(_cells, METRICS))


def _cells(metric: Metric) -> tuple[str, ...]:
    labels = ", ".join(f"`{label}`" for label in metric.labels)
    return f"`{metric.name}`", metric.kind, labels, metric.unit, metric.meaning, metric.scope.value


def with_table(text: str) -> str:
    """Return `text` with the table between its markers updated. Raises UsageError if it has no markers."""
    return replaced_between(text, "<!-- metrics -->", "<!-- end of metrics -->", metrics_markdown())


if __name__ == "__main__":
    page = Path(sys.argv[1])
    page.write_text(with_table(page.read_text(encoding="utf-8")), encoding="utf-8")
