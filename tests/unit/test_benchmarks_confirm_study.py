"""The study that confirms a search: its variants with the best trials' settings, fresh seeds, no search."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from benchmarks.confirm_study import confirming
from dist_train.outcome import UsageError
from dist_train.sweep.study_file import load_study

STUDY = Path(__file__).parents[2] / "studies" / "rivals_tune.yaml"


def lines() -> list[str]:
    variants = load_study(STUDY).variants
    return [json.dumps({"variant": name, "settings": {"optimizer.learning_rate": 0.3}}) for name in variants]


def test_it_is_a_study_of_the_same_runs_with_the_chosen_settings(tmp_path: Path) -> None:
    output = tmp_path / "confirm.yaml"
    output.write_text(yaml.safe_dump(confirming(STUDY, lines(), [100, 101], output)))
    searched, found = load_study(STUDY), load_study(output)
    assert (tmp_path / found.base).resolve() == (STUDY.parent / searched.base).resolve()
    assert (found.search, found.seeds, found.analyse) == (None, (100, 101), searched.analyse)
    for name in searched.variants:
        assert found.settings_of(name) == {**searched.settings_of(name), "optimizer.learning_rate": 0.3}


@pytest.mark.parametrize(("left_out", "seeds"), [(1, [100]), (0, [0, 100])])
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
