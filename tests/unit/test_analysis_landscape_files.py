"""The files of a landscape."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from dist_train.analysis.landscape_files import Identity, LandscapeFolder, Measured, Point, read_landscape
from dist_train.outcome import UsageError
from tests.raising import raises


def identity(sha256: str = "ab", kind: str = "direction", path: str = "a.pt", **settings: Any) -> Identity:
    return Identity(
        kind,
        [{"path": path, "sha256": sha256, "step": 3}],
        {"points": 2, "compute": "float32", "channels_last": True, **settings},
    )


def measured(loss: float) -> list[Measured]:
    return [Measured(loss, 0.5), Measured(loss + 1, 0.25)]


def test_the_key_names_contents_and_settings_and_not_the_place() -> None:
    assert identity().key == identity(path="elsewhere.pt").key
    keys = [identity(), identity("ac"), identity(kind="plane"), identity(points=3), identity(seed=0), identity(seed=1)]
    assert len({one.key for one in keys}) == len(keys)


def test_numbers_are_read_back_bit_identically(tmp_path: Path) -> None:
    folder = LandscapeFolder(tmp_path, identity())
    assert not folder.begin()
    third = [Measured(1 / 3, 0.1 + 0.2), Measured(math.nan, math.inf)]
    folder.write_points([Point(0, -0.1), Point(2, 0.3, 0.7)], {0: measured(5e-324), 1: third})
    assert folder.begin()
    assert not (folder.path / "partial").exists()
    rows = read_landscape(folder.path).rows
    assert [(row.direction, row.alpha, row.beta, row.split) for row in rows] == [
        (0, -0.1, 0.0, "train"),
        (0, -0.1, 0.0, "test"),
        (2, 0.3, 0.7, "train"),
        (2, 0.3, 0.7, "test"),
    ]
    assert [row.loss for row in rows[:3]] == [5e-324, 1.0, 1 / 3]
    assert rows[2].accuracy == 0.1 + 0.2
    assert math.isnan(rows[3].loss)
    assert (folder.points).read_text().startswith("direction,alpha,beta,split,loss,accuracy\n0,-0.1,0.0,train,5e-324,")


def test_finished_points_are_kept_whatever_a_kill_leaves(tmp_path: Path) -> None:
    folder = LandscapeFolder(tmp_path, identity())
    folder.begin()
    for rank in range(2):
        folder.keep(rank, rank, measured(rank / 3))
    partial = folder.path / "partial" / "rank-0.jsonl"
    whole = partial.read_bytes()
    for cut in range(1, len(whole) - 1):
        partial.write_bytes(whole[:cut])
        assert folder.finished().get(0, measured(0.0)) == measured(0.0)
        assert folder.finished()[1] == measured(1 / 3)
    partial.write_bytes(whole[:-9])
    folder.keep(0, 7, [Measured(math.nan, math.inf), Measured(1.0, 1.0)])
    found = folder.finished()
    assert sorted(found) == [1, 7]
    assert math.isnan(found[7][0].loss)
    folder.write_points([], {})
    assert folder.finished() == {}


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with raises(UsageError, "output-unwritable"):
        LandscapeFolder(tmp_path / "file", identity()).begin()
    folder = LandscapeFolder(tmp_path, identity())
    folder.settings.mkdir(parents=True)
    with raises(UsageError, "output-unwritable"):
        folder.save_settings({})


def test_what_is_not_finished_or_damaged_is_told(tmp_path: Path) -> None:
    folder = LandscapeFolder(tmp_path, identity())
    folder.begin()
    with raises(UsageError, "landscape-unfinished"):
        read_landscape(folder.path)
    folder.points.write_text("direction,alpha\n0,x\n")
    with raises(UsageError, "landscape-damaged"):
        read_landscape(folder.path)


@pytest.mark.parametrize("checkpoints", [[], [{"path": "a.pt", "sha256": "ab"}]])
def test_a_landscape_of_unnamed_checkpoints_is_damaged(tmp_path: Path, checkpoints: list[dict[str, str]]) -> None:
    folder = LandscapeFolder(tmp_path, identity())
    folder.begin()
    folder.write_points([Point(0, -0.1)], {0: measured(1.0)})
    folder.settings.write_text(json.dumps({**json.loads(folder.settings.read_text()), "checkpoints": checkpoints}))
    with raises(UsageError, "landscape-damaged"):
        read_landscape(folder.path)
