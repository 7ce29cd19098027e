"""The time of an update on N ranks: measured here, fitted, and foretold for clusters.

`python -m benchmarks.scaling [--measure] [--json FILE] [options of the cluster]` prints tables. Without `--measure` it
goes by what was recorded in `benchmarks/scaling.json`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.scaling_fit import Machine, Pace, Residual, fit_machine, fit_pace
from benchmarks.scaling_measure import CONTROLLERS, Measurements, machine_name, measure, read_measurements
from benchmarks.scaling_model import (
    Compute,
    Horovod,
    Job,
    Link,
    Network,
    idle_ranks,
    step_seconds,
)
from benchmarks.scaling_subjects import Check, Fabric, checks, jitter_of, published, vgg9

RECORD = Path(__file__).with_suffix(".json")
GLOBAL_SIZE = 8192
MICRO_SIZE = 128
RANKS = (1, 8, 16, 32, 64, 128, 256, 512, 1024)
_TALLY = 8 * (7 + 2 * 1408)
"""Counts, and the statistics of VGG9's 1,408 normalized channels."""


@dataclass(frozen=True)
class Cluster:
    """What the forecast assumes."""

    compute: Compute
    network: Network
    horovod: Horovod


@dataclass(frozen=True)
class Forecast:
    """An update of VGG9 at batch 8192 on so many ranks; the efficiency is over one with micro-batches of 128."""

    ranks: int
    micro_size: int
    milliseconds: float
    images_per_second: float
    efficiency: float
    exposed: float
    hidden: float
    waiting: float
    idle: int


@dataclass(frozen=True)
class Knob:
    """By how much a setting changes the time of an update: a factor for each number of ranks."""

    setting: str
    factors: tuple[float, ...]


KNOB_RANKS = (8, 64, 256, 1024)


def forecast(job: Job, cluster: Cluster, ranks: int) -> Forecast:
    """Return the update of `job` on so many ranks of `cluster`."""
    parts = (cluster.compute, cluster.network, cluster.horovod)
    seconds = step_seconds(job, *parts, ranks)
    alone = step_seconds(replace(job, micro_size=MICRO_SIZE), *parts, 1)
    return Forecast(
        ranks=ranks,
        micro_size=job.micro_size,
        milliseconds=1000 * seconds.total,
        images_per_second=job.global_size / seconds.total,
        efficiency=alone.total / (ranks * seconds.total),
        exposed=1000 * seconds.exposed,
        hidden=1000 * seconds.hidden,
        waiting=1000 * seconds.waiting,
        idle=idle_ranks(job, ranks),
    )


def busy_job(job: Job, ranks: int) -> Job:
    """Return `job` with micro-batches small enough that no rank idles."""
    return replace(job, micro_size=min(job.micro_size, max(1, job.global_size // ranks)))


def knobs(job: Job, cluster: Cluster) -> Iterator[Knob]:
    """Yield the settings one by one, each against the cluster and the job as they are, no rank idle."""
    horovod, network = cluster.horovod, cluster.network
    slow = replace(network.between, bandwidth=network.between.bandwidth / 4)
    changes: tuple[tuple[str, Job | None, Cluster], ...] = (
        ("batch.micro_size 128, ranks idle", job, cluster),
        ("batch.micro_size halved", replace(job, micro_size=0), cluster),
        ("comm.reduction float", replace(job, weight_bytes=4), cluster),
        ("the same, compression fp16", replace(job, weight_bytes=2), cluster),
        ("one bucket for all gradients", replace(job, bucket=1 << 62), cluster),
        ("buckets of a quarter of the size", replace(job, bucket=job.bucket // 4), cluster),
        ("HOROVOD_CYCLE_TIME 5", None, replace(cluster, horovod=replace(horovod, cycle=5e-3))),
        ("HOROVOD_CYCLE_TIME 0.1", None, replace(cluster, horovod=replace(horovod, cycle=1e-4))),
        ("rings alone (NCCL_ALGO=Ring)", None, replace(cluster, network=replace(network, algorithm="ring"))),
        ("HOROVOD_HIERARCHICAL_ALLREDUCE", None, replace(cluster, network=replace(network, algorithm="hierarchical"))),
        ("a quarter of the bandwidth between nodes", None, replace(cluster, network=replace(network, between=slow))),
        ("ranks that are twice as fast", None, replace(cluster, compute=_twice(cluster.compute))),
    )
    for setting, changed, place in changes:
        yield Knob(setting, tuple(_factor(job, changed, cluster, place, ranks) for ranks in KNOB_RANKS))


def _factor(job: Job, changed: Job | None, cluster: Cluster, place: Cluster, ranks: int) -> float:
    plain = busy_job(job, ranks)
    if changed is None:
        other = plain
    elif changed.micro_size == 0:
        other = replace(plain, micro_size=max(1, plain.micro_size // 2))
    elif changed == job:
        other = job
    else:
        other = busy_job(changed, ranks)
    return forecast(other, place, ranks).milliseconds / forecast(plain, cluster, ranks).milliseconds


def _twice(compute: Compute) -> Compute:
    return replace(compute, rate=2 * compute.rate)


def vgg9_job() -> Job:
    """Return the paper's large batch as the training cuts it."""
    return Job(vgg9(), GLOBAL_SIZE, MICRO_SIZE, tally=_TALLY)


@dataclass(frozen=True)
class Fits:
    """What the model makes of the measurements."""

    machines: dict[str, Machine]
    paces: dict[float, Pace]
    sums: dict[str, list[Residual]]
    steps: list[Residual]


def fit(measurements: Measurements) -> Fits:
    """Fit the machine that was measured: first its sums alone, then the pace of the ranks."""
    machines, sums = {}, {}
    for controller in CONTROLLERS:
        machines[controller], sums[controller] = fit_machine(measurements, controller)
    paces, steps = {}, []
    for width in dict.fromkeys(row.width for row in measurements.steps):
        paces[width], residuals = fit_pace(measurements, machines, width, vgg9(width))
        steps += residuals
    return Fits(machines, paces, sums, steps)


def main() -> None:
    """Print the tables."""
    arguments = _arguments()
    if arguments.measure:
        measurements = measure(machine_name(), arguments.updates, arguments.launches)
        arguments.record.write_text(json.dumps(asdict(measurements), indent=1) + "\n")
    else:
        measurements = read_measurements(arguments.record)
    fits = fit(measurements)
    figures, fabric = published(), Fabric()
    fitted_jitter = jitter_of(figures[0], fabric)
    jitter = fitted_jitter if arguments.jitter is None else arguments.jitter / 100
    cluster = _cluster(arguments, jitter)
    job = vgg9_job()
    cut = [(ranks, forecast(job, cluster, ranks)) for ranks in RANKS]
    rows = [row for _, row in cut]
    rows += [forecast(busy_job(job, ranks), cluster, ranks) for ranks in RANKS if idle_ranks(job, ranks)]
    found = checks(figures, fabric, fitted_jitter)
    changes = list(knobs(job, cluster))
    console = Console(width=130)
    for table in (*_measured(measurements, fits), _published(found, fitted_jitter), _forecasts(rows), _knobs(changes)):
        console.print(table)
    if arguments.json:
        record = {
            "measurements": asdict(measurements),
            "fits": asdict(fits),
            "published": [asdict(check) for check in found],
            "cluster": asdict(cluster),
            "forecast": [asdict(row) for row in rows],
            "knobs": [asdict(change) for change in changes],
        }
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__)
    parser.add_argument("--measure", action="store_true", help="measure this machine anew (several minutes)")
    parser.add_argument("--record", type=Path, default=RECORD, help="where measurements are kept")
    parser.add_argument("--updates", type=int, default=5, help="updates of a launch that are timed")
    parser.add_argument("--launches", type=int, default=3, help="launches of each kind")
    parser.add_argument("--json", type=Path, help="write all tables into this file as well")
    parser.add_argument("--rate", type=float, default=20_000.0, help="images/s of a GPU on large micro-batches")
    parser.add_argument("--least", type=float, default=3.0, help="ms that a micro-batch of any size takes")
    parser.add_argument("--fixed", type=float, default=1.0, help="ms of an update that do not depend on the batch")
    parser.add_argument("--jitter", type=float, help="deviation of a rank's time in %% (from the published figures)")
    parser.add_argument("--node-size", type=int, default=8, help="GPUs of a node")
    parser.add_argument("--within", type=float, nargs=2, default=(5.0, 150.0), help="in a node: latency us, GB/s")
    parser.add_argument("--between", type=float, nargs=2, default=(10.0, 11.25), help="a node's network: us, GB/s")
    parser.add_argument("--algorithm", choices=("ring", "hierarchical", "tree", "fastest"), default="fastest")
    parser.add_argument("--cycle", type=float, default=1.0, help="HOROVOD_CYCLE_TIME, ms")
    parser.add_argument("--hop", type=float, default=20.0, help="us of a message of Horovod's coordination")
    return parser.parse_args()


def _cluster(arguments: argparse.Namespace, jitter: float) -> Cluster:
    return Cluster(
        Compute(arguments.rate, arguments.least / 1000, arguments.fixed / 1000, jitter),
        Network(_link(arguments.within), _link(arguments.between), arguments.node_size, arguments.algorithm),
        Horovod(arguments.cycle / 1000, arguments.hop / 1e6),
    )


def _link(values: Sequence[float]) -> Link:
    return Link(values[0] / 1e6, values[1] * 1e9)


def _table(title: str, left: Sequence[str], right: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left")
    for column in left:
        table.add_column(column)
    for column in right:
        table.add_column(column, justify="right")
    return table


def _measured(measurements: Measurements, fits: Fits) -> Iterator[Table]:
    place = f"{measurements.machine}, {measurements.date}"
    columns = ["ranks", "met, s", "ended, s", "sum, ms", "new name, ms"]
    starts = _table(f"Start-up and coordination: {place}", ["over"], columns)
    tiny = {(row.controller, row.ranks, row.kind): row.seconds for row in measurements.allreduces if row.length == 1}
    for start in measurements.startups:
        known, new = (tiny[start.controller, start.ranks, kind] for kind in ("known", "new"))
        starts.add_row(
            start.controller,
            str(start.ranks),
            f"{start.met:.1f}",
            f"{start.whole:.1f}",
            f"{1000 * known:.2f}",
            f"{1000 * new:.2f}",
        )
    yield starts
    for controller, machine in fits.machines.items():
        title = (
            f"Sums over {controller}: cycle {1000 * machine.horovod.cycle:g} ms, "
            f"hop {1e6 * machine.horovod.hop:.0f} us, link {machine.link.bandwidth / 1e9:.2f} GB/s"
        )
        yield _residuals(title, fits.sums[controller])
    paces = "; ".join(
        f"width {width:g}: {1 / pace.sample:.0f} images/s and {1000 * pace.fixed:.0f} ms an update"
        for width, pace in fits.paces.items()
    )
    yield _residuals(f"Updates, a rank alone on its core: {paces}", fits.steps)


def _residuals(title: str, residuals: Sequence[Residual]) -> Table:
    table = _table(title, ["what"], ["ranks", "measured, ms", "model, ms", "model / measured", "fitted"])
    for row in residuals:
        table.add_row(
            row.what,
            str(row.ranks),
            f"{1000 * row.measured:.2f}",
            f"{1000 * row.modelled:.2f}",
            f"{row.ratio:.2f}",
            "yes" if row.is_fitted else "no",
        )
    return table


def _published(found: Sequence[Check], jitter: float) -> Table:
    title = f"512 Pascal GPUs, 25 Gbit/s; jitter {100 * jitter:.1f} % fitted to Inception V3 over RDMA alone"
    table = _table(title, ["network", "over"], ["published", "model, network alone", "model, with jitter"])
    for check in found:
        table.add_row(
            check.name,
            check.transport,
            f"{check.published:.0%}",
            f"{check.network_alone:.1%}",
            f"{check.with_jitter:.1%}",
        )
    return table


def _forecasts(rows: Sequence[Forecast]) -> Table:
    columns = [
        "GPUs",
        "micro",
        "update, ms",
        "images/s",
        "efficiency",
        "exposed, ms",
        "hidden, ms",
        "jitter, ms",
        "idle",
    ]
    table = _table("VGG9, batch 8192, exact reduction", [], columns)
    for row in rows:
        table.add_row(
            f"{row.ranks:,}",
            str(row.micro_size),
            f"{row.milliseconds:.2f}",
            f"{row.images_per_second:,.0f}",
            f"{row.efficiency:.0%}",
            f"{row.exposed:.2f}",
            f"{row.hidden:.2f}",
            f"{row.waiting:.2f}",
            str(row.idle),
        )
    return table


def _knobs(changes: Sequence[Knob]) -> Table:
    table = _table("Time of an update, as a factor", ["setting"], [f"{ranks:,} GPUs" for ranks in KNOB_RANKS])
    for change in changes:
        table.add_row(change.setting, *(f"{factor:.2f}" for factor in change.factors))
    return table


if __name__ == "__main__":
    main()
