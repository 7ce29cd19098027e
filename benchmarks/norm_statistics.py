"""`python -m benchmarks.norm_statistics FIGURE`: the effect of weight noise on running norm statistics.

Trains VGG9 on Fashion-MNIST with SmoothOut, and every few updates takes the test loss at the clean weights twice: with
the running statistics, collected under noise, and with statistics recomputed from training data.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from matplotlib.figure import Figure

from benchmarks.subject import QUIET, open_trainer, settings
from dist_train.cluster.communicator import SingleProcess
from dist_train.training.evaluation import Evaluation, evaluate, recompute_statistics, statistics_samples
from dist_train.training.trainer import Trainer

_AMPLITUDES = (0.0, 0.05, 0.15)
_STEPS, _EVERY, _TEST_SAMPLES = 64, 8, 2000
_RUNNING, _RECOMPUTED = "#D55E00", "#0072B2"


@dataclass(frozen=True)
class Point:
    """Evaluations of the test split at the clean weights after `step` updates, with both kinds of statistics."""

    step: int
    running: Evaluation
    recomputed: Evaluation


def main() -> None:
    """Train, print the numbers, draw."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.norm_statistics", description=__doc__)
    parser.add_argument("figure", type=Path, help="file of the figure, .png or .svg")
    output: Path = parser.parse_args().figure
    curves = {amplitude: follow(amplitude) for amplitude in _AMPLITUDES}
    print("amplitude  step  test loss: running  recomputed   test accuracy: running  recomputed")
    for amplitude, points in curves.items():
        for point in points[1::2]:
            print(
                f"{amplitude:9g}  {point.step:4d}  {point.running.loss:18.3f}  {point.recomputed.loss:10.3f}"
                f"   {point.running.accuracy:22.3f}  {point.recomputed.accuracy:10.3f}"
            )
    draw(curves, output)


def follow(amplitude: float) -> list[Point]:
    """Train with noise of `amplitude`, evaluating every few updates."""
    sections: dict[str, dict[str, Any]] = {
        **{name: dict(values) for name, values in QUIET.items()},
        "data": {"name": "fashion-mnist", "train_size": 4096},
        "model": {"norm": "ghost", "norm_statistics": "running", "norm_samples": 1024},
        "noise": {"method": "smoothout", "amplitude": amplitude},
        "optimizer": {"learning_rate": 0.05},
    }
    config = settings(0.125, 512, **sections)
    with TemporaryDirectory() as folder:
        trainer = open_trainer(config, SingleProcess(), Path(folder))
        points = []
        for step in range(1, _STEPS + 1):
            trainer.advance()
            if step % _EVERY == 0:
                points.append(evaluate_both(trainer))
        trainer.close()
    return points


def evaluate_both(trainer: Trainer) -> Point:
    """Evaluate with both kinds of statistics, and restore the running ones."""
    running = _evaluate(trainer)
    kept = {name: buffer.clone() for name, buffer in trainer.network.named_buffers()}
    size = trainer.plan.micro_size
    recompute_statistics(
        trainer.network,
        trainer.splits.train,
        statistics_samples(len(trainer.splits.train), trainer.config.model.norm_samples, size, 0),
        micro_size=size,
        compute=trainer.training_step.compute,
        comm=trainer.comm,
    )
    recomputed = _evaluate(trainer)
    for name, buffer in trainer.network.named_buffers():
        buffer.copy_(kept[name])
    return Point(trainer.progress.step, running, recomputed)


def _evaluate(trainer: Trainer) -> Evaluation:
    return evaluate(
        trainer.network,
        trainer.splits.test,
        _TEST_SAMPLES,
        batch_size=trainer.config.evaluation.batch_size,
        compute=trainer.training_step.compute,
        comm=trainer.comm,
    )


def draw(curves: Mapping[float, Sequence[Point]], output: Path) -> None:
    """Draw one panel for each amplitude, on one scale."""
    figure = Figure(figsize=(9.5, 3.4), layout="constrained")
    panels = figure.subplots(1, len(curves), sharey=True, squeeze=False)[0]
    for panel, (amplitude, points) in zip(panels, curves.items(), strict=True):
        steps = [point.step for point in points]
        panel.plot(steps, [point.running.loss for point in points], "o-", color=_RUNNING, label="running")
        panel.plot(steps, [point.recomputed.loss for point in points], "s--", color=_RECOMPUTED, label="recomputed")
        panel.set_title(f"uniform noise, amplitude {amplitude:g}" if amplitude else "no noise")
        panel.set_xlabel("updates")
        panel.grid(color="#e4e4e4")
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("test loss at the clean weights")
    panels[-1].legend(title="norm statistics", frameon=False)
    figure.savefig(output, dpi=150)


if __name__ == "__main__":
    main()
