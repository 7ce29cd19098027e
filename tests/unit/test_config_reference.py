"""The reference of all settings: complete, and as docs/settings.md has it."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from benchmarks.settings_page import Setting, settings_markdown, settings_of
from dist_train.cli.completion import choices_by_setting
from dist_train.config import DATA_SETS
from dist_train.config.loading import with_overrides
from dist_train.config.resuming import _CHANGEABLE, _DECIDED_ONCE
from dist_train.config.sections import Config
from dist_train.models.building import _MODELS
from dist_train.optim.noise import _METHODS
from dist_train.optim.optimizers import _OPTIMIZERS
from dist_train.optim.schedules import _FACTORS

PAGE = Path(__file__).parents[2] / "docs" / "settings.md"
SETTINGS = list(settings_of(Config))


def test_the_page_is_that_of_the_schema() -> None:
    assert PAGE.read_text(encoding="utf-8") == settings_markdown(), (
        "renew it: python -m benchmarks.settings_page > docs/settings.md"
    )


def test_the_page_on_configuration_names_what_a_resume_may_change_and_what_it_keeps() -> None:
    page = (PAGE.parent / "configuration.md").read_text(encoding="utf-8")
    section = page.split("## What a resume may change\n")[1].split("\n## ")[0]
    table = re.findall(r"^\|.* \| (.*) \|$", section, re.MULTILINE)
    *changeable, kept = table[1:]
    assert set(re.findall(r"`(.+?)`", "".join(changeable))) == _CHANGEABLE
    assert tuple(re.findall(r"`(.+?)`", kept)) == _DECIDED_ONCE


def test_every_setting_of_the_defaults_has_its_row() -> None:
    leaves = {
        f"{section}.{name}"
        for section, settings in Config().model_dump().items()
        for name in settings
        if (section, name) != ("noise", "schedule")
    }
    assert leaves <= {setting.path for setting in SETTINGS}


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.path)
def test_a_setting_says_what_it_takes_and_means_and_its_example_changes_it(setting: Setting) -> None:
    assert setting.takes
    assert setting.meaning not in ("", "None")
    [override] = shlex.split(setting.example)
    path, _, value = override.partition("=")
    assert (path, value != setting.default) == (setting.path, True)
    kind = setting.meaning.split(": ")[0].removeprefix("With kind ")
    of_kind = [f"noise.schedule.kind={kind}"] if setting.meaning.startswith("With kind ") else []
    if kind == "plugin":
        of_kind.append("noise.schedule.function=mine.py:hold")
    assert Config.model_validate(with_overrides({}, [*of_kind, override])) != Config()


def test_all_models_optimizers_data_sets_schedules_and_noise_methods_are_on_it() -> None:
    tables = {
        "model.name": _MODELS,
        "optimizer.name": _OPTIMIZERS,
        "noise.method": _METHODS,
        "noise.schedule.kind": _FACTORS,
        "data.name": DATA_SETS,
    }
    choices = choices_by_setting(Config)
    assert {path: set(choices[path]) for path in tables} == {path: set(table) for path, table in tables.items()}
