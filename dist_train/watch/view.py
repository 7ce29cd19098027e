"""The live terminal view of a run: its panels, their layout in a terminal of a given size, and the redraw loop."""

from __future__ import annotations

import math
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from statistics import fmean, median
from types import FrameType

import numpy
from rich.box import ROUNDED, Box
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.layout import Layout
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from uniplot import plot_to_string

from dist_train.monitoring import wording
from dist_train.monitoring.console import progress_bar, summary_table
from dist_train.outcome import escaped
from dist_train.rundir.records import EVENTS, EvaluationRecord, Outcome, RankMeasurement, TrainRecord
from dist_train.rundir.status import RanksReading
from dist_train.start_up import restore_handlers
from dist_train.watch.figure import ACCURACY, BATCH, LOSS, Chart, Measured, Quantity, learning_curve
from dist_train.watch.run import History, Snapshot, WatchedRun
from dist_train.watch.run_state import seconds_of
from dist_train.watch.run_table import COLOURS

_HEADER = 5  # four lines and an empty one
_WIDE = 90  # from this many columns on, panels are placed side by side
_RATES = 9
_RATES_COLUMNS = 52
_EVENTS = 5
_BAD_EVENTS = frozenset(name for name, kind in EVENTS.items() if kind.is_bad)
_GOOD_CURVES = 11
_SLOWEST = 10
_BORDER = 2


@dataclass(frozen=True)
class Plan:
    """Rows of each part, 0 if left out. `wide`: loss and accuracy, and rates and ranks, are side by side."""

    wide: bool
    curves: int
    accuracy: int  # rows of the accuracy below the loss; 0 if they are side by side
    rates: int
    ranks: int  # rows of the ranks below the rates; 0 if they are side by side
    events: int


def plan(columns: int, rows: int, rank_count: int) -> Plan:
    """Return the layout for a terminal of that size; from 60 x 20 on it has at least the loss and the rates."""
    left = max(0, rows - _HEADER)
    ranks = min(rank_count, _SLOWEST + 1) + 1 + _BORDER if rank_count else 0
    if columns >= _WIDE:
        rates = max(_RATES, min(ranks, left - _EVENTS - _GOOD_CURVES))
        events = _EVENTS if left - rates - _EVENTS >= _GOOD_CURVES else 0
        if left - rates < _LEAST_HEIGHT:
            rates = max(0, left - _LEAST_HEIGHT)
        return Plan(True, left - rates - events, 0, rates, 0, events)
    rates = min(4, left)
    left -= rates
    least = _LEAST_HEIGHT + 1
    accuracy = least if left >= 2 * least else 0
    left -= accuracy
    shown_ranks = ranks if left - ranks >= least else 0
    left -= shown_ranks
    events = _EVENTS if left - _EVENTS >= least else 0
    left -= events
    # Remaining rows are divided between both curves.
    share = (left - accuracy) // 2 if accuracy and left > accuracy else 0
    return Plan(False, left - share, accuracy + share, rates, shown_ranks, events)


def frame(run: Snapshot, columns: int, rows: int) -> Layout:
    """Return the view of the run, `rows` lines of `columns` characters."""
    rank_count = len(run.ranks.ranks) if run.ranks else 0
    parts = plan(columns, rows, rank_count)
    body = _side_by_side(run, columns, parts) if parts.wide else _below_each_other(run, columns, parts)
    if parts.events:
        body.append(Layout(Panel(_events(run, parts.events - _BORDER), title="events"), size=parts.events))
    layout = Layout()
    layout.split_column(Layout(_header(run), size=_HEADER), *body)
    return layout


def summary(run: Snapshot, box: Box | None) -> Table:
    """Return a table of how a run ended, one fact per row."""
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
    steps, epochs = run.total_steps or run.step, run.total_epochs or run.epoch
    return summary_table(run.name, run.run.root, steps, epochs, outcome, box=box)


def _side_by_side(run: Snapshot, columns: int, parts: Plan) -> list[Layout]:
    half = columns // 2
    curves = _row(
        parts.curves,
        Layout(_curves(run.history, LOSS, half - 1, parts.curves), size=half),
        Layout(_curves(run.history, ACCURACY, columns - half, parts.curves), size=columns - half),
    )
    if not parts.rates:
        return [curves]
    narrow = min(half, _RATES_COLUMNS)
    rates = Layout(Panel(_rates(run), title="rates"), size=narrow)
    ranks = Layout(_ranks_panel(run, parts.rates), size=columns - narrow)
    return [curves, _row(parts.rates, rates, ranks)]


def _below_each_other(run: Snapshot, columns: int, parts: Plan) -> list[Layout]:
    pairs = [*([] if parts.accuracy else _accuracy_pairs(run)), *_rate_pairs(run)]
    shown = [Layout(_in_lines(pairs, columns), size=parts.rates)] if parts.rates else []
    shown.append(Layout(_curves(run.history, LOSS, columns, parts.curves), size=parts.curves))
    if parts.accuracy:
        shown.append(Layout(_curves(run.history, ACCURACY, columns, parts.accuracy), size=parts.accuracy))
    if parts.ranks:
        shown.append(Layout(_ranks_panel(run, parts.ranks), size=parts.ranks))
    return shown


def _ranks_panel(run: Snapshot, rows: int) -> Panel:
    if run.ranks is None:
        return Panel(Text("not measured" if run.is_over else "not measured yet", style="dim"), title="ranks")
    return Panel(_ranks(run.ranks, rows - _BORDER), title=f"ranks at step {run.ranks.step:,}")


def _row(rows: int, *columns: Layout) -> Layout:
    row = Layout(size=rows)
    row.split_row(*columns)
    return row


_RESIZE_SECONDS = 0.2  # how often the view checks the terminal's size
_LEAST_COLUMNS, _LEAST_ROWS = 60, 20


def show_once(run: WatchedRun, console: Console) -> None:
    """Print the current view once, as high as the terminal; below it the state's reason, if the view has cut it."""
    seen, columns, rows = run.look(), max(_LEAST_COLUMNS, console.width), max(_LEAST_ROWS, console.height - 1)
    console.print(frame(seen, columns, rows), width=columns, height=rows, crop=False)
    if (state := _state(seen)).cell_len > columns:
        console.print(Text(state.plain, overflow="fold"))


def watch(run: WatchedRun, console: Console, interval: float) -> None:
    """Show the run, updated every `interval` seconds, until Ctrl-C, or until it ends; then print its summary."""
    if run.look().is_over:
        show_once(run, console)
        return
    try:
        with _ending_in_order(), Live(console=console, screen=True, auto_refresh=False) as live:
            while not (seen := run.look()).is_over:
                size, until = None, time.monotonic() + interval
                while time.monotonic() < until:
                    # Redraw when the terminal is resized.
                    if live.console.size != size:
                        size = live.console.size
                        live.update(frame(seen, size.width, size.height), refresh=True)
                    time.sleep(max(0.0, min(until - time.monotonic(), _RESIZE_SECONDS)))
    except KeyboardInterrupt:
        return
    console.print(summary(seen, box=ROUNDED))


@contextmanager
def _ending_in_order() -> Iterator[None]:
    """End by an exception on SIGTERM and SIGHUP in the block, so that the terminal is as before; unless ignored."""

    def end(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)

    ending = [each for each in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(each) == signal.SIG_DFL]
    before = {int(each): signal.signal(each, end) for each in ending}
    try:
        yield
    finally:
        restore_handlers(before)


def _header(run: Snapshot) -> Group:
    """Return four lines: name and state, facts, progress bar, last activity."""
    epoch = wording.epochs(run.epoch) + (f" of {wording.epochs(run.total_epochs)}" if run.total_epochs else "")
    bar = progress_bar(epoch, run.step, run.total_steps, run.seconds_left)
    return Group(_state(run), _facts_line(run), bar, _sign_of_life(run))


def _state(run: Snapshot) -> Text:
    state = Text(no_wrap=True, overflow="ellipsis")
    state.append(escaped(run.name), style="bold").append("  ")
    state.append(run.state, style=f"bold {COLOURS.get(run.state, 'yellow')}")
    return state.append(f": {escaped(run.reason)}" if run.reason else "")


def _rates(run: Snapshot) -> Table:
    """Return the latest rates, one per line."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(no_wrap=True, overflow="ellipsis")
    for row in _rate_pairs(run):
        table.add_row(*row)
    return table


def _in_lines(pairs: Sequence[tuple[str, str]], columns: int) -> Text:
    """Return names and values as running text, for narrow terminals; a value stays on the line of its name."""
    lines = [Text()]
    for name, value in pairs:
        pair = Text.assemble((f"{name} ", "dim"), value, "  ")
        if lines[-1] and lines[-1].cell_len + pair.cell_len > columns:
            lines.append(Text())
        lines[-1].append_text(pair)
    return Text("\n").join(lines)


def _rate_pairs(run: Snapshot) -> list[tuple[str, str]]:
    """Return the run's pace and the latest update's numbers, as pairs of name and value."""
    latest = run.history.latest[-1] if run.history.latest else None
    pairs = []
    if latest is not None:
        times = [record.step_seconds for record in run.history.latest]
        seconds = fmean(times)
        # Weighted by time: the images of these updates over their time.
        rate = fmean((record.samples_per_second for record in run.history.latest), times if any(times) else None)
        pairs = [
            ("images/s", wording.rate(rate)),
            ("step time", f"{wording.rate(seconds * 1_000)} ms" if seconds < 1 else f"{wording.rate(seconds)} s"),
            ("learning rate", f"{latest.learning_rate:.4g}"),
            ("noise", f"{latest.noise_amplitude:.3g}"),
            ("gradient norm", f"{latest.gradient_norm:.4g}" if math.isfinite(latest.gradient_norm) else "not finite"),
        ]
    best = run.history.best_accuracy()
    if best is not None:
        pairs.append(("best test", wording.percent(best)))
    return [*pairs, ("checkpoints", _checkpoints(run))]


def _ranks(reading: RanksReading, rows: int) -> Group:
    """Return the ranks with the slowest marked; if not all fit, the slowest ones and a summary of all."""
    seconds = [each.busy_seconds if math.isfinite(each.busy_seconds) else -math.inf for each in reading.ranks]
    slowest_first = sorted(range(len(seconds)), key=lambda rank: -seconds[rank])
    fitting = max(1, rows - 1)
    complete = len(slowest_first) <= fitting
    shown = sorted(slowest_first) if complete else slowest_first[: max(1, fitting - 1)]
    has_device = any(math.isfinite(each.device_bytes) for each in reading.ranks)
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for heading in ("rank", "busy", "wait", "memory", *(("device", "in use") if has_device else ()), ""):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for rank in shown:
        measured = reading.ranks[rank]
        marked = rank == slowest_first[0] and len(reading.ranks) > 1
        share = measured.device_utilization
        in_use = f"{share:.0%}" if math.isfinite(share) else ""
        device = (_bytes(measured.device_bytes), in_use) if has_device else ()
        table.add_row(
            str(rank),
            _time(measured.busy_seconds),
            _time(measured.wait_seconds),
            _bytes(measured.resident_bytes),
            *device,
            "slowest" if marked else "",
            style="yellow" if marked else "",
        )
    return Group(table) if complete else Group(table, _summary(reading.ranks))


def _events(run: Snapshot, rows: int) -> Group:
    """Return the latest events, the newest last."""
    lines = []
    for record in list(run.history.events)[-rows:]:
        age = f"{_age(max(0.0, run.now - record.time))} ago"
        line = Text(no_wrap=True, overflow="ellipsis").append(f"{age:>10}  ", style="dim")
        lines.append(line.append(wording.event(record), style="red" if record.event in _BAD_EVENTS else ""))
    return Group(*lines or [Text("none", style="dim")])


def _accuracy_pairs(run: Snapshot) -> list[tuple[str, str]]:
    """Return the latest accuracies, for a view without accuracy curves."""
    latest = run.history.latest[-1] if run.history.latest else None
    pairs = [] if latest is None else [("accuracy", wording.percent(latest.accuracy))]
    evaluations = run.history.evaluations.items()
    return [*pairs, *((escaped(name), wording.percent(each[-1].accuracy)) for name, each in evaluations)]


_LEAST_HEIGHT = 7
_FRAME = 4  # lines around the curves: heading, border, labels below
_CURVE_COLOURS = {BATCH: "cyan", "train": "yellow", "test": "magenta", "train-averaged": "red", "validation": "blue"}


def _curves(history: History, quantity: Quantity, columns: int, rows: int) -> Group:
    """Return loss or accuracy so far: a heading, and curves drawn with characters."""
    chart = learning_curve(quantity, Measured("", history.train, history.evaluations), columns)
    heading = Text(no_wrap=True, overflow="ellipsis").append(quantity.name, style="bold")
    batches = history.latest or history.train
    latest: dict[str, TrainRecord | EvaluationRecord] = {BATCH: batches[-1]} if batches else {}
    latest |= {split: found[-1] for split, found in history.evaluations.items()}
    for name, record in latest.items():
        value = _short_text(quantity, quantity.take(record))
        heading.append("  ").append(f"{escaped(name)} {value}", style=_CURVE_COLOURS.get(name, "green"))
    return Group(heading, _ByEncoding(partial(_plot, chart, quantity, columns, max(1, rows - _FRAME))))


def _short_text(quantity: Quantity, value: float) -> str:
    if not math.isfinite(value):
        return "not finite"
    return f"{value * 100:.1f} %" if quantity is ACCURACY else f"{value:.3g}"


@dataclass(frozen=True)
class _ByEncoding:
    """The text that `draw` returns for a console that has ASCII's characters only (True), or all (False)."""

    draw: Callable[[bool], Text]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self.draw(options.ascii_only)


_AS_ASCII = str.maketrans("╭╮╰╯─│", "++++-|")  # of a plot's frame


@numpy.errstate(divide="ignore")  # of uniplot, before its OverflowError
def _plot(chart: Chart | None, quantity: Quantity, columns: int, rows: int, is_ascii: bool) -> Text:
    least = 0.0 if chart and chart.left.is_logarithmic else -math.inf
    measured = chart.series if chart else ()
    series = [each for each in measured if any(least < point.y < math.inf for point in each.points)]
    if chart is None or not series:
        return Text("nothing measured yet", style="dim")
    try:
        plot = plot_to_string(
            [
                [point.y * quantity.factor if least < point.y < math.inf else math.nan for point in each.points]
                for each in series
            ],
            [[point.x for point in each.points] for each in series],
            lines=[True] * len(series),
            color=[_CURVE_COLOURS.get(each.style, "green") for each in series],
            character_set="ascii" if is_ascii else "braille",
            rounded_corners=True,
            width=columns,
            height=rows,
            line_length_hard_cap=columns,
            x_min=0.0,
            x_gridlines=[],
            y_gridlines=[],
            y_unit=quantity.unit,
            y_as_log=chart.left.is_logarithmic,
        )
    except (RuntimeError, OverflowError):  # uniplot's labels leave no column, or a single value is above 1e16
        return Text("")
    *lines, labels = plot.split("\n")
    # Put the axis title into the widest gap between the labels below.
    gap = max(re.finditer(" +", labels), key=lambda match: len(match[0]), default=None)
    if gap is not None and len(gap[0]) >= len(chart.x.title) + 2:
        labels = labels[: gap.start()] + chart.x.title.center(len(gap[0])) + labels[gap.end() :]
    drawn = "\n".join([*lines, labels])
    return Text.from_ansi(drawn.translate(_AS_ASCII) if is_ascii else drawn, no_wrap=True)


def _facts_line(run: Snapshot) -> Text:
    settings, status = run.settings, run.status
    facts = [escaped(str(fact)) for fact in (settings.model, settings.data) if fact]
    if settings.global_size:
        facts.append(f"batch {settings.global_size:,}")
    if status is not None:
        facts.append(wording.plural(status.world_size, "rank"))
    if settings.noise:
        facts.append(f"noise {escaped(settings.noise)}")
    return Text(", ".join(facts), style="dim", no_wrap=True, overflow="ellipsis")


def _sign_of_life(run: Snapshot) -> Text:
    line = Text(no_wrap=True, overflow="ellipsis")
    if run.problem:
        line.append(run.problem, style="bold red").append("  ")
    if run.silence is None:
        return line.append("no activity yet", style="dim")
    age = _age(run.silence)
    if run.is_over and run.state != "lost":
        line.append(f"ended {age} ago", style="dim")
    elif run.silent:
        line.append(f"no activity for {age}", style="bold red")
    else:
        line.append(f"last activity {age} ago", style="dim")
    if run.status is not None and run.status.host:
        line.append(f" on {escaped(run.status.host)}, process {run.status.pid}", style="dim")
    return line


def _checkpoints(run: Snapshot) -> str:
    if not run.checkpoints:
        return "none yet"
    last = f"step {run.checkpoints[-1]:,}"
    record = run.history.checkpoint
    if record is not None and record.step == run.checkpoints[-1]:
        last += f", {_age(max(0.0, run.now - record.time))} ago"
    return f"{last} ({len(run.checkpoints)} kept)"


def _summary(measured: Sequence[RankMeasurement]) -> Text:
    def spread(name: str, field: str, word: Callable[[float], str]) -> str:
        known = [value for rank in measured if math.isfinite(value := getattr(rank, field))]
        return f"{name} {word(min(known))}, {word(median(known))}, {word(max(known))}" if known else f"{name} ?"

    fields = (("busy", "busy_seconds", _time), ("wait", "wait_seconds", _time), ("memory", "resident_bytes", _bytes))
    parts = "; ".join(spread(*each) for each in fields)
    text = f"{wording.plural(len(measured), 'rank')} (least, median, most): {parts}"
    return Text(text, style="dim", no_wrap=True, overflow="ellipsis")


def _age(seconds: float) -> str:
    """Return a duration as text: 12 s, 3 min, 2:05:00."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 3_600 else wording.duration(seconds)


def _time(seconds: float) -> str:
    if not math.isfinite(seconds):
        return ""
    return f"{seconds * 1_000:.0f} ms" if seconds < 1 else f"{seconds:.2f} s"


def _bytes(size: float) -> str:
    if not math.isfinite(size):
        return ""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"
