"""Which samples an update uses: subset and order of the data set, and the cut of global batches into micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from dist_train.config import Config, DataSettings
from dist_train.outcome import UsageError
from dist_train.reproducible import generator


@dataclass(frozen=True)
class MicroBatch:
    """Samples `start` to `stop` (exclusive) of a global batch; its `index`-th micro-batch."""

    index: int
    start: int
    stop: int

    @property
    def size(self) -> int:
        """The number of samples."""
        return self.stop - self.start


@dataclass(frozen=True)
class BatchPlan:
    """The cut of `global_size` samples into micro-batches of `micro_size`, whatever the number of ranks."""

    global_size: int
    micro_size: int

    @cached_property
    def micro_batches(self) -> tuple[MicroBatch, ...]:
        """All micro-batches in order; the last one is smaller if `micro_size` does not divide `global_size`."""
        starts = range(0, self.global_size, self.micro_size)
        stops = (*starts[1:], self.global_size)
        return tuple(map(MicroBatch, range(len(starts)), starts, stops))

    def share(self, rank: int, size: int) -> tuple[MicroBatch, ...]:
        """Return the micro-batches of rank `rank` of `size`, round robin: they differ by at most one."""
        assert 0 <= rank < size
        return self.micro_batches[rank::size]

    def dealt(self, counts: Sequence[int], rank: int) -> tuple[MicroBatch, ...]:
        """Return the micro-batches of rank `rank` if each rank in turn gets the next `counts[rank]` of them."""
        assert sum(counts) == len(self.micro_batches)
        start = sum(counts[:rank])
        return self.micro_batches[start : start + counts[rank]]

    def slices(self, rank: int, size: int) -> tuple[MicroBatch, ...]:
        """Return rank `rank`'s even part of every micro-batch, if all `size` ranks share each. Raises UsageError."""
        assert 0 <= rank < size
        self.check_shared(size)
        return tuple(
            MicroBatch(each.index, each.start + each.size * rank // size, each.start + each.size * (rank + 1) // size)
            for each in self.micro_batches
        )

    def check_shared(self, size: int) -> None:
        """Raise UsageError if a micro-batch has fewer samples than the `size` ranks that are to share it."""
        smallest = self.micro_batches[-1]
        if smallest.size < size:
            raise UsageError(
                f"all ranks share every micro-batch, but one has only {smallest.size} samples for {size} ranks: "
                f"set batch.micro_size so that even the last micro-batch of batch.global_size {self.global_size} "
                f"has at least {size} samples, or start fewer ranks",
                code="micro-batch-too-small",
            )

    def steps_per_epoch(self, samples: int) -> int:
        """Return the number of whole global batches in `samples`; raise UsageError if there is none."""
        if samples < self.global_size:
            raise UsageError(
                f"{samples} training samples do not fill a global batch of {self.global_size}: "
                f"set batch.global_size (or batch.schedule, schedule.base_batch) to at most {samples}, or train on "
                f"more samples (data.train_size, data.validation_size)",
                code="too-few-samples",
            )
        return samples // self.global_size


def check_shared_micro_batches(config: Config, ranks: int) -> None:
    """Raise UsageError if all of `ranks` ranks share every micro-batch, and one is too small; `auto` fits later."""
    if config.model.norm == "sync" and config.batch.micro_size != "auto":
        for _, size in config.batch.sizes:
            BatchPlan(size, config.batch.micro_size).check_shared(ranks)


def epoch_order(samples: int, seed: int, epoch: int) -> Tensor:
    """Return the order of samples in an epoch: a permutation of 0..samples-1, int64 [samples] on the CPU."""
    return torch.randperm(samples, generator=generator(seed, "sample order", epoch))


def batch_indices(order: Tensor, step_in_epoch: int, global_size: int) -> Tensor:
    """Return the samples of one global batch, a view of `order`; those after the last whole batch are not used."""
    start = step_in_epoch * global_size
    assert 0 <= start <= order.numel() - global_size
    return order[start : start + global_size]


def balanced_choice(labels: Tensor, size: int, classes: int, seed: int) -> Tensor:
    """Return `size` samples, ascending, evenly over classes; larger choices contain smaller ones. Raises UsageError."""
    if size > labels.numel():
        raise UsageError(
            f"data.train_size is {size}, but there are {labels.numel()} training images: "
            f"set it to at most {labels.numel()}, or leave it out",
            code="too-few-samples",
        )
    # Shuffle, then take the first of every class, then the second of every class, and so on.
    shuffled, position, _ = _shuffled_positions(labels, classes, seed, "training subset")
    return shuffled[torch.argsort(position, stable=True)[:size]].sort().values


def stratified_choice(labels: Tensor, size: int, classes: int, seed: int) -> Tensor:
    """Return `size` samples to hold out, in proportion to the classes, ascending. Raises UsageError."""
    check_validation_size(size, labels.numel())
    shuffled, position, class_size = _shuffled_positions(labels, classes, seed, "validation split")
    # Spread the samples of each class evenly over [0, 1): every prefix then has the proportions of the whole (Webster's
    # method of apportionment).
    quantile = (position + 0.5) / class_size
    return shuffled[torch.argsort(quantile, stable=True)[:size]].sort().values


def check_validation_size(size: int, images: int) -> None:
    """Raise UsageError if holding out `size` of all training images leaves none to train on."""
    if size >= images:
        raise UsageError(
            f"data.validation_size is {size}, but there are {images} training images: hold out fewer",
            code="too-few-samples",
        )


def divided(labels: Tensor, settings: DataSettings, seed: int) -> tuple[Tensor, Tensor | None]:
    """Return the training samples and the held-out ones, if any, out of those with `labels`. Raises UsageError."""
    classes, held_out, kept = settings.image_format.classes, None, torch.arange(labels.numel())
    if settings.validation_size is not None:
        held_out = stratified_choice(labels, settings.validation_size, classes, seed)
        is_kept = torch.ones_like(labels, dtype=torch.bool)
        is_kept[held_out] = False
        kept = kept[is_kept]
    if settings.train_size is not None:
        kept = kept[balanced_choice(labels[kept], settings.train_size, classes, seed)]
    return kept, held_out


def _shuffled_positions(labels: Tensor, classes: int, seed: int, purpose: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return a shuffled order and, for each sample in it, its position within its class and the size of that class."""
    shuffled = torch.randperm(labels.numel(), generator=generator(seed, purpose))
    by_class = torch.argsort(labels[shuffled], stable=True)
    counts = torch.bincount(labels, minlength=classes)
    first_of_class = torch.cumsum(counts, 0) - counts
    position = torch.empty_like(by_class)
    position[by_class] = torch.arange(labels.numel()) - first_of_class.repeat_interleave(counts)
    return shuffled, position, counts[labels[shuffled]]
