"""Counts of faults and problems by kind, and their table."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table

_COLUMNS = {
    "lost": "lost",
    "wrong": "wrong",
    "hang": "hangs",
    "orphans": "orphans",
    "traceback": "tracebacks",
    "other": "other",
}


@dataclass
class Row:
    """One kind of fault."""

    count: int = 0
    recovered: int = 0
    problems: Counter[str] = field(default_factory=Counter)


@dataclass
class Tally:
    """Counts of all kinds. A problem counts for every kind of fault of its trial; the details say more."""

    rows: dict[str, Row] = field(default_factory=dict)
    details: list[str] = field(default_factory=list)

    @property
    def hits(self) -> int:
        """The number of faults that have happened."""
        return sum(row.count for row in self.rows.values())

    def add(self, kinds: list[str], problems: list[str], trial: str) -> None:
        """Add the faults and problems of a trial."""
        for kind in kinds:
            row = self.rows.setdefault(kind, Row())
            row.count += 1
            row.recovered += not problems
        for problem in problems:
            self.details.append(f"{trial}: {problem}")
            word = problem.partition(":")[0].partition(" ")[0]
            for kind in set(kinds) or {"none"}:
                self.rows.setdefault(kind, Row()).problems[word if word in _COLUMNS else "other"] += 1

    def table(self) -> Table:
        """Return the table, with sums."""
        table = Table(
            title="lost: checkpoints; wrong: weights or records; hangs: over 60 s; tracebacks: shown to the user",
            title_justify="left",
        )
        table.add_column("fault", no_wrap=True)
        for name in ("count", "recovered", *_COLUMNS.values()):
            table.add_column(name, justify="right")
        for kind, row in sorted(self.rows.items()):
            numbers = [row.count, row.recovered, *(row.problems[name] for name in _COLUMNS)]
            table.add_row(kind, *map(str, numbers))
        table.add_section()
        rows = list(self.rows.values())
        words = Counter(_word(detail) for detail in self.details)
        sums = [self.hits, sum(row.recovered for row in rows), *(words[name] for name in _COLUMNS)]
        table.add_row("all", *map(str, sums))
        return table

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain values."""
        return {
            "faults": self.hits,
            "kinds": {kind: _plain(row) for kind, row in sorted(self.rows.items())},
            "problems": self.details,
        }


def _plain(row: Row) -> dict[str, int]:
    return {"count": row.count, "recovered": row.recovered, **{name: row.problems[name] for name in _COLUMNS}}


def _word(detail: str) -> str:
    word = detail.partition(": ")[2].partition(":")[0].partition(" ")[0]
    return word if word in _COLUMNS else "other"
