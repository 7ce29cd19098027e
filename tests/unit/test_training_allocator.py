"""Freed memory stays with the process: arrays of the same size cost no new pages."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(
    "glibc" not in (os.confstr("CS_GNU_LIBC_VERSION") or ""), reason="the setting is one of glibc's allocator"
)

# Sixteen times an array of 64 MiB (16,384 pages), freed each time.
PROGRAM = """
import resource
from dist_train.training.allocator import keep_freed_memory
{call}
SIZE = 1 << 26
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
b"x" * SIZE
before = faults()
for _ in range(16):
    b"x" * SIZE
print(kept, faults() - before)
"""


def kept_and_faults(call: str, **variables: str) -> tuple[str, int]:
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(call=call)],
        env={**os.environ, **variables},
        check=True,
        capture_output=True,
        text=True,
    )
    kept, faults = result.stdout.split()
    return kept, int(faults)


def test_an_array_reuses_the_pages_of_the_freed_one() -> None:
    _, without = kept_and_faults("kept = None")
    kept, faults = kept_and_faults("kept = keep_freed_memory()")
    assert kept == "True"
    assert faults < 1000
    assert without > 1000, "the test's own reason is gone: pages are reused without it"


@pytest.mark.parametrize(
    "variables",
    [{"MALLOC_MMAP_THRESHOLD_": "1000000"}, {"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=1000000"}],
)
def test_what_the_user_has_set_stays(variables: dict[str, str]) -> None:
    kept, faults = kept_and_faults("kept = keep_freed_memory()", **variables)
    assert kept == "False"
    assert faults > 1000
