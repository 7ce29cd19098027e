"""Expecting errors by their class and code, not by their message."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from dist_train.config import ConfigError
from dist_train.outcome import CodedError


@contextmanager
def raises(kind: type[CodedError], code: str) -> Iterator[pytest.ExceptionInfo[CodedError]]:
    """Expect the block to raise a `kind` with this `code`; yield pytest's exception info."""
    with pytest.raises(kind) as caught:
        yield caught
    assert caught.value.code == code, str(caught.value)


@contextmanager
def raises_problems(*found: tuple[str, str]) -> Iterator[pytest.ExceptionInfo[ConfigError]]:
    """Expect the block to raise a `ConfigError` with exactly the problems `found`, each a path and a code."""
    with pytest.raises(ConfigError) as caught:
        yield caught
    assert [(problem.path, problem.code) for problem in caught.value.problems] == list(found), str(caught.value)
