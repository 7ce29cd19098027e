"""The page that Prometheus reads, made from the metrics table when it is asked for."""

from __future__ import annotations

import time
from threading import Lock

from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest

from dist_train.monitoring.prometheus.board import Board
from dist_train.monitoring.prometheus.registry import registry_of
from dist_train.monitoring.prometheus.table import metrics_of

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
"""The form that every Prometheus reads. For 1,024 ranks OpenMetrics would take twice as long to write."""

_OLDEST_PAGE = 1.0


class MetricsPage:
    """Renders a board; scrapes that come while nothing has changed share one page, for a second at most."""

    def __init__(self, board: Board, rank: int = 0) -> None:
        """Take the metrics of the page of rank `rank`."""
        self._board = board
        self._metrics = metrics_of(rank)
        self._lock = Lock()
        self._page = b""
        self._version, self._made = -1, 0.0

    def render(self) -> bytes:
        """Return the page, of type `CONTENT_TYPE`."""
        with self._lock:
            if self._version != self._board.version or time.monotonic() - self._made > _OLDEST_PAGE:
                now = self._board.snapshot()
                self._page = generate_latest(registry_of(self._metrics, now))
                self._version, self._made = now.version, time.monotonic()
            return self._page
