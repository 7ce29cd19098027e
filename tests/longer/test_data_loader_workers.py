from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dist_train.data import loader_workers
from dist_train.data.decoding import Work
from dist_train.data.loader_workers import BatchJob, LoaderProcesses
from dist_train.launching.run import train
from dist_train.outcome import FaultError, UsageError
from tests.raising import raises
from tests.unit.image_folders import damage, write_folder, write_image
from tests.unit.image_sets import decode
from tests.unit.small_trainers import small_config
from tests.waiting import is_alive, wait_for, wait_until_gone

SIZE = 8
FILES = 120


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for number in range(FILES):
        write_image(folder / f"{number}.png", 10 + number % 7, 12, seed=number)
    return folder


@pytest.fixture
def loaders() -> Iterator[LoaderProcesses]:
    loaders = LoaderProcesses(2, (3, SIZE, SIZE))
    yield loaders
    loaders.close()


def job(folder: Path, *numbers: int) -> BatchJob:
    paths = [str(folder / f"{number}.png") for number in numbers]
    return BatchJob(numbers, len(numbers), lambda start, stop: Work(paths[start:stop], None))


def expected(folder: Path, *numbers: int) -> Tensor:
    return torch.from_numpy(np.stack([decode(str(folder / f"{number}.png"), SIZE, None) for number in numbers]))


def fetch(loaders: LoaderProcesses, request: BatchJob) -> Tensor:
    out = torch.empty(request.size, 3, SIZE, SIZE, dtype=torch.uint8)
    loaders.fetch(request, out, torch.zeros(request.size, dtype=torch.int64))
    return out


def fetch_for_ever(loaders: LoaderProcesses, request: BatchJob) -> None:
    while True:
        loaders.prefetch([request])
        fetch(loaders, request)


def pids_of(loaders: LoaderProcesses) -> list[int]:
    return [process.pid for process in loaders._processes]


def test_prefetched_batches_are_correct(folder: Path, loaders: LoaderProcesses) -> None:
    batches = [tuple(range(start, start + 40)) for start in range(0, FILES, 40)]
    loaders.prefetch(job(folder, *batch) for batch in batches)
    for batch in batches:
        assert torch.equal(fetch(loaders, job(folder, *batch)), expected(folder, *batch))


def test_unfetched_prefetches_lose_no_slot(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader_workers, "_MAX_IMAGES", 3)
    monkeypatch.setattr(loader_workers, "_MAX_SLOTS", 4)
    loaders = LoaderProcesses(2, (3, SIZE, SIZE))
    random = np.random.default_rng(0)
    try:
        for _ in range(60):
            batches = [tuple(map(int, random.integers(0, FILES, random.integers(1, 12)))) for _ in range(5)]
            loaders.prefetch(job(folder, *batch) for batch in batches)
            time.sleep(random.choice([0, 0.002, 0.01]))
            for index in sorted(random.choice(5, random.integers(0, 4))):
                batch = batches[index]
                assert torch.equal(fetch(loaders, job(folder, *batch)), expected(folder, *batch))
            if random.random() < 0.5:
                loaders.prefetch(job(folder, *batch) for batch in [(1, 2), *batches[2:]])
        assert torch.equal(fetch(loaders, job(folder, 5)), expected(folder, 5))
        assert len(loaders._free) + len(loaders._in_flight) == 4, "no slot is lost"
    finally:
        loaders.close()


def test_batches_that_wait_for_a_slot_cost_no_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader_workers, "_MAX_SLOTS", 4)
    loaders = LoaderProcesses(1, (3, SIZE, SIZE))
    try:
        loaders.prefetch(job(folder, number) for number in range(20))
        del loaders._batches[-1].parts  # an error if anything looks at them
        for number in range(10):
            assert torch.equal(fetch(loaders, job(folder, number)), expected(folder, number))
    finally:
        loaders.close()


def test_decoding_continues_in_the_background(folder: Path, loaders: LoaderProcesses) -> None:
    batches = [tuple(range(start, start + 60)) for start in (0, 60)]
    loaders.prefetch(job(folder, *batch) for batch in batches)
    fetch(loaders, job(folder, *batches[0]))

    def is_decoded() -> bool:
        loaders._receive()
        return all(part.is_done for part in loaders._batches[0].parts)

    wait_for(is_decoded, "the second batch")


def test_processes_start_lazily_and_stay(folder: Path, loaders: LoaderProcesses) -> None:
    assert pids_of(loaders) == []
    fetch(loaders, job(folder, 1))
    before = pids_of(loaders)
    fetch(loaders, job(folder, 2))
    assert len(before) == 2
    assert pids_of(loaders) == before


def test_loaders_start_with_a_python_that_is_built_for_an_old_system(
    folder: Path, loaders: LoaderProcesses, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "memfd_create")
    assert torch.equal(fetch(loaders, job(folder, 1)), expected(folder, 1))


def test_close_ends_the_processes_and_can_be_repeated(folder: Path, loaders: LoaderProcesses) -> None:
    loaders.prefetch([job(folder, *range(FILES))])
    pids = pids_of(loaders)
    loaders.close()
    loaders.close()
    assert not any(map(is_alive, pids))
    assert torch.equal(fetch(loaders, job(folder, 3)), expected(folder, 3)), "they start again when needed"


def test_a_run_that_is_refused_after_they_have_started_ends_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[subprocess.Popen[bytes]] = []

    def start(*arguments: Any, **options: Any) -> subprocess.Popen[bytes]:
        started.append(popen(*arguments, **options))
        return started[-1]

    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", start)
    images = {"name": "imagefolder", "root": write_folder(tmp_path / "images"), "classes": 3, "image_size": SIZE}
    data = {**images, "normalize": True, "loader_workers": 1}
    config = small_config(data=data, batch={"global_size": 8}, noise={"exclude": ["gone.*"]})
    with raises(UsageError, code="no-such-weight"):
        train(config, tmp_path / "run")
    assert [process.poll() for process in started] == [-signal.SIGKILL]


def test_damaged_image_is_reported_when_it_is_fetched(folder: Path, tmp_path: Path, loaders: LoaderProcesses) -> None:
    write_image(tmp_path / "0.png", 20, 20, seed=0)
    damage(tmp_path / "0.png")
    loaders.prefetch([job(folder, 1), job(tmp_path, 0)])
    fetch(loaders, job(folder, 1))
    with raises(FaultError, "image-unreadable"):
        fetch(loaders, job(tmp_path, 0))


@pytest.mark.parametrize("killed", [1, 2], ids=["one", "all"])
def test_killed_loader_raises_a_fault(folder: Path, loaders: LoaderProcesses, killed: int) -> None:
    fetch(loaders, job(folder, 1))
    for pid in pids_of(loaders)[:killed]:
        os.kill(pid, signal.SIGKILL)
    with raises(FaultError, "loader-ended"):
        fetch_for_ever(loaders, job(folder, *range(60)))


def test_loader_killed_while_decoding_raises_a_fault(folder: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "0.png")
    loaders = LoaderProcesses(1, (3, SIZE, SIZE))
    try:
        loaders.prefetch([job(tmp_path, 0)])
        with (tmp_path / "0.png").open("wb"):  # blocks until the loader opens it
            os.kill(pids_of(loaders)[0], signal.SIGKILL)
        with raises(FaultError, "loader-ended"):
            fetch(loaders, job(tmp_path, 0))
    finally:
        loaders.close()


def test_loaders_ignore_signals_to_the_whole_job(folder: Path, loaders: LoaderProcesses) -> None:
    loaders.prefetch([job(folder, 1)])
    for pid in pids_of(loaders):
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
            os.kill(pid, number)
    # The second batch is decoded after the signals.
    for batch in ((1,), tuple(range(60))):
        assert torch.equal(fetch(loaders, job(folder, *batch)), expected(folder, *batch))
    assert all(map(is_alive, pids_of(loaders)))
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


@pytest.mark.parametrize("busy", [True, False], ids=["busy", "idle"])
def test_no_loader_outlives_a_killed_training_process(folder: Path, busy: bool) -> None:
    script = f"""
import sys, time
from pathlib import Path
from tests.longer.test_data_loader_workers import LoaderProcesses, fetch, job, pids_of
loaders, folder = LoaderProcesses(2, (3, {SIZE}, {SIZE})), Path({str(folder)!r})
fetch(loaders, job(folder, 1))
if {busy}:
    loaders.prefetch(job(folder, *(list(range({FILES})) * 20)) for _ in range(1))
print(*pids_of(loaders), flush=True)
time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    pids = [int(pid) for pid in process.stdout.readline().split()]
    assert len(pids) == 2
    assert all(map(is_alive, pids))
    process.kill()
    process.communicate()
    wait_until_gone(pids)
