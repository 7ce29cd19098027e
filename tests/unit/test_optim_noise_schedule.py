"""How the amplitude goes over a run: each schedule by its formula, and where it begins and ends."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from dist_train.config import NoiseSchedule
from dist_train.optim.schedules import noise_factor
from dist_train.outcome import UsageError
from tests.raising import raises

FORMULAS: dict[str, tuple[dict[str, float], Callable[[int, int], float]]] = {
    "constant": ({}, lambda t, total: 1.0),
    "linear": ({}, lambda t, total: 1 - t / total),
    "cosine": ({}, lambda t, total: (1 + math.cos(math.pi * t / total)) / 2),
    "exponential": ({"final_fraction": 0.05}, lambda t, total: math.exp(math.log(0.05) * t / total)),
    "inverse_power": ({"gamma": 0.8}, lambda t, total: 1 / math.pow(1 + t, 0.4)),
    "late": ({"start": 0.4}, lambda t, total: 0.0 if t < 0.4 * total else 1.0),
    "rise": ({"rise": 3.0}, lambda t, total: 1 + 1.5 * (1 - math.cos(math.pi * t / total))),
    "tanh": ({"steepness": 6.0}, lambda t, total: (math.tanh(6 * (t / total - 0.5)) + 1) / 2),
}


def schedule(kind: str, **parameters: float) -> Any:
    return TypeAdapter(NoiseSchedule).validate_python({"kind": kind, **parameters})


def test_every_kind_of_schedule_is_tested_here() -> None:
    kinds = {member.model_fields["kind"].annotation for member in get_args(get_args(NoiseSchedule)[0])}
    assert {get_args(kind)[0] for kind in kinds} - {"plugin"} == set(FORMULAS)


@settings(deadline=None, max_examples=100)
@given(st.sampled_from(sorted(FORMULAS)), st.integers(1, 100_000), st.data())
def test_it_has_the_value_of_its_formula_between_0_and_1_or_1_and_its_rise(
    kind: str, total: int, data: st.DataObject
) -> None:
    step = data.draw(st.integers(0, total))
    parameters, formula = FORMULAS[kind]
    value = noise_factor(schedule(kind, **parameters), step, total)
    assert value == pytest.approx(formula(step, total), abs=1e-12)
    assert 0 <= value <= 1 + parameters.get("rise", 0)


@pytest.mark.parametrize(("part", "total"), [(55, 100), (7, 100), (14, 400), (28, 200), (75, 1000)])
def test_late_noise_begins_with_its_part_of_the_run(part: int, total: int) -> None:
    first = part * total // 100
    assert [noise_factor(schedule("late", start=part / 100), first + each, total) for each in (-1, 0)] == [0.0, 1.0]


def at_will(step: int, total_steps: int, options: dict[str, float]) -> float:
    return options["value"]


@pytest.mark.parametrize("value", [-0.5, math.nan, math.inf])
def test_a_plugin_s_factor_is_finite_and_not_below_0(value: float) -> None:
    def of(value: float) -> float:
        parameters: Any = {"function": f"{__name__}:at_will", "options": {"value": value}}
        return noise_factor(schedule("plugin", **parameters), 3, 50)

    assert of(1.5) == 1.5
    with raises(UsageError, code="plugin-result") as refused:
        of(value)
    assert "at_will" in str(refused.value)
    assert "update 4" in str(refused.value)


@pytest.mark.parametrize("kind", sorted(FORMULAS))
def test_it_falls_but_for_the_constant_and_those_that_rise(kind: str) -> None:
    values = [noise_factor(schedule(kind), step, 50) for step in range(51)]
    assert values == sorted(values, reverse=kind not in ("tanh", "late", "rise"))
    assert len(set(values)) == {"constant": 1, "late": 2}.get(kind, 51)


@pytest.mark.parametrize(
    ("kind", "first", "last"),
    [
        ("constant", 1.0, 1.0),
        ("linear", 1.0, 0.0),
        ("cosine", 1.0, 0.0),
        ("exponential", 1.0, 0.01),
        ("inverse_power", 1.0, 101**-0.275),
        ("late", 0.0, 1.0),
        ("rise", 1.0, 16.0),
        ("tanh", (math.tanh(-5) + 1) / 2, (math.tanh(5) + 1) / 2),
    ],
)
def test_it_begins_and_ends_by_its_defaults(kind: str, first: float, last: float) -> None:
    assert noise_factor(schedule(kind), 0, 100) == pytest.approx(first, abs=1e-12)
    assert noise_factor(schedule(kind), 100, 100) == pytest.approx(last, abs=1e-12)
