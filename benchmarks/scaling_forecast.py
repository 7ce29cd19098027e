"""Forecasts of the scaling model for clusters: updates, whole runs, settings, and the effect of each guess."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from benchmarks.scaling_model import (
    Algorithm,
    Compute,
    Coordination,
    Job,
    Link,
    Network,
    Passes,
    Run,
    idle_ranks,
    step_seconds,
)
from benchmarks.scaling_subjects import resnet50_layers, vgg9

GLOBAL_SIZE = 8192
MICRO_SIZE = 128
KNOB_RANKS = (8, 64, 256, 1024)
EIGHT_CARDS = Link(5e-6, 0.9 * 8 * 400e9 / 8)
"""A node with eight cards of 400 Gbit/s at 90 %."""
GUESSES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "rate of a GPU": ("compute", "rate"),
        "least time of a micro-batch": ("compute", "least"),
        "fixed time of an update": ("compute", "fixed"),
        "jitter": ("compute", "jitter"),
        "latency in a node": ("network", "within", "latency"),
        "bandwidth in a node": ("network", "within", "bandwidth"),
        "latency between nodes": ("network", "between", "latency"),
        "bandwidth between nodes": ("network", "between", "bandwidth"),
        "cycle": ("coordination", "cycle"),
        "hop": ("coordination", "hop"),
    }
)
"""The assumptions of a forecast, and their paths in a `Cluster`."""


@dataclass(frozen=True)
class Wire:
    """How gradients are summed: bytes of a weight on the wire, there and gathered; bytes of a filter in the tally."""

    weight_bytes: int
    filter_bytes: int = 0
    gathered_bytes: int = 0
    algorithm: Algorithm | None = None
    """None: the cluster's."""


WIRES: Mapping[str, Wire] = MappingProxyType(
    {
        "float32": Wire(4),
        "bfloat16": Wire(2),
        "exact": Wire(8),
        "exact, hierarchical": Wire(8, algorithm="hierarchical"),
        "exact, sharded": Wire(8, gathered_bytes=4),
        "exact32": Wire(4, filter_bytes=8),
        "exact16": Wire(2, filter_bytes=8),
    }
)
"""What peers send, what is implemented, and two ways to send 64-bit integers that are not."""


@dataclass(frozen=True)
class Cluster:
    """The assumptions of a forecast."""

    compute: Compute
    network: Network
    coordination: Coordination


@dataclass(frozen=True)
class Forecast:
    """An update on `ranks` ranks; the efficiency is relative to one rank with micro-batches of 128."""

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
    """The factors by which a setting changes the time of an update, for each number of ranks."""

    setting: str
    factors: tuple[float, ...]


@dataclass(frozen=True)
class Swing:
    """The factors of the time of an update if a guess is halved and if it is doubled."""

    guess: str
    halved: float
    doubled: float

    @property
    def width(self) -> float:
        """The ratio of the larger to the smaller time, at least 1."""
        return max(self.halved, self.doubled) / min(self.halved, self.doubled)


@dataclass(frozen=True)
class Reduction:
    """An update with float32 gradients, and the factors of its time with each of `WIRES`."""

    floating: Forecast
    factors: Mapping[str, float]


def forecast(job: Job, cluster: Cluster, ranks: int) -> Forecast:
    """Return the update of `job` on `ranks` ranks of `cluster`."""
    parts = (cluster.compute, cluster.network, cluster.coordination)
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


def vgg9_job() -> Job:
    """Return the paper's large batch, split as in training."""
    return Job(vgg9(), GLOBAL_SIZE, MICRO_SIZE, tally=_tally(channels=1408))


def resnet50_job() -> Job:
    """Return the same batch of 224x224 images for ResNet-50."""
    return Job(resnet50_layers(), GLOBAL_SIZE, MICRO_SIZE, tally=_tally(channels=26_560))


def _tally(channels: int) -> int:
    """Return the bytes of counts and of the statistics of `channels` normalized channels."""
    return 8 * (7 + 2 * channels)


def vgg9_run(epochs: int, evaluation_batch: int) -> Run:
    """Return a run on CIFAR-10, evaluated as by the default settings; both splits are decoded."""
    evaluated = _evaluated(10_000, 10_000, evaluation_batch)
    return Run(vgg9_job(), epochs, 50_000, evaluated, decoded=60_000 * 3 * 32 * 32)


def resnet50_run(epochs: int, evaluation_batch: int) -> Run:
    """Return a run on ImageNet's folders, whose images are decoded in every epoch by loader processes."""
    return Run(resnet50_job(), epochs, 1_281_167, _evaluated(50_000, 10_000, evaluation_batch), decoded=0)


def _evaluated(test: int, train: int, batch: int) -> tuple[Passes, ...]:
    """Return the passes over the test set and the training samples, and those that recompute norm statistics."""
    return Passes(test, batch), Passes(train, batch), Passes(2048, MICRO_SIZE)


def reduction_rows(job: Job, cluster: Cluster, ranks: Sequence[int]) -> list[Reduction]:
    """Return the reductions on each number of ranks, with no rank idle."""
    rows = []
    for count in ranks:
        plain = busy_job(job, count)
        of = {name: _forecast_over(wire, plain, cluster, count) for name, wire in WIRES.items()}
        floating = of["float32"]
        factors = {name: row.milliseconds / floating.milliseconds for name, row in of.items()}
        rows.append(Reduction(floating, factors))
    return rows


def _forecast_over(wire: Wire, job: Job, cluster: Cluster, ranks: int) -> Forecast:
    sent = replace(
        job,
        weight_bytes=wire.weight_bytes,
        gathered_bytes=wire.gathered_bytes,
        tally=job.tally + wire.filter_bytes * sum(layer.filters for layer in job.layers),
    )
    network = replace(cluster.network, algorithm=wire.algorithm or cluster.network.algorithm)
    return forecast(sent, replace(cluster, network=network), ranks)


def swings(job: Job, cluster: Cluster, ranks: int) -> list[Swing]:
    """Return the effect of each guess on an update of `job`, the largest first."""
    plain = forecast(job, cluster, ranks).milliseconds

    def factor(path: Sequence[str], times: float) -> float:
        return forecast(job, _scaled(cluster, path, times), ranks).milliseconds / plain

    found = [Swing(guess, factor(path, 0.5), factor(path, 2.0)) for guess, path in GUESSES.items()]
    return sorted(found, key=lambda swing: swing.width, reverse=True)


def _scaled(part: Any, path: Sequence[str], times: float) -> Any:
    """Return the dataclass `part` with the number at `path` multiplied."""
    name, *rest = path
    value = getattr(part, name)
    return replace(part, **{name: _scaled(value, rest, times) if rest else value * times})


def knobs(job: Job, cluster: Cluster) -> Iterator[Knob]:
    """Yield the effect of each setting alone, relative to the unchanged cluster and job, with no rank idle."""
    for setting, changed, other in _changes(job, cluster):
        factors = []
        for ranks in KNOB_RANKS:
            plain = busy_job(job, ranks)
            before = forecast(plain, cluster, ranks).milliseconds
            factors.append(forecast(changed(plain), other, ranks).milliseconds / before)
        yield Knob(setting, tuple(factors))


def _changes(job: Job, cluster: Cluster) -> Iterator[tuple[str, Callable[[Job], Job], Cluster]]:
    """Yield each setting with a function that changes a job without idle ranks, and with the changed cluster."""
    jobs: Mapping[str, Callable[[Job], Job]] = {
        "`batch.micro_size` 128 where GPUs idle": lambda _: job,
        "`batch.micro_size` halved": lambda plain: replace(plain, micro_size=max(1, plain.micro_size // 2)),
        "`comm.reduction: float`": lambda plain: replace(plain, weight_bytes=4),
        "the same with `comm.compression: fp16`": lambda plain: replace(plain, weight_bytes=2),
        "all gradients in one bucket": lambda plain: replace(plain, bucket=1 << 62),
        "buckets of a quarter of the size": lambda plain: replace(plain, bucket=plain.bucket // 4),
    }
    for setting, changed in jobs.items():
        yield setting, changed, cluster
    clusters = {
        "`HOROVOD_CYCLE_TIME=5`": _cycle(cluster, 5e-3),
        "`HOROVOD_CYCLE_TIME=0.1`": _cycle(cluster, 1e-4),
        "`comm.engine: torch`: no cycle, no agreement": replace(cluster, coordination=Coordination(0.0, 0.0)),
        "`NCCL_ALGO=Ring`": replace(cluster, network=replace(cluster.network, algorithm="ring")),
        "`HOROVOD_HIERARCHICAL_ALLREDUCE=1`": replace(
            cluster, network=replace(cluster.network, algorithm="hierarchical")
        ),
        "a quarter of the bandwidth between nodes": _scaled(cluster, GUESSES["bandwidth between nodes"], 0.25),
        "GPUs that are twice as fast": _scaled(cluster, GUESSES["rate of a GPU"], 2.0),
    }
    for setting, other in clusters.items():
        yield setting, lambda plain: plain, other


def _cycle(cluster: Cluster, seconds: float) -> Cluster:
    return replace(cluster, coordination=replace(cluster.coordination, cycle=seconds))
