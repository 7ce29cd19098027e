"""Every metric: its name, kind, meaning, and how it is read off a snapshot of the run. A new metric is one row."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from statistics import median
from typing import NamedTuple, TypeAlias

from dist_train.monitoring.prometheus.board import STATES, Buckets, Snapshot
from dist_train.rundir.records import Measurement, RankMeasurement, TrainRecord


class Kind(StrEnum):
    """The kinds of metric, by Prometheus' names."""

    GAUGE = "gauge"
    COUNTER = "counter"
    HISTOGRAM = "histogram"
    INFO = "info"


class Scope(StrEnum):
    """What a metric describes, and on which rank's page it is."""

    RUN = "rank 0"
    """The run: on rank 0's page alone."""
    RANK = "every rank, its own"
    """The rank that serves it: on every page."""
    BOTH = "every rank"
    """The run, on every page."""


class Reading(NamedTuple):
    """A value, and the values of the metric's labels in their order."""

    value: float | Buckets
    labels: tuple[str, ...] = ()


_Take: TypeAlias = Callable[[Snapshot], Iterable[Reading]]

_UNITS = {"_timestamp_seconds": "seconds since 1970", "_seconds": "seconds", "_bytes": "bytes", "_ratio": "ratio"}
"""By the end of a metric's name."""


@dataclass(frozen=True)
class Metric:
    """`take` reads the metric off a snapshot; no reading where nothing is known yet."""

    name: str
    kind: Kind
    meaning: str
    take: _Take
    labels: tuple[str, ...] = ()
    scope: Scope = Scope.RUN
    unit_in_words: str = ""

    @property
    def unit(self) -> str:
        """The unit, by the metric's name where it ends with one; may be empty."""
        return self.unit_in_words or next((unit for end, unit in _UNITS.items() if self.name.endswith(end)), "")


def _one(value: float | Buckets | None) -> tuple[Reading, ...]:
    return () if value is None else (Reading(value),)


def _gauge(name: str, meaning: str, value: Callable[[Snapshot], float | None], unit: str = "") -> Metric:
    return Metric(name, Kind.GAUGE, meaning, lambda now: _one(value(now)), unit_in_words=unit)


def _of_train(name: str, meaning: str, value: Callable[[TrainRecord], float], unit: str = "") -> Metric:
    return _gauge(name, meaning, lambda now: None if now.train is None else value(now.train), unit)


def _of_measured(name: str, meaning: str, value: Callable[[Measurement], float]) -> Metric:
    return _gauge(name, meaning, lambda now: None if now.measured is None else value(now.measured))


def _of_checkpoint(name: str, meaning: str, detail: str) -> Metric:
    def value(now: Snapshot) -> float | None:
        found = None if now.checkpoint is None else now.checkpoint.details.get(detail)
        return found if isinstance(found, int | float) else None

    return _gauge(name, meaning, value)


def _of_events(name: str, meaning: str, event: str, unit: str) -> Metric:
    return Metric(name, Kind.COUNTER, meaning, lambda now: _one(now.events[event]), unit_in_words=unit)


def _of_ranks(name: str, meaning: str, value: Callable[[RankMeasurement], float]) -> Metric:
    def take(now: Snapshot) -> Iterable[Reading]:
        values = enumerate(map(value, now.measured.ranks if now.measured else ()))
        return (Reading(number, (str(rank),)) for rank, number in values if not math.isnan(number))

    return Metric(name, Kind.GAUGE, meaning, take, ("rank",))


def _of_this_rank(name: str, meaning: str, value: Callable[[RankMeasurement], float]) -> Metric:
    def take(now: Snapshot) -> Iterable[Reading]:
        ranks = now.measured.ranks if now.measured else ()
        # a rank other than 0 hears of itself alone
        own = ranks[now.facts.rank : now.facts.rank + 1] or ranks[:1]
        return (Reading(number) for number in map(value, own) if not math.isnan(number))

    return Metric(name, Kind.GAUGE, meaning, take, scope=Scope.RANK)


BATCH = "batch"
"""The value of the label `split` for what was measured on the training batches themselves."""


def _loss(now: Snapshot) -> Iterable[Reading]:
    batch = {} if now.train is None else {BATCH: now.train}
    return (Reading(record.loss, (split,)) for split, record in {**batch, **now.evaluations}.items())


def _accuracy(now: Snapshot) -> Iterable[Reading]:
    batch = {} if now.train is None else {BATCH: now.train}
    return (Reading(record.accuracy, (split,)) for split, record in {**batch, **now.evaluations}.items())


def _run_info(now: Snapshot) -> Iterable[Reading]:
    facts = now.facts
    sizes = (str(facts.global_size), str(now.micro_batches.size))
    labels = (facts.name, facts.model, facts.data, *sizes, facts.noise, facts.revision, facts.slurm_job)
    return (Reading(1, (*labels, facts.controller)),)


def _busy(now: Snapshot) -> list[float]:
    return [rank.busy_seconds for rank in now.measured.ranks] if now.measured else []


def _slowest(now: Snapshot) -> int | None:
    busy = _busy(now)
    return busy.index(max(busy)) if busy else None


def _slowest_ratio(now: Snapshot) -> float | None:
    busy = _busy(now)
    return max(busy) / median(busy) if busy and median(busy) > 0 else None


METRICS: tuple[Metric, ...] = (
    Metric(
        "dist_train_run_info",
        Kind.INFO,
        "What runs; always 1.",
        _run_info,
        ("run", "model", "data", "global_batch", "micro_batch", "noise", "revision", "slurm_job", "controller"),
        Scope.BOTH,
    ),
    Metric(
        "dist_train_state",
        Kind.GAUGE,
        "1 for the state that the run is in, 0 for the others.",
        lambda now: (Reading(float(state == now.state), (state,)) for state in STATES),
        ("state",),
    ),
    _gauge("dist_train_step", "Optimizer updates done.", lambda now: now.step, "updates"),
    _gauge(
        "dist_train_planned_steps",
        "Optimizer updates at which the run ends.",
        lambda now: now.facts.total_steps,
        "updates",
    ),
    _gauge(
        "dist_train_epoch",
        "Epochs done, with their fraction.",
        lambda now: now.step / now.facts.steps_per_epoch,
        "epochs",
    ),
    _gauge(
        "dist_train_planned_epochs",
        "Epochs over which the schedules are laid out.",
        lambda now: now.facts.epochs,
        "epochs",
    ),
    Metric(
        "dist_train_samples_total",
        Kind.COUNTER,
        "Training samples used since the run's first step, on all ranks together.",
        lambda now: _one(now.step * now.facts.global_size),
        unit_in_words="samples",
    ),
    _gauge(
        "dist_train_planned_samples",
        "Training samples that the run will have used at its end.",
        lambda now: now.facts.total_steps * now.facts.global_size,
        "samples",
    ),
    _gauge(
        "dist_train_time_left_seconds",
        "Time to the last step at the pace of the last minute.",
        lambda now: now.seconds_left,
    ),
    _gauge(
        "dist_train_launch_timestamp_seconds",
        "When this launch of the run began.",
        lambda now: now.facts.launched or None,
    ),
    _gauge(
        "dist_train_last_progress_timestamp_seconds",
        "When a step, or a batch of an evaluation, was last done; before the first one, when training began.",
        lambda now: now.last_progress,
    ),
    Metric(
        "dist_train_loss",
        Kind.GAUGE,
        "Latest mean loss: of the global batch at the weights that it was trained at (batch), "
        "of a whole split at the clean weights (train, test).",
        _loss,
        ("split",),
        unit_in_words="nats",
    ),
    Metric(
        "dist_train_accuracy_ratio",
        Kind.GAUGE,
        "Latest share of samples classified rightly, by split as for the loss.",
        _accuracy,
        ("split",),
    ),
    _gauge("dist_train_best_accuracy_ratio", "Best test accuracy of the run.", lambda now: now.best_accuracy),
    _of_train("dist_train_learning_rate", "Learning rate of the latest step.", lambda record: record.learning_rate),
    _of_train(
        "dist_train_noise_amplitude", "Amplitude of the weight noise in force.", lambda record: record.noise_amplitude
    ),
    _of_train(
        "dist_train_gradient_norm",
        "Euclidean norm of the global gradient, before clipping.",
        lambda record: record.gradient_norm,
    ),
    _of_measured(
        "dist_train_weight_norm", "Euclidean norm of the clean weights.", lambda measured: measured.weight_norm
    ),
    _of_measured(
        "dist_train_distance_from_initial",
        "Euclidean distance of the clean weights from the initial ones.",
        lambda measured: measured.distance,
    ),
    _of_train(
        "dist_train_samples_per_second",
        "Training throughput of all ranks together.",
        lambda record: record.samples_per_second,
        "samples per second",
    ),
    _gauge("dist_train_world_size", "Ranks that train together.", lambda now: now.facts.world_size, "ranks"),
    _gauge(
        "dist_train_micro_batches",
        "Micro-batches of a step, of all ranks together.",
        lambda now: now.micro_batches.count,
        "micro-batches",
    ),
    _gauge("dist_train_micro_batch_size", "Samples of a micro-batch.", lambda now: now.micro_batches.size, "samples"),
    Metric(
        "dist_train_rank_micro_batches",
        Kind.GAUGE,
        "Micro-batches of a step that the rank computes.",
        lambda now: (Reading(count, (str(rank),)) for rank, count in enumerate(now.micro_batches.of_ranks)),
        ("rank",),
        unit_in_words="micro-batches",
    ),
    _of_ranks(
        "dist_train_rank_busy_seconds",
        "Time of the latest measured step that the rank did not wait for the others.",
        lambda rank: rank.busy_seconds,
    ),
    _of_ranks(
        "dist_train_rank_wait_seconds",
        "Time of the latest measured step that the rank waited for the others.",
        lambda rank: rank.wait_seconds,
    ),
    _of_ranks(
        "dist_train_rank_resident_memory_bytes", "Resident memory of the rank.", lambda rank: rank.resident_bytes
    ),
    _of_ranks(
        "dist_train_rank_device_memory_bytes",
        "Memory of its device that the rank holds.",
        lambda rank: rank.device_bytes,
    ),
    _of_ranks(
        "dist_train_rank_device_memory_peak_bytes",
        "The most memory of its device that the rank has held.",
        lambda rank: rank.device_peak_bytes,
    ),
    _of_ranks(
        "dist_train_rank_device_utilization_ratio",
        "Share of time in which the rank's device was at work, where NVML tells.",
        lambda rank: rank.device_utilization,
    ),
    _gauge(
        "dist_train_slowest_rank", "Number of the rank that was busy longest in the latest measured step.", _slowest
    ),
    _gauge("dist_train_slowest_rank_ratio", "Busy time of the slowest rank over the median of all.", _slowest_ratio),
    _gauge(
        "dist_train_checkpoint_timestamp_seconds",
        "When the latest checkpoint was on disk.",
        lambda now: None if now.checkpoint is None else now.checkpoint.time,
    ),
    _gauge(
        "dist_train_checkpoint_step",
        "Step of the latest checkpoint.",
        lambda now: None if now.checkpoint is None else now.checkpoint.step,
        "updates",
    ),
    _of_checkpoint("dist_train_checkpoint_size_bytes", "Size of the latest checkpoint.", "bytes"),
    _of_checkpoint(
        "dist_train_checkpoint_duration_seconds", "Time until the latest checkpoint was on disk.", "seconds"
    ),
    _of_checkpoint(
        "dist_train_checkpoint_stall_seconds", "Time for which the latest checkpoint held up training.", "stall_seconds"
    ),
    _of_events(
        "dist_train_checkpoints_total",
        "Checkpoints that came to disk, over all launches of the run.",
        "checkpoint",
        "checkpoints",
    ),
    _of_events(
        "dist_train_checkpoint_failures_total",
        "Checkpoints that could not be written, over all launches.",
        "checkpoint_failed",
        "checkpoints",
    ),
    _of_events("dist_train_resumes_total", "Launches that resumed from a checkpoint.", "resumed", "launches"),
    _of_events(
        "dist_train_requeues_total", "Launches of the run's Slurm job after it was requeued.", "requeued", "launches"
    ),
    _of_events(
        "dist_train_signals_total",
        "Requests to stop, by a signal to some rank, over all launches.",
        "signal",
        "signals",
    ),
    _of_events(
        "dist_train_disagreements_total",
        "Agreement checks in which ranks held different weights or noise, over all launches.",
        "disagreement",
        "events",
    ),
    _of_events(
        "dist_train_not_finite_total",
        "Losses, gradients or last evaluations that were not finite, over all launches.",
        "not_finite",
        "events",
    ),
    Metric(
        "dist_train_events_total",
        Kind.COUNTER,
        "What happened to the run, by kind of event, over all launches.",
        lambda now: (Reading(count, (event,)) for event, count in now.events.items()),
        ("event",),
        unit_in_words="events",
    ),
    Metric(
        "dist_train_step_duration_seconds",
        Kind.HISTOGRAM,
        "Time of a step, of every step that is measured (metrics.every_steps).",
        lambda now: _one(now.step_seconds),
        scope=Scope.RANK,
    ),
    Metric(
        "dist_train_step_part_duration_seconds",
        Kind.HISTOGRAM,
        "Time of the parts of a measured step: data_wait, forward_backward, perturb_restore, allreduce_wait, "
        "optimizer, checkpoint_stall.",
        lambda now: (Reading(buckets, (part,)) for part, buckets in now.part_seconds.items()),
        ("part",),
        Scope.RANK,
    ),
    _of_this_rank(
        "dist_train_resident_memory_bytes", "Resident memory of this rank.", lambda rank: rank.resident_bytes
    ),
    _of_this_rank(
        "dist_train_device_memory_bytes", "Memory of its device that this rank holds.", lambda rank: rank.device_bytes
    ),
    _of_this_rank(
        "dist_train_device_utilization_ratio",
        "Share of time in which this rank's device was at work, where NVML tells.",
        lambda rank: rank.device_utilization,
    ),
)


def metrics_of(rank: int) -> tuple[Metric, ...]:
    """Return the metrics on the page of rank `rank`."""
    return tuple(metric for metric in METRICS if rank == 0 or metric.scope is not Scope.RUN)
