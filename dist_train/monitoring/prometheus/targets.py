"""Target files: how Prometheus (`file_sd_configs`) finds the runs that there are, and learns how the others ended.

Many users may write to their folder, so a file there is opened as in a hostile place: no link is followed, nothing but
a regular file of this user or of root is read or touched, and nobody waits for a FIFO.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from dist_train.monitoring.prometheus.board import KILLED
from dist_train.monitoring.prometheus.messages import ServingPlan
from dist_train.rundir import atomic
from dist_train.rundir.records import RunFacts

HEARTBEAT_SECONDS = 60.0
"""How often a run touches its file."""
STALE_SECONDS = 300.0
"""A file that was not touched for so long belongs to nobody."""

ENDED_SECONDS = 86_400.0
"""How long a file stays that says how its run ended."""
SEEN_SECONDS = 600.0
"""So long after a run's end every Prometheus has seen how it ended."""

JOB = "dist_train"
_NOWHERE = "127.0.0.1:0"
"""In place of the address of a run that has ended: another run may have taken that. Nobody can listen at port 0."""
_OUTCOME_LABEL = "outcome"
_PROCESS_LABEL = "__dist_train_process"
"""The trainer. Prometheus drops labels that begin so once it has found the target."""
_EXPORTER_LABEL = "__dist_train_exporter"
_IDENTITY = re.compile(r"\S+ \S+ [0-9]{1,10} [0-9]{0,20}")
_NAME = re.compile(r"[A-Za-z0-9._-]+-[0-9a-f]{8}-[0-9]+\.json")
_LARGEST = 64 << 10
"""Bytes; ours have a few hundred."""
_MOST_NAMES = 8


def identity_of(number: int) -> str:
    """Return what tells the process with this number on this machine from all others; it ends there if there is none.

    Host, namespace of process numbers, number, start in clock ticks.
    """
    return f"{_machine()} {number} {_begun(number)}"


def _is_gone(process: str) -> bool:
    """Return whether it is known to have ended; of another machine nothing is known."""
    machine, number, _ = process.rsplit(" ", 2)
    return machine == _machine() and identity_of(int(number)) != process


@dataclass(frozen=True)
class TargetFile:
    """The file at `path` by which Prometheus finds one rank's metrics, owned by the process of identity `process`."""

    path: Path
    content: str
    process: str

    def write(self) -> None:
        """Make the file, and its folder where that is new. Raises OSError."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # the temporary name ends on .part: Prometheus looks for *.json; it seldom runs as the user of the run
        atomic.swap_text(self.path, self.content, 0o644)

    def touch(self) -> None:
        """Show that the run is there still; write the file anew where somebody removed it.

        Raises OSError, also where somebody has put something else in its place.
        """
        try:
            with _open_ours(self.path) as file:
                os.utime(file.fileno())
        except FileNotFoundError:
            self.write()

    def end(self, outcome: str) -> None:
        """Have the file say how the run ended, for rules that cannot rely on a last scrape.

        Nothing changes where it says so already, or a later launch of the run has taken it over. Raises OSError, also
        where somebody has put something else in its place.
        """
        try:
            with _open_ours(self.path) as file:
                entry = _read(file)
        except FileNotFoundError:
            return
        match entry:
            case (address, labels) if labels[_PROCESS_LABEL] == self.process and _OUTCOME_LABEL not in labels:
                ended = {**labels, _OUTCOME_LABEL: outcome, "instance": address}
                replace(self, content=_content(_NOWHERE, ended)).write()


def target_file(plan: ServingPlan, facts: RunFacts, port: int, process: str, exporter: str) -> TargetFile:
    """Return the file for the rank of `facts` that the process `exporter` serves at `port` for `process`."""
    assert plan.targets_directory is not None
    node = facts.node or socket.gethostname()
    labels = {
        "job": JOB,
        "run": facts.name,
        "run_id": facts.run_id,
        "slurm_job": facts.slurm_job,
        "node": node,
        "rank": str(facts.rank),
        _PROCESS_LABEL: process,
        _EXPORTER_LABEL: exporter,
    }
    if plan.scheme == "https":
        labels["__scheme__"] = plan.scheme
    directory = os.fsencode(facts.run_directory.absolute())
    name = re.sub(r"[^A-Za-z0-9._-]", "_", facts.name)[:100]
    mark = hashlib.blake2b(directory, digest_size=4).hexdigest()
    path = plan.targets_directory / f"{name}-{mark}-{facts.rank}.json"
    return TargetFile(path, _content(f"{plan.host_for_others(node)}:{port}", labels), process)


def _content(address: str, labels: Mapping[str, str]) -> str:
    return json.dumps([{"targets": [address], "labels": labels}], indent=2) + "\n"


@dataclass(frozen=True)
class Cleaning:
    """What became of a folder of target files: those `removed`, and why some were `skipped`, by their paths."""

    removed: tuple[Path, ...]
    skipped: Mapping[Path, str]

    @property
    def warning(self) -> str:
        """What to tell of those skipped, on one line; nothing where there are none."""
        shown = [f"{path.name} ({why})" for path, why in list(self.skipped.items())[:_MOST_NAMES]]
        more = len(self.skipped) - len(shown)
        ending = f" and {more} more" if more else ""
        return f"target files that were left alone: {', '.join(shown)}{ending}" if shown else ""


def remove_stale(directory: Path, ended_seconds: float = ENDED_SECONDS, resumed: str = "") -> Cleaning:
    """Remove the target files in `directory` whose runs are gone. Raises OSError.

    One that says how its run ended stays for `ended_seconds`, or until that run, whose id is `resumed`, is back. Where
    a run begins, one that has just died is not removed, but said to have been killed where its exporter is dead too:
    a living one says so itself. A file is ours by its name, its owner and its content; any other is left alone.
    """
    removed = []
    skipped = {}
    for path in sorted(path for path in directory.iterdir() if _NAME.fullmatch(path.name)):
        try:
            with _open_ours(path) as file:
                entry, touched = _read(file), os.fstat(file.fileno()).st_mtime
        except FileNotFoundError:
            continue
        except OSError as error:
            skipped[path] = error.strerror or str(error)
            continue
        if entry is None:
            continue
        age, (_, labels) = time.time() - touched, entry
        is_back = resumed != "" and labels.get("run_id") == resumed
        if _OUTCOME_LABEL in labels:
            is_stale = age > ended_seconds or is_back
        else:
            is_gone = _is_gone(process := labels[_PROCESS_LABEL])
            is_stale = age > STALE_SECONDS or (is_gone and (is_back or not resumed))
            if is_gone and not is_stale and _is_gone(labels[_EXPORTER_LABEL]):
                with suppress(OSError):
                    TargetFile(path, "", process).end(KILLED)
        if is_stale:
            path.unlink(missing_ok=True)
            removed.append(path)
    return Cleaning(tuple(removed), skipped)


def _open_ours(path: Path) -> BinaryIO:
    """Open a target file. Raises OSError where it is a link, no regular file, too large, or another user's."""
    if path.is_symlink():  # the kernel refuses it as well, but in other words
        raise OSError(errno.ELOOP, "a symbolic link", str(path))
    file = atomic.open_regular(path, os.O_NOFOLLOW)
    state = os.fstat(file.fileno())
    is_ours = state.st_uid in (os.geteuid(), 0)
    if is_ours and state.st_size <= _LARGEST:
        return file
    file.close()
    why = f"larger than {_LARGEST} bytes" if is_ours else f"a file of another user, {state.st_uid}"
    raise OSError(errno.EPERM, why, str(path))


def _read(file: BinaryIO) -> tuple[str, Mapping[str, str]] | None:
    """Return the address and the labels in the target file; None where it is not one of ours."""
    try:
        [group] = json.loads(file.read(_LARGEST))
        [address], labels = group["targets"], group["labels"]
        processes = [labels[_PROCESS_LABEL], labels[_EXPORTER_LABEL]]
        is_ours = isinstance(address, str) and labels["job"] == JOB and all(map(_IDENTITY.fullmatch, processes))
        return (address, labels) if is_ours else None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def _machine() -> str:
    """Return host and namespace of process numbers."""
    try:
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{socket.gethostname()} unknown"


def _begun(number: int) -> str:
    """Return when process `number` began, in ticks since the machine did; empty where it is gone or a zombie."""
    try:
        stat = Path(f"/proc/{number}/stat").read_text()
    except OSError:
        return ""
    fields = stat.rpartition(")")[2].split()
    return "" if fields[0] in "ZX" else fields[19]
