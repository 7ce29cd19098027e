"""Target files, by which Prometheus (`file_sd_configs`) finds active runs and learns how ended runs ended.

Many users may write to their folder, so files there are not trusted: links are not followed, only regular files of this
user or of root are read or touched, and opening a FIFO does not block.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from dist_train.monitoring.prometheus.board import KILLED, OUTCOMES
from dist_train.monitoring.prometheus.messages import ServingPlan
from dist_train.rundir import atomic
from dist_train.rundir.lock import pid_namespace, process_start
from dist_train.rundir.records import RunFacts

HEARTBEAT_SECONDS = 60.0  # interval at which a run touches its file
STALE_SECONDS = 300.0  # a file not touched for this long is stale

ENDED_SECONDS = 86_400.0  # how long the file of an ended run, which holds its outcome, is kept
SEEN_SECONDS = 600.0  # by this long after a run's end every Prometheus has read its outcome

JOB = "dist_train"
_NOWHERE = "127.0.0.1:0"  # of an ended run: another may have taken its address; nothing listens at port 0
_OUTCOME_LABEL = "outcome"
_PROCESS_LABEL = "__dist_train_process"  # the trainer. Prometheus drops labels that start with __ after relabelling.
_EXPORTER_LABEL = "__dist_train_exporter"
_IDENTITY = re.compile(r"\S+ \S+ [0-9]{1,10} [0-9]{0,20}")
_NAME = re.compile(r"[A-Za-z0-9._-]+-[0-9a-f]{8}-[0-9]+\.json")
_LARGEST = 64 << 10  # bytes; our files have a few hundred
_MOST_NAMES = 8


def process_identity(number: int) -> str:
    """Return host, PID namespace, PID and start (clock ticks; empty if it is gone): they identify a process."""
    start = process_start(number)
    return f"{_machine()} {number} {'' if start is None else start}"


def _is_gone(process: str) -> bool:
    """Return whether the process is known to have ended; False on another machine."""
    machine, number, _ = process.rsplit(" ", 2)
    return machine == _machine() and process_identity(int(number)) != process


@dataclass(frozen=True)
class TargetFile:
    """The file at `path` by which Prometheus finds one rank's metrics; `process` is the identity of its trainer."""

    path: Path
    content: str
    process: str

    def write(self) -> None:
        """Write the file, and create its folder if necessary. Raises OSError."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _write(self.path, self.content)

    def touch(self) -> None:
        """Show that the run is alive; write the file again if it was removed. Raises OSError."""
        try:
            with _open_ours(self.path) as file:
                os.utime(file.fileno())
        except FileNotFoundError:
            self.write()

    def remove(self) -> None:
        """Remove the file, unless another process has taken it over. Raises OSError."""
        with _open_ours(self.path) as file:
            entry = _read(file)
        if entry is not None and entry[1][_PROCESS_LABEL] == self.process:
            self.path.unlink()


def target_file(plan: ServingPlan, facts: RunFacts, port: int, process: str, exporter: str) -> TargetFile:
    """Return the file for the rank of `facts`, served at `port` by the process `exporter` for the trainer `process`."""
    assert plan.targets_directory is not None
    node = facts.node or socket.gethostname()
    labels = {
        "job": JOB,
        "run": facts.name,
        "run_id": facts.run_id,
        "slurm_job": facts.slurm_job,
        "node": node,
        "rank": str(facts.rank),
        "__param_run_id": facts.run_id,  # another run that has taken the address does not answer to it
        _PROCESS_LABEL: process,
        _EXPORTER_LABEL: exporter,
    }
    if plan.scheme == "https":
        labels["__scheme__"] = plan.scheme
    name = re.sub(r"[^A-Za-z0-9._-]", "_", facts.name)[:100]
    # Runs in containers, or on the disks of different nodes, may have the same path; a copied run has the same id.
    run = os.fsencode(facts.run_directory.absolute()) + b"\0" + facts.run_id.encode()
    mark = hashlib.blake2b(run, digest_size=4).hexdigest()
    path = plan.targets_directory / f"{name}-{mark}-{facts.rank}.json"
    return TargetFile(path, _content(f"{plan.host_for_others(node)}:{port}", labels), process)


def record_outcome(path: Path, process: str, outcome: str) -> None:
    """Record in the target file at `path` how the run of the trainer `process` ended.

    Alert rules read it there, since they cannot rely on a last scrape. Nothing changes if an outcome is recorded
    already, or if a later launch of the run has taken the file over. The file of a rank other than 0, which no rule
    reads, is removed: Prometheus would try to scrape it for a day. So it is if the rank has become rank 0 instead.
    Raises OSError, also if something else is there.
    """
    try:
        with _open_ours(path) as file:
            entry = _read(file)
    except FileNotFoundError:
        return
    match entry:
        case (address, labels) if labels[_PROCESS_LABEL] == process and _OUTCOME_LABEL not in labels:
            if outcome in OUTCOMES and labels.get("rank") == "0":
                _write(path, _content(_NOWHERE, {**labels, _OUTCOME_LABEL: outcome, "instance": address}))
            else:
                path.unlink()


def _write(path: Path, content: str) -> None:
    # The temporary name ends with .part, so Prometheus, which reads *.json, ignores it. Prometheus usually runs as
    # another user: hence the mode.
    atomic.swap_text(path, content, 0o644)


def _content(address: str, labels: Mapping[str, str]) -> str:
    return json.dumps([{"targets": [address], "labels": labels}], indent=2) + "\n"


def remove_stale(
    directory: Path, ended_seconds: float = ENDED_SECONDS, resumed: str = ""
) -> tuple[Sequence[Path], str]:
    """Remove the target files in `directory` whose runs are gone. Raises OSError.

    Return the removed files, and one line about those that were skipped, and why; empty if there are none.

    A file with an outcome is kept for `ended_seconds`, or until its run resumes: `resumed` is the id of the run that
    starts now, if any. At such a start, the file of another run that has just died is not removed but marked as killed.
    While that run's exporter still lives, it will do so itself. Files whose name, owner or content are not ours are
    left alone; those of other users, whose own runs remove them, are then no reason for a warning.
    """
    removed: list[Path] = []
    skipped: list[str] = []
    for path in sorted(path for path in directory.iterdir() if _NAME.fullmatch(path.name)):
        try:
            with _open_ours(path) as file:
                entry, touched = _read(file), os.fstat(file.fileno()).st_mtime
        except FileNotFoundError:
            continue
        except OSError as error:
            if not (resumed and isinstance(error, PermissionError)):
                skipped.append(f"{path.name} ({error.strerror or error})")
            continue
        if entry is None:
            continue
        age, (_, labels) = time.time() - touched, entry
        is_back = resumed != "" and labels.get("run_id") == resumed
        if _OUTCOME_LABEL in labels:
            is_stale = age > ended_seconds or is_back
        else:
            is_gone = _is_gone(process := labels[_PROCESS_LABEL])
            is_unserved = is_gone and _is_gone(labels[_EXPORTER_LABEL])
            is_stale = age > STALE_SECONDS or (is_gone and is_back) or (is_unserved and not resumed)
            if is_unserved and not is_stale:
                with suppress(OSError):
                    record_outcome(path, process, KILLED)
        if is_stale:
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                if error.errno != errno.EPERM:
                    raise
                skipped.append(f"{path.name} (another user's, in a folder with the sticky bit)")
            else:
                removed.append(path)
    more = f" and {len(skipped) - _MOST_NAMES} more" if len(skipped) > _MOST_NAMES else ""
    return removed, f"skipped target files: {', '.join(skipped[:_MOST_NAMES])}{more}" if skipped else ""


def _open_ours(path: Path) -> BinaryIO:
    """Open a target file. Raises OSError if it is a link, not a regular file, too large, or another user's."""
    if path.is_symlink():  # the kernel refuses it too, but with a less clear message
        raise OSError(errno.ELOOP, "a symbolic link", str(path))
    file = atomic.open_regular(path, os.O_NOFOLLOW)
    state = os.fstat(file.fileno())
    is_ours = state.st_uid in (os.geteuid(), 0)
    if is_ours and state.st_size <= _LARGEST:
        return file
    file.close()
    if is_ours:
        raise OSError(errno.EFBIG, f"larger than {_LARGEST} bytes", str(path))
    raise PermissionError(errno.EPERM, f"a file of another user, {state.st_uid}", str(path))


def _read(file: BinaryIO) -> tuple[str, Mapping[str, str]] | None:
    """Return the address and the labels in the target file; None if it is not one of ours."""
    try:
        [group] = json.loads(file.read(_LARGEST))
        [address], labels = group["targets"], group["labels"]
        processes = [labels[_PROCESS_LABEL], labels[_EXPORTER_LABEL]]
        is_ours = isinstance(address, str) and labels["job"] == JOB and all(map(_IDENTITY.fullmatch, processes))
        return (address, labels) if is_ours else None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def _machine() -> str:
    """Return host and PID namespace."""
    return f"{socket.gethostname()} {pid_namespace() or 'unknown'}"
