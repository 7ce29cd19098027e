"""The dashboard that compares runs: small batch, large batch, and large batch with noise."""

from __future__ import annotations

from grafana_foundation_sdk.models import dashboard as model

from dashboard_generator.frame import add_sections, choice, event, frame, one_of, source_choice, split_choice
from dashboard_generator.links import ALL_RUNS
from dashboard_generator.one_run import STATES, run_ids, state_number
from dashboard_generator.panels import (
    OF_RUNS,
    RED,
    Panels,
    PanelSpec,
    Query,
    bars,
    curves,
    curves_over,
    from_zero,
    logarithmic,
    number,
    states,
)

_LABELS = ("global_batch", "noise", "run", "run_id", "split", "model")
_AXIS = {"Steps": "dist_train_step", "Epochs": "dist_train_epoch", "Samples": "dist_train_samples"}
# Of rank 0, which alone learns of a new batch size.
_INFO = f'dist_train_run_info{{{OF_RUNS}, noise=~"$noise", rank=~"0|"}}'
_KINDS = "run, run_id, model, global_batch, noise"
KIND = "batch {{global_batch}}, {{noise}}: {{run}} {{run_id}}"
"""A legend with the labels by which runs differ."""


def _with_kind(expression: str) -> str:
    """Return `expression` with the labels by which runs differ added: model, global batch, noise."""
    # Of a target that is gone and the one that follows it, both may be there for a moment: one of them names the run.
    return _joined(expression, f"topk by (run, run_id) (1, max by ({_KINDS}) ({_INFO}))")


def _joined(expression: str, kinds: str) -> str:
    return f"{expression} * on (run, run_id) group_left (model, global_batch, noise) {kinds}"


def _of(metric: str) -> str:
    return _with_kind(f"max by (run, run_id) ({metric}{{{OF_RUNS}}})")


def _last_of(metric: str) -> str:
    """Return the last value in the dashboard's time range, also of runs that have ended."""
    # A run with a batch schedule has several global batches in this range: the one that it had longest names it.
    kinds = f"topk by (run, run_id) (1, max by ({_KINDS}) (count_over_time({_INFO}[$__range]))) ^ 0"
    return _joined(f"max by (run, run_id) (last_over_time({metric}{{{OF_RUNS}}}[$__range]))", kinds)


def _by_split(metric: str) -> str:
    return _with_kind(f'max by (run, run_id, split) ({metric}{{{OF_RUNS}, split=~"$split"}})')


def build() -> model.Dashboard:
    """Return the dashboard."""
    built = frame(
        ALL_RUNS,
        "dist-train: all runs",
        "Runs side by side: does a large batch with noise learn what a small batch learns, and how much sooner?",
    )
    built.with_variable(source_choice())
    built.with_variable(choice("run", "Runs", "The runs to compare", "label_values(dist_train_state, run)"))
    built.with_variable(choice("run_id", "Run ids", "Tells runs of one name apart", run_ids("=~")))
    built.with_variable(
        choice("noise", "Noise", "Kinds of weight noise", f"label_values(dist_train_run_info{{{OF_RUNS}}}, noise)")
    )
    built.with_variable(split_choice(OF_RUNS))
    built.with_variable(one_of("x", "Compare at equal", "The x axis of curves that are not drawn over time", _AXIS))
    firing = f'max by (run, run_id, alertname) (ALERTS{{{OF_RUNS}, alertstate="firing"}}) > 0'
    built.annotation(event("Alerts", RED, firing, "{{run}} {{run_id}}: {{alertname}}"))
    sections = {
        "All runs": _overview(),
        "Small batch, large batch, noise": _learning(),
        "At equal ${x:text}, whenever the runs were": _by_step(),
        "What it costs": _cost(),
    }
    return add_sections(built, sections)


def _overview() -> Panels:
    yield states(
        PanelSpec("State", "The state of each run over time; gaps are times without an exporter.", "none", 16, 9),
        Query(state_number(OF_RUNS), "{{run}} {{run_id}}"),
        STATES,
    )
    yield number(
        PanelSpec("At work", "Runs that are running or stopping.", "none", 4, 9),
        Query(f"sum(run:dist_train_active:max{{{OF_RUNS}}}) or vector(0)", "runs"),
    )
    yield number(
        PanelSpec("Firing alerts", "Currently firing alerts of these runs.", "none", 4, 9),
        Query(f'count(ALERTS{{{OF_RUNS}, alertstate="firing"}}) or vector(0)', "alerts"),
        "green",
        (1, RED),
    )


def _learning() -> Panels:
    yield from_zero(
        PanelSpec(
            "Accuracy",
            "Share of correctly classified samples, by run and split.",
            "percentunit",
            12,
            11,
            "DistTrainAccuracyFalling",
        ),
        Query(_by_split("dist_train_accuracy_ratio"), f"{KIND} {{{{split}}}}"),
    ).max(1)
    loss = PanelSpec("Loss", "Mean loss, by run and split.", "none", 12, 11, "DistTrainNotFinite")
    yield logarithmic(curves(loss, Query(_by_split("dist_train_loss"), f"{KIND} {{{{split}}}}")))
    yield bars(
        PanelSpec(
            "Best accuracy",
            "On the test split: the large batch is less accurate, and noise should close the gap.",
            "percentunit",
            8,
            10,
        ),
        Query(_last_of("dist_train_best_accuracy_ratio"), KIND),
    ).max(1)
    yield bars(
        PanelSpec("Epochs done", "Compare accuracies at equal epochs.", "none", 8, 10),
        Query(_last_of("dist_train_epoch"), KIND),
    )
    yield bars(
        PanelSpec(
            "Distance from the start",
            "How far the weights have moved; with large batches they stay nearer.",
            "none",
            8,
            10,
        ),
        Query(_last_of("dist_train_distance_from_initial"), KIND),
    )
    for title, description, metric in (
        ("Noise amplitude", "Of the weight noise in force; 0 without noise.", "dist_train_noise_amplitude"),
        ("Learning rate", "Of the latest step.", "dist_train_learning_rate"),
        ("Gradient norm", "Euclidean norm of the global gradient before clipping.", "dist_train_gradient_norm"),
    ):
        yield curves(PanelSpec(title, description, "none"), Query(_of(metric), KIND))


def _by_step() -> Panels:
    for title, description, unit, expression in (
        ("Accuracy", "Share of correctly classified samples", "percentunit", _by_split("dist_train_accuracy_ratio")),
        ("Loss", "Mean loss", "none", _by_split("dist_train_loss")),
        ("Gradient norm", "Euclidean norm of the global gradient", "none", _of("dist_train_gradient_norm")),
        ("Distance from the start", "Of the clean weights", "none", _of("dist_train_distance_from_initial")),
    ):
        spec = PanelSpec(f"{title} by ${{x:text}}", f"{description}, by run.", unit, 12, 11)
        x = f"0 * ({expression}) + on (run, run_id) group_left () max by (run, run_id) ($x{{{OF_RUNS}}})"
        panel = curves_over(x, "${x:text}", spec, Query(expression, KIND), _LABELS)
        yield logarithmic(panel) if title == "Loss" else panel


def _cost() -> Panels:
    yield from_zero(
        PanelSpec("Samples per second", "All ranks of a run together.", "short", 8, 9, "DistTrainThroughputDown"),
        Query(_of("dist_train_samples_per_second"), KIND),
    )
    p95 = f"run:dist_train_step_duration_seconds:p95_rate5m{{{OF_RUNS}}}"
    yield from_zero(
        PanelSpec(
            "Duration of a step, 95 %",
            "95 % of the steps of the last five minutes were no longer.",
            "s",
            8,
            9,
            "DistTrainStalled",
        ),
        Query(_with_kind(p95), KIND),
    )
    yield from_zero(
        PanelSpec(
            "Share of the step spent waiting",
            "Waiting for the other ranks' gradients.",
            "percentunit",
            8,
            9,
            "DistTrainRankSlow",
        ),
        Query(
            f'run_part:dist_train_step_part_duration_seconds:share_rate5m{{{OF_RUNS}, part="allreduce_wait"}}',
            "{{run}} {{run_id}}",
        ),
    )
    for title, description, unit, expression in (
        (
            "Progress",
            "Samples used, as a share of the planned ones.",
            "percentunit",
            f"run:dist_train_progress:ratio{{{OF_RUNS}}}",
        ),
        (
            "Time left",
            "Until the last step, at the current pace.",
            "s",
            f"max by (run, run_id) (dist_train_time_left_seconds{{{OF_RUNS}}})",
        ),
        ("Ranks", "Ranks that train together.", "none", f"max by (run, run_id) (dist_train_world_size{{{OF_RUNS}}})"),
        (
            "Requeues",
            "How often Slurm requeued the run.",
            "none",
            f"max by (run, run_id) (dist_train_requeues_total{{{OF_RUNS}}})",
        ),
    ):
        yield bars(PanelSpec(title, description, unit, 6), Query(expression, "{{run}} {{run_id}}"))
