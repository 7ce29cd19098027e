"""What tests of all folders share: the surroundings that each of them runs in, which are nobody else's."""

from __future__ import annotations

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

ROOT = Path(__file__).parents[1]

# No deadline and no database: what a test finds depends on neither the machine's speed nor an earlier session.
settings.register_profile(
    "hermetic", deadline=None, database=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("hermetic")

_OF_THE_CALLER = re.compile(
    r"(DIST_TRAIN|SLURM|SBATCH|SALLOC|SRUN|PMIX?|OMPI|PRTE|HOROVOD|NCCL|XDG)_(?!.*PICTURES$).*"
    r"|(OMP|MKL)_NUM_THREADS|CUBLAS_WORKSPACE_CONFIG|COLUMNS|LINES|NO_COLOR|FORCE_COLOR|TTY_\w+"
)
"""Variables that would change what the programs under test do; `DIST_TRAIN_PICTURES` only says where pictures go."""

_PLACES = {"HOME": "home", "XDG_CACHE_HOME": "cache", "TMPDIR": "tmp"}

_SIGNALS_OF_A_BACKGROUND = (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP)
"""What a shell's `&` and nohup let their programs ignore."""


@contextmanager
def _own_places_in(folder: Path) -> Iterator[None]:
    """A home, a cache, temporary files and the current folder in `folder`; afterwards all variables are as before.

    Also those that the program sets in its own process, which would otherwise reach the tests after.
    """
    environment = dict(os.environ)
    with pytest.MonkeyPatch.context() as patch:
        for variable, name in _PLACES.items():
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
def _surroundings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Clean surroundings for the fixtures of whole modules and sessions; gives their folder.

    The program finds nothing there of the user, the checkout or the batch system, and leaves nothing in their places.
    """
    tmp_path_factory.getbasetemp()  # chosen by the TMPDIR of the caller
    # Not below pytest's own folder: the paths of sockets, such as Open MPI's, have at most 107 characters.
    with tempfile.TemporaryDirectory(prefix="dt-", ignore_cleanup_errors=True) as name, _own_places_in(Path(name)):
        folder = Path(name)
        for variable in filter(_OF_THE_CALLER.fullmatch, list(os.environ)):
            if variable not in _PLACES:
                del os.environ[variable]
        os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        os.environ["no_proxy"] = ",".join(["127.0.0.1,localhost,::1", *filter(None, [os.environ.get("no_proxy")])])
        os.environ["DIST_TRAIN_PYTHON"] = sys.executable  # for the launch scripts
        # Slow to fill, and the same for every test.
        for variable in ("MPLCONFIGDIR", "TORCHINDUCTOR_CACHE_DIR", "HYPOTHESIS_STORAGE_DIRECTORY"):
            os.environ[variable] = str(folder / "cache" / variable.lower())
        # A signal that is ignored stays so in every program started from here; one that is caught does not.
        ignored = [number for number in _SIGNALS_OF_A_BACKGROUND if signal.getsignal(number) == signal.SIG_IGN]
        for number in ignored:
            signal.signal(number, lambda *_: None)
        yield folder
        for number in ignored:
            signal.signal(number, signal.SIG_IGN)


@pytest.fixture(autouse=True)
def _own_places(_surroundings: Path) -> Iterator[None]:
    """A home, a cache, temporary files and a current folder for each test."""
    with (
        tempfile.TemporaryDirectory(prefix="t", dir=_surroundings, ignore_cleanup_errors=True) as folder,
        _own_places_in(Path(folder)),
    ):
        yield


@pytest.fixture(scope="module")
def trained_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a tiny run that has finished; a module's tests share it."""
    # here, since tests of scripts and containers do without torch
    from dist_train.cluster.communicator import Alone
    from tests.unit.small_trainers import build_trainer, small_config

    folder = tmp_path_factory.mktemp("trained") / "run"
    build_trainer(small_config(), folder, Alone()).run()
    return folder


@pytest.fixture
def threads_as_before() -> Iterator[None]:
    """Afterwards torch has its threads again: a run sets as many as its settings say."""
    import torch

    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
