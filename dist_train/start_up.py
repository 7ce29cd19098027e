"""How the process of a rank starts: without garbage collection, with memory from large pages."""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_collection() -> Iterator[None]:
    """Let nobody look for garbage in the block, nor later among what it leaves behind.

    Loading torch and all that is ours makes objects by the hundred thousand; looking through them again and again takes
    a fifth of the time.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()


# mallopt(3): the largest piece that is cut from the heap, and the free heap that is not given back to the system.
_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1
_KEPT_BYTES = 1 << 30


def ask_for_large_pages() -> None:
    """Let torch ask Linux for pages of 2 MiB where an array is as large; to be called before the first one is made.

    A wide network's activations then take fewer entries of the processor's table of pages: 3 % of a step at width 1
    (`python -m benchmarks --only allocator`). What the user has set stays; Linux may be set to give none, or to give
    them to all.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def keep_freed_memory() -> bool:
    """Let this process reuse the memory that it frees, up to 1 GiB, instead of giving it back to the system.

    A step allocates and frees the same activations again and again. glibc returns pieces over 32 MiB, and a free top of
    the heap, to the system at once, which fills every page with zeros when it is touched the next time: a tenth of the
    time of a step on a CPU (`python -m benchmarks --only allocator`).

    Returns whether it was done: not with another C library, and not where the user has set glibc's own variables.
    """
    asked = os.environ.keys() & {"MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"}
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or asked or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    return all(mallopt(option, _KEPT_BYTES) == 1 for option in (_MMAP_THRESHOLD, _TRIM_THRESHOLD))
