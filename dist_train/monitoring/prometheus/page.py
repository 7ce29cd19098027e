"""The metrics page in Prometheus's text format, and the table of metrics in the documentation."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from itertools import accumulate
from pathlib import Path
from threading import Lock

from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

from dist_train.monitoring.prometheus.board import Board, Buckets, Snapshot
from dist_train.monitoring.prometheus.metrics import METRICS, metrics_of
from dist_train.outcome import UsageError


class Families(Collector):
    """A prometheus_client collector, for `generate_latest`, of the metrics of a rank's page at the snapshot `now`."""

    def __init__(self, now: Snapshot) -> None:
        self._now = now

    def collect(self) -> Iterable[Family]:
        """Yield the metrics with their values."""
        for metric in metrics_of(self._now.facts.rank):
            # The library appends these suffixes to a family's name.
            short = metric.name.removesuffix("_total").removesuffix("_info")
            family = Family(short, metric.meaning, metric.kind)
            for value, label_values in metric.take(self._now):
                labels = dict(zip(metric.labels, label_values, strict=True))
                if isinstance(value, Buckets):
                    for bound, count in zip((*value.bounds, "+Inf"), accumulate(value.counts), strict=True):
                        family.add_sample(f"{metric.name}_bucket", {**labels, "le": str(bound)}, count)
                    family.add_sample(f"{metric.name}_count", labels, sum(value.counts))
                    family.add_sample(f"{metric.name}_sum", labels, value.total)
                else:
                    family.add_sample(metric.name, labels, value)
            yield family


CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
"""The format that every Prometheus reads. For 1,024 ranks OpenMetrics would take twice as long to write."""


class MetricsPage:
    """Renders a board; the page is cached until the board changes."""

    def __init__(self, board: Board) -> None:
        self._board = board
        self._lock = Lock()
        self._shown: Snapshot | None = None
        self._page = b""

    def render(self) -> bytes:
        """Return the page, of type `CONTENT_TYPE`."""
        with self._lock:
            now = self._board.snapshot()
            if now is not self._shown:
                self._page, self._shown = generate_latest(Families(now)), now
            return self._page


def replaced_between(text: str, begin: str, end: str, content: str) -> str:
    """Return `text` with `content` between the lines `begin` and `end`. Raises UsageError if these are missing."""
    before, found_begin, rest = text.partition(begin)
    _, found_end, after = rest.partition(end)
    if not found_begin or not found_end:
        raise UsageError(
            f"the file has no place for the table: it needs the lines {begin} and {end}", code="no-place-for-table"
        )
    return f"{before}{begin}\n\n{content}\n{end}{after}"


BEGIN, END = "<!-- metrics -->", "<!-- end of metrics -->"


def metrics_markdown() -> str:
    """Return the table: name, kind, labels, unit, meaning, and the ranks whose page has the metric."""
    lines = ["| metric | kind | labels | unit | meaning | page of |", "|---|---|---|---|---|---|"]
    for metric in METRICS:
        labels = ", ".join(f"`{label}`" for label in metric.labels)
        cells = (f"`{metric.name}`", metric.kind, labels, metric.unit, metric.meaning, metric.scope.value)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def with_table(text: str) -> str:
    """Return `text` with the table between its markers updated. Raises UsageError if it has no markers."""
    return replaced_between(text, BEGIN, END, metrics_markdown())


if __name__ == "__main__":
    page = Path(sys.argv[1])
    page.write_text(with_table(page.read_text(encoding="utf-8")), encoding="utf-8")
