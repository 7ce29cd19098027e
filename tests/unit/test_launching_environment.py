"""What a launch records of what it runs on."""

from __future__ import annotations

import json
import mmap
import os
import platform
import re
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch

import dist_train
from dist_train.cluster import inspection
from dist_train.cluster.communicator import Communicator, SingleProcess
from dist_train.cluster.devices import device_name
from dist_train.cluster.inspection import horovod_build, installed_version, loaded_mpi_version, mpi_library, revision
from dist_train.config import Config
from dist_train.launching.run import train
from dist_train.launching.session import Session
from dist_train.monitoring.observers import Observers
from dist_train.outcome import FaultError
from dist_train.rundir.metrics_file import read_records
from dist_train.rundir.paths import RunDirectory
from dist_train.rundir.records import EventRecord
from dist_train.rundir.status import read_status
from dist_train.training.consistency import kernels_on, launch_environment
from tests.unit.simulated_ranks import results
from tests.unit.small_trainers import small_config

CPU = torch.device("cpu")


def test_the_versions_are_those_of_what_computes() -> None:
    horovod_build()  # loads MPI, as a launch over MPI does
    assert launch_environment("1.0 (abc)", "mpi", "a card, another", {"Triton": "3.1"}) == {
        "dist_train": "1.0 (abc)",
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": metadata.version("torchvision"),
        "timm": installed_version("timm") or "not installed",
        "Triton": "3.1",
        "Horovod": metadata.version("horovod"),
        "MPI": mpi_library(),
        "NumPy": np.__version__,
        "device": "a card, another",
    }


@pytest.mark.parametrize("controller", ["gloo", "alone"])
def test_mpi_that_does_not_carry_the_ranks_is_not_told_as_used(controller: str) -> None:
    assert launch_environment("", controller, "", {})["MPI"] == f"not used ({controller})"


def test_the_loaded_mpi_is_the_one_that_mpi4py_describes() -> None:
    horovod_build()
    assert loaded_mpi_version() == mpi_library()


def test_a_mapped_file_whose_name_is_no_utf8_hides_no_mpi(tmp_path: Path) -> None:
    horovod_build()
    name = os.fsencode(tmp_path) + b"/caf\xe9"
    with open(name, "wb+") as file:
        file.truncate(1)
        with mmap.mmap(file.fileno(), 1):
            assert loaded_mpi_version() == mpi_library()


def test_an_mpi_that_does_not_tell_its_version_is_unknown_and_no_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import _ctypes

    files = frozenset({tmp_path / "libmpi.so.40 (deleted)", Path(_ctypes.__file__)})
    monkeypatch.setattr(inspection, "loaded_mpi_libraries", lambda: files)
    assert loaded_mpi_version() == ""
    assert launch_environment("", "mpi", "", {})["MPI"] == "unknown"


def test_a_package_that_is_missing_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(package: str) -> str:
        raise metadata.PackageNotFoundError(package)

    monkeypatch.setattr(metadata, "version", missing)
    assert launch_environment("", "alone", "", {})["Horovod"] == "not installed"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("finished")
    train(updates(1), folder)
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """The folder of a finished run that is the test's own."""
    return shutil.copytree(finished, tmp_path / "run")


def updates(number: int) -> Config:
    return small_config(run={"max_steps": number})


def test_a_run_records_what_it_ran_on(finished: Path) -> None:
    recorded = json.loads((finished / "status.json").read_text())["environment"]
    assert recorded == launch_environment(revision(), "alone", device_name(CPU), kernels_on("cpu"))


def test_a_resume_on_a_device_of_another_model_is_warned_of(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = run / "status.json"
    status = json.loads(path.read_text())
    status["environment"]["device"] = "another model"
    path.write_text(json.dumps(status))
    for number, warnings in ((1, 0), (2, 1), (3, 1)):  # the first has nothing to do
        assert train(updates(number), run).state == "finished"
        assert caplog.text.count("devices differ") == warnings
    assert f"({device_name(CPU)}; before: another model)" in caplog.text


def test_a_resume_with_other_versions_is_warned_of_and_recorded(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = run / "status.json"
    status = json.loads(path.read_text())
    del status["environment"]["timm"]  # as of an earlier version, which did not name it
    status["environment"] |= {"torch": "1.2.3", "CPU kernels": "other", "MPI": "other"}
    path.write_text(json.dumps(status))
    for number, warnings in ((1, 0), (2, 1), (3, 1)):  # the first has nothing to do
        assert train(updates(number), run).state == "finished"
        assert caplog.text.count("may round differently") == warnings
    records = read_records(run / "metrics.jsonl")
    (changed,) = [each for each in records if isinstance(each, EventRecord) and each.event == "versions_changed"]
    assert changed.details["before"] == "torch 1.2.3, CPU kernels other"
    assert changed.details["now"] == f"torch {torch.__version__}, CPU kernels {kernels_on('cpu')['CPU kernels']}"


def test_a_launch_that_fails_before_it_trains_leaves_what_the_one_before_recorded(run: Path) -> None:
    before = read_status(run / "status.json")
    session = Session(RunDirectory(run), SingleProcess(), Observers())
    session.fail(FaultError("no data"))
    after = read_status(run / "status.json")
    assert before is not None
    assert after is not None
    assert (after.state, after.environment) == ("failed", before.environment)
    assert after.environment


def test_another_rank_s_fault_leaves_what_rank_0_recorded(run: Path) -> None:
    def launch(comm: Communicator) -> None:
        session = Session(RunDirectory(run), comm, Observers())
        comm.barrier()
        if comm.rank == 1:
            session.fail(FaultError("its disk is gone"))

    results(2, launch)
    after = read_status(run / "status.json")
    assert after is not None
    assert after.reason == "rank 1: its disk is gone"
    assert after.environment


def test_a_status_whose_environment_is_none_is_no_status(run: Path) -> None:
    path = run / "status.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "environment": 5}))
    assert read_status(path) is None
    assert train(updates(1), run).state == "finished"


needs_git = pytest.mark.skipif(not shutil.which("git"), reason="needs git")


def git(folder: Path, *arguments: str) -> None:
    identity = ("-c", "user.name=someone", "-c", "user.email=someone@example.org")
    # GIT_DIR, which git sets for hooks, would name another repository whatever -C says.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    subprocess.run(["git", "-C", str(folder), *identity, *arguments], env=environment, check=True, capture_output=True)


@needs_git
def test_the_revision_names_the_commit_and_whether_files_differ_from_it(tmp_path: Path) -> None:
    version = dist_train.__version__
    assert revision(tmp_path) == version, "no repository"
    git(tmp_path, "init")
    assert revision(tmp_path) == version, "no commit yet"
    (tmp_path / "file").write_text("1")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "-m", "first")
    git(tmp_path, "tag", "-m", "named", "v9")
    clean = revision(tmp_path)
    assert re.fullmatch(rf"{re.escape(version)} \([0-9a-f]{{7,}}\)", clean)
    (tmp_path / "file").write_text("2")
    assert revision(tmp_path) == f"{clean[:-1]}-dirty)"


@needs_git
@pytest.mark.parametrize(("variable", "value"), [("GIT_DIR", ".git"), ("GIT_INDEX_FILE", ".git/index")])
def test_in_a_hook_of_another_repository_the_revision_is_our_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    for name in ("ours", "other"):
        git(tmp_path, "init", name)
        (tmp_path / name / f"file-{name}").touch()
        git(tmp_path / name, "add", ".")
        git(tmp_path / name, "commit", "-m", name)
    git(tmp_path / "ours", "worktree", "add", "../worktree")
    expected = revision(tmp_path / "worktree")
    monkeypatch.setenv(variable, str(tmp_path / "other" / value))
    assert revision(tmp_path / "ours") == revision(tmp_path / "worktree") == expected != dist_train.__version__


@needs_git
def test_a_package_below_another_s_repository_is_not_of_that_commit(tmp_path: Path) -> None:
    git(tmp_path, "init")
    git(tmp_path, "commit", "--allow-empty", "-m", "another project")
    (tmp_path / "site-packages").mkdir()
    assert revision(tmp_path / "site-packages") == dist_train.__version__


def test_without_git_the_revision_is_the_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".git").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert revision(tmp_path) == dist_train.__version__
