"""The dashboard of one run in depth."""

from __future__ import annotations

from grafana_foundation_sdk.builders import dashboard, stat
from grafana_foundation_sdk.models import common as common_model
from grafana_foundation_sdk.models import dashboard as model

from dashboard_generator.frame import add_sections, event, frame, one_choice, source_choice, split_choice
from dashboard_generator.links import ONE_RUN
from dashboard_generator.panels import (
    BLUE,
    GREEN,
    OF_RUN,
    RED,
    YELLOW,
    Panels,
    PanelSpec,
    Query,
    curves,
    from_zero,
    limited,
    logarithmic,
    number,
    stacked,
    states,
)

STATES = (
    (0, "running", GREEN),
    (1, "stopping", YELLOW),
    (2, "stopped", YELLOW),
    (3, "finished", BLUE),
    (4, "failed", RED),
)


def run_ids(comparison: str) -> str:
    """Return the query of the ids of the selected run ("=") or runs ("=~")."""
    return f'label_values(dist_train_state{{run{comparison}"$run"}}, run_id)'


def _of(metric: str, *labels: str) -> str:
    """Return the run's series of a metric, one for each value of `labels`, independent of the launch."""
    return f"max by ({', '.join(('run', 'run_id', *labels))}) ({metric}{{{OF_RUN}}})"


RANK = "rank {{rank}}, {{node}}"
_FEW = 5


def _over_ranks(metric: str, words: str = "", matchers: str = "") -> tuple[Query, ...]:
    """Return four lines for any number of ranks: minimum, median, 95 % quantile and maximum over ranks."""
    of_ranks = f"max by (run, run_id, rank) ({metric}{{{OF_RUN}{matchers}}})"
    quantiles = {"min": "0", "median": "0.5", "95 %": "0.95", "max": "1"}
    return tuple(
        Query(f"quantile by (run, run_id) ({share}, {of_ranks})", f"{words}{name}") for name, share in quantiles.items()
    )


def _ranks_with_most(metric: str, legend: str = RANK) -> Query:
    """Return the lines of the few ranks with the largest last values in the time range."""
    selector = f"{metric}{{{OF_RUN}}}"
    # A rank can have several lines, and none any more at the end of the time range.
    by_rank = f"max by (run, run_id, rank) (last_over_time({selector}[$__range] @ end()))"
    return Query(f"{selector} and on (run, run_id, rank) topk by (run, run_id) ({_FEW}, {by_rank})", legend)


def _by_split(metric: str) -> str:
    return f'max by (run, run_id, split) ({metric}{{{OF_RUN}, split=~"$split"}})'


def state_number(matchers: str) -> str:
    """Return an expression whose value is the index in `STATES` of the state of a run that `matchers` select."""
    return " or ".join(
        f'{value} + 0 * (max by (run, run_id) (dist_train_state{{{matchers}, state="{word}"}}) > 0)'
        for value, word, _ in STATES
    )


def build() -> model.Dashboard:
    """Return the dashboard."""
    built = frame(
        ONE_RUN, "dist-train: one run", "One run in depth: progress, learning, speed, checkpoints, events, memory."
    )
    built.with_variable(source_choice())
    built.with_variable(one_choice("run", "Run", "The run to show", "label_values(dist_train_state, run)"))
    built.with_variable(one_choice("run_id", "Run id", "Tells runs of one name apart", run_ids("=")))
    built.with_variable(split_choice(OF_RUN))
    _events(built)
    sections = {
        "Now": _status(),
        "Learning": _learning(),
        "Speed": _speed(),
        "Checkpoints": _checkpoints(),
        "Events": _incidents(),
        "Memory, devices and limits": _memory(),
    }
    return add_sections(built, sections)


def _events(built: dashboard.Dashboard) -> None:
    for name, colour, metric in (
        ("Checkpoints", BLUE, "dist_train_checkpoints_total"),
        ("Signals", YELLOW, "dist_train_signals_total"),
        ("Failed checkpoints", RED, "dist_train_checkpoint_failures_total"),
    ):
        built.annotation(event(name, colour, f"{_of_changes(metric)} > 0", name))
    # A launch is first scraped when it is set up, long after it began.
    metric = "dist_train_launch_timestamp_seconds"
    before = f"max by (run, run_id) (last_over_time({metric}{{{OF_RUN}}}[1d] offset $__interval))"
    launch = f"{_of(metric)} > on (run, run_id) ({before} or on (run, run_id) 0 * {_of(metric)})"
    built.annotation(event("Launches", GREEN, launch, "Launch"))


def _of_changes(metric: str) -> str:
    # $__interval would miss changes between its last sample and the next interval's first one.
    return f"max by (run, run_id) (changes({metric}{{{OF_RUN}}}[$__rate_interval]))"


def _latest(title: str, description: str, unit: str, metric: str) -> stat.Panel:
    return number(PanelSpec(title, description, unit, 3, 4), Query(_of(metric), "{{run}}"))


def _status() -> Panels:
    yield states(
        PanelSpec("State", "The state of the run over time; gaps are times without an exporter.", "none", 6, 4),
        Query(state_number(OF_RUN), "{{run}}"),
        STATES,
    )
    launches = f"last_over_time(dist_train_launch_timestamp_seconds{{{OF_RUN}}}[$__range] @ end())"
    latest = f"topk by (run, run_id) (1, max by (run, run_id, slurm_job, node) ({launches}))"
    yield number(
        PanelSpec("Job and node", "The Slurm job, if any, and the node of rank 0, of the latest launch.", "none", 3, 4),
        Query(latest, "{{slurm_job}} {{node}}"),
    ).text_mode(common_model.BigValueTextMode.NAME)
    for title, description, unit, metric in (
        ("Progress", "Samples used, as a share of the planned ones.", "percentunit", "run:dist_train_progress:ratio"),
        ("Epoch", "Epochs done, with their fraction.", "none", "dist_train_epoch"),
        ("Time left", "Until the last step, at the current pace.", "s", "dist_train_time_left_seconds"),
        ("Best accuracy", "Best accuracy on the test split so far.", "percentunit", "dist_train_best_accuracy_ratio"),
    ):
        yield _latest(title, description, unit, metric)
    yield number(
        PanelSpec("Firing alerts", "Currently firing alerts of this run.", "none", 3, 4),
        Query(f'count(ALERTS{{{OF_RUN}, alertstate="firing"}}) or vector(0)', "alerts"),
        GREEN,
        (1, RED),
    )
    # Also of a run that is lost, but not once its target file says how it ended.
    progress, heard, ended = (
        f"last_over_time({metric}{{{OF_RUN}}}[$__range])"
        for metric in (
            "dist_train_last_progress_timestamp_seconds",
            "run:dist_train_heard_timestamp_seconds:max",
            "run:dist_train_ended_timestamp_seconds:max",
        )
    )
    yield number(
        PanelSpec(
            "Since the last step",
            "If it is longer than the time on the right, the run has stalled, or is lost.",
            "s",
            3,
            4,
            "DistTrainStalled",
        ),
        # Not red from some fixed time on: what is too long depends on the run's own steps.
        Query(f"time() - max by (run, run_id) ({progress}) unless on (run, run_id) {ended} > {heard}", "{{run}}"),
    )
    for title, description, unit, metric in (
        (
            "Stalled after",
            "Time without a step after which the run has stalled.",
            "s",
            "dist_train_stall_timeout_seconds",
        ),
        ("Ranks", "Ranks that train together.", "none", "dist_train_world_size"),
        ("Micro-batches", "Micro-batches of one step, over all ranks.", "none", "dist_train_micro_batches"),
        ("Micro-batch", "Samples of one micro-batch.", "none", "dist_train_micro_batch_size"),
        ("Epochs planned", "Epochs of the whole run.", "none", "dist_train_planned_epochs"),
        ("Samples", "Training samples used since the run's first step.", "short", "dist_train_samples"),
        ("Samples planned", "Training samples of the whole run.", "short", "dist_train_planned_samples"),
    ):
        yield _latest(title, description, unit, metric)


def _learning() -> Panels:
    loss = PanelSpec(
        "Loss", "Mean loss by split; `batch` is measured at the perturbed weights.", "none", 12, 9, "DistTrainNotFinite"
    )
    accuracy = PanelSpec(
        "Accuracy",
        "Share of correctly classified samples, by split, and the best on the test split.",
        "percentunit",
        12,
        9,
        "DistTrainAccuracyFalling",
    )
    yield logarithmic(curves(loss, Query(_by_split("dist_train_loss"), "{{split}}")))
    yield from_zero(
        accuracy,
        Query(_by_split("dist_train_accuracy_ratio"), "{{split}}"),
        Query(_of("dist_train_best_accuracy_ratio"), "best"),
    ).max(1)
    for title, description, metric in (
        ("Learning rate", "Of the latest step.", "dist_train_learning_rate"),
        ("Noise amplitude", "Of the weight noise in force.", "dist_train_noise_amplitude"),
        ("Gradient norm", "Euclidean norm of the global gradient before clipping.", "dist_train_gradient_norm"),
        ("Weight norm", "Euclidean norm of the clean weights.", "dist_train_weight_norm"),
        (
            "Distance from the start",
            "Euclidean distance of the clean weights from the initial ones.",
            "dist_train_distance_from_initial",
        ),
    ):
        yield curves(PanelSpec(title, description, "none"), Query(_of(metric), "{{run}}"))
    yield from_zero(
        PanelSpec("Steps", "Optimizer updates done, planned, and in the last checkpoint.", "none"),
        Query(_of("dist_train_step"), "done"),
        Query(_of("dist_train_planned_steps"), "planned"),
        Query(_of("dist_train_checkpoint_step"), "in the last checkpoint"),
    )


def _speed() -> Panels:
    yield from_zero(
        PanelSpec(
            "Samples per second",
            "All ranks together, and the run's mean of the last hour.",
            "short",
            8,
            9,
            "DistTrainThroughputDown",
        ),
        Query(_of("dist_train_samples_per_second"), "now"),
        Query(f"run:dist_train_samples_per_second:avg1h{{{OF_RUN}}}", "mean of the last hour"),
    )
    of_rank_0 = f'dist_train_step_duration_seconds_bucket{{{OF_RUN}, rank=~"0|"}}'
    buckets = f"sum by (le) (rate({of_rank_0}[$__rate_interval]))"
    yield from_zero(
        PanelSpec("Duration of a step", "Quantiles of rank 0; all ranks step together.", "s", 8, 9, "DistTrainStalled"),
        *(
            Query(f"histogram_quantile({share}, {buckets})", words)
            for share, words in ((0.5, "median"), (0.95, "95 %"), (0.99, "99 %"))
        ),
    )
    parts = f"sum by (part) (rate(dist_train_step_part_duration_seconds_sum{{{OF_RUN}}}[$__rate_interval]))"
    steps = f"sum(rate(dist_train_step_duration_seconds_count{{{OF_RUN}}}[$__rate_interval]))"
    yield stacked(
        PanelSpec(
            "Parts of the step",
            "Mean time of each part of a step. The rest of the step's duration belongs to none of them.",
            "s",
            8,
            9,
            "DistTrainThroughputDown",
        ),
        Query(f"{parts} / on () group_left () {steps}", "{{part}}"),
    )
    yield from_zero(
        PanelSpec("Time at work, over the ranks", "Time of a step outside of allreduces.", "s", 6),
        *_over_ranks("dist_train_rank_busy_seconds"),
    )
    yield from_zero(
        PanelSpec(
            "Time in allreduces, over the ranks",
            "Time of a step spent in allreduces: for the sum itself, and waiting for slower ranks.",
            "s",
            6,
            alert="DistTrainThroughputDown",
        ),
        *_over_ranks("dist_train_rank_wait_seconds"),
        Query(_of("dist_train_allreduce_seconds"), "the sum itself"),
    )
    yield from_zero(
        PanelSpec("Seconds for a micro-batch, over the ranks", "Mean of the last five minutes.", "s", 6),
        *_over_ranks("run_rank:dist_train_rank_busy_seconds:per_micro_batch_avg5m"),
    )
    yield from_zero(
        PanelSpec(
            "Micro-batches, over the ranks",
            "Micro-batches of a step per rank: equal, or by the rank's speed if batch.dealing is measured.",
            "none",
            6,
        ),
        *_over_ranks("dist_train_rank_micro_batches"),
    )
    yield limited(
        curves(
            PanelSpec(
                "Slowest ranks: time for a micro-batch",
                f"Of the {_FEW} ranks slowest at the end, over the median of the others; 1 means like the others.",
                "none",
                12,
                8,
                "DistTrainRankSlow",
            ),
            _ranks_with_most("run_rank:dist_train_rank_busy_ratio:avg5m"),
        ),
        GREEN,
        (1.3, RED),
    )
    yield curves(
        PanelSpec("Slowest rank: how slow", "Its busy time over the median of the others.", "none", 6),
        Query(_of("dist_train_slowest_rank_ratio"), "{{run}}"),
    )
    yield curves(
        PanelSpec("Slowest rank: which", "Its number. A constant line is one slow rank; a comb is chance.", "none", 6),
        Query(_of("dist_train_slowest_rank"), "{{run}}"),
    )


def _checkpoints() -> Panels:
    yield from_zero(
        PanelSpec(
            "Age of the last checkpoint",
            "The work that is lost if the run fails now: since the last checkpoint, or the launch if that is "
            "later. The alert fires above the second line.",
            "s",
            6,
            8,
            "DistTrainCheckpointOld",
        ),
        Query(f"run:dist_train_checkpoint_age_seconds:min{{{OF_RUN}}}", "{{run}}"),
        Query(f"run:dist_train_checkpoint_age_seconds:limit{{{OF_RUN}}}", "alert"),
    )
    yield from_zero(
        PanelSpec("Size", "Of the latest checkpoint.", "bytes", 6),
        Query(_of("dist_train_checkpoint_size_bytes"), "{{run}}"),
    )
    yield from_zero(
        PanelSpec("Time to write", "Time until it was durable, and how long of it training stalled.", "s", 6),
        Query(_of("dist_train_checkpoint_duration_seconds"), "until durable"),
        Query(_of("dist_train_checkpoint_stall_seconds"), "training stalled"),
    )
    yield number(
        PanelSpec("Written", "Checkpoints written, over all launches.", "none", 3, 8),
        Query(_of("dist_train_checkpoints_total"), "{{run}}"),
    )
    yield number(
        PanelSpec(
            "Failed checkpoints",
            "Checkpoints that could not be written, over all launches.",
            "none",
            3,
            8,
            "DistTrainCheckpointFailing",
        ),
        Query(_of("dist_train_checkpoint_failures_total"), "{{run}}"),
        GREEN,
        (1, RED),
    )


def _incidents() -> Panels:
    for title, description, metric, alert, limit, colour in (
        ("Resumes", "Launches that resumed from a checkpoint.", "resumes", None, 1, BLUE),
        ("Requeues", "How often Slurm requeued the run.", "requeues", "DistTrainRequeued", 4, YELLOW),
        ("Signals", "Signals that asked the run to stop.", "signals", None, 1, BLUE),
        (
            "Exporter restarts",
            "Restarts of the exporter's process after it died, in this launch.",
            "exporter_restarts",
            None,
            1,
            YELLOW,
        ),
        (
            "Disagreements",
            "How often the ranks' weights or noise differed.",
            "disagreements",
            "DistTrainDisagreement",
            1,
            RED,
        ),
        (
            "Not finite",
            "Losses, gradients or last evaluations that were NaN or infinite.",
            "not_finite",
            "DistTrainNotFinite",
            1,
            RED,
        ),
    ):
        yield number(
            PanelSpec(title, description, "none", 3, 7, alert),
            Query(_of(f"dist_train_{metric}_total"), "{{run}}"),
            GREEN,
            (limit, colour),
        )
    yield from_zero(
        PanelSpec(
            "Events by kind",
            "Events by kind, over all launches; and the generations of ranks in this launch.",
            "none",
            6,
            7,
        ),
        Query(f"{_of('dist_train_events_total', 'event')} > 0", "{{event}}"),
        Query(_of("dist_train_generation"), "generations of ranks"),
    )


def _memory() -> Panels:
    yield from_zero(
        PanelSpec("Resident memory, over the ranks", "Of each rank's process.", "bytes"),
        *_over_ranks("dist_train_rank_resident_memory_bytes"),
    )
    yield from_zero(
        PanelSpec(
            "Device memory, over the ranks",
            "Held by each rank; the peak of any rank, and the most that all processes of a device hold. No data "
            "without a device.",
            "bytes",
            alert="DistTrainDeviceMemory",
        ),
        *_over_ranks("dist_train_rank_device_memory_bytes"),
        Query(_of("dist_train_rank_device_memory_peak_bytes"), "peak"),
        Query(_of("dist_train_rank_device_memory_used_bytes"), "max, all processes"),
        Query(f"min by (run, run_id) (dist_train_rank_device_memory_limit_bytes{{{OF_RUN}}})", "smallest device"),
    )
    yield from_zero(
        PanelSpec(
            "Device utilization, over the ranks",
            "Share of time that the device was busy. No data without NVML.",
            "percentunit",
        ),
        *_over_ranks("dist_train_rank_device_utilization_ratio"),
    ).max(1)
    yield from_zero(
        PanelSpec("Device power, over the ranks", "Power draw of each rank's device. No data without NVML.", "watt"),
        *_over_ranks("dist_train_rank_device_power_watts"),
    )
    yield from_zero(
        PanelSpec(
            "Device clocks, over the ranks",
            "Of the cores and of the memory. No data without NVML.",
            "hertz",
            alert="DistTrainRankSlow",
        ),
        *(
            query
            for clock in ("core", "memory")
            for query in _over_ranks("dist_train_rank_device_clock_hertz", f"{clock}, ", f', clock="{clock}"')[::3]
        ),
    )
    yield from_zero(
        PanelSpec(
            "Devices that are clocked down",
            "Ranks whose device is throttled by its power limit, its temperature, or its hardware.",
            "none",
            alert="DistTrainRankSlow",
        ),
        Query(
            f"sum by (run, run_id, reason) ({_of('dist_train_rank_device_throttled', 'rank', 'reason')})", "{{reason}}"
        ),
    )
    yield from_zero(
        PanelSpec(
            "Device memory errors",
            f"ECC errors since the driver was loaded, of the {_FEW} ranks with most. Uncorrected ones end a run.",
            "none",
        ),
        _ranks_with_most("dist_train_rank_device_memory_errors_total", f"{RANK}: {{{{kind}}}}"),
    )
    yield from_zero(
        PanelSpec(
            "Disk space", "Free space on the disk of the run directory.", "bytes", alert="DistTrainDiskNearlyFull"
        ),
        Query(_of("dist_train_disk_free_bytes"), "free"),
        Query(_of("dist_train_checkpoint_size_bytes"), "a checkpoint"),
    )
    yield from_zero(
        PanelSpec(
            "Time to the limit",
            "Until the batch system ends or requeues the job; compare it with the time left. No data without a limit.",
            "s",
            alert="DistTrainTimeLimitNear",
        ),
        Query(f"{_of('dist_train_time_limit_timestamp_seconds', 'then')} - time()", "until the limit, then: {{then}}"),
    )
