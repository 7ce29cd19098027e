"""Sums of integers of 32 and 16 bits: exact on any ranks, as accurate as their grids, made again where too large."""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import reduce
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dist_train.checkpoint.files import Contents
from dist_train.checkpoint.state import Progress, restored_progress
from dist_train.cluster.communicator import Communicator, Pending, SingleProcess, broadcast_value
from dist_train.optim.flat_weights import FlatWeights
from dist_train.outcome import DivergedError, UsageError
from dist_train.training.accumulators import GridAccumulator, next_exponents, pack_halves, unpack_halves
from dist_train.training.reduction import GradientReduction, buckets_of
from dist_train.training.trainer import Trainer
from tests.raising import raises
from tests.unit.checkpoint_files import contents
from tests.unit.simulated_ranks import results
from tests.unit.small_trainers import build_reduction, build_trainer, gradient_bits, small_config, state_bits

SHAPES = [(5,), (8, 5), (1,), (17, 1)]
SIZES = [5, 40, 1, 17]
COUNT = sum(SIZES)
PROPERTY = settings(deadline=None, max_examples=40)
Bits = Literal[16, 32]
BITS: tuple[Bits, ...] = (32, 16)


@dataclass
class Reduced:
    """An update's gradient [COUNT], its grids, its sums of largest integers, and how often it was made again."""

    gradient: Tensor
    exponents: Sequence[int]
    largest: list[int]
    repeats: int


class Updates:
    """Updates by given gradients, as the step makes them."""

    def __init__(self, comm: Communicator, terms: int, bits: Bits = 32, progress: Progress | None = None) -> None:
        self.comm = comm
        self.terms = terms
        self.progress = progress or Progress()
        self.weights = FlatWeights(nn.ParameterList([nn.Parameter(torch.zeros(shape)) for shape in SHAPES]))
        accumulator = GridAccumulator(self.weights, comm, terms, self.progress, bits)
        self.reduction = GradientReduction(self.weights, accumulator, buckets_of(self.weights, 20))

    @property
    def exponents(self) -> Sequence[int]:
        """The grids of the next update; those of 64 bits where there are none yet."""
        return self.progress.grid_exponents or [48] * len(SIZES)

    def leap(self, bits: int) -> None:
        """Make all grids finer by so many bits, as if the gradients grew."""
        self.progress.grid_exponents = [each + bits for each in self.exponents]

    def bounds(self, largest: Sequence[int]) -> list[int]:
        """Return what bounds each tensor's integers, by the sums of its filters' largest."""
        left = iter(largest)
        return [max(islice(left, shape[0] if len(shape) > 1 else 1)) for shape in SHAPES]

    def once(self, mine: Sequence[Tensor]) -> list[int]:
        """Sum this rank's gradients and the others'; return the sums of largest integers."""
        self.reduction.start()
        for gradient in mine:
            with self.reduction.micro_batch():
                for parameter, part in zip(self.weights.parameters, gradient.split(SIZES), strict=True):
                    parameter.grad = part.view_as(parameter)
        self.reduction.send()
        largest = self.reduction.accumulator.largest.clone()
        self.comm.allreduce_async(largest, "largest").wait()
        self.reduction.finish()
        summed: list[int] = largest.tolist()
        return summed

    def make(self, mine: Sequence[Tensor]) -> Reduced:
        """Make an update by the gradients `mine` of this rank."""
        repeats, exponents, accumulator = 0, self.exponents, self.reduction.accumulator
        while accumulator.has_overflowed(largest := self.once(mine)):
            accumulator.choose_grids(largest, self.terms)
            repeats, exponents = repeats + 1, self.exponents
            assert repeats < 10
        accumulator.choose_grids(largest, self.terms)
        self.progress.step += 1
        return Reduced(self.gradient(), exponents, largest, repeats)

    def gradient(self) -> Tensor:
        """Return what was summed [COUNT]."""
        return torch.cat([each.grad.flatten() for each in self.weights.parameters if each.grad is not None])


def some_gradients(count: int, seed: int, spread: float = 1.0) -> list[Tensor]:
    """Return gradients whose tensors, and whose micro-batches, differ in size by powers of ten."""
    source = torch.Generator().manual_seed(seed)
    sizes = torch.cat([torch.full((size,), 10.0 ** -(2 * index)) for index, size in enumerate(SIZES)])
    scales = 10.0 ** (spread * torch.randn(count, generator=source))
    return [torch.randn(COUNT, generator=source) * sizes * scale for scale in scales]


def integers_of(gradients: Sequence[Tensor], exponents: Sequence[int]) -> Tensor:
    """Return what the sum of `gradients` must be on the grids of `exponents`, as int64 [COUNT]."""
    scales = scales_of(exponents)
    return torch.stack([(gradient.double() * scales).round().to(torch.int64) for gradient in gradients]).sum(0)


def scales_of(exponents: Sequence[int]) -> Tensor:
    """Return what each gradient is multiplied by, float64 [COUNT]."""
    return torch.cat(
        [torch.full((size,), 2.0**each, dtype=torch.float64) for size, each in zip(SIZES, exponents, strict=True)]
    )


cases = given(
    bits=st.sampled_from(BITS),
    seed=st.integers(0, 2**30),
    count=st.integers(1, 12),
    spread=st.floats(0.0, 2.0),
    finer=st.integers(-6, 14),
)


@PROPERTY
@given(
    st.data(), st.sampled_from(BITS), st.integers(0, 2**30), st.integers(1, 8), st.integers(1, 4), st.integers(-4, 12)
)
def test_promise_3_any_split_over_ranks_and_any_order_give_the_same_integers(
    data: st.DataObject, bits: Bits, seed: int, count: int, ranks: int, finer: int
) -> None:
    batches = [some_gradients(count, seed + step) for step in range(3)]
    dealt = [data.draw(st.lists(st.integers(0, ranks - 1), min_size=count, max_size=count)) for _ in batches]
    orders = [data.draw(st.permutations(range(count))) for _ in batches]

    def train(comm: Communicator, *, in_order: bool) -> list[tuple[bytes, list[int], int, list[int]]]:
        updates, made = Updates(comm, count, bits), []
        for step, batch in enumerate(batches):
            if step == 2:
                updates.leap(finer)
            mine = batch if in_order else [batch[i] for i in orders[step] if dealt[step][i] == comm.rank]
            reduced = updates.make(mine)
            made.append((reduced.gradient.numpy().tobytes(), reduced.largest, reduced.repeats, [*updates.exponents]))
        return made

    alone = train(SingleProcess(), in_order=True)
    assert results(ranks, lambda comm: train(comm, in_order=False)) == [alone] * ranks


@PROPERTY
@cases
def test_wherever_the_bound_holds_the_sum_is_that_in_64_bits(
    bits: Bits, seed: int, count: int, spread: float, finer: int
) -> None:
    updates = Updates(SingleProcess(), count, bits)
    updates.make(some_gradients(count, seed, spread))
    updates.leap(finer)
    start = updates.exponents
    gradients = some_gradients(count, seed + 1, spread)
    largest = updates.once(gradients)
    assume(not updates.reduction.accumulator.out_of_range)
    summed = updates.gradient().double()
    expected = integers_of(gradients, start)
    parts = expected.abs().split(SIZES)
    assert all(int(part.max()) <= bound for part, bound in zip(parts, updates.bounds(largest), strict=True))
    if updates.reduction.accumulator.has_overflowed(largest):
        assert max(largest) >= 2 ** (bits - 1)
    else:
        assert torch.equal(summed, expected.float().double() / scales_of(start))


@PROPERTY
@cases
def test_an_update_is_within_half_a_grid_for_each_micro_batch_of_the_true_sum(
    bits: Bits, seed: int, count: int, spread: float, finer: int
) -> None:
    updates = Updates(SingleProcess(), count, bits)
    updates.make(some_gradients(count, seed, spread))
    updates.leap(finer)
    gradients = some_gradients(count, seed + 1, spread)
    reduced = updates.make(gradients)
    assume(not updates.reduction.accumulator.out_of_range)
    true = torch.stack([gradient.double() for gradient in gradients]).sum(0)
    allowed = (count / 2 + 2.0**-24 * count) / scales_of(reduced.exponents) + 2.0**-24 * true.abs()
    assert ((reduced.gradient.double() - true).abs() <= allowed).all()


@PROPERTY
@given(st.sampled_from(BITS), st.integers(0, 2**30), st.integers(1, 64))
def test_the_second_update_of_the_same_gradients_uses_the_bits_it_may(bits: Bits, seed: int, terms: int) -> None:
    updates = Updates(SingleProcess(), terms, bits)
    gradients = some_gradients(terms, seed, 0.2)
    updates.make(gradients)
    reduced = updates.make(gradients)
    room = 2 ** (bits - 1) / (1.75 if terms >= 16 else 4 if terms > 1 else 8)
    for bound, exponent in zip(updates.bounds(reduced.largest), reduced.exponents, strict=True):
        assert bound <= room + terms
        assert bound + terms > room / 2 or exponent == 48


@pytest.mark.parametrize("bits", BITS)
def test_where_the_integers_leave_their_bits_the_update_is_made_again_once(bits: Bits) -> None:
    gradients = some_gradients(8, 0)
    calm, leaping = Updates(SingleProcess(), 8, bits), Updates(SingleProcess(), 8, bits)
    for updates in (calm, leaping):
        updates.make(gradients)
    leap = [gradient * 1000 for gradient in gradients]
    assert leaping.make(leap).repeats == 1
    assert calm.make(gradients).repeats == 0
    assert leaping.make(leap).repeats == 0


@pytest.mark.parametrize("bits", BITS)
def test_a_sum_fits_up_to_the_largest_integer_of_its_bits(bits: Bits) -> None:
    updates, gradients = Updates(SingleProcess(), 2, bits), some_gradients(2, 0)
    updates.make(gradients)
    for bound, overflows in ((2 ** (bits - 1) - 1, False), (2 ** (bits - 1), True)):
        largest = [bound] * len(updates.once(gradients))
        assert updates.reduction.accumulator.has_overflowed(largest) is overflows


def test_a_grid_becomes_coarser_at_once_and_finer_by_degrees_but_never_finer_than_that_of_64_bits() -> None:
    def following(before: Sequence[int] | None, bound: int, step: int = 1) -> list[int]:
        return next_exponents(before, [bound], 4, step=step, bits=32)

    assert following(None, 2**39) == [48 - 10], "to a quarter of 2^31, from the grid of 64 bits"
    assert following([38], 2**32) == [38 - 3]
    exponents = [*accumulate(range(1, 40), lambda before, step: following(before, 2**26, step), initial=[35])]
    assert exponents[1] == [35]
    assert exponents[16] == [36], "in update 16"
    assert exponents[32] == [37]
    assert following(exponents[-1], 2**10) == [48 - 4], "at once where more than four bits are unused"
    assert reduce(lambda before, step: following(before, 0, step), range(0, 160, 16), [44]) == [48]


def test_the_grids_of_many_micro_batches_become_finer_at_once_too() -> None:
    bounds = [2**28, 2**31, 4 * 2**31 // 7]
    assert next_exponents([20, 20, 20], bounds, 16, step=1, bits=32) == [22, 19, 20]


def test_a_batch_of_few_micro_batches_has_their_headroom_though_a_larger_one_follows(tmp_path: Path) -> None:
    def grids(*schedule: dict[str, int]) -> Sequence[int] | None:
        batch = {"global_size": 6, "micro_size": 6, "schedule": schedule}
        config = small_config(comm={"reduction": "exact32"}, batch=batch, run={"epochs": 2})
        trainer = build_trainer(config, tmp_path, SingleProcess())
        trainer.advance()
        return trainer.progress.grid_exponents

    assert grids({"epoch": 1, "global_size": 96}) == grids()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize("place", [0, 44, COUNT - 1])
@pytest.mark.parametrize("first", [True, False])
def test_a_gradient_that_is_not_finite_is_noted_by_the_rank_that_meets_it(bad: float, place: int, first: bool) -> None:
    gradients = some_gradients(3, 0, 0.1)
    spoilt = [gradient.clone() for gradient in gradients]
    spoilt[1][place] = bad

    def noted(comm: Communicator) -> bool:
        updates = Updates(comm, 3)
        if not first:
            updates.make(gradients[comm.rank :: 3])
        updates.once(spoilt[comm.rank :: 3])
        accumulator = updates.reduction.accumulator
        assert bool(accumulator.take_out_of_range()) == (comm.rank == 1)
        return bool(accumulator.out_of_range)  # which is about later gradients

    assert results(3, noted) == [False, False, False]


@pytest.mark.parametrize("bits", BITS)
def test_all_updates_but_the_first_send_the_bytes_of_a_float_of_as_many_bits(bits: Bits) -> None:
    class Noting(SingleProcess):
        def __init__(self) -> None:
            self.sent: list[tuple[torch.dtype, int]] = []

        def allreduce_async(self, tensor: Tensor, name: str) -> Pending:
            if name.startswith("gradient"):
                self.sent.append((tensor.dtype, tensor.nbytes))
            return super().allreduce_async(tensor, name)

    comm = Noting()
    updates = Updates(comm, 2, bits)
    length = len(updates.weights.gradients)
    for expected, size in ((torch.int64, 8), (torch.int32, bits // 8), (torch.int32, bits // 8)):
        comm.sent.clear()
        updates.make(some_gradients(2, 0))
        assert {dtype for dtype, _ in comm.sent} == {expected}
        assert sum(sent for _, sent in comm.sent) == length * size


@given(st.lists(st.tuples(*2 * [st.lists(st.integers(-(2**15), 2**15), min_size=3, max_size=3)]), max_size=9))
def test_sums_of_packed_integers_come_apart_wherever_they_fit_16_bits(pairs: list[tuple[list[int], list[int]]]) -> None:
    rows = [torch.tensor([*low, *high], dtype=torch.int32) for low, high in pairs]
    expected = sum(rows, torch.zeros(6, dtype=torch.int32))
    assume((expected.abs() < 2**15).all())
    total = torch.zeros(6, dtype=torch.int32)
    total[:3] = sum((pack_halves(row) for row in rows), torch.zeros(3, dtype=torch.int32))
    unpack_halves(total)
    assert torch.equal(total, expected)


def test_16_bits_are_refused_to_more_gradients_than_they_can_sum_accurately() -> None:
    weights = Updates(SingleProcess(), 2).weights
    build_reduction(weights, SingleProcess(), 256, reduction="exact16")
    with raises(UsageError, "exact16-micro-batches"):
        build_reduction(weights, SingleProcess(), 257, reduction="exact16")


@pytest.mark.parametrize(
    ("ranks", "batch", "model"),
    [
        (1, {"global_size": 26, "micro_size": 1}, {}),
        (1, {"global_size": 20, "micro_size": 1, "schedule": [{"epoch": 1, "global_size": 30}]}, {}),
        (2, {"global_size": 26, "micro_size": 2}, {"norm": "sync"}),
    ],
    ids=["points", "the largest batch", "ranks that share micro-batches"],
)
def test_the_terms_of_a_sum_are_all_gradients_of_the_largest_batch(
    tmp_path: Path, ranks: int, batch: dict[str, Any], model: dict[str, Any]
) -> None:
    def build(comm: Communicator, draws: int) -> None:
        sections = {"batch": batch, "model": {"norm": "none", **model}, "noise": {"draws": draws}}
        build_trainer(small_config(comm={"reduction": "exact16"}, **sections), tmp_path, comm)

    results(ranks, lambda comm: build(comm, 8))
    with raises(UsageError, "exact16-micro-batches"):
        results(ranks, lambda comm: build(comm, 10))


CONFIG: dict[str, Any] = {"comm": {"reduction": "exact32"}, "noise": {"sharing": "micro_batch"}}
CONFIGS = {"exact32": CONFIG, "exact16": {**CONFIG, "comm": {"reduction": "exact16"}}}


def bits_of(trainer: Trainer) -> tuple[dict[str, bytes], bytes, object]:
    """Return all that the next update depends on, and the gradient."""
    exponents = trainer.progress.grid_exponents
    assert exponents is not None
    return state_bits(trainer.network), gradient_bits(trainer), tuple(exponents)


def train(
    comm: Communicator, folder: Path, updates: int, start: Contents | None = None, reduction: str = "exact32"
) -> Trainer:
    """Make so many updates of the tiny run; the third begins on grids much too fine.

    `start` is copied: ranks in one process would share the optimizer's state.
    """
    trainer = build_trainer(small_config(**CONFIGS[reduction]), folder, comm, contents=deepcopy(start))
    while trainer.progress.step < updates:
        if trainer.progress.step == 2:
            trainer.progress.grid_exponents = [each + 9 for each in trainer.progress.grid_exponents or ()]
        trainer.advance()
    return trainer


@pytest.mark.parametrize(("reduction", "ranks"), [("exact32", 2), ("exact32", 5), ("exact16", 2), ("exact16", 3)])
def test_promise_3_also_where_an_update_is_made_again_and_after_a_resume(
    tmp_path: Path, reduction: str, ranks: int
) -> None:
    [whole] = results(1, lambda comm: bits_of(train(comm, tmp_path / "alone", 4, reduction=reduction)))
    [half] = results(1, lambda comm: train(comm, tmp_path / "half", 3, reduction=reduction).contents())
    from_the_first = results(ranks, lambda comm: bits_of(train(comm, tmp_path / "whole", 4, reduction=reduction)))
    resumed = results(ranks, lambda comm: bits_of(train(comm, tmp_path / "resumed", 4, half, reduction)))
    assert from_the_first == resumed == [whole] * ranks


@pytest.mark.parametrize("reduction", ["exact32", "exact16"])
def test_an_update_made_again_is_that_of_the_coarser_grids_and_is_recorded(tmp_path: Path, reduction: str) -> None:
    records: list[Any] = []

    class Keeping:
        def record(self, record: Any) -> None:
            records.append(record)

        def __getattr__(self, name: str) -> Any:
            return lambda *arguments: None

    observers: Any = (Keeping(),)
    trainer = build_trainer(small_config(**CONFIGS[reduction]), tmp_path, SingleProcess(), observers=observers)
    trainer.advance()
    fitting = trainer.progress.grid_exponents or ()
    trainer.progress.grid_exponents = [each + 12 for each in fitting]
    trainer.advance()
    events = [record for record in records if getattr(record, "event", "") == "gradient_repeated"]
    assert [(event.step, dict(event.details)) for event in events] == [(2, {"times": 1})]
    assert all(abs(now - then) <= 6 for now, then in zip(trainer.progress.grid_exponents, fitting, strict=True))


def test_a_checkpoint_without_grids_begins_in_64_bits_on_any_number_of_ranks(tmp_path: Path) -> None:
    older = replace(train(SingleProcess(), tmp_path / "half", 2).contents(), grid_exponents=None)

    def resumed(comm: Communicator) -> tuple[dict[str, bytes], bytes, object]:
        trainer = build_trainer(small_config(**CONFIG), tmp_path / f"{comm.size}", comm, contents=deepcopy(older))
        trainer.advance()
        return bits_of(trainer)

    alone, *others = results(1, resumed) + results(2, resumed)
    assert others == [alone] * 2


def test_the_grids_come_back_from_a_checkpoint_and_every_rank_has_rank_0_s() -> None:
    progress = restored_progress(contents(7, grid_exponents=[3, -4, 48]))
    assert progress.grid_exponents == [3, -4, 48]
    assert "grid_exponents" not in progress.metrics()
    shared = results(3, lambda comm: broadcast_value(comm, Progress() if comm.rank else progress, "progress"))
    assert [each.grid_exponents for each in shared] == [[3, -4, 48]] * 3


def test_a_loss_that_is_not_finite_is_a_divergence_and_leaves_the_grids(tmp_path: Path) -> None:
    trainer = build_trainer(small_config(**CONFIG), tmp_path, SingleProcess())
    trainer.advance()
    before = trainer.progress.grid_exponents
    trainer.training_step.weights.parameters[0].register_hook(lambda gradient: gradient * math.nan)
    with raises(DivergedError, "step-not-finite"):
        trainer.advance()
    assert trainer.progress.grid_exponents == before
