"""The metrics page in Prometheus's text format."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import accumulate
from threading import Lock

from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

from dist_train.monitoring.prometheus.board import Board, Buckets, Snapshot
from dist_train.monitoring.prometheus.metrics import metrics_of


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


CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4  # every Prometheus reads it; OpenMetrics takes twice as long to write


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
