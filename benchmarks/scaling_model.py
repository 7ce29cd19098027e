"""The time of an update and of a run on any number of ranks, from compute, network and the engine; pure functions.

All times are seconds, sizes bytes, bandwidths bytes a second. What is left out: the reading of data, checkpoints
(written while the next updates are computed), and other jobs on the network.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Literal

Algorithm = Literal["ring", "hierarchical", "tree", "fastest"]
FORWARD = 1 / 3
"""The forward pass's part of forward and backward: the backward pass has two products where the forward has one."""


@dataclass(frozen=True)
class Layer:
    """Weights of a layer, and multiply-adds of its forward pass on one sample."""

    parameters: int
    multiply_adds: int


@dataclass(frozen=True)
class Link:
    """What a message between two neighbours takes: `latency`, and its size over `bandwidth`."""

    latency: float
    bandwidth: float


@dataclass(frozen=True)
class Network:
    """Nodes of `node_size` ranks; `between` has the bandwidth of a node, one way, for all its ranks."""

    within: Link
    between: Link
    node_size: int
    algorithm: Algorithm = "fastest"


@dataclass(frozen=True)
class Coordination:
    """How the engine begins an operation: in the next cycle of `cycle` seconds, once all ranks have asked for it.

    To agree takes `hop` seconds for each doubling of the ranks, there and back. torch.distributed has no cycle.
    """

    cycle: float
    hop: float


@dataclass(frozen=True)
class Compute:
    """A rank: `rate` samples a second, at least `least` seconds for a forward and backward pass of any size.

    `fixed` is what every rank does once in an update: noise, optimizer, bookkeeping. `jitter` is the standard
    deviation of a rank's time from update to update, as a part of it: all wait for the slowest.
    """

    rate: float
    least: float = 0.0
    fixed: float = 0.0
    jitter: float = 0.0


@dataclass(frozen=True)
class Job:
    """What is trained: `layers` in the order of the forward pass, and how its batch and gradients are cut.

    `weight_bytes` is 8 for the exact reduction's integers, 4 for floats, 2 for float16; `bucket` is the least
    number of weights that are sent together; `tally` is the size of the small sum of integers that ends an update.
    """

    layers: tuple[Layer, ...]
    global_size: int
    micro_size: int
    weight_bytes: int = 8
    bucket: int = 1 << 20
    tally: int = 0


@dataclass(frozen=True)
class Passes:
    """An evaluation's forward passes over `samples` samples, `size` at a time; a rank takes whole passes."""

    samples: int
    size: int


@dataclass(frozen=True)
class Run:
    """`epochs` of `job` over `samples` training samples, `evaluated` after each, from `decoded` bytes of images.

    The images are decoded into the cache when the data set is first used.
    """

    job: Job
    epochs: int
    samples: int
    evaluated: tuple[Passes, ...]
    decoded: int


@dataclass(frozen=True)
class Start:
    """The ranks have met after `alone` seconds and `join` more for every rank beyond the first."""

    alone: float
    join: float

    def seconds(self, ranks: int) -> float:
        """Return the seconds of so many ranks, each on a core of its own."""
        return self.alone + self.join * (ranks - 1)


@dataclass(frozen=True)
class RunSeconds:
    """Where the time of a run goes."""

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
    """A sum over the ranks: its size, and how far the backward pass is (0 to 1) when it can begin."""

    size: int
    ready: float


@dataclass(frozen=True)
class StepSeconds:
    """An update: `compute` of the rank that has most to do, `waiting` for the slowest one, `exposed`
    communication that no backward pass hides, and `fixed`. `hidden` communication costs nothing.
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
    """Return how long a sum of `size` bytes takes once it has begun.

    ring: every rank sends 2 (N-1)/N of the message to its neighbour. The message crosses every link twice, and
    goes at the pace of the slowest. hierarchical: a ring in each node, and rings between the nodes, each with a
    part of the message. tree: between the nodes a double binary tree, whose latency grows with the logarithm.
    fastest: ring or tree, as NCCL chooses for each message.
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
    # The two trees carry half of the message each, and share the node's link.
    return inside + 2 * (math.ceil(math.log2(nodes)) * network.between.latency + _beyond_one(nodes, size, network))


def _beyond_one(nodes: int, size: float, network: Network) -> float:
    return size / network.between.bandwidth if nodes > 1 else 0.0


def agreement_seconds(coordination: Coordination, ranks: int) -> float:
    """Return how long an operation waits before it begins: half a cycle, and until all ranks know of each other."""
    if ranks == 1:
        return 0.0
    return coordination.cycle / 2 + 2 * math.log2(ranks) * coordination.hop


def messages(job: Job) -> list[Message]:
    """Return the sums of an update, in the order in which they can begin: buckets of gradients, then the tally.

    As in the training: a bucket takes layers from the last to the first until it has `job.bucket` weights, and can
    begin once the backward pass has been through all of them. The tally goes along with the last bucket where both
    are integers: Coordination joins what is ready in one cycle.
    """
    whole = sum(layer.multiply_adds for layer in job.layers)
    sent: list[Message] = []
    weights = done = 0
    for number, layer in enumerate(reversed(job.layers)):
        weights += layer.parameters
        done += layer.multiply_adds
        if weights >= job.bucket or number == len(job.layers) - 1:
            sent.append(Message(weights * job.weight_bytes, done / whole))
            weights = 0
    if job.tally and job.weight_bytes == 8:
        sent[-1] = replace(sent[-1], size=sent[-1].size + job.tally)
    elif job.tally:
        sent.append(Message(job.tally, 1.0))
    return sent


def micro_batches_of_busiest(job: Job, ranks: int) -> int:
    """Return how many micro-batches the rank has that has most of them."""
    return math.ceil(math.ceil(job.global_size / job.micro_size) / ranks)


def idle_ranks(job: Job, ranks: int) -> int:
    """Return how many ranks have no micro-batch."""
    return max(0, ranks - math.ceil(job.global_size / job.micro_size))


def slowest_of(ranks: int) -> float:
    """Return the mean of the largest of so many standard normal numbers, by Blom's approximation; 0 for one."""
    return NormalDist().inv_cdf((ranks - 0.375) / (ranks + 0.25))


def communication(
    sums: Sequence[Message], *, backward: float, network: Network, coordination: Coordination, ranks: int
) -> tuple[float, float]:
    """Return the seconds of all `sums` beyond the end of a backward pass of `backward` seconds, and before it.

    One sum at a time; each begins when it is ready, agreed upon, and the one before it is done.
    """
    if ranks == 1:
        return 0.0, 0.0
    free, hidden = -backward, 0.0
    for message in sums:
        ready = backward * (message.ready - 1.0) + agreement_seconds(coordination, ranks)
        begun = max(ready, free)
        free = begun + allreduce_seconds(network, ranks, message.size)
        hidden += min(free, 0.0) - min(begun, 0.0)
    return max(0.0, free), hidden


def step_seconds(job: Job, compute: Compute, network: Network, coordination: Coordination, ranks: int) -> StepSeconds:
    """Return the time of an update on so many ranks."""
    count = micro_batches_of_busiest(job, ranks)
    micro_batch = max(min(job.micro_size, job.global_size) / compute.rate, compute.least)
    busy = count * micro_batch
    exposed, hidden = communication(
        messages(job), backward=(1 - FORWARD) * micro_batch, network=network, coordination=coordination, ranks=ranks
    )
    return StepSeconds(
        compute=busy,
        waiting=busy * compute.jitter * slowest_of(ranks),
        exposed=exposed,
        hidden=hidden,
        fixed=compute.fixed,
    )


def efficiency(job: Job, compute: Compute, network: Network, coordination: Coordination, ranks: int) -> float:
    """Return the speed-up over one rank for the same global batch, over the number of ranks."""
    alone = step_seconds(job, compute, network, coordination, 1).total
    return alone / (ranks * step_seconds(job, compute, network, coordination, ranks).total)


def weak_efficiency(job: Job, compute: Compute, network: Network, coordination: Coordination, ranks: int) -> float:
    """Return one rank's time over that of so many, for a batch that each of them has: `job.global_size` a rank."""
    alone = step_seconds(job, compute, network, coordination, 1)
    larger = replace(job, global_size=job.global_size * ranks)
    return alone.total / step_seconds(larger, compute, network, coordination, ranks).total


def evaluation_seconds(
    passes: Passes, compute: Compute, network: Network, coordination: Coordination, ranks: int
) -> float:
    """Return the time of an evaluation: the passes of the rank that has most of them, and the sum of all results."""
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
    """Return the time of a run whose images are decoded at `conversion` bytes a second, on each node at once.

    A last, smaller batch of an epoch is left out, as in the training.
    """
    updates = run.epochs * (run.samples // run.job.global_size)
    each = sum(evaluation_seconds(passes, compute, network, coordination, ranks) for passes in run.evaluated)
    return RunSeconds(
        training=updates * step_seconds(run.job, compute, network, coordination, ranks).total,
        evaluation=run.epochs * each,
        start=start.seconds(ranks),
        conversion=run.decoded / conversion,
    )
