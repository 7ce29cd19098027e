"""A start looks for no garbage, and sets the allocator; cores are those of the container."""

from __future__ import annotations

import ctypes
import gc
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest

import dist_train
from dist_train import start_up
from dist_train.cluster.local_launch import rank_environment
from dist_train.launching.doctor import check_devices
from dist_train.start_up import keep_freed_memory, own_command, usable_cores, use_large_pages, without_collection
from dist_train.sweep.sweep import threads_per_rank
from dist_train.training.compute import share_of_threads
from tests.unit.simulated_ranks import results


@pytest.fixture(autouse=True)
def _collection_as_before() -> Iterator[None]:
    was_enabled = gc.isenabled()
    yield
    if was_enabled:
        gc.enable()
    else:
        gc.disable()


@pytest.mark.parametrize("others", ["", "/elsewhere"])
def test_no_file_of_the_current_folder_replaces_the_program_or_one_of_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, others: str
) -> None:
    for name in ("dist_train", "queue"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit(7)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", others)
    printed = subprocess.run(own_command("--version"), capture_output=True, text=True, check=True).stdout
    assert printed == f"dist-train {dist_train.__version__}\n"


def test_every_process_of_the_program_is_started_so() -> None:
    package = Path(start_up.__file__).parent
    starting = [path.name for path in package.rglob("*.py") if '"-m", "dist_train"' in path.read_text()]
    assert starting == ["start_up.py"]


def test_nothing_is_collected_in_the_block() -> None:
    gc.enable()
    with without_collection():
        assert not gc.isenabled()
    assert gc.isenabled()


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


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 8),
        ({"cpu.max": "max 100000\n"}, 8),
        ({"cpu.max": "350000 100000\n"}, 3),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu.max": "1600000 100000\n"}, 8),
        ({"cpu/cpu.cfs_quota_us": "200000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 2),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8),
    ],
)
def test_cores_are_those_of_a_container_s_quota(
    files: Mapping[str, str], cores: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(start_up, "_CGROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    assert usable_cores() == cores


def test_cores_are_counted_before_openmp_binds_the_main_thread() -> None:
    code = "from dist_train.start_up import usable_cores; before = usable_cores(); import torch"
    code += "; assert usable_cores() == before"
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "OMP_PROC_BIND": "true"}, check=True)


def test_threads_of_every_start_follow_the_quota(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "cpu.max").write_text("400000 100000\n")
    monkeypatch.setattr(start_up, "_CGROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(64)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert results(2, share_of_threads) == [2, 2]
    assert threads_per_rank(jobs=2, ranks=1) == 2
    assert rank_environment({}, 0, 2, {})["OMP_NUM_THREADS"] == "2"
    assert "4 CPU cores" in check_devices("cpu").detail


def test_pages_of_512_mib_are_not_requested(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "size").write_text("536870912\n")
    monkeypatch.setattr(start_up, "_LARGE_PAGE", tmp_path / "size")
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE", raising=False)
    assert not use_large_pages()
