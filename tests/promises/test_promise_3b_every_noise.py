"""Promise 3 with every noise method: bit-identical on any number of ranks, except with one draw per rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.launching import (
    assert_same_run,
    mostly_lengthy,
    records,
    small_settings,
    status,
    train_alone,
    train_ranks,
    weights_digest,
    write_config,
)

pytestmark = pytest.mark.ranks

_NOISES: dict[str, tuple[dict[str, Any], int, str]] = {
    "smoothout": (
        {"scale": "filter", "distribution": "normal", "amplitude": 0.2, "schedule": {"kind": "linear"}},
        3,
        "torch",
    ),
    "langevin": (
        {"method": "langevin", "scale": "weight", "distribution": "normal", "schedule": {"kind": "exponential"}},
        3,
        "mpi",
    ),
    "smoothout without norms": ({"scale": "weight", "distribution": "normal", "sharing": "micro_batch"}, 2, "mpi"),
    "nso with m-rwp": ({"sharing": "micro_batch", "antithetic": True, "mix": 0.5, "amplitude": 0.1}, 3, "torch"),
    "sam": ({"method": "sam", "sharing": "micro_batch", "amplitude": 0.1}, 2, "torch"),
}


def train(folder: Path, noise: dict[str, Any], ranks: int, controller: str, norm: str = "ghost") -> Path:
    settings = small_settings(
        run={"max_steps": 10},
        model={"norm": norm},
        noise=noise,
        comm={"verify_every": 1},
        checkpoint={"every_epochs": 0},
    )
    run = folder / f"{controller}-{ranks}"
    if ranks == 1:
        train_alone(write_config(folder, settings), run)
    else:
        train_ranks(ranks, controller, write_config(folder, settings), run)
    assert status(run)["world_size"] == ranks
    return run


@pytest.mark.parametrize("name", mostly_lengthy(sorted(_NOISES)))
def test_several_ranks_are_bit_identical_to_one(tmp_path: Path, name: str) -> None:
    noise, ranks, controller = _NOISES[name]
    norm = "none" if name.endswith("without norms") else "ghost"
    alone = train(tmp_path, noise, 1, "alone", norm)
    several = train(tmp_path, noise, ranks, controller, norm)
    assert len(records(several, "train")) == 10
    assert_same_run(several, alone)


@pytest.mark.lengthy
def test_one_draw_per_rank_depends_on_the_number_of_ranks(tmp_path: Path) -> None:
    noise = {"sharing": "rank", "scale": "weight", "amplitude": 0.5}
    two, three = (train(tmp_path, noise, ranks, "torch") for ranks in (2, 3))
    losses = [[record["loss"] for record in records(run, "train")] for run in (two, three)]
    assert losses[0] != losses[1]
    assert weights_digest(two) != weights_digest(three)
