"""Sums as integers: the same bits in any order, one small rounding a term."""

from __future__ import annotations

from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_train.fixed_point import GRADIENTS, LOSSES, STATISTICS, FixedPoint

PROPERTY = settings(deadline=None, max_examples=60)
REPRESENTATIONS = st.sampled_from([GRADIENTS, STATISTICS, LOSSES])
FLOATS = st.lists(st.floats(-1000, 1000, width=32), min_size=1, max_size=40)


@PROPERTY
@given(REPRESENTATIONS, FLOATS, st.integers(1, 6), st.randoms(use_true_random=False))
def test_promise_3_a_sum_does_not_depend_on_order_or_grouping(
    fixed: FixedPoint, values: list[float], groups: int, random: Random
) -> None:
    in_order = fixed.encode(torch.tensor(values)).sum()
    shuffled = list(values)
    random.shuffle(shuffled)
    parts = [fixed.encode(torch.tensor(shuffled[group::groups], dtype=torch.float32)).sum() for group in range(groups)]
    assert torch.stack(parts).sum() == in_order


@PROPERTY
@given(REPRESENTATIONS, FLOATS, st.sampled_from([torch.float32, torch.float64]))
def test_a_value_loses_less_than_one_unit_of_the_last_place(
    fixed: FixedPoint, values: list[float], dtype: torch.dtype
) -> None:
    exact = torch.tensor(values, dtype=dtype)
    error = (fixed.decode(fixed.encode(exact)) - exact.to(torch.float64)).abs()
    assert error.max() < 2.0**-fixed.bits


@PROPERTY
@given(REPRESENTATIONS, st.lists(st.integers(-(2**52), 2**52), min_size=1, max_size=20))
def test_what_can_be_represented_comes_back_bit_identically(fixed: FixedPoint, integers: list[int]) -> None:
    values = torch.tensor(integers, dtype=torch.float64) * 2.0**-fixed.bits
    assert torch.equal(fixed.decode(fixed.encode(values)), values)


@pytest.mark.parametrize("fixed", [GRADIENTS, STATISTICS, LOSSES])
def test_two_terms_just_below_the_limit_still_fit(fixed: FixedPoint) -> None:
    largest = torch.nextafter(torch.tensor(fixed.limit), torch.tensor(0.0))
    total = fixed.encode(largest.repeat(2)).sum()
    assert fixed.decode(total) == 2 * largest.to(torch.float64)


def test_encoding_and_decoding_leave_their_arguments_as_they_were() -> None:
    values = torch.tensor([0.1, -3.0])
    integers = GRADIENTS.encode(values)
    before = integers.clone()
    GRADIENTS.decode(integers)
    assert torch.equal(values, torch.tensor([0.1, -3.0]))
    assert torch.equal(integers, before)
