"""Every metric: its name, kind, meaning, and how it is read off a snapshot of the run. A new metric is one row."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from operator import attrgetter
from typing import Literal, NamedTuple, TypeAlias

from dist_train.monitoring.prometheus.board import STATES, Buckets, Snapshot
from dist_train.rundir.records import EvaluationRecord, RankMeasurement, TrainRecord

Kind: TypeAlias = Literal["gauge", "counter", "histogram", "info"]


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
    return Metric(name, "gauge", meaning, lambda now: _one(value(now)), unit_in_words=unit)


def _of(path: str, name: str, meaning: str, unit: str = "") -> Metric:
    """Return the gauge of a snapshot's field within a record, `record.field`; it has no reading without the record."""
    record, field = path.split(".")
    return _gauge(name, meaning, lambda now: getattr(getattr(now, record), field, None), unit)


def _of_checkpoint(name: str, meaning: str, detail: str) -> Metric:
    def value(now: Snapshot) -> float | None:
        found = None if now.checkpoint is None else now.checkpoint.details.get(detail)
        return found if isinstance(found, int | float) else None

    return _gauge(name, meaning, value)


def _of_events(name: str, meaning: str, event: str, unit: str) -> Metric:
    return Metric(name, "counter", meaning, lambda now: _one(now.events[event]), unit_in_words=unit)


_RANK = ("rank", "node")


def _rank_labels(now: Snapshot, rank: int) -> tuple[str, str]:
    """Return the values of `_RANK`: the rank's own node, not that of rank 0, which serves all."""
    return str(rank), now.facts.nodes[rank] if rank < len(now.facts.nodes) else ""


def _of_ranks(name: str, meaning: str, field: str, unit: str = "") -> Metric:
    """Return the gauge of a field of `RankMeasurement`; it has no reading where the field is NaN."""
    take = _each_rank({"": attrgetter(field)})
    return Metric(name, "gauge", meaning, take, _RANK, unit_in_words=unit)


def _each_rank(values: Mapping[str, Callable[[RankMeasurement], float]]) -> _Take:
    """Return what reads each of `values` of every rank, by the value of one more label; '' is none."""

    def take(now: Snapshot) -> Iterable[Reading]:
        for rank, measured in enumerate(now.measured.ranks if now.measured else ()):
            labels = _rank_labels(now, rank)
            for label, value in values.items():
                number = value(measured)
                if not math.isnan(number):
                    yield Reading(number, (*labels, label) if label else labels)

    return take


_THROTTLING = {"power": 0x84, "thermal": 0x60, "hardware": 0x08}
"""NVML's bits by what they have in common; idleness and clocks that somebody has set are no fault."""


def _is_throttled(by: int) -> Callable[[RankMeasurement], float]:
    def value(measured: RankMeasurement) -> float:
        reasons = measured.device_throttle_reasons
        return reasons if math.isnan(reasons) else float(int(reasons) & by > 0)

    return value


def _of_this_rank(name: str, meaning: str, field: str) -> Metric:
    def take(now: Snapshot) -> Iterable[Reading]:
        ranks = now.measured.ranks if now.measured else ()
        # a rank other than 0 hears of itself alone
        own = ranks[now.facts.rank : now.facts.rank + 1] or ranks[:1]
        return (Reading(number) for number in map(attrgetter(field), own) if not math.isnan(number))

    return Metric(name, "gauge", meaning, take, scope=Scope.RANK)


BATCH = "batch"
"""The value of the label `split` for what was measured on the training batches themselves."""


def _by_split(field: str) -> _Take:
    def take(now: Snapshot) -> Iterable[Reading]:
        batch = {BATCH: now.train} if now.train else {}
        records: Mapping[str, TrainRecord | EvaluationRecord] = {**batch, **now.evaluations}
        return (Reading(getattr(record, field), (split,)) for split, record in records.items())

    return take


_RUN_LABELS = ("run", "run_id", "model", "data", "global_batch", "micro_batch")
_INFO_LABELS = (*_RUN_LABELS, "noise", "revision", "slurm_job", "controller")


def _run_info(now: Snapshot) -> Iterable[Reading]:
    facts = now.facts
    sizes = (str(facts.global_size), str(now.micro_batches.size))
    labels = (facts.name, facts.run_id, facts.model, facts.data, *sizes, facts.noise, facts.revision, facts.slurm_job)
    return (Reading(1, (*labels, facts.controller)),)


def _busy(now: Snapshot) -> list[float]:
    return [rank.busy_seconds for rank in now.measured.ranks] if now.measured else []


def _slowest(now: Snapshot) -> int | None:
    busy = _busy(now)
    return busy.index(max(busy)) if busy else None


def _over_the_others(values: Sequence[float]) -> list[float]:
    """Return each value over the median of all others; NaN where there are none, or that is 0."""
    order = sorted(range(len(values)), key=values.__getitem__)
    ratios = [math.nan] * len(values)
    low, high = (len(values) - 2) // 2, (len(values) - 1) // 2
    for place, index in enumerate(order if len(values) > 1 else ()):
        # the others in their order are `order` without this place
        middle = sum(values[order[other + (other >= place)]] for other in (low, high)) / 2
        ratios[index] = values[index] / middle if middle > 0 else math.nan
    return ratios


def _slowest_ratio(now: Snapshot) -> float | None:
    ratios = [ratio for ratio in _over_the_others(_busy(now)) if not math.isnan(ratio)]
    return max(ratios, default=None)


def _busy_ratios(now: Snapshot) -> Iterable[Reading]:
    counts = now.micro_batches.of_ranks
    # ranks may have one micro-batch more or less, or none
    each = {rank: busy / count for rank, (busy, count) in enumerate(zip(_busy(now), counts, strict=False)) if count}
    for rank, ratio in zip(each, _over_the_others(list(each.values())), strict=True):
        if not math.isnan(ratio):
            yield Reading(ratio, _rank_labels(now, rank))


METRICS: tuple[Metric, ...] = (
    Metric(
        "dist_train_run_info",
        "info",
        "What runs; always 1.",
        _run_info,
        _INFO_LABELS,
        Scope.BOTH,
    ),
    Metric(
        "dist_train_state",
        "gauge",
        "1 for the state that the run is in, 0 for the others.",
        lambda now: (Reading(float(state == now.state), (state,)) for state in STATES),
        ("state",),
    ),
    _gauge("dist_train_step", "Optimizer updates done.", lambda now: now.step, "updates"),
    _of("facts.total_steps", "dist_train_planned_steps", "Optimizer updates at which the run ends.", "updates"),
    _gauge(
        "dist_train_epoch",
        "Epochs done, with their fraction.",
        lambda now: now.step / now.facts.steps_per_epoch,
        "epochs",
    ),
    _of("facts.epochs", "dist_train_planned_epochs", "Epochs over which the schedules are laid out.", "epochs"),
    Metric(
        "dist_train_samples_total",
        "counter",
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
        "dist_train_time_limit_timestamp_seconds",
        "When the batch system ends the run's job.",
        lambda now: now.facts.time_limit or None,
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
        "gauge",
        "Latest mean loss: of the global batch at the weights that it was trained at (batch), "
        "of a whole split at the clean weights (train, test).",
        _by_split("loss"),
        ("split",),
        unit_in_words="nats",
    ),
    Metric(
        "dist_train_accuracy_ratio",
        "gauge",
        "Latest share of samples classified rightly, by split as for the loss.",
        _by_split("accuracy"),
        ("split",),
    ),
    _gauge("dist_train_best_accuracy_ratio", "Best test accuracy of the run.", lambda now: now.best_accuracy),
    _of("train.learning_rate", "dist_train_learning_rate", "Learning rate of the latest step."),
    _of("train.noise_amplitude", "dist_train_noise_amplitude", "Amplitude of the weight noise in force."),
    _of("train.gradient_norm", "dist_train_gradient_norm", "Euclidean norm of the global gradient, before clipping."),
    _of("measured.weight_norm", "dist_train_weight_norm", "Euclidean norm of the clean weights."),
    _of(
        "measured.distance",
        "dist_train_distance_from_initial",
        "Euclidean distance of the clean weights from the initial ones.",
    ),
    _of(
        "train.samples_per_second",
        "dist_train_samples_per_second",
        "Training throughput of all ranks together.",
        "samples per second",
    ),
    _of("facts.world_size", "dist_train_world_size", "Ranks that train together.", "ranks"),
    _of(
        "micro_batches.count",
        "dist_train_micro_batches",
        "Micro-batches of a step, of all ranks together.",
        "micro-batches",
    ),
    _of("micro_batches.size", "dist_train_micro_batch_size", "Samples of a micro-batch.", "samples"),
    Metric(
        "dist_train_rank_micro_batches",
        "gauge",
        "Micro-batches of a step that the rank computes.",
        lambda now: (Reading(count, _rank_labels(now, rank)) for rank, count in enumerate(now.micro_batches.of_ranks)),
        _RANK,
        unit_in_words="micro-batches",
    ),
    _of_ranks(
        "dist_train_rank_busy_seconds",
        "Time of the latest measured step that the rank did not wait for the others.",
        "busy_seconds",
    ),
    _of_ranks(
        "dist_train_rank_wait_seconds",
        "Time of the latest measured step that the rank spent in allreduces, for the others or for the sum itself.",
        "wait_seconds",
    ),
    _gauge(
        "dist_train_allreduce_seconds",
        "Time of the latest measured step that allreduces took where all ranks had come: the least of any rank's.",
        lambda now: min((rank.wait_seconds for rank in now.measured.ranks), default=None) if now.measured else None,
    ),
    Metric(
        "dist_train_rank_busy_ratio",
        "gauge",
        "Busy time for a micro-batch over the median of the other ranks; 1 is like the others.",
        _busy_ratios,
        _RANK,
    ),
    _of_ranks("dist_train_rank_resident_memory_bytes", "Resident memory of the rank.", "resident_bytes"),
    _of_ranks("dist_train_rank_device_memory_bytes", "Memory of its device that the rank holds.", "device_bytes"),
    _of_ranks(
        "dist_train_rank_device_memory_peak_bytes",
        "The most memory of its device that the rank has held.",
        "device_peak_bytes",
    ),
    _of_ranks(
        "dist_train_rank_device_utilization_ratio",
        "Share of time in which the rank's device was at work, where NVML tells.",
        "device_utilization",
    ),
    _of_ranks(
        "dist_train_rank_device_memory_used_bytes",
        "Memory of the rank's device that all processes hold, where NVML tells.",
        "device_used_bytes",
    ),
    _of_ranks(
        "dist_train_rank_device_power_watts",
        "Power that the rank's device draws, where NVML tells.",
        "device_power_watts",
        "watts",
    ),
    Metric(
        "dist_train_rank_device_clock_hertz",
        "gauge",
        "Clock of the rank's device, of its cores (core) and its memory (memory), where NVML tells.",
        _each_rank({"core": attrgetter("device_core_clock_hertz"), "memory": attrgetter("device_memory_clock_hertz")}),
        (*_RANK, "clock"),
        unit_in_words="hertz",
    ),
    Metric(
        "dist_train_rank_device_throttled",
        "gauge",
        "1 where the rank's device is clocked down: for its power limit (power), its temperature (thermal), or by the "
        "hardware itself (hardware); where NVML tells.",
        _each_rank({reason: _is_throttled(bits) for reason, bits in _THROTTLING.items()}),
        (*_RANK, "reason"),
    ),
    Metric(
        "dist_train_rank_device_memory_errors_total",
        "counter",
        "ECC errors of the memory of the rank's device since its driver was loaded, corrected and uncorrected, where "
        "NVML tells.",
        _each_rank(
            {"corrected": attrgetter("device_corrected_errors"), "uncorrected": attrgetter("device_uncorrected_errors")}
        ),
        (*_RANK, "kind"),
        unit_in_words="errors",
    ),
    _gauge(
        "dist_train_slowest_rank", "Number of the rank that was busy longest in the latest measured step.", _slowest
    ),
    _gauge(
        "dist_train_slowest_rank_ratio", "Busy time of the slowest rank over the median of the others.", _slowest_ratio
    ),
    _gauge(
        "dist_train_device_memory_limit_bytes",
        "Memory of rank 0's device.",
        lambda now: now.facts.device_memory or None,
    ),
    _gauge(
        "dist_train_disk_free_bytes",
        "Space that is left to the run on the disk of its directory.",
        lambda now: now.disk_free,
    ),
    _of("checkpoint.time", "dist_train_checkpoint_timestamp_seconds", "When the latest checkpoint was on disk."),
    _of("checkpoint.step", "dist_train_checkpoint_step", "Step of the latest checkpoint.", "updates"),
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
    _of_events(
        "dist_train_exporter_restarts_total",
        "Times that the process of the exporter died and was started again, in this launch.",
        "exporter_restarted",
        "restarts",
    ),
    Metric(
        "dist_train_events_total",
        "counter",
        "What happened to the run, by kind of event, over all launches.",
        lambda now: (Reading(count, (event,)) for event, count in now.events.items()),
        ("event",),
        unit_in_words="events",
    ),
    Metric(
        "dist_train_step_duration_seconds",
        "histogram",
        "Time of a step, of every step that is measured (metrics.every_steps).",
        lambda now: _one(now.step_seconds),
        scope=Scope.RANK,
    ),
    Metric(
        "dist_train_step_part_duration_seconds",
        "histogram",
        "Time of the parts of a measured step: data_wait, forward_backward, perturb_restore, allreduce_wait, "
        "optimizer, checkpoint_stall.",
        lambda now: (Reading(buckets, (part,)) for part, buckets in now.part_seconds.items()),
        ("part",),
        Scope.RANK,
    ),
    _of_this_rank("dist_train_resident_memory_bytes", "Resident memory of this rank.", "resident_bytes"),
    _of_this_rank("dist_train_device_memory_bytes", "Memory of its device that this rank holds.", "device_bytes"),
    _of_this_rank(
        "dist_train_device_utilization_ratio",
        "Share of time in which this rank's device was at work, where NVML tells.",
        "device_utilization",
    ),
)


def metrics_of(rank: int) -> tuple[Metric, ...]:
    """Return the metrics on the page of rank `rank`."""
    return tuple(metric for metric in METRICS if rank == 0 or metric.scope is not Scope.RUN)
