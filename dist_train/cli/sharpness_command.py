"""`dist-train sharpness RUN_OR_CHECKPOINT`: how sharp a minimum a checkpoint lies in."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from dist_train.outcome import ExitCode, UsageError

if TYPE_CHECKING:
    from dist_train.analysis.sharpness_record import Measure, SharpnessRecord

_TEXTS = {
    "samples": "training images that the loss is taken over, as many of each class as there are (default: 2048)",
    "seed": "chooses images, starts, directions, draws and probes (default: 0)",
    "batch-size": "images of one pass (default: 256)",
    "keskar-epsilon": "half the box's width, in units of |weight| + 1 (default: 0.001)",
    "keskar-iterations": "iterations of each ascent, at most (default: 10)",
    "keskar-dimensions": "dimensions of the random subspace (default: 100)",
    "keskar-starts": "ascents: the first from the weights, others from random places in the box (default: 2)",
    "draws": "draws of noise, each used with both signs, at each amplitude (default: 8)",
    "hessian-eigenvalues": "how many eigenvalues, the largest ones (default: 5)",
    "hessian-tolerance": "relative error of the eigenvalues (default: 0.001)",
    "hessian-probes": "random vectors that the trace is estimated from (default: 16)",
}
_FRACTIONS = {"keskar-epsilon", "hessian-tolerance"}


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command's arguments. Options left out are not set: the settings' own defaults hold."""
    parser = subparsers.add_parser(
        "sharpness",
        help="how sharp a minimum a checkpoint lies in",
        description="Measure Keskar's sharpness, the expected rise of the loss under uniform noise, and the Hessian's "
        "largest eigenvalues and trace, on a part of the training images. Prints a table and writes a JSON record "
        "into the run's folder `analysis`.",
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("target", type=Path, metavar="RUN_OR_CHECKPOINT", help="a run directory or a checkpoint")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="section.key=value", help="data.root=DIR, for instance"
    )
    parser.add_argument(
        "--only", default="keskar,rise,hessian", metavar="LIST", help="which measures (default: keskar,rise,hessian)"
    )
    parser.add_argument(
        "--statistics",
        choices=("checkpoint", "recomputed", "batch"),
        help="norm statistics. checkpoint: the stored ones, held (default). recomputed: taken anew at the stored "
        "weights, then held. batch: of each pass, wherever it is, as in training",
    )
    parser.add_argument(
        "--amplitudes",
        type=_numbers,
        metavar="LIST",
        help="amplitudes of the noise (default: 0.0001,0.001,0.01,0.1)",
    )
    parser.add_argument(
        "--scale",
        choices=("absolute", "weight", "filter"),
        help="scale of the noise, as noise.scale (default: absolute)",
    )
    parser.add_argument(
        "--exclude",
        type=_words,
        metavar="LIST",
        help="weights without noise: norm, bias, or patterns of names (default: norm)",
    )
    parser.add_argument(
        "--output", type=Path, default=None, metavar="DIR", help="folder of the record (default: RUN/analysis)"
    )
    for name, text in _TEXTS.items():
        kind, metavar = (float, "X") if name in _FRACTIONS else (int, "N")
        parser.add_argument(f"--{name}", type=kind, metavar=metavar, help=text)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Measure and print. Raises UsageError where something cannot be measured."""
    from dist_train.analysis.sharpness import measure_sharpness
    from dist_train.analysis.sharpness_record import SharpnessSettings, settings_from

    given = vars(arguments)
    settings = settings_from({name: given[name] for name in SharpnessSettings.model_fields if name in given})
    record, path = measure_sharpness(
        arguments.target, settings, _measures(arguments.only), arguments.overrides, arguments.output, tell=_tell
    )
    print("\n".join(_table(record)))
    print(path)
    return ExitCode.FINISHED


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in _words(text)]
    except ValueError:
        raise argparse.ArgumentTypeError(f"not numbers with commas between them: {text}") from None


def _words(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _measures(text: str) -> list[Measure]:
    from dist_train.analysis.sharpness_record import MEASURES

    named = _words(text)
    if not named or (unknown := [name for name in named if name not in MEASURES]):
        raise UsageError(f"--only takes {', '.join(MEASURES)}, not {', '.join(unknown) if named else 'nothing'}")
    return [measure for measure in MEASURES if measure in named]


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _table(record: SharpnessRecord) -> Iterator[str]:
    """Yield the lines of a table of what has been measured."""
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
        yield (
            f"expected rise, amplitude {rise.amplitude:g}, {settings.scale}",
            _number(rise.mean, rise.standard_error),
        )
    if record.hessian is not None:
        for index, eigenvalue in enumerate(record.hessian.eigenvalues, start=1):
            yield f"Hessian eigenvalue {index}", _number(eigenvalue)
        yield "Hessian trace", _number(record.hessian.trace, record.hessian.trace_standard_error)


def _number(value: float | None, error: float | None = None) -> str:
    if value is None:
        return "not finite"
    return f"{value:.4g}" if error is None else f"{value:.4g} \u00b1 {error:.2g}"
