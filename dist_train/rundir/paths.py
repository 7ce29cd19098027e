"""The files of a run directory and of a study's folder."""

from __future__ import annotations

import difflib
import errno
import hashlib
import logging
import os
import pwd
import re
import secrets
import shlex
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dist_train.config import Config, dump_config
from dist_train.outcome import FaultError, UsageError, escaped
from dist_train.rundir import atomic

_RUN_ID = re.compile(r"[0-9a-f]{16}")
_RESERVED_BYTES = 16384
_LEAST_FREE = 4 * _RESERVED_BYTES
DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_logger = logging.getLogger("dist_train.training")


class BrokenFileError(Exception):
    """A file of a run cannot be read; the message says why."""


def checkpoint_name(step: int) -> str:
    """Return the name of the file of the checkpoint at `step`."""
    return f"step-{step:08d}.pt"


RANGE_TEST = "-lr-range"
"""Ends the names of learning-rate range tests."""


class RunDirectory:
    """The files of a run below `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.config = root / "config.yaml"  # every setting, resolved
        self.id = root / "run_id"  # an id that distinguishes this run from others of its name
        self.status = root / "status.json"
        self.metrics = root / "metrics.jsonl"  # one record a line
        self.event_counts = root / "counts.json"  # how often each event has happened, over all launches
        self.ranks = root / "ranks.json"  # the last measured step on each rank
        self.requeues = root / "requeues.json"  # how often the run was started again without progress
        self.jobs = root / "jobs"  # the batch jobs that were submitted for the run, an id a line
        self.reserve = root / ".reserve"  # space for the final status of a run on a full disk
        self.lock = root / "run.lock"  # held by the launch that uses this directory
        self.sweep_lock = root / "sweep.lock"  # held by the sweep that uses this directory
        self.checkpoints = root / "checkpoints"
        self.logs = root / "logs"
        self.output_log = self.logs / "output.log"  # what the processes of a sweep's run print
        self.tensorboard = root / "tensorboard"  # folder of TensorBoard's event files, if enabled
        self.profile = root / "profile"  # folder of profiler traces, if enabled
        self.analysis = root / "analysis"  # folder of landscapes and sharpness records
        self.learning_curve = root / "learning_curve.png"
        self.range_test = root / "lr_range.json"  # the result of a learning-rate range test, if the run is one

    def fallback(self, folder: Path) -> Path:
        """Return this run's subfolder of `folder`, for checkpoints that cannot be written to the run directory."""
        root = self.root.resolve()
        parent = hashlib.sha256(bytes(root.parent)).hexdigest()[:8]  # a copy there may have the same name and id
        return folder / f"{root.name}-{parent}-{self.run_id()}"

    def fallbacks(self, folder: Path) -> list[Path]:
        """Return the subfolders with this run's id, also from before it was moved, or of the run it was copied from."""
        with suppress(OSError):  # of a disk that is needed only if that of the run directory fails
            return sorted(filter(Path.is_dir, folder.glob(f"*-{self.run_id()}")))
        return []

    @property
    def has_begun(self) -> bool:
        """Whether a run has left something here."""
        return any(map(atomic.exists, (self.status, self.metrics, self.checkpoints)))

    def checkpoint(self, step: int) -> Path:
        """Return the file of the checkpoint at `step`."""
        return self.checkpoints / checkpoint_name(step)

    @classmethod
    def of_checkpoint(cls, checkpoint: Path) -> RunDirectory:
        """Return the run that the file `checkpoint` belongs to; if it is in no run, its own folder."""
        folder = checkpoint.parent
        return cls(folder.parent if folder.name == "checkpoints" else folder)

    def checkpoint_records(self, other_disk: Path | None = None) -> tuple[Path, ...]:
        """Return the records beside the complete checkpoints, by step; with `other_disk` also those in `fallbacks`."""
        folders = (self.checkpoints, *(self.fallbacks(other_disk) if other_disk and self.id.exists() else ()))
        return tuple(sorted((path for each in folders for path in each.glob("step-*.json")), key=os.path.basename))

    def checkpoint_steps(self, other_disk: Path | None = None) -> tuple[int, ...]:
        """Return the steps of the complete checkpoints, in order; `other_disk` as for `checkpoint_records`."""
        steps = (path.stem.removeprefix("step-") for path in self.checkpoint_records(other_disk))
        return tuple(sorted(int(step) for step in steps if step.isdecimal()))

    def create(self) -> None:
        """Make the folders; new ones are accessible to the user alone. Raises UsageError; OSError if the disk fails."""
        otherwise = "choose another by run.directory or --run-dir"
        in_utf8(self.root)
        with refusing_unusable(self.root):
            for folder in (self.root, self.checkpoints, self.logs):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                refuse_foreign(folder, otherwise)
                probe = folder / f".probe-{os.getpid()}"
                probe.touch()
                probe.unlink()

    def run_id(self) -> str:
        """Return the run's id, 16 hexadecimal digits; if it has none yet, make one and save it. Raises OSError."""
        try:
            known = atomic.read_regular(self.id).decode("ascii").strip()
        except (FileNotFoundError, UnicodeDecodeError):
            known = ""
        if _RUN_ID.fullmatch(known):
            return known
        made = secrets.token_hex(8)
        atomic.write_text(self.id, f"{made}\n")
        return made

    def remove_partial_files(self, fallback_directory: Path | None) -> None:
        """Delete what killed processes have left of checkpoints, and of other files that only the lock's holder writes.

        This process must hold the lock. `fallback_directory`: the setting, whose subfolder of this run is cleaned, too.
        """
        for file in (self.config, self.metrics, self.event_counts, self.ranks, self.reserve):
            atomic.remove_partial_files(self.root, file.name)
        for folder in (self.checkpoints, *([self.fallback(fallback_directory)] if fallback_directory else [])):
            atomic.remove_partial_files(folder, "*")

    def make_reserve(self) -> None:
        """Reserve space for what is written when a run ends, if the disk has enough."""
        with suppress(OSError):
            if shutil.disk_usage(self.root).free >= _LEAST_FREE:
                self._write_reserve()

    def _write_reserve(self) -> None:
        with suppress(OSError):
            if not self.reserve.exists():
                # random bytes, since some file systems compress zeros away
                atomic.write_bytes(self.reserve, secrets.token_bytes(_RESERVED_BYTES))

    def spend_reserve(self, write: Callable[[], None]) -> None:
        """Call `write`, of a small file, and once more with the reserved space if the disk is full. Raises OSError."""
        try:
            write()
        except OSError as error:
            if error.errno not in DISK_FULL or not self.reserve.exists():
                raise
            self.reserve.unlink(missing_ok=True)
            write()
            # the old file was replaced, which has freed space
            self._write_reserve()

    def save_config(self, config: Config) -> None:
        """Save every setting."""
        atomic.write_text(self.config, dump_config(config))

    def update_config(self, config: Config) -> None:
        """Save every setting of a run at work, if the disk takes them: its checkpoints have them, too."""
        try:
            self.save_config(config)
        except OSError as error:
            _logger.warning("%s cannot be written; training continues: %s", self.config, error)


def is_run_or_study(folder: Path) -> bool:
    """Whether `folder` is that of a run or a study, as far as it can be read."""
    with suppress(OSError):
        return RunDirectory(folder).has_begun or StudyDirectory(folder).has_plan
    return False


def has_run_or_study(folder: Path) -> bool:
    """Whether `folder` or one of its subfolders is that of a run or a study."""
    places = [folder]
    with suppress(OSError), os.scandir(folder) as entries:  # which knows files, of which there may be many
        places += [Path(entry) for entry in entries if entry.is_dir()]
    return any(map(is_run_or_study, places))


def run_folder(name: Path, code: str = "run-missing", suits: Callable[[Path], bool] = is_run_or_study) -> Path:
    """Return the folder `name` or runs/`name`: the first that `suits`, or else the first that exists.

    Raises UsageError with `code`, and the nearest run, if any.
    """
    below = Path("runs") / name
    folders = [name] if name.is_dir() else []
    if os.path.isdir(below):  # not Path.is_dir, which raises where this user may not enter `runs`
        folders.append(below)
    if folders:
        return next(filter(suits, folders), folders[0])
    if name.is_file():
        raise UsageError(f"{name} is a file, not the folder of a run", code=code)
    runs: dict[str, Path] = {}
    for parent in (below.parent, name.parent):
        with suppress(OSError, ValueError):
            runs |= {folder.name: folder for folder in parent.iterdir() if RunDirectory(folder).has_begun}
    close = difflib.get_close_matches(name.name.partition("@")[0], runs, n=1)  # of RUN@last, too
    hint = f"; did you mean {runs[close[0]]}?" if close else "; dist-train runs lists what is there" if runs else ""
    places = "" if below == name else f": neither {name} nor {below} is there"
    raise UsageError(f"there is no run {name}{places}{hint}", code=code)


def in_utf8(path: Path) -> Path:
    """Return `path`. Raises UsageError if its absolute name is not UTF-8, which records, pages and pictures are."""
    name = os.path.realpath(path)
    try:
        name.encode()
    except UnicodeEncodeError:
        encoding = sys.getfilesystemencoding()
        fix = "rename it" if encoding == "utf-8" else f"Python reads names as {encoding} here: set PYTHONUTF8=1"
        raise UsageError(f"the name {escaped(name)} is not UTF-8: {fix}", code="name-not-utf8") from None
    return path


def may_be_written(folder: Path) -> bool:
    """Whether permissions let this user write to `folder` or, if it does not exist, make it."""
    nearest = next(filter(os.path.lexists, (folder, *folder.absolute().parents)))
    return os.path.isdir(nearest) and os.access(nearest, os.W_OK | os.X_OK)


def refuse_foreign(folder: Path, otherwise: str) -> None:
    """Refuse a folder whose files another user could replace; `otherwise` says what else the user may do.

    Its owner must be this user or root. Everybody may have write permission only with the sticky bit, as in /tmp. File
    systems that are read-only or do not record owners are not checked. Raises UsageError if it belongs to another user,
    or everybody may write there; the message says how to fix it; OSError if the folder does not exist.
    """
    state = folder.stat()
    if state.st_uid not in (os.geteuid(), 0):
        fault, fix = f"belongs to another user, {_user_name(state.st_uid)}", "run as that user, chown -R it"
    elif state.st_mode & stat.S_IWOTH and not state.st_mode & stat.S_ISVTX:
        fault, fix = "can be written by everybody", f"run: chmod o-w {shlex.quote(str(folder))}"
    else:
        return
    if _records_owners(folder):
        raise UsageError(
            f"{folder} {fault}, who could replace files in it; {fix}, or {otherwise}", code="folder-foreign"
        )


def _user_name(number: int) -> str:
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return str(number)


def _records_owners(folder: Path) -> bool:
    if os.statvfs(folder).f_flag & os.ST_RDONLY:
        return False
    try:
        descriptor, name = tempfile.mkstemp(prefix=".owner-", dir=folder)
    except OSError:
        return True  # it cannot be tested
    with os.fdopen(descriptor):
        os.unlink(name)
        probe = os.fstat(descriptor)
    return (probe.st_uid, stat.S_IMODE(probe.st_mode)) == (os.geteuid(), 0o600)


class StudyDirectory:
    """The files of a study below `root`; its runs are the folders beside them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.study = root / "study.yaml"
        self.base = root / "base.yaml"  # the configuration that the runs vary, resolved
        self.runs = root / "runs.json"  # the planned runs, in their order
        self.trials = root / "trials.log"  # the journal of a search by Optuna

    @property
    def has_plan(self) -> bool:
        """Whether a sweep has written its plan here; a list of runs alone may be of `dist-train runs --json`."""
        return self.runs.is_file() and (self.study.is_file() or self.base.is_file())


@contextmanager
def oserror_to_fault(directory: RunDirectory) -> Iterator[None]:
    """Turn an OSError in the block, from a disk that is full or gone, into a FaultError that says what to do."""
    try:
        yield
    except OSError as error:
        place = f": {error.filename}" if error.filename else ""
        raise FaultError(
            f"{error.strerror or error}{place}; the checkpoints in {directory.root} are as they were: "
            f"fix it, and start the same command again",
            code="disk-failed",
        ) from error


_UNUSABLE = frozenset(
    {errno.EACCES, errno.EEXIST, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOENT, errno.ENOTDIR, errno.EPERM, errno.EROFS}
)


@contextmanager
def refusing_unusable(folder: Path) -> Iterator[None]:
    """Turn an OSError in the block into a UsageError if `folder` cannot be a run's; one of a disk, which may come back,
    is left.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _UNUSABLE:
            raise
        raise UsageError(
            f"cannot use {folder} ({error.strerror}): choose another by run.directory, run.name or --run-dir",
            code="run-directory-unwritable",
        ) from error
