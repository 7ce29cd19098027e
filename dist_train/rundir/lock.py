"""One launch at a time in a run directory.

The lock is the kernel's, on a file in the directory (flock): it ends with the process that holds it, however that
ends. Over NFS it is held at the server, which releases a dead node's locks when its lease ends.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from dist_train.outcome import UsageError

PATIENCE_SECONDS = 5.0
"""A process that was killed may need a moment to be gone."""
LEASE_SECONDS = 150.0
"""As long as an NFS server may keep the lock of a node that has died: its lease, usually 90 s, and some more."""

_POLL_SECONDS = 0.05
_WITHOUT_LOCKS = frozenset({errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL})
_LONGEST = 4096
_logger = logging.getLogger("dist_train.training")


@dataclass(frozen=True)
class Holder:
    """The holder of the lock, and since when (ISO 8601 in UTC)."""

    host: str
    pid: int
    since: str
    slurm_job: str = ""


class RunLock:
    """A run directory held by this process, until `release` or its end."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self._path = path
        self._descriptor = descriptor
        self._identity = _identity(os.fstat(descriptor))

    def check(self) -> None:
        """Raise OSError where the run directory is no longer the one that was locked: gone, moved, or made anew."""
        if _identity(os.stat(self._path)) != self._identity:
            raise OSError(errno.ESTALE, "the run directory was moved away and made anew", str(self._path.parent))

    def release(self) -> None:
        """Release the lock; the file stays, since deleting it would let two in."""
        os.close(self._descriptor)


class LockRequest:
    """A wish for the lock of the run directory `root`, whose lock file is `path`.

    It waits `patience` seconds for another process to be gone; `lease` where it is of an earlier start of this same
    Slurm job, on another node: Slurm has seen it end, only the file server may not know yet.
    """

    def __init__(
        self, root: Path, path: Path, *, patience: float = PATIENCE_SECONDS, lease: float = LEASE_SECONDS
    ) -> None:
        """Begin to wait."""
        self._root = root
        self._path = path
        self._patience = patience
        self._lease = lease
        self._begun = time.monotonic()
        self._is_announced = False

    def wait(self, seconds: float) -> RunLock | None:
        """Return the lock; None where, after so many seconds, its holder may still go.

        Raises:
            UsageError: another launch is at work there; the text names it.
            OSError: the file cannot be made.
        """
        until = time.monotonic() + seconds
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            while not try_to_lock(descriptor, self._path):
                now = time.monotonic()
                self._refuse_or_announce(_read(descriptor), now - self._begun)
                if now >= until:
                    os.close(descriptor)
                    return None
                time.sleep(_POLL_SECONDS)
            with suppress(OSError):  # on a full disk nobody can be named, and the lock holds all the same
                _write(descriptor)
            return RunLock(self._path, descriptor)
        except BaseException:
            os.close(descriptor)
            raise

    def _refuse_or_announce(self, holder: Holder | None, waited: float) -> None:
        is_predecessor = _is_predecessor(holder)
        if waited >= (self._lease if is_predecessor else self._patience):
            raise UsageError(_refusal(self._root, holder), code="run-in-use")
        if is_predecessor and not self._is_announced:
            self._is_announced = True
            _logger.warning("waiting up to %g s for the lock of %s, held by %s", self._lease, self._root, _name(holder))


def read_holder(path: Path) -> Holder | None:
    """Return who holds the lock at `path`; None where nobody does, or it is not known."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _read(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)
    return None


def try_to_lock(descriptor: int, path: Path) -> bool:
    """Lock the file at `path`, open as `descriptor`; False where another process holds it. A file system without locks
    is passed over with a warning. Raises OSError.
    """
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


def _write(descriptor: int) -> None:
    now = datetime.now(UTC).isoformat(timespec="seconds")
    holder = Holder(socket.gethostname(), os.getpid(), now, os.environ.get("SLURM_JOB_ID", ""))
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(asdict(holder)).encode() + b"\n", 0)


def _read(descriptor: int) -> Holder | None:
    try:
        fields = json.loads(os.pread(descriptor, _LONGEST, 0))
        return Holder(str(fields["host"]), int(fields["pid"]), str(fields["since"]), str(fields["slurm_job"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _is_predecessor(holder: Holder | None) -> bool:
    job = os.environ.get("SLURM_JOB_ID", "")
    return holder is not None and job != "" and holder.slurm_job == job and holder.host != socket.gethostname()


def _name(holder: Holder | None) -> str:
    if holder is None:
        return "another process"
    job = f", Slurm job {holder.slurm_job}" if holder.slurm_job else ""
    return f"process {holder.pid} on {holder.host}{job}, since {holder.since}"


def _refusal(root: Path, holder: Holder | None) -> str:
    return (
        f"{root} is in use by {_name(holder)}: two launches must not write into one run directory; "
        f"wait for it or end it, or choose another by run.name or --run-dir"
    )


def _identity(stats: os.stat_result) -> tuple[int, int]:
    return stats.st_dev, stats.st_ino
