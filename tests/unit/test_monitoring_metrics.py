from __future__ import annotations

import math
import time
from dataclasses import replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import pytest

from benchmarks.metrics_table import metrics_markdown, with_table
from dist_train.monitoring.prometheus.board import STEP_SECONDS, Board, bounds_around, is_stalled
from dist_train.monitoring.prometheus.messages import Begin, Progress, ServingPlan
from dist_train.monitoring.prometheus.metrics import METRICS, MetricsPage
from dist_train.outcome import UsageError
from dist_train.rundir.epochs import Stage
from dist_train.rundir.records import EVENTS, Detail, EvaluationRecord, EventRecord, RankMeasurement
from tests.raising import raises
from tests.unit.exporting import FACTS, GROWING, ON_A_DEVICE, OUTCOME, measurement, read, train

ROOT = Path(__file__).parents[2]


def page_of(board: Board) -> str:
    return MetricsPage(board).render().decode()


def values_of(board: Board) -> dict[tuple[str, tuple[str, ...]], float]:
    return read(page_of(board))


def busy_board() -> Board:
    board = Board(FACTS, {"checkpoint": 5, "requeued": 1})
    board.recall([EvaluationRecord(7, 1.0, "test", 0.7, 0.88, 10_000, 1.0)])
    board.apply(EventRecord(14, "resumed", 1.0, {}))
    board.apply(train(20))
    board.apply(EvaluationRecord(21, 3.0, "test", 0.5, 0.87, 10_000, 1.0))
    board.apply(EvaluationRecord(28, 4.0, "train", 0.4, 0.9, 60_000, 3.0))
    details: dict[str, Detail] = {"path": "step-28", "bytes": 1234, "seconds": 2.5, "stall_seconds": 0.125}
    board.apply(EventRecord(28, "checkpoint", 1_800_000_000.0, details))
    board.apply(measurement(28, seconds=0.3))
    board.apply(measurement(29, seconds=3.0))
    board.apply(Progress(29))
    return board


def test_a_page_reads_back_what_was_recorded() -> None:
    began = time.time()
    values = values_of(busy_board())
    values.pop(("dist_train_time_left_seconds", ()), None)
    assert began <= values.pop(("dist_train_last_progress_timestamp_seconds", ())) <= time.time()
    info = next(key for key in values if key[0] == "dist_train_run_info")
    expected = ["gloo", "fashion-mnist", "8192", "256", "vgg9", "smoothout 0.01", "0.1.0+abc", 'a "run"\\']
    expected += ["0123456789abcdef", "4711"]
    assert list(info[1]) == expected, "in the order of the labels' names"
    events = {key[1][0]: value for key, value in values.items() if key[0] == "dist_train_events_total"}
    none = dict.fromkeys((*EVENTS, "exporter_restarted"), 0)
    assert events == {**none, "resumed": 1, "requeued": 1, "checkpoint": 6}
    states = {key[1][0]: value for key, value in values.items() if key[0] == "dist_train_state"}
    assert states == {"running": 1, "stopping": 0, "stopped": 0, "finished": 0, "failed": 0}
    outcomes = {key[1][0]: value for key, value in values.items() if key[0] == "dist_train_outcome"}
    assert outcomes == {"finished": 0, "stopped": 0, "failed": 0, "diverged": 0, "killed": 0}
    before = {key[1][0]: value for key, value in values.items() if key[0] == "dist_train_events_before_launch"}
    assert before == {**dict.fromkeys(events, 0), "requeued": 1, "checkpoint": 5}
    left_out = {"dist_train_run_info", "dist_train_state", "dist_train_outcome"}
    left_out |= {"dist_train_events_total", "dist_train_events_before_launch"}
    rest = {key: value for key, value in values.items() if key[0] not in left_out and "_duration_" not in key[0]}
    assert rest == {
        ("dist_train_step", ()): 29,
        ("dist_train_planned_steps", ()): 210,
        ("dist_train_epoch", ()): 29 / 7,
        ("dist_train_planned_epochs", ()): 30,
        ("dist_train_samples", ()): 29 * 8192,
        ("dist_train_planned_samples", ()): 210 * 8192,
        ("dist_train_launch_timestamp_seconds", ()): 1_700_000_000.5,
        ("dist_train_stall_timeout_seconds", ()): 120,
        ("dist_train_loss", ("batch",)): 0.4321,
        ("dist_train_loss", ("test",)): 0.5,
        ("dist_train_loss", ("train",)): 0.4,
        ("dist_train_accuracy_ratio", ("batch",)): 0.85,
        ("dist_train_accuracy_ratio", ("test",)): 0.87,
        ("dist_train_accuracy_ratio", ("train",)): 0.9,
        ("dist_train_best_accuracy_ratio", ()): 0.88,
        ("dist_train_learning_rate", ()): 0.4,
        ("dist_train_noise_amplitude", ()): 0.0123,
        ("dist_train_gradient_norm", ()): 1.5,
        ("dist_train_weight_norm", ()): 12.5,
        ("dist_train_distance_from_initial", ()): 3.25,
        ("dist_train_samples_per_second", ()): 16_384,
        ("dist_train_world_size", ()): 2,
        ("dist_train_micro_batches", ()): 32,
        ("dist_train_micro_batch_size", ()): 256,
        ("dist_train_rank_micro_batches", ("node1", "0")): 16,
        ("dist_train_rank_micro_batches", ("node2", "1")): 16,
        ("dist_train_rank_busy_seconds", ("node1", "0")): 0.25,
        ("dist_train_rank_busy_seconds", ("node2", "1")): 0.3,
        ("dist_train_rank_wait_seconds", ("node1", "0")): 0.05,
        ("dist_train_rank_wait_seconds", ("node2", "1")): 0.05,
        ("dist_train_allreduce_seconds", ()): 0.05,
        ("dist_train_rank_resident_memory_bytes", ("node1", "0")): 1e9,
        ("dist_train_rank_resident_memory_bytes", ("node2", "1")): 1e9 + 1,
        ("dist_train_slowest_rank", ()): 1,
        ("dist_train_slowest_rank_ratio", ()): pytest.approx(0.3 / 0.25),
        ("dist_train_rank_busy_ratio", ("node1", "0")): pytest.approx(0.25 / 0.3),
        ("dist_train_rank_busy_ratio", ("node2", "1")): pytest.approx(0.3 / 0.25),
        ("dist_train_checkpoint_timestamp_seconds", ()): 1_800_000_000,
        ("dist_train_checkpoint_step", ()): 28,
        ("dist_train_checkpoint_interval_steps", ()): 7,
        ("dist_train_checkpoint_size_bytes", ()): 1234,
        ("dist_train_checkpoint_stall_seconds", ()): 0.125,
        ("dist_train_checkpoints_total", ()): 6,
        ("dist_train_checkpoint_failures_total", ()): 0,
        ("dist_train_resumes_total", ()): 1,
        ("dist_train_requeues_total", ()): 1,
        ("dist_train_signals_total", ()): 0,
        ("dist_train_exporter_restarts_total", ()): 0,
        ("dist_train_disagreements_total", ()): 0,
        ("dist_train_generation", ()): 1,
        ("dist_train_not_finite_total", ()): 0,
        ("dist_train_resident_memory_bytes", ()): 1e9,
    }
    assert values["dist_train_checkpoint_duration_seconds", ()] == 2.5


def test_histograms_count_steps_and_their_parts() -> None:
    values = values_of(busy_board())
    steps = {key[1][0]: value for key, value in values.items() if key[0] == "dist_train_step_duration_seconds_bucket"}
    assert (steps["0.25"], steps["0.5"], steps["2.5"], steps["5.0"], steps["+Inf"]) == (0, 1, 1, 2, 2)
    assert values["dist_train_step_duration_seconds_count", ()] == 2
    assert values["dist_train_step_duration_seconds_sum", ()] == 3.3
    name = "dist_train_step_part_duration_seconds"
    assert values[f"{name}_sum", ("forward_backward",)] == 0.4
    assert values[f"{name}_count", ("data_wait",)] == 2
    assert values[f"{name}_bucket", ("0.001", "data_wait")] == 0
    assert values[f"{name}_bucket", ("0.005", "data_wait")] == 2
    assert values[f"{name}_bucket", ("0.0001", "checkpoint_stall")] == 2


def test_the_buckets_of_a_run_are_around_its_own_step() -> None:
    board = Board(FACTS)
    steps = [20.0, *(0.1 + 0.0002 * place for place in range(100))]
    for place, seconds in enumerate(steps):
        board.apply(measurement(place, seconds=seconds))
    buckets = board.snapshot().step_seconds
    assert sum(buckets.counts) == len(steps)
    assert buckets.total == pytest.approx(sum(steps))
    place = next(place for place, count in enumerate(accumulate(buckets.counts)) if count >= 0.95 * len(steps))
    assert buckets.bounds[place - 1] < sorted(steps)[95] <= buckets.bounds[place] < 1.11 * buckets.bounds[place - 1]
    assert set(STEP_SECONDS) < set(buckets.bounds)


@pytest.mark.parametrize("seconds", [0.0, 1e-4, 0.1, 1e4])
def test_bounds_are_of_one_grid_for_all_runs(seconds: float) -> None:
    bounds, near = bounds_around(seconds), bounds_around(1.05 * seconds)
    assert list(bounds) == sorted(set(bounds))
    assert len(bounds) < 45
    assert len(set(bounds) ^ set(near)) <= 4


@pytest.mark.parametrize(
    ("busy", "micro_batches", "ratios"),
    [
        ((0.2, 0.28), (1, 1), {"0": 0.2 / 0.28, "1": 1.4}),
        ((0.2, 0.4), (1, 2), {"0": 1.0, "1": 1.0}),
        ((0.2, 0.1, 0.3), (1, 1, 1), {"0": 1.0, "1": 0.4, "2": 2.0}),
        ((1.0, 1.0, 2.0, 2.0, 1.0), (1, 1, 1, 1, 1), {"0": 2 / 3, "1": 2 / 3, "2": 2.0, "3": 2.0, "4": 2 / 3}),
        ((0.2, 0.3, 0.0), (1, 1, 0), {"0": 2 / 3, "1": 1.5}),
        ((0.2,), (1,), {}),
    ],
)
def test_a_rank_is_compared_with_the_median_of_the_others(
    busy: tuple[float, ...], micro_batches: tuple[int, ...], ratios: dict[str, float]
) -> None:
    nodes = tuple(f"n{rank}" for rank in range(len(busy)))
    board = Board(replace(FACTS, world_size=len(busy), nodes=nodes))
    nan = math.nan
    ranks = tuple(
        RankMeasurement(seconds, 0.0, 1e9, nan, nan, nan, count)
        for seconds, count in zip(busy, micro_batches, strict=True)
    )
    board.apply(replace(measurement(1), ranks=ranks))
    shown = {labels[1]: value for (name, labels), value in values_of(board).items() if name.endswith("busy_ratio")}
    assert shown == pytest.approx(ratios)


def test_a_run_stands_still_after_ten_of_its_steps_or_two_minutes() -> None:
    board = Board(FACTS)
    began = board.snapshot().last_progress
    assert not is_stalled(board.snapshot(), began + 599)
    assert is_stalled(board.snapshot(), began + 601), "the first step may compile"
    board.apply(measurement(15, seconds=1.0))
    assert not is_stalled(board.snapshot(), began + 119)
    assert is_stalled(board.snapshot(), began + 121)
    board.apply(measurement(16, seconds=99.0))
    assert not is_stalled(board.snapshot(), began + 499)
    assert is_stalled(board.snapshot(), began + 501)
    board.apply(OUTCOME)
    assert not is_stalled(board.snapshot(), began + 1e6)


def test_a_run_that_waits_for_its_checkpoint_has_not_stalled() -> None:
    board = Board(FACTS)

    def patience() -> float:
        return values_of(board)["dist_train_stall_timeout_seconds", ()]

    board.apply(measurement(15, seconds=1.0))
    assert patience() == 120
    board.apply(Progress(FACTS.total_steps))
    assert patience() == 600, "the last checkpoint is written after the last step"
    board.apply(EventRecord(200, "checkpoint", 1.0, {"seconds": 480.0}))
    assert patience() == 960


def test_a_larger_batch_has_longer_steps_until_it_stands_still() -> None:
    stages = (Stage(0, 0, 256, 100), Stage(1, 100, 16_384, 2), Stage(2, 102, 256, 100))
    board = Board(replace(FACTS, start_step=0, stages=stages))

    def patience() -> float:
        return values_of(board)["dist_train_stall_timeout_seconds", ()]

    assert patience() == 600
    for step in range(1, 101):
        assert board.snapshot().step == step - 1
        board.apply(Progress(step))
        board.apply(measurement(step, seconds=5.0))
        assert patience() == pytest.approx(120 if step < 100 else 3200)
    began = board.snapshot().last_progress
    assert not is_stalled(board.snapshot(), began + 3199)
    assert is_stalled(board.snapshot(), began + 3201)
    board.apply(Progress(101))
    board.apply(measurement(101, seconds=320.0))
    assert patience() == pytest.approx(3200)
    board.apply(Progress(102))
    board.apply(measurement(102, seconds=320.0))
    assert patience() == pytest.approx(120)


def test_a_rank_other_than_0_shows_its_own_and_the_run_it_belongs_to() -> None:
    board = Board(replace(FACTS, rank=3))
    own = replace(measurement(1), ranks=(RankMeasurement(0.2, 0.1, 7e8, 1e9, 2e9, 0.75),))
    board.apply(own)
    values = values_of(board)
    assert {key[0] for key in values if "duration" not in key[0]} == {
        "dist_train_run_info",
        "dist_train_resident_memory_bytes",
        "dist_train_device_memory_bytes",
        "dist_train_device_utilization_ratio",
    }
    assert values["dist_train_resident_memory_bytes", ()] == 7e8
    assert values["dist_train_device_memory_bytes", ()] == 1e9
    assert values["dist_train_device_utilization_ratio", ()] == 0.75
    assert values["dist_train_step_duration_seconds_count", ()] == 1


def test_measurements_of_lost_ranks_are_not_shown_on_the_nodes_of_those_that_are_left() -> None:
    board = Board(replace(FACTS, world_size=3, nodes=("n0", "n1", "n2")))
    board.apply(measurement(20, ranks=3))
    left = replace(FACTS, world_size=2, nodes=("n0", "n2"), generation=2)
    board.apply(Begin(ServingPlan("", 0), left, {}))
    assert not [labels for name, labels in values_of(board) if "_rank_" in name or "slowest" in name]
    board.apply(measurement(30, ranks=2))
    busy = {labels: value for (name, labels), value in values_of(board).items() if name.endswith("_rank_busy_seconds")}
    assert busy == {("n0", "0"): 0.25, ("n2", "1"): 0.3}


def test_what_nvml_tells_of_each_rank_s_device_is_shown_with_the_rank_s_own_node() -> None:
    board = Board(FACTS)
    silent = ON_A_DEVICE._replace(device_uncorrected_errors=math.nan, device_throttle_reasons=math.nan)
    board.apply(replace(measurement(1), ranks=(ON_A_DEVICE, silent)))
    name = "dist_train_rank_device"
    shown: dict[str, dict[tuple[str, ...], float]] = {"node1": {}, "node2": {}}
    for (metric, labels), value in values_of(board).items():
        if metric.startswith(name):
            node, rank = next(pair for pair in pairwise(labels) if pair[0] in shown)
            assert node == FACTS.nodes[int(rank)]
            shown[node][metric.removeprefix(name), *(label for label in labels if label not in (node, rank))] = value
    assert shown["node1"] == {
        ("_memory_bytes",): 7.123456789e10,
        ("_memory_peak_bytes",): 7.23456789e10,
        ("_utilization_ratio",): 0.987654321,
        ("_memory_used_bytes",): 7.4e10,
        ("_memory_limit_bytes",): 8.5e10,
        ("_power_watts",): 687.5,
        ("_clock_hertz", "core"): 1.98e9,
        ("_clock_hertz", "memory"): 2.619e9,
        ("_throttled", "power"): 1,
        ("_throttled", "thermal"): 1,
        ("_throttled", "hardware"): 0,
        ("_memory_errors_total", "corrected"): 3,
        ("_memory_errors_total", "uncorrected"): 0,
    }
    unknown = {key for key in shown["node1"] if key[0] == "_throttled" or "uncorrected" in key}
    assert shown["node2"] == {key: value for key, value in shown["node1"].items() if key not in unknown}


@pytest.mark.parametrize(("is_requeued", "then"), [(False, "end"), (True, "requeue")])
def test_the_time_limit_is_shown_with_what_follows_it(is_requeued: bool, then: str) -> None:
    board = Board(replace(FACTS, time_limit=2e9, is_requeued=is_requeued))
    limits = {labels: value for (name, labels), value in values_of(board).items() if "time_limit" in name}
    assert limits == {(then,): 2e9}


def test_time_left_is_the_pace_times_the_steps_left(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr("dist_train.monitoring.prometheus.board.time.monotonic", lambda: clock[0])
    board = Board(FACTS)
    board.apply(Progress(20))
    clock[0] += 0.2
    board.apply(Progress(30))
    left = values_of(board)["dist_train_time_left_seconds", ()]
    assert left == pytest.approx(180 * 0.02)


def test_time_left_outlasts_a_long_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr("dist_train.monitoring.prometheus.board.time.monotonic", lambda: clock[0])
    board = Board(replace(FACTS, start_step=0, total_steps=1_000))
    for step in range(1, 101):
        clock[0] += 5.0
        board.apply(Progress(step))
    for _ in range(120):
        clock[0] += 1.1
        board.apply(Progress(100))
    assert values_of(board)["dist_train_time_left_seconds", ()] == pytest.approx(900 * 5.0)
    clock[0] += 5.0
    board.apply(Progress(101))
    assert values_of(board)["dist_train_time_left_seconds", ()] < 2 * 899 * 5.0


def test_time_left_is_that_of_larger_batches_to_come(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr("dist_train.monitoring.prometheus.board.time.monotonic", lambda: clock[0])
    board = Board(replace(FACTS, start_step=0, total_steps=50, stages=GROWING))
    board.apply(Progress(10))
    clock[0] += 1.0
    board.apply(Progress(20))
    assert values_of(board)["dist_train_time_left_seconds", ()] == pytest.approx(20 * 0.1 + 10 * 1.6)


def test_no_time_is_left_of_a_run_that_has_stopped_early(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr("dist_train.monitoring.prometheus.board.time.monotonic", lambda: clock[0])
    board = Board(replace(FACTS, start_step=0))
    board.apply(Progress(10))
    clock[0] += 1.0
    board.apply(Progress(20))
    assert values_of(board)["dist_train_time_left_seconds", ()] == pytest.approx(19.0)
    board.apply(replace(OUTCOME, step=20))
    assert values_of(board)["dist_train_time_left_seconds", ()] == 0


def test_a_loss_that_is_not_finite_is_served_as_such() -> None:
    board = Board(FACTS)
    board.apply(replace(train(1), loss=math.nan, gradient_norm=math.inf, samples_per_second=-math.inf))
    values = values_of(board)
    assert math.isnan(values["dist_train_loss", ("batch",)])
    assert values["dist_train_gradient_norm", ()] == math.inf
    assert values["dist_train_samples_per_second", ()] == -math.inf


def test_the_state_follows_the_run() -> None:
    board = Board(FACTS)
    board.apply(EventRecord(20, "signal", 1.0, {}))
    assert values_of(board)["dist_train_state", ("stopping",)] == 1
    board.apply(replace(OUTCOME, state="failed"))
    values = values_of(board)
    assert (values["dist_train_state", ("stopping",)], values["dist_train_state", ("failed",)]) == (0, 1)


def test_smaller_micro_batches_are_counted_anew() -> None:
    board = Board(replace(FACTS, micro_batches=32))
    board.apply(EventRecord(20, "micro_size", 1.0, {"before": 256, "now": 128}))
    values = values_of(board)
    assert values["dist_train_micro_batch_size", ()] == 128
    assert values["dist_train_micro_batches", ()] == 64


def test_a_kind_of_event_that_nobody_foresaw_is_counted() -> None:
    board = Board(FACTS)
    board.apply(EventRecord(20, "eclipse", 1.0, {}))
    assert values_of(board)["dist_train_events_total", ("eclipse",)] == 1


def test_a_page_of_1024_ranks_is_small_and_takes_hardly_more_for_each_rank() -> None:
    def board_of(ranks: int) -> Board:
        nodes = tuple(f"gpu-node-{rank // 8:04}" for rank in range(ranks))
        board = Board(replace(FACTS, world_size=ranks, nodes=nodes))
        one = ON_A_DEVICE._replace(busy_seconds=0.123456789012345, wait_seconds=0.123456789012345)
        board.apply(replace(measurement(1), ranks=(one,) * ranks))
        return board

    boards = {ranks: board_of(ranks) for ranks in (128, 1024)}
    pages = {ranks: MetricsPage(board) for ranks, board in boards.items()}
    seconds = dict[int, list[float]]({128: [], 1024: []})  # of this thread alone: other tests run beside it
    for step in range(5):
        for ranks, page in pages.items():
            boards[ranks].apply(Progress(step))
            began = time.thread_time()
            page.render()
            seconds[ranks].append(time.thread_time() - began)
    content = pages[1024].render()
    assert len(content) < 3_000_000
    assert content.count(b'rank="1023"') == 18
    assert min(seconds[1024]) < 3 * (1024 / 128) * min(seconds[128])


def test_the_page_has_the_metrics_of_the_table_and_no_other_from_the_start() -> None:
    names = [line.split()[2] for line in page_of(Board(FACTS)).splitlines() if line.startswith("# TYPE")]
    assert names == [metric.name for metric in METRICS]


def test_metric_names_follow_the_conventions() -> None:
    for metric in METRICS:
        assert metric.name.startswith("dist_train_")
        assert metric.name.endswith("_total") == (metric.kind == "counter"), metric.name
        assert metric.name.endswith("_info") == (metric.kind == "info"), metric.name
        assert metric.name.endswith("_ratio") == (metric.unit == "ratio"), metric.name
        assert metric.name.endswith("_bytes") == (metric.unit == "bytes"), metric.name
        assert metric.name.endswith("_seconds") == metric.unit.startswith("seconds"), metric.name
        assert metric.meaning.endswith("."), metric.name
        assert "|" not in metric.meaning
    assert len({metric.name for metric in METRICS}) == len(METRICS)


def test_the_documentation_has_the_table_as_it_is() -> None:
    text = (ROOT / "docs" / "monitoring.md").read_text(encoding="utf-8")
    assert with_table(text) == text, "renew it: python -m benchmarks.metrics_table docs/monitoring.md"
    assert all(f"`{metric.name}`" in metrics_markdown() for metric in METRICS)


def test_a_page_without_a_place_for_the_table_is_refused() -> None:
    with raises(UsageError, "no-place-for-table"):
        with_table("# Monitoring\n")


def test_a_label_keeps_what_would_end_it() -> None:
    name: Any = 'quote " backslash \\ line\nend'
    values = values_of(Board(replace(FACTS, name=name)))
    info = next(key for key in values if key[0] == "dist_train_run_info")
    assert info[1][7] == name
