"""The state of a run by its files and processes, and by its Slurm job; and the files that tables and reports read."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from dist_train.cluster.launch import JOB_IS_ALIVE, JOB_WAITS
from dist_train.monitoring import wording
from dist_train.rundir.lock import process_runs
from dist_train.rundir.metrics_file import read_records
from dist_train.rundir.paths import BrokenFileError, RunDirectory
from dist_train.rundir.records import Record
from dist_train.rundir.status import Status, fallback_directory, load_status

ALIVE = frozenset({"starting", "running", "stopping"})
_STALE_AFTER = 600.0  # seconds of silence after which a run on another host, or in a container, counts as lost
_GONE_AFTER = 10.0  # seconds of silence after which a process that cannot be found has ended without a final status
_LAUNCHED_GONE_AFTER = 60.0
"""The same if it was launched: another rank may take over from it, or the launcher record how the run ended."""


def read_state(directory: RunDirectory) -> tuple[str, str]:
    """Return the state of a run as tables show it, and the reason; of its records only the age is used."""
    try:
        return state_of(load_status(directory.status), directory, datetime.now(UTC).timestamp())
    except BrokenFileError as error:
        return "broken", str(error)


def state_of(status: Status, run: RunDirectory, now: float) -> tuple[str, str]:
    """Return the state of the run at `now`, in seconds since 1970, and the reason, as `read_state` does."""
    if status.state not in ALIVE:
        return status.state, status.reason
    seen = max(seconds_of(status.updated), seconds_of(status.started))
    with suppress(OSError):
        seen = max(seen, run.metrics.stat().st_mtime)
    if has_gone(status, seen, now):
        return process_is_gone(status, run)
    if not status.is_here and now - seen > _STALE_AFTER:
        where = f" on {status.host}" if status.host else ""
        return "lost", f"silent for {wording.duration(now - seen)}{where}; {how_to_continue(run)}"
    return status.state, status.reason


def has_gone(status: Status, seen: float, now: float) -> bool:
    """Whether the process of an active run, last seen at `seen`, has ended on this machine without a successor."""
    patience = _LAUNCHED_GONE_AFTER if status.launch else _GONE_AFTER
    is_recent = 0 <= now - seen <= patience  # a clock that was ahead must not make a dead run live for long
    return status.is_here and not is_recent and not process_runs(status.pid, seen)


def process_is_gone(status: Status, run: RunDirectory) -> tuple[str, str]:
    """Return the state of a run whose process has gone, and the reason."""
    return "lost", f"its process {status.pid} is gone; {how_to_continue(run)}"


def how_to_continue(run: RunDirectory) -> str:
    """Return what the note about a lost run advises; without a checkpoint it would begin anew."""
    other_disk = None if run.checkpoint_steps() else fallback_directory(run)
    if run.checkpoint_steps(other_disk):
        return "start it again to resume"
    elsewhere = f", nor does {other_disk} on this machine" if other_disk else ""
    return f"start it again: it holds no checkpoint{elsewhere}"


def corrected_by_job(state: str, note: str, job: str, job_state: str) -> tuple[str, str]:
    """Return the state of a run, and the note about it, corrected by Slurm's state of its `job` (empty if unknown).

    A run marked as active whose job is pending or has ended is lost; one whose job is suspended is not, however silent.
    A failed run whose job is pending is stopped: it will be started again.
    """
    if job_state == "SUSPENDED" and state in {*ALIVE, "lost"}:
        return "running" if state == "lost" else state, f"its job {job} is {job_state}"
    waits, corrected = job_state in JOB_WAITS, state
    if state in ALIVE and job_state and (waits or job_state not in JOB_IS_ALIVE):
        corrected = "lost"
    elif state == "failed" and waits:
        corrected = "stopped"
    if corrected == state:
        return state, note
    return corrected, "; ".join(filter(None, (note, f"its job {job} is {job_state}")))


def seconds_of(moment: str) -> float:
    """Return a time of `status.json` in seconds since 1970; 0 if it cannot be parsed."""
    try:
        return datetime.fromisoformat(moment).timestamp()
    except (ValueError, OverflowError):
        return 0.0


def read_measurements(path: Path, read: Callable[[Path], tuple[Record, ...]] = read_records) -> tuple[Record, ...]:
    """Return the records in `path`; empty if there is no such file. Raises BrokenFileError if it cannot be read."""
    try:
        return read(path)
    except FileNotFoundError:
        return ()
    except OSError as error:
        raise BrokenFileError(f"{path.name} cannot be read: {error.strerror}") from error


def walk_runs(directory: Path, onerror: Callable[[OSError], object]) -> Iterator[tuple[Path, list[str]]]:
    """Yield each folder at or below `directory`, sorted, with its subfolders, and links to runs that lie elsewhere.

    As of os.walk, the caller empties the list of subfolders of a folder that is not to be entered.
    """
    for folder, children, _ in os.walk(directory, onerror=onerror):
        children.sort()
        yield Path(folder), children
        # Other links are not followed: they may lead in circles.
        for path in (Path(folder, child) for child in children):
            with suppress(OSError):
                is_elsewhere = path.is_symlink() and not path.resolve().is_relative_to(directory.resolve())
                if is_elsewhere and RunDirectory(path).has_begun:
                    yield path, []
