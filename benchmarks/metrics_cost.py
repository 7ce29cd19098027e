"""Rows of the cost of monitoring: metrics on against off, many scrapes against none, the page of many ranks."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.subject import QUIET, open_trainer, settings
from benchmarks.timing import Ratio, compare, ratio_of, timed
from dist_train.cluster.communicator import SingleProcess
from dist_train.monitoring.prometheus.board import Board
from dist_train.monitoring.prometheus.metrics import MetricsPage
from dist_train.rundir.records import Measurement, Outcome, RankMeasurement, RunFacts, StepParts
from dist_train.training.trainer import Trainer

_MEASURED: Mapping[str, Mapping[str, Any]] = {
    **QUIET,
    "metrics": {"enabled": True, "port": 0, "every_steps": 1, "last_scrape_seconds": 0},
}
_WIDTH = 0.25
_RANKS = 1024
_SCRAPES = 1000
_SECONDS = 20.0
_TURN_SECONDS = 1.0


def on_off_row(pairs: int) -> Ratio:
    """Return the step time with all metrics at every step over that without metrics."""
    with tempfile.TemporaryDirectory() as folder:
        watched = open_trainer(settings(_WIDTH, 128, **_MEASURED), SingleProcess(), Path(folder) / "watched")
        alone = open_trainer(settings(_WIDTH, 128, **QUIET), SingleProcess(), Path(folder) / "alone")
        row = compare(
            f"metrics on/off, width {_WIDTH:g}, batch 128",
            ("metrics at every step", watched.advance),
            ("no metrics", alone.advance),
            pairs=pairs,
            bar=1.01,
        )
        _end(watched)
        _end(alone)
        return row


def scrapes_row() -> Ratio:
    """Return the step time under 1,000 scrapes a second over that without, 20 s each, alternating every second."""
    with tempfile.TemporaryDirectory() as folder:
        targets = Path(folder) / "targets"
        metrics = {**_MEASURED["metrics"], "targets_directory": str(targets)}
        config = settings(_WIDTH, 128, **{**_MEASURED, "metrics": metrics})
        trainer = open_trainer(config, SingleProcess(), Path(folder) / "run")
        [target] = json.loads(next(targets.glob("*.json")).read_text())
        pairs, answers = [], 0
        load = _Load(f"http://{target['targets'][0]}/metrics")
        for _ in range(5):
            trainer.advance()
        for _ in range(int(_SECONDS / _TURN_SECONDS)):
            load.begin_turn()
            under_load = _median_step(trainer)
            answers += load.answers()
            pairs.append((under_load, _median_step(trainer)))
        load.close()
        _end(trainer)
    row = f"under {answers / _SECONDS:,.0f} scrapes a second, width {_WIDTH:g}, batch 128"
    return ratio_of(row, "scraped", "left alone", pairs, 1.02)


def page_rows() -> Iterator[Ratio]:
    """Yield time and size of the page of 1,024 ranks, over their limits."""
    facts = RunFacts(
        name="bench",
        run_directory=Path("bench"),
        model="resnet50",
        data="imagefolder",
        parameters=25_557_032,
        global_size=65_536,
        micro_size=64,
        micro_batches=_RANKS,
        world_size=_RANKS,
        total_steps=1_000,
        steps_per_epoch=20,
        epochs=50,
        noise="none",
        start_step=0,
        controller="mpi",
    )
    board = Board(facts)
    page = MetricsPage(board)
    one = RankMeasurement(0.123456789, 0.0123456789, 1.6e10, 7.1e10, 7.2e10, 0.987654321, 1)
    parts = StepParts(0.001, 0.1, 0.01, 0.02, 0.005, 0.0)
    measurement = Measurement(1, 1.7e9, 0.2, parts, 100.0, 1.0, (one,) * _RANKS)

    def render() -> None:
        board.apply(measurement)
        page.render()

    render()
    seconds = [(timed(render), 0.1) for _ in range(21)]
    yield ratio_of(f"page of {_RANKS:,} ranks: time", "rendered anew", "0.1 s", seconds, 1.0)
    sizes = [(float(len(page.render())), 2e6)]
    yield ratio_of(f"page of {_RANKS:,} ranks: size", "rendered anew", "2 MB", sizes, 1.0, unit="bytes")


class _Load:
    """A process that scrapes `url` for the duration of each turn."""

    def __init__(self, url: str) -> None:
        command = [sys.executable, "-m", "benchmarks.scrape_load", url, str(_SCRAPES)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def begin_turn(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{_TURN_SECONDS}\n")
        self._process.stdin.flush()

    def answers(self) -> int:
        """Wait for the end of the turn; return the number of answered scrapes."""
        assert self._process.stdout is not None
        return int(self._process.stdout.readline())

    def close(self) -> None:
        self._process.communicate()


def _median_step(trainer: Trainer) -> float:
    began, steps = time.perf_counter(), []
    while time.perf_counter() - began < _TURN_SECONDS:
        steps.append(timed(trainer.advance))
    return median(steps)


def _end(trainer: Trainer) -> None:
    trainer.observers.end(Outcome("stopped", "", 75, 0, 0.0, 0.0, None, None, None, None, None))
    trainer.close()
