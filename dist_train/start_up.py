"""Starts processes of this program, and sets up a rank's: garbage collection, heap, cores, open files."""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
import resource
import signal
import sys
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

_CGROUP = Path("/sys/fs/cgroup")  # in a container its own
_LARGE_PAGE = Path("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size")
# If one of these is set, OpenMP binds the main thread to its first place, often one core, when torch is loaded.
_OPENMP_BINDING = {"OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY"}
_BOUND_TO = os.sched_getaffinity(0)  # before that: commands import this module first


def own_command(*words: str) -> list[str]:
    """Return the command line of another process that runs `dist-train WORDS`.

    It runs this package, none of whose modules is replaced by a file of the current folder, such as a queue.py.
    """
    folder = Path(__file__).absolute().parents[1]
    program = [sys.executable, "-P", "-m", "dist_train", *words]
    if folder.name in ("site-packages", "dist-packages"):
        return program
    # a checkout, which Python may have found in its current folder
    others = filter(None, [os.environ.get("PYTHONPATH")])
    return ["/usr/bin/env", f"PYTHONPATH={os.pathsep.join([str(folder), *others])}", *program]


def bound_cores() -> Set[int]:
    """Return the numbers of the cores that this process is bound to, by a launcher, Slurm or a container."""
    return _BOUND_TO if os.environ.keys() & _OPENMP_BINDING else os.sched_getaffinity(0)


def usable_cores() -> int:
    """Return how many cores this process may use: those that it is bound to, or a container's CPU quota."""
    cores = len(bound_cores())
    for names in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):  # cgroups v2; v1
        with suppress(OSError, ValueError):  # no such file; "max", which is no number
            quota, period = map(int, " ".join((_CGROUP / name).read_text() for name in names).split())
            if quota > 0:  # microseconds in each period
                cores = min(cores, max(1, quota // period))
    return cores


_MOST_FILES = 1 << 16


def allow_open_files() -> None:
    """Raise this process's soft limit of open files as far as allowed: it may need two files for each rank.

    A Slurm job has the limit of the shell that submitted it, usually 1,024.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_FILES)
    if resource.RLIM_INFINITY != soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def stop_ignoring_sigchld() -> None:
    """Undo an inherited SIG_IGN for SIGCHLD, with which every child process seems to end with code 0."""
    if signal.getsignal(signal.SIGCHLD) == signal.SIG_IGN:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def restore_handlers(before: Mapping[int, Any]) -> None:
    """Give signals the handlers that `signal.signal` returned for them.

    None stands for a handler that a library set before Python started. Python cannot set it again: the signal gets the
    default.
    """
    for number, handler in before.items():
        signal.signal(number, signal.SIG_DFL if handler is None else handler)


@contextmanager
def without_collection() -> Iterator[None]:
    """Switch garbage collection off in the block.

    Imports create hundreds of thousands of objects; traversing them again and again takes a fifth of the time.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


# Parameters of mallopt(3): the largest allocation that the heap serves, how many larger ones may be mapped, and how
# much free heap is kept, the reserved part included.
_MMAP_THRESHOLD, _MMAP_MAX, _TRIM_THRESHOLD = -3, -4, -1
_LARGEST_PIECE, _KEPT_BYTES = 1 << 30, (1 << 31) - 1
_RESERVED_BYTES = _LARGEST_PIECE - (1 << 20)


def keep_freed_memory() -> bool:
    """Let this process keep up to 2 GiB of freed memory for reuse; return whether that was set.

    Nothing is set with a C library other than glibc, or if the user has set glibc's variables.

    Every step allocates the same activations. By default glibc returns large ones to the system, which zeroes their
    pages at the next use: a tenth of a step's time on a CPU (`python -m benchmarks --only allocator`).
    """
    asked = os.environ.keys() & {"MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"}
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or asked or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    # Before version 2.35 glibc refuses thresholds above 32 MiB: then the heap serves allocations of any size.
    from_heap = mallopt(_MMAP_THRESHOLD, _LARGEST_PIECE) == 1 or mallopt(_MMAP_MAX, 0) == 1
    return bool(from_heap and mallopt(_TRIM_THRESHOLD, _KEPT_BYTES) == 1)


def use_large_pages() -> bool:
    """Request pages of 2 MiB for the next GiB of the heap, after `keep_freed_memory`; return whether Linux accepted.

    Fewer pages save 3 % of a step at width 1 (`python -m benchmarks --only allocator`). Only address space is reserved.
    torch's own THP_MEM_ALLOC_ENABLE=1 aligns each large array to 2 MiB, which leaves holes: a quarter more memory at
    width 1. Nothing is requested if the user has set that variable, or if large pages are larger, such as 512 MiB on
    aarch64 with pages of 64 KiB: one touched byte would take all of it.
    """
    if "THP_MEM_ALLOC_ENABLE" in os.environ:
        return False
    with suppress(OSError):
        if int(_LARGE_PAGE.read_text()) > 1 << 21:
            return False
    libc = _libc()
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    # Freed again below, this is the free top of the heap. It has no pages yet, since nothing has touched it.
    place = libc.malloc(_RESERVED_BYTES)
    if place is None:  # beyond a limit of the address space
        return False
    page = mmap.PAGESIZE
    begin, end = -(-place // page) * page, (place + _RESERVED_BYTES) // page * page
    refused: int = libc.madvise(begin, end - begin, mmap.MADV_HUGEPAGE)
    libc.free(place)
    return refused == 0


# An update of VGG9 needs fewer than 1,000 pieces. Of the 48 bytes of a piece, 8 are glibc's own.
_SMALL_PIECES, _HELD_BYTES = 10_000, 40


@cache
def keep_small_objects_together() -> None:
    """Make free places for small objects, which otherwise end up between large arrays; once per process is enough.

    torch aligns arrays to 64 bytes, so glibc leaves 48 bytes free before each. A small object there, such as a node of
    autograd's graph, keeps freed arrays on both sides from merging, and an array of the same size does not fit in one
    of them, since glibc looks for 96 bytes more than it needs. The heap of VGG9 at width 1 grew to 480 to 550 MB, with
    at most 410 in use.

    Among the pieces that fit exactly, glibc takes the one that has been free longest: one of these.
    """
    libc = _libc()
    pieces = [libc.malloc(_HELD_BYTES) for _ in range(2 * _SMALL_PIECES)]
    # Every other one stays allocated: adjacent free pieces would merge.
    for piece in pieces[::2]:
        libc.free(piece)


def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None)
    libc.malloc.argtypes, libc.malloc.restype = (ctypes.c_size_t,), ctypes.c_void_p
    libc.free.argtypes, libc.free.restype = (ctypes.c_void_p,), None
    return libc
