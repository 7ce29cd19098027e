"""The scaling model: closed forms where they are known, order where it must hold, and the training's own cut."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.elastic import settle
from benchmarks.scaling import RECORD, main
from benchmarks.scaling_fit import Machine, Pace, fit, fit_machine, fit_pace, fit_start, step_on
from benchmarks.scaling_forecast import (
    GUESSES,
    Cluster,
    busy_job,
    forecast,
    knobs,
    reduction_rows,
    resnet50_job,
    swings,
    vgg9_job,
)
from benchmarks.scaling_measure import (
    CONTROLLERS,
    MICRO_SIZE,
    RANKS,
    Allreduce,
    Measurements,
    Startup,
    Step,
    read_measurements,
)
from benchmarks.scaling_model import (
    FORWARD,
    Algorithm,
    Compute,
    Coordination,
    Job,
    Layer,
    Link,
    Message,
    Network,
    Passes,
    Run,
    Start,
    agreement_seconds,
    allreduce_seconds,
    communication,
    evaluation_seconds,
    idle_ranks,
    messages,
    micro_batches_of_busiest,
    run_seconds,
    slowest_of,
    step_seconds,
    weak_efficiency,
)
from benchmarks.scaling_subjects import (
    Fabric,
    calibrated,
    checks,
    layers_of,
    modelled,
    published,
    resnet50_layers,
    vgg9,
)
from benchmarks.subject import settings as subject_settings
from dist_train.data.plan import BatchPlan
from dist_train.models import build_model
from dist_train.optim.flat_weights import FlatWeights
from dist_train.training.reduction import buckets_of

PAGE = Path(__file__).parents[2] / "docs" / "scaling.md"
_WITHIN, _BETWEEN = Link(2e-6, 100e9), Link(10e-6, 10e9)
_COORDINATION = Coordination(cycle=1e-3, hop=20e-6)
_COMPUTE = Compute(rate=20_000, least=1e-3, fixed=1e-3, jitter=0.01)
_LAYERS = tuple(Layer(100_000 * (index + 1), 1_000_000) for index in range(6))
_JOB = Job(_LAYERS, 8192, 128, bucket=300_000)

counts = st.integers(1, 2048)
sizes = st.integers(0, 1 << 30)
algorithms = st.sampled_from(["ring", "hierarchical", "tree", "fastest"])
networks = st.builds(Network, st.just(_WITHIN), st.just(_BETWEEN), st.integers(1, 16), algorithms)


def test_a_ring_in_one_node_takes_the_textbooks_time() -> None:
    network = Network(_WITHIN, _BETWEEN, 8, "ring")
    assert allreduce_seconds(network, 8, 1e9) == pytest.approx(2 * 7 * (2e-6 + 1e9 / 8 / 100e9))


def test_a_ring_over_nodes_goes_at_the_pace_of_the_slowest_link() -> None:
    network = Network(_WITHIN, _BETWEEN, 4, "ring")
    latency = 12 * 2e-6 + 4 * 10e-6
    assert allreduce_seconds(network, 16, 1e9) == pytest.approx(2 * 15 / 16 * (latency + 1e9 / 10e9))


def test_hierarchical_is_a_ring_inside_and_one_between_the_nodes() -> None:
    network = Network(_WITHIN, _BETWEEN, 4, "hierarchical")
    inside = 2 * 3 * (2e-6 + 1e9 / 4 / 100e9)
    assert allreduce_seconds(network, 16, 1e9) == pytest.approx(inside + 2 * 3 * (10e-6 + 1e9 / 4 / 10e9))


def test_a_trees_latency_grows_with_the_logarithm_of_the_nodes() -> None:
    network = Network(_WITHIN, _BETWEEN, 1, "tree")
    assert allreduce_seconds(network, 1024, 0) == pytest.approx(20 * 10e-6)


@given(networks, sizes)
def test_one_rank_sends_nothing(network: Network, size: int) -> None:
    assert allreduce_seconds(network, 1, size) == 0.0
    assert agreement_seconds(_COORDINATION, 1) == 0.0
    assert communication([Message(size, 1.0)], backward=1.0, network=network, coordination=_COORDINATION, ranks=1) == (
        0,
        0,
    )


@given(networks, counts, sizes, sizes)
def test_a_larger_sum_never_takes_less(network: Network, ranks: int, size: int, more: int) -> None:
    assert allreduce_seconds(network, ranks, size) <= allreduce_seconds(network, ranks, size + more)


@given(networks, counts, st.integers(1 << 20, 1 << 30))
def test_no_algorithm_beats_the_link_that_all_must_cross(network: Network, ranks: int, size: int) -> None:
    nodes = math.ceil(ranks / network.node_size)
    if nodes > 1:
        least = 2 * (nodes - 1) / nodes * size / network.between.bandwidth
        assert allreduce_seconds(network, ranks, size) >= least * (1 - 1e-9)


@given(counts, sizes, st.integers(1, 16))
def test_the_fastest_is_no_slower_than_ring_and_tree(ranks: int, size: int, node_size: int) -> None:
    def seconds(algorithm: Algorithm) -> float:
        network = Network(_WITHIN, _BETWEEN, node_size)
        return allreduce_seconds(replace(network, algorithm=algorithm), ranks, size)

    assert seconds("fastest") == min(seconds("ring"), seconds("tree"))


@given(st.lists(st.integers(1, 1_000_000), min_size=1, max_size=20), st.integers(1, 3_000_000))
def test_messages_hold_every_weight_once_and_become_ready_in_order(weights: list[int], bucket: int) -> None:
    job = Job(tuple(Layer(count, 10) for count in weights), 1024, 128, bucket=bucket)
    sent = messages(job)
    assert sum(message.size for message in sent) == 8 * sum(weights)
    ready = [message.ready for message in sent]
    assert ready == sorted(ready)
    assert ready[-1] == pytest.approx(1.0)
    assert all(message.size >= 8 * bucket for message in sent[:-1])


def test_buckets_are_those_of_the_training() -> None:
    weights = FlatWeights(build_model(subject_settings(1.0, 8192)))
    ours = [message.size / 8 for message in messages(Job(vgg9(), 8192, 128))]
    theirs = [bucket.stop - bucket.start for bucket in buckets_of(weights, 1 << 20)]
    assert len(ours) == len(theirs)
    assert ours == pytest.approx(theirs, rel=1e-4)  # theirs have padding


def test_the_tally_travels_with_integers_and_apart_from_floats() -> None:
    exact, floating = replace(_JOB, tally=999), replace(_JOB, tally=999, weight_bytes=4)
    assert messages(exact)[-1].size == messages(_JOB)[-1].size + 999
    assert messages(floating)[-1] == Message(999, 1.0)


@given(st.integers(1, 10_000), st.integers(1, 10_000), st.integers(1, 300))
def test_shares_are_those_of_the_batch_plan(global_size: int, micro_size: int, ranks: int) -> None:
    job, plan = replace(_JOB, global_size=global_size, micro_size=micro_size), BatchPlan(global_size, micro_size)
    shares = [len(plan.share(rank, ranks)) for rank in range(ranks)]
    assert micro_batches_of_busiest(job, ranks) == max(shares)
    assert idle_ranks(job, ranks) == shares.count(0)


def test_the_slowest_of_one_is_no_slower_than_the_mean() -> None:
    assert slowest_of(1) == pytest.approx(0.0)
    assert slowest_of(2) == pytest.approx(1 / math.sqrt(math.pi), abs=0.03)  # known exactly
    assert slowest_of(100) < slowest_of(1000)


def test_a_long_backward_pass_hides_all_but_the_last_sum() -> None:
    network = Network(_WITHIN, _BETWEEN, 1, "ring")
    sums = [Message(1_000_000, 0.1), Message(1_000_000, 0.5), Message(500, 1.0)]
    exposed, hidden = communication(sums, backward=10.0, network=network, coordination=_COORDINATION, ranks=4)
    assert exposed == pytest.approx(agreement_seconds(_COORDINATION, 4) + allreduce_seconds(network, 4, 500))
    assert hidden == pytest.approx(2 * allreduce_seconds(network, 4, 1_000_000))


def test_without_a_backward_pass_nothing_is_hidden() -> None:
    network = Network(_WITHIN, _BETWEEN, 1, "ring")
    sums = [Message(1_000_000, 0.1), Message(2_000_000, 1.0)]
    exposed, hidden = communication(sums, backward=0.0, network=network, coordination=_COORDINATION, ranks=4)
    whole = sum(allreduce_seconds(network, 4, message.size) for message in sums)
    assert exposed == pytest.approx(agreement_seconds(_COORDINATION, 4) + whole)
    assert hidden == 0.0


def test_one_ranks_update_is_its_compute_and_nothing_else() -> None:
    seconds = step_seconds(_JOB, _COMPUTE, Network(_WITHIN, _BETWEEN, 4), _COORDINATION, 1)
    assert seconds.total == pytest.approx(8192 / 20_000 + 1e-3)
    assert (seconds.waiting, seconds.exposed, seconds.hidden) == (0.0, 0.0, 0.0)


@settings(max_examples=60)
@given(networks, counts)
def test_scaling_is_never_better_than_perfect(network: Network, ranks: int) -> None:
    assert 0 < weak_efficiency(_JOB, _COMPUTE, network, _COORDINATION, ranks) <= 1 + 1e-9


@settings(max_examples=60)
@given(networks, counts, st.floats(1.0, 100.0))
def test_more_bandwidth_never_makes_an_update_slower(network: Network, ranks: int, factor: float) -> None:
    faster = replace(network, between=Link(_BETWEEN.latency, _BETWEEN.bandwidth * factor))
    before = step_seconds(_JOB, _COMPUTE, network, _COORDINATION, ranks).total
    assert step_seconds(_JOB, _COMPUTE, faster, _COORDINATION, ranks).total <= before + 1e-12


@settings(max_examples=60)
@given(networks, counts)
def test_floats_are_no_slower_than_integers(network: Network, ranks: int) -> None:
    exact = step_seconds(_JOB, _COMPUTE, network, _COORDINATION, ranks).total
    floating = step_seconds(replace(_JOB, weight_bytes=4), _COMPUTE, network, _COORDINATION, ranks).total
    assert floating <= exact + 1e-12


def test_a_tiny_micro_batch_takes_the_least_time_of_one() -> None:
    job = replace(_JOB, micro_size=8)
    seconds = step_seconds(job, _COMPUTE, Network(_WITHIN, _BETWEEN, 4), _COORDINATION, 1024)
    assert seconds.compute == _COMPUTE.least


def test_layers_have_all_weights_and_the_arithmetic_of_their_shapes() -> None:
    layers = vgg9()
    assert sum(layer.parameters for layer in layers) == 2_789_706
    assert layers[0] == Layer(3 * 64 * 9 + 64, 3 * 64 * 9 * 32 * 32, filters=64 + 1)
    weights = FlatWeights(build_model(subject_settings(1.0, 8192)))
    assert sum(layer.filters for layer in layers) == sum(
        each.shape[0] if len(each.shape) > 1 else 1 for each in weights.segments
    )
    assert layers_of(build_model(subject_settings(0.25, 128)), (3, 32, 32)) == vgg9(0.25)


def test_the_published_networks_have_their_known_sizes() -> None:
    millions = {figure.name: sum(layer.parameters for layer in figure.layers) / 1e6 for figure in published()}
    assert millions == pytest.approx({"Inception V3": 23.83, "ResNet-101": 44.55, "VGG-16": 138.36}, abs=0.01)


def test_what_is_fitted_to_two_published_figures_comes_near_the_others() -> None:
    figures = published()
    fabric = calibrated(figures, Fabric())
    assert modelled(figures[0], fabric, "rdma") == pytest.approx(figures[0].over_rdma)
    assert modelled(figures[-1], fabric, "tcp") == pytest.approx(figures[-1].over_tcp)
    found = checks(figures, fabric)
    assert [(check.name.split(",")[0], check.over) for check in found if check.fitted] == [
        ("Inception V3", "RDMA"),
        ("VGG-16", "TCP"),
    ]
    for check in found:
        assert check.network_alone > check.with_jitter
        if check.over != "NVLink":
            assert check.with_jitter == pytest.approx(check.published, abs=0.05)


_MACHINES = {
    "mpi": Machine(2, Coordination(1e-3, 2e-4), Link(0.0, 4e9)),
    "gloo": Machine(2, Coordination(5e-3, 8e-4), Link(0.0, 1e9)),
    "torch": Machine(2, Coordination(0.0, 5e-5), Link(0.0, 2e9)),
}


def _made_up() -> Measurements:
    """Return what a machine that is exactly as the model says would measure."""
    sums = tuple(
        Allreduce(controller, ranks, length, "known", machine.sum_seconds(ranks, 8 * length), 0.0)
        for controller, machine in _MACHINES.items()
        for ranks in (2, 4, 8)
        for length in (1, 100_000, 3_000_000, 10_000_000)
    )
    pace = Pace(sample=0.002, fixed=0.01)
    steps = tuple(
        Step(controller, ranks, 0.25, size, step_on(machine, pace, Job(_LAYERS, size, MICRO_SIZE), ranks), 0.0)
        for controller, machine in _MACHINES.items()
        for ranks in (1, 2, 4)
        for size in (256, 1024)
    )
    starts = tuple(
        Startup(controller, ranks, 2.0 * max(1, ranks / 2) + 0.1 * (ranks - 1), 0.0)
        for controller in _MACHINES
        for ranks in (1, 2, 4, 8)
    )
    return Measurements("made up", "today", 2, 0.0, starts, sums, steps)


@pytest.mark.parametrize("controller", CONTROLLERS)
def test_the_fit_finds_the_machine_that_made_the_figures(controller: str) -> None:
    machine, residuals = fit_machine(_made_up(), controller)
    assert machine.link.bandwidth == pytest.approx(_MACHINES[controller].link.bandwidth, rel=0.01)
    assert [residual.ratio for residual in residuals] == pytest.approx([1.0] * len(residuals), rel=0.02)
    assert {residual.ranks for residual in residuals if not residual.is_fitted} == {8}


def test_the_fit_finds_the_pace_of_the_ranks() -> None:
    pace, residuals = fit_pace(_made_up(), _MACHINES, 0.25, _LAYERS)
    assert (pace.sample, pace.fixed) == pytest.approx((0.002, 0.01), rel=0.01)
    assert [residual.ratio for residual in residuals] == pytest.approx([1.0] * len(residuals), rel=0.01)


@pytest.mark.parametrize("controller", CONTROLLERS)
def test_the_fit_finds_what_a_start_takes(controller: str) -> None:
    start = fit_start(_made_up(), controller)
    assert (start.alone, start.join) == pytest.approx((2.0, 0.1))
    assert start.seconds(64) == pytest.approx(2.0 + 6.3)


def test_ranks_beyond_the_cores_share_them() -> None:
    machine = _MACHINES["mpi"]
    assert [machine.slowdown(ranks) for ranks in (1, 2, 4)] == [1.0, 1.0, 2.0]
    assert machine.work_seconds(4, 1e9) > 2 * machine.work_seconds(2, 1e9)


def test_what_is_recorded_has_every_engine_and_can_be_fitted() -> None:
    measurements = read_measurements(Path(RECORD))
    fits = fit(measurements)
    assert set(fits.machines) == set(fits.starts) == set(CONTROLLERS)
    assert len(fits.steps) == len(measurements.steps)
    assert {(row.controller, row.ranks) for row in measurements.startups} == {
        (controller, ranks) for controller in CONTROLLERS for ranks in RANKS
    }


def test_the_page_shows_what_the_program_prints(tmp_path: Path) -> None:
    page, figure = tmp_path / "scaling.md", tmp_path / "sensitivity.svg"
    page.write_text(PAGE.read_text())
    main(["--page", str(page), "--figure", str(figure)])
    assert page.read_text() == PAGE.read_text()
    assert figure.read_text().count("<svg") == 1
    main(["--between", "30", "1.1", "--rate", "50000", "--page", str(page)])
    assert page.read_text() != PAGE.read_text()


def test_no_rank_idles_with_smaller_micro_batches() -> None:
    job = Job(vgg9(), 8192, 128)
    assert idle_ranks(job, 1024) == 960
    assert busy_job(job, 1024).micro_size == 8
    assert idle_ranks(busy_job(job, 1024), 1024) == 0
    assert busy_job(job, 8) == job


_CLUSTER = Cluster(_COMPUTE, Network(_WITHIN, _BETWEEN, 8), _COORDINATION)


def test_a_knob_that_changes_nothing_has_factor_one() -> None:
    factors = {knob.setting: knob.factors for knob in knobs(vgg9_job(), _CLUSTER)}
    assert factors["`batch.micro_size` 128 where GPUs idle"][:2] == (1.0, 1.0)
    assert factors["`HOROVOD_CYCLE_TIME=5`"][1] > 1.0
    assert factors["`comm.engine: torch`: no cycle, no agreement"][1] < 1.0
    assert factors["`comm.reduction: float`"][1] < 1.0
    assert forecast(vgg9_job(), _CLUSTER, 1).efficiency == pytest.approx(1.0)
    assert FORWARD < 1


def test_an_evaluation_takes_the_passes_of_the_rank_that_has_most_of_them() -> None:
    network = Network(_WITHIN, _BETWEEN, 8)
    passes = Passes(samples=10_000, size=500)
    one = 500 / 20_000 / 3
    assert evaluation_seconds(passes, _COMPUTE, network, _COORDINATION, 1) == pytest.approx(20 * one)
    for ranks, most in ((8, 3), (20, 1), (64, 1)):
        exposed = agreement_seconds(_COORDINATION, ranks) + allreduce_seconds(network, ranks, 16 * 20)
        assert evaluation_seconds(passes, _COMPUTE, network, _COORDINATION, ranks) == pytest.approx(
            most * one + exposed
        )
    tiny = Passes(samples=10, size=500)
    assert evaluation_seconds(tiny, _COMPUTE, network, _COORDINATION, 1) == pytest.approx(_COMPUTE.least / 3)


def test_a_run_is_its_updates_evaluations_start_and_conversion() -> None:
    network = Network(_WITHIN, _BETWEEN, 8)
    parts = (_COMPUTE, network, _COORDINATION)
    passes = (Passes(10_000, 500), Passes(2048, 128))
    run = Run(_JOB, epochs=3, samples=50_000, evaluated=passes, decoded=10**9)
    seconds = run_seconds(run, *parts, start=Start(2.0, 0.5), conversion=1e8, ranks=8)
    assert seconds.training == pytest.approx(3 * 6 * step_seconds(_JOB, *parts, 8).total)
    assert seconds.evaluation == pytest.approx(3 * sum(evaluation_seconds(each, *parts, 8) for each in passes))
    assert (seconds.start, seconds.conversion) == pytest.approx((5.5, 10.0))
    assert seconds.total == pytest.approx(seconds.training + seconds.evaluation + 15.5)


def test_exact_sums_of_resnet50_cost_more_the_slower_the_network() -> None:
    assert sum(layer.parameters for layer in resnet50_layers()) == 25_557_032
    slow = replace(_CLUSTER, compute=replace(_COMPUTE, rate=2470.0))
    fast = replace(slow, network=replace(slow.network, between=Link(5e-6, 360e9)))
    for near, far in zip(*(reduction_rows(resnet50_job(), each, (8, 64, 256)) for each in (fast, slow)), strict=True):
        assert near.factors["exact"] <= far.factors["exact"] + 1e-9
        assert far.factors["exact32"] == pytest.approx(1.0, abs=0.002)  # as many bytes as float
        assert far.factors["exact16"] <= far.factors["exact32"]
        assert far.factors["exact32"] < far.factors["exact, sharded"]
    assert far.factors["exact"] > 1.5  # of the last, 256 GPUs


@given(networks, counts)
def test_a_sharded_sum_that_nothing_hides_takes_half_of_an_exact_one_and_half_of_a_float_one(
    network: Network, ranks: int
) -> None:
    exact = replace(_JOB, bucket=1 << 62)

    def exposed(job: Job) -> float:
        return step_seconds(job, Compute(rate=1e12), network, Coordination(0.0, 0.0), ranks).exposed

    halves = exposed(exact) / 2 + exposed(replace(exact, weight_bytes=4)) / 2
    assert exposed(replace(exact, gathered_bytes=4)) == pytest.approx(halves, abs=1e-6)


def test_swings_name_every_guess_and_begin_with_what_matters_most() -> None:
    found = swings(vgg9_job(), _CLUSTER, 64)
    assert {swing.guess for swing in found} == set(GUESSES)
    assert [swing.width for swing in found] == sorted((swing.width for swing in found), reverse=True)
    by_guess = {swing.guess: swing for swing in found}
    assert by_guess["rate of a GPU"].halved > 1 > by_guess["rate of a GPU"].doubled
    assert by_guess["latency between nodes"].halved < 1 < by_guess["latency between nodes"].doubled


def test_a_loss_counts_the_updates_that_are_done_again() -> None:
    before, after = [(11, 100.0), (12, 101.0)], [(11, 109.0), (12, 110.0)]
    loss = settle("ours", "killed", before, 101.5, after, 103.0)
    assert (loss.next_update, loss.ended, loss.updates_lost) == (7.5, 1.5, 2)
    assert settle("theirs", "stopped", before, 101.5, [], None).next_update is None
