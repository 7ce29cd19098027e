"""`metrics.jsonl`: the records of a run, one a line, never two for one step and kind, none lost in a crash."""

from __future__ import annotations

import json
import logging
import os
from array import array
from bisect import bisect_left
from collections import defaultdict, deque
from collections.abc import Mapping
from contextlib import suppress
from itertools import islice
from pathlib import Path
from threading import Lock
from typing import NamedTuple

import msgspec

from dist_train.rundir import atomic
from dist_train.rundir.atomic import json_text, nan_for_null, read_end, read_regular
from dist_train.rundir.records import (
    EVENTS,
    Count,
    Detail,
    EvaluationRecord,
    EventRecord,
    Observer,
    Outcome,
    Record,
    TrainRecord,
)

_logger = logging.getLogger(__name__)

_BACKLOG_LIMIT = 100_000  # records: more than there are in RECENT_BYTES
RECENT_BYTES = 1 << 23  # of metrics.jsonl: more than the records that a rank keeps for a takeover
_EVENTS_BEFORE_TRAINING = 100  # more than there are
_RESERVED = frozenset({"kind", "step", "event", "time"})
TRAIN_LINE = b'{"kind": "train"'
"""How the line of a training record begins; most lines are such records, and readers need not parse them all."""
_KINDS: Mapping[str, type[Record]] = {"train": TrainRecord, "eval": EvaluationRecord, "event": EventRecord}


def to_json(record: Record) -> str:
    """Return `record` as JSON on one line, without the newline; numbers that are not finite become null."""
    return json_text(_fields(record))


def _fields(record: Record) -> dict[str, Detail]:
    match record:
        case TrainRecord():
            return {"kind": "train", **vars(record)}
        case EvaluationRecord():
            return {"kind": "eval", **vars(record)}
    assert not _RESERVED & record.details.keys(), f"reserved names in {sorted(record.details)}"
    return {"kind": "event", "step": record.step, "event": record.event, **record.details, "time": record.time}


def from_json(line: str | bytes) -> Record | None:
    """Return the record in `line`; None if it is incomplete or of another form. Null becomes NaN."""
    with suppress(ValueError, KeyError, TypeError, AttributeError, RecursionError):
        fields = json.loads(line)
        values = nan_for_null(fields)
        if fields["kind"] == "event":
            values["details"] = {name: value for name, value in fields.items() if name not in _RESERVED}
        return msgspec.convert(values, _KINDS[fields["kind"]])
    return None


def read_records(path: Path) -> tuple[Record, ...]:
    """Return the records of `path` in order, without incomplete lines. Raises OSError if it cannot be read."""
    return _parse(read_regular(path))


def read_last_records(path: Path, size: int = 1 << 16) -> tuple[Record, ...]:
    """Return the records in the last `size` bytes of `path`. Raises OSError if it cannot be read."""
    return _parse(read_end(path, size)[0])


def digest_of_initial_weights(path: Path) -> str:
    """Return the SHA-256 of the file whose weights the run of these records began with; empty if none is named.

    The event comes before the first update. Raises OSError if `path` cannot be read.
    """
    with path.open("rb") as lines:
        for record in map(from_json, islice(lines, _EVENTS_BEFORE_TRAINING)):
            if isinstance(record, EventRecord) and record.event == "initialized":
                return str(record.details.get("sha256", ""))
    return ""


def _parse(content: bytes) -> tuple[Record, ...]:
    return tuple(record for line in content.split(b"\n") if (record := from_json(line)) is not None)


class JsonLines(Observer):
    """Appends each record to `path` in one write; `flush` flushes to disk.

    A record whose `RecordKey` the end of the file already has is not written again; after `rewind` no older one recurs.
    While writes fail, records wait in memory; the first failure is reported.
    """

    def __init__(self, path: Path) -> None:
        """Open or create `path`. For a resume call `rewind` first."""
        content, size = read_end(path, RECENT_BYTES) if atomic.exists(path) else (b"", 0)
        self._written = dict.fromkeys(key for line in content.split(b"\n") if (key := _key_of_line(line)))
        self._path = path
        self._lock = Lock()
        self._backlog = deque[bytes]([] if content.endswith(b"\n") or not content else [b"\n"])
        # The last lines that the file has, but not yet for certain the disk.
        self._unflushed = deque[bytes](maxlen=_BACKLOG_LIMIT)
        self._size = size  # of the file with these lines
        self._is_torn = False  # whether the file may end in bytes beyond `_size`
        self._is_refused = False
        self._directory_flushed = False
        self._file: int | None = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)

    def record(self, record: Record) -> None:
        """Append `record`, unless the file has it, or JSON cannot hold it, of which the log warns."""
        key = record_key(record)
        try:
            line = f"{to_json(record)}\n".encode()
        except (TypeError, ValueError) as error:
            _logger.warning("%s lacks a record of step %d: %s", self._path, record.step, error)
            return
        with self._lock:
            if key in self._written:
                return
            self._written[key] = None
            if len(self._written) > _BACKLOG_LIMIT:
                del self._written[next(iter(self._written))]
            if len(self._backlog) >= _BACKLOG_LIMIT:
                self._write_backlog()
            if len(self._backlog) < _BACKLOG_LIMIT:
                self._backlog.append(line)
            self._write_backlog()

    def flush(self) -> None:
        """Flush what was recorded to disk, from any thread. Raises OSError if records still wait in memory, too."""
        with self._lock:
            if self._file is None:
                return
            if (refused := self._write_backlog()) is not None:
                raise refused
            self._flush_lines(self._file)
            if not self._directory_flushed:
                atomic.flush_directory(self._path.parent)
                self._directory_flushed = True

    @property
    def waiting(self) -> bytes:
        """The last lines, which the disk may lack. From any thread."""
        with self._lock:
            return b"".join((*self._unflushed, *self._backlog))

    def end(self, outcome: Outcome) -> None:
        try:
            self.flush()
        except OSError as error:
            _logger.warning("%s lacks the last %d records or more: %s", self._path, len(self._backlog), error)
        with self._lock:
            if self._file is not None:
                os.close(self._file)
                self._file = None

    def _write_backlog(self) -> OSError | None:
        """Write the records that wait; return the error if the file takes no more."""
        while self._backlog and self._file is not None:
            try:
                self._truncate(self._file)
                self._is_torn = True
                line, written = self._backlog[0], 0
                while written < len(line):  # a disk with room for a part takes that, and says at the rest what it lacks
                    written += os.write(self._file, line[written:])
            except OSError as error:
                with suppress(OSError):
                    self._truncate(self._file)
                if not self._is_refused:
                    self._is_refused = True
                    _logger.warning("%s cannot be written, records wait in memory: %s", self._path, error)
                return OSError(error.errno, error.strerror or str(error), str(self._path))
            self._is_torn = False
            self._size += written
            self._unflushed.append(self._backlog.popleft())
        self._is_refused = False
        return None

    def _truncate(self, file: int) -> None:
        """Remove what a failed write or flush has left at the end of the file. Raises OSError."""
        if self._is_torn:
            os.ftruncate(file, self._size)
            self._is_torn = False

    def _flush_lines(self, file: int) -> None:
        """Flush the file. If that fails, its new lines wait in memory again: the next flush may succeed without them.

        A file server reports only then that it has no room for them. Raises OSError.
        """
        try:
            os.fsync(file)
        except OSError:
            self._size -= sum(map(len, self._unflushed))
            self._backlog.extendleft(reversed(self._unflushed))
            self._is_torn = True
            raise
        finally:
            self._unflushed.clear()


_LAUNCH_EVENTS = frozenset(name for name, kind in EVENTS.items() if kind.begins_launch)


def rewind(path: Path, step: int, first: int = 0) -> None:
    """Restore `path` to what it was when the checkpoint at `step` was saved, for a run that resumes from it.

    Drops incomplete lines, records before `first` and after `step`, duplicates by `RecordKey`, and events at `step`
    that say how a launch began, since this launch writes its own. Atomic; does nothing if there is no such file.
    """
    seen: defaultdict[tuple[str, str], array[int]] = defaultdict(lambda: array("q"))  # steps, ascending

    def is_kept(line: bytes) -> bool:
        key = _key_of_line(line)
        if key is None or not first <= key.step <= step or (key.step == step and key.part in _LAUNCH_EVENTS):
            return False
        steps = seen[key.kind, key.part]
        place = bisect_left(steps, key.step)
        if is_new := place == len(steps) or steps[place] != key.step:
            steps.insert(place, key.step)
        return is_new

    if atomic.exists(path):
        atomic.keep_lines(path, is_kept)


class RecordKey(NamedTuple):
    """Identifies a record within its run; `part`: an evaluation's split; an event's name and `distinct_by` detail."""

    kind: str
    step: int
    part: str


def record_key(record: Record) -> RecordKey:
    """Return what identifies `record` within its run."""
    key = _key_of_fields(_fields(record))
    assert key is not None
    return key


class _TrainLine(msgspec.Struct):
    step: Count


_TRAIN_LINE = msgspec.json.Decoder(_TrainLine)  # takes a tenth of the time, but lets pass what is not UTF-8


def _key_of_line(line: bytes) -> RecordKey | None:
    with suppress(ValueError, KeyError, TypeError, AttributeError, RecursionError):
        if line.startswith(TRAIN_LINE) and line.isascii():
            return RecordKey("train", _TRAIN_LINE.decode(line).step, "")
        return _key_of_fields(json.loads(line))
    return None


def _key_of_fields(fields: Mapping[str, object]) -> RecordKey | None:
    kind, step = fields["kind"], fields["step"]
    part = fields.get({"eval": "split", "event": "event"}.get(str(kind), ""), "")
    if kind == "event" and part in EVENTS and (detail := EVENTS[str(part)].distinct_by) in fields:
        part = f"{part} {fields[detail]}"
    if isinstance(kind, str) and isinstance(step, int) and isinstance(part, str):
        return RecordKey(kind, step, part)
    return None
