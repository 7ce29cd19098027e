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
