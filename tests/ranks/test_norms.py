"""Norms over real ranks: sync norm equals batch norm over the shared micro-batch; the others keep promise 3."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.launching import (
    assert_same_run,
    launch,
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

Sections = Mapping[str, Mapping[str, Any]]

SYNC: dict[str, tuple[Sections, int, str]] = {
    "without noise": ({"noise": {"method": "none"}}, 3, "mpi"),
    "smoothout": ({"noise": {"method": "smoothout", "sharing": "micro_batch"}}, 3, "mpi"),
    "sam": ({"noise": {"method": "sam", "sharing": "micro_batch", "scale": "absolute"}}, 2, "torch"),
}


def train(folder: Path, ranks: int, controller: str, sections: Sections, *overrides: str) -> Path:
    folder.mkdir()
    config = write_config(folder, small_settings(**sections))
    if ranks == 1:
        train_alone(config, folder / "run", *overrides)
    else:
        train_ranks(ranks, controller, config, folder / "run", *overrides)
    assert status(folder / "run")["world_size"] == ranks
    return folder / "run"


@pytest.mark.parametrize("name", mostly_lengthy(SYNC))
def test_sync_norm_over_ranks_equals_batch_norm_over_the_micro_batch(tmp_path: Path, name: str) -> None:
    noise, ranks, controller = SYNC[name]
    sections = {**noise, "run": {"max_steps": 3}, "comm": {"verify_every": 1}}
    batch = train(tmp_path / "batch", 1, "alone", sections, "model.norm=batch")
    alone = train(tmp_path / "alone", 1, "alone", sections, "model.norm=sync")
    assert weights_digest(alone) == weights_digest(batch)
    first, *_, last = records(batch, "train")
    synced = train(tmp_path / f"{ranks}", ranks, controller, sections, "model.norm=sync")
    synced_first, *_, synced_last = records(synced, "train")
    assert synced_first["loss"] == pytest.approx(first["loss"], rel=1e-5)
    assert synced_first["gradient_norm"] == pytest.approx(first["gradient_norm"], rel=1e-5)
    assert synced_last["loss"] == pytest.approx(last["loss"], rel=1e-3)
    evaluations = [record["loss"] for record in records(synced, "eval")]
    assert evaluations == pytest.approx([record["loss"] for record in records(batch, "eval")], rel=1e-2)


def test_ghost_norm_differs_from_batch_norm(tmp_path: Path) -> None:
    """So the test above would fail if sync norm ignored the other ranks."""
    sections: Sections = {"noise": {"method": "none"}, "run": {"max_steps": 1}}
    batch = train(tmp_path / "batch", 1, "alone", sections, "model.norm=batch")
    ghost = train(tmp_path / "ghost", 1, "alone", sections, "model.norm=ghost", "model.ghost_size=8")
    [whole], [parts] = records(batch, "train"), records(ghost, "train")
    assert parts["loss"] != pytest.approx(whole["loss"], rel=1e-3)


def test_micro_batch_too_small_to_share_is_refused_before_training(tmp_path: Path) -> None:
    config = write_config(tmp_path, small_settings(model={"norm": "sync"}, batch={"global_size": 98}))
    ended = launch(3, "mpi", "train", config, "--run-dir", str(tmp_path / "run"))
    assert ended.code == 2, ended.output
    assert ended.output.count("[micro-batch-too-small]") == 1
    assert not (tmp_path / "run" / "metrics.jsonl").exists() or not records(tmp_path / "run", "train")


@pytest.mark.lengthy
def test_automatic_micro_batch_suffices_for_sync_norm(tmp_path: Path) -> None:
    sections: Sections = {
        "model": {"norm": "sync"},
        "batch": {"global_size": 98, "micro_size": "auto"},
        "run": {"max_steps": 1},
    }
    assert len(records(train(tmp_path / "auto", 3, "mpi", sections), "train")) == 1


@pytest.mark.parametrize(
    "model",
    mostly_lengthy(
        [
            {"name": "resnet18", "norm": "ghost"},
            {"name": "resnet18", "norm": "group"},
            {"name": "vgg9", "norm": "group"},
        ]
    ),
    ids=lambda model: f"{model['name']}-{model['norm']}",
)
def test_promise_3_two_ranks_are_bit_identical_to_one(tmp_path: Path, model: Mapping[str, Any]) -> None:
    sections: Sections = {"model": {**model, "channel_groups": 4}, "run": {"max_steps": 4}, "comm": {"verify_every": 1}}
    alone = train(tmp_path / "alone", 1, "alone", sections)
    both = train(tmp_path / "both", 2, "mpi", sections)
    assert_same_run(both, alone)
