"""The study that confirms a search: its variants with the best trials' settings, fresh seeds, no search."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import yaml

from benchmarks.confirm_study import confirming, main
from dist_train.outcome import UsageError
from dist_train.sweep.study_file import load_study
from tests.unit.studies import write_study

STUDY = Path(__file__).parents[2] / "studies" / "rivals_tune.yaml"
CHOSEN = {"optimizer.learning_rate": 0.3, "noise.amplitude": 0.1}


def lines() -> list[str]:
    variants = load_study(STUDY).variants
    return [best(name, "validation.accuracy", **CHOSEN) for name in variants]


def best(variant: str, objective: str, **settings: float) -> str:
    """Return a line of --best."""
    return json.dumps({"variant": variant, objective: 0.9, "settings": settings, "runs": [f"{variant}-trial-0-seed-0"]})


def test_it_is_a_study_of_the_same_runs_with_the_chosen_settings(tmp_path: Path) -> None:
    output = tmp_path / "confirm.yaml"
    output.write_text(yaml.safe_dump(confirming(STUDY, lines(), [100, 101], output)))
    assert "&id" not in output.read_text()
    searched, found = load_study(STUDY), load_study(output)
    assert (tmp_path / found.base).resolve() == (STUDY.parent / searched.base).resolve()
    assert (found.search, found.seeds, found.analyse) == (None, (100, 101), searched.analyse)
    for name in searched.variants:
        assert found.settings_of(name) == {**searched.settings_of(name), **CHOSEN}


@pytest.mark.parametrize(("folder", "place"), [(".", "nets.py"), ("confirm", "{}/nets.py")])
def test_the_file_of_a_plug_in_is_still_that_beside_the_search(tmp_path: Path, folder: str, place: str) -> None:
    search = {"method": "random", "trials": 1, "space": {"optimizer.learning_rate": {"kind": "choice", "values": [1]}}}
    named = {"model.name": "nets.py:net", "model.options": {"depth": 2}}
    described = {
        "name": "s",
        "base": "dist_train:configs/smoke.yaml",
        "search": search,
        "variants": {"a": {"settings": named}},
    }
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(described))
    line = best("a", "test.accuracy", **{"optimizer.learning_rate": 1})
    found = confirming(tmp_path / "s.yaml", [line], [1], tmp_path / folder / "c.yaml")
    placed = {**named, "model.name": f"{place.format(tmp_path)}:net", "optimizer.learning_rate": 1}
    assert found["variants"]["a"]["settings"] == placed


def test_a_search_that_names_no_objective_is_confirmed_by_the_one_it_has_used(tmp_path: Path) -> None:
    space = {"optimizer.learning_rate": {"kind": "uniform", "low": 0.1, "high": 1.0}}
    search = write_study(tmp_path, search={"method": "random", "trials": 1, "space": space}, variants={"plain": {}})
    for objective in ("validation.accuracy", "test.accuracy"):
        found = confirming(search, [best("plain", objective, **RATE)], [100], tmp_path / "confirm.yaml")
        assert found["variants"]["plain"]["settings"] == RATE


@pytest.mark.parametrize(("left_out", "seeds"), [(1, [100]), (0, [0, 100]), (0, [100, 100])])
def test_an_unfinished_search_and_its_own_seeds_are_refused(tmp_path: Path, left_out: int, seeds: list[int]) -> None:
    with pytest.raises(UsageError):
        confirming(STUDY, lines()[left_out:], seeds, tmp_path / "confirm.yaml")


def test_some_variants_keep_the_contrasts_and_measurements_that_are_about_them(tmp_path: Path) -> None:
    output = tmp_path / "confirm.yaml"
    chosen = ["lb", "lb-smoothout", "lb-ghost"]
    output.write_text(yaml.safe_dump(confirming(STUDY, lines(), [100], output, chosen)))
    found = load_study(output)
    assert set(found.variants) == set(chosen)
    assert {part.kind for part in found.analyse} == {"sharpness"}
    assert [(part.variants, part.against) for part in found.contrasts] == [
        (("lb-smoothout",), "lb"),
        (("lb-ghost",), "lb-smoothout"),
    ]


def test_a_variant_that_the_study_lacks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        confirming(STUDY, lines(), [100], tmp_path / "confirm.yaml", ["lb-nothing"])


RATE = {"optimizer.learning_rate": 0.3}


def write_search(folder: Path) -> Path:
    """Write a search over the rate of a variant and of a grid."""
    space = {"optimizer.learning_rate": {"kind": "uniform", "low": 0.1, "high": 1.0}}
    return write_study(
        folder,
        search={"method": "random", "trials": 1, "objective": "test.loss", "space": space},
        seeds=[0, 1, 2],
        variants={
            "plain": {"settings": {"noise.method": "none"}},
            "noisy": {"title": "Noise", "grid": {"noise.amplitude": [0.1, 0.2]}},
        },
        analyse=[
            {"kind": "sharpness", "seeds": [0], "variants": ["noisy"]},
            {"kind": "direction", "variants": ["plain"], "seeds": [0, 1, 2]},
            {"kind": "interpolate", "between": ["plain", "noisy"]},
        ],
        contrasts=[{"variants": ["plain", "noisy"], "against": "plain"}],
    )


def confirm(monkeypatch: pytest.MonkeyPatch, search: Path, lines: str, *options: str) -> int:
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    return main([str(search), "--seeds", "100", "101", "-o", str(search.parent / "confirm.yaml"), *options])


def test_members_of_a_grid_are_variants_and_analyses_are_of_fresh_seeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("plain", "noisy-amplitude-0.1", "noisy-amplitude-0.2")
    lines = "\n".join(best(name, "test.loss", **RATE) for name in names)
    assert confirm(monkeypatch, write_search(tmp_path), lines) == 0
    found = load_study(tmp_path / "confirm.yaml")
    assert tuple(found.variants) == names
    assert found.variants[names[1]].settings == {"noise.amplitude": 0.1, **RATE}
    assert found.variants[names[1]].title == "Noise, amplitude 0.1"
    assert [part.seeds for part in found.analyse] == [(100,), (100, 101), (), ()]
    assert [part.between for part in found.analyse if part.kind == "interpolate"] == [
        (names[0], name) for name in names[1:]
    ]
    assert [part.variants for part in found.contrasts] == [names[1:]]
    assert confirm(monkeypatch, tmp_path / "study.yaml", lines, "--variants", names[2]) == 0
    found = load_study(tmp_path / "confirm.yaml")
    assert (tuple(found.variants), [part.kind for part in found.analyse]) == (names[2:], ["sharpness"])
    assert confirm(monkeypatch, tmp_path / "study.yaml", lines, "--variants", names[0]) == 0
    assert load_study(tmp_path / "confirm.yaml").contrasts == ()


@pytest.mark.parametrize(
    "line",
    [
        "no trial has finished",
        "[]",
        best("plain", "test.accuracy", **RATE),
        best("plain", "test.loss", **CHOSEN),
        best("other", "test.loss", **RATE),
    ],
)
def test_lines_that_are_not_of_the_search_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str
) -> None:
    assert confirm(monkeypatch, write_search(tmp_path), line, "--variants", "plain") == 2
    assert not (tmp_path / "confirm.yaml").exists()


def test_a_study_without_a_search_is_refused_and_the_search_s_file_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert confirm(monkeypatch, write_study(tmp_path), "") == 2
    search = write_search(tmp_path)
    before, line = search.read_text(), best("plain", "test.loss", **RATE)
    assert confirm(monkeypatch, search, line, "--variants", "plain", "-o", str(search)) == 2
    assert search.read_text() == before
