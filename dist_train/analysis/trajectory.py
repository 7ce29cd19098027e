"""The way of a run through weight space: its checkpoints, projected on their two principal directions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dist_train.analysis.landscape_subject import Stored, Subject, place_in, read_stored
from dist_train.outcome import UsageError
from dist_train.training.checkpoints import list_checkpoints

_MARGIN = 0.25
"""How far the plane reaches beyond the checkpoints, as a part of their extent."""
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Trajectory:
    """Unit directions, float64 [n] each; each checkpoint's coordinates, relative to the last one, which is at (0, 0).

    `explained` is what part of the squared distances from the last checkpoint each direction accounts for.
    """

    directions: tuple[torch.Tensor, torch.Tensor]
    steps: tuple[int, ...]
    coordinates: tuple[tuple[float, float], ...]
    explained: tuple[float, float]

    @property
    def reaches(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """From where to where a plane must reach along each direction to show all checkpoints."""
        return _reach([first for first, _ in self.coordinates]), _reach([second for _, second in self.coordinates])

    def record(self) -> dict[str, Any]:
        """Return what settings.json says of it."""
        path = [
            {"step": step, "alpha": alpha, "beta": beta}
            for step, (alpha, beta) in zip(self.steps, self.coordinates, strict=True)
        ]
        return {"trajectory": {"explained": list(self.explained), "path": path}}


def run_checkpoints(last: Path) -> list[Stored]:
    """Return the checkpoints of the run of checkpoint `last`, up to it, the earliest first.

    Raises:
        UsageError: there are fewer than three.
    """
    files = list_checkpoints(last.parent)
    ends = [file.step for file in files if file.path.name == last.name]
    paths = [file.path for file in files if ends and file.step <= ends[0]]
    if len(paths) < 3:
        raise UsageError(
            f"{last.parent} holds {len(paths)} checkpoints up to {last.name}: a trajectory needs three or more; "
            f"train with a larger checkpoint.keep"
        )
    return [read_stored(path) for path in paths]


def trace(checkpoints: Sequence[Stored], subject: Subject, mask: torch.Tensor) -> Trajectory:
    """Return the way of `checkpoints` to the last of them; weights where `mask` is 0 are left out."""
    last = subject.place.weights
    ways = torch.stack([(place_in(stored, subject).weights - last) * mask for stored in checkpoints])
    first, second, coordinates, explained = principal_plane(ways)
    steps = tuple(stored.contents.step for stored in checkpoints)
    return Trajectory((first, second), steps, coordinates, explained)


def principal_plane(
    ways: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, tuple[tuple[float, float], ...], tuple[float, float]]:
    """Return two unit directions, coordinates and explained parts of `ways` [k, n], not centred: 0 is on the plane.

    Raises:
        UsageError: they do not span a plane.
    """
    products = sum((part.double() @ part.double().T for part in ways.split(_CHUNK, dim=1)), torch.zeros(()).double())
    values, vectors = torch.linalg.eigh(products)
    values, vectors = values.flip(0), vectors.flip(1)
    if not values[1] > 1e-12 * values[0]:
        raise UsageError("the checkpoints lie on a line, or on a point: they span no plane")
    directions = []
    for index in range(2):
        vector = vectors[:, index]
        # An eigenvector's sign is arbitrary: the first checkpoint lies on the positive side.
        if vector[vector.abs() > 1e-6][0] < 0:
            vector = -vector
        directions.append(vector @ ways.double() / values[index].sqrt())
    coordinates = torch.stack([ways.double() @ direction for direction in directions], dim=1).tolist()
    explained = (values[:2] / values.sum()).tolist()
    return (
        directions[0],
        directions[1],
        tuple((float(alpha), float(beta)) for alpha, beta in coordinates),
        (float(explained[0]), float(explained[1])),
    )


def _reach(values: Sequence[float]) -> tuple[float, float]:
    extent = max(values) - min(values)
    return min(values) - _MARGIN * extent, max(values) + _MARGIN * extent
