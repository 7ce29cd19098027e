"""The runs below a folder as a table, read from their files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import reduce
from itertools import repeat
from pathlib import Path
from typing import Literal

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import OverflowMethod
from rich.table import Table
from rich.text import Text

from dist_train.monitoring import wording
from dist_train.monitoring.wording import Pace
from dist_train.outcome import UsageError, escaped
from dist_train.rundir.atomic import json_text
from dist_train.rundir.metrics_file import read_last_records
from dist_train.rundir.paths import BrokenFileError, RunDirectory
from dist_train.rundir.records import EvaluationRecord, EventRecord, TrainRecord, better
from dist_train.rundir.status import load_status, read_settings
from dist_train.watch.run_state import ALIVE, corrected_by_job, read_measurements, state_of, walk_runs

COLOURS = {
    **dict.fromkeys(ALIVE, "cyan"),
    "stopped": "yellow",
    "finished": "green",
    "failed": "red",
    "lost": "magenta",
    "broken": "red",
}


@dataclass(frozen=True)
class RunSummary:
    """One run in a row. `state` is status.json's, or `lost` or `broken`; `note` gives the reason."""

    directory: Path
    name: str
    state: str
    note: str
    step: int | None = None
    total_steps: int | None = None
    epoch: float | None = None
    total_epochs: float | None = None
    world_size: int | None = None
    best_accuracy: float | None = None
    samples_per_second: float | None = None
    seconds_left: float | None = None
    model: str | None = None
    data: str | None = None
    global_size: int | None = None
    noise: str | None = None
    slurm_job: str = ""  # ID of the last Slurm job of the run; empty outside of Slurm

    @property
    def done(self) -> float | None:
        """The share of its epochs, or, if their total is unknown, of its updates that the run has done."""
        if self.epoch is not None and self.total_epochs:
            return self.epoch / self.total_epochs
        return self.step / self.total_steps if self.step is not None and self.total_steps else None


def read_runs(directory: Path, now: datetime | None = None) -> tuple[RunSummary, ...]:
    """Return every run at or below `directory`, sorted by path. Raises UsageError if it is not a folder."""
    moment = (now or datetime.now(UTC)).timestamp()
    runs = sorted(_runs_below(directory), key=lambda run: run.root)
    return tuple(_read_run(run, directory, moment) for run in runs)


def corrected_by_slurm(summaries: Sequence[RunSummary], job_states: Mapping[str, str]) -> tuple[RunSummary, ...]:
    """Return the runs with states corrected by those of their Slurm jobs, as `corrected_by_job` does."""
    corrected = []
    for run in summaries:
        state, note = corrected_by_job(run.state, run.note, run.slurm_job, job_states.get(run.slurm_job, ""))
        left = run.seconds_left if state == run.state else None
        corrected.append(replace(run, state=state, note=note, seconds_left=left))
    return tuple(corrected)


@dataclass(frozen=True)
class Column:
    """A column of a table of runs. If the table is too wide, empty ones and those of low `rank` are left out first."""

    heading: str
    cells: Sequence[str]
    rank: int
    justify: Literal["left", "right"] = "right"
    styles: Sequence[str] = ()

    @property
    def width(self) -> int:
        """Characters of the widest cell, or of the heading."""
        return max(map(cell_len, (self.heading, *self.cells)))


_GAP = 2  # characters between two columns
_LONGEST_NOTE = 600
_LEAST_NOTE = 16
"""Columns are left out, and then long names folded, before notes become shorter than this many characters."""


def table_of(
    names: Sequence[str], columns: Sequence[Column], notes: Sequence[str], width: int | None, overflow: OverflowMethod
) -> Table:
    """Return a table of the runs `names`; the column of the highest rank is always shown.

    If it exceeds `width` characters, the others are left out one by one; notes are folded or cut, as `overflow` says.
    """
    columns = list(columns)
    last_kept = max(columns, key=lambda column: column.rank)
    name_width = max(map(cell_len, ("run", *names)))
    note_width = min(_LONGEST_NOTE, max(map(cell_len, notes), default=0))
    if width is not None:
        least_note = min(note_width, _LEAST_NOTE)
        room = width - (_GAP + least_note if note_width else 0)
        name_width = min(name_width, max(1, room - _GAP - last_kept.width))
        while name_width + sum(_GAP + column.width for column in columns) > room and len(columns) > 1:
            columns.remove(min(columns, key=lambda column: (any(column.cells), column.rank)))
        note_width = max(least_note, width - name_width - sum(_GAP + column.width for column in columns) - _GAP)
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("run", overflow="fold", min_width=name_width, max_width=name_width)
    for column in columns:
        table.add_column(column.heading, justify=column.justify, no_wrap=True)
    if any(notes):
        table.add_column("note", overflow=overflow, no_wrap=overflow != "fold", max_width=note_width)
    styled = [map(Text, column.cells, column.styles or repeat("")) for column in columns]
    for row in zip(map(Text, names), *styled, *([map(Text, notes)] if any(notes) else []), strict=True):
        table.add_row(*row)
    return table


def render(
    summaries: Sequence[RunSummary], job_states: Mapping[str, str] | None = None, width: int | None = None
) -> Table:
    """Return the runs as a table, with Slurm's states of their jobs if `job_states` is given.

    If it exceeds `width` characters, less important columns are left out and notes are truncated to one line; names
    and states are always complete.
    """

    def column(
        heading: str,
        rank: int,
        text: Callable[[RunSummary], object],
        justify: Literal["left", "right"] = "right",
        styles: Sequence[str] = (),
    ) -> Column:
        cells = [escaped("" if (cell := text(run)) is None else str(cell)) for run in summaries]
        return Column(heading, cells, rank, justify, styles)

    columns = [
        column("state", 9, lambda run: run.state, "left", [COLOURS.get(run.state, "") for run in summaries]),
        column("model", 1, lambda run: run.model, "left"),
        column("data", 0, lambda run: run.data, "left"),
        column("batch", 4, lambda run: None if run.global_size is None else f"{run.global_size:,}"),
        column("ranks", 2, lambda run: run.world_size),
        column("epoch", 6, lambda run: None if run.epoch is None else wording.epochs(run.epoch)),
        column("step", 3, _steps),
        column("done", 8, lambda run: None if run.done is None else f"{run.done:.0%}"),
        column("best", 7, lambda run: None if run.best_accuracy is None else wording.percent(run.best_accuracy)),
        column("images/s", 5, lambda run: None if (rate := run.samples_per_second) is None else wording.rate(rate)),
        column("left", 7, lambda run: None if run.seconds_left is None else wording.duration(run.seconds_left)),
    ]
    if job_states:
        columns.append(column("slurm", 6, lambda run: f"{run.slurm_job} {job_states.get(run.slurm_job, '')}".strip()))
    names = [escaped(run.name) for run in summaries]
    return table_of(names, columns, [escaped(" ".join(run.note.split())) for run in summaries], width, "ellipsis")


def as_json(summaries: Sequence[RunSummary], job_states: Mapping[str, str]) -> str:
    """Return the runs as a JSON document, `{"runs": [...]}`, with the fields of `RunSummary`; null if unknown."""
    runs = [
        {**asdict(run), "directory": str(run.directory), "slurm_state": job_states.get(run.slurm_job)}
        for run in summaries
    ]
    return json_text({"runs": runs}, indent=2)


def _steps(run: RunSummary) -> str:
    steps = "" if run.step is None else f"{run.step:,}"
    return f"{steps}/{run.total_steps:,}" if run.total_steps else steps


def _runs_below(directory: Path) -> Iterator[RunDirectory]:
    if not directory.is_dir():
        raise UsageError(f"there is no folder {directory}: name the folder that holds the runs", code="folder-missing")
    unreadable: list[OSError] = []
    for folder, children in walk_runs(directory, unreadable.append):
        run = RunDirectory(folder)
        try:
            is_run = run.has_begun
        except OSError:
            is_run = True  # its row reports why it cannot be read
        if is_run:
            children.clear()
            yield run
    yield from (RunDirectory(Path(error.filename)) for error in unreadable)  # their rows say so


def _read_run(run: RunDirectory, root: Path, now: float) -> RunSummary:
    name = run.root.resolve().name if run.root == root else str(run.root.relative_to(root))
    try:
        return _summary(run, name, now)
    except BrokenFileError as error:
        return RunSummary(run.root, name, "broken", str(error))
    except (OSError, ValueError, ArithmeticError, RecursionError) as error:
        # A damaged file of one run must not hide the other runs.
        return RunSummary(run.root, name, "broken", f"{type(error).__name__}: {error}")


def _summary(run: RunDirectory, name: str, now: float) -> RunSummary:
    status = load_status(run.status)
    settings = Settings.of(read_settings(run.config))
    records = read_measurements(run.metrics, read_last_records)  # of a long run, all would take seconds
    state, note = state_of(status, run, now)
    # The time between two launches says nothing about the pace of either.
    resumed = [at for at, each in enumerate(records) if isinstance(each, EventRecord) and each.event == "resumed"]
    latest = [record for record in records[max(resumed, default=0) :] if isinstance(record, TrainRecord)][-50:]
    evaluations = [record for record in records if isinstance(record, EvaluationRecord)]
    pace = latest[-1].samples_per_second if latest else None
    return RunSummary(
        directory=run.root,
        name=name,
        state=state,
        note=note,
        step=status.step,
        total_steps=status.total_steps,
        epoch=status.epoch,
        total_epochs=status.total_epochs,
        world_size=status.world_size,
        best_accuracy=reduce(better, evaluations, None) if status.best_accuracy is None else status.best_accuracy,
        samples_per_second=pace if status.samples_per_second is None else status.samples_per_second,
        seconds_left=seconds_left(latest, status.total_epochs) if state in ALIVE and status.total_epochs else None,
        slurm_job=status.slurm_job,
        **asdict(settings),
    )


@dataclass(frozen=True)
class Settings:
    """The settings of a run that tables show; None if `config.yaml` lacks them."""

    model: str | None = None
    data: str | None = None
    global_size: int | None = None
    noise: str | None = None

    @classmethod
    def of(cls, settings: Mapping[str, object]) -> Settings:
        """Return the settings to show from `settings`, keyed by dotted path."""
        model, data, method, amplitude = (
            None if (value := settings.get(path)) is None else str(value)
            for path in ("model.name", "data.name", "noise.method", "noise.amplitude")
        )
        size = settings.get("batch.global_size")
        has_no_amplitude = method in (None, "none", "ivon") or amplitude is None
        noise = method if has_no_amplitude else f"{method} {amplitude}"
        return cls(model, data, size if isinstance(size, int) and 0 < size < 2**63 else None, noise)


def targets_directories(directory: Path) -> tuple[Path, ...]:
    """Return the distinct `metrics.targets_directory` of the runs at or below `directory`. Raises UsageError.

    That of a run of an older version may be relative to the folder where the run was started.
    """
    folders: dict[Path, None] = {}
    for run in _runs_below(directory):
        with suppress(BrokenFileError):  # the table of runs reports it
            folder = read_settings(run.config).get("metrics.targets_directory")
            if isinstance(folder, str):
                folders[Path(folder)] = None
    return tuple(folders)


def seconds_left(latest: Iterable[TrainRecord], total_epochs: float) -> float | None:
    """Return the seconds until `total_epochs` at the pace of the latest records; None if not known yet.

    Epochs, like samples, take equally long; updates do not if the batch grows.
    """
    pace = Pace()
    for record in latest:
        pace.mark(record.epoch, record.time)
    return pace.seconds_left(total_epochs)
