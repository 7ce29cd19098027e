"""The metrics of the ranks: all of them as rank 0 hears of them, and each one's own; the table of all metrics.

A new metric is one row in `run_metrics.py` or `rank_metrics.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from statistics import median

from dist_train.monitoring.prometheus.board import Snapshot
from dist_train.monitoring.prometheus.metric import Kind, Metric, Reading, Scope, one
from dist_train.monitoring.prometheus.run_metrics import BATCH, CHECKPOINTS, EVENTS, LEARNING, PROGRESS
from dist_train.rundir.records import RankMeasurement


def _each(take: Callable[[RankMeasurement], float]) -> Callable[[Snapshot], Iterable[Reading]]:
    def read(now: Snapshot) -> Iterable[Reading]:
        ranks = () if now.measured is None else now.measured.ranks
        values = enumerate(map(take, ranks))
        return (Reading(value, (str(rank),)) for rank, value in values if not math.isnan(value))

    return read


def _own(take: Callable[[RankMeasurement], float]) -> Callable[[Snapshot], Iterable[Reading]]:
    def read(now: Snapshot) -> Iterable[Reading]:
        if now.measured is None or not now.measured.ranks:
            return ()
        ranks = now.measured.ranks
        # a rank other than 0 hears of itself alone
        value = take(ranks[now.facts.rank] if now.facts.rank < len(ranks) else ranks[0])
        return () if math.isnan(value) else (Reading(value),)

    return read


def _slowest(now: Snapshot) -> int | None:
    if now.measured is None or not now.measured.ranks:
        return None
    busy = [each.busy_seconds for each in now.measured.ranks]
    return busy.index(max(busy))


def _slowest_ratio(now: Snapshot) -> float | None:
    rank = _slowest(now)
    if rank is None or now.measured is None:
        return None
    busy = [each.busy_seconds for each in now.measured.ranks]
    middle = median(busy)
    return busy[rank] / middle if middle > 0 else None


def _of_rank(name: str, unit: str, meaning: str, take: Callable[[Snapshot], Iterable[Reading]]) -> Metric:
    return Metric(name, Kind.GAUGE, unit, meaning, take, ("rank",))


ALL_RANKS = (
    Metric(
        "dist_train_world_size",
        Kind.GAUGE,
        "ranks",
        "Ranks that train together.",
        lambda now: one(now.facts.world_size),
    ),
    Metric(
        "dist_train_micro_batches",
        Kind.GAUGE,
        "micro-batches",
        "Micro-batches of a step, of all ranks together.",
        lambda now: one(now.micro_batches.count),
    ),
    Metric(
        "dist_train_micro_batch_size",
        Kind.GAUGE,
        "samples",
        "Samples of a micro-batch.",
        lambda now: one(now.micro_batches.size),
    ),
    _of_rank(
        "dist_train_rank_micro_batches",
        "micro-batches",
        "Micro-batches of a step that the rank computes.",
        lambda now: (Reading(count, (str(rank),)) for rank, count in enumerate(now.micro_batches.of_ranks)),
    ),
    _of_rank(
        "dist_train_rank_busy_seconds",
        "seconds",
        "Time of the latest measured step that the rank did not wait for the others.",
        _each(lambda rank: rank.busy_seconds),
    ),
    _of_rank(
        "dist_train_rank_wait_seconds",
        "seconds",
        "Time of the latest measured step that the rank waited for the others.",
        _each(lambda rank: rank.wait_seconds),
    ),
    _of_rank(
        "dist_train_rank_resident_memory_bytes",
        "bytes",
        "Resident memory of the rank.",
        _each(lambda rank: rank.resident_bytes),
    ),
    _of_rank(
        "dist_train_rank_device_memory_bytes",
        "bytes",
        "Memory of its device that the rank holds.",
        _each(lambda rank: rank.device_bytes),
    ),
    _of_rank(
        "dist_train_rank_device_memory_peak_bytes",
        "bytes",
        "The most memory of its device that the rank has held.",
        _each(lambda rank: rank.device_peak_bytes),
    ),
    _of_rank(
        "dist_train_rank_device_utilization_ratio",
        "ratio",
        "Share of time in which the rank's device was at work, where NVML tells.",
        _each(lambda rank: rank.device_utilization),
    ),
    Metric(
        "dist_train_slowest_rank",
        Kind.GAUGE,
        "",
        "Number of the rank that was busy longest in the latest measured step.",
        lambda now: one(_slowest(now)),
    ),
    Metric(
        "dist_train_slowest_rank_ratio",
        Kind.GAUGE,
        "ratio",
        "Busy time of the slowest rank over the median of all.",
        lambda now: one(_slowest_ratio(now)),
    ),
)

OWN = (
    Metric(
        "dist_train_step_duration_seconds",
        Kind.HISTOGRAM,
        "seconds",
        "Time of a step, of every step that is measured (metrics.every_steps).",
        lambda now: one(now.step_seconds),
        scope=Scope.RANK,
    ),
    Metric(
        "dist_train_step_part_duration_seconds",
        Kind.HISTOGRAM,
        "seconds",
        "Time of the parts of a measured step: data_wait, forward_backward, perturb_restore, allreduce_wait, "
        "optimizer, checkpoint_stall.",
        lambda now: (Reading(buckets, (part,)) for part, buckets in now.part_seconds.items()),
        ("part",),
        Scope.RANK,
    ),
    Metric(
        "dist_train_resident_memory_bytes",
        Kind.GAUGE,
        "bytes",
        "Resident memory of this rank.",
        _own(lambda rank: rank.resident_bytes),
        scope=Scope.RANK,
    ),
    Metric(
        "dist_train_device_memory_bytes",
        Kind.GAUGE,
        "bytes",
        "Memory of its device that this rank holds.",
        _own(lambda rank: rank.device_bytes),
        scope=Scope.RANK,
    ),
    Metric(
        "dist_train_device_utilization_ratio",
        Kind.GAUGE,
        "ratio",
        "Share of time in which this rank's device was at work, where NVML tells.",
        _own(lambda rank: rank.device_utilization),
        scope=Scope.RANK,
    ),
)


__all__ = ["BATCH", "METRICS", "Kind", "Metric", "Scope", "metrics_of"]

METRICS: tuple[Metric, ...] = (*PROGRESS, *LEARNING, *ALL_RANKS, *CHECKPOINTS, *EVENTS, *OWN)


def metrics_of(rank: int) -> tuple[Metric, ...]:
    """Return the metrics on the page of rank `rank`."""
    return tuple(metric for metric in METRICS if rank == 0 or metric.scope is not Scope.RUN)
