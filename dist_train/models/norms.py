"""Normalization over groups of samples, with running statistics that depend on the global batch alone.

A module never updates its own running statistics. In training mode, a forward pass appends its groups' means and
variances to `seen`. `BatchStatistics` adds these up as integers; when the global batch is complete, the training step
sums them over the ranks and calls `absorb`. So neither the number of ranks nor the order of micro-batches changes a bit
of the statistics.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.parameter import is_lazy

from dist_train.config import ModelSettings
from dist_train.models.norm_arithmetic import SumOverRanks, normalize
from dist_train.outcome import PluginResultError
from dist_train.reproducible import STATISTICS

VECTOR_GROUP = 8  # fewest channels in a group of single values: normalizing two would leave only their order


@dataclass(frozen=True)
class SeenGroups:
    """Means and unbiased variances [g, C] of the groups of a forward pass, and `sizes`, the rows of each on this rank.

    A row is a sample or a part of one, such as a patch or a token.
    """

    means: torch.Tensor
    variances: torch.Tensor
    sizes: tuple[int, ...]


class GroupedBatchNorm(nn.Module):
    """Batch norm (arXiv 1502.03167) over consecutive groups of `group_size` samples: ghost norm (arXiv 1705.08741).

    Remaining samples join the last group. Without `group_size`, a micro-batch is one group: batch norm. Within
    `sync_batch_norm`, the samples of all ranks are one group: sync norm.
    Inputs are [n, C] or [n, C, H, W]. The state dict has BatchNorm's names: weight, bias, running_mean, running_var.
    """

    running_mean: torch.Tensor
    running_var: torch.Tensor

    def __init__(self, channels: int, group_size: int | None = None) -> None:
        super().__init__()
        self.group_size = group_size
        self.epsilon = 1e-5
        self.across_ranks: SumOverRanks | None = None
        self.has_relu = False  # whether it also computes the ReLU that follows: see `fuse_relus`
        self.seen: list[SeenGroups] = []  # in training mode; `BatchStatistics` clears them
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Normalize by each group's statistics in training mode, by the running ones otherwise.

        Raises ValueError for another number of channels.
        """
        if inputs.dim() < 2 or inputs.shape[1] != len(self.weight):
            raise ValueError(f"a norm of {len(self.weight)} channels was given {list(inputs.shape)}")
        if not self.training:
            normalized = functional.batch_norm(
                inputs, self.running_mean, self.running_var, self.weight, self.bias, eps=self.epsilon
            )
            return normalized.relu_() if self.has_relu else normalized
        sizes = self._group_sizes(inputs.shape[0])
        normalized, means, variances = normalize(
            inputs, self.weight, self.bias, self.epsilon, sizes, self.across_ranks, self.has_relu
        )
        self.seen.append(SeenGroups(means, variances, sizes))
        return normalized

    def _group_sizes(self, samples: int) -> tuple[int, ...]:
        if self.group_size is None or samples < 2 * self.group_size:
            return (samples,)
        groups = samples // self.group_size
        return (*(self.group_size,) * (groups - 1), samples - (groups - 1) * self.group_size)


def norm_modules(model: nn.Module) -> list[GroupedBatchNorm]:
    """Return the modules of `model` that have running statistics, in a fixed order."""
    return [module for module in model.modules() if isinstance(module, GroupedBatchNorm)]


def norms_of_torch(model: nn.Module) -> list[str]:
    """Return the names of the norms in `model`, other than ours, whose statistics training updates."""
    was_training = model.training
    model.train()  # in which a model may keep parts of it in evaluation mode
    trained = [(name, module) for name, module in model.named_modules() if module.training]
    model.train(was_training)
    return [name for name, module in trained if isinstance(module, _NormBase) and module.running_mean is not None]


def collect_statistics(model: nn.Module) -> None:
    """Put `model` into evaluation mode, without dropout, but let its norms collect statistics in forward passes."""
    model.eval()
    for norm in norm_modules(model):
        norm.training = True  # not train(), which would reach the dropout that a norm of timm contains


def check_norms(model: nn.Module, name: str, mode: str, *, samples: int) -> None:
    """Raise UsageError if the last forward pass, of `samples`, did not use each norm of `model`, called `name`, once.

    Clears `seen` of each norm.
    """
    for path, norm in model.named_modules():
        if not isinstance(norm, GroupedBatchNorm):
            continue
        if len(norm.seen) != 1:
            fix = "build one for each use, or set model.norm=group"
            if not norm.seen:
                fix = "use it in every pass or, in a part that stays in evaluation mode, nn.BatchNorm2d instead"
            raise PluginResultError(
                f"{name} uses its norm {path} {len(norm.seen)} times in a forward pass{mode}: {fix}"
            )
        if norm.group_size is not None and sum(norm.seen[0].sizes) != samples:
            raise PluginResultError(
                f"{name} has a norm over more than the samples, which ghost norm cannot group: set model.norm=batch "
                f"or group"
            )
        norm.seen.clear()


def fuse_relus(model: nn.Module) -> None:
    """Fuse each ReLU after a norm in an `nn.Sequential` into the norm, and replace it by an identity.

    This saves a pass over memory. It is only for models that run each `nn.Sequential` as a whole, without hooks, since
    the norm's outputs become those of the ReLU.
    """
    for parent in list(model.modules()):
        # A subclass may do something between the two, such as an addition, and a norm of timm calls its children.
        if isinstance(parent, nn.Sequential) and type(parent).forward is nn.Sequential.forward:
            for (_, norm), (name, after) in pairwise(list(parent.named_children())):
                if isinstance(norm, GroupedBatchNorm) and type(after) is nn.ReLU and not list(norm.children()):
                    norm.has_relu = True
                    setattr(parent, name, nn.Identity())


def running_statistics(model: nn.Module) -> dict[str, Tensor]:
    """Return the running statistics of the norms of `model` by their names in the state dict."""
    return {
        f"{prefix}.{name}": value
        for prefix, module in model.named_modules()
        if isinstance(module, GroupedBatchNorm)
        for name, value in module.named_buffers(recurse=False)
    }


@contextmanager
def restoring_buffers(model: nn.Module) -> Iterator[list[str]]:
    """Restore the buffers of `model` after the block; then the list that is yielded has the names of changed ones."""
    buffers = {name: each for name, each in model.named_buffers(remove_duplicate=False) if not is_lazy(each)}
    before = {name: (buffer, buffer.clone()) for name, buffer in buffers.items()}
    changed: list[str] = []
    yield changed
    after = dict(model.named_buffers(remove_duplicate=False))  # may be other tensors, which the model has assigned
    with torch.no_grad():
        for name, (buffer, value) in before.items():
            if name not in after or not torch.equal(after[name], value):
                changed.append(name)
            owner, _, last = name.rpartition(".")
            setattr(model.get_submodule(owner), last, buffer)
        for buffer, value in before.values():
            buffer.copy_(value)


@contextmanager
def restoring_parameters(model: nn.Module, names: Collection[str] | None = None) -> Iterator[list[str]]:
    """Restore the parameters of `model`, or those with `names`, after the block, as `restoring_buffers` does buffers.

    One also counts as changed if it was given another tensor, or if an operator that may change it was called on it.
    """
    sized = (each for each in model.named_parameters() if not is_lazy(each[1]))
    named = [each for each in sized if names is None or each[0] in names]
    before = [(each.data_ptr(), each._version, each.detach().clone()) for _, each in named]
    changed: list[str] = []
    yield changed
    for (name, parameter), (place, version, value) in zip(named, before, strict=True):
        is_same = (parameter.data_ptr(), parameter._version) == (place, version)
        if not (is_same and torch.equal(parameter, value)):  # changes by way of `.data` do not count as a version
            changed.append(name)
            parameter.data = value


@contextmanager
def sync_batch_norm(norms: Sequence[GroupedBatchNorm], sum_over_ranks: SumOverRanks | None) -> Iterator[None]:
    """Within the block, let `norms` normalize over the samples of all ranks, unless `sum_over_ranks` is None.

    The ranks must then make the same passes.
    """
    if sum_over_ranks is None:
        yield
        return
    for index, norm in enumerate(norms):
        norm.across_ranks = lambda sums, name, index=index: sum_over_ranks(sums, f"norm.{index}.{name}")
    try:
        yield
    finally:
        for norm in norms:
            norm.across_ranks = None


def norm_parameters(model: nn.Module) -> frozenset[str]:
    """Return the names of the parameters of `model` that belong to norms: ours, torch's, and layer and RMS norms."""
    return frozenset(
        f"{prefix}.{name}"
        for prefix, module in model.named_modules()
        # timm's RMS norms have no base class but nn.Module
        if isinstance(module, GroupedBatchNorm | nn.GroupNorm | _NormBase) or hasattr(module, "normalized_shape")
        for name, _ in module.named_parameters(recurse=False)
    )


def channel_groups(channels: int, most: int, least: int) -> int:
    """Return the largest number of equal groups, at most `most`, with at least `least` of the `channels` in each."""
    fitting = (groups for groups in range(min(most, channels // least), 1, -1) if channels % groups == 0)
    return next(fitting, 1)


class NormFactory(Protocol):
    """Builds a norm for a number of channels."""

    def __call__(self, channels: int, *, least: int = 2) -> nn.Module:
        """Return the norm; group norm has at least `least` channels per group."""


def norm_factory(settings: ModelSettings) -> NormFactory:
    """Return the factory of the norm that `model.norm` selects."""

    def build(channels: int, *, least: int = 2) -> nn.Module:
        match settings.norm:
            case "batch" | "sync":
                return GroupedBatchNorm(channels)
            case "ghost":
                return GroupedBatchNorm(channels, settings.ghost_size)
            case "group":
                return nn.GroupNorm(channel_groups(channels, settings.channel_groups, least), channels)
            case "none":
                return nn.Identity()

    return build


def replace_batch_norms(model: nn.Module, norm: NormFactory) -> None:
    """Replace each batch norm of `model` by `norm`; dropout and activations that timm's norms contain are kept."""
    for path, module in list(model.named_modules()):
        if isinstance(module, _BatchNorm):
            replacement = norm(module.num_features, least=VECTOR_GROUP if isinstance(module, nn.BatchNorm1d) else 2)
            if isinstance(replacement, GroupedBatchNorm):
                replacement.epsilon = module.eps
            for child_name, child in module.named_children():
                replacement.add_module(child_name, child)
            if list(module.children()):
                replacement.register_forward_hook(_apply_children)
            parent, _, last = path.rpartition(".")
            setattr(model.get_submodule(parent), last, replacement)


def _apply_children(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """Return the output of a forward hook: that of `module`, then passed through its children in order."""
    for child in module.children():
        output = child(output)
    return output


class BatchStatistics:
    """Adds up the statistics that norms see, weighted by samples, in `sums`: each norm's means, then its variances.

    `sums` is int64 [twice the channels of all norms].
    """

    def __init__(self, norms: Sequence[GroupedBatchNorm], device: torch.device, samples: int) -> None:
        """`samples`: the most that all ranks together add between two calls of `clear`."""
        self.samples = samples
        self.norms = tuple(norms)
        self._limit = STATISTICS.limit / samples  # no sum of values below it, weighted by samples, leaves the range
        self._running = [average for norm in norms for average in (norm.running_mean, norm.running_var)]
        self._lengths = [len(average) for average in self._running]
        self.sums = torch.zeros(sum(self._lengths), dtype=torch.int64, device=device)
        self.out_of_range = torch.zeros((), dtype=torch.bool, device=device)  # not finite, or too large

    def clear(self) -> None:
        """Begin a global batch."""
        self.forget()
        self.sums.zero_()
        self.out_of_range.zero_()

    def forget(self) -> None:
        """Drop the groups seen in forward passes that do not count."""
        for norm in self.norms:
            norm.seen.clear()

    def collect(self, samples: int) -> None:
        """Add the groups seen in a forward pass of `samples` samples; call it after every one that counts.

        Raises UsageError if the pass did not use each norm once.
        """
        for index, norm in enumerate(self.norms, start=1):
            if len(norm.seen) != 1:
                raise PluginResultError(
                    f"norm {index} of the model's {len(self.norms)} (of {len(norm.weight)} channels) was used "
                    f"{len(norm.seen)} times in a forward pass: use each norm once in every pass, in training and in "
                    f"evaluations alike, or set model.norm=group"
                )
        if self.norms:
            seen = [norm.seen[0] for norm in self.norms]
            weighted = torch.cat([average for groups in seen for average in (groups.means, groups.variances)], dim=1)
            # A single group is weighted by samples: norms may see different numbers of rows for them.
            sizes = seen[0].sizes if len(seen[0].sizes) > 1 else (samples,)
            # Written so that NaN, for which every comparison is false, is out of range.
            self.out_of_range |= ~(weighted.abs().amax() < self._limit)
            start = 0
            for size, equal in groupby(sizes):
                stop = start + len(list(equal))
                weighted[start:stop].mul_(size)
                start = stop
            self.sums += STATISTICS.encode(weighted).sum(0)
        self.forget()

    def absorb(self, sums: Tensor, samples: int, momentum: float) -> None:
        """Move the running statistics by `momentum` towards `sums` / `samples`, both of all ranks; 1 replaces them."""
        means = (STATISTICS.decode(sums) / samples).to(torch.float32)
        if self.norms:
            torch._foreach_lerp_(self._running, list(means.split(self._lengths)), momentum)
