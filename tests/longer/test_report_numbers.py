from __future__ import annotations

import math
from statistics import fmean, stdev

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_train.report.chart import ticks
from dist_train.report.measures import paired_difference, summary
from dist_train.report.sharpness_charts import spearman
from dist_train.watch.figure import Axis, linear_axis, loss_axis, plain


def test_summary_has_the_sample_deviation() -> None:
    found = summary([1.0, 2.0, 4.0])
    assert found is not None
    assert (found.mean, found.deviation, found.count) == (fmean([1, 2, 4]), stdev([1, 2, 4]), 3)


def test_single_value_has_no_deviation_and_none_has_no_summary() -> None:
    found = summary([1.0, math.nan])
    assert found is not None
    assert (found.deviation, found.count) == (None, 1)
    assert summary([math.nan]) is None


@pytest.mark.parametrize(
    ("pairs", "quantile"), [(2, 12.7062), (3, 4.30265), (4, 3.18245), (6, 2.57058), (11, 2.22814), (30, 2.04523)]
)
def test_interval_uses_student_s_quantiles(pairs: int, quantile: float) -> None:
    differences = [float(number**2) for number in range(pairs)]
    found = paired_difference([(0.0, difference) for difference in differences])
    assert found is not None
    half = quantile * stdev(differences) / math.sqrt(pairs)
    assert (found.low, found.high) == pytest.approx((found.difference - half, found.difference + half), rel=1e-4)


def test_difference_is_paired() -> None:
    # pairs that are far apart, with differences of about 1
    found = paired_difference([(1.0, 2.0), (50.0, 51.25), (9.0, 9.75)])
    assert found is not None
    assert found.difference == 1.0
    assert 0 < found.low < 1 < found.high < 2
    assert paired_difference([(1.0, 2.0)]) is None


def test_equal_gaps_that_differ_by_rounding_are_no_difference() -> None:
    first, second = 0.9 - 0.8, 0.8 - 0.7
    assert first != second
    found = paired_difference([(first, second), (first, second), (0.7 - 0.5, 0.7 - 0.5)])
    assert found is not None
    assert (found.difference, found.low, found.high) == (0.0, 0.0, 0.0)
    found = paired_difference([(first, second), (first, second)])
    assert found is not None
    assert (found.difference, found.low, found.high) == (0.0, 0.0, 0.0)


def test_mean_with_censored_values_has_no_deviation() -> None:
    found = summary([1.0, 2.0, 4.0], censored=1)
    assert found is not None
    assert (found.mean, found.deviation, found.count, found.censored) == (fmean([1, 2, 4]), None, 3, 1)


@pytest.mark.parametrize(
    ("first", "second", "sign", "censored"),
    [
        ((False, False), (False, False), "", 0),
        ((False, True), (False, False), "\u2265", 1),
        ((True, False), (False, False), "\u2264", 1),
        ((True, False), (False, True), None, 2),
        ((True, True), (False, False), None, 1),
    ],
)
def test_difference_of_censored_values_is_a_bound_without_an_interval(
    first: tuple[bool, bool], second: tuple[bool, bool], sign: str | None, censored: int
) -> None:
    found = paired_difference([(1.0, 2.0), (5.0, 9.0)], [first, second])
    assert found is not None
    assert (found.difference, found.sign, found.count, found.censored) == (2.5, sign, 2, censored)
    assert math.isnan(found.low) == math.isnan(found.high) == (censored > 0)


def test_rank_correlation_uses_order_only_and_averages_ties() -> None:
    assert spearman([1, 2, 3, 400], [10, 20, 30, 31]) == pytest.approx(1)
    assert spearman([1, 2, 3, 4], [8, 4, 2, 1]) == pytest.approx(-1)
    # by hand: ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4
    assert spearman([1, 5, 5, 9], [1, 2, 3, 4]) == pytest.approx(4.5 / math.sqrt(4.5 * 5))
    assert spearman([1, 1, 1], [1, 2, 3]) is None
    assert spearman([1, 2], [1, 2]) is None


@settings(deadline=None, max_examples=60)
@given(low=st.floats(-1e6, 1e6), reach=st.floats(1e-6, 1e6))
def test_ticks_are_few_and_within_the_axis(low: float, reach: float) -> None:
    axis = linear_axis("x", [low, low + reach], plain)
    found = ticks(axis)
    assert 1 <= len(found) <= 8
    assert all(-1e-6 <= axis.share(tick) <= 1 + 1e-6 for tick in found)


def test_axis_over_many_decades_is_logarithmic() -> None:
    axis = loss_axis("loss", [3.0, 0.001, math.nan, 0.0])
    assert axis.is_logarithmic
    assert {0.001, 0.01, 0.1, 1.0} <= set(ticks(axis))
    assert not loss_axis("loss", [3.0, 0.5]).is_logarithmic
    assert axis.share(0.0) < 0


def test_axis_of_one_value_has_a_length() -> None:
    assert linear_axis("x", [0.0], plain).high > linear_axis("x", [0.0], plain).low
    assert Axis("x", 0.0, 1.0, plain).share(0.25) == 0.25
