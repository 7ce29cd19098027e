"""The versions of software on this machine, and what ranks communicate by: Horovod's build, MPI, the launchers."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from importlib import metadata
from pathlib import Path

import dist_train
from dist_train.cluster.launch import command_output
from dist_train.outcome import UsageError

_LONGEST_MPI_VERSION = 8192  # MPI_MAX_LIBRARY_VERSION_STRING of MPICH; that of Open MPI is 256
_GIT_SECONDS = 5.0


def installed_version(package: str) -> str:
    """Return the version of `package`, which is not imported: that would take seconds; empty if it is missing."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def revision(root: Path = Path(dist_train.__file__).parents[1]) -> str:
    """Return dist_train's version, and its commit if `root` is a git repository: `0.1.0 (063e7bc-dirty)`."""
    commit = ""
    if (root / ".git").exists():
        # git describe must not write to a repository that others may share.
        git = ("git", "--no-optional-locks", "-C", str(root))
        describe = ("describe", "--always", "--dirty", "--exclude=*")
        # In hooks, GIT_DIR and GIT_INDEX_FILE would name another repository whatever -C says. GIT_CONFIG_* may say that
        # a repository of another user is safe.
        kept = {name: value for name, value in os.environ.items() if not re.match("GIT_(?!CONFIG)", name)}
        commit = command_output(*git, *describe, seconds=_GIT_SECONDS, env=kept)
    return f"{dist_train.__version__} ({commit})" if commit else dist_train.__version__


def recovers_on_gpus(torch_version: str) -> bool:
    """Whether a run on GPUs can continue without a lost rank with this version of torch.

    That needs non-blocking NCCL groups. Before torch 2.10, its threads call NCCL for the same group at the same time,
    which may hang (pytorch#169484).
    """
    return tuple(map(int, re.findall(r"\d+", torch_version)[:2])) >= (2, 10)


def check_recovery(device_type: Callable[[], str]) -> None:
    """Raise UsageError if ranks that may be lost compute on GPUs (cuda), and torch is too old to continue without them.

    `device_type` is not called, and torch not loaded, if torch is new enough.
    """
    version = installed_version("torch")
    if not recovers_on_gpus(version) and device_type() == "cuda":
        raise UsageError(
            f"continuing without lost ranks (--min-ranks, --restarts, launch.min_ranks) on GPUs needs torch 2.10 or "
            f"newer, not {version or 'an unknown version'}: update torch, or leave these options out; then a lost "
            f"rank ends the run, and the same command resumes it",
            code="torch-too-old",
        )


def horovod_build() -> dict[str, bool]:
    """Return what Horovod was built with: MPI, Gloo, NCCL. Raises ImportError."""
    try:
        import horovod.torch as hvd
    except (OSError, RuntimeError, ValueError) as error:
        raise ImportError(str(error)) from error
    return {"MPI": bool(hvd.mpi_built()), "Gloo": bool(hvd.gloo_built()), "NCCL": bool(hvd.nccl_built())}


def mpi_library() -> str:
    """Return the MPI library that mpi4py loads, without initializing it; raise ImportError if either is missing."""
    import mpi4py

    starts_mpi = mpi4py.rc.initialize
    mpi4py.rc.initialize = False
    try:
        from mpi4py import MPI
    except RuntimeError as error:
        raise ImportError(str(error)) from error
    finally:
        mpi4py.rc.initialize = starts_mpi
    return _first_part(MPI.Get_library_version())


def loaded_mpi_libraries() -> frozenset[Path]:
    """Return the files of the MPI libraries that this process has loaded; more than one is a fault."""
    lines = Path("/proc/self/maps").read_text(errors="surrogateescape").splitlines()
    mapped = (line.split(maxsplit=5) for line in lines if "libmpi.so" in line)
    files = {Path(fields[5]).resolve() for fields in mapped if len(fields) == 6}
    return frozenset(file for file in files if file.name.startswith("libmpi.so"))


def loaded_mpi_version() -> str:
    """Return the name and version of the MPI library that this process has loaded; empty if unknown."""
    text, length = ctypes.create_string_buffer(_LONGEST_MPI_VERSION), ctypes.c_int()
    for file in sorted(loaded_mpi_libraries()):
        # the file was replaced since, or the library is older than MPI 3
        with suppress(OSError, AttributeError):
            ctypes.CDLL(str(file)).MPI_Get_library_version(text, ctypes.byref(length))
            return _first_part(text.value.decode(errors="replace"))
    return ""


def launcher(name: str) -> Path | None:
    """Return the program `name` (horovodrun, mpirun) of this Python environment, else the one on the PATH."""
    recorded = ""
    with suppress(OSError):  # `make setup` records what it has found
        lines = (Path(sys.prefix) / "setup.env").read_text(encoding="utf-8").splitlines()
        recorded = next((line.removeprefix(f"{name}=") for line in lines if line.startswith(f"{name}=")), "")
    found = next(filter(None, map(shutil.which, (recorded, str(Path(sys.prefix) / "bin" / name), name))), None)
    return Path(found) if found else None


def _first_part(version: str) -> str:
    return version.split(",")[0].rstrip("\0 \n")
