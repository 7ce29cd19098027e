"""Random directions in weight space, made comparable between networks (Li et al., arXiv 1712.09913)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import torch

from dist_train.optim.flat_weights import FlatWeights, Segment
from dist_train.outcome import UsageError
from dist_train.randomness import generator

Normalize = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(drawn, weights of the same tensor) -> the part of the direction that moves this tensor; both float64."""


def random_direction(
    weights: FlatWeights, normalization: str, exclude: Sequence[str], seed: int, index: int
) -> torch.Tensor:
    """Return direction number `index` of `seed`, float64 [n] on the CPU; 0 where `exclude` names the weights.

    Each tensor has a stream of its own: what is excluded does not change the rest.
    """
    normalize = NORMALIZATIONS[normalization]
    left_out = set(weights.excluded(exclude))
    values = weights.values.detach().cpu()
    direction = torch.zeros(len(values), dtype=torch.float64)
    for segment in weights.segments:
        if segment in left_out:
            continue
        stream = generator(seed, "landscape direction", index, segment.name)
        drawn = torch.empty(segment.shape).normal_(generator=stream).double()
        here = values[segment.start : segment.stop].view(segment.shape).double()
        direction[segment.start : segment.stop] = normalize(drawn, here).flatten()
    return direction


def check_exclusions(weights: FlatWeights, exclude: Sequence[str]) -> None:
    """Raise UsageError where a pattern names no weight, or all of them are excluded."""
    kinds = {"norm", "bias", "weight"}
    for pattern in exclude:
        if pattern not in kinds and not weights.excluded([pattern]):
            raise UsageError(f"--exclude {pattern}: no weight has this name; names are {_names(weights.segments)}")
    if len(weights.excluded(exclude)) == len(weights.segments):
        raise UsageError("--exclude leaves no weight to move")


def _names(segments: Sequence[Segment]) -> str:
    return ", ".join(segment.name for segment in segments)


def _by_filter(drawn: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Give each filter (slice along dimension 0; a tensor of one dimension is one) the norm of the weights' filter."""
    if drawn.dim() < 2:
        return _by_layer(drawn, weights)
    lengths: torch.Tensor = weights.flatten(1).norm(dim=1) / drawn.flatten(1).norm(dim=1)
    return lengths.view(-1, *(1,) * (drawn.dim() - 1)) * drawn


def _by_layer(drawn: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    length: torch.Tensor = weights.norm() / drawn.norm()
    return length * drawn


def _as_drawn(drawn: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return drawn


NORMALIZATIONS: Mapping[str, Normalize] = MappingProxyType(
    {"filter": _by_filter, "layer": _by_layer, "none": _as_drawn}
)
"""How a drawn direction is scaled. none: as drawn, each component of variance 1."""
