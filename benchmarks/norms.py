"""Rows of the time of a norm and its ReLU, forward and backward, beside torch's batch norm and ReLU."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from benchmarks.timing import Ratio, compare
from dist_train.models.norms import GroupedBatchNorm

SHAPE = (128, 16, 28, 28)
"""Activations of VGG9's first layer, width 0.25."""


def rows(pairs: int) -> Iterator[Ratio]:
    """Yield a row for each type of activations, in channels-last layout."""
    for precision, bar in ((torch.float32, 1.0), (torch.bfloat16, None)):
        channels = SHAPE[1]
        ours = GroupedBatchNorm(channels)
        ours.has_relu = True
        theirs = nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(inplace=True))
        source = torch.Generator().manual_seed(0)
        inputs, upstream = (
            each.to(precision).contiguous(memory_format=torch.channels_last)
            for each in torch.randn(2, *SHAPE, generator=source).unbind()
        )
        title = f"norm and ReLU, forward and backward, {SHAPE[0]} x {'x'.join(map(str, SHAPE[1:]))}, {precision}"
        yield compare(
            title.replace("torch.", ""),
            ("dist-train", _pass(ours, inputs, upstream)),
            ("torch", _pass(theirs, inputs, upstream)),
            pairs=pairs,
            bar=bar,
        )


def _pass(model: nn.Module, inputs: Tensor, upstream: Tensor) -> Callable[[], object]:
    leaf = inputs.clone().requires_grad_()

    def call() -> None:
        torch.autograd.grad(model(leaf), (leaf, *model.parameters()), upstream)
        for norm in model.modules():
            if isinstance(norm, GroupedBatchNorm):
                norm.seen.clear()

    return call
