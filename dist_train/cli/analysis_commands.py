"""`dist-train landscape`, `sharpness`, `export` and `replay`: commands on stored weights."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from dist_train.cli.common import TARGET, Subparsers, add_overrides, add_weights, count
from dist_train.cluster.launch import current_launch
from dist_train.outcome import ExitCode, UsageError, escaped, writing

if TYPE_CHECKING:
    from dist_train.analysis.landscape_files import LandscapeSettings
    from dist_train.analysis.sharpness_record import Measure, SharpnessRecord, SharpnessSettings

_REPORT_SECONDS = 10.0
_PLANE = (-1.0, 1.0)  # the default range of a plane


def _add_landscape(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "landscape",
        help="measure loss and accuracy along a line or over a plane in weight space",
        description="Evaluate a network at many points of weight space, distributed over the ranks of a launch "
        "(dist-train launch, torchrun, mpirun or srun); write the points as CSV, and figures. The same command resumes "
        "an interrupted one.",
    )
    kinds = parser.add_subparsers(title="kinds", metavar="KIND", dest="kind", required=True)
    # Omitted options are not set, so that the settings' defaults apply.
    add_kind = partial(kinds.add_parser, argument_default=argparse.SUPPRESS)
    line = add_kind("interpolate", help="the line through two checkpoints")
    line.add_argument("targets", nargs=2, type=Path, metavar="CHECKPOINT", help=f"A (0) and B (1): {TARGET}")
    _add_axis(line, (-0.5, 1.5), 41)
    direction = add_kind("direction", help="random directions from one checkpoint")
    direction.add_argument("targets", nargs=1, type=Path, metavar="CHECKPOINT", help=TARGET)
    direction.add_argument("--directions", dest="lines", type=int, metavar="N", help="how many directions (default: 1)")
    _add_axis(direction, (-1.0, 1.0), 41)
    _add_directions(direction)
    plane = add_kind("plane", help="the plane of two directions from one checkpoint")
    plane.add_argument("targets", nargs=1, type=Path, metavar="CHECKPOINT", help=TARGET)
    plane.add_argument(
        "--trajectory",
        action="store_true",
        help="the two principal directions of the run's checkpoints, which are drawn over the plane",
    )
    _add_axis(plane, _PLANE, 21)
    _add_directions(plane)
    for kind in (line, direction, plane):
        _add_measure(kind)
        kind.set_defaults(run=_landscape, check=_landscape_settings)


def _landscape(arguments: argparse.Namespace) -> int:
    from dist_train.analysis.directions import describe
    from dist_train.analysis.landscape import make_landscape
    from dist_train.analysis.landscape_files import OTHER_OUTPUT, read_landscape
    from dist_train.cluster.communicator import run_on_all_ranks
    from dist_train.cluster.rendezvous import join_points

    comm = join_points()
    settings = run_on_all_ranks(comm, lambda: _landscape_settings(arguments), "read the options")
    report = _Progress(comm.size).report if comm.rank == 0 else lambda done, total: None
    finished = make_landscape(
        arguments.targets, settings, comm, report, arguments.overrides, arguments.output, arguments.threads
    )
    comm.close()
    if finished is not None:
        # Importing matplotlib takes most of a second, and only rank 0 draws.
        from dist_train.report.landscape_figures import draw_landscape

        outputs = [finished.folder / f"figure.{form}" for form in ("svg", "pdf", "png")]
        with writing(finished.folder, OTHER_OUTPUT):  # that of a result which existed may be read-only by now
            draw_landscape(read_landscape(finished.folder), outputs, arguments.scale)
        if finished.was_there:
            print("nothing to evaluate: this result existed already", file=sys.stderr)
        if finished.not_finite:
            print(f"the loss is not finite in {finished.not_finite} rows of points.csv", file=sys.stderr)
        for width in finished.widths:
            # A line between two checkpoints is the only one.
            direction = "" if settings.kind == "interpolate" else f"direction {width.direction}, "
            print(f"{direction}{describe(width)}")
        found = {width.basin for width in finished.widths}
        for basin in ("A", "B"):
            if settings.kind == "interpolate" and basin not in found:
                print(f"basin of {basin}: none, the loss has no minimum on its side of alpha 0.5")
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
    parser.add_argument("--points", type=int, default=points, metavar="N", help=f"points per line (default: {points})")


def _add_directions(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--normalization",
        choices=("filter", "layer", "none"),
        help="rescale each filter, or each layer, of a direction to the norm of the weights'; none: as drawn",
    )
    parser.add_argument(
        "--exclude",
        nargs="*",
        metavar="WHAT",
        help="weights that do not move: norm, bias, or names with * and ? (default: norm bias; nothing: all move)",
    )
    parser.add_argument("--seed", type=int, help="seed of the directions (default: 0)")


def _add_measure(parser: argparse.ArgumentParser) -> None:
    add_overrides(parser)
    _add_options(parser, _LANDSCAPE_OPTIONS)
    parser.add_argument(
        "--statistics",
        choices=("recomputed", "interpolated"),
        help="the norms' running statistics: recomputed at each point from training data, or interpolated like the "
        "weights; along directions, interpolated keeps those of the checkpoint",
    )
    parser.add_argument("--precision", choices=("float32", "run"), help="run: the run's precision.compute")
    parser.add_argument(
        "--threads", type=count, default=None, metavar="N", help="CPU threads per rank (default: an equal share)"
    )
    parser.add_argument("--scale", choices=("linear", "log"), default="linear", help="scale of the loss in the figures")
    parser.add_argument(
        "--output", type=Path, default=None, metavar="DIR", help="parent of the result's folder (default: RUN/analysis)"
    )


def _number_or_all(text: str) -> int | None:
    try:
        return None if text == "all" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"takes a number or all, not {text!r}") from None


def _landscape_settings(arguments: argparse.Namespace) -> LandscapeSettings:
    from dist_train.analysis.landscape_files import LandscapeSettings

    given, (start, stop) = vars(arguments), arguments.range
    if given.get("trajectory"):
        usual = {"range": _PLANE, "seed": 0, "normalization": "filter"}
        if ignored := ", ".join(f"--{name}" for name, value in usual.items() if given.get(name, value) != value):
            wrong = f"--trajectory sets the directions and the range itself: leave out {ignored}"
            raise UsageError(wrong, code="option-alone")
    chosen = {field.name: given[field.name] for field in fields(LandscapeSettings) if field.name in given}
    return LandscapeSettings(start=start, stop=stop, **chosen)


class _Progress:
    """Prints the progress of rank 0's own points every few seconds."""

    def __init__(self, ranks: int) -> None:
        self._points = "points" if ranks == 1 else f"points of the first of {ranks} ranks"
        self._begun = self._reported = time.monotonic()

    def report(self, done: int, total: int) -> None:
        """Print the progress and the time left."""
        now = time.monotonic()
        if done == 0:
            self._begun = self._reported = now
        elif now - self._reported >= _REPORT_SECONDS:
            self._reported = now
            pace = (now - self._begun) / done
            text = f"{done} of {total} {self._points}, {pace:.2g} s each, {pace * (total - done):.0f} s left"
            print(text, file=sys.stderr, flush=True)


def _add_sharpness(subparsers: Subparsers) -> None:
    # Omitted options are not set, so that the settings' defaults apply.
    parser = subparsers.add_parser(
        "sharpness",
        help="measure the sharpness of the minimum at a checkpoint",
        description="Measure Keskar's sharpness, the expected rise of the loss under uniform noise, and the Hessian's "
        "largest eigenvalues and trace, on a part of the training images. Prints a table and writes a JSON record "
        "into the run's folder `analysis`.",
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("target", type=Path, metavar="RUN_OR_CHECKPOINT", help=TARGET)
    add_overrides(parser)
    parser.add_argument(
        "--only",
        default="keskar,rise,hessian",
        metavar="LIST",
        help="measures to take; also available: width, noise-scale (default: keskar,rise,hessian)",
    )
    parser.add_argument(
        "--statistics",
        choices=("checkpoint", "recomputed", "batch"),
        help="norm statistics. checkpoint: the stored ones, fixed (default). recomputed: recomputed at the stored "
        "weights, then fixed. batch: those of each pass, as in training",
    )
    parser.add_argument(
        "--scale",
        choices=("absolute", "weight", "filter"),
        help="scale of the noise, as noise.scale (default: absolute)",
    )
    parser.add_argument(
        "--output", type=Path, default=None, metavar="DIR", help="folder of the record (default: RUN/analysis)"
    )
    _add_options(parser, _SHARPNESS_OPTIONS)
    parser.set_defaults(run=_sharpness, check=_sharpness_settings)


def _sharpness(arguments: argparse.Namespace) -> int:
    settings, measures = _sharpness_settings(arguments)

    from dist_train.analysis.sharpness import measure_sharpness

    record, path = measure_sharpness(
        arguments.target,
        settings,
        measures,
        arguments.overrides,
        arguments.output,
        report=partial(print, file=sys.stderr, flush=True),
    )
    print("\n".join(_table(record)))
    print(path)
    return ExitCode.FINISHED


def _sharpness_settings(arguments: argparse.Namespace) -> tuple[SharpnessSettings, list[Measure]]:
    from dist_train.analysis.sharpness_record import SharpnessSettings, settings_from

    given = vars(arguments)
    settings = settings_from({name: given[name] for name in SharpnessSettings.model_fields if name in given})
    return settings, _measures(arguments.only)


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in _words(text)]
    except ValueError:
        raise argparse.ArgumentTypeError(f"not numbers separated by commas: {text}") from None


def _words(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


_Kind: TypeAlias = Callable[[str], object]
_METAVARS: Mapping[_Kind, str] = {int: "N", _number_or_all: "N", float: "X", _numbers: "LIST", _words: "LIST"}
_LANDSCAPE_OPTIONS: Mapping[str, tuple[_Kind, str]] = {
    "samples": (_number_or_all, "number of training samples, chosen by seed, or all (default: 10000)"),
    "test-samples": (_number_or_all, "likewise, test samples (default: all)"),
    "subset-seed": (int, "seed of these choices (default: 0)"),
    "statistics-samples": (int, "training samples for recomputed statistics (default: the run's model.norm_samples)"),
    "batch-size": (int, "samples per pass (default: 100 on a CPU, 1000 on a GPU)"),
}
_SHARPNESS_OPTIONS: Mapping[str, tuple[_Kind, str]] = {
    "samples": (int, "training images used, in the proportions of the classes, or all if fewer (default: 2048)"),
    "seed": (int, "seed of images, starts, directions, draws and probes (default: 0)"),
    "batch-size": (int, "images per pass (default: 256)"),
    "keskar-epsilon": (float, "half the box's width, in units of |weight| + 1 (default: 0.001)"),
    "keskar-iterations": (int, "maximum number of iterations per ascent (default: 10)"),
    "keskar-dimensions": (int, "dimensions of the random subspace (default: 100)"),
    "keskar-starts": (int, "ascents: the first from the weights, others from random points in the box (default: 2)"),
    "amplitudes": (_numbers, "amplitudes of the noise (default: 0.0001,0.001,0.01,0.1)"),
    "draws": (int, "draws of noise at each amplitude, each used with both signs (default: 8)"),
    "exclude": (_words, "weights without noise: norm, bias, or patterns of names (default: norm)"),
    "hessian-eigenvalues": (int, "number of largest eigenvalues (default: 5)"),
    "hessian-tolerance": (float, "relative error of the eigenvalues (default: 0.001)"),
    "hessian-probes": (int, "random vectors from which the trace is estimated (default: 16)"),
    "width-rises": (_numbers, "rises of the loss at which the basin's width is measured (default: 0.05,0.5,1)"),
    "width-directions": (int, "random directions along which the width is measured (default: 5)"),
    "width-reach": (float, "largest distance on each side, in norms of the filters (default: 2)"),
}


def _add_options(parser: argparse.ArgumentParser, options: Mapping[str, tuple[_Kind, str]]) -> None:
    for name, (kind, text) in options.items():
        parser.add_argument(f"--{name}", type=kind, metavar=_METAVARS[kind], help=text)


def _measures(text: str) -> list[Measure]:
    from dist_train.analysis.sharpness_record import MEASURES

    named = _words(text)
    if not named or (unknown := [name for name in named if name not in MEASURES]):
        given = ", ".join(unknown) if named else "nothing"
        raise UsageError(f"--only takes {', '.join(MEASURES)}, not {given}", code="option-choice")
    return [measure for measure in MEASURES if measure in named]


def _table(record: SharpnessRecord) -> Iterator[str]:
    settings = record.settings
    yield f"{record.checkpoint.path}, step {record.checkpoint.step}, {record.weights} weights"
    yield (
        f"loss {record.loss:.6g}, accuracy {record.accuracy:.4f} on {record.data.samples} training images "
        f"(seed {settings.seed}), norm statistics: {settings.statistics}"
    )
    rows = list(_rows(record))
    width = max(len(name) for name, _ in rows)
    yield from (f"  {name:<{width}}  {value}" for name, value in rows)


def _rows(record: SharpnessRecord) -> Iterator[tuple[str, str]]:
    settings = record.settings
    if record.keskar is not None:
        box = f"epsilon {settings.keskar_epsilon:g}"
        yield f"Keskar, full space, {box}", _number(record.keskar.full)
        yield f"Keskar, {settings.keskar_dimensions} directions, {box}", _number(record.keskar.subspace)
    for rise in record.expected_rise or ():
        name = f"expected rise, amplitude {rise.amplitude:g}, {settings.scale}"
        yield name, _number(rise.mean, rise.standard_error)
    if record.hessian is not None:
        for index, eigenvalue in enumerate(record.hessian.eigenvalues, start=1):
            yield f"Hessian eigenvalue {index}", _number(eigenvalue)
        if not record.hessian.eigenvalues:
            yield "Hessian eigenvalues", "unknown: not all converged; choose a smaller --hessian-eigenvalues"
        yield "Hessian trace", _number(record.hessian.trace, record.hessian.trace_standard_error)
    for width in record.widths or ():
        censored = f", at least: {width.censored} of {width.directions} end beyond the reach" if width.censored else ""
        error = None if width.censored else width.standard_error
        yield f"basin width, rise {width.rise:g}", f"{_number(width.mean, error)}{censored}"
    if (scale := record.noise_scale) is not None:
        is_beyond = scale.value is None and scale.squared_gradient is not None
        text = "unknown: more than these samples can show" if is_beyond else _number(scale.value, scale.standard_error)
        yield "gradient noise scale, samples", text


def _number(value: float | None, error: float | None = None) -> str:
    if value is None:
        return "not finite"
    return f"{value:.4g}" if error is None else f"{value:.4g} \u00b1 {error:.2g}"


def _add_export(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "export",
        help="export a model for other programs: safetensors, torch-export or onnx",
        description="Write the model of a checkpoint, with clean weights and norm statistics; then load it back and "
        "compare its logits.",
    )
    parser.add_argument("target", type=Path, metavar="RUN_OR_CHECKPOINT", help=TARGET)
    add_overrides(parser)
    parser.add_argument("--to", choices=("safetensors", "torch-export", "onnx"), required=True, help="the format")
    default = "RUN-STEP.SUFFIX, or RUN-STEP-averaged.SUFFIX"
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help=f"the file (default: {default})")
    add_weights(parser)
    parser.set_defaults(run=_export)


def _export(arguments: argparse.Namespace) -> int:
    from dist_train.api import export

    written = export(arguments.target, arguments.to, arguments.output, arguments.weights, arguments.overrides)
    path = escaped(str(written.path))
    print(f"{path}: step {written.step}; loaded back, its logits differ by at most {written.difference:g}")
    return ExitCode.FINISHED


def _add_replay(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "replay",
        help="repeat one update of a run, and compare it with the record",
        description="Train from the checkpoint before STEP, or from the beginning, up to STEP, on any number of ranks. "
        "Compare loss, accuracy, learning rate, noise amplitude and gradient norm with the run's record, and the "
        "weights with its checkpoint, if it has one. Exit code: 0 if everything is bit-identical, else 4.",
    )
    parser.add_argument(
        "update", metavar="RUN@STEP", help="a run directory, or its name below runs/, and the number of an update"
    )
    add_overrides(parser)
    parser.set_defaults(run=_replay)


def _replay(arguments: argparse.Namespace) -> int:
    from dist_train.diagnostics import replay

    run, _, step = arguments.update.rpartition("@")
    if not run or not step.isdecimal() or len(step) > 18:
        raise UsageError(f"takes RUN@STEP, such as runs/demo@40, not {arguments.update}", code="replay-form")
    result = replay(run, int(step), arguments.overrides)
    if current_launch().rank == 0:
        print(f"update {result.step}, repeated from step {result.begun_at}:")
        for name, recorded in result.recorded.items():
            now = result.replayed[name]
            print(f"  {name:<16} {recorded!r:<24} {'the same' if now == recorded else f'now {now!r}'}")
        weights = {None: "no checkpoint to compare with", True: "the same", False: "different"}[result.weights_agree]
        print(f"  {'weights':<16} {weights}")
    return ExitCode.FINISHED if result.agrees else ExitCode.DISAGREEMENT


COMMANDS = (_add_landscape, _add_sharpness, _add_export, _add_replay)
