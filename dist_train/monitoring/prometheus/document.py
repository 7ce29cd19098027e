"""The table of metrics in `docs/monitoring.md`; `python -m` this module, with the page, renews it."""

from __future__ import annotations

import sys
from pathlib import Path

from dist_train.marked_text import replaced_between
from dist_train.monitoring.prometheus.metric import Scope
from dist_train.monitoring.prometheus.table import METRICS

BEGIN, END = "<!-- metrics -->", "<!-- end of metrics -->"

_PAGES = {Scope.RUN: "rank 0", Scope.RANK: "every rank, its own", Scope.BOTH: "every rank"}


def metrics_markdown() -> str:
    """Return the table: name, kind, labels, unit, meaning, and whose page has it."""
    lines = ["| metric | kind | labels | unit | meaning | page of |", "|---|---|---|---|---|---|"]
    for metric in METRICS:
        labels = ", ".join(f"`{label}`" for label in metric.labels)
        cells = (f"`{metric.name}`", metric.kind.value, labels, metric.unit, metric.meaning, _PAGES[metric.scope])
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def with_table(text: str) -> str:
    """Return `text` with the table between its markers renewed. Raises UsageError where it has no markers."""
    return replaced_between(text, BEGIN, END, metrics_markdown())


def main(path: Path) -> None:
    """Renew the table in the file at `path`."""
    path.write_text(with_table(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
