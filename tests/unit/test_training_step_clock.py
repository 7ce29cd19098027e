"""Where the time of a step goes."""

from __future__ import annotations

import itertools
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_train.cluster.communicator import Communicator, SingleProcess
from dist_train.rundir.records import StepParts
from dist_train.training.measuring import StepClock
from dist_train.training.step import GlobalBatch
from tests.unit.simulated_ranks import SimulatedRanks, results
from tests.unit.small_trainers import build_trainer, small_config
from tests.unit.test_training_step import SAM, take
from tests.waiting import wait_for


class SetClock(StepClock):
    """A clock whose time a test sets."""

    def __init__(self) -> None:
        super().__init__(SingleProcess())
        self.time = 0.0

    def _now(self) -> float:
        return float(self.time)


def test_a_part_within_another_is_taken_out_of_that_one_s_time() -> None:
    clock = SetClock()
    clock.start()
    clock.time = 1
    with clock.part("forward_backward"):
        clock.time = 3
        with clock.part("perturb_restore"):
            clock.time = 7
            with clock.part("forward_backward"):
                clock.time = 15
            clock.time = 31
        clock.time = 63
    clock.time = 127
    with clock.part("allreduce_wait"):
        clock.time = 255
    times = clock.times()
    assert times.parts() == StepParts(
        data_wait=0, forward_backward=2 + 8 + 32, perturb_restore=4 + 16, allreduce_wait=128, optimizer=0,
        checkpoint_stall=0,
    )  # fmt: skip
    assert times.seconds_of("allreduce_wait") == 128


def test_a_step_that_broke_off_leaves_nothing_for_the_next() -> None:
    clock = SetClock()

    def broken_off() -> None:
        with clock.part("optimizer"):
            clock.time += 5
            raise RuntimeError

    clock.start()
    before = clock.times()
    with pytest.raises(RuntimeError):
        broken_off()
    clock.start()
    assert not any(asdict(clock.times().parts()).values())
    assert before.parts().optimizer == 5, "what was taken before stays readable"


@pytest.mark.parametrize(
    "noise", [{}, {"sharing": "micro_batch"}, {"method": "langevin"}, SAM], ids=["smoothout", "each", "langevin", "sam"]
)
def test_the_parts_of_a_step_are_there_and_add_up_to_at_most_the_step(tmp_path: Path, noise: dict[str, object]) -> None:
    trainer = build_trainer(small_config(noise=noise), tmp_path, SingleProcess())
    steps = itertools.count()

    def most_is_in_its_parts() -> bool:
        begun = time.perf_counter()
        update = take(trainer, next(steps))
        seconds = time.perf_counter() - begun
        parts = asdict(update.times.parts())
        assert all(parts[name] > 0 for name in parts), parts
        assert sum(parts.values()) <= seconds
        return 0.5 * seconds < sum(parts.values()) and max(parts, key=parts.__getitem__) == "forward_backward"

    # Other programs may interrupt a step anywhere, but not every step.
    wait_for(most_is_in_its_parts, "a step of which most is forward and backward")


def test_slow_data_a_slow_rank_and_slow_noise_show_in_their_own_parts(tmp_path: Path) -> None:
    def step(comm: SimulatedRanks) -> StepParts:
        trainer = build_trainer(small_config(), tmp_path, comm)
        take(trainer)
        if comm.rank == 1:
            noise = trainer.training_step.noise
            perturb, restore = noise.perturb, noise.restore
            micro_batch = trainer.splits.train.read

            def slow_perturb(step: int) -> None:
                time.sleep(0.1)
                perturb(step)

            def slow_restore() -> None:
                time.sleep(0.1)
                restore()

            def slow_data(*arguments: Any) -> Any:
                time.sleep(0.15)
                return micro_batch(*arguments)

            noise.perturb = slow_perturb  # type: ignore[method-assign]
            noise.restore = slow_restore  # type: ignore[method-assign]
            trainer.splits.train.read = slow_data  # type: ignore[method-assign, assignment]
        return take(trainer, 1).times.parts()

    def quick_rank_waits() -> bool:
        quick, slow = results(2, step)
        assert slow.data_wait >= 2 * 0.15
        assert slow.perturb_restore >= 0.2
        return quick.allreduce_wait >= max(0.25, slow.allreduce_wait) and quick.data_wait < slow.data_wait

    # Other programs may delay the quick rank as well, but not in every step.
    wait_for(quick_rank_waits, "a step in which the quick rank waits for the slow one")


def test_with_sync_norm_the_wait_within_passes_is_a_wait_for_the_others(tmp_path: Path) -> None:
    config = small_config(model={"norm": "sync"}, noise={"method": "none"})

    def step(comm: SimulatedRanks) -> StepParts:
        trainer = build_trainer(config, tmp_path, comm)
        micro_batch = trainer.splits.train.read

        def slow_data(*arguments: Any) -> Any:
            time.sleep(0.05)
            return micro_batch(*arguments)

        if comm.rank == 1:
            trainer.splits.train.read = slow_data  # type: ignore[method-assign, assignment]
        mine = trainer.plan.slices(comm.rank, comm.size)
        order = torch.arange(trainer.plan.global_size)
        return trainer.training_step(GlobalBatch(0, 0, order, mine), 0.05, lambda: False).times.parts()

    def quick_rank_waits() -> bool:
        quick, slow = results(2, step)
        assert slow.data_wait >= 5 * 0.05
        return quick.allreduce_wait >= 4 * 0.05

    wait_for(quick_rank_waits, "a step in which the quick rank waits for the slow one")


def test_moments_of_a_stream_are_read_as_seconds_after_the_later_one_has_come(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            calls.append("record")

        def synchronize(self) -> None:
            calls.append("synchronize")

        def elapsed_time(self, later: Event) -> float:
            calls.append("elapsed")
            return 1500.0

    monkeypatch.setattr("torch.cuda.Event", Event)
    clock = StepClock(SingleProcess(), on_gpu=True)
    clock.start()
    with clock.part("optimizer"):
        pass
    assert calls == ["record", "record"], "nothing is read while the step continues"
    assert clock.times().parts().optimizer == 1.5
    assert calls[2:] == ["synchronize", "elapsed"]


def test_parts_that_hang_are_told_from_those_that_may_take_long_once_a_step_was_made() -> None:
    class Told(Communicator):
        def __init__(self) -> None:
            self.told: list[str] = []

        def note_work(self) -> None:
            self.told.append("work")

        def note_rest(self) -> None:
            self.told.append("rest")

    comm = Told()
    clock = StepClock(comm)
    for _ in range(2):
        assert comm.told == []
        clock.start()
        with clock.part("forward_backward"), clock.part("data_wait"):
            pass
    assert comm.told == ["work", "rest", "work", "rest"]
