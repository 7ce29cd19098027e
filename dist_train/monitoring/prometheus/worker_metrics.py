"""The metrics of the workers: all of them as worker 0 hears of them, and each one's own."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from statistics import median

from dist_train.monitoring.prometheus.board import Snapshot
from dist_train.monitoring.prometheus.metric import Kind, Metric, Reading, Scope, one
from dist_train.monitoring.records import WorkerMeasurement


def _each(take: Callable[[WorkerMeasurement], float]) -> Callable[[Snapshot], Iterable[Reading]]:
    def read(now: Snapshot) -> Iterable[Reading]:
        workers = () if now.measured is None else now.measured.workers
        return (
            Reading(value, (str(rank),)) for rank, worker in enumerate(workers) if not math.isnan(value := take(worker))
        )

    return read


def _own(take: Callable[[WorkerMeasurement], float]) -> Callable[[Snapshot], Iterable[Reading]]:
    def read(now: Snapshot) -> Iterable[Reading]:
        if now.measured is None or not now.measured.workers:
            return ()
        workers = now.measured.workers
        # a worker other than 0 hears of itself alone
        value = take(workers[now.facts.rank] if now.facts.rank < len(workers) else workers[0])
        return () if math.isnan(value) else (Reading(value),)

    return read


def _slowest(now: Snapshot) -> int | None:
    if now.measured is None or not now.measured.workers:
        return None
    busy = [worker.busy_seconds for worker in now.measured.workers]
    return busy.index(max(busy))


def _slowest_ratio(now: Snapshot) -> float | None:
    rank = _slowest(now)
    if rank is None or now.measured is None:
        return None
    busy = [worker.busy_seconds for worker in now.measured.workers]
    middle = median(busy)
    return busy[rank] / middle if middle > 0 else None


def _of_worker(name: str, unit: str, meaning: str, take: Callable[[Snapshot], Iterable[Reading]]) -> Metric:
    return Metric(name, Kind.GAUGE, unit, meaning, take, ("worker",))


ALL_WORKERS = (
    Metric(
        "dist_train_world_size",
        Kind.GAUGE,
        "workers",
        "Workers that train together.",
        lambda now: one(now.facts.world_size),
    ),
    Metric(
        "dist_train_micro_batches",
        Kind.GAUGE,
        "micro-batches",
        "Micro-batches of a step, of all workers together.",
        lambda now: one(now.micro_batches.count),
    ),
    Metric(
        "dist_train_micro_batch_size",
        Kind.GAUGE,
        "samples",
        "Samples of a micro-batch.",
        lambda now: one(now.micro_batches.size),
    ),
    _of_worker(
        "dist_train_worker_micro_batches",
        "micro-batches",
        "Micro-batches of a step that the worker computes.",
        lambda now: (Reading(count, (str(rank),)) for rank, count in enumerate(now.micro_batches.of_workers)),
    ),
    _of_worker(
        "dist_train_worker_busy_seconds",
        "seconds",
        "Time of the latest measured step that the worker did not wait for the others.",
        _each(lambda worker: worker.busy_seconds),
    ),
    _of_worker(
        "dist_train_worker_wait_seconds",
        "seconds",
        "Time of the latest measured step that the worker waited for the others.",
        _each(lambda worker: worker.wait_seconds),
    ),
    _of_worker(
        "dist_train_worker_resident_memory_bytes",
        "bytes",
        "Resident memory of the worker.",
        _each(lambda worker: worker.resident_bytes),
    ),
    _of_worker(
        "dist_train_worker_device_memory_bytes",
        "bytes",
        "Memory of its device that the worker holds.",
        _each(lambda worker: worker.device_bytes),
    ),
    _of_worker(
        "dist_train_worker_device_memory_peak_bytes",
        "bytes",
        "The most memory of its device that the worker has held.",
        _each(lambda worker: worker.device_peak_bytes),
    ),
    _of_worker(
        "dist_train_worker_device_utilization_ratio",
        "ratio",
        "Share of time in which the worker's device was at work, where NVML tells.",
        _each(lambda worker: worker.device_utilization),
    ),
    Metric(
        "dist_train_slowest_worker",
        Kind.GAUGE,
        "",
        "Number of the worker that was busy longest in the latest measured step.",
        lambda now: one(_slowest(now)),
    ),
    Metric(
        "dist_train_slowest_worker_ratio",
        Kind.GAUGE,
        "ratio",
        "Busy time of the slowest worker over the median of all.",
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
        scope=Scope.WORKER,
    ),
    Metric(
        "dist_train_step_part_duration_seconds",
        Kind.HISTOGRAM,
        "seconds",
        "Time of the parts of a measured step: data_wait, forward_backward, perturb_restore, allreduce_wait, "
        "optimizer, checkpoint_stall.",
        lambda now: (Reading(buckets, (part,)) for part, buckets in now.part_seconds.items()),
        ("part",),
        Scope.WORKER,
    ),
    Metric(
        "dist_train_resident_memory_bytes",
        Kind.GAUGE,
        "bytes",
        "Resident memory of this worker.",
        _own(lambda worker: worker.resident_bytes),
        scope=Scope.WORKER,
    ),
    Metric(
        "dist_train_device_memory_bytes",
        Kind.GAUGE,
        "bytes",
        "Memory of its device that this worker holds.",
        _own(lambda worker: worker.device_bytes),
        scope=Scope.WORKER,
    ),
    Metric(
        "dist_train_device_utilization_ratio",
        Kind.GAUGE,
        "ratio",
        "Share of time in which this worker's device was at work, where NVML tells.",
        _own(lambda worker: worker.device_utilization),
        scope=Scope.WORKER,
    ),
)
