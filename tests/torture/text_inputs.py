"""Broken configurations, overrides and studies."""

from __future__ import annotations

import json
from pathlib import Path

import yaml
from hypothesis import strategies as st

from dist_train.config import Config, ConfigError, dump_config, load_config, parse_config
from dist_train.sweep.study_file import load_study
from tests.torture.kind import Kind, refused
from tests.torture.mutation import mutated_text

_WORDS = (
    "!!python/object/apply:os.system ['touch ran']",
    "!!python/name:os.system",
    "!!binary aaaa",
    "!!set {a, b}",
    "!!timestamp 2020-01-01",
    "&a [*a, *a]",
    "*a",
    "[[[[[[",
    "{" * 200,
    "[" * 2000,
    "? {a: b}",
    "<<: {a: 1}",
    "1e400",
    "-.inf",
    ".nan",
    "0x" + "f" * 50,
    "9" * 5000,
    "1:30:60",
    "null",
    "~",
    "true",
    '"\\uD800"',
    '"\\0"',
    "\t",
    "\x85",
    "[]",
    "{}",
    "-1",
    "0",
    "1.5",
    "base: config.yaml",
    "2020-99-99",
    "!!int x",
    "!!float {}",
    "!!bool 7",
    "! x",
    "%YAML 9.9",
    "---",
    "...",
)


def configurations(folder: Path) -> Kind:
    path = folder / "config.yaml"

    def check(content: object) -> bool:
        assert isinstance(content, bytes)
        path.write_bytes(content)
        try:
            config = load_config(path)
        except ConfigError as error:
            return refused(error)
        assert parse_config(yaml.safe_load(dump_config(config)), source="again") == config
        return True

    return Kind("YAML", mutated_text(dump_config(Config()), _WORDS), check)


def overrides(folder: Path) -> Kind:
    path = folder / "config.yaml"
    path.write_text("run: {name: fuzzed}\n")
    defaults = {
        f"{section}.{name}": json.dumps(value)
        for section, inner in Config().model_dump(mode="json").items()
        for name, value in inner.items()
    }
    names = sorted(defaults)
    values = st.one_of(st.sampled_from(_WORDS), st.text(max_size=20), st.floats().map(str), st.integers().map(str))
    known = st.builds(lambda name, value: f"{name}={value}", st.sampled_from(names), values)
    plain = st.sampled_from(names).map(lambda name: f"{name}={defaults[name]}")

    def check(overrides: object) -> bool:
        assert isinstance(overrides, list)
        try:
            config = load_config(path, overrides)
        except ConfigError as error:
            return refused(error)
        assert parse_config(yaml.safe_load(dump_config(config)), source="again") == config
        return True

    return Kind("overrides", st.lists(st.one_of(known, plain, plain, st.text(max_size=30)), max_size=3), check)


def studies(folder: Path) -> Kind:
    path = folder / "study.yaml"
    whole = """name: study
title: A study
base: config.yaml
seeds: [0, 1]
settings:
  run.epochs: 3
grid:
  optimizer.learning_rate: [0.1, 0.2]
variants:
  small:
    settings:
      batch.global_size: 128
  large:
    like: small
    seeds: [1]
    grid:
      noise.amplitude: [0.1, 0.2]
analyse:
  - kind: interpolate
    between: [small, large]
  - kind: sharpness
    variants: [small]
    options: {samples: 5}
"""

    def check(content: object) -> bool:
        assert isinstance(content, bytes)
        path.write_bytes(content)
        try:
            study = load_study(path)
        except ConfigError as error:
            return refused(error)
        for variant in study.variants:
            study.settings_of(variant)
            study.seeds_of(variant)
        return True

    return Kind("study files", mutated_text(whole, (*_WORDS, "small", "large", "like: large")), check)
