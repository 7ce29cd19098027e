"""Fits the scaling model's parameters to measurements on one machine, and compares the two."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy
from scipy.optimize import least_squares, nnls

from benchmarks.scaling_measure import CONTROLLERS, CYCLE_MILLISECONDS, MICRO_SIZE, Allreduce, Measurements, Step
from benchmarks.scaling_model import (
    FORWARD,
    Coordination,
    Job,
    Layer,
    Link,
    Network,
    Start,
    allreduce_seconds,
    communication,
    messages,
    micro_batches_of_busiest,
)
from benchmarks.scaling_subjects import vgg9

BYTES = 8


@dataclass(frozen=True)
class Residual:
    """A measured and a modelled time; `is_fitted` is False if it is a prediction."""

    what: str
    ranks: int
    measured: float
    modelled: float
    is_fitted: bool

    @property
    def ratio(self) -> float:
        """The model's time over the measured one."""
        return self.modelled / self.measured


@dataclass(frozen=True)
class Machine:
    """One node of `cores` cores; with more ranks than cores everything takes proportionally longer."""

    cores: int
    coordination: Coordination
    link: Link

    def slowdown(self, ranks: int) -> float:
        """Return the factor by which a rank is slower than on its own core."""
        return max(1.0, ranks / self.cores)

    def network(self, ranks: int) -> Network:
        """Return the network between `ranks` ranks."""
        slow = self.slowdown(ranks)
        link = Link(self.link.latency * slow, self.link.bandwidth / slow)
        return Network(link, link, node_size=ranks, algorithm="ring")

    def sum_seconds(self, ranks: int, size: float) -> float:
        """Return the time of a sum in a sequence of sums: at least a cycle."""
        return max(self.coordination.cycle, self.work_seconds(ranks, size))

    def work_seconds(self, ranks: int, size: float) -> float:
        """Return the time of a sum without the cycle."""
        hops = 2 * math.log2(ranks) * self.coordination.hop * self.slowdown(ranks) if ranks > 1 else 0.0
        return hops + allreduce_seconds(self.network(ranks), ranks, size)


@dataclass(frozen=True)
class Pace:
    """The compute time of a rank on its own core: seconds per sample, and fixed seconds per update."""

    sample: float
    fixed: float


def fit_machine(measurements: Measurements, controller: str) -> tuple[Machine, list[Residual]]:
    """Return the machine that fits the sums of 2 and 4 ranks best, by the logarithm of the ratio of times.

    Sums of more ranks are predicted, not fitted.
    """
    rows = [
        row for row in measurements.allreduces if row.controller == controller and row.ranks > 1 and row.kind == "known"
    ]
    seen = [row for row in rows if row.ranks <= 4]
    cycle = CYCLE_MILLISECONDS[controller] / 1000

    def machine(logarithms: Sequence[float]) -> Machine:
        hop, bandwidth = math.exp(logarithms[0]), math.exp(logarithms[1])
        return Machine(measurements.cores, Coordination(cycle, hop), Link(0.0, bandwidth))

    def errors(logarithms: Sequence[float]) -> list[float]:
        candidate = machine(logarithms)
        return [math.log(candidate.sum_seconds(row.ranks, row.length * BYTES) / row.seconds) for row in seen]

    starts = [(math.log(hop), math.log(bandwidth)) for hop in (1e-4, 5e-4, 2e-3) for bandwidth in (1e9, 5e9)]
    solutions = [least_squares(errors, start, method="dogbox") for start in starts]
    best = machine(min(solutions, key=lambda solution: float(solution.cost)).x)
    return best, [_allreduce_residual(best, row) for row in rows]


def _allreduce_residual(machine: Machine, row: Allreduce) -> Residual:
    modelled = machine.sum_seconds(row.ranks, row.length * BYTES)
    what = f"{row.controller}, {row.length * BYTES:,} bytes"
    return Residual(what, row.ranks, row.seconds, modelled, is_fitted=row.ranks <= 4)


def step_on(machine: Machine, pace: Pace, job: Job, ranks: int) -> float:
    """Return the seconds of an update of `job` on `ranks` ranks of `machine`."""
    slow = machine.slowdown(ranks)
    micro_batch = slow * pace.sample * job.micro_size
    exposed, _ = communication(
        messages(job),
        backward=(1 - FORWARD) * micro_batch,
        network=machine.network(ranks),
        coordination=Coordination(machine.coordination.cycle, machine.coordination.hop * slow),
        ranks=ranks,
    )
    return micro_batches_of_busiest(job, ranks) * micro_batch + slow * pace.fixed + exposed


def fit_pace(
    measurements: Measurements, machines: dict[str, Machine], width: float, layers: tuple[Layer, ...]
) -> tuple[Pace, list[Residual]]:
    """Return the pace that fits the updates of one `width` best, by the ratio of times, and all its residuals.

    Communication is as fitted to the sums; only the pace is fitted here, to 1 and 2 ranks, since 4 share two cores.
    """
    rows = [row for row in measurements.steps if row.width == width]
    seen = [row for row in rows if row.ranks <= 2]

    def modelled(pace: Pace) -> Callable[[Step], float]:
        return lambda row: step_on(machines[row.controller], pace, Job(layers, row.global_size, MICRO_SIZE), row.ranks)

    def errors(logarithms: Sequence[float]) -> list[float]:
        of = modelled(Pace(math.exp(logarithms[0]), math.exp(logarithms[1])))
        return [math.log(of(row) / row.seconds) for row in seen]

    alone = [row for row in seen if row.ranks == 1]
    start = math.log(float(numpy.median([row.seconds / row.global_size for row in alone])))
    solution = least_squares(errors, (start, math.log(1e-3)), bounds=((-20, -14), (5, 2)))
    pace = Pace(math.exp(solution.x[0]), math.exp(solution.x[1]))
    of = modelled(pace)
    return pace, [
        Residual(
            f"{row.controller}, width {row.width:g}, batch {row.global_size}",
            row.ranks,
            row.seconds,
            of(row),
            is_fitted=row.ranks <= 2,
        )
        for row in rows
    ]


def fit_start(measurements: Measurements, controller: str) -> Start:
    """Return the start that fits all numbers of ranks best, by the ratio of times.

    Loading shares the cores. The time per further rank is as measured here, where ranks shared cores too.
    """
    rows = [row for row in measurements.startups if row.controller == controller]
    met = numpy.array([row.met for row in rows])
    parts = numpy.array([(max(1.0, row.ranks / measurements.cores), row.ranks - 1) for row in rows])
    (alone, join), _ = nnls(parts / met[:, None], numpy.ones(len(rows)))
    return Start(float(alone), float(join))


@dataclass(frozen=True)
class Fits:
    """The fitted parameters and their residuals."""

    machines: dict[str, Machine]
    starts: dict[str, Start]
    paces: dict[float, Pace]
    sums: dict[str, list[Residual]]
    steps: list[Residual]


def fit(measurements: Measurements) -> Fits:
    """Fit the measured machine: first its sums alone, then the pace of its ranks."""
    machines, sums, starts = {}, {}, {}
    for controller in CONTROLLERS:
        machines[controller], sums[controller] = fit_machine(measurements, controller)
        starts[controller] = fit_start(measurements, controller)
    paces, steps = {}, []
    for width in dict.fromkeys(row.width for row in measurements.steps):
        paces[width], residuals = fit_pace(measurements, machines, width, vgg9(width))
        steps += residuals
    steps.sort(key=lambda row: CONTROLLERS.index(row.what.partition(",")[0]))
    return Fits(machines, starts, paces, sums, steps)
