"""Which process uses a run directory: the lock that lets only one launch at a time use it, and whether a process runs.

The lock is a kernel lock (flock) on a file in the directory: it ends with its process, however that ends. Over NFS the
server holds it, and releases a dead node's locks when its lease expires.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

from dist_train.outcome import FaultError, UsageError

if TYPE_CHECKING:
    from dist_train.rundir.paths import RunDirectory  # which loads pydantic; the exporter does without

PATIENCE_SECONDS = 5.0  # a killed process may take a moment to end
LEASE_SECONDS = 150.0  # how long an NFS server may keep the lock of a dead node: its lease, usually 90 s, and a margin

_POLL_SECONDS = 0.05
_FLAGS = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
_WITHOUT_LOCKS = frozenset({errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL})
_LONGEST_HOLDER = 4096
_logger = logging.getLogger("dist_train.training")


@dataclass(frozen=True)
class Holder:
    """The process that holds the lock, and since when (ISO 8601, UTC)."""

    host: str
    pid: int
    since: str
    slurm_job: str = ""


class RunLock:
    """A run directory held by this process, until `release` or its end."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self._path = path
        self._descriptor = descriptor
        self._checking = Lock()
        self._holder = _read_holder(descriptor)  # this process, unless the disk was full
        # open, so that no other folder gets its inode
        self._folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def check(self) -> None:
        """Raise OSError if the run directory is no longer the locked one: removed, moved, replaced or locked anew.

        From any thread. A file server may have given the lock to another launch while this node was cut off. A lock
        file that was deleted by itself, by a person or where old files are purged, is made again.
        """
        _check_same(self._path.parent, os.fstat(self._folder))
        with self._checking:
            try:
                is_ours = os.path.samestat(os.stat(self._path), os.fstat(self._descriptor))
            except FileNotFoundError:
                is_ours = self._make_again()
            is_held = is_ours and self._is_held()
        if not is_held:
            raise OSError(errno.ESTALE, "another launch has locked the run directory", str(self._path.parent))
        with suppress(OSError):
            os.utime(self._descriptor)  # as young as the run's other files, for those who purge old ones

    def _is_held(self) -> bool:
        """Lock the file again, which changes nothing while it is locked; return False if another launch did that."""
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno not in _WITHOUT_LOCKS:
                raise
        return _read_holder(self._descriptor) in (None, self._holder)  # that launch may have ended

    def _make_again(self) -> bool:
        """Make and lock the file; return False if another process has locked it at once."""
        descriptor = os.open(self._path, _FLAGS | os.O_EXCL, 0o600)
        try:
            if is_ours := try_to_lock(descriptor, self._path):
                _logger.warning("%s was deleted, and is made again: it keeps other launches out", self._path)
                with suppress(OSError):
                    _write_holder(descriptor)
                os.dup2(descriptor, self._descriptor, inheritable=False)
                self._holder = _read_holder(descriptor)
            return is_ours
        finally:
            os.close(descriptor)

    def release(self) -> None:
        """Release the lock; the file stays, since deleting it would let two processes in."""
        os.close(self._descriptor)
        os.close(self._folder)


def check_of_run(directory: RunDirectory) -> Callable[[], None]:
    """Return a function that raises OSError once the run directory has been removed, moved or replaced.

    It is for any process of the launch that holds the lock now; if there is no directory, it does nothing.
    """
    try:
        return partial(_check_same, directory.root, os.stat(directory.root))
    except OSError:
        return lambda: None


def _check_same(folder: Path, before: os.stat_result) -> None:
    if not os.path.samestat(os.stat(folder), before):
        raise OSError(errno.ESTALE, "the run directory was moved away and replaced", str(folder))


@dataclass(eq=False)
class LockRequest:
    """A request for the lock of a run directory.

    It waits `patience` seconds for the holder to end; `lease` seconds if that is an earlier start of the same Slurm job
    on another node: Slurm has seen it end, but the file server may not know yet.
    """

    directory: RunDirectory
    patience: float = PATIENCE_SECONDS
    lease: float = LEASE_SECONDS

    def __post_init__(self) -> None:
        self._begun = time.monotonic()
        self._is_announced = False

    def wait(self, seconds: float) -> RunLock | None:
        """Return the lock; None if its holder has not ended after `seconds`, but may still do so in time.

        Raises UsageError if another launch uses the directory, FaultError if it is one of this Slurm job; the message
        names it; OSError if the lock file cannot be made.
        """
        until = time.monotonic() + seconds
        path = self.directory.lock
        descriptor = os.open(path, _FLAGS, 0o600)
        try:
            while not try_to_lock(descriptor, path):
                now = time.monotonic()
                self._refuse_or_announce(_read_holder(descriptor), now - self._begun)
                if now >= until:
                    os.close(descriptor)
                    return None
                time.sleep(_POLL_SECONDS)
            with suppress(OSError):  # on a full disk the lock holds without naming its holder
                _write_holder(descriptor)
            return RunLock(path, descriptor)
        except BaseException:
            os.close(descriptor)
            raise

    def _refuse_or_announce(self, holder: Holder | None, waited: float) -> None:
        job = os.environ.get("SLURM_JOB_ID", "")
        is_of_job = holder is not None and holder.slurm_job == job != ""
        is_predecessor = holder is not None and is_of_job and holder.host != socket.gethostname()
        if waited >= (self.lease if is_predecessor else self.patience):
            # at a later start the lock of a lost node is free, and that of a killed rank that takes long to end
            kind = FaultError if is_of_job else UsageError
            raise kind(
                f"{self.directory.root} is in use by {_holder_name(holder)}: two launches must not write into one run "
                f"directory; wait for it or end it, or choose another by run.name or --run-dir",
                code="run-in-use",
            )
        if is_predecessor and not self._is_announced:
            self._is_announced = True
            root, name = self.directory.root, _holder_name(holder)
            _logger.warning("waiting up to %g s for the lock of %s, held by %s", self.lease, root, name)


def is_locked(path: Path) -> bool | None:
    """Whether a process holds the lock at `path`; None without such a file or on a file system without locks."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return None
    return False


def read_holder(path: Path) -> Holder | None:
    """Return the holder of the lock at `path`; None if nobody holds it, or the holder is unknown."""
    with suppress(OSError), path.open("rb") as file:
        return _read_holder(file.fileno()) if is_locked(path) else None
    return None


def try_to_lock(descriptor: int, path: Path) -> bool:
    """Lock the file; return False if another process holds it. Raises OSError. Without locks: warn, return True."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _WITHOUT_LOCKS:
            raise
        _logger.warning(
            "%s: this file system has no locks (%s); nothing but you keeps a second job out of the run directory",
            path,
            error.strerror,
        )
    return True


def _write_holder(descriptor: int) -> None:
    now = datetime.now(UTC).isoformat(timespec="seconds")
    holder = Holder(socket.gethostname(), os.getpid(), now, os.environ.get("SLURM_JOB_ID", ""))
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(asdict(holder)).encode() + b"\n", 0)


def _read_holder(descriptor: int) -> Holder | None:
    try:
        fields = json.loads(os.pread(descriptor, _LONGEST_HOLDER, 0))
        return Holder(str(fields["host"]), int(fields["pid"]), str(fields["since"]), str(fields["slurm_job"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _holder_name(holder: Holder | None) -> str:
    if holder is None:
        return "another process"
    job = f", Slurm job {holder.slurm_job}" if holder.slurm_job else ""
    return f"process {holder.pid} on {holder.host}{job}, since {holder.since}"


def pid_namespace() -> str:
    """Return the PID namespace of this process, which may be a container's; empty if it is unknown."""
    with suppress(OSError):
        return os.readlink("/proc/self/ns/pid")
    return ""


def process_start(pid: int) -> int | None:
    """Return the start of process `pid` in clock ticks since boot; None if it is gone or a zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    fields = stat.rpartition(b")")[2].split()
    return None if fields[0] in b"ZX" else int(fields[19])


def process_runs(pid: int, seen: float) -> bool:
    """Whether process `pid` runs and is the one last seen at `seen` (seconds since 1970), not a reused PID."""
    start = process_start(pid)
    if start is None:
        return False
    boot = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
    # 2 s, in case the clock was adjusted since
    return boot + start / os.sysconf("SC_CLK_TCK") <= seen + 2.0
