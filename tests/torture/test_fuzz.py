"""A few almost valid inputs for everything that reads files, like those of `python -m tests.torture.fuzz`."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.torture.fuzz import Guard, fuzz
from tests.torture.inputs import kinds

INPUTS = 25
KINDS = (
    "YAML",
    "overrides",
    "study files",
    "checkpoints",
    "forged checkpoints",
    "IDX",
    "CIFAR batches",
    "CIFAR archives",
    "cache files",
    "forged cache files",
)


@pytest.fixture(scope="module")
def guard() -> Iterator[Guard]:
    guard = Guard()
    yield guard
    guard.is_watching = False


@pytest.mark.parametrize("name", KINDS)
def test_bad_input_gives_a_message_and_runs_no_code(name: str, guard: Guard, tmp_path: Path) -> None:
    logging.disable(logging.WARNING)
    try:
        [kind] = [kind for kind in kinds(tmp_path) if kind.name == name]
        tried, _ = fuzz(kind, INPUTS, 1, guard)
    finally:
        logging.disable(logging.NOTSET)
    assert tried >= INPUTS // 2


def test_every_kind_is_fuzzed(tmp_path: Path) -> None:
    assert tuple(kind.name for kind in kinds(tmp_path)) == KINDS
