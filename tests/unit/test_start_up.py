"""A start looks for no garbage."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from dist_train.start_up import without_collection


@pytest.fixture(autouse=True)
def _collection_as_before() -> Iterator[None]:
    was_enabled = gc.isenabled()
    yield
    gc.unfreeze()
    if was_enabled:
        gc.enable()
    else:
        gc.disable()


def test_nothing_is_collected_in_the_block_and_all_that_it_leaves_is_let_be_afterwards() -> None:
    gc.enable()
    with without_collection():
        assert not gc.isenabled()
        left: list[list[int]] = [[] for _ in range(1000)]
    assert gc.isenabled()
    assert gc.get_freeze_count() >= len(left)


def test_who_collects_nothing_anyway_goes_on_so_also_after_a_fault() -> None:
    gc.disable()
    with pytest.raises(OSError, match="lost"), without_collection():
        raise OSError("lost")
    assert not gc.isenabled()
