"""All metrics, and the page that shows them in Prometheus's text format.

To add a metric, add a row to METRICS: its name, kind and meaning, and how it is read from a snapshot.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from itertools import accumulate
from operator import attrgetter
from threading import Lock
from typing import Any, Literal, TypeAlias

from prometheus_client.exposition import generate_latest
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

from dist_train.monitoring.prometheus.board import OUTCOMES, STATES, Board, Buckets, Snapshot, stall_timeout_seconds
from dist_train.rundir.records import EvaluationRecord, RankMeasurement, TrainRecord

Kind: TypeAlias = Literal["gauge", "counter", "histogram", "info"]


class Scope(StrEnum):
    """What a metric describes, and which ranks' pages have it."""

    RUN = "rank 0"  # describes the run; only on rank 0's page
    RANK = "every rank, its own"  # describes the rank that serves it; on every page
    RUN_EVERYWHERE = "every rank"  # describes the run; on every page


Readings: TypeAlias = Mapping[tuple[str, ...], float | Buckets]  # by the values of the metric's labels, in order
_Value: TypeAlias = Callable[[Snapshot], float | None]
_ReadRank: TypeAlias = Callable[[RankMeasurement], float]

_UNITS = {"_timestamp_seconds": "seconds since 1970"}
_UNITS |= {f"_{unit}": unit for unit in ("seconds", "bytes", "ratio", "watts", "hertz")}
"""Units by the suffix of a metric's name."""


@dataclass(frozen=True)
class Metric:
    """A metric; `take` returns its readings of a snapshot, none if nothing is known yet."""

    short_name: str
    kind: Kind
    meaning: str
    take: Callable[[Snapshot], Readings]
    labels: tuple[str, ...] = ()
    scope: Scope = Scope.RUN
    unit_in_words: str = ""

    @property
    def name(self) -> str:
        """The full name in Prometheus."""
        return f"dist_train_{self.short_name}"

    @property
    def unit(self) -> str:
        """The unit, from the suffix of the name unless given; may be empty."""
        return self.unit_in_words or next((unit for end, unit in _UNITS.items() if self.name.endswith(end)), "")


def _field(path: str) -> _Value:
    """Return a function that reads the number at a dotted `path`; it returns None if record or number are missing."""

    def read(now: Snapshot) -> float | None:
        found: Any = now
        for name in path.split("."):
            found = found.get(name) if isinstance(found, Mapping) else getattr(found, name, None)
        return found if isinstance(found, int | float) else None

    return read


def _nonzero(path: str) -> _Value:
    return lambda now: _field(path)(now) or None


def _single(kind: Kind, name: str, meaning: str, value: str | _Value, unit: str = "") -> Metric:
    """Return the metric of one value: the field at a path, or a function of the snapshot."""
    read = _field(value) if isinstance(value, str) else value

    def take(now: Snapshot) -> Readings:
        number = read(now)
        return {} if number is None else {(): number}

    return Metric(name, kind, meaning, take, unit_in_words=unit)


_gauge, _count = partial(_single, "gauge"), partial(_single, "counter")

_RANK = ("rank", "node")


def _rank_labels(now: Snapshot, rank: int) -> tuple[str, str]:
    """Return the values of the labels `_RANK`: the rank and its own node. (A target's label `node` is the server's.)"""
    return str(rank), now.facts.nodes[rank] if rank < len(now.facts.nodes) else ""


def _by_rank(
    name: str, meaning: str, value: str | Mapping[str, _ReadRank], label: str = "", kind: Kind = "gauge", unit: str = ""
) -> Metric:
    """Return the metric of a field of `RankMeasurement`, or of several values keyed by `label`; NaN has no reading."""
    values = [((), attrgetter(value))] if isinstance(value, str) else [((key,), read) for key, read in value.items()]

    def take(now: Snapshot) -> Readings:
        return {
            (*_rank_labels(now, rank), *label_values): number
            for rank, measured in enumerate(now.measured.ranks if now.measured else ())
            for label_values, read in values
            if not math.isnan(number := read(measured))
        }

    return Metric(name, kind, meaning, take, (*_RANK, label) if label else _RANK, unit_in_words=unit)


def _own_value(name: str, meaning: str, field: str) -> Metric:
    def take(now: Snapshot) -> Readings:
        ranks = now.measured.ranks if now.measured else ()
        # A rank other than 0 gets only its own measurement.
        own = ranks[now.facts.rank : now.facts.rank + 1] or ranks[:1]
        number: float = getattr(own[0], field) if own else math.nan
        return {} if math.isnan(number) else {(): number}

    return Metric(name, "gauge", meaning, take, scope=Scope.RANK)


def _choice(name: str, meaning: str, choices: Sequence[str]) -> Metric:
    """Return the metric of a field of the snapshot that is one of `choices`: 1 for that one, 0 for the others."""

    def take(now: Snapshot) -> Readings:
        return {(choice,): float(choice == getattr(now, name)) for choice in choices}

    return Metric(name, "gauge", meaning, take, (name,))


def _by_event(name: str, kind: Kind, meaning: str, field: str) -> Metric:
    def take(now: Snapshot) -> Readings:
        return {(event,): count for event, count in getattr(now, field).items()}

    return Metric(name, kind, meaning, take, ("event",), unit_in_words="events")


BATCH = "batch"  # the value of the label `split` for measurements on training batches


def _by_split(name: str, meaning: str, field: str, unit: str = "") -> Metric:
    def take(now: Snapshot) -> Readings:
        batch = {BATCH: now.train} if now.train else {}
        records: Mapping[str, TrainRecord | EvaluationRecord] = {**batch, **now.evaluations}
        return {(split,): getattr(record, field) for split, record in records.items()}

    return Metric(name, "gauge", meaning, take, ("split",), unit_in_words=unit)


_INFO: Mapping[str, Callable[[Snapshot], object]] = {
    "run": attrgetter("facts.name"),
    **{label: attrgetter(f"facts.{label}") for label in ("run_id", "model", "data", "noise", "revision", "slurm_job")},
    "global_batch": attrgetter("facts.global_size"),
    "micro_batch": attrgetter("facts.micro_size"),
    "controller": attrgetter("facts.controller"),
}
"""The labels of run_info."""


def _run_info(now: Snapshot) -> Readings:
    return {tuple(str(read(now)) for read in _INFO.values()): 1}


def _time_limit(now: Snapshot) -> Readings:
    limit = now.facts.time_limit
    return {("requeue" if now.facts.is_requeued else "end",): limit} if limit else {}


def _samples(now: Snapshot) -> int:
    return now.facts.passes.samples(now.step)


# NVML's reasons that count: not idleness, nor clocks that an administrator has set.
_THROTTLING = {"power": 0x84, "thermal": 0x60, "hardware": 0x08}


def _is_throttled(bits: int) -> _ReadRank:
    def read(measured: RankMeasurement) -> float:
        reasons = measured.device_throttle_reasons
        return reasons if math.isnan(reasons) else float(int(reasons) & bits > 0)

    return read


def _busy(now: Snapshot) -> list[float]:
    return [rank.busy_seconds for rank in now.measured.ranks] if now.measured else []


def _slowest(now: Snapshot) -> int | None:
    busy = _busy(now)
    return busy.index(max(busy)) if busy else None


def _over_median_of_others(values: Sequence[float]) -> list[float]:
    """Return each value over the median of all others; NaN if there are none or the median is 0."""
    order = sorted(range(len(values)), key=values.__getitem__)
    ratios = [math.nan] * len(values)
    low, high = (len(values) - 2) // 2, (len(values) - 1) // 2
    for place, index in enumerate(order if len(values) > 1 else ()):
        # The sorted others are `order` without this place.
        middle = sum(values[order[other + (other >= place)]] for other in (low, high)) / 2
        ratios[index] = values[index] / middle if middle > 0 else math.nan
    return ratios


def _slowest_ratio(now: Snapshot) -> float | None:
    return max((ratio for ratio in _over_median_of_others(_busy(now)) if not math.isnan(ratio)), default=None)


def _busy_ratios(now: Snapshot) -> Readings:
    ranks = now.measured.ranks if now.measured else ()
    # Per micro-batch: ranks may have one micro-batch more or less, or none.
    each = {rank: it.busy_seconds / it.micro_batches for rank, it in enumerate(ranks) if it.micro_batches > 0}
    ratios = zip(each, _over_median_of_others(list(each.values())), strict=True)
    return {_rank_labels(now, rank): ratio for rank, ratio in ratios if not math.isnan(ratio)}


METRICS: tuple[Metric, ...] = (
    Metric("run_info", "info", "What runs; always 1.", _run_info, tuple(_INFO), Scope.RUN_EVERYWHERE),
    _choice("state", "1 for the state that the run is in, 0 for the others.", STATES),
    _choice("outcome", "1 for how the run has ended, 0 for the other ways.", OUTCOMES),
    _gauge("step", "Optimizer updates done.", "step", "updates"),
    _gauge("planned_steps", "Optimizer updates at which the run ends.", "facts.total_steps", "updates"),
    _gauge("epoch", "Epochs done, with fraction.", lambda now: now.facts.passes.done(now.step), "epochs"),
    _gauge("planned_epochs", "Epochs that the run will have done at its end.", "facts.epochs", "epochs"),
    _gauge("samples", "Training samples used by all ranks since the run's first step.", _samples, "samples"),
    _gauge(
        "planned_samples",
        "Training samples that the run will have used at its end.",
        "facts.planned_samples",
        "samples",
    ),
    _gauge("time_left_seconds", "Time to the last step at the pace of the last minute.", "seconds_left"),
    Metric(
        "time_limit_timestamp_seconds",
        "gauge",
        "When the batch system ends the run's job, and what happens then: requeue or end.",
        _time_limit,
        ("then",),
    ),
    _gauge("launch_timestamp_seconds", "When this launch of the run began.", _nonzero("facts.launched")),
    _gauge(
        "last_progress_timestamp_seconds",
        "When a step, or a batch of an evaluation, was last done; before the first one, when training began.",
        "last_progress",
    ),
    _gauge("stall_timeout_seconds", "Time without progress after which the run has stalled.", stall_timeout_seconds),
    _by_split(
        "loss",
        "Latest mean loss: of the global batch at the weights that it was trained at (batch), of a split (of train the "
        "first evaluation.train_samples) at the clean weights (train, validation, test), or at their average "
        "(train-averaged, ...).",
        "loss",
        "nats",
    ),
    _by_split("accuracy_ratio", "Latest share of correctly classified samples, by split as for the loss.", "accuracy"),
    _gauge("best_accuracy_ratio", "Best test accuracy of the run.", "best_accuracy"),
    _gauge("learning_rate", "Learning rate of the latest step.", "train.learning_rate"),
    _gauge("noise_amplitude", "Amplitude of the weight noise in force.", "train.noise_amplitude"),
    _gauge("gradient_norm", "Euclidean norm of the global gradient, before clipping.", "train.gradient_norm"),
    _gauge("weight_norm", "Euclidean norm of the clean weights.", "measured.weight_norm"),
    _gauge(
        "distance_from_initial", "Euclidean distance of the clean weights from the initial ones.", "measured.distance"
    ),
    _gauge("samples_per_second", "Throughput of all ranks together.", "train.samples_per_second", "samples per second"),
    _gauge("world_size", "Ranks that train together.", "facts.world_size", "ranks"),
    _gauge(
        "generation",
        "Generation of ranks in this launch: 1 at first, one more whenever ranks were lost or joined.",
        "facts.generation",
        "generations",
    ),
    _gauge("micro_batches", "Micro-batches of a step, of all ranks together.", "facts.micro_batches", "micro-batches"),
    _gauge("micro_batch_size", "Samples of a micro-batch.", "facts.micro_size", "samples"),
    _by_rank(
        "rank_micro_batches",
        "Micro-batches of the latest measured step that the rank has computed.",
        "micro_batches",
        unit="micro-batches",
    ),
    _by_rank("rank_busy_seconds", "Time of the latest measured step outside of allreduces.", "busy_seconds"),
    _by_rank(
        "rank_wait_seconds",
        "Time of the latest measured step in allreduces, for the other ranks and for the sum itself.",
        "wait_seconds",
    ),
    _gauge(
        "allreduce_seconds",
        "Time of allreduces in the latest measured step without waiting for ranks: the smallest of any rank's.",
        lambda now: min((rank.wait_seconds for rank in now.measured.ranks), default=None) if now.measured else None,
    ),
    Metric(
        "rank_busy_ratio",
        "gauge",
        "Busy time per micro-batch over the median of the other ranks; 1 means like the others.",
        _busy_ratios,
        _RANK,
    ),
    _by_rank("rank_resident_memory_bytes", "Resident memory of the rank.", "resident_bytes"),
    _by_rank("rank_device_memory_bytes", "Memory of its device that the rank holds.", "device_bytes"),
    _by_rank("rank_device_memory_peak_bytes", "Peak of the device memory that the rank held.", "device_peak_bytes"),
    _by_rank("rank_device_memory_used_bytes", "Memory of the device that all processes hold.", "device_used_bytes"),
    _by_rank("rank_device_memory_limit_bytes", "Memory of the rank's device.", "device_total_bytes"),
    _by_rank("rank_device_utilization_ratio", "Share of time that the device was busy.", "device_utilization"),
    _by_rank("rank_device_power_watts", "Power that the device draws.", "device_power_watts"),
    _by_rank(
        "rank_device_clock_hertz",
        "Clock of the device: of its cores (core), of its memory (memory).",
        {clock: attrgetter(f"device_{clock}_clock_hertz") for clock in ("core", "memory")},
        "clock",
    ),
    _by_rank(
        "rank_device_throttled",
        "1 if the device is throttled: by its power limit (power), its temperature (thermal), or its hardware "
        "(hardware).",
        {reason: _is_throttled(bits) for reason, bits in _THROTTLING.items()},
        "reason",
    ),
    _by_rank(
        "rank_device_memory_errors_total",
        "ECC errors of the device's memory since its driver was loaded: corrected and uncorrected.",
        {kind: attrgetter(f"device_{kind}_errors") for kind in ("corrected", "uncorrected")},
        "kind",
        "counter",
        "errors",
    ),
    _gauge("slowest_rank", "Number of the rank that was busy longest in the latest measured step.", _slowest),
    _gauge("slowest_rank_ratio", "Busy time of the slowest rank over the median of the others.", _slowest_ratio),
    _gauge("disk_free_bytes", "Free space on the disk of the run directory.", "disk_free"),
    _gauge("checkpoint_timestamp_seconds", "When the latest checkpoint was on disk.", "checkpoint.time"),
    _gauge("checkpoint_step", "Step of the latest checkpoint.", "checkpoint.step", "updates"),
    _gauge(
        "checkpoint_interval_steps",
        "Updates between two checkpoints, as planned; missing if the run writes only its last one.",
        _nonzero("facts.checkpoint_interval"),
        "updates",
    ),
    _gauge("checkpoint_size_bytes", "Size of the latest checkpoint.", "checkpoint.details.bytes"),
    _gauge("checkpoint_duration_seconds", "Time to write the latest checkpoint.", "checkpoint.details.seconds"),
    _gauge("checkpoint_stall_seconds", "Training stall by the latest checkpoint.", "checkpoint.details.stall_seconds"),
    _count("checkpoints_total", "Checkpoints written to disk.", "events.checkpoint", "checkpoints"),
    _count(
        "checkpoint_failures_total", "Checkpoints that could not be written.", "events.checkpoint_failed", "checkpoints"
    ),
    _count("resumes_total", "Launches that resumed from a checkpoint.", "events.resumed", "launches"),
    _count("requeues_total", "Launches of the run's Slurm job after it was requeued.", "events.requeued", "launches"),
    _count("signals_total", "Requests to stop by a signal to any rank.", "events.signal", "signals"),
    _count("disagreements_total", "Checks in which ranks' weights or noise differed.", "events.disagreement", "events"),
    _count("not_finite_total", "Losses, gradients or last evaluations not finite.", "events.not_finite", "events"),
    _count(
        "exporter_restarts_total",
        "Restarts of the exporter's process after it died, in this launch.",
        "events.exporter_restarted",
        "restarts",
    ),
    _by_event("events_total", "counter", "Events of the run, by kind.", "events"),
    _by_event(
        "events_before_launch",
        "gauge",
        "Events of the run before this launch, or before its exporter was restarted, by kind.",
        "events_before",
    ),
    Metric(
        "step_duration_seconds",
        "histogram",
        "Time of each measured step (metrics.every_steps).",
        lambda now: {(): now.step_seconds},
        scope=Scope.RANK,
    ),
    Metric(
        "step_part_duration_seconds",
        "histogram",
        "Time of the parts of a measured step: data_wait, forward_backward, perturb_restore, allreduce_wait, "
        "optimizer, checkpoint_stall.",
        lambda now: {(part,): buckets for part, buckets in now.part_seconds.items()},
        ("part",),
        Scope.RANK,
    ),
    _own_value("resident_memory_bytes", "Resident memory of this rank.", "resident_bytes"),
    _own_value("device_memory_bytes", "Memory of its device that this rank holds.", "device_bytes"),
    _own_value("device_utilization_ratio", "Share of time that its device was busy.", "device_utilization"),
)
"""Counters of events include all launches of the run, except that of the exporter's restarts."""


class Families(Collector):
    """A prometheus_client collector, for `generate_latest`, of the metrics of a rank's page at the snapshot `now`."""

    def __init__(self, now: Snapshot) -> None:
        self._now = now

    def collect(self) -> Iterable[Family]:
        """Yield the metrics with their values."""
        for metric in METRICS:
            if metric.scope is Scope.RUN and self._now.facts.rank != 0:
                continue
            # The library appends these suffixes to a family's name.
            short = metric.name.removesuffix("_total").removesuffix("_info")
            family = Family(short, metric.meaning, metric.kind)
            for label_values, value in metric.take(self._now).items():
                labels = dict(zip(metric.labels, label_values, strict=True))
                if isinstance(value, Buckets):
                    for bound, count in zip((*value.bounds, "+Inf"), accumulate(value.counts), strict=True):
                        family.add_sample(f"{metric.name}_bucket", {**labels, "le": str(bound)}, count)
                    family.add_sample(f"{metric.name}_count", labels, sum(value.counts))
                    family.add_sample(f"{metric.name}_sum", labels, value.total)
                else:
                    family.add_sample(metric.name, labels, value)
            yield family


# Every Prometheus reads it; OpenMetrics takes twice as long to write.
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


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
