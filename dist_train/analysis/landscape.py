"""A landscape: loss and accuracy at many points of weight space, from checkpoints to a folder of results."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from dist_train.analysis.directions import (
    FACTORS,
    Trajectory,
    Width,
    basin_width,
    check_exclusions,
    random_direction,
    run_checkpoints,
    summarize,
    trace,
)
from dist_train.analysis.landscape_files import (
    Identity,
    LandscapeFolder,
    LandscapeSettings,
    Point,
    PointRow,
    read_landscape,
)
from dist_train.analysis.landscape_points import (
    PointEvaluator,
    Subject,
    Walk,
    along,
    axis,
    interpolation,
    line_points,
    open_subject,
    place_in,
    plane_points,
    variances_of,
)
from dist_train.checkpoint.files import Stored, read_stored
from dist_train.cluster.communicator import Communicator, broadcast_str, run_on_all_ranks
from dist_train.cluster.points import deal
from dist_train.optim.flat_weights import FlatWeights
from dist_train.outcome import UsageError
from dist_train.rundir.paths import RunDirectory
from dist_train.training.compute import share_of_threads

Report = Callable[[int, int], None]
"""(finished, total) points of this rank."""


@dataclass(frozen=True)
class Request:
    """What a user asks for; `targets` are checkpoints or run directories, two to interpolate between, else one."""

    targets: Sequence[Path]
    settings: LandscapeSettings
    overrides: Sequence[str] = ()
    output: Path | None = None
    """Folder that the result's folder is made in; None: `analysis` in the first target's run directory."""
    threads: int | None = None
    """CPU threads of a rank; None: the node's cores shared out. The result does not depend on it."""
    scale: Literal["linear", "log"] = "linear"


@dataclass(frozen=True)
class Finished:
    """A result, and what was found in it."""

    folder: Path
    widths: Sequence[Width]
    was_there: bool
    not_finite: int
    """Rows of points.csv whose loss is not finite."""


@dataclass(frozen=True)
class _Course:
    """The points in order, how to walk to them, and what is known of them before."""

    points: Sequence[Point]
    walk: Walk
    checkpoints: Sequence[Stored]
    found: dict[str, Any] = field(default_factory=dict)
    trajectory: Trajectory | None = None


def make_landscape(request: Request, comm: Communicator, report: Report) -> Finished | None:
    """Evaluate what is not there yet, and draw; None on ranks but the first.

    Raises:
        UsageError: checkpoints, data or settings do not fit; the folder cannot be written.
    """
    settings = request.settings
    stored = run_on_all_ranks(comm, lambda: [read_stored(target) for target in request.targets], "read the checkpoints")

    def opened() -> tuple[Subject, _Course]:
        subject = open_subject(stored[0], request.overrides, settings.measure, local_rank=comm.local_rank)
        return subject, _course(settings, stored, subject)

    subject, course = run_on_all_ranks(comm, opened, "open the checkpoints and their data")
    checkpoints = [checkpoint.record() for checkpoint in course.checkpoints]
    identity = Identity(settings.kind, checkpoints, {**settings.record(), **subject.record()})
    folder = LandscapeFolder(request.output or RunDirectory.of_checkpoint(stored[0].path.resolve()).analysis, identity)
    was_there = run_on_all_ranks(comm, lambda: comm.rank == 0 and folder.begin(), "begin the result")
    if not json.loads(broadcast_str(comm, json.dumps(was_there), "result")):
        _measure_all(folder, subject, course, comm, request.threads, report)
    if comm.rank != 0:
        return None
    rows = read_landscape(folder.path).rows
    widths = _widths(settings, course.points, rows)
    not_finite = sum(not math.isfinite(row.loss) for row in rows)
    folder.save_settings({"widths": summarize(widths), "not_finite": not_finite, **course.found})
    # matplotlib takes most of a second to load, and only the first rank draws.
    from dist_train.analysis.landscape_figures import draw_landscape

    outputs = [folder.path / f"figure.{form}" for form in ("svg", "pdf", "png")]
    draw_landscape(read_landscape(folder.path), outputs, request.scale, course.trajectory)
    return Finished(folder.path, widths, was_there, not_finite)


def _course(settings: LandscapeSettings, stored: Sequence[Stored], subject: Subject) -> _Course:
    if settings.kind == "interpolate":
        first, second = stored
        if first.sha256 == second.sha256:
            raise UsageError(
                f"{first.path} and {second.path} are the same checkpoint: there is no line between them",
                code="same-checkpoint",
            )
        there = place_in(second, subject)
        points = line_points(axis(settings.start, settings.stop, settings.points), 1)
        distance = float((there.weights.double() - subject.place.weights.double()).norm())
        walk = interpolation(subject.place, there, variances_of(subject.model))
        return _Course(points, walk, stored, {"distances": [distance]})
    weights = FlatWeights(subject.model)
    choice = settings.directions
    check_exclusions(weights, choice.exclude)
    if settings.trajectory:
        checkpoints = run_checkpoints(stored[0].path)
        trajectory = trace(checkpoints, subject, weights.mask(choice.exclude))
        alphas, betas = (axis(*reach, settings.points) for reach in trajectory.reaches)
        walk = along(subject.place, lambda _: trajectory.directions)
        return _Course(plane_points(alphas, betas), walk, checkpoints, trajectory.record(), trajectory)
    alphas = axis(settings.start, settings.stop, settings.points)

    def drawn(index: int) -> torch.Tensor:
        return random_direction(weights, choice.normalization, choice.exclude, choice.seed, index)

    if settings.kind == "plane":
        directions = drawn(0), drawn(1)
        return _Course(plane_points(alphas, alphas), along(subject.place, lambda _: directions), stored)
    return _Course(line_points(alphas, settings.lines), along(subject.place, lambda index: (drawn(index),)), stored)


def _measure_all(
    folder: LandscapeFolder, subject: Subject, course: _Course, comm: Communicator, threads: int | None, report: Report
) -> None:
    """Share the points that nobody has finished yet out over the ranks, and write them all."""
    numbers = range(len(course.points))
    left = sorted(set(numbers).difference(folder.finished())) if comm.rank == 0 else []
    mine = deal(json.loads(broadcast_str(comm, json.dumps(left), "points")), comm.rank, comm.size)

    def measure() -> None:
        evaluator = PointEvaluator(
            subject.model,
            [subject.train, subject.test],
            subject.statistics,
            subject.compute,
            threads=threads or share_of_threads(comm.local_size),
        )
        with closing(evaluator):
            for done, number in enumerate(mine):
                report(done, len(mine))
                folder.keep(comm.rank, number, evaluator.evaluate(course.walk(course.points[number])))

    run_on_all_ranks(comm, measure, "evaluate its points")
    if comm.rank == 0:
        folder.write_points(course.points, folder.finished())


def _widths(settings: LandscapeSettings, points: Sequence[Point], rows: Sequence[PointRow]) -> list[Width]:
    """Return the basins' widths along each line; a line between two checkpoints has a basin at each end."""
    if settings.kind == "plane":
        return []
    widths = []
    for direction in sorted({point.direction for point in points}):
        line = [row for row in rows if row.direction == direction and row.split == "train"]
        alphas, losses = [row.alpha for row in line], [row.loss for row in line]
        basins = {"A": list(range(len(line)))}
        if settings.kind == "interpolate":
            basins = {
                "A": [index for index, alpha in enumerate(alphas) if alpha < 0.5],
                "B": [index for index, alpha in enumerate(alphas) if alpha > 0.5],
            }
        widths += [
            basin_width(alphas, losses, factor, direction=direction, basin=basin, among=among)
            for basin, among in basins.items()
            for factor in FACTORS
        ]
    return [width for width in widths if width is not None]
