"""Running statistics are a function of the global batch alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dist_train.models.norms import BatchStatistics, GroupedBatchNorm, collect_statistics, norm_modules
from dist_train.outcome import UsageError
from dist_train.reproducible import STATISTICS
from tests.raising import raises

PROPERTY = settings(deadline=None, max_examples=25)
CHANNELS = 3
CPU = torch.device("cpu")


def batch(samples: int, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    source = torch.Generator().manual_seed(seed)
    return torch.randn(samples, CHANNELS, *shape, generator=source) * 3 + 1


def see(norm: GroupedBatchNorm, inputs: Sequence[Tensor]) -> BatchStatistics:
    """Return the statistics of one norm after these forward passes."""
    statistics = BatchStatistics([norm], CPU, max(1, sum(map(len, inputs))))
    for each in inputs:
        norm(each)
        statistics.collect(len(each))
    return statistics


@pytest.mark.parametrize("shape", [(), (5, 4)])
def test_the_running_averages_move_as_torch_s_do_over_one_group(shape: tuple[int, ...]) -> None:
    norm = GroupedBatchNorm(CHANNELS)
    reference: nn.Module = nn.BatchNorm2d(CHANNELS) if shape else nn.BatchNorm1d(CHANNELS)
    for seed in range(3):
        inputs = batch(9, shape, seed)
        reference(inputs)
        statistics = see(norm, [inputs])
        statistics.absorb(statistics.sums, 9, momentum=0.1)
    torch.testing.assert_close(norm.running_mean, reference.running_mean)
    torch.testing.assert_close(norm.running_var, reference.running_var)


def test_momentum_one_replaces_the_running_averages_bit_identically() -> None:
    norm = GroupedBatchNorm(CHANNELS)
    norm.running_mean.fill_(1e9)
    norm.running_var.fill_(1e9)
    statistics = see(norm, [batch(16, (2, 2))])
    statistics.absorb(statistics.sums, 16, momentum=1.0)
    means = (STATISTICS.decode(statistics.sums) / 16).float()
    assert torch.equal(torch.cat([norm.running_mean, norm.running_var]), means)


@PROPERTY
@given(
    micro_sizes=st.lists(st.integers(2, 9), min_size=1, max_size=6),
    group_size=st.sampled_from([None, 2, 4]),
    ranks=st.integers(1, 7),
    order=st.randoms(use_true_random=False),
)
def test_promise_3_running_statistics_are_a_function_of_the_global_batch_alone(
    micro_sizes: list[int], group_size: int | None, ranks: int, order: Random
) -> None:
    samples = sum(micro_sizes)
    micro_batches = list(torch.split(batch(samples, (3, 3)), micro_sizes))
    alone = GroupedBatchNorm(CHANNELS, group_size)
    statistics = see(alone, micro_batches)
    statistics.absorb(statistics.sums, samples, momentum=0.1)

    order.shuffle(micro_batches)
    norms = [GroupedBatchNorm(CHANNELS, group_size) for _ in range(ranks)]
    shares = [see(norm, micro_batches[rank::ranks]) for rank, norm in enumerate(norms)]
    total = torch.stack([share.sums for share in shares]).sum(dim=0)
    for norm, share in zip(norms, shares, strict=True):
        share.absorb(total, samples, momentum=0.1)
        assert torch.equal(norm.running_mean, alone.running_mean)
        assert torch.equal(norm.running_var, alone.running_var)


def test_groups_count_by_their_number_of_samples() -> None:
    norm = GroupedBatchNorm(1, 2)
    statistics = see(norm, [torch.tensor([[0.0], [0.0], [3.0], [3.0], [3.0]])])
    statistics.absorb(statistics.sums, 5, momentum=1.0)
    assert norm.running_mean.item() == pytest.approx(9 / 5)


def test_norms_of_several_widths_get_their_own_averages() -> None:
    model = nn.Sequential(GroupedBatchNorm(3), nn.Linear(3, 5), GroupedBatchNorm(5))
    statistics = BatchStatistics(norm_modules(model), CPU, 12)
    inputs = batch(12, ())
    between = model[1](model[0](inputs))
    model[2](between)
    statistics.collect(12)
    statistics.absorb(statistics.sums, 12, momentum=1.0)
    torch.testing.assert_close(model[0].running_mean, inputs.mean(dim=0))
    torch.testing.assert_close(model[2].running_mean, between.mean(dim=0))
    torch.testing.assert_close(model[2].running_var, between.var(dim=0))


def test_a_norm_over_several_rows_of_each_sample_has_the_mean_over_them() -> None:
    norms = [GroupedBatchNorm(CHANNELS) for _ in range(2)]
    statistics = BatchStatistics(norms, CPU, 5)
    patches = batch(4 * 5, (3, 3))
    norms[0](patches)
    norms[1](patches[::4])
    statistics.collect(5)
    statistics.absorb(statistics.sums, 5, momentum=1.0)
    for norm, seen in zip(norms, (patches, patches[::4]), strict=True):
        torch.testing.assert_close(norm.running_mean, seen.mean((0, 2, 3)))
        torch.testing.assert_close(norm.running_var, seen.var((0, 2, 3)))


@pytest.mark.parametrize("times", [0, 2])
def test_a_pass_that_does_not_use_each_norm_once_is_refused(times: int) -> None:
    norms = [GroupedBatchNorm(CHANNELS) for _ in range(2)]
    statistics = BatchStatistics(norms, CPU, 4)
    norms[0](batch(4, ()))
    for _ in range(times):
        norms[1](batch(4, ()))
    with raises(UsageError, code="plugin-result"):
        statistics.collect(4)


def test_what_is_collected_is_counted_once_and_what_is_forgotten_never() -> None:
    norm = GroupedBatchNorm(CHANNELS)
    statistics = see(norm, [batch(4, ())])
    once = statistics.sums.clone()
    norm(batch(4, (), seed=1))
    statistics.forget()
    norm(batch(4, ()))
    statistics.collect(4)
    assert once.any()
    assert torch.equal(statistics.sums, 2 * once)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 2.0**35])
def test_statistics_that_are_not_finite_or_too_large_are_noted_until_cleared(bad: float) -> None:
    norm = GroupedBatchNorm(CHANNELS)
    statistics = see(norm, [batch(4, ()), torch.full((4, CHANNELS), bad), batch(4, ())])
    assert statistics.out_of_range
    statistics.clear()
    assert not statistics.out_of_range
    assert not statistics.sums.any()
    norm(batch(4, ()))
    statistics.collect(4)
    assert not statistics.out_of_range


@PROPERTY
@given(cuts=st.sets(st.integers(2, 4094), max_size=9), group_size=st.sampled_from([None, 2]))
def test_the_range_does_not_depend_on_groups_and_no_sum_leaves_it(cuts: set[int], group_size: int | None) -> None:
    limit = torch.tensor(STATISTICS.limit / 4096)
    for value, is_out in ((limit.nextafter(torch.zeros(())), False), (limit, True)):
        inputs = torch.tensor_split(value.expand(4096, 1), sorted(cuts))
        statistics = see(GroupedBatchNorm(1, group_size), inputs)
        assert bool(statistics.out_of_range) is is_out
        mean = STATISTICS.decode(statistics.sums)[0] / 4096
        assert is_out or mean == pytest.approx(float(value), rel=1e-6)


def test_statistics_are_collected_without_the_dropout_of_the_model_and_its_norms() -> None:
    norm, dropout = GroupedBatchNorm(CHANNELS), nn.Dropout()
    norm.add_module("drop", nn.Dropout())
    model = nn.Sequential(norm, dropout)
    collect_statistics(model)
    assert [each.training for each in model.modules()] == [False, True, False, False]
