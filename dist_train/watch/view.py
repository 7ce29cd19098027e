"""The view of a run as one picture of a given size, drawn again until the run ends."""

from __future__ import annotations

import time
from dataclasses import dataclass

from rich.box import ROUNDED, Box
from rich.console import Console
from rich.layout import Layout
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from dist_train.monitoring.console import summary_table
from dist_train.rundir.records import Outcome, RunFacts
from dist_train.watch import panels
from dist_train.watch.figure import ACCURACY, LOSS
from dist_train.watch.panels import LEAST_HEIGHT
from dist_train.watch.run import Snapshot, WatchedRun
from dist_train.watch.run_table import seconds_of

_HEADER = 5
"""Four lines and an empty one."""
_WIDE = 90
"""Columns from which on two panels stand side by side."""
_RATES = 9
_RATES_COLUMNS = 52
_EVENTS = 5
_GOOD_CURVES = 11
_SLOWEST = 10
_BORDER = 2


@dataclass(frozen=True)
class Plan:
    """Rows of each part; 0: left out. `wide`: the curves, and rates and ranks, stand side by side."""

    wide: bool
    curves: int
    accuracy: int
    """Rows of the accuracy below the loss; always 0 where they stand side by side."""
    rates: int
    ranks: int
    """Rows of the ranks below the rates; always 0 where they stand side by side."""
    events: int


def plan(columns: int, rows: int, rank_count: int) -> Plan:
    """Return what is shown in a terminal of that size; from 60 x 20 on the loss and the rates always are."""
    left = max(0, rows - _HEADER)
    ranks = min(rank_count, _SLOWEST + 1) + 1 + _BORDER if rank_count else 0
    if columns >= _WIDE:
        rates = max(_RATES, ranks)
        while rates > _RATES and left - rates - _EVENTS < _GOOD_CURVES:
            rates -= 1
        events = _EVENTS if left - rates - _EVENTS >= _GOOD_CURVES else 0
        if left - rates < LEAST_HEIGHT:
            rates = max(0, left - LEAST_HEIGHT)
        return Plan(True, left - rates - events, 0, rates, 0, events)
    rates = min(4, left)
    left -= rates
    least = LEAST_HEIGHT + 1
    accuracy = least if left >= 2 * least else 0
    left -= accuracy
    shown_ranks = ranks if left - ranks >= least else 0
    left -= shown_ranks
    events = _EVENTS if left - _EVENTS >= least else 0
    left -= events
    # what is over goes to both curves alike
    share = (left - accuracy) // 2 if accuracy and left > accuracy else 0
    return Plan(False, left - share, accuracy + share, rates, shown_ranks, events)


def frame(run: Snapshot, columns: int, rows: int) -> Layout:
    """Return the run as `rows` lines of `columns`."""
    rank_count = len(run.ranks.ranks) if run.ranks else 0
    parts = plan(columns, rows, rank_count)
    body = _side_by_side(run, columns, parts) if parts.wide else _below_each_other(run, columns, parts)
    if parts.events:
        body.append(Layout(Panel(panels.events(run, parts.events - _BORDER), title="events"), size=parts.events))
    layout = Layout()
    layout.split_column(Layout(panels.header(run, columns), size=_HEADER), *body)
    return layout


def summary(run: Snapshot, box: Box | None) -> Table:
    """Return how a run that is over has ended, one fact a row."""
    status, history = run.status, run.history
    train, test = history.evaluated("train"), history.evaluated("test")
    started = run.now if status is None else seconds_of(status.started)
    ended = run.now if status is None else seconds_of(status.finished or status.updated)
    outcome = Outcome(
        state=run.state,
        reason=run.reason,
        exit_code=(status.exit_code if status else None) or 0,
        step=run.step,
        epoch=run.epoch,
        seconds=max(0.0, ended - started),
        train_accuracy=train.accuracy if train else None,
        test_accuracy=test.accuracy if test else None,
        best_accuracy=history.best_accuracy(),
        samples_per_second=status.samples_per_second if status else None,
        last_checkpoint=run.run.checkpoint(run.checkpoints[-1]) if run.checkpoints else None,
    )
    return summary_table(_facts(run), outcome, box=box)


def _side_by_side(run: Snapshot, columns: int, parts: Plan) -> list[Layout]:
    half = columns // 2
    curves = _row(
        parts.curves,
        Layout(panels.curves(run.history, LOSS, half - 1, parts.curves), size=half),
        Layout(panels.curves(run.history, ACCURACY, columns - half, parts.curves), size=columns - half),
    )
    if not parts.rates:
        return [curves]
    narrow = min(half, _RATES_COLUMNS)
    rates = Layout(Panel(panels.rates(run), title="rates"), size=narrow)
    beside = Layout(_ranks_panel(run, parts.rates), size=columns - narrow)
    return [curves, _row(parts.rates, rates, beside)]


def _below_each_other(run: Snapshot, columns: int, parts: Plan) -> list[Layout]:
    accuracies = [] if parts.accuracy else panels.accuracy_pairs(run)
    pairs = [*accuracies, *panels.rate_pairs(run)]
    shown = [Layout(panels.in_lines(pairs), size=parts.rates)] if parts.rates else []
    shown.append(Layout(panels.curves(run.history, LOSS, columns, parts.curves), size=parts.curves))
    if parts.accuracy:
        shown.append(Layout(panels.curves(run.history, ACCURACY, columns, parts.accuracy), size=parts.accuracy))
    if parts.ranks:
        shown.append(Layout(_ranks_panel(run, parts.ranks), size=parts.ranks))
    return shown


def _ranks_panel(run: Snapshot, rows: int) -> Panel:
    if run.ranks is None:
        return Panel(Text("not measured yet", style="dim"), title="ranks")
    title = f"ranks at step {run.ranks.step:,}"
    return Panel(panels.ranks(run.ranks, rows - _BORDER), title=title)


def _row(rows: int, *columns: Layout) -> Layout:
    row = Layout(size=rows)
    row.split_row(*columns)
    return row


def _facts(run: Snapshot) -> RunFacts:
    """Return what the directory says of the run; what the summary does not show stays empty."""
    steps = run.total_steps or run.step
    return RunFacts(
        name=run.name,
        run_directory=run.run.root,
        model=run.settings.model or "",
        data=run.settings.data or "",
        parameters=0,
        global_size=run.settings.global_size or 0,
        micro_size=0,
        micro_batches=0,
        world_size=run.status.world_size if run.status else 0,
        total_steps=steps,
        steps_per_epoch=max(1, round(run.history.steps_per_epoch or 1)),
        epochs=run.epochs or run.epoch,
        noise=run.settings.noise or "",
        start_step=0,
        controller="",
    )


_RESIZE_SECONDS = 0.2
"""How soon the view follows the size of the terminal."""
_LEAST_COLUMNS, _LEAST_ROWS = 60, 20


def show_once(run: WatchedRun, console: Console) -> None:
    """Print the run as it is now, as high as the terminal."""
    columns, rows = max(_LEAST_COLUMNS, console.width), max(_LEAST_ROWS, console.height - 1)
    console.print(frame(run.look(), columns, rows), width=columns, height=rows, crop=False)


def watch(run: WatchedRun, console: Console, interval: float) -> None:
    """Show the run, looking every `interval` seconds, until it ends or the user presses Ctrl-C; then sum it up."""
    if run.look().is_over:
        show_once(run, console)
        return
    try:
        with Live(console=console, screen=True, auto_refresh=False) as live:
            while not (seen := run.look()).is_over:
                size, until = None, time.monotonic() + interval
                while time.monotonic() < until:
                    # also where the terminal has changed its size
                    if live.console.size != size:
                        size = live.console.size
                        live.update(frame(seen, size.width, size.height), refresh=True)
                    time.sleep(max(0.0, min(until - time.monotonic(), _RESIZE_SECONDS)))
    except KeyboardInterrupt:
        return
    console.print(summary(seen, box=ROUNDED))
