"""The file of measured rows: the latest of each group, with the machine that measured them."""

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
    """Return the rows stored in `path`, by group; empty if there is no file.

    Raises:
        UsageError: it is not such a file.
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
    """Store the groups `measured` in `path`, replacing earlier rows of these groups.

    Raises:
        UsageError: it is not such a file.
    """
    groups = {name: asdict(group) for name, group in {**read_record(path), **measured}.items()}
    atomic.write_text(path, json.dumps(groups, indent=2) + "\n")
