"""A landscape, from checkpoints to a folder of results: loss and accuracy at many points of weight space."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dist_train.analysis.directions import (
    FACTORS,
    Width,
    basin_width,
    random_direction,
    run_checkpoints,
    summarize,
    trace,
)
from dist_train.analysis.landscape_files import (
    Identity,
    LandscapeFolder,
    LandscapeSettings,
    Measured,
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
    check_fixed,
    interpolation,
    line_points,
    open_subject,
    place_in,
    plane_points,
    variances_of,
)
from dist_train.checkpoint.files import Stored, find_checkpoint, read_record, read_same
from dist_train.cluster.communicator import Communicator, broadcast_value, run_on_all_ranks
from dist_train.optim.flat_weights import FlatWeights, check_movable
from dist_train.outcome import UsageError
from dist_train.rundir.paths import RunDirectory
from dist_train.training.compute import share_of_threads

Report = Callable[[int, int], None]  # called with (finished, total) points of this rank


@dataclass(frozen=True)
class Finished:
    """A finished result, its basin widths, and whether it existed before."""

    folder: Path
    widths: Sequence[Width]
    was_there: bool
    not_finite: int  # rows of points.csv whose loss is not finite


@dataclass(frozen=True)
class _Plan:
    """The points in order, the function that maps a point to a model state, and what settings.json records of them."""

    points: Sequence[Point]
    walk: Walk
    found: dict[str, Any] = field(default_factory=dict)


def make_landscape(
    targets: Sequence[Path],
    settings: LandscapeSettings,
    comm: Communicator,
    report: Report,
    overrides: Sequence[str] = (),
    output: Path | None = None,
    threads: int | None = None,
) -> Finished | None:
    """Evaluate the missing points; None on all ranks but rank 0. Raises UsageError.

    `targets` are checkpoints or run directories: two to interpolate between, otherwise one. The result's folder is made
    in `output`, by default `analysis` in the first target's run directory. `threads` are CPU threads per rank, by
    default an equal share of the node's cores; the result does not depend on them.
    """

    def choose() -> Sequence[Path]:
        found = [find_checkpoint(target) for target in targets]
        if settings.trajectory:
            read_record(found[0])
            return run_checkpoints(found[0])
        return found

    stored = read_same(comm, choose)
    first = stored[-1 if settings.trajectory else 0]

    def open_all() -> tuple[Subject, _Plan]:
        subject = open_subject(first, overrides, settings, local_rank=comm.local_rank)
        return subject, _plan_points(settings, stored, subject)

    subject, plan = run_on_all_ranks(comm, open_all, "open the checkpoints and their data")
    checkpoints = [checkpoint.record() for checkpoint in stored]
    identity = Identity(settings.kind, checkpoints, {**settings.record(), **subject.record()})
    folder = LandscapeFolder(output or RunDirectory.of_checkpoint(first.path.absolute()).analysis, identity)
    was_there = run_on_all_ranks(comm, lambda: comm.rank == 0 and folder.begin(), "begin the result")
    if not broadcast_value(comm, was_there, "result"):
        _measure_all(folder, subject, plan, comm, threads, report)
    if comm.rank != 0:
        return None
    rows = read_landscape(folder.path).rows
    widths = _widths(settings, plan.points, rows)
    not_finite = sum(not math.isfinite(row.loss) for row in rows)
    folder.save_settings({"widths": summarize(widths), "not_finite": not_finite, **plan.found})
    return Finished(folder.path, widths, was_there, not_finite)


def _plan_points(settings: LandscapeSettings, stored: Sequence[Stored], subject: Subject) -> _Plan:
    if settings.kind == "interpolate":
        first, second = stored
        if first.sha256 == second.sha256:
            raise UsageError(
                f"{first.path} and {second.path} are the same checkpoint: there is no line between them",
                code="same-checkpoint",
            )
        there = place_in(second, subject)
        check_fixed(second, subject.model)
        points = line_points(axis(settings.start, settings.stop, settings.points), 1)
        distance = float((there.weights.double() - subject.place.weights.double()).norm())
        walk = interpolation(subject.place, there, variances_of(subject.model))
        return _Plan(points, walk, {"distances": [distance]})
    weights = FlatWeights(subject.model)
    check_movable(weights, settings.exclude, "--exclude")
    if settings.trajectory:
        trajectory = trace(stored, subject, weights.mask(settings.exclude))
        alphas, betas = (axis(*reach, settings.points) for reach in trajectory.reaches)
        walk = along(subject.place, lambda _: trajectory.directions)
        return _Plan(plane_points(alphas, betas), walk, trajectory.record())
    alphas = axis(settings.start, settings.stop, settings.points)

    def drawn(index: int) -> torch.Tensor:
        return random_direction(weights, settings.normalization, settings.exclude, settings.seed, index)

    if settings.kind == "plane":
        directions = drawn(0), drawn(1)
        return _Plan(plane_points(alphas, alphas), along(subject.place, lambda _: directions))
    return _Plan(line_points(alphas, settings.lines), along(subject.place, lambda index: (drawn(index),)))


def _measure_all(
    folder: LandscapeFolder, subject: Subject, plan: _Plan, comm: Communicator, threads: int | None, report: Report
) -> None:
    """Deal the unfinished points out to the ranks, evaluate them, and write all points."""
    measured = folder.finished() if comm.rank == 0 else {}
    unfinished = [number for number in range(len(plan.points)) if number not in measured]
    mine = broadcast_value(comm, unfinished, "points")[comm.rank :: comm.size]
    threads_of_rank = threads or share_of_threads(comm)

    def measure() -> None:
        evaluator = PointEvaluator(
            subject.model,
            [subject.train, subject.test],
            subject.statistics,
            subject.compute,
            threads=threads_of_rank,
        )
        for done, number in enumerate(mine):
            report(done, len(mine))
            measured[number] = evaluator.evaluate(plan.walk(plan.points[number]))
            folder.keep(comm.rank, number, measured[number])

    run_on_all_ranks(comm, measure, "evaluate its points")
    for root in range(1, comm.size):  # not by the ranks' files: NFS may show those of other nodes late
        theirs = broadcast_value(comm, list(measured.items()), "measured", root)
        measured.update((number, [Measured(*pair) for pair in pairs]) for number, pairs in theirs)
    if comm.rank == 0:
        folder.write_points(plan.points, measured)


def _widths(settings: LandscapeSettings, points: Sequence[Point], rows: Sequence[PointRow]) -> list[Width]:
    """Return the basin widths along each line; on a line between two checkpoints each may have a basin of its own."""
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
