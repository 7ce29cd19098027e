"""The table at the end of a run."""

from __future__ import annotations

from rich.box import Box
from rich.table import Table
from rich.text import Text

from dist_train.monitoring import wording
from dist_train.monitoring.records import Outcome, RunFacts

_COLOURS = {"finished": "green", "stopped": "yellow", "failed": "red"}


def summary_table(facts: RunFacts, outcome: Outcome, box: Box | None) -> Table:
    """Return how the run ended, one fact a row."""
    title = Text(facts.name, style="bold")
    table = Table(box=box, show_header=False, title=title, title_justify="left")
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for name, value in _rows(facts, outcome):
        table.add_row(name, value)
    return table


def _rows(facts: RunFacts, outcome: Outcome) -> list[tuple[str, Text]]:
    state = Text(outcome.state, style=f"bold {_COLOURS.get(outcome.state, 'white')}")
    if outcome.reason:
        state.append(f": {outcome.reason}", style="default not bold")
    state.append(f" (exit code {outcome.exit_code})" if outcome.exit_code else "", style="default not bold")
    accuracies = {
        "train accuracy": outcome.train_accuracy,
        "test accuracy": outcome.test_accuracy,
        "best accuracy": outcome.best_accuracy,
    }
    rows = [
        ("state", state),
        ("steps", Text(f"{outcome.step:,} of {facts.total_steps:,}")),
        ("epochs", Text(f"{outcome.epoch:.4g} of {facts.epochs:.4g}")),
        *((name, Text(wording.percent(share))) for name, share in accuracies.items() if share is not None),
    ]
    if outcome.samples_per_second is not None:
        rows.append(("images/s", Text(wording.rate(outcome.samples_per_second))))
    rows.append(("time", Text(wording.duration(outcome.seconds))))
    if outcome.last_checkpoint is not None:
        rows.append(("last checkpoint", Text(str(outcome.last_checkpoint))))
    rows.append(("run directory", Text(str(facts.run_directory))))
    return rows
