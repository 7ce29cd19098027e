"""The tables in `docs/performance.md`; `python -m benchmarks.document RECORD PAGE` writes them from stored rows."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from benchmarks.groups import GROUPS
from benchmarks.record import Measured, read_record
from benchmarks.timing import Ratio
from dist_train.outcome import UsageError

BEGIN, END = "<!-- rows -->", "<!-- end of rows -->"

HEAD = ("row", "ours", "theirs", "ratio", "quartiles", "pairs", "ours takes", "bar")


def tables(record: Mapping[str, Measured]) -> str:
    """Return a table for each machine, with the groups in the order of GROUPS."""
    by_machine: dict[str, list[Ratio]] = {}
    for name in sorted(record, key=list(GROUPS).index):
        by_machine.setdefault(record[name].machine.in_words(), []).extend(record[name].rows)
    return "\n".join(
        f"On {machine}:\n\n{markdown_table(HEAD, map(cells, rows))}" for machine, rows in by_machine.items()
    )


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [head, ("---",) * len(head), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def replaced_between(text: str, begin: str, end: str, content: str) -> str:
    """Return `text` with `content` between the lines `begin` and `end`. Raises UsageError if these are missing."""
    before, found_begin, rest = text.partition(begin)
    _, found_end, after = rest.partition(end)
    if not found_begin or not found_end:
        raise UsageError(
            f"the file has no place for the table: it needs the lines {begin} and {end}", code="no-place-for-table"
        )
    return f"{before}{begin}\n\n{content}\n{end}{after}"


def cells(row: Ratio) -> tuple[str, ...]:
    """Return a row of a table under `HEAD`."""
    images = row.images_per_second
    taken = f"{row.amount_ours:,.0f}" if row.amount_ours >= 1000 else f"{row.amount_ours:.3g}"
    amount = f"{taken} {row.unit}" + ("" if images is None else f", {images:,.0f} images/s")
    bar = "stated" if row.bar is None else f"{row.bar:.3f} {'holds' if row.holds else 'missed'}"
    quartiles = f"{row.lower:.3f}-{row.upper:.3f}"
    return (row.row, row.ours, row.theirs, f"{row.median:.3f}", quartiles, str(row.pairs), amount, bar)


def main(record: Path, page: Path) -> None:
    """Update the tables of `page`."""
    text = replaced_between(page.read_text(encoding="utf-8"), BEGIN, END, tables(read_record(record)))
    page.write_text(text, encoding="utf-8")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.document", description="Update the tables of PAGE from the rows in RECORD."
    )
    parser.add_argument("record", type=Path, metavar="RECORD", help="such as results/performance-cpu.json")
    parser.add_argument("page", type=Path, metavar="PAGE", help="such as docs/performance.md")
    return parser


if __name__ == "__main__":
    arguments = _parser().parse_args()
    main(arguments.record, arguments.page)
