"""One update of the weights: Algorithm 1 of SmoothOut (arXiv 1805.07898), over a global batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer

from dist_train.data.augmentation import Mix, Target, unmixed
from dist_train.data.images import BatchRequest, SampleSource
from dist_train.data.plan import MicroBatch
from dist_train.models.normalization import SumOverRanks
from dist_train.models.norms import BatchStatistics, GroupedBatchNorm, sync_batch_norm
from dist_train.optim.averaging import Averaging
from dist_train.optim.flat_weights import FlatWeights
from dist_train.optim.noise import Noise
from dist_train.optim.optimizers import optimizer_step, set_learning_rate
from dist_train.outcome import DivergedError
from dist_train.training.compute import Compute, LossScale, is_out_of_memory
from dist_train.training.measuring import HostTimer, StepClock, StepTimes
from dist_train.training.reduction import GradientReduction, Tally, TallyResult

_STATISTICS_MOMENTUM = 0.1


@dataclass(frozen=True)
class Update:
    """What an update was: mean loss and accuracy over the points where gradients were taken, the norm of the global
    gradient before it was clipped, whether some rank was asked to stop, and how often the gradient was computed again,
    since numbers left their range. `times` are this rank's own, `paces` what the ranks told of theirs.
    `meeting_requested`: ranks wait to be let in.
    """

    loss: float
    accuracy: float
    gradient_norm: float
    stop_requested: bool
    repeats: int
    times: StepTimes = field(compare=False, repr=False)
    paces: tuple[int, ...] = field(default=(), compare=False, repr=False)
    meeting_requested: bool = False


class OutOfMemoryError(RuntimeError):
    """A micro-batch does not fit the device of some rank; the weights are as before the step."""


@dataclass(frozen=True)
class GlobalBatch:
    """The samples of one update, int64 [global_size], the same on all ranks, and which part is ours."""

    step: int
    epoch: int
    indices: Tensor
    micro_batches: tuple[MicroBatch, ...]
    partners: int = 0
    """Samples of the global batch that are read beyond each micro-batch, to be mixed with its own."""
    pace: int = 0
    """What this rank tells the others of its speed: microseconds of a micro-batch, 0 if nothing."""

    def request(self, micro_batch: MicroBatch) -> BatchRequest:
        """Return what is read for `micro_batch`; after the last sample of the global batch comes the first."""
        read = self.indices[micro_batch.start : micro_batch.stop + self.partners]
        if (missing := micro_batch.size + self.partners - len(read)) > 0:
            read = torch.cat([read, self.indices[:missing]])
        return BatchRequest(read, self.epoch)


@dataclass(frozen=True)
class TrainingStep:
    """Everything that an update needs; calling it makes one."""

    model: nn.Module
    weights: FlatWeights
    norms: tuple[GroupedBatchNorm, ...]
    statistics: BatchStatistics
    """Of `norms`."""
    samples: SampleSource
    noise: Noise
    reduction: GradientReduction
    optimizer: Optimizer
    tally: Tally
    compute: Compute
    clip_norm: float | None
    averaging: Averaging
    label_smoothing: float = 0.0
    mix: Mix = unmixed
    loss_scale: LossScale = field(default_factory=LossScale)
    sum_over_ranks: SumOverRanks | None = None
    """Where the ranks share every micro-batch: what their norms' sums go through."""
    clock: StepClock = field(default_factory=lambda: StepClock(HostTimer()))
    wait_for_checkpoint_copy: Callable[[], None] = lambda: None
    """Returns when weights and the optimizer's state may change: a checkpoint's copy of them is made."""

    def __call__(self, batch: GlobalBatch, learning_rate: float, stop_requested: Callable[[], bool]) -> Update:
        """Update the weights by the gradient of `batch` at the perturbed weights.

        Raises:
            DivergedError: the loss or the gradient is not finite, or out of range; on all ranks alike.
            OutOfMemoryError: on all ranks alike, when a micro-batch fits the device of one of them no more.
            RankLostError: a rank is gone.
        """
        self.clock.start()
        total = self._gradient(batch, stop_requested)
        repeats = 0
        while self._must_repeat(total):
            total = self._gradient(batch, stop_requested)
            repeats += 1
        gradient_norm = float(torch.linalg.vector_norm(self.weights.gradients))
        _check(total, gradient_norm, batch, len(self.noise.points(0)))
        with self.clock.phase("update"):
            clip_gradient(self.weights.gradients, gradient_norm, self.clip_norm)
            with self.clock.part("checkpoint_stall"):
                self.wait_for_checkpoint_copy()
            set_learning_rate(self.optimizer, learning_rate)
            self.noise.before_update(batch.step, learning_rate)
            optimizer_step(self.optimizer)
            self.noise.after_update(batch.step)
            self.averaging.after_update(batch.step)
            self.statistics.absorb(total.statistics, total.samples, _STATISTICS_MOMENTUM)
            self.loss_scale.note_update()
        times = self.clock.times()
        stops, meets = total.stop > 0, total.meet > 0
        return Update(total.loss, total.accuracy, gradient_norm, stops, repeats, times, total.paces, meets)

    def _must_repeat(self, total: TallyResult) -> bool:
        """Whether the gradient must be computed again, by a smaller loss scale or on coarser grids."""
        if total.out_of_memory:
            return False
        return self.loss_scale.lower() if total.out_of_range else not self.reduction.accumulator.fits(total.largest)

    def _gradient(self, batch: GlobalBatch, stop_requested: Callable[[], bool]) -> TallyResult:
        """Leave the gradient of `batch` at the perturbed weights where gradients are; the weights are clean again."""
        self.tally.clear()
        self.reduction.start(self.loss_scale.value)
        try:
            with self.clock.phase("perturb"):
                self.noise.perturb(batch.step)
            with self.clock.phase("forward-backward"), sync_batch_norm(self.norms, self.sum_over_ranks):
                fits = self._add_gradients(batch)
        finally:
            with self.clock.phase("restore"):
                self.noise.restore()
        self.reduction.send()
        self.tally.send(
            out_of_range=self.reduction.accumulator.out_of_range,
            out_of_memory=not fits,
            stop=stop_requested(),
            largest=self.reduction.accumulator.largest,
            pace=batch.pace,
        )
        with self.clock.phase("allreduce"):
            total = self.tally.result()
            self.reduction.finish()
        return total

    def _add_gradients(self, batch: GlobalBatch) -> bool:
        """Add up the gradients of this rank's micro-batches; return whether they fitted its device."""
        try:
            for micro_batch in batch.micro_batches:
                self._add_gradient(batch, micro_batch)
        except (RuntimeError, MemoryError) as error:
            # Others wait for this rank within a pass that they share: they cannot learn of it.
            if not is_out_of_memory(error) or self.sum_over_ranks is not None:
                raise
            return False
        return True

    def _add_gradient(self, batch: GlobalBatch, micro_batch: MicroBatch) -> None:
        with self.clock.part("data_wait"):
            request = batch.request(micro_batch)
            inputs, target = self.mix(*self.samples.read(request), request)
        scaled_size = len(batch.indices) / self.loss_scale.value
        points = self.noise.points(micro_batch.index)
        for point in points:
            with self.clock.part("perturb_restore"):
                self.noise.perturb_for(micro_batch.index, partial(self._ascend, inputs, target, scaled_size), point)
            is_last = micro_batch is batch.micro_batches[-1] and point is points[-1]
            collecting = self.reduction.last_micro_batch if is_last else self.reduction.micro_batch
            logits, total = self._forward(inputs, target)
            self.statistics.collect()
            self.tally.add(total, logits, target.main)
            with collecting():
                torch.autograd.backward(total / (scaled_size / point.weight))

    def _forward(self, inputs: Tensor, target: Target) -> tuple[Tensor, Tensor]:
        """Return the logits and the sum of the losses."""
        with self.compute.autocast():
            logits = self.model(inputs)
        return logits, loss_sum(logits.float(), target, self.label_smoothing)

    def _ascend(self, inputs: Tensor, target: Target, scaled_size: float) -> None:
        """Take the gradient of the micro-batch's loss, whose direction counts; the norms' statistics leave this out."""
        with self.clock.part("forward_backward"):
            _, total = self._forward(inputs, target)
            torch.autograd.backward(total / scaled_size)
        if self.sum_over_ranks is not None:
            # What a broken group may still write to is not used again, as the gradients are.
            summed = self.weights.gradients.clone()
            self.sum_over_ranks(summed, "ascent")
            self.weights.gradients.copy_(summed)
        self.statistics.forget()


def loss_sum(logits: Tensor, target: Target, label_smoothing: float) -> Tensor:
    """Return the sum of the cross entropies of `logits` [n, classes]; a mixed image has one of two labels."""
    against = partial(functional.cross_entropy, logits, label_smoothing=label_smoothing)
    if target.partners is None or target.share is None:
        return against(target.labels, reduction="sum")
    own, other = against(target.labels, reduction="none"), against(target.partners, reduction="none")
    return torch.lerp(other, own, target.share).sum()


def clip_gradient(gradient: Tensor, norm: float, largest: float | None) -> None:
    """Scale `gradient`, that of the global batch, from `norm` to norm `largest` where it is above."""
    if largest is not None and norm > largest:
        gradient.mul_(largest / norm)


def _check(total: TallyResult, gradient_norm: float, batch: GlobalBatch, points: int) -> None:
    if total.out_of_memory:
        raise OutOfMemoryError(f"{total.out_of_memory} ranks ran out of memory in step {batch.step + 1}")
    if total.out_of_range or not math.isfinite(gradient_norm):
        raise DivergedError(
            f"the loss, the gradient or the activations of step {batch.step + 1} are not finite or out of range",
            code="step-not-finite",
        )
    assert total.samples == len(batch.indices) * points, "every sample of the global batch is counted once a point"
