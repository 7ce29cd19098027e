"""Every metric that is served, in one table; pages and documentation are made from it.

A new metric is one row in `run_metrics.py` or `rank_metrics.py`.
"""

from __future__ import annotations

from dist_train.monitoring.prometheus.metric import Kind, Metric, Scope
from dist_train.monitoring.prometheus.rank_metrics import ALL_RANKS, OWN
from dist_train.monitoring.prometheus.run_metrics import BATCH, CHECKPOINTS, EVENTS, LEARNING, PROGRESS

__all__ = ["BATCH", "METRICS", "Kind", "Metric", "Scope", "metrics_of"]

METRICS: tuple[Metric, ...] = (*PROGRESS, *LEARNING, *ALL_RANKS, *CHECKPOINTS, *EVENTS, *OWN)


def metrics_of(rank: int) -> tuple[Metric, ...]:
    """Return the metrics on the page of rank `rank`."""
    return tuple(metric for metric in METRICS if rank == 0 or metric.scope is not Scope.RUN)
