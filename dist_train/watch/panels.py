"""The parts of the live view of a run, each as something that rich draws."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from statistics import fmean, median

from rich.console import Group
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text
from uniplot import plot_to_string

from dist_train.monitoring import wording
from dist_train.outcome import escaped
from dist_train.rundir.records import RankMeasurement
from dist_train.rundir.status import RanksReading
from dist_train.watch.figure import ACCURACY, BATCH, Chart, Measured, Quantity, learning_curve
from dist_train.watch.run import History, Snapshot, silence_in_words
from dist_train.watch.run_table import COLOURS

_BAD_EVENTS = frozenset(
    {"checkpoint_failed", "corrupt_checkpoint", "not_finite", "non_finite_evaluation", "disagreement"}
)


def header(run: Snapshot, columns: int) -> Group:
    """Return four lines: what is trained and its state, the bar, the last sign of life."""
    state = Text(no_wrap=True, overflow="ellipsis")
    state.append(escaped(run.name), style="bold").append("  ")
    state.append(run.state, style=f"bold {COLOURS.get(run.state, 'yellow')}")
    if run.reason:
        state.append(f": {escaped(run.reason)}")
    return Group(state, _facts(run), _bar(run, columns), _sign_of_life(run))


def rates(run: Snapshot) -> Table:
    """Return the latest rates, one a line."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(no_wrap=True, overflow="ellipsis")
    for row in rate_pairs(run):
        table.add_row(*row)
    return table


def in_lines(pairs: Sequence[tuple[str, str]]) -> Text:
    """Return names and values as running text, for narrow terminals."""
    line = Text()
    for name, value in pairs:
        # spaces that do not break keep a number with its name
        line.append(f"{name} ".replace(" ", "\N{NO-BREAK SPACE}"), style="dim")
        line.append(value.replace(" ", "\N{NO-BREAK SPACE}")).append("  ")
    return line


def rate_pairs(run: Snapshot) -> list[tuple[str, str]]:
    """Return what is known of the run's pace and of the latest update."""
    latest = run.history.latest[-1] if run.history.latest else None
    pairs = []
    if latest is not None:
        recent = run.history.latest
        seconds = fmean(record.step_seconds for record in recent)
        pairs = [
            ("images/s", wording.rate(fmean(record.samples_per_second for record in recent))),
            ("step time", f"{seconds * 1_000:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"),
            ("learning rate", f"{latest.learning_rate:.4g}"),
            ("noise", f"{latest.noise_amplitude:.3g}"),
            ("gradient norm", f"{latest.gradient_norm:.4g}" if math.isfinite(latest.gradient_norm) else "not finite"),
        ]
    best = run.history.best_accuracy()
    if best is not None:
        pairs.append(("best test", wording.percent(best)))
    return [*pairs, ("checkpoints", _checkpoints(run))]


def ranks(reading: RanksReading, rows: int) -> Group:
    """Return the ranks, the slowest marked; of more than fit the slowest, and a summary of all."""
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


def events(run: Snapshot, rows: int) -> Group:
    """Return the latest events, the newest last."""
    lines = []
    for record in list(run.history.events)[-rows:]:
        age = f"{silence_in_words(max(0.0, run.now - record.time))} ago"
        line = Text(no_wrap=True, overflow="ellipsis").append(f"{age:>10}  ", style="dim")
        lines.append(line.append(wording.event(record), style="red" if record.event in _BAD_EVENTS else ""))
    return Group(*lines or [Text("none", style="dim")])


def accuracy_pairs(run: Snapshot) -> list[tuple[str, str]]:
    """Return the latest accuracies, for a view without their curves."""
    latest = run.history.latest[-1] if run.history.latest else None
    pairs = [] if latest is None else [("accuracy", wording.percent(latest.accuracy))]
    evaluations = run.history.evaluations.items()
    return [*pairs, *((escaped(name), wording.percent(each[-1].accuracy)) for name, each in evaluations)]


LEAST_HEIGHT = 7
_FRAME = 4
"""Lines that are not the curves themselves: heading, border, labels below."""
_CURVE_COLOURS = {BATCH: "cyan", "train": "yellow", "test": "magenta", "train-averaged": "red", "validation": "blue"}


def curves(history: History, quantity: Quantity, columns: int, rows: int) -> Group:
    """Return loss or accuracy so far, a heading and curves made of characters."""
    batches = history.batches.points()
    chart = learning_curve(quantity, Measured("", batches, history.evaluations, history.steps_per_epoch), columns)
    heading = Text(no_wrap=True, overflow="ellipsis").append(quantity.name, style="bold")
    latest = [("batch", BATCH, record) for record in [*batches, *history.latest][-1:]]
    for name, style, record in (*latest, *((split, split, found[-1]) for split, found in history.evaluations.items())):
        value = _shortly(quantity, quantity.take(record))
        heading.append("  ").append(f"{escaped(name)} {value}", style=_CURVE_COLOURS.get(style, "green"))
    return Group(heading, _plot(chart, quantity, columns, max(1, rows - _FRAME)))


def _shortly(quantity: Quantity, value: float) -> str:
    if not math.isfinite(value):
        return "not finite"
    return f"{value * 100:.1f} %" if quantity is ACCURACY else f"{value:.3g}"


def _plot(chart: Chart | None, quantity: Quantity, columns: int, rows: int) -> Text:
    series = [each for each in chart.series if any(math.isfinite(point.y) for point in each.points)] if chart else []
    if chart is None or not series:
        return Text("nothing measured yet", style="dim")
    least = 0.0 if chart.left.is_logarithmic else -math.inf
    plot = plot_to_string(
        [[point.y * quantity.factor if point.y > least else math.nan for point in each.points] for each in series],
        [[point.x for point in each.points] for each in series],
        lines=[True] * len(series),
        color=[_CURVE_COLOURS.get(each.style, "green") for each in series],
        character_set="braille",
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
    *lines, labels = plot.split("\n")
    # the axis' name in the widest gap of the labels below
    gap = max(re.finditer(" +", labels), key=lambda match: len(match[0]), default=None)
    if gap is not None and len(gap[0]) >= len(chart.x.title) + 2:
        labels = labels[: gap.start()] + chart.x.title.center(len(gap[0])) + labels[gap.end() :]
    return Text.from_ansi("\n".join([*lines, labels]), no_wrap=True)


def _facts(run: Snapshot) -> Text:
    settings, status = run.settings, run.status
    facts = [escaped(str(fact)) for fact in (settings.model, settings.data) if fact]
    if settings.global_size:
        facts.append(f"batch {settings.global_size:,}")
    if status is not None:
        facts.append(wording.plural(status.world_size, "rank"))
    if settings.noise:
        facts.append(f"noise {escaped(settings.noise)}")
    return Text(", ".join(facts), style="dim", no_wrap=True, overflow="ellipsis")


def _bar(run: Snapshot, columns: int) -> Table:
    bar = Table.grid(expand=True, padding=(0, 2, 0, 0))
    bar.width = columns
    for ratio in (None, 1, None, None):
        bar.add_column(ratio=ratio, no_wrap=True)
    planned = f" of {run.epochs:.4g}" if run.epochs else ""
    of_steps = f"/{run.total_steps:,}" if run.total_steps else ""
    left = "" if run.seconds_left is None else f"{wording.duration(run.seconds_left)} left"
    bar.add_row(
        Text.assemble(("epoch ", "dim"), (f"{run.epoch:.4g}{planned}", "bold")),
        ProgressBar(
            run.total_steps or 1, run.step if run.total_steps else 0, complete_style="green", finished_style="green"
        ),
        Text.assemble(("step ", "dim"), f"{run.step:,}{of_steps}"),
        Text(left, style="cyan"),
    )
    return bar


def _sign_of_life(run: Snapshot) -> Text:
    line = Text(no_wrap=True, overflow="ellipsis")
    if run.problem:
        line.append(run.problem, style="bold red").append("  ")
    if run.silence is None:
        return line.append("no sign of life yet", style="dim")
    age = silence_in_words(run.silence)
    if run.is_over and run.state != "lost":
        line.append(f"ended {age} ago", style="dim")
    elif run.silent:
        line.append(f"no sign of life for {age}", style="bold red")
    else:
        line.append(f"last sign of life {age} ago", style="dim")
    if run.status is not None and run.status.host:
        line.append(f" on {escaped(run.status.host)}, process {run.status.pid}", style="dim")
    return line


def _checkpoints(run: Snapshot) -> str:
    if not run.checkpoints:
        return "none yet"
    last = f"step {run.checkpoints[-1]:,}"
    record = run.history.checkpoints[-1] if run.history.checkpoints else None
    if record is not None and record.step == run.checkpoints[-1]:
        last += f", {silence_in_words(max(0.0, run.now - record.time))} ago"
    return f"{last} ({len(run.checkpoints)} kept)"


def _summary(measured: Sequence[RankMeasurement]) -> Text:
    def spread(name: str, values: Sequence[float], word: Callable[[float], str]) -> str:
        known = [value for value in values if math.isfinite(value)]
        return f"{name} {word(min(known))}, {word(median(known))}, {word(max(known))}" if known else f"{name} ?"

    parts = [
        spread("busy", [rank.busy_seconds for rank in measured], _time),
        spread("wait", [rank.wait_seconds for rank in measured], _time),
        spread("memory", [rank.resident_bytes for rank in measured], _bytes),
    ]
    text = f"{wording.plural(len(measured), 'rank')} (least, median, most): {'; '.join(parts)}"
    return Text(text, style="dim", no_wrap=True, overflow="ellipsis")


def _time(seconds: float) -> str:
    if not math.isfinite(seconds):
        return ""
    return f"{seconds * 1_000:.0f} ms" if seconds < 1 else f"{seconds:.2f} s"


def _bytes(size: float) -> str:
    if not math.isfinite(size):
        return ""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"
