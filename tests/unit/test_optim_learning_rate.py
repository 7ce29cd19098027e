"""The learning rate: scaling, warm-up, decay, by their formulas."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_train.cluster.communicator import SingleProcess
from dist_train.config import ScheduleSettings
from dist_train.optim.schedules import LearningRate
from dist_train.outcome import UsageError
from dist_train.rundir.epochs import Epochs
from tests.raising import raises
from tests.unit.small_trainers import build_trainer, small_config

STEPS = 10


def calendar(global_size: int, updates: int) -> Epochs:
    return Epochs.of([(0, global_size)], lambda _: updates)


def rate(base: float = 0.1, global_size: int = 1024, epochs: int = 20, **fields: Any) -> LearningRate:
    return LearningRate(ScheduleSettings(**fields), base, global_size, epochs, calendar(global_size, STEPS))


@pytest.mark.parametrize(("scaling", "factor"), [("none", 1.0), ("linear", 8.0), ("sqrt", math.sqrt(8))])
def test_it_is_scaled_for_the_global_batch(scaling: str, factor: float) -> None:
    assert rate(scaling=scaling, base_batch=128).at(0) == pytest.approx(0.1 * factor)
    assert rate(scaling=scaling, base_batch=1024).at(0) == pytest.approx(0.1)


def test_it_rises_from_the_unscaled_rate_in_a_straight_line() -> None:
    warming = rate(scaling="linear", base_batch=128, warmup_epochs=2)
    assert warming.at(0) == pytest.approx(0.1)
    assert warming.at(10) == pytest.approx(0.1 + 0.7 / 2)
    assert warming.at(19) == pytest.approx(0.1 + 0.7 * 0.95)
    assert [warming.at(step) for step in (20, 21, 199)] == pytest.approx([0.8] * 3)


def test_a_warm_up_may_end_within_an_epoch_and_fill_the_run() -> None:
    assert rate(scaling="linear", warmup_epochs=0.5).at(5) == pytest.approx(0.8)
    whole = rate(scaling="linear", warmup_epochs=20, decay="cosine")
    assert whole.at(199) == pytest.approx(0.1 + 0.7 * 199 / 200)
    assert whole.at(200) == pytest.approx(0.8)


def test_steps_of_decay_come_at_the_beginning_of_their_epochs() -> None:
    stepped = rate(decay="step", milestones=(5.0, 7.5), factor=0.1)
    values = [stepped.at(step) for step in (0, 49, 50, 74, 75, 199)]
    assert values == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])


def test_milestones_count_from_the_beginning_of_the_run_also_after_a_warm_up() -> None:
    stepped = rate(decay="step", milestones=(5.0,), scaling="linear", warmup_epochs=2)
    assert [stepped.at(step) for step in (20, 49, 50)] == pytest.approx([0.8, 0.8, 0.08])


@pytest.mark.parametrize("warmup", [0, 4])
def test_a_cosine_falls_from_the_peak_to_zero_over_what_is_left_of_the_run(warmup: int) -> None:
    falling = rate(decay="cosine", warmup_epochs=warmup)
    for step in range(warmup * STEPS, 20 * STEPS, 7):
        part = (step / STEPS - warmup) / (20 - warmup)
        assert falling.at(step) == pytest.approx(0.1 * (1 + math.cos(math.pi * part)) / 2)
    assert falling.at(warmup * STEPS) == pytest.approx(0.1)
    assert falling.at(20 * STEPS) == pytest.approx(0.0)
    assert falling.at(30 * STEPS) == pytest.approx(0.0)


def at_will(over: float, options: dict[str, float]) -> float:
    return options["value"]


@pytest.mark.parametrize("value", [-0.5, math.nan, math.inf])
def test_a_plugin_s_factor_is_finite_and_not_below_0(value: float) -> None:
    assert rate(decay=f"{__name__}:at_will", options={"value": 0.5}).at(7) == pytest.approx(0.05)
    with raises(UsageError, code="plugin-result") as refused:
        rate(decay=f"{__name__}:at_will", options={"value": value}).at(7)
    assert "at_will" in str(refused.value)
    assert "update 8" in str(refused.value)


@pytest.mark.parametrize(("power", "warmup"), [(1.0, 0), (2.0, 0), (2.0, 5), (0.5, 2)])
def test_a_polynomial_falls_from_the_peak_to_zero_by_its_power(power: float, warmup: int) -> None:
    falling = rate(decay="poly", power=power, warmup_epochs=warmup, scaling="sqrt", base_batch=256)
    for step in range(warmup * STEPS, 20 * STEPS, 7):
        left = (20 * STEPS - step) / ((20 - warmup) * STEPS)
        assert falling.at(step) == pytest.approx(0.2 * left**power)
    assert falling.at(warmup * STEPS) == pytest.approx(0.2)
    assert falling.at(20 * STEPS) == 0.0
    assert falling.at(25 * STEPS) == 0.0


@pytest.mark.parametrize("decay", ["step", "cosine", "poly"])
@pytest.mark.parametrize("per_epoch", [390, 468, 7])
def test_kept_updates_go_at_the_rates_of_base_batch_training(
    decay: Literal["step", "cosine", "poly"], per_epoch: int
) -> None:
    """390 updates of 128 an epoch, 6 of 8192: warm-up, milestones and end fall on the same updates."""
    settings = ScheduleSettings(decay=decay, milestones=(3.0, 4.7, 6.0), warmup_epochs=1.5, keep_updates=True)
    small = LearningRate(settings, 0.1, 128, 8, calendar(128, per_epoch))
    large = LearningRate(settings, 0.1, 8192, 8, calendar(128, per_epoch))
    assert [large.at(step) for step in range(8 * per_epoch + 1)] == [
        small.at(step) for step in range(8 * per_epoch + 1)
    ]


def test_the_paper_s_rates() -> None:
    large = LearningRate(
        ScheduleSettings(
            scaling="sqrt", base_batch=128, warmup_epochs=10, decay="step", milestones=(150.0, 225.0, 275.0)
        ),
        base=0.1,
        global_size=8192,
        epochs=300,
        calendar=calendar(8192, 6),
    )
    values = [large.at(6 * epoch) for epoch in (0, 5, 10, 149, 150, 225, 275, 299)]
    assert values == pytest.approx([0.1, 0.45, 0.8, 0.8, 0.08, 0.008, 0.0008, 0.0008])


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(["none", "linear", "sqrt"]),
    st.sampled_from(["constant", "step", "cosine", "poly"]),
    st.floats(0, 20),
    st.integers(0, 199),
    st.integers(1, 100_000),
)
def test_it_stays_between_zero_and_the_larger_of_base_and_peak(
    scaling: str, decay: str, warmup: float, step: int, global_size: int
) -> None:
    any_rate = rate(global_size=global_size, scaling=scaling, decay=decay, warmup_epochs=warmup, milestones=(3.0, 15.0))
    assert 0 <= any_rate.at(step) <= max(any_rate.base, any_rate.peak) * (1 + 1e-12)


def test_a_run_with_kept_updates_has_those_of_base_batch_training(tmp_path: Path) -> None:
    """100 samples are 7 updates of 13 an epoch, but 3 of 26."""
    kept = small_config(schedule={"keep_updates": True, "base_batch": 13, "decay": "step", "milestones": [1.0]})
    trainer = build_trainer(kept, tmp_path / "kept", SingleProcess())
    assert trainer.total_steps == trainer.last_step == 2 * 7
    assert [trainer.learning_rate.at(step) for step in (0, 6, 7, 13)] == pytest.approx([0.05, 0.05, 0.005, 0.005])
    plain = build_trainer(small_config(schedule={"base_batch": 13}), tmp_path / "plain", SingleProcess())
    assert plain.total_steps == 2 * 3
