"""`dist-train landscape interpolate A B`, `landscape direction A`, `landscape plane A`."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dist_train.analysis.landscape import Request

_TARGET = "a checkpoint, or a run directory: its last one"
_REPORT_SECONDS = 10.0


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command's arguments."""
    parser = subparsers.add_parser(
        "landscape",
        help="loss and accuracy along a line or over a plane in weight space",
        description="Evaluate a network at many points of weight space, shared out over the ranks of mpirun or "
        "srun; write the points as CSV, and figures. The same command resumes where a killed one ended.",
    )
    kinds = parser.add_subparsers(title="kinds", metavar="KIND", dest="kind", required=True)
    line = kinds.add_parser("interpolate", help="the line through two checkpoints")
    line.add_argument("targets", nargs=2, type=Path, metavar="CHECKPOINT", help=f"A (0) and B (1): {_TARGET}")
    _add_axis(line, (-0.5, 1.5), 41)
    direction = kinds.add_parser("direction", help="random directions from one checkpoint")
    direction.add_argument("targets", nargs=1, type=Path, metavar="CHECKPOINT", help=_TARGET)
    direction.add_argument("--directions", type=int, default=1, metavar="N", help="how many directions (default: 1)")
    _add_axis(direction, (-1.0, 1.0), 51)
    _add_directions(direction)
    plane = kinds.add_parser("plane", help="the plane of two directions from one checkpoint")
    plane.add_argument("targets", nargs=1, type=Path, metavar="CHECKPOINT", help=_TARGET)
    plane.add_argument(
        "--trajectory",
        action="store_true",
        help="the two principal directions of the run's checkpoints, which are drawn over the plane",
    )
    _add_axis(plane, (-1.0, 1.0), 21)
    _add_directions(plane)
    for kind in (line, direction, plane):
        _add_measure(kind)
        kind.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Evaluate, draw, and print the widths and the folder. Raises UsageError where something does not fit."""
    from dist_train.analysis.basin_width import describe
    from dist_train.analysis.landscape import make_landscape
    from dist_train.cluster.points import join_points
    from dist_train.outcome import ExitCode

    ranks = join_points()
    request = ranks.run_on_all_ranks(lambda: _request(arguments), "read the options")
    report = _Progress(ranks.size).report if ranks.rank == 0 else _silent
    finished = make_landscape(request, ranks, report)
    if finished is not None:
        if finished.was_there:
            print("nothing to evaluate: this result was there", file=sys.stderr)
        if finished.not_finite:
            print(f"the loss is not finite in {finished.not_finite} rows of points.csv", file=sys.stderr)
        for width in finished.widths:
            print(describe(width))
        print(finished.folder)
    return ExitCode.FINISHED


def _add_axis(parser: argparse.ArgumentParser, reach: tuple[float, float], points: int) -> None:
    parser.add_argument(
        "--range",
        nargs=2,
        type=float,
        default=reach,
        metavar=("FROM", "TO"),
        help=f"first and last alpha (default: {reach[0]:g} {reach[1]:g})",
    )
    parser.add_argument("--points", type=int, default=points, metavar="N", help=f"a line (default: {points})")


def _add_directions(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--normalization",
        choices=("filter", "layer", "none"),
        default="filter",
        help="give each filter, or each layer, of a direction the norm of the weights'; none: as drawn",
    )
    parser.add_argument(
        "--exclude",
        nargs="*",
        default=("norm", "bias"),
        metavar="WHAT",
        help="weights that stay: norm, bias, or names with * and ? (default: norm bias; nothing: all move)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the directions (default: 0)")


def _add_measure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="data.root=DIR, for instance")
    parser.add_argument(
        "--samples",
        type=_number_or_all,
        default=10_000,
        metavar="N",
        help="training samples, a seeded choice, or all (default: 10000)",
    )
    parser.add_argument(
        "--test-samples", type=_number_or_all, default=None, metavar="N", help="test samples, likewise (default: all)"
    )
    parser.add_argument("--subset-seed", type=int, default=0, metavar="SEED", help="seed of these choices (default: 0)")
    parser.add_argument(
        "--statistics",
        choices=("recomputed", "interpolated"),
        default="recomputed",
        help="the norms' running statistics: recomputed at each point from training data, or interpolated like the "
        "weights, which along directions leaves the checkpoint's",
    )
    parser.add_argument(
        "--statistics-samples",
        type=int,
        metavar="N",
        help="training samples that they are recomputed from (default: the run's model.norm_samples)",
    )
    parser.add_argument(
        "--batch-size", type=int, metavar="N", help="samples of a pass (default: 100 on a CPU, 1000 on a GPU)"
    )
    parser.add_argument(
        "--precision", choices=("float32", "run"), default="float32", help="run: as precision.compute says"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads of a rank (default: its share)")
    parser.add_argument("--scale", choices=("linear", "log"), default="linear", help="scale of the loss in the figures")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="folder for the result's folder (default: RUN/analysis)"
    )


def _number_or_all(text: str) -> int | None:
    return None if text == "all" else int(text)


def _request(arguments: argparse.Namespace) -> Request:
    from dist_train.analysis.landscape import Request
    from dist_train.analysis.landscape_files import DirectionSettings, LandscapeSettings, MeasureSettings

    directions = DirectionSettings()
    if arguments.kind != "interpolate":
        directions = DirectionSettings(arguments.normalization, tuple(arguments.exclude), arguments.seed)
    measure = MeasureSettings(
        arguments.samples,
        arguments.test_samples,
        arguments.statistics,
        arguments.statistics_samples,
        arguments.batch_size,
        arguments.precision,
        arguments.subset_seed,
    )
    settings = LandscapeSettings(
        arguments.kind,
        arguments.range[0],
        arguments.range[1],
        arguments.points,
        measure,
        directions,
        getattr(arguments, "directions", 1),
        getattr(arguments, "trajectory", False),
    )
    return Request(
        arguments.targets, settings, arguments.overrides, arguments.output, arguments.threads, arguments.scale
    )


def _silent(done: int, total: int) -> None:
    """Leave the talking to the first rank."""


class _Progress:
    """What the first rank says of its own points, every few seconds."""

    def __init__(self, ranks: int) -> None:
        self._whose = "points" if ranks == 1 else f"points of the first of {ranks} ranks"
        self._begun = self._told = time.monotonic()

    def report(self, done: int, total: int) -> None:
        """Say how far it is, and how long it will take."""
        now = time.monotonic()
        if done == 0:
            self._begun = self._told = now
        elif now - self._told >= _REPORT_SECONDS:
            self._told = now
            pace = (now - self._begun) / done
            text = f"{done} of {total} {self._whose}, {pace:.2g} s each, {pace * (total - done):.0f} s left"
            print(text, file=sys.stderr, flush=True)
