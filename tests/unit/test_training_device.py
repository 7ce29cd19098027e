"""On a GPU the host runs ahead: until a step asks for the sum over the ranks, nothing in it waits for the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_train.cluster.communicator import SingleProcess
from dist_train.training.measuring import Part, StepClock
from dist_train.training.trainer import Trainer
from tests.unit.small_trainers import build_trainer, small_config

SetMode = Callable[[str], object]


class Noting:
    """Stands for `real`, and calls `note` whenever something of it is asked for."""

    def __init__(self, real: object, note: Callable[[], None]) -> None:
        self._real = real
        self._note = note

    def __getattr__(self, name: str) -> Any:
        self._note()
        return getattr(self._real, name)


class StrictClock(StepClock):
    """Forbids the host to wait for the device, but where the step reads its result: from the sum to the update."""

    def __init__(self, set_mode: SetMode) -> None:
        super().__init__(SingleProcess())
        self._set_mode = set_mode

    def start(self) -> None:
        super().start()
        self._set_mode("error")

    @contextmanager
    def part(self, part: Part) -> Iterator[None]:
        if part == "allreduce_wait":
            self._set_mode("default")
        if part == "optimizer":
            self._set_mode("error")
        with super().part(part):
            yield
        if part == "optimizer":
            self._set_mode("default")


def strict_trainer(folder: Path, set_mode: SetMode, **sections: dict[str, Any]) -> Trainer:
    """Return a trainer that has made two updates, and from then on may not wait."""
    trainer = build_trainer(small_config(**sections), folder, SingleProcess())
    for _ in range(2):
        trainer.advance()
    trainer.training_step = replace(trainer.training_step, clock=StrictClock(set_mode))
    return trainer


def test_every_part_of_a_step_but_the_reading_of_its_result_is_forbidden_to_wait(tmp_path: Path) -> None:
    modes = ["default"]
    seen: list[tuple[str, str]] = []

    def note(name: str) -> None:
        seen.append((name, modes[-1]))

    trainer = strict_trainer(tmp_path, modes.append, checkpoint={"every_epochs": 0})
    step = trainer.training_step
    parts: dict[str, Any] = {
        name: Noting(getattr(step, name), partial(note, name))
        for name in ("samples", "tally", "reduction", "statistics")
    }
    trainer.training_step = replace(step, **parts)
    trainer.advance()
    allowed = [index for index, (_, state) in enumerate(seen) if state == "default"]
    # The sums are received, the result is read, and the reduction is asked, on the host, whether they fit.
    assert [seen[index][0] for index in allowed] == ["reduction", "tally", "reduction"]
    assert allowed == [*range(allowed[0], allowed[0] + 3)]
    assert seen[-1] == ("statistics", "error")
    assert modes[-1] == "default"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: torch's sync debug mode is one of CUDA's")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize(
    "sections",
    [
        {"noise": {"method": "none"}},
        *({"noise": {"scale": scale}} for scale in ("absolute", "weight", "filter")),
        {"noise": {"sharing": "micro_batch"}},
        {"noise": {"method": "langevin"}},
        {"precision": {"compute": "bfloat16", "channels_last": True}},
        {"precision": {"cuda_graphs": True}},
        {"optimizer": {"name": "adam"}},
    ],
    ids=str,
)
def test_a_step_does_not_wait_for_the_gpu_before_it_reads_its_result(
    tmp_path: Path, sections: dict[str, dict[str, Any]]
) -> None:
    trainer = strict_trainer(tmp_path, torch.cuda.set_sync_debug_mode, **sections)
    try:
        for _ in range(2):
            trainer.advance()
    finally:
        torch.cuda.set_sync_debug_mode("default")
        trainer.close()
