"""Normalization over groups of samples.

A module never updates its running averages by itself. During a forward pass in training mode it notes its
groups' means and variances in `seen`; `batch_statistics.py` makes averages of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

import torch
from torch import nn
from torch.nn import functional

from dist_train.config import ModelSettings
from dist_train.models.shared_norm import SumOverWorkers, normalize_over_workers

VECTOR_GROUP = 8
"""Fewest channels that group norm puts together where a channel has one value; of two, only the order would stay."""


@dataclass(frozen=True)
class SeenGroup:
    """Mean and unbiased variance [C] of a group; of its samples, which may lie on several workers, those here."""

    mean: torch.Tensor
    variance: torch.Tensor
    samples: int


class GroupedBatchNorm(nn.Module):
    """Batch norm (arXiv 1502.03167) over groups of `group_size` samples, in order: ghost norm (1705.08741).

    What is left over joins the last group. Without `group_size` a micro-batch is one group: batch norm; within
    `over_workers` the group is what all workers bring to the pass: sync norm.
    Takes [n, C] or [n, C, H, W]. The state dict has BatchNorm's names: weight, bias, running_mean, running_var.
    """

    running_mean: torch.Tensor
    running_var: torch.Tensor

    def __init__(self, channels: int, group_size: int | None = None) -> None:
        """Normalize `channels` channels."""
        super().__init__()
        self.group_size = group_size
        self.epsilon = 1e-5
        self.name = ""
        self.sum_over_workers: SumOverWorkers | None = None
        self.seen: list[SeenGroup] = []
        """Groups of forward passes in training mode, in order; to be cleared by whoever makes them."""
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Normalize over each group in training mode, by the running averages otherwise."""
        if not self.training:
            return functional.batch_norm(
                inputs, self.running_mean, self.running_var, self.weight, self.bias, eps=self.epsilon
            )
        groups = 1 if self.group_size is None else max(1, inputs.shape[0] // self.group_size)
        if groups == 1:
            return self._normalize(inputs)
        cuts = [group * (self.group_size or 0) for group in range(1, groups)]
        return torch.cat([self._normalize(group) for group in torch.tensor_split(inputs, cuts)])

    def _normalize(self, group: torch.Tensor) -> torch.Tensor:
        if self.sum_over_workers is not None:
            normalized, mean, variance = normalize_over_workers(
                group, self.weight, self.bias, self.epsilon, self.sum_over_workers, self.name
            )
        else:
            # With momentum 1 the running averages become this group's own statistics.
            mean, variance = torch.zeros_like(self.running_mean), torch.zeros_like(self.running_var)
            normalized = functional.batch_norm(
                group, mean, variance, self.weight, self.bias, training=True, momentum=1.0, eps=self.epsilon
            )
        self.seen.append(SeenGroup(mean, variance, group.shape[0]))
        return normalized


def norm_modules(model: nn.Module) -> list[GroupedBatchNorm]:
    """Return the modules of `model` that have running statistics, in a fixed order."""
    return [module for module in model.modules() if isinstance(module, GroupedBatchNorm)]


@contextmanager
def over_workers(norms: Sequence[GroupedBatchNorm], sum_over_workers: SumOverWorkers | None) -> Iterator[None]:
    """Normalize, within the block, over the samples of all workers, which make the same passes; None: as always."""
    if sum_over_workers is None:
        yield
        return
    for index, norm in enumerate(norms):
        norm.name, norm.sum_over_workers = f"norm.{index}", sum_over_workers
    try:
        yield
    finally:
        for norm in norms:
            norm.sum_over_workers = None


def norm_parameters(model: nn.Module) -> frozenset[str]:
    """Return the names of the parameters of `model` that belong to norms."""
    return frozenset(
        f"{prefix}.{name}"
        for prefix, module in model.named_modules()
        if isinstance(module, GroupedBatchNorm | nn.GroupNorm)
        for name, _ in module.named_parameters(recurse=False)
    )


def channel_groups(channels: int, most: int, least: int) -> int:
    """Return the largest number of groups up to `most` that divides `channels` into `least` or more each."""
    fitting = (groups for groups in range(min(most, channels // least), 1, -1) if channels % groups == 0)
    return next(fitting, 1)


class NormFactory(Protocol):
    """From a number of channels to a norm."""

    def __call__(self, channels: int, *, least: int = 2) -> nn.Module:
        """Return the norm; where it groups channels, by `least` or more."""


_NORMS: Mapping[str, Callable[[int, int, ModelSettings], nn.Module]] = MappingProxyType(
    {
        "batch": lambda channels, least, settings: GroupedBatchNorm(channels),
        "ghost": lambda channels, least, settings: GroupedBatchNorm(channels, settings.ghost_size),
        "sync": lambda channels, least, settings: GroupedBatchNorm(channels),
        "group": lambda channels, least, settings: nn.GroupNorm(
            channel_groups(channels, settings.channel_groups, least), channels
        ),
        "none": lambda channels, least, settings: nn.Identity(),
    }
)


def norm_factory(settings: ModelSettings) -> NormFactory:
    """Return the function from a number of channels to a norm that `model.norm` names."""
    build = _NORMS[settings.norm]

    def norm(channels: int, *, least: int = 2) -> nn.Module:
        return build(channels, least, settings)

    return norm
