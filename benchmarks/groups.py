"""The groups of rows, by name, and the devices on which each can be measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from benchmarks import (
    allocator,
    candidates,
    data_preparation,
    dealing,
    engines,
    evaluation,
    kernels,
    landscape,
    loading,
    memory,
    metrics_cost,
    noise_cost,
    norms,
    one_rank,
    overlap,
    perturbation,
    scaling_efficiency,
    start_up,
    together,
    traffic,
    two_ranks,
    wire,
)
from benchmarks.peers import comparison
from benchmarks.timing import Ratio

Device = Literal["cpu", "cuda"]


@dataclass(frozen=True)
class Group:
    """A group of rows; `rows` takes the number of pairs of timings of a step of width 1, by which it scales its own."""

    rows: Callable[[int], Iterable[Ratio]]
    devices: tuple[Device, ...] = ("cpu",)
    """Comparisons of allocators or of a machine's cores are for CPUs only."""


_ANY: tuple[Device, ...] = ("cpu", "cuda")

GROUPS: Mapping[str, Group] = MappingProxyType(
    {
        "checkpoint": Group(lambda pairs: [one_rank.checkpoint_row(pairs)], _ANY),
        "throughput-0.25": Group(lambda pairs: one_rank.throughput_rows(0.25, 5 * pairs), _ANY),
        "throughput-1": Group(lambda pairs: one_rank.throughput_rows(1.0, pairs), _ANY),
        "allocator": Group(lambda pairs: allocator.rows(max(3, pairs // 3))),
        "perturbation": Group(lambda pairs: [perturbation.perturbation_row(5 * pairs)], _ANY),
        "norms": Group(lambda pairs: norms.rows(5 * pairs)),
        "noise": Group(noise_cost.sharing_rows, _ANY),
        "noise-scale": Group(noise_cost.scale_rows, _ANY),
        "kernels": Group(lambda pairs: kernels.rows(0.25), _ANY),
        "traffic": Group(lambda pairs: traffic.rows()),
        "evaluation": Group(lambda pairs: evaluation.rows(max(1, pairs // 3)), _ANY),
        "metrics": Group(lambda pairs: [metrics_cost.on_off_row(5 * pairs)], _ANY),
        "scrapes": Group(lambda pairs: [metrics_cost.scrapes_row()], _ANY),
        "metrics-page": Group(lambda pairs: metrics_cost.page_rows()),
        "landscape": Group(lambda pairs: landscape.rows(max(3, pairs // 3))),
        "engines": Group(lambda pairs: engines.rows(max(3, pairs // 3))),
        "start": Group(lambda pairs: (start_up.start_row(which, max(1, pairs // 3)) for which in ("gloo", "mpi"))),
        "resume": Group(lambda pairs: start_up.resume_rows(max(1, pairs // 3))),
        "data": Group(data_preparation.rows),
        "loading": Group(lambda pairs: loading.rows(pairs)),
        "memory": Group(lambda pairs: memory.rows(max(1, pairs // 7))),
        "reduction-128": Group(
            lambda pairs: (
                two_ranks.launch(controller, reduction, 128, 2 * pairs)
                for reduction in ("exact", "exact32")
                for controller in ("gloo", "mpi")
            )
        ),
        "reduction-8192": Group(
            lambda pairs: (
                two_ranks.launch("gloo", reduction, 8192, max(2, pairs // 7)) for reduction in ("exact", "exact32")
            )
        ),
        "wire": Group(lambda pairs: wire.rows()),
        "dealing": Group(dealing.rows),
        "overlap-128": Group(
            lambda pairs: (row for which in ("gloo", "mpi") for row in overlap.rows(which, 1.0, 128, pairs))
        ),
        "overlap-8192": Group(lambda pairs: overlap.rows("mpi", 0.25, 8192, max(1, pairs // 3))),
        "scaling-0.25": Group(
            lambda pairs: scaling_efficiency.efficiency_rows(comparison.SMALL_8192, max(1, pairs // 5))
        ),
        "scaling-1": Group(
            lambda pairs: scaling_efficiency.efficiency_rows(comparison.WHOLE_8192, max(1, pairs // 20))
        ),
        "together-0.25": Group(lambda pairs: together.rows(0.25, 8192, pairs)),
        "oversubscribed": Group(
            lambda pairs: scaling_efficiency.oversubscribed_rows(comparison.SMALL_8192, max(1, pairs // 5))
        ),
        "candidates": Group(lambda pairs: candidates.rows(max(1, pairs // 3)), _ANY),
        "peers-0.25-128": Group(lambda pairs: comparison.rows(comparison.SMALL, max(3, pairs // 3))),
        "peers-0.25-8192": Group(lambda pairs: comparison.rows(comparison.SMALL_8192, max(3, pairs // 5))),
        "peers-1-128": Group(lambda pairs: comparison.rows(comparison.WHOLE, max(3, pairs // 3))),
        "peers-1-8192": Group(lambda pairs: comparison.rows(comparison.WHOLE_8192, max(1, pairs // 20))),
    }
)


def groups_on(device: Device) -> dict[str, Group]:
    """Return the groups that can be measured on `device`."""
    return {name: group for name, group in GROUPS.items() if device in group.devices}
