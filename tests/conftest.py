"""Fixtures of all tests: each test has its own home, cache, temporary files and current folder."""

from __future__ import annotations

import gc
import os
import re
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

pytest.register_assert_rewrite("tests.launching")

ROOT = Path(__file__).parents[1]

# On a machine with GPUs, too, the tests are for CPUs, but where `make gpu` runs some. To be set before torch looks.
if any(Path("/dev").glob("nvidia[0-9]*")) and "DIST_TRAIN_TEST_GPU" not in os.environ:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

# Tests share the cores, and by default OpenMP's threads spin while they wait: some tests took three times as long.
# To be set before torch is loaded, and inherited by what the tests start.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# No deadline and no database: results depend on neither the machine's speed nor earlier sessions.
settings.register_profile(
    "hermetic", deadline=None, database=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("hermetic")

_CALLER_VARIABLES = re.compile(
    r"(DIST_TRAIN|SLURM|SBATCH|SALLOC|SRUN|PMIX?|OMPI|PRTE|HOROVOD|NCCL|XDG|GIT)_(?!.*PICTURES$).*"
    r"|(TORCHELASTIC|PET|MASTER|LOCAL|GROUP|ROLE)_\w+|RANK|WORLD_SIZE"
    r"|(OMP|MKL)_NUM_THREADS|CUBLAS_WORKSPACE_CONFIG|COLUMNS|LINES|TERM|NO_COLOR|FORCE_COLOR|TTY_\w+"
)
"""Variables that would change the programs under test; `DIST_TRAIN_PICTURES` only says where pictures are written."""

_FOLDERS = {"HOME": "home", "XDG_CACHE_HOME": "cache", "TMPDIR": "tmp"}

_BACKGROUND_SIGNALS = (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP)
"""Signals that programs started with a shell's `&` or nohup ignore."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int | None:
    """Return what `-n auto` means: a process for each core that this one may use, at most 16: each loads torch."""
    # xdist would count all cores of the machine where psutil is installed.
    asked = "PYTEST_XDIST_AUTO_NUM_WORKERS" in os.environ
    return None if asked else min(16, len(os.sched_getaffinity(0)))


def pytest_collection_finish() -> None:
    """Exempt what has been imported from garbage collection, which every run in this process begins with."""
    gc.collect()
    gc.freeze()


@contextmanager
def _isolated_in(folder: Path) -> Iterator[None]:
    """Put home, cache, temporary files and the current folder into `folder`; restore all environment variables after.

    This includes variables that the program sets in this process, which would otherwise affect later tests.
    """
    environment = dict(os.environ)
    with pytest.MonkeyPatch.context() as patch:
        for variable, name in _FOLDERS.items():
            (folder / name).mkdir()
            os.environ[variable] = str(folder / name)
        patch.setattr(tempfile, "tempdir", os.environ["TMPDIR"])
        patch.chdir(folder)
        try:
            yield
        finally:
            os.environ.clear()
            os.environ.update(environment)


@pytest.fixture(scope="session", autouse=True)
def _session_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Isolate the fixtures of modules and sessions from user, checkout and batch system; yield their folder."""
    tmp_path_factory.getbasetemp()  # chosen by the TMPDIR of the caller
    # Not below pytest's own folder: paths of sockets, such as Open MPI's, have at most 107 characters.
    with tempfile.TemporaryDirectory(prefix="dt-", ignore_cleanup_errors=True) as name, _isolated_in(Path(name)):
        folder = Path(name)
        umask = os.umask(0o022)  # some tests look at permissions, or read as another user what this one wrote
        for variable in filter(_CALLER_VARIABLES.fullmatch, list(os.environ)):
            if variable not in _FOLDERS:
                del os.environ[variable]
        os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        os.environ["no_proxy"] = ",".join(["127.0.0.1,localhost,::1", *filter(None, [os.environ.get("no_proxy")])])
        os.environ["DIST_TRAIN_PYTHON"] = sys.executable  # for the launch scripts
        # Ranks that are killed leave files of 16 MiB behind, by default in /dev/shm.
        os.environ.update(OMPI_MCA_btl_sm_backing_directory=os.environ["TMPDIR"])
        # Slow to fill, and equal for all tests.
        for variable in ("MPLCONFIGDIR", "TORCHINDUCTOR_CACHE_DIR", "HYPOTHESIS_STORAGE_DIRECTORY"):
            os.environ[variable] = str(folder / "cache" / variable.lower())
        # Programs started from here inherit ignored signals, but not caught ones.
        ignored = [number for number in _BACKGROUND_SIGNALS if signal.getsignal(number) == signal.SIG_IGN]
        for number in ignored:
            signal.signal(number, lambda *_: None)
        yield folder
        for number in ignored:
            signal.signal(number, signal.SIG_IGN)
        os.umask(umask)


@pytest.fixture(autouse=True)
def _test_folder(_session_folder: Path) -> Iterator[None]:
    """Isolate each test: its own home, cache, temporary files and current folder."""
    with (
        tempfile.TemporaryDirectory(prefix="t", dir=_session_folder, ignore_cleanup_errors=True) as folder,
        _isolated_in(Path(folder)),
    ):
        yield


@pytest.fixture
def cache(_test_folder: None) -> Path:
    """The folder in which the package caches data during the test."""
    return Path(os.environ["XDG_CACHE_HOME"]) / "dist_train"


@pytest.fixture(scope="module")
def trained_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a tiny finished run, shared by the tests of a module."""
    # imported here, since tests of scripts and containers do without torch
    from dist_train.cluster.communicator import SingleProcess
    from tests.unit.small_trainers import build_trainer, small_config

    folder = tmp_path_factory.mktemp("trained") / "run"
    build_trainer(small_config(), folder, SingleProcess()).run()
    return folder


@pytest.fixture
def threads_as_before() -> Iterator[None]:
    """Restore torch's number of threads, which a run sets, after the test."""
    import torch

    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def one_thread(threads_as_before: None) -> None:
    """Compute with one thread during the test: small tensors are not worth waiting for others."""
    import torch

    torch.set_num_threads(1)
