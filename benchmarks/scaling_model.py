"""A model of the time of an update and of a run on any number of ranks, from compute, network and engine.

Times are in seconds, sizes in bytes, bandwidths in bytes per second. The model leaves out reading data, checkpoints
(written in the background), and other jobs on the network.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Literal

Algorithm = Literal["ring", "hierarchical", "tree", "fastest"]
FORWARD = 1 / 3
"""The forward pass's share of forward and backward: the backward pass has two matrix products for each forward one."""


@dataclass(frozen=True)
class Layer:
    """Number of weights of a layer, of multiply-adds of its forward pass per sample, and of filters (a bias is one)."""

    parameters: int
    multiply_adds: int
    filters: int = 0


@dataclass(frozen=True)
class Link:
    """The time of a message between two neighbours: `latency` plus its size over `bandwidth`."""

    latency: float
    bandwidth: float


@dataclass(frozen=True)
class Network:
    """Nodes of `node_size` ranks; `between` has a node's bandwidth, in one direction, shared by its ranks."""

    within: Link
    between: Link
    node_size: int
    algorithm: Algorithm = "fastest"


@dataclass(frozen=True)
class Coordination:
    """When the engine starts an operation: in the next cycle, of `cycle` seconds, after all ranks have requested it.

    The agreement takes `hop` seconds per doubling of the ranks, in both directions. torch.distributed has no cycle.
    """

    cycle: float
    hop: float


@dataclass(frozen=True)
class Compute:
    """A rank: `rate` samples per second, at least `least` seconds for a forward and backward pass.

    `fixed` is the time that every rank spends once per update: noise, optimizer, bookkeeping. `jitter` is the relative
    standard deviation of a rank's time over updates; all ranks wait for the slowest.
    """

    rate: float
    least: float = 0.0
    fixed: float = 0.0
    jitter: float = 0.0


@dataclass(frozen=True)
class Job:
    """What is trained: `layers` in forward order, and how batch and gradients are split.

    `weight_bytes` is 8 for the exact reduction's integers, 4 for float32, 2 for float16; `bucket` is the minimum number
    of weights sent together; `tally` is the size of the small sum of integers at the end of an update.
    `gathered_bytes`, unless 0, are those of a weight in an all-gather: gradients are reduce-scattered instead of
    allreduced, each rank updates its shard, and the new weights are gathered.
    """

    layers: tuple[Layer, ...]
    global_size: int
    micro_size: int
    weight_bytes: int = 8
    bucket: int = 1 << 20
    tally: int = 0
    gathered_bytes: int = 0


@dataclass(frozen=True)
class Passes:
    """An evaluation's forward passes over `samples` samples, `size` per pass; ranks take whole passes."""

    samples: int
    size: int


@dataclass(frozen=True)
class Run:
    """`epochs` of `job` over `samples` training samples, with the passes `evaluated` after each epoch.

    `decoded` bytes of images are decoded into the cache when the data set is first used.
    """

    job: Job
    epochs: int
    samples: int
    evaluated: tuple[Passes, ...]
    decoded: int


@dataclass(frozen=True)
class Start:
    """The ranks are connected after `alone` seconds plus `join` seconds per rank beyond the first."""

    alone: float
    join: float

    def seconds(self, ranks: int) -> float:
        """Return the start-up seconds of `ranks` ranks, each on its own core."""
        return self.alone + self.join * (ranks - 1)


@dataclass(frozen=True)
class RunSeconds:
    """The parts of a run's time."""

    training: float
    evaluation: float
    start: float
    conversion: float

    @property
    def total(self) -> float:
        """Seconds of the run."""
        return self.training + self.evaluation + self.start + self.conversion


@dataclass(frozen=True)
class Message:
    """A sum over ranks: its size, and the fraction of the backward pass (0 to 1) after which it can start.

    `part` is the fraction of an allreduce that it takes: half for a reduce-scatter.
    """

    size: int
    ready: float
    part: float = 1.0


@dataclass(frozen=True)
class StepSeconds:
    """An update: `compute` of the busiest rank, `waiting` for the slowest one, `exposed` communication that the
    backward pass does not hide, and `fixed`. `hidden` communication costs nothing.
    """

    compute: float
    waiting: float
    exposed: float
    hidden: float
    fixed: float

    @property
    def total(self) -> float:
        """Seconds of the update."""
        return self.compute + self.waiting + self.exposed + self.fixed


def allreduce_seconds(network: Network, ranks: int, size: float) -> float:
    """Return the duration of a sum of `size` bytes once it has started.

    ring: every rank sends 2 (N-1)/N of the message to its neighbour; the slowest link sets the pace. hierarchical: a
    ring in each node, and rings between nodes, each with a part of the message. tree: a double binary tree between
    nodes, whose latency grows logarithmically. fastest: the faster of ring and tree, as NCCL chooses for each message.
    """
    if network.algorithm == "fastest":
        choices: tuple[Algorithm, ...] = ("ring", "tree")
        return min(allreduce_seconds(replace(network, algorithm=choice), ranks, size) for choice in choices)
    nodes = math.ceil(ranks / network.node_size)
    local = min(ranks, network.node_size)
    if network.algorithm == "ring":
        crossing = nodes if nodes > 1 else 0
        share = 2 * (ranks - 1) / ranks
        slowest = min(network.within.bandwidth, network.between.bandwidth) if crossing else network.within.bandwidth
        latency = (ranks - crossing) * network.within.latency + crossing * network.between.latency
        return share * (latency + size / slowest)
    inside = 2 * (local - 1) * (network.within.latency + size / local / network.within.bandwidth)
    if network.algorithm == "hierarchical":
        return inside + 2 * (nodes - 1) * (network.between.latency + size / nodes / network.between.bandwidth)
    # The two trees carry half of the message each and share the node's link.
    return inside + 2 * (math.ceil(math.log2(nodes)) * network.between.latency + _beyond_one(nodes, size, network))


def _beyond_one(nodes: int, size: float, network: Network) -> float:
    return size / network.between.bandwidth if nodes > 1 else 0.0


def agreement_seconds(coordination: Coordination, ranks: int) -> float:
    """Return how long an operation waits before it starts: half a cycle, and the agreement of the ranks."""
    if ranks == 1:
        return 0.0
    return coordination.cycle / 2 + 2 * math.log2(ranks) * coordination.hop


def messages(job: Job) -> list[Message]:
    """Return the sums of an update, in the order in which they can start: buckets of gradients, then the tally.

    As in training, a bucket takes layers from last to first until it has `job.bucket` weights, and can start once the
    backward pass has reached all of them. If both are allreduces of 64-bit integers, the tally is sent with
    the last bucket, because the engine fuses what is ready in one cycle.
    """
    whole = sum(layer.multiply_adds for layer in job.layers)
    part = 0.5 if job.gathered_bytes else 1.0
    sent: list[Message] = []
    weights = done = 0
    for number, layer in enumerate(reversed(job.layers)):
        weights += layer.parameters
        done += layer.multiply_adds
        if weights >= job.bucket or number == len(job.layers) - 1:
            sent.append(Message(weights * job.weight_bytes, done / whole, part))
            weights = 0
    if job.tally and job.weight_bytes == 8 and not job.gathered_bytes:
        sent[-1] = replace(sent[-1], size=sent[-1].size + job.tally)
    elif job.tally:
        sent.append(Message(job.tally, 1.0))
    return sent


def micro_batches_of_busiest(job: Job, ranks: int) -> int:
    """Return the largest number of micro-batches of any rank."""
    return math.ceil(math.ceil(job.global_size / job.micro_size) / ranks)


def idle_ranks(job: Job, ranks: int) -> int:
    """Return the number of ranks without a micro-batch."""
    return max(0, ranks - math.ceil(job.global_size / job.micro_size))


def slowest_of(ranks: int) -> float:
    """Return the expected maximum of `ranks` standard normal numbers, by Blom's approximation; 0 for one."""
    return NormalDist().inv_cdf((ranks - 0.375) / (ranks + 0.25))


def communication(
    sums: Sequence[Message], *, backward: float, network: Network, coordination: Coordination, ranks: int
) -> tuple[float, float]:
    """Return the seconds of `sums` after the end of a backward pass of `backward` seconds, and during it.

    Sums run one at a time; each starts when it is ready and agreed upon, and the previous one is done.
    """
    if ranks == 1:
        return 0.0, 0.0
    free, hidden = -backward, 0.0
    for message in sums:
        ready = backward * (message.ready - 1.0) + agreement_seconds(coordination, ranks)
        started = max(ready, free)
        free = started + message.part * allreduce_seconds(network, ranks, message.size)
        hidden += min(free, 0.0) - min(started, 0.0)
    return max(0.0, free), hidden


def gather_seconds(job: Job, network: Network, coordination: Coordination, ranks: int) -> float:
    """Return the time of the all-gather after an update, the second half of a ring's allreduce; 0 if none is made."""
    if not job.gathered_bytes or ranks == 1:
        return 0.0
    size = job.gathered_bytes * sum(layer.parameters for layer in job.layers)
    return agreement_seconds(coordination, ranks) + allreduce_seconds(network, ranks, size) / 2


def step_seconds(job: Job, compute: Compute, network: Network, coordination: Coordination, ranks: int) -> StepSeconds:
    """Return the time of an update on `ranks` ranks."""
    count = micro_batches_of_busiest(job, ranks)
    micro_batch = max(min(job.micro_size, job.global_size) / compute.rate, compute.least)
    busy = count * micro_batch
    exposed, hidden = communication(
        messages(job), backward=(1 - FORWARD) * micro_batch, network=network, coordination=coordination, ranks=ranks
    )
    return StepSeconds(
        compute=busy,
        waiting=busy * compute.jitter * slowest_of(ranks),
        exposed=exposed + gather_seconds(job, network, coordination, ranks),
        hidden=hidden,
        fixed=compute.fixed,
    )


def weak_efficiency(job: Job, compute: Compute, network: Network, coordination: Coordination, ranks: int) -> float:
    """Return the time of one rank over that of `ranks` ranks, with a batch of `job.global_size` per rank."""
    alone = step_seconds(job, compute, network, coordination, 1)
    larger = replace(job, global_size=job.global_size * ranks)
    return alone.total / step_seconds(larger, compute, network, coordination, ranks).total


def evaluation_seconds(
    passes: Passes, compute: Compute, network: Network, coordination: Coordination, ranks: int
) -> float:
    """Return the time of an evaluation: the passes of the busiest rank, and the sum of all results."""
    count = math.ceil(passes.samples / passes.size)
    one = FORWARD * max(min(passes.size, passes.samples) / compute.rate, compute.least)
    results = [Message(16 * count, 1.0)]
    exposed, _ = communication(results, backward=0.0, network=network, coordination=coordination, ranks=ranks)
    return math.ceil(count / ranks) * one + exposed


def run_seconds(
    run: Run,
    compute: Compute,
    network: Network,
    coordination: Coordination,
    *,
    start: Start,
    conversion: float,
    ranks: int,
) -> RunSeconds:
    """Return the time of a run whose images are decoded at `conversion` bytes per second, on all nodes at once.

    The last, smaller batch of an epoch is left out, as in training.
    """
    updates = run.epochs * (run.samples // run.job.global_size)
    each = sum(evaluation_seconds(passes, compute, network, coordination, ranks) for passes in run.evaluated)
    return RunSeconds(
        training=updates * step_seconds(run.job, compute, network, coordination, ranks).total,
        evaluation=run.epochs * each,
        start=start.seconds(ranks),
        conversion=run.decoded / conversion,
    )
