"""The file that measured rows are kept in: the last of each group, with the machine that they come from."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.machine import Machine
from benchmarks.timing import Ratio
from dist_train.outcome import UsageError
from dist_train.rundir import atomic


@dataclass(frozen=True)
class Measured:
    """The rows of one group, measured in one run."""

    machine: Machine
    rows: Sequence[Ratio]


def read_record(path: Path) -> dict[str, Measured]:
    """Return what the file at `path` keeps, by group; nothing where there is no file.

    Raises:
        UsageError: it is another kind of file.
    """
    if not path.exists():
        return {}
    try:
        return {
            name: Measured(Machine(**group["machine"]), [Ratio(**row) for row in group["rows"]])
            for name, group in json.loads(path.read_text(encoding="utf-8")).items()
        }
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UsageError(
            f"{path} does not hold measured rows ({error}): name another file", code="record-damaged"
        ) from error


def keep(path: Path, measured: Mapping[str, Measured]) -> None:
    """Put the groups `measured` into the file at `path`, in place of what it has of them and beside the others.

    Raises:
        UsageError: it is another kind of file.
    """
    groups = {name: asdict(group) for name, group in {**read_record(path), **measured}.items()}
    atomic.write_text(path, json.dumps(groups, indent=2) + "\n")
