"""Series are told apart: by everybody's eyes, on both grounds, and also where there are more than colours."""

from __future__ import annotations

import itertools
import math
import operator
import re
from collections.abc import Sequence
from pathlib import Path

import pytest

import dist_train.report
from dist_train.report.chart import DARK, LIGHT, Frame, style_of, style_rules, ticks
from dist_train.watch.figure import Axis, Chart, Point, Series, epochs_axis, loss_axis, plain

Linear = Sequence[float]

# Machado, Oliveira, Fernandes, 2009, at full severity, on linear RGB.
VISIONS = {
    "normal": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "protanopia": ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)),
    "deuteranopia": ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.011820, 0.042940, 0.968881)),
    "tritanopia": ((1.255528, -0.076749, -0.178779), (-0.078411, 0.930809, 0.147602), (0.004733, 0.691367, 0.303900)),
}


def dot(first: Linear, second: Linear) -> float:
    return float(sum(map(operator.mul, first, second)))


def linear(colour: str) -> list[float]:
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    return [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]


def seen(colour: Linear, vision: Sequence[Linear]) -> list[float]:
    return [min(1.0, max(0.0, dot(row, colour))) for row in vision]


def lightness(colour: Linear) -> float:
    return dot((0.2126, 0.7152, 0.0722), colour)


def lab(colour: Linear) -> tuple[float, float, float]:
    x = dot((0.4124, 0.3576, 0.1805), colour) / 0.95047
    z = dot((0.0193, 0.1192, 0.9505), colour) / 1.08883
    fx, fy, fz = (t ** (1 / 3) if t > 0.008856 else 7.787 * t + 16 / 116 for t in (x, lightness(colour), z))
    return 116 * fy - 16, 500 * (fx - fy), 200 * (fy - fz)


@pytest.mark.parametrize("vision", VISIONS)
@pytest.mark.parametrize("colours", [LIGHT, DARK], ids=["light", "dark"])
def test_colours_are_told_apart(colours: Sequence[str], vision: str) -> None:
    """A distance of 2 is just seen side by side; the palette before had 4.2."""
    places = [lab(seen(linear(colour), VISIONS[vision])) for colour in colours]
    assert min(math.dist(*pair) for pair in itertools.combinations(places, 2)) > 30


@pytest.mark.parametrize(("colours", "at"), [(LIGHT, 0), (DARK, 1)], ids=["light", "dark"])
def test_lines_stand_out_from_their_ground(colours: Sequence[str], at: int) -> None:
    style = (Path(dist_train.report.__file__).parent / "style.css").read_text()
    ground = lightness(linear(re.findall(r"--paper: (#\w{6})", style)[at]))
    for colour in map(lightness, map(linear, colours)):
        assert (max(ground, colour) + 0.05) / (min(ground, colour) + 0.05) >= 3


def test_twenty_variants_beside_the_baseline_have_looks_of_their_own() -> None:
    assert len({style_of(f"s{number}") for number in range(21)}) == 21
    assert not any(style_of(f"s{number}").dashes for number in range(len(LIGHT)))


def test_every_style_has_one_rule() -> None:
    rules = list(style_rules(["s0", "s6", "loss"]))
    assert rules[-3:] == [
        ".s0{--c:var(--c0)}",
        ".s6{--c:var(--c1);--dash:7 3;--stroke:dashed;--fill:color-mix(in srgb,var(--c1) 0%,var(--paper))}",
        ".loss{--c:var(--c1)}",
    ]


@pytest.mark.parametrize(("low", "high"), [(2.1, 4.9), (0.6, 1.9), (1.2e-3, 1.9e-3), (5.5, 9.5)])
def test_a_short_logarithmic_axis_has_ticks(low: float, high: float) -> None:
    found = ticks(Axis("x", low, high, plain, is_logarithmic=True))
    assert 2 <= len(found) <= 7
    assert all(low <= tick <= high for tick in found)


@pytest.mark.parametrize(("low", "high"), [(1.2e-4, 0.04), (1.3e-7, 6e-4), (11.0, 8e6), (0.01, 0.6)])
def test_labels_of_a_logarithmic_horizontal_axis_are_apart(low: float, high: float) -> None:
    axis = Axis("x", low, high, plain, is_logarithmic=True)
    frame = Frame(Chart("key", "", "", axis, Axis("y", 0.0, 1.0, plain), ()))
    letter = 7.2  # the widest, of 12.5 px
    labels = [(frame.x(tick), letter * len(plain(tick)) / 2) for tick in frame.x_ticks]
    assert len(labels) > 1
    assert all(left + half + letter < right - other for (left, half), (right, other) in itertools.pairwise(labels))


def test_a_blow_up_does_not_hide_the_losses() -> None:
    axis = loss_axis("loss", [2.3, 1.5, 1e9, 0.5, 0.3, 0.02])
    assert axis.is_logarithmic
    assert axis.low < 0.02
    assert axis.high < 1e4
    assert loss_axis("loss", [1e9, 1e8, 1e7]).high > 1e9, "losses that are large throughout are shown"


def test_losses_below_0_lie_within_their_axis() -> None:
    axis = loss_axis("loss", [2.0, 0.5, math.nan, -1.0])
    assert not axis.is_logarithmic
    assert 0 < axis.share(-1.0) < axis.share(2.0) < 1


@pytest.mark.parametrize(("last", "count"), [(6.0, 7), (10.0, 6), (30.0, 7), (200.0, 5)])
def test_the_last_point_lies_within_the_axis_and_ticks_are_those_of_its_epochs(last: float, count: int) -> None:
    axis = epochs_axis([Series("test", "test", (Point(last, 1.0),))])
    assert axis.share(last) < 0.99
    assert len(ticks(axis)) == count
    assert ticks(axis)[-1] == last
