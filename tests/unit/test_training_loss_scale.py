"""Float16's loss scale: exact, agreed, lowered by an overflow that costs no update, kept over a resume.

Float16 on a CPU is only for these tests: the set-up refuses it.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dist_train.checkpoint.state import Progress, restored_progress
from dist_train.cluster.communicator import Communicator, SingleProcess
from dist_train.outcome import DivergedError
from dist_train.training.compute import (
    FIRST_LOSS_SCALE,
    HIGHEST_LOSS_SCALE,
    LOWEST_LOSS_SCALE,
    UPDATES_UNTIL_RAISED,
    Compute,
    LossScale,
)
from dist_train.training.trainer import Trainer
from tests.raising import raises
from tests.unit.simulated_ranks import results
from tests.unit.small_trainers import build_trainer, gradient_bits, small_config, state_bits


def in_half(trainer: Trainer, precision: torch.dtype = torch.float16) -> Trainer:
    """Return `trainer` as the assembly builds it for float16 on a GPU."""
    compute = Compute(torch.device("cpu"), precision)
    trainer.training_step = replace(trainer.training_step, compute=compute, loss_scale=LossScale(trainer.progress))
    return trainer


def test_an_overflow_halves_it_down_to_a_floor() -> None:
    scale = LossScale(Progress())
    values = [scale.value]
    while scale.value > LOWEST_LOSS_SCALE:
        scale.lower()
        values.append(scale.value)
    assert values == [FIRST_LOSS_SCALE / 2**index for index in range(len(values))]
    assert values[-1] == LOWEST_LOSS_SCALE


def test_only_changes_are_logged_with_the_first_update_that_has_them(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    progress = Progress()
    progress.step, scale = UPDATES_UNTIL_RAISED - 1, LossScale(progress)
    progress.updates_since_overflow = UPDATES_UNTIL_RAISED - 1
    scale.note_update()
    assert caplog.messages == [f"the loss scale is {2 * FIRST_LOSS_SCALE:g} from step {UPDATES_UNTIL_RAISED + 1} on"]
    progress.loss_scale, progress.updates_since_overflow = HIGHEST_LOSS_SCALE, UPDATES_UNTIL_RAISED - 1
    scale.note_update()
    assert len(caplog.messages) == 1


def test_it_doubles_after_many_updates_without_an_overflow_up_to_a_ceiling() -> None:
    scale = LossScale(Progress())
    for _ in range(UPDATES_UNTIL_RAISED - 1):
        scale.note_update()
    assert scale.value == FIRST_LOSS_SCALE
    scale.lower()
    for _ in range(UPDATES_UNTIL_RAISED - 1):
        scale.note_update()
    assert scale.value == FIRST_LOSS_SCALE / 2
    scale.note_update()
    assert scale.value == FIRST_LOSS_SCALE
    for _ in range(20 * UPDATES_UNTIL_RAISED):
        scale.note_update()
    assert scale.value == HIGHEST_LOSS_SCALE


def test_it_goes_on_with_what_a_checkpoint_holds(tmp_path: Path) -> None:
    trainer = in_half(build_trainer(small_config(), tmp_path, SingleProcess()))
    trainer.training_step.loss_scale.lower()
    for _ in range(5):
        trainer.training_step.loss_scale.note_update()
    progress = restored_progress(trainer.contents())
    assert (progress.loss_scale, progress.updates_since_overflow) == (FIRST_LOSS_SCALE / 2, 5)
    assert LossScale(progress).value == FIRST_LOSS_SCALE / 2


def test_without_float16_there_is_none(tmp_path: Path) -> None:
    trainer = build_trainer(small_config(), tmp_path, SingleProcess())
    assert trainer.training_step.loss_scale.value == LOWEST_LOSS_SCALE == 1.0
    trainer.advance()
    assert trainer.progress.loss_scale is None


def test_in_float32_a_scale_changes_no_bit_of_the_gradient(tmp_path: Path) -> None:
    """A power of two is exact: what is multiplied and divided by it is what it was."""
    plain = build_trainer(small_config(), tmp_path / "plain", SingleProcess())
    scaled = in_half(build_trainer(small_config(), tmp_path / "scaled", SingleProcess()), torch.float32)
    for trainer in (plain, scaled):
        trainer.advance()
    assert gradient_bits(plain) == gradient_bits(scaled)
    assert state_bits(plain.network) == state_bits(scaled.network)


def test_half_precision_finds_about_the_gradient_of_float32(tmp_path: Path) -> None:
    """With group norm: ghost norm over four samples is so ill-conditioned that any rounding shows, scaled or not."""
    config = small_config(model={"norm": "group"})
    half = in_half(build_trainer(config, tmp_path / "half", SingleProcess()))
    full = build_trainer(config, tmp_path / "full", SingleProcess())
    for trainer in (half, full):
        trainer.advance()
    ours, theirs = half.training_step.weights.gradients, full.training_step.weights.gradients
    assert not torch.equal(ours, theirs)
    assert torch.nn.functional.cosine_similarity(ours, theirs, dim=0) > 0.99
    assert float(ours.norm() / theirs.norm()) == pytest.approx(1.0, abs=0.02)


def test_gradients_too_small_for_float16_survive_through_the_scale(tmp_path: Path) -> None:
    config = small_config(model={"norm": "group"})
    scaled = in_half(build_trainer(config, tmp_path / "scaled", SingleProcess()))
    bare = in_half(build_trainer(config, tmp_path / "bare", SingleProcess()))
    bare.training_step = replace(bare.training_step, loss_scale=LossScale())
    for trainer in (scaled, bare):
        trainer.network.register_forward_hook(lambda module, inputs, logits: logits.float() * 2.0**-24)
        trainer.advance()
    assert scaled.progress.loss_scale == FIRST_LOSS_SCALE
    assert not bare.training_step.weights.gradients.any()
    assert scaled.training_step.weights.gradients.count_nonzero() > scaled.training_step.weights.count / 2


def test_an_overflow_repeats_the_step_and_skips_no_update(tmp_path: Path) -> None:
    """The update is the one that the smaller scale would have made from the beginning."""
    overflowing = in_half(build_trainer(small_config(), tmp_path / "high", SingleProcess()))
    overflowing.progress.loss_scale = 2.0**40
    overflowing.advance()
    settled = overflowing.progress.loss_scale
    assert settled is not None
    assert settled < 2.0**40
    assert overflowing.progress.step == 1
    calm = in_half(build_trainer(small_config(), tmp_path / "low", SingleProcess()))
    calm.progress.loss_scale = settled
    calm.advance()
    assert (calm.progress.loss_scale, calm.progress.updates_since_overflow) == (settled, 1)
    assert state_bits(overflowing.network) == state_bits(calm.network)


def test_all_ranks_lower_it_when_one_overflows(tmp_path: Path) -> None:
    def train(comm: Communicator) -> tuple[float | None, dict[str, bytes]]:
        trainer = in_half(build_trainer(small_config(), tmp_path / f"{comm.size}", comm), torch.float32)
        if comm.rank == comm.size - 1:
            trainer.training_step.weights.parameters[0].register_hook(overflow_once())
        trainer.advance()
        return trainer.progress.loss_scale, state_bits(trainer.network)

    def overflow_once() -> object:
        left = [1]

        def spoil(gradient: torch.Tensor) -> torch.Tensor | None:
            return gradient * float("inf") if left and left.pop() else None

        return spoil

    alone, *rest = results(1, train) + results(3, train)
    assert alone[0] == FIRST_LOSS_SCALE / 2
    assert all(other == alone for other in rest)


def test_an_overflow_at_the_lowest_scale_is_a_divergence(tmp_path: Path) -> None:
    trainer = in_half(build_trainer(small_config(), tmp_path, SingleProcess()))
    before = trainer.training_step.weights.values.clone()
    trainer.training_step.weights.parameters[0].register_hook(lambda gradient: gradient * float("inf"))
    with raises(DivergedError, "step-not-finite"):
        trainer.advance()
    assert trainer.progress.loss_scale == LOWEST_LOSS_SCALE
    assert torch.equal(trainer.training_step.weights.values, before)
