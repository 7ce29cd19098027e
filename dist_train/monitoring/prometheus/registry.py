"""The metrics table as prometheus_client knows it."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import accumulate

from prometheus_client import CollectorRegistry
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
)
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

from dist_train.monitoring.prometheus.board import Buckets, Snapshot
from dist_train.monitoring.prometheus.metric import Kind, Metric


def registry_of(metrics: tuple[Metric, ...], now: Snapshot) -> CollectorRegistry:
    """Return a registry of prometheus_client that holds `metrics` as they are `now`."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Table(metrics, now))
    return registry


class _Table(Collector):
    def __init__(self, metrics: tuple[Metric, ...], now: Snapshot) -> None:
        self._metrics = metrics
        self._now = now

    def collect(self) -> Iterable[Family]:
        return [_family(metric, self._now) for metric in self._metrics]


def _family(metric: Metric, now: Snapshot) -> Family:
    name, meaning, labels = metric.name, metric.meaning, metric.labels
    match metric.kind:
        case Kind.HISTOGRAM:
            histogram = HistogramMetricFamily(name, meaning, labels=labels)
            for reading in metric.take(now):
                assert isinstance(reading.value, Buckets), name
                histogram.add_metric(reading.labels, _cumulative(reading.value), reading.value.total)
            return histogram
        case Kind.INFO:
            info = InfoMetricFamily(name.removesuffix("_info"), meaning)
            for reading in metric.take(now):
                info.add_metric([], dict(zip(labels, reading.labels, strict=True)))
            return info
        case Kind.COUNTER:
            family: CounterMetricFamily | GaugeMetricFamily
            family = CounterMetricFamily(name, meaning, labels=labels)
        case Kind.GAUGE:
            family = GaugeMetricFamily(name, meaning, labels=labels)
    for reading in metric.take(now):
        assert not isinstance(reading.value, Buckets), name
        family.add_metric(reading.labels, reading.value)
    return family


def _cumulative(buckets: Buckets) -> list[tuple[str, float]]:
    bounds = [*(str(bound) for bound in buckets.bounds), "+Inf"]
    return list(zip(bounds, (float(count) for count in accumulate(buckets.counts)), strict=True))
