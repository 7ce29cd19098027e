"""`python -m benchmarks.double_well`: gradient descent with and without SmoothOut, with a flat and a sharp minimum.

One weight descends a wide bowl with a narrow dip on its slope that is as deep as the bowl: figure 1 of Naganuma and
Yokota. Starts are uniform over an interval centred on the barrier between the two minima.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from dist_train.config import NoiseSettings
from dist_train.optim.flat_weights import FlatWeights
from dist_train.optim.noise import build_noise
from dist_train.reproducible import generator

FLAT, SHARP = 1.5, -0.5
_BOWL = 0.25
_DIP = 0.25
_DEPTH = _BOWL * (FLAT - SHARP) ** 2 / 2
INTERVAL = (-3.0, 3.0)
STEPS = 60
_RATE = 0.2
AMPLITUDE = 1.0
_SHIFT = 0.3
"""Shift of the figure's test loss relative to the training loss."""
_TRAIN_COLOUR, _TEST_COLOUR, _SMOOTH_COLOUR = "#0072B2", "#D55E00", "#009E73"

PLAIN = NoiseSettings(method="none")
SMOOTHOUT = NoiseSettings(method="smoothout", amplitude=AMPLITUDE)


@dataclass(frozen=True)
class Ends:
    """The starting point of each seed, and its end without and with noise."""

    starts: tuple[float, ...]
    plain: tuple[float, ...]
    smoothed: tuple[float, ...]


def loss(position: Tensor) -> Tensor:
    """Return the loss at `position`: a bowl of curvature 1/4 around 1.5, and a dip of width 1/4 at -1/2."""
    dip = torch.exp((position - SHARP).square() * (-0.5 / _DIP**2))
    return (position - FLAT).square() * (_BOWL / 2) - dip * _DEPTH


def smoothed_loss(position: Tensor, amplitude: float = AMPLITUDE) -> Tensor:
    """Return the mean of the loss over [position - amplitude, position + amplitude]: what SmoothOut descends."""
    bowl = _BOWL * ((position - FLAT) ** 2 + amplitude**2 / 3) / 2
    low, high = ((position - SHARP + side * amplitude) / (math.sqrt(2) * _DIP) for side in (-1, 1))
    area = _DIP * math.sqrt(math.pi / 2) * (torch.erf(high) - torch.erf(low))
    return bowl - _DEPTH * area / (2 * amplitude)


def barrier() -> float:
    """Return the position of the highest loss between the two minima."""
    between = torch.linspace(SHARP, FLAT, 100_001, dtype=torch.float64)
    return float(between[loss(between).argmax()])


def descend(noise_settings: NoiseSettings, start: float, seed: int) -> float:
    """Return the position after `STEPS` updates of torch's SGD from `start`, with gradients under the noise."""
    model = nn.ParameterList([torch.tensor([start])])
    weights = FlatWeights(model)
    noise = build_noise(noise_settings, weights, seed=seed, total_steps=STEPS, rank=0)
    optimizer = torch.optim.SGD(weights.parameters, lr=_RATE)
    position = weights.parameters[0]

    def ascend() -> None:
        torch.autograd.backward(loss(position))

    for step in range(STEPS):
        noise.perturb(step)
        noise.perturb_for(0, ascend)
        weights.gradients.zero_()
        ascend()
        noise.restore()
        noise.before_update(step, _RATE)
        optimizer.step()
        noise.after_update(step)
    return float(weights.values[0])


def run(seeds: int) -> Ends:
    """Descend from `seeds` starting points, each with its own noise."""
    low, high = INTERVAL
    starts = tuple(
        float(torch.empty(1).uniform_(low, high, generator=generator(seed, "double well start")))
        for seed in range(seeds)
    )
    plain, smoothed = (
        tuple(descend(settings, start, seed) for seed, start in enumerate(starts)) for settings in (PLAIN, SMOOTHOUT)
    )
    return Ends(starts, plain, smoothed)


def in_flat_minimum(ends: Sequence[float]) -> int:
    """Return the number of `ends` on the flat minimum's side of the barrier."""
    middle = barrier()
    return sum(end > middle for end in ends)


def table(ends: Ends) -> str:
    """Return a Markdown table of how many starts end in the flat minimum."""
    return (
        f"| {STEPS} updates from the same {len(ends.starts)} starts | end in the flat minimum |\n"
        "|---|---|\n"
        f"| gradient descent | {in_flat_minimum(ends.plain)} |\n"
        f"| SmoothOut, uniform, amplitude {AMPLITUDE:g}, constant | {in_flat_minimum(ends.smoothed)} |"
    )


def draw(ends: Ends, output: Path) -> None:
    """Draw the landscape, and below it a histogram of the ends, into `output`."""
    figure = Figure(figsize=(8, 6.2), layout="constrained")
    landscape, counts = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    _draw_landscape(landscape)
    bins = numpy.linspace(*INTERVAL, 61)
    total = len(ends.starts)
    for values, label, colour in (
        (ends.plain, "gradient descent", "#808080"),
        (ends.smoothed, "SmoothOut", _SMOOTH_COLOUR),
    ):
        text = f"{label}: {in_flat_minimum(values)} of {total} end in the flat minimum"
        counts.hist(values, bins=bins.tolist(), color=colour, alpha=0.75, label=text)
    counts.plot(ends.starts, [-0.05 * total] * total, "|", color="black", markersize=7, label="starts")
    counts.set(xlabel="weight", ylabel="starts that end here", xlim=INTERVAL)
    counts.legend(frameon=False, loc="upper right")
    for axes in (landscape, counts):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(output, dpi=130, metadata={"Software": None})


def _draw_landscape(axes: Axes) -> None:
    x = torch.linspace(*INTERVAL, 1201, dtype=torch.float64)
    axes.plot(x, loss(x), color=_TRAIN_COLOUR, label="training loss")
    axes.plot(x, loss(x - _SHIFT), color=_TEST_COLOUR, ls="--", label=f"the same, moved by {_SHIFT} (a test loss)")
    axes.plot(x, smoothed_loss(x), color=_SMOOTH_COLOUR, lw=2, label="what SmoothOut descends")
    for minimum, name in ((SHARP, "sharp"), (FLAT, "flat")):
        here = torch.tensor(minimum, dtype=torch.float64)
        below, above = float(loss(here)), float(loss(here - _SHIFT))
        axes.annotate("", (minimum, above), (minimum, below), arrowprops={"arrowstyle": "->", "shrinkA": 0})
        text = f"{name}: +{above - below:.2f}"
        axes.annotate(text, (minimum, below), (0, -14), textcoords="offset points", ha="center")
    axes.set(ylabel="loss", ylim=(-0.35, 2.7))
    axes.legend(frameon=False)


def main() -> None:
    """Run, print the table of docs/method.md, and draw the figure if `--output` is given."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.double_well", description=__doc__)
    parser.add_argument("--seeds", type=int, default=100)
    parser.add_argument("-o", "--output", type=Path, help="also draw the figure into this file")
    arguments = parser.parse_args()
    ends = run(arguments.seeds)
    print(table(ends))
    if arguments.output is not None:
        draw(ends, arguments.output)


if __name__ == "__main__":
    main()
