"""One update of the weights: Algorithm 1 of SmoothOut (arXiv 1805.07898), over a global batch.

Perturb the weights, compute the gradient, restore the weights, sum over the ranks (`_compute_gradient`), and update.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import chain

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.profiler import record_function

from dist_train.cluster.communicator import SingleProcess
from dist_train.config.plugins import is_plugin
from dist_train.data.augmentation import Mix, Target, unmixed
from dist_train.data.images import BatchRequest
from dist_train.data.loader import SampleSource
from dist_train.data.plan import MicroBatch
from dist_train.models import Loss
from dist_train.models.norm_arithmetic import SumOverRanks
from dist_train.models.norms import BatchStatistics, sync_batch_norm
from dist_train.optim.averaging import Averaging
from dist_train.optim.flat_weights import FlatWeights, norm
from dist_train.optim.noise import Noise
from dist_train.optim.optimizers import optimizer_step, set_learning_rate
from dist_train.outcome import DivergedError, OutOfMemoryError, UsageError
from dist_train.reproducible import LayerRng
from dist_train.training.compute import LOWEST_LOSS_SCALE, Compute, LossScale, fitting_memory, runs_in_memory
from dist_train.training.graphs import GraphRecorder, MicroBatchGraphs
from dist_train.training.measuring import Part, StepClock, StepTimes
from dist_train.training.reduction import GradientReduction, Tally, TallyResult

_STATISTICS_MOMENTUM = 0.1


@dataclass(frozen=True)
class Update:
    """The result of an update, the same on all ranks except for `times`."""

    total: TallyResult
    repeats: int
    """How often the gradient was computed again because numbers left their range."""
    times: StepTimes = field(compare=False, repr=False)
    """Times of the phases of this rank's update."""


@dataclass(frozen=True)
class GlobalBatch:
    """The samples of one update, int64 [global_size], the same on all ranks, and this rank's micro-batches of it."""

    step: int
    epoch: int
    indices: Tensor
    micro_batches: tuple[MicroBatch, ...]
    claim: Callable[[], MicroBatch | None] | None = None
    """Claims a further micro-batch for this rank; returns None, once in each pass over the batch, if none is left."""
    following: Callable[[], Iterable[BatchRequest]] = tuple
    """Returns this rank's known requests of the next update: read ahead once there is nothing left to claim."""
    partners: int = 0
    """Extra samples read after each micro-batch, to be mixed with its own by mixup or CutMix."""
    pace: int = 0
    """Microseconds per micro-batch, which this rank reports to the others; 0 if it does not."""

    def iterate(self, prefetch: Callable[[Iterable[BatchRequest]], None]) -> Iterator[tuple[MicroBatch, bool]]:
        """Yield each of this rank's micro-batches, and whether it is the last; the next is claimed and read ahead."""
        ahead = deque(self.micro_batches)
        while ahead:
            if self.claim is not None and len(ahead) == 1:
                if (claimed := self.claim()) is not None:
                    ahead.append(claimed)
                prefetch(chain(map(self.request, ahead), self.following() if len(ahead) == 1 else ()))
            yield ahead[0], len(ahead) == 1
            ahead.popleft()

    def request(self, micro_batch: MicroBatch) -> BatchRequest:
        """Return the samples to read for `micro_batch`; reading wraps around at the global batch's end."""
        indices = self.indices[micro_batch.start : micro_batch.stop + self.partners]
        if (missing := micro_batch.size + self.partners - len(indices)) > 0:
            indices = torch.cat([indices, self.indices[:missing]])
        return BatchRequest(indices, self.epoch)


@dataclass(eq=False)
class TrainingStep:
    """Makes one update per call."""

    model: nn.Module
    weights: FlatWeights
    statistics: BatchStatistics
    """The running statistics of the model's norms."""
    samples: SampleSource
    noise: Noise
    reduction: GradientReduction
    optimizer: Optimizer
    tally: Tally
    loss: Loss
    compute: Compute
    layer_rng: LayerRng
    """Random generator of the model's stochastic layers, such as dropout."""
    clip_norm: float | None
    averaging: Averaging
    optimizer_draws: Callable[[int], AbstractContextManager[object]] = nullcontext
    """Given the number of an update, seeds the global generators for an optimizer that draws from them."""
    mix: Mix = unmixed
    loss_scale: LossScale = field(default_factory=LossScale)
    sum_over_ranks: SumOverRanks | None = None
    """Set for sync norm, where all ranks share every micro-batch: sums the norms' statistics over the ranks."""
    clock: StepClock = field(default_factory=lambda: StepClock(SingleProcess()))
    wait_for_checkpoint_copy: Callable[[], None] = lambda: None
    """Returns once the checkpoint writer has copied the weights and the optimizer's state, so that they may change."""
    share_buffers: Callable[[], None] = lambda: None
    """Gives all ranks rank 0's buffers, as far as the model's own layers change them."""
    graph_recorder: GraphRecorder | None = None
    """Set if all micro-batches but the last are replayed as graphs."""
    fails_alone: bool = False
    """Whether a rank that runs out of memory fails alone: the others continue, and micro-batches may not shrink."""

    def __post_init__(self) -> None:
        # A step made by `replace` has other tensors, and so records its own graphs.
        self._graphs = MicroBatchGraphs(self.graph_recorder) if self.graph_recorder else None

    def __call__(self, batch: GlobalBatch, learning_rate: float, stop_requested: Callable[[], bool]) -> Update:
        """Update the weights by the gradient of `batch` at the perturbed weights.

        Raises:
            DivergedError: the loss or the gradient is not finite, or out of range; on all ranks.
            OutOfMemoryError: a micro-batch does not fit the device of some rank; on all ranks, the weights unchanged.
            UsageError: the same, on that rank alone: with sync norm, and in an elastic launch, whose others continue.
            RankLostError: a rank was lost.
        """
        self.clock.start()
        repeats = 0
        while self._must_repeat(total := self._compute_gradient(batch, stop_requested)):
            repeats += 1
            if total.out_of_range:
                self.loss_scale.lower()
            else:
                self.reduction.accumulator.choose_grids(total.largest, total.gradients)
        _check_total(total, batch, len(self.noise.points(0)))
        with self._phase("optimizer"):
            clip_gradient(self.weights.gradients, total.gradient_norm, self.clip_norm)
            with self.clock.part("checkpoint_stall"):
                self.wait_for_checkpoint_copy()
            set_learning_rate(self.optimizer, learning_rate)
            self.noise.before_update(batch.step, learning_rate)
            with self.optimizer_draws(batch.step):
                optimizer_step(self.optimizer, self.weights)
            self.noise.after_update(batch.step)
            self.noise.adapt(batch.step, total.rise)
            self.averaging.after_update(batch.step)
            self.loss_scale.note_update()
            self.reduction.accumulator.choose_grids(total.largest, total.gradients)
            self.statistics.absorb(total.statistics, total.samples, _STATISTICS_MOMENTUM)
        return Update(total, repeats, self.clock.times())

    def _must_repeat(self, total: TallyResult) -> bool:
        """Return whether a lower loss scale, or coarser grids, could bring the gradient's numbers into their range."""
        if total.out_of_memory:
            return False
        if total.out_of_range:
            return self.loss_scale.value > LOWEST_LOSS_SCALE
        return self.reduction.accumulator.has_overflowed(total.largest)

    @contextmanager
    def _phase(self, part: Part) -> Iterator[None]:
        """Count the block's time to `part`, and name it in profiles."""
        with record_function(part), self.clock.part(part):
            yield

    def _compute_gradient(self, batch: GlobalBatch, stop_requested: Callable[[], bool]) -> TallyResult:
        """Compute the global gradient at the perturbed weights into `weights.gradients`; restore the clean weights."""
        self.tally.clear()
        self.reduction.start(self.loss_scale.value, at_zero=self._graphs is not None)
        try:
            with self._phase("perturb_restore"):
                self.noise.perturb(batch.step)
            with (
                self._phase("forward_backward"),
                sync_batch_norm(self.statistics.norms, self.sum_over_ranks),
                self.layer_rng.preserved(),
            ):
                fits = self._add_gradients(batch)
        finally:
            with self._phase("perturb_restore"):
                self.noise.restore()
        self.weights.check_in_place()
        self.reduction.send()
        self.tally.send(
            out_of_range=self.reduction.accumulator.out_of_range,
            out_of_memory=not fits,
            stop=stop_requested(),
            largest=self.reduction.accumulator.largest,
            pace=batch.pace,
        )
        with self._phase("allreduce_wait"):
            self.share_buffers()
            self.reduction.finish()
            return self.tally.result(norm(self.weights.gradients))

    def _add_gradients(self, batch: GlobalBatch) -> bool:
        """Add up the gradients of this rank's micro-batches; return False if they do not fit its device."""
        what, fix = f"update {batch.step + 1}", "begin with a smaller batch.micro_size"

        def add_up() -> None:
            # With sync norm, the others already wait for this rank in the forward or backward pass: it fails alone.
            with nullcontext() if self.sum_over_ranks is None else fitting_memory(what, fix):
                for micro_batch, is_last in batch.iterate(self.samples.prefetch):
                    self._add_gradient(batch, micro_batch, is_last)

        fits = runs_in_memory(add_up)
        if self.fails_alone and not fits:
            raise UsageError(f"{what} does not fit this rank's memory: {fix}", code="out-of-memory")
        return fits

    def _add_gradient(self, batch: GlobalBatch, micro_batch: MicroBatch, is_last: bool) -> None:
        """Add the gradient of `micro_batch`, this rank's last if `is_last`, at each point that the noise requests."""
        with self.clock.part("data_wait"):
            request = batch.request(micro_batch)
            inputs, target = self.mix(*self.samples.read(request), request)
        scaled_size = len(batch.indices) / self.loss_scale.value
        seed_layers = partial(self.layer_rng.seed, batch.step, micro_batch.start)
        points = self.noise.points(micro_batch.index)
        for number, point in enumerate(points, start=1):
            seed_layers()
            with self.clock.part("perturb_restore"):
                self.noise.perturb_for(micro_batch.index, partial(self._ascend, inputs, target, scaled_size), point)
                if is_plugin(self.noise.settings.method):
                    self.weights.clear_padding()  # its methods may have written to all of the gradients
            divisor = scaled_size / point.weight
            if self.noise.settings.target_rise is not None and micro_batch.index == 0 and number == 1:
                self._measure_rise(inputs, target, seed_layers)
            seed_layers()
            if is_last and number == len(points):
                # Never a graph: it sends buckets while its backward pass is under way.
                self._differentiate(inputs, target, divisor, self.reduction.last_micro_batch)
            elif self._graphs is None:
                self._differentiate(inputs, target, divisor, self.reduction.micro_batch)
            else:
                address, sums = self.weights.parameters[0].data_ptr(), self.reduction.accumulator.dtype
                constants = divisor, self.loss_scale.value, address, sums
                self._graphs.run(partial(self._differentiate_and_count, divisor), inputs, target, *constants)

    def _differentiate(
        self, inputs: Tensor, target: Target, divisor: float, accumulating: Callable[[], AbstractContextManager[None]]
    ) -> None:
        """Add the gradient of the sum of the samples' losses over `divisor`."""
        logits, loss = self._forward(inputs, target)
        self.statistics.collect(len(target.main))
        self.tally.add(loss, logits, target.main)
        with accumulating():
            torch.autograd.backward(loss / divisor)
        self.statistics.forget()  # what activation checkpointing has computed a second time

    def _differentiate_and_count(self, divisor: float, inputs: Tensor, target: Target) -> None:
        """Do what a graph records: leave results only in tensors that existed before."""
        self._differentiate(inputs, target, divisor, self.reduction.micro_batch)
        self.tally.count(self.reduction.accumulator.take_out_of_range())

    def _forward(self, inputs: Tensor, target: Target) -> tuple[Tensor, Tensor]:
        """Return the logits and the sum of the samples' losses."""
        with self.compute.autocast():
            logits = self.model(inputs)
        return logits, loss_sum(self.loss, logits.float(), target)

    def _measure_rise(self, inputs: Tensor, target: Target, seed_layers: Callable[[], None]) -> None:
        """Note by how much the noise raises the loss of a micro-batch, without gradients and norm statistics."""
        with self.clock.part("forward_backward"), torch.no_grad():
            seed_layers()
            _, loss = self._forward(inputs, target)
            seed_layers()
            with self.noise.at_clean_weights():
                _, clean_loss = self._forward(inputs, target)
        self.tally.add_rise(loss, clean_loss, len(target.main))
        self.statistics.forget()

    def _ascend(self, inputs: Tensor, target: Target, scaled_size: float) -> None:
        """Compute the micro-batch's gradient for SAM's ascent; its forward pass does not count for norm statistics."""
        with self.clock.part("forward_backward"):
            _, loss = self._forward(inputs, target)
            torch.autograd.backward(loss / scaled_size)
        if self.sum_over_ranks is not None:
            # Sum a copy: after a failure, a broken group may still write to the tensor it was given.
            summed = self.weights.gradients.clone()
            self.sum_over_ranks(summed, "ascent")
            self.weights.gradients.copy_(summed)
        self.statistics.forget()


def loss_sum(loss: Loss, logits: Tensor, target: Target) -> Tensor:
    """Return the summed `loss` of `logits` [n, classes]; for mixed images, of both labels, in their shares."""
    if target.partners is None or target.share is None:
        return loss(logits, target.labels, reduction="sum")
    label_losses, partner_losses = (loss(logits, each, reduction="none") for each in (target.labels, target.partners))
    return torch.lerp(partner_losses, label_losses, target.share).sum()


def clip_gradient(gradient: Tensor, norm: float, max_norm: float | None) -> None:
    """Scale the global `gradient`, of norm `norm`, down to `max_norm` if it is larger."""
    if max_norm is not None and norm > max_norm:
        gradient.mul_(max_norm / norm)


def _check_total(total: TallyResult, batch: GlobalBatch, points: int) -> None:
    if total.out_of_memory:
        raise OutOfMemoryError(
            f"{total.out_of_memory} of the ranks ran out of memory in step {batch.step + 1}: begin with a smaller "
            f"batch.micro_size, or with auto, which finds it"
        )
    if total.out_of_range or not math.isfinite(total.gradient_norm):
        raise DivergedError(
            f"the loss, the gradient or the activations of step {batch.step + 1} are not finite or out of range",
            code="step-not-finite",
        )
    assert total.samples == len(batch.indices) * points, "each sample of the global batch counts once per point"
