"""A start looks for no garbage, and sets the allocator."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from dist_train.start_up import keep_freed_memory, without_collection


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


@pytest.mark.parametrize(("refused", "is_kept"), [((), True), ((-3,), True), ((-3, -4), False), ((-1,), False)])
def test_freed_memory_is_kept_also_where_glibc_refuses_a_large_threshold(
    refused: tuple[int, ...], is_kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    libc = SimpleNamespace(mallopt=lambda option, value: int(option not in refused))
    monkeypatch.setattr(ctypes, "CDLL", lambda name: libc)
    assert keep_freed_memory() is is_kept
