"""`metrics.jsonl`: one record a line, never two for one step and kind, none missing after a crash."""

from __future__ import annotations

import json
import logging
import os
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import NamedTuple

from dist_train.rundir import atomic
from dist_train.rundir.records import (
    EvaluationRecord,
    EventRecord,
    Observer,
    Outcome,
    Record,
    to_json,
)

logger = logging.getLogger(__name__)

_BACKLOG_LIMIT = 100_000


class JsonLines(Observer):
    """Appends each record to `path` in one write; `sync` flushes to disk.

    A record whose (kind, step, split or event) the file has already is not written again. While the disk
    refuses, records wait in memory, and the first refusal is reported.
    """

    def __init__(self, path: Path) -> None:
        """Open or create `path`. For a resume call `rewind` first."""
        content = path.read_bytes() if path.exists() else b""
        self._written = {identity for line in content.split(b"\n") if (identity := _identity(line))}
        self._path = path
        self._lock = Lock()
        self._backlog: list[bytes] = [] if content.endswith(b"\n") or not content else [b"\n"]
        self._refused = False
        self._directory_flushed = False
        self._file: int | None = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)

    def record(self, record: Record) -> None:
        """Append `record`, unless it is there."""
        identity = _identity_of(record)
        with self._lock:
            if identity in self._written:
                return
            self._written.add(identity)
            if len(self._backlog) < _BACKLOG_LIMIT:
                self._backlog.append(to_json(record).encode() + b"\n")
            self._write_backlog()

    def sync(self) -> None:
        """Flush what was recorded to disk."""
        with self._lock:
            if self._file is None:
                return
            self._write_backlog()
            os.fsync(self._file)
            if not self._directory_flushed:
                atomic.flush_directory(self._path.parent)
                self._directory_flushed = True

    def end(self, outcome: Outcome) -> None:
        """Flush to disk and close."""
        self.sync()
        with self._lock:
            if self._file is not None:
                os.close(self._file)
                self._file = None
            if self._backlog:
                logger.warning("%s: the last %d records are lost", self._path, len(self._backlog))

    def _write_backlog(self) -> None:
        while self._backlog and self._file is not None:
            size = os.fstat(self._file).st_size
            try:
                written = os.write(self._file, self._backlog[0])
                if written < len(self._backlog[0]):
                    raise OSError("the disk took only a part of a line")
            except OSError as error:
                with suppress(OSError):
                    os.ftruncate(self._file, size)
                if not self._refused:
                    self._refused = True
                    logger.warning("%s cannot be written, records wait in memory: %s", self._path, error)
                return
            del self._backlog[0]
        self._refused = False


_BEGINNINGS = frozenset({"resumed", "lengthened", "initialized"})


def rewind(path: Path, step: int) -> None:
    """Make `path` what it was when the checkpoint at `step` was saved, for a run that resumes from it.

    Drops torn lines, records after `step`, second records of one (kind, step, split or event), and events at `step`
    itself that say how a launch begins, since this one writes its own. Whole or not at all. A file that is not there
    stays so.
    """
    if not path.exists():
        return
    before = path.read_bytes()
    seen: set[Identity] = set()
    kept: list[bytes] = []
    for line in before.split(b"\n"):
        identity = _identity(line)
        if identity is None or identity in seen or identity.step > step:
            continue
        if identity.step == step and identity.kind == "event" and identity.part in _BEGINNINGS:
            continue
        seen.add(identity)
        kept.append(line + b"\n")
    after = b"".join(kept)
    if after != before:
        atomic.write_bytes(path, after)


class Identity(NamedTuple):
    """What no two records of a run share; `part` is an evaluation's split or an event's name."""

    kind: str
    step: int
    part: str


def _identity_of(record: Record) -> Identity:
    match record:
        case EvaluationRecord():
            return Identity("eval", record.step, record.split)
        case EventRecord():
            return Identity("event", record.step, record.event)
    return Identity("train", record.step, "")


def _identity(line: bytes) -> Identity | None:
    try:
        fields = json.loads(line)
        kind, step = fields["kind"], fields["step"]
        part = fields.get({"eval": "split", "event": "event"}.get(kind, ""), "")
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    if isinstance(kind, str) and isinstance(step, int) and isinstance(part, str):
        return Identity(kind, step, part)
    return None
