"""Reads `metrics.jsonl` back, also of a run that is being written or was killed."""

from __future__ import annotations

from pathlib import Path

from dist_train.monitoring.records import Record, from_json


def read_records(path: Path) -> tuple[Record, ...]:
    """Return the records of `path` in order, without torn lines. Raises OSError where it cannot be read."""
    return _parse(path.read_bytes())


def read_last_records(path: Path, size: int = 1 << 16) -> tuple[Record, ...]:
    """Return the records in the last `size` bytes of `path`. Raises OSError where it cannot be read."""
    with path.open("rb") as file:
        end = file.seek(0, 2)
        file.seek(max(0, end - size))
        return _parse(file.read())


def _parse(content: bytes) -> tuple[Record, ...]:
    return tuple(record for line in content.split(b"\n") if (record := from_json(line)) is not None)
