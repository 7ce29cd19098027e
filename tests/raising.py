"""Errors are known by their class and code; what they say is for people."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from dist_train.outcome import CodedError


@contextmanager
def raises(kind: type[CodedError], code: str) -> Iterator[pytest.ExceptionInfo[CodedError]]:
    """Expect the block to raise a `kind` with this `code`; yield what pytest knows of it."""
    with pytest.raises(kind) as caught:
        yield caught
    assert caught.value.code == code, str(caught.value)
