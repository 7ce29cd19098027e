"""The metrics of a run: how far it is, what it learns, what happened to it."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from dist_train.monitoring.prometheus.board import STATES, Snapshot
from dist_train.monitoring.prometheus.metric import Kind, Metric, Reading, Scope, one
from dist_train.rundir.records import Measurement, TrainRecord

BATCH = "batch"
"""The value of the label `split` for what was measured on the training batches themselves."""

_SINCE_1970 = "seconds since 1970"


def _train(take: Callable[[TrainRecord], float]) -> Callable[[Snapshot], Iterable[Reading]]:
    return lambda now: () if now.train is None else (Reading(take(now.train)),)


def _measured(take: Callable[[Measurement], float]) -> Callable[[Snapshot], Iterable[Reading]]:
    return lambda now: () if now.measured is None else (Reading(take(now.measured)),)


def _events(event: str) -> Callable[[Snapshot], Iterable[Reading]]:
    return lambda now: (Reading(now.events[event]),)


def _checkpoint(detail: str) -> Callable[[Snapshot], Iterable[Reading]]:
    def take(now: Snapshot) -> Iterable[Reading]:
        value = None if now.checkpoint is None else now.checkpoint.details.get(detail)
        return one(value if isinstance(value, int | float) else None)

    return take


def _loss(now: Snapshot) -> Iterable[Reading]:
    if now.train is not None:
        yield Reading(now.train.loss, (BATCH,))
    yield from (Reading(record.loss, (split,)) for split, record in now.evaluations.items())


def _accuracy(now: Snapshot) -> Iterable[Reading]:
    if now.train is not None:
        yield Reading(now.train.accuracy, (BATCH,))
    yield from (Reading(record.accuracy, (split,)) for split, record in now.evaluations.items())


def _run_info(now: Snapshot) -> Iterable[Reading]:
    facts = now.facts
    sizes = (str(facts.global_size), str(now.micro_batches.size))
    labels = (facts.name, facts.model, facts.data, *sizes, facts.noise, facts.revision, facts.slurm_job)
    yield Reading(1, (*labels, facts.controller))


def _gauge(name: str, unit: str, meaning: str, take: Callable[[Snapshot], Iterable[Reading]]) -> Metric:
    return Metric(name, Kind.GAUGE, unit, meaning, take)


def _counter(name: str, unit: str, meaning: str, take: Callable[[Snapshot], Iterable[Reading]]) -> Metric:
    return Metric(name, Kind.COUNTER, unit, meaning, take)


PROGRESS = (
    Metric(
        "dist_train_run_info",
        Kind.INFO,
        "",
        "What runs; always 1.",
        _run_info,
        ("run", "model", "data", "global_batch", "micro_batch", "noise", "revision", "slurm_job", "controller"),
        Scope.BOTH,
    ),
    Metric(
        "dist_train_state",
        Kind.GAUGE,
        "",
        "1 for the state that the run is in, 0 for the others.",
        lambda now: (Reading(float(state == now.state), (state,)) for state in STATES),
        ("state",),
    ),
    _gauge("dist_train_step", "updates", "Optimizer updates done.", lambda now: one(now.step)),
    _gauge(
        "dist_train_planned_steps",
        "updates",
        "Optimizer updates at which the run ends.",
        lambda now: one(now.facts.total_steps),
    ),
    _gauge(
        "dist_train_epoch",
        "epochs",
        "Epochs done, with their fraction.",
        lambda now: one(now.step / now.facts.steps_per_epoch),
    ),
    _gauge(
        "dist_train_planned_epochs",
        "epochs",
        "Epochs over which the schedules are laid out.",
        lambda now: one(now.facts.epochs),
    ),
    _counter(
        "dist_train_samples_total",
        "samples",
        "Training samples used since the run's first step, on all ranks together.",
        lambda now: one(now.step * now.facts.global_size),
    ),
    _gauge(
        "dist_train_planned_samples",
        "samples",
        "Training samples that the run will have used at its end.",
        lambda now: one(now.facts.total_steps * now.facts.global_size),
    ),
    _gauge(
        "dist_train_time_left_seconds",
        "seconds",
        "Time to the last step at the pace of the last minute.",
        lambda now: one(now.seconds_left),
    ),
    _gauge(
        "dist_train_launch_timestamp_seconds",
        _SINCE_1970,
        "When this launch of the run began.",
        lambda now: one(now.facts.launched or None),
    ),
    _gauge(
        "dist_train_last_progress_timestamp_seconds",
        _SINCE_1970,
        "When a step, or a batch of an evaluation, was last done; before the first one, when training began.",
        lambda now: one(now.last_progress),
    ),
)

LEARNING = (
    Metric(
        "dist_train_loss",
        Kind.GAUGE,
        "nats",
        "Latest mean loss: of the global batch at the weights that it was trained at (batch), "
        "of a whole split at the clean weights (train, test).",
        _loss,
        ("split",),
    ),
    Metric(
        "dist_train_accuracy_ratio",
        Kind.GAUGE,
        "ratio",
        "Latest share of samples classified rightly, by split as for the loss.",
        _accuracy,
        ("split",),
    ),
    _gauge(
        "dist_train_best_accuracy_ratio",
        "ratio",
        "Best test accuracy of the run.",
        lambda now: one(now.best_accuracy),
    ),
    _gauge(
        "dist_train_learning_rate",
        "",
        "Learning rate of the latest step.",
        _train(lambda record: record.learning_rate),
    ),
    _gauge(
        "dist_train_noise_amplitude",
        "",
        "Amplitude of the weight noise in force.",
        _train(lambda record: record.noise_amplitude),
    ),
    _gauge(
        "dist_train_gradient_norm",
        "",
        "Euclidean norm of the global gradient, before clipping.",
        _train(lambda record: record.gradient_norm),
    ),
    _gauge(
        "dist_train_weight_norm",
        "",
        "Euclidean norm of the clean weights.",
        _measured(lambda measured: measured.weight_norm),
    ),
    _gauge(
        "dist_train_distance_from_initial",
        "",
        "Euclidean distance of the clean weights from the initial ones.",
        _measured(lambda measured: measured.distance),
    ),
    _gauge(
        "dist_train_samples_per_second",
        "samples per second",
        "Training throughput of all ranks together.",
        _train(lambda record: record.samples_per_second),
    ),
)

CHECKPOINTS = (
    _gauge(
        "dist_train_checkpoint_timestamp_seconds",
        _SINCE_1970,
        "When the latest checkpoint was on disk.",
        lambda now: one(None if now.checkpoint is None else now.checkpoint.time),
    ),
    _gauge(
        "dist_train_checkpoint_step",
        "updates",
        "Step of the latest checkpoint.",
        lambda now: one(None if now.checkpoint is None else now.checkpoint.step),
    ),
    _gauge(
        "dist_train_checkpoint_size_bytes",
        "bytes",
        "Size of the latest checkpoint.",
        _checkpoint("bytes"),
    ),
    _gauge(
        "dist_train_checkpoint_duration_seconds",
        "seconds",
        "Time until the latest checkpoint was on disk.",
        _checkpoint("seconds"),
    ),
    _gauge(
        "dist_train_checkpoint_stall_seconds",
        "seconds",
        "Time for which the latest checkpoint held up training.",
        _checkpoint("stall_seconds"),
    ),
)

EVENTS = (
    _counter(
        "dist_train_checkpoints_total",
        "checkpoints",
        "Checkpoints that came to disk, over all launches of the run.",
        _events("checkpoint"),
    ),
    _counter(
        "dist_train_checkpoint_failures_total",
        "checkpoints",
        "Checkpoints that could not be written, over all launches.",
        _events("checkpoint_failed"),
    ),
    _counter(
        "dist_train_resumes_total",
        "launches",
        "Launches that resumed from a checkpoint.",
        _events("resumed"),
    ),
    _counter(
        "dist_train_requeues_total",
        "launches",
        "Launches of the run's Slurm job after it was requeued.",
        _events("requeued"),
    ),
    _counter(
        "dist_train_signals_total",
        "signals",
        "Requests to stop, by a signal to some rank, over all launches.",
        _events("signal"),
    ),
    _counter(
        "dist_train_disagreements_total",
        "events",
        "Agreement checks in which ranks held different weights or noise, over all launches.",
        _events("disagreement"),
    ),
    _counter(
        "dist_train_not_finite_total",
        "events",
        "Losses, gradients or last evaluations that were not finite, over all launches.",
        _events("not_finite"),
    ),
    Metric(
        "dist_train_events_total",
        Kind.COUNTER,
        "events",
        "What happened to the run, by kind of event, over all launches.",
        lambda now: (Reading(count, (event,)) for event, count in now.events.items()),
        ("event",),
    ),
)
