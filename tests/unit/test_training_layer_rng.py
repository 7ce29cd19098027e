"""Layers that draw random numbers, such as dropout: by the seed and the micro-batch, whoever computes it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from dist_train.cluster.communicator import SingleProcess
from dist_train.reproducible import LayerRng
from dist_train.training.trainer import Trainer
from tests.unit.simulated_ranks import results
from tests.unit.small_trainers import build_trainer, drawn, seed_all, small_config, state_bits

MODEL = {"name": "tests.unit.drawing_model:drawing"}


def trained(folder: Path, **sections: Any) -> Trainer:
    trainer = build_trainer(small_config(model=MODEL, **sections), folder, SingleProcess())
    masks(trainer).clear()  # those of the trials when the model was built
    trainer.run()
    return trainer


def test_runs_are_bit_identical_and_leave_the_global_generators_as_they_were(tmp_path: Path) -> None:
    states = []
    for seed in (1, 2):
        seed_all(seed)
        before = drawn()
        seed_all(seed)
        states.append(state_bits(trained(tmp_path / f"{seed}").training_step.model))
        assert drawn() == before
    assert states[0] == states[1]


def jittered(images: object) -> Callable[[Tensor, Tensor], Tensor]:
    """Return cross entropy times a factor from NumPy's global generator."""
    return lambda logits, labels: functional.cross_entropy(logits, labels, reduction="none") * np.random.random()


@pytest.mark.parametrize("micro_size", [6, "auto"])
def test_a_loss_that_draws_leaves_the_global_generators_as_they_were(tmp_path: Path, micro_size: int | str) -> None:
    config = small_config(loss={"name": f"{__name__}:jittered"}, batch={"micro_size": micro_size})
    seed_all(1)
    before = drawn()
    seed_all(1)
    build_trainer(config, tmp_path, SingleProcess()).run()
    assert drawn() == before


def test_another_seed_gives_other_masks(tmp_path: Path) -> None:
    first, second = (trained(tmp_path / f"{seed}", run={"seed": seed, "max_steps": 1}) for seed in (0, 1))
    assert not torch.equal(masks(first)[0], masks(second)[0])


def masks(trainer: Trainer) -> list[torch.Tensor]:
    found = trainer.training_step.model.masks
    assert isinstance(found, list)
    return found


@pytest.mark.parametrize(
    ("noise", "passes"),
    [
        ({"method": "none"}, [1, 1, 1, 1, 1]),
        ({"method": "sam", "sharing": "micro_batch"}, [2, 2, 2, 2, 2]),
        ({"method": "smoothout", "antithetic": True}, [2, 2, 2, 2, 2]),
        ({"method": "smoothout", "target_rise": 0.05}, [3, 1, 1, 1, 1]),
    ],
    ids=lambda value: value.get("method") if isinstance(value, dict) else None,
)
def test_passes_over_a_micro_batch_have_the_same_masks(
    tmp_path: Path, noise: dict[str, object], passes: list[int]
) -> None:
    found = masks(trained(tmp_path, noise=noise, run={"max_steps": 2}))
    distinct: list[torch.Tensor] = []
    for _ in range(2):
        for count in passes:
            of_micro_batch, found = found[:count], found[count:]
            assert all(torch.equal(each, of_micro_batch[0]) for each in of_micro_batch)
            distinct.append(of_micro_batch[0])
    assert not found
    assert len({tuple(each.tolist()) for each in distinct}) > 5, "of 10 micro-batches"


def test_ranks_that_share_a_micro_batch_have_masks_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeded: list[tuple[int, ...]] = []
    monkeypatch.setattr(LayerRng, "seed", lambda rng, *place: seeded.append(place))
    results(2, lambda comm: build_trainer(small_config(model={"norm": "sync"}), tmp_path, comm).advance())
    places = set(seeded)
    assert len(places) == 2 * 5, "each micro-batch has a part on each rank"
    assert len(seeded) == 2 * len(places), "each part is seeded before its noise and its pass"
