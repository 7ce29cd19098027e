"""Sums of gradients over micro-batches and ranks: exact, float, float16, Adasum."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dist_train.checkpoint.state import Progress
from dist_train.cluster.communicator import Communicator, SingleProcess
from dist_train.optim.flat_weights import FlatWeights
from dist_train.outcome import UsageError
from dist_train.training.accumulators import (
    ExactAccumulator,
    FloatAccumulator,
    GradientAccumulator,
    GridAccumulator,
    HalfAccumulator,
)
from dist_train.training.reduction import GradientReduction, buckets_of
from tests.raising import raises
from tests.unit.simulated_ranks import SimulatedRanks, on_ranks, results
from tests.unit.small_trainers import build_reduction

PROPERTY = settings(deadline=None, max_examples=40)
SIZES = [5, 40, 1, 17]
COUNT = sum(SIZES)

Build = Callable[[FlatWeights, Communicator], GradientAccumulator]


class Given(nn.Module):
    """Parameters whose gradients are what is given."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ParameterList([nn.Parameter(torch.zeros(size)) for size in SIZES])

    def loss(self, gradient: Tensor) -> Tensor:
        """Return a loss whose gradient is `gradient` [COUNT]; a part of NaN's is not used at all."""
        pieces = zip(self.parts, torch.split(gradient, SIZES), strict=True)
        return torch.stack([(p * piece).sum() for p, piece in pieces if not piece.isnan().all()]).sum()


def reduce(comm: Communicator, gradients: list[Tensor], build: Build, bucket: int = 20) -> tuple[Tensor, bool]:
    """Return the reduced gradient [COUNT] of micro-batches dealt out round robin, and whether ours was out of range."""
    model = Given()
    weights = FlatWeights(model)
    reduction = GradientReduction(weights, build(weights, comm), buckets_of(weights, bucket))
    mine = gradients[comm.rank :: comm.size]
    reduction.start()
    for index, gradient in enumerate(mine):
        last = index == len(mine) - 1
        with reduction.last_micro_batch() if last else reduction.micro_batch():
            torch.autograd.backward(model.loss(gradient))
    reduction.send()
    reduction.finish()
    flat = torch.cat([part.grad for part in model.parts if part.grad is not None])
    return flat.clone(), bool(reduction.accumulator.out_of_range)


def exact(weights: FlatWeights, comm: Communicator) -> GradientAccumulator:
    return ExactAccumulator(weights, comm, terms=16)


def on_grids(weights: FlatWeights, comm: Communicator) -> GradientAccumulator:
    return GridAccumulator(weights, comm, 16, Progress())


def as_float32(weights: FlatWeights, comm: Communicator) -> GradientAccumulator:
    return FloatAccumulator(weights, comm)


def as_float16(weights: FlatWeights, comm: Communicator) -> GradientAccumulator:
    return HalfAccumulator(weights, comm, Progress())


def some_gradients(count: int, scale: float = 1.0, seed: int = 0) -> list[Tensor]:
    source = torch.Generator().manual_seed(seed)
    return [torch.randn(COUNT, generator=source) * scale * 10.0 ** (-index) for index in range(count)]


@pytest.mark.parametrize("bucket", [1, 20, 1000])
@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 9])
def test_promise_3_the_exact_sum_has_the_same_bits_for_any_number_of_ranks_and_buckets(ranks: int, bucket: int) -> None:
    gradients = some_gradients(7)
    [(alone, _)] = results(1, lambda each: reduce(each, gradients, exact))
    for reduced, out_of_range in results(ranks, lambda each: reduce(each, gradients, exact, bucket)):
        assert torch.equal(reduced, alone)
        assert not out_of_range


def test_promise_3_the_float_sum_has_not() -> None:
    gradients = some_gradients(7)
    sums = [results(size, lambda each: reduce(each, gradients, as_float32))[0][0] for size in (1, 2, 3)]
    assert not (torch.equal(sums[0], sums[1]) and torch.equal(sums[0], sums[2]))


@PROPERTY
@given(st.integers(1, 16), st.integers(0, 2**30), st.floats(1e-6, 100.0))
def test_the_exact_sum_is_within_one_rounding_of_the_true_one(count: int, seed: int, scale: float) -> None:
    gradients = some_gradients(count, scale, seed)
    reduced, _ = reduce(SingleProcess(), gradients, exact)
    true = torch.stack([gradient.double() for gradient in gradients]).sum(dim=0)
    allowed = count * 2.0**-48 + true.abs() * 2.0**-23
    assert ((reduced.double() - true).abs() <= allowed).all()


@pytest.mark.parametrize(("build", "tolerance"), [(as_float32, 1e-6), (as_float16, 2e-3)])
@pytest.mark.parametrize("ranks", [1, 3])
def test_the_float_sum_is_right_to_its_rounding(build: Build, tolerance: float, ranks: int) -> None:
    gradients = some_gradients(5)
    true = torch.stack(gradients).double().sum(dim=0)
    for reduced, out_of_range in results(ranks, lambda each: reduce(each, gradients, build)):
        assert (reduced.double() - true).abs().max() <= tolerance * true.abs().max()
        assert not out_of_range


@pytest.mark.parametrize("build", [exact, as_float32])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 44, COUNT - 1])
@pytest.mark.parametrize("at", [0, 2])
def test_a_gradient_that_is_not_finite_is_noted_where_it_is_met(build: Build, bad: float, place: int, at: int) -> None:
    gradients = some_gradients(3)
    gradients[at][place] = bad
    noted = [out_of_range for _, out_of_range in results(3, lambda each: reduce(each, gradients, build))]
    assert noted == [rank == at for rank in range(3)]


@pytest.mark.parametrize("build", [exact, on_grids])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_gradient_too_large_for_the_integers_is_noted(build: Build, sign: int) -> None:
    limit = 2.0**14 / 16
    for value, expected in ((limit * 1.001, True), (limit * 0.999, False)):
        gradients = [torch.full((COUNT,), sign * value)]
        reduced, out_of_range = reduce(SingleProcess(), gradients, build)
        assert out_of_range is expected
        assert expected or torch.equal(reduced, gradients[0])


def test_as_many_terms_as_were_promised_fit_without_overflow() -> None:
    gradients = [torch.full((COUNT,), 2.0**14 / 16 * 0.999)] * 16
    reduced, out_of_range = reduce(SingleProcess(), gradients, exact)
    assert not out_of_range
    torch.testing.assert_close(reduced, gradients[0] * 16)


@pytest.mark.parametrize("scale", [1e-9, 1e-6, 1.0, 1e6])
def test_float16_is_as_accurate_for_gradients_of_any_size_on_many_ranks(scale: float) -> None:
    """Of a gradient of 1e-6 that is the sum of 64 ranks' shares, nothing is left in float16 without a scale."""
    source = torch.Generator().manual_seed(0)
    gradients = [torch.randn(COUNT, generator=source) * (scale / 64) for _ in range(64)]
    true = torch.stack(gradients).double().sum(dim=0)

    def second_of_two(comm: Communicator) -> tuple[Tensor, int]:
        progress, repeats, reduced = Progress(), 0, torch.zeros(COUNT)
        kept: list[GradientAccumulator] = []

        def build(weights: FlatWeights, comm: Communicator) -> GradientAccumulator:
            kept.append(HalfAccumulator(weights, comm, progress))
            return kept[-1]

        for _ in range(2):
            reduced, _ = reduce(comm, gradients, build)
            largest = kept[-1].largest
            comm.allreduce_async(largest, "largest").wait()
            repeats += kept[-1].has_overflowed(largest.tolist())
            kept[-1].choose_grids(largest.tolist(), len(gradients))
        return reduced, repeats

    for reduced, repeats in results(64, second_of_two):
        assert (reduced.double() - true).norm() <= 2e-3 * true.norm()
        assert repeats == (scale > 100.0)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 3e38])
def test_float16_of_a_value_beyond_any_scale_is_not_finite_on_all_ranks(value: float) -> None:
    gradients = [torch.ones(COUNT), torch.ones(COUNT)]
    gradients[1][3] = value
    for reduced, _ in results(2, lambda each: reduce(each, gradients, as_float16)):
        assert reduced.isfinite().logical_not().nonzero().tolist() == [[3]]


@pytest.mark.parametrize("build", [exact, as_float32])
@pytest.mark.parametrize("unused", [0, 1, 3])
def test_parameters_that_a_micro_batch_does_not_use_count_as_zero(build: Build, unused: int) -> None:
    gradients = some_gradients(2)
    torch.split(gradients[1], SIZES)[unused].fill_(math.nan)
    expected = gradients[0] + gradients[1].nan_to_num()
    reduced, out_of_range = reduce(SingleProcess(), gradients, build)
    torch.testing.assert_close(reduced, expected)
    assert not out_of_range


def test_a_reduction_begins_anew_at_every_step() -> None:
    model = Given()
    weights = FlatWeights(model)
    reduction = GradientReduction(weights, exact(weights, SingleProcess()), buckets_of(weights, 20))
    for gradient, out_of_range in ((torch.full((COUNT,), 1e9), True), (torch.ones(COUNT), False)):
        reduction.start()
        with reduction.last_micro_batch():
            torch.autograd.backward(model.loss(gradient))
        reduction.send()
        reduction.finish()
        assert bool(reduction.accumulator.out_of_range) is out_of_range
    assert torch.equal(weights.gradients[:5], torch.ones(5))


def test_after_a_pass_that_failed_gradients_go_where_an_ascent_looks_for_them() -> None:
    model = Given()
    weights = FlatWeights(model)
    reduction = GradientReduction(weights, exact(weights, SingleProcess()), buckets_of(weights, 20))
    for micro_batch in (reduction.micro_batch, reduction.last_micro_batch):
        reduction.start()
        with pytest.raises(RuntimeError, match="no memory"), micro_batch():
            raise RuntimeError("no memory")
        reduction.start()
        weights.gradients.zero_()
        torch.autograd.backward(model.loss(torch.ones(COUNT)))
        assert float(weights.gradients.sum()) == COUNT


def test_buckets_but_the_last_are_sent_within_the_last_backward_pass_and_each_once() -> None:
    def names(comm: SimulatedRanks) -> tuple[list[str], list[str], list[str]]:
        model = Given()
        weights = FlatWeights(model)
        reduction = GradientReduction(weights, exact(weights, comm), buckets_of(weights, 1))
        reduction.start()
        with reduction.micro_batch():
            torch.autograd.backward(model.loss(torch.ones(COUNT)))
        first = list(comm.names)
        with reduction.last_micro_batch():
            torch.autograd.backward(model.loss(torch.ones(COUNT)))
            during = list(comm.names)
        reduction.send()
        reduction.finish()
        return first, during, list(comm.names)

    for first, during, after in results(2, names):
        assert first == []
        assert sorted(during) == [f"gradient.{index}" for index in range(len(SIZES) - 1)]
        assert after == [*during, f"gradient.{len(SIZES) - 1}"]


def test_a_closed_reduction_no_longer_listens() -> None:
    def names(comm: SimulatedRanks) -> list[str]:
        model = Given()
        weights = FlatWeights(model)
        reductions = [GradientReduction(weights, exact(weights, comm), buckets_of(weights, 1)) for _ in range(2)]
        reductions[0].close()
        for reduction in reductions:
            reduction.start()
        with reductions[0].last_micro_batch():
            torch.autograd.backward(model.loss(torch.ones(COUNT)))
        return comm.names

    assert results(1, names) == [[]]


def test_a_reduction_that_another_rank_cannot_set_up_leaves_no_hooks() -> None:
    def hooks(comm: SimulatedRanks) -> int:
        weights = FlatWeights(nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(3))))
        with pytest.raises(UsageError):
            build_reduction(weights, comm, 1000 if comm.rank == 0 else 2, reduction="exact16")
        return sum(len(each._post_accumulate_grad_hooks or ()) for each in weights.parameters)

    assert results(2, hooks) == [0, 0]


@PROPERTY
@given(st.lists(st.integers(1, 50), min_size=1, max_size=12), st.integers(1, 200))
def test_buckets_hold_every_parameter_once_from_the_last_to_the_first(sizes: list[int], least: int) -> None:
    model = nn.ParameterList([nn.Parameter(torch.zeros(size)) for size in sizes])
    weights = FlatWeights(model)
    buckets = buckets_of(weights, least)
    assert [bucket.index for bucket in buckets] == list(range(len(buckets)))
    assert (buckets[0].last, buckets[0].stop) == (len(sizes), len(weights.gradients))
    assert (buckets[-1].first, buckets[-1].start) == (0, 0)
    for later, earlier in pairwise(buckets):
        assert (earlier.last, earlier.stop) == (later.first, later.start)
    for bucket in buckets:
        assert bucket.start == weights.segments[bucket.first].start
        assert bucket.stop >= weights.segments[bucket.last - 1].stop
    assert all(bucket.stop - bucket.start >= least for bucket in buckets[:-1])


class TestAdasum:
    def build(
        self, comm: Communicator, micro_batches: int = 4, weights: FlatWeights | None = None
    ) -> GradientReduction:
        return build_reduction(
            weights or FlatWeights(Given()), comm, micro_batches, reduction="float", op="adasum", engine="horovod"
        )

    def test_it_needs_a_power_of_two_of_ranks(self) -> None:
        with raises(UsageError, "adasum-rank-count"):
            results(3, self.build)

    @pytest.mark.parametrize("device", ["cpu", "meta"])  # any other stands for a GPU
    def test_it_needs_mpi(self, device: str) -> None:
        with raises(UsageError, "adasum-without-mpi"):
            results(2, lambda comm: self.build(comm, weights=FlatWeights(Given().to(device))), backend="gloo")

    def test_it_needs_a_micro_batch_on_every_rank(self) -> None:
        _, idle = on_ranks(2, lambda comm: self.build(comm, 1))
        assert isinstance(idle, UsageError)
        assert idle.code == "adasum-idle-rank"

    def reduce(self, comm: Communicator, gradients: list[Tensor]) -> list[Tensor]:
        model = Given()
        weights = FlatWeights(model)
        reduction = self.build(comm, len(gradients), weights)
        reduction.start()
        *first, last = gradients[comm.rank :: comm.size]
        for gradient in first:
            with reduction.micro_batch():
                torch.autograd.backward(model.loss(gradient))
        with reduction.last_micro_batch():
            torch.autograd.backward(model.loss(last))
        reduction.send()
        reduction.finish()
        return [part.grad.clone() for part in model.parts if part.grad is not None]

    def test_alone_it_is_the_mean_gradient(self) -> None:
        gradients = [gradient / 3 for gradient in some_gradients(3)]
        reduced = torch.cat(self.reduce(SingleProcess(), gradients))
        torch.testing.assert_close(reduced, torch.stack(gradients).sum(dim=0))

    def test_two_ranks_mean_gradients_are_combined_parameter_by_parameter(self) -> None:
        # of four micro-batches of a global batch, each already divided by its size
        gradients = [gradient / 4 for gradient in some_gradients(4)]
        a, b = (torch.split(2 * (gradients[rank] + gradients[rank + 2]), SIZES) for rank in range(2))
        for reduced in results(2, lambda comm: self.reduce(comm, gradients)):
            for part, one, other in zip(reduced, a, b, strict=True):
                dot = one.dot(other)
                expected = (1 - dot / (2 * one.dot(one))) * one + (1 - dot / (2 * other.dot(other))) * other
                torch.testing.assert_close(part, expected)


@pytest.mark.parametrize(
    ("settings", "sent"),
    [
        ({}, torch.int64),
        ({"reduction": "float"}, torch.float32),
        ({"reduction": "float", "compression": "fp16"}, torch.float16),
    ],
)
def test_the_settings_choose_what_is_sent(settings: dict[str, str], sent: torch.dtype) -> None:
    class Noting(SingleProcess):
        def __init__(self) -> None:
            self.sent: list[torch.dtype] = []

        def allreduce_async(self, tensor: Tensor, name: str):  # type: ignore[no-untyped-def]
            self.sent.append(tensor.dtype)
            return super().allreduce_async(tensor, name)

    comm = Noting()
    reduction = build_reduction(FlatWeights(Given()), comm, 1, **settings)
    comm.sent.clear()
    reduction.start()
    reduction.send()
    assert comm.sent == [sent]


@pytest.mark.parametrize("seed", range(200))
def test_every_rank_sends_its_buckets_in_one_order_whatever_order_gradients_arrive_in(seed: int) -> None:
    """torch.distributed matches operations by order: sums would mix silently otherwise."""

    def sent(comm: SimulatedRanks) -> list[str]:
        choose = random.Random(f"{seed} {comm.rank}")
        model = Given()
        weights = FlatWeights(model)
        reduction = GradientReduction(weights, exact(weights, comm), buckets_of(weights, 1))
        reduction.start()
        for left in reversed(range(choose.randrange(3))):
            used = choose.sample(list(model.parts), choose.randint(1, len(SIZES)))
            with reduction.micro_batch() if left else reduction.last_micro_batch():
                torch.autograd.backward(torch.stack([part.sum() for part in used]).sum())
        reduction.send()
        reduction.finish()
        return comm.names

    orders = results(3, sent)
    assert orders == [[f"gradient.{index}" for index in range(len(SIZES))]] * 3
