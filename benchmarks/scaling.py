"""Times of updates and runs on N ranks: measured here, fitted by a model, and forecast for clusters.

`python -m benchmarks.scaling [--measure] [--page FILE] [--figure FILE] [cluster options]` prints tables.
Without `--measure` it uses the measurements recorded in `benchmarks/scaling.json`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table as Printed

from benchmarks import scaling_figure
from benchmarks.document import markdown_table, replaced_between
from benchmarks.record import read_record
from benchmarks.scaling_fit import Fits, fit
from benchmarks.scaling_forecast import (
    EIGHT_CARDS,
    Cluster,
    busy_job,
    forecast,
    knobs,
    reduction_rows,
    resnet50_job,
    resnet50_run,
    swings,
    vgg9_job,
    vgg9_run,
)
from benchmarks.scaling_measure import CONTROLLERS, machine_name, measure, read_measurements
from benchmarks.scaling_model import Compute, Coordination, Link, Network, RunSeconds, Start, idle_ranks, run_seconds
from benchmarks.scaling_subjects import A100_MIXED, RESNET50_RATES, Fabric, calibrated, checks, published
from benchmarks.scaling_tables import (
    Table,
    forecast_table,
    knobs_table,
    published_table,
    reductions_table,
    runs_table,
    starts_table,
    steps_table,
    sums_table,
    wires_table,
)

RECORD = Path(__file__).with_suffix(".json")
_PERFORMANCE = Path(__file__).parents[1] / "results" / "performance-cpu.json"
RANKS = (1, 8, 16, 32, 64, 128, 256, 512, 1024)
_RUN_RANKS = (1, 8, 64, 256, 1024)
_REDUCTION_RANKS = (8, 64, 128, 256, 1024)
_WIRE_RANKS = (8, 32, 64, 128, 1024)
_FIGURE_RANKS = 64
_PRINTED_ALONE = ("sums", "steps")  # tables that judge the parts of the model: the page has what they show in words


def main(argv: Sequence[str] | None = None) -> None:
    """Print the tables; on request also write them into a page, and draw the figure."""
    arguments = _parser().parse_args(argv)
    if arguments.measure:
        measured = measure(machine_name(), arguments.updates, arguments.launches)
        arguments.record.write_text(json.dumps(asdict(measured), indent=1) + "\n")
    tables = list(tables_of(arguments))
    console = Console(width=170)
    for table in tables:
        printed = Printed(*table.head, title=table.caption, title_justify="left")
        for row in table.rows:
            printed.add_row(*row)
        console.print(printed)
    if arguments.page:
        update_page(arguments.page, tables)
    if arguments.figure:
        cluster = _cluster(arguments, calibrated(published(), Fabric()).jitter)
        subjects = (
            ("VGG9", vgg9_job(), cluster),
            ("ResNet-50", resnet50_job(), _of_resnet50(cluster, arguments, arguments.resnet_rate)),
        )
        panels = {}
        for name, job, place in subjects:
            milliseconds = forecast(job, place, _FIGURE_RANKS).milliseconds
            panels[f"{name}, exact, {_FIGURE_RANKS} GPUs: {milliseconds:.1f} ms"] = swings(job, place, _FIGURE_RANKS)
        scaling_figure.draw(panels, arguments.figure)


def update_page(page: Path, tables: Sequence[Table]) -> None:
    """Write `tables` between their markers in `page`, but for those that are only printed."""
    text = page.read_text(encoding="utf-8")
    for table in tables:
        if table.key in _PRINTED_ALONE:
            continue
        content = f"{table.caption}\n\n{markdown_table(table.head, table.rows)}"
        text = replaced_between(text, f"<!-- {table.key} -->", f"<!-- end of {table.key} -->", content)
    page.write_text(text, encoding="utf-8")


def tables_of(arguments: argparse.Namespace) -> Iterator[Table]:
    """Yield all tables, from the recorded measurements and the cluster given by options."""
    measurements = read_measurements(arguments.record)
    fits = fit(measurements)
    fabric = calibrated(published(), Fabric())
    cluster = _cluster(arguments, fabric.jitter)
    job = vgg9_job()
    rows = [forecast(job, cluster, ranks) for ranks in RANKS]
    rows += [forecast(busy_job(job, ranks), cluster, ranks) for ranks in RANKS if idle_ranks(job, ranks)]
    yield forecast_table(rows)
    yield knobs_table(knobs(job, cluster))
    groups = {}
    for rate in sorted({*RESNET50_RATES, arguments.resnet_rate}):
        place = _of_resnet50(cluster, arguments, rate)
        fast = replace(place, network=replace(place.network, between=EIGHT_CARDS))
        pairs = zip(*(reduction_rows(resnet50_job(), each, _REDUCTION_RANKS) for each in (place, fast)), strict=True)
        groups[rate] = list(pairs)
    yield reductions_table(groups)
    place = _of_resnet50(cluster, arguments, arguments.resnet_rate)
    yield wires_table(
        {
            "VGG9": reduction_rows(vgg9_job(), cluster, _WIRE_RANKS),
            "ResNet-50": reduction_rows(resnet50_job(), place, _WIRE_RANKS),
        }
    )
    yield runs_table(_runs(arguments, cluster, fits))
    yield starts_table(measurements, fits)
    yield sums_table(measurements, fits)
    yield steps_table(fits)
    yield published_table(checks(published(), fabric), fabric)


def _runs(arguments: argparse.Namespace, cluster: Cluster, fits: Fits) -> Iterator[tuple[str, int, RunSeconds]]:
    start = Start(*arguments.start) if arguments.start else fits.starts[arguments.engine]
    conversion = 1e6 * arguments.conversion if arguments.conversion else _measured_conversion()
    for title, run, place in (
        ("VGG9, CIFAR-10, {} epochs", vgg9_run(arguments.epochs[0], arguments.evaluation_batch), cluster),
        (
            "ResNet-50, ImageNet, {} epochs",
            resnet50_run(arguments.epochs[1], arguments.evaluation_batch),
            _of_resnet50(cluster, arguments, arguments.resnet_rate),
        ),
    ):
        for ranks in _RUN_RANKS:
            busy = replace(run, job=busy_job(run.job, ranks))
            parts = (place.compute, place.network, place.coordination)
            yield (
                title.format(run.epochs),
                ranks,
                run_seconds(busy, *parts, start=start, conversion=conversion, ranks=ranks),
            )


def _measured_conversion() -> float:
    """Return the bytes per second at which Fashion-MNIST is decoded and cached, as in `docs/performance.md`."""
    first = read_record(_PERFORMANCE)["data"].rows[0]
    return first.images * 28 * 28 / first.amount_ours


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__)
    parser.add_argument("--measure", action="store_true", help="measure this machine (a quarter of an hour)")
    parser.add_argument("--record", type=Path, default=RECORD, help="file of the measurements")
    parser.add_argument("--updates", type=int, default=5, help="timed updates per launch")
    parser.add_argument("--launches", type=int, default=2, help="launches of each kind")
    parser.add_argument("--page", type=Path, help="also write the tables into this page, between their markers")
    parser.add_argument("--figure", type=Path, help="draw the effect of each guess into this file, SVG or PNG")
    parser.add_argument("--rate", type=float, default=20_000.0, help="VGG9: images/s of a GPU on large micro-batches")
    parser.add_argument("--least", type=float, default=3.0, help="VGG9: shortest time of a micro-batch, ms")
    parser.add_argument(
        "--resnet-rate", type=float, default=A100_MIXED, help="the same for ResNet-50, in runs and figure"
    )
    parser.add_argument("--resnet-least", type=float, default=10.0, help="the same for ResNet-50")
    parser.add_argument(
        "--fixed", type=float, default=1.0, help="time of an update that does not depend on the batch, ms"
    )
    parser.add_argument("--jitter", type=float, help="deviation of a rank's time in %% (from the published figures)")
    parser.add_argument("--node-size", type=int, default=8, help="GPUs of a node")
    parser.add_argument("--within", type=float, nargs=2, default=(5.0, 150.0), help="in a node: latency us, GB/s")
    parser.add_argument("--between", type=float, nargs=2, default=(10.0, 11.25), help="a node's network: us, GB/s")
    parser.add_argument("--algorithm", choices=("ring", "hierarchical", "tree", "fastest"), default="fastest")
    parser.add_argument("--cycle", type=float, default=1.0, help="HOROVOD_CYCLE_TIME, ms; torch.distributed: 0")
    parser.add_argument("--hop", type=float, default=20.0, help="time of a message of the engine's agreement, us")
    parser.add_argument("--epochs", type=int, nargs=2, default=(300, 90), help="of the runs of VGG9 and ResNet-50")
    parser.add_argument("--evaluation-batch", type=int, default=500, help="evaluation.batch_size")
    parser.add_argument("--engine", choices=CONTROLLERS, default="torch", help="engine whose measured start-up is used")
    parser.add_argument(
        "--start", type=float, nargs=2, help="start-up: s of one rank, s per further rank (default: measured here)"
    )
    parser.add_argument(
        "--conversion", type=float, help="MB/s of images decoded into the cache (default: measured here)"
    )
    return parser


def _cluster(arguments: argparse.Namespace, jitter: float) -> Cluster:
    deviation = jitter if arguments.jitter is None else arguments.jitter / 100
    return Cluster(
        Compute(arguments.rate, arguments.least / 1000, arguments.fixed / 1000, deviation),
        Network(_link(arguments.within), _link(arguments.between), arguments.node_size, arguments.algorithm),
        Coordination(arguments.cycle / 1000, arguments.hop / 1e6),
    )


def _of_resnet50(cluster: Cluster, arguments: argparse.Namespace, rate: float) -> Cluster:
    return replace(cluster, compute=replace(cluster.compute, rate=rate, least=arguments.resnet_least / 1000))


def _link(values: Sequence[float]) -> Link:
    return Link(values[0] / 1e6, values[1] * 1e9)


if __name__ == "__main__":
    main()
