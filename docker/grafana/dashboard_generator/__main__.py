"""`python -m dashboard_generator DIRECTORY`: write every dashboard as JSON."""

from __future__ import annotations

import argparse
from pathlib import Path

from dashboard_generator import all_runs, one_run, runbook
from dashboard_generator.frame import to_json


def generate(runbook_markdown: str) -> dict[str, str]:
    """Return the content of every dashboard, by file name."""
    return {
        "all_runs.json": to_json(all_runs.build()),
        "one_run.json": to_json(one_run.build()),
        "runbook.json": to_json(runbook.build(runbook_markdown)),
    }


def main() -> None:
    """Write the files named on the command line."""
    parser = argparse.ArgumentParser(prog="python -m dashboard_generator", description=__doc__)
    parser.add_argument("directory", type=Path, help="where to write the JSON files")
    parser.add_argument("--runbook", type=Path, default=Path("docs/runbook.md"), help="the text of the runbook")
    arguments = parser.parse_args()
    for name, content in generate(arguments.runbook.read_text(encoding="utf-8")).items():
        (arguments.directory / name).write_text(content, encoding="utf-8")


if __name__ == "__main__":
    main()
