"""How the process of a rank starts: without garbage collection, with a heap in large pages and without large holes."""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache


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


# mallopt(3): the largest piece that is cut from the heap, and the free heap that is not given back to the system, which
# holds the reserved part too.
_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1
_LARGEST_PIECE, _KEPT_BYTES = 1 << 30, (1 << 31) - 1
_RESERVED_BYTES = _LARGEST_PIECE - (1 << 20)
_MADV_HUGEPAGE = 14


def keep_freed_memory() -> bool:
    """Let this process reuse the memory that it frees, up to 2 GiB, instead of giving it back to the system.

    A step allocates and frees the same activations again and again. glibc returns pieces over 32 MiB, and a free top of
    the heap, to the system at once, which fills every page with zeros when it is touched the next time: a tenth of the
    time of a step on a CPU (`python -m benchmarks --only allocator`).

    Returns whether it was done: not with another C library, and not where the user has set glibc's own variables.
    """
    asked = os.environ.keys() & {"MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"}
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or asked or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    options = ((_MMAP_THRESHOLD, _LARGEST_PIECE), (_TRIM_THRESHOLD, _KEPT_BYTES))
    return all(mallopt(option, value) == 1 for option, value in options)


def use_large_pages() -> bool:
    """Have the next GiB of the heap in pages of 2 MiB; to be called after `keep_freed_memory`, which must have done so.

    Arrays and objects then take fewer entries of the processor's table of pages: 3 % of a step at width 1
    (`python -m benchmarks --only allocator`). Address space is reserved, no memory. torch itself asks for large pages
    with THP_MEM_ALLOC_ENABLE=1, but aligns each large array to 2 MiB: the heap gets holes, a quarter more memory at
    width 1. Where the user has set that variable, torch does as it says.

    Returns whether it was asked for; Linux may be set to give none, or to give them to all.
    """
    if "THP_MEM_ALLOC_ENABLE" in os.environ:
        return False
    libc = _libc()
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    # What is free on top of the heap once this is freed; not touched, it has no pages yet.
    place = libc.malloc(_RESERVED_BYTES)
    if place is None:  # beyond a limit of the address space
        return False
    page = os.sysconf("SC_PAGE_SIZE")
    begin, end = -(-place // page) * page, (place + _RESERVED_BYTES) // page * page
    refused: int = libc.madvise(begin, end - begin, _MADV_HUGEPAGE)
    libc.free(place)
    return refused == 0


# An update of VGG9 takes fewer than 1,000 pieces. A piece of 48 bytes holds 40; the rest is glibc's own.
_SMALL_PIECES, _HELD_BYTES = 10_000, 40


@cache
def keep_small_objects_together() -> None:
    """Leave small pieces of the heap free for small objects, which otherwise end up between large arrays.

    torch aligns arrays to 64 bytes, for which glibc leaves a piece of 48 bytes free before each array. A small object
    there, such as a node of autograd's graph, keeps arrays that are freed on both sides from becoming one free piece.
    Not even an array of the same size then fits in the place of one of them, since glibc looks for 96 bytes more than
    an aligned array takes. The heap of VGG9 at width 1 grew to 480 to 550 MB, of which 410 were in use at most.

    Of pieces that fit exactly, glibc takes the one that has been free for longest: these come first. Once in a process
    is enough.
    """
    libc = _libc()
    pieces = [libc.malloc(_HELD_BYTES) for _ in range(2 * _SMALL_PIECES)]
    # Every other one stays: free pieces side by side would become one.
    for piece in pieces[::2]:
        libc.free(piece)


def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None)
    libc.malloc.argtypes, libc.malloc.restype = (ctypes.c_size_t,), ctypes.c_void_p
    libc.free.argtypes, libc.free.restype = (ctypes.c_void_p,), None
    return libc
