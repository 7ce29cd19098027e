"""Freed memory stays with the process; large arrays use large pages, without small objects between them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.test_cli_commands import write_config

SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")

pytestmark = pytest.mark.skipif(
    "glibc" not in (os.confstr("CS_GNU_LIBC_VERSION") or ""), reason="the setting is one of glibc's allocator"
)

# Sixteen times an array of 64 MiB (16,384 pages), freed each time.
PROGRAM = """
import resource
from dist_train.start_up import keep_freed_memory
SIZE = 1 << 26
def faults():
    b"x" * SIZE
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(16):
        b"x" * SIZE
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults(), keep_freed_memory(), faults())
"""


def page_faults(**variables: str) -> tuple[int, str, int]:
    """Return the page faults before the setting, whether it was made, and the page faults after it."""
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, **variables},
        check=True,
        capture_output=True,
        text=True,
    )
    without, kept, faults = result.stdout.split()
    return int(without), kept, int(faults)


def test_array_reuses_the_pages_of_a_freed_one() -> None:
    without, kept, faults = page_faults()
    assert kept == "True"
    assert faults < 1000
    assert without > 1000, "pages are reused without the setting"


@pytest.mark.parametrize(
    "variables",
    [{"MALLOC_MMAP_THRESHOLD_": "1000000"}, {"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=1000000"}],
)
def test_settings_of_the_user_are_kept(variables: dict[str, str]) -> None:
    _, kept, faults = page_faults(**variables)
    assert kept == "False"
    assert faults > 1000


def test_large_pages_take_no_memory_in_advance_and_are_reused() -> None:
    program = """
import resource
from dist_train.start_up import keep_freed_memory, use_large_pages
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
assert keep_freed_memory() and use_large_pages() and use_large_pages()
print(peak() - before)
b"x" * (1 << 26)
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
b"x" * (1 << 26)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults)
"""
    variables = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
    result = subprocess.run([sys.executable, "-c", program], env=variables, check=True, capture_output=True, text=True)
    kilobytes, faults = map(int, result.stdout.split())
    assert kilobytes < 16 << 10
    assert faults < 100


# Eight arrays of 8 MiB with small objects between, then one array as large as all of them.
HOLES = """
import ctypes
import sys
import torch
from dist_train.start_up import keep_freed_memory, keep_small_objects_together
libc = ctypes.CDLL(None)
libc.malloc.restype = libc.sbrk.restype = ctypes.c_void_p
keep_freed_memory()
if sys.argv[1] == "together":
    keep_small_objects_together()
arrays = []
for _ in range(8):
    arrays.append(torch.empty(1 << 23, dtype=torch.uint8))
    for _ in range(10):
        libc.malloc(40)
end = libc.sbrk(0)
arrays.clear()
torch.empty(1 << 26, dtype=torch.uint8)
print(libc.sbrk(0) - end)
"""


def grown_by(small_objects: str) -> int:
    """Return by how many bytes the heap grew for an array that would fit where freed arrays were."""
    command = [sys.executable, "-c", HOLES, small_objects]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def test_small_objects_do_not_split_the_memory_of_freed_arrays() -> None:
    assert grown_by("together") == 0
    assert grown_by("anywhere") > 1 << 24, "the test's own reason is gone: small objects split nothing without it"


LARGE_PAGES = """
import sys
import torch
from dist_train.cli.main import main
assert main(["train", *sys.argv[1:]]) == 0
array = torch.ones(1 << 24)
with open("/proc/self/smaps") as regions:
    print(sum(int(line.split()[1]) for line in regions if line.startswith("AnonHugePages:")))
"""


def large_page_kilobytes(folder: Path, **variables: str) -> int:
    """Return the memory in pages of 2 MiB of a process that trains and then makes an array of 64 MiB."""
    config = write_config(folder)
    result = subprocess.run(
        [sys.executable, "-c", LARGE_PAGES, str(config), "--run-dir", str(folder / "run")],
        env={**os.environ, **variables},
        check=True,
        capture_output=True,
        text=True,
    )
    return int(result.stdout.splitlines()[-1])


@pytest.mark.skipif(
    not (SETTING.exists() and "[madvise]" in SETTING.read_text()),
    reason=f"{SETTING} gives large pages to all processes, or to none",
)
def test_training_uses_large_pages_unless_the_user_has_set_them(tmp_path: Path) -> None:
    for name in ("default", "set"):
        (tmp_path / name).mkdir()
    assert large_page_kilobytes(tmp_path / "default") > 1 << 15
    assert large_page_kilobytes(tmp_path / "set", THP_MEM_ALLOC_ENABLE="0") == 0
