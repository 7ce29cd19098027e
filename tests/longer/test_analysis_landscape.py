"""Landscapes of real checkpoints of a tiny run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_train.analysis.landscape import Finished, Report, make_landscape
from dist_train.analysis.landscape_files import (
    LandscapeFolder,
    LandscapeSettings,
    PointRow,
    Statistics,
    read_landscape,
)
from dist_train.analysis.landscape_points import PointEvaluator
from dist_train.cluster.communicator import SingleProcess
from dist_train.data.images import Split
from dist_train.outcome import UsageError
from dist_train.training.evaluation import evaluate_stored
from tests.raising import raises
from tests.unit.simulated_ranks import results
from tests.unit.small_trainers import build_trainer, small_config

pytestmark = pytest.mark.usefixtures("threads_as_before")

LINE = LandscapeSettings("interpolate", -0.5, 1.5, 5, samples=None, batch_size=16)
DIRECTION = replace(LINE, kind="direction", start=-1.0, stop=1.0, points=3, lines=2)
PLANE = replace(DIRECTION, kind="plane", lines=1)


class KilledError(BaseException):
    """Simulates a SIGKILL."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    build_trainer(small_config(run={"epochs": 4}, checkpoint={"keep": 9}), folder, SingleProcess()).run()
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture
def evaluations(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """An entry for each evaluated point."""
    counted: list[None] = []
    evaluate = PointEvaluator.evaluate

    def counting(self: PointEvaluator, place: object) -> object:
        counted.append(None)
        return evaluate(self, place)  # type: ignore[arg-type]

    monkeypatch.setattr(PointEvaluator, "evaluate", counting)
    return counted


def checkpoint(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}.pt"


def ignore_progress(done: int, total: int) -> None:
    pass


def compute(
    targets: Sequence[Path], settings: LandscapeSettings, report: Report = ignore_progress, output: Path | None = None
) -> Finished:
    finished = make_landscape(targets, settings, SingleProcess(), report, output=output, threads=1)
    assert finished is not None
    return finished


def rows(finished: Finished) -> list[PointRow]:
    return list(read_landscape(finished.folder).rows)


def requests(run: Path) -> list[tuple[list[Path], LandscapeSettings]]:
    ends = [checkpoint(run, 3), checkpoint(run, 12)]
    return [(ends, LINE), ([run], DIRECTION), ([run], PLANE), ([run], replace(PLANE, trajectory=True))]


@pytest.mark.parametrize("statistics", ["interpolated", "recomputed"])
def test_ends_of_a_line_agree_with_evaluate(run: Path, statistics: Statistics) -> None:
    finished = compute([checkpoint(run, 3), run], replace(LINE, statistics=statistics))
    splits: tuple[Split, ...] = ("train", "test")
    for alpha, step in ((0.0, 3), (1.0, 12)):
        for split in splits:
            expected = evaluate_stored(checkpoint(run, step), split, [])
            [row] = [row for row in rows(finished) if row.alpha == alpha and row.split == split]
            assert row.loss == pytest.approx(expected["loss"], rel=1e-6)
            assert row.accuracy == expected["accuracy"]


def test_center_of_directions_and_planes_agrees_with_evaluate(run: Path) -> None:
    expected = evaluate_stored(run, "train", [])
    for targets, settings in requests(run)[1:3]:
        measured = rows(compute(targets, settings))
        found = [row for row in measured if (row.alpha, row.beta, row.split) == (0.0, 0.0, "train")]
        assert len(found) == (2 if settings.kind == "direction" else 1)
        assert [row.loss for row in found] == [pytest.approx(expected["loss"], rel=1e-6)] * len(found)


def test_directions_and_statistics_change_the_losses(run: Path) -> None:
    found = [rows(compute([run], DIRECTION))]
    changes: tuple[dict[str, Any], ...] = (
        {"statistics": "interpolated"},
        {"seed": 1},
        {"normalization": "layer"},
        {"exclude": ()},
    )
    for change in changes:
        found.append(rows(compute([run], replace(DIRECTION, **change))))
    losses = [[row.loss for row in result if row.direction == line] for result in found for line in range(2)]
    assert len({tuple(line) for line in losses}) == len(losses)


def test_plane_contains_its_first_direction(run: Path) -> None:
    line = [row for row in rows(compute([run], DIRECTION)) if row.direction == 0]
    across = [row for row in rows(compute([run], PLANE)) if row.beta == 0.0]
    assert line == across


@pytest.mark.parametrize("which", range(4))
def test_killed_landscape_resumes_bit_identically(
    run: Path, tmp_path: Path, which: int, evaluations: list[None]
) -> None:
    request = requests(run)[which]
    undisturbed = compute(*request, output=tmp_path / "undisturbed")
    total = len(evaluations)

    def kill_at(point: int) -> Callable[[int, int], None]:
        def report(done: int, _: int) -> None:
            if done == point:
                raise KilledError

        return report

    for point in (2, 1):
        with pytest.raises(KilledError):
            compute(*request, kill_at(point))
    [folder] = (run / "analysis").iterdir()
    with (folder / "partial" / "rank-0.jsonl").open("a") as partial:
        partial.write('{"point": 4, "measured": [[0.')
    evaluations.clear()
    resumed = compute(*request)
    assert len(evaluations) == total - 3
    assert sorted(path.name for path in folder.iterdir()) == ["points.csv", "settings.json"]
    for path in folder.iterdir():
        assert path.read_bytes() == (undisturbed.folder / path.name).read_bytes(), path.name
    assert resumed.folder == folder


def test_points_of_other_ranks_need_not_show_on_the_file_system_of_the_first(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = rows(compute([run], DIRECTION, output=tmp_path / "alone"))
    monkeypatch.setattr(LandscapeFolder, "finished", lambda self: {})
    both = results(2, lambda comm: make_landscape([run], DIRECTION, comm, ignore_progress, threads=1))
    assert both[0] is not None
    assert rows(both[0]) == expected


def test_finished_result_is_not_evaluated_again(run: Path, evaluations: list[None]) -> None:
    first = compute([run], DIRECTION)
    points = (first.folder / "points.csv").read_bytes()
    evaluations.clear()
    again = compute([run], DIRECTION)
    assert not evaluations
    assert again.was_there
    assert again.folder == first.folder
    assert (first.folder / "points.csv").read_bytes() == points
    assert again.widths == first.widths


def test_results_are_not_reused_for_other_checkpoints_or_settings(run: Path, evaluations: list[None]) -> None:
    changes: tuple[dict[str, Any], ...] = (
        {"samples": 40},
        {"samples": 40, "subset_seed": 1},
        {"test_samples": 10},
        {"statistics": "interpolated"},
        {"statistics_samples": 20},
        {"batch_size": 17},
        {"normalization": "layer"},
        {"seed": 1},
        {"exclude": ("norm",)},
        {"points": 5},
        {"start": -0.5, "points": 4},
        {"lines": 1},
    )
    others = [
        ([checkpoint(run, 9)], DIRECTION),
        ([run], PLANE),
        *(([run], replace(DIRECTION, **change)) for change in changes),
    ]
    folders = [compute([run], DIRECTION).folder]
    for other in others:
        evaluations.clear()
        folders.append(compute(*other).folder)
        assert evaluations, other
    assert len(set(folders)) == len(folders)


def test_settings_file_has_checkpoints_settings_and_results(run: Path) -> None:
    finished = compute(requests(run)[0][0], replace(LINE, points=4))
    fields = json.loads((finished.folder / "settings.json").read_text())
    assert fields["kind"] == "interpolate"
    assert [item["step"] for item in fields["checkpoints"]] == [3, 12]
    record = json.loads(checkpoint(run, 3).with_suffix(".json").read_text())
    assert fields["checkpoints"][0]["sha256"] == record["sha256"]
    assert fields["settings"]["samples"] == 100
    assert fields["settings"]["statistics"] == "recomputed"
    assert set(fields["widths"]) == {"B"}, "the loss falls from the early checkpoint to the last one"
    assert set(fields["widths"]["B"]) == {"2", "10"}
    states = [torch.load(checkpoint(run, step), weights_only=True)["model"] for step in (3, 12)]
    squares = sum(
        float((states[1][name] - states[0][name]).double().square().sum())
        for name in states[0]
        if not name.endswith(("running_mean", "running_var"))
    )
    assert fields["distances"] == [pytest.approx(squares**0.5, rel=1e-6)]


def test_network_without_running_statistics_has_a_landscape(tmp_path: Path) -> None:
    build_trainer(small_config(run={"epochs": 1}, model={"norm": "group"}), tmp_path / "run", SingleProcess()).run()
    finished = compute([tmp_path / "run"], DIRECTION)
    assert read_landscape(finished.folder).settings["statistics"] == "none"


class TestRefusals:
    def test_line_from_a_checkpoint_to_itself_is_refused(self, run: Path) -> None:
        with raises(UsageError, "same-checkpoint"):
            compute([run, checkpoint(run, 12)], LINE)

    def test_line_between_networks_of_different_shapes_is_refused(self, run: Path, tmp_path: Path) -> None:
        build_trainer(
            small_config(run={"epochs": 1}, model={"width": 0.0625}), tmp_path / "wide", SingleProcess()
        ).run()
        with raises(UsageError, "another-network"):
            compute([run, tmp_path / "wide"], LINE)

    def test_line_between_networks_of_different_data_is_refused(self, run: Path, tmp_path: Path) -> None:
        build_trainer(small_config(run={"epochs": 1, "seed": 1}), tmp_path / "other", SingleProcess()).run()
        with raises(UsageError, "other-data"):
            compute([run, tmp_path / "other"], LINE)

    def test_trajectory_needs_three_checkpoints(self, run: Path) -> None:
        with raises(UsageError, "too-few-checkpoints"):
            compute([checkpoint(run, 6)], replace(PLANE, trajectory=True))

    def test_damaged_checkpoint_is_refused(self, run: Path) -> None:
        content = bytearray(checkpoint(run, 12).read_bytes())
        content[1000] ^= 1
        checkpoint(run, 12).write_bytes(content)
        with raises(UsageError, "checkpoint-digest"):
            compute([run], DIRECTION)

    def test_settings_out_of_range_are_refused(self) -> None:
        with raises(UsageError, "option-range"):
            replace(DIRECTION, points=1)
        with raises(UsageError, "option-range"):
            replace(DIRECTION, start=2.0)
        with raises(UsageError, "option-range"):
            replace(DIRECTION, stop=float("nan"))
        with raises(UsageError, "option-range"):
            replace(DIRECTION, lines=0)

    def test_samples_must_be_positive(self) -> None:
        with raises(UsageError, "option-range"):
            replace(LINE, test_samples=0)
