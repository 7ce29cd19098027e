"""Updates sampled from finished runs, replayed on one rank and on two: records and weights are bit-identical."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from dist_train.api import load_run
from tests.launching import launch, small_settings, start, train_alone, wait_for_ends, write_config
from tests.services.servers import free_port

pytestmark = [pytest.mark.ranks, pytest.mark.lengthy]

RUNS: dict[str, dict[str, Any]] = {
    "smoothout": {},
    "augmented": {"data": {"augment": "crop-flip"}, "model": {"norm": "batch"}},
    "langevin": {"noise": {"method": "langevin", "amplitude": 1e-3}, "optimizer": {"nesterov": False}},
    "sam": {"noise": {"method": "sam", "amplitude": 0.05, "sharing": "micro_batch"}, "model": {"norm": "group"}},
    "lamb": {"optimizer": {"name": "lamb", "learning_rate": 0.01}, "schedule": {"decay": "cosine"}},
}
UPDATES = 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs, of 24 updates each, with a checkpoint after every second update to compare replays with."""
    folder = tmp_path_factory.mktemp("replay")
    checkpoint = {"every_steps": 2, "every_epochs": 0, "keep": 100, "background": False}
    for name, changed in RUNS.items():
        settings = {section: dict(values) for section, values in small_settings(run={"epochs": 3}).items()}
        for section, values in {**changed, "checkpoint": checkpoint}.items():
            settings[section] = {**settings.get(section, {}), **values}
        train_alone(write_config(folder, settings), folder / name)
    return folder


def sampled_updates() -> list[tuple[str, int]]:
    updates = [(name, step) for name in RUNS for step in range(2, 25, 2)]
    return sorted(random.Random(0).sample(updates, UPDATES))


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(("name", "step"), sampled_updates())
def test_replayed_update_is_bit_identical(folder: Path, name: str, step: int, ranks: int) -> None:
    assert step in load_run(folder / name).steps
    ended = launch(ranks, "torch" if ranks > 1 else "alone", "replay", f"{folder / name}@{step}")
    assert ended.code == 0, ended.output
    compared = ended.output.partition(f"update {step}, repeated from step ")[2].splitlines()
    assert [line.split()[-2:] for line in compared if line.startswith("  ")] == [["the", "same"]] * 6


def test_nodes_need_not_share_a_folder_of_temporary_files(folder: Path, tmp_path: Path) -> None:
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
    temporary = [tmp_path / str(rank) for rank in range(2)]
    ranks = []
    for rank, place in enumerate(temporary):
        place.mkdir()
        extra = {**shared, "RANK": str(rank), "TMPDIR": str(place)}
        ranks.append(start(1, "alone", "replay", f"{folder / 'smoothout'}@4", extra=extra))
    ended = wait_for_ends(*ranks)
    assert [each.code for each in ended] == [0, 0], ended
    assert not [left for place in temporary for left in place.glob("dist_train-replay-*")]
