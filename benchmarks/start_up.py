"""Rows of start-up on two ranks: from the launch to the end of the first step, at a fresh start and at a resume."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.launched_run import seconds_to_step, write_settings
from benchmarks.launching import measure, module, on_ranks
from benchmarks.timing import Ratio, ratio_of

BAR = 1.3


def start_row(controller: str, pairs: int) -> Ratio:
    """Return our start-up on two ranks over that of a minimal Horovod program, which ends with one allreduce."""
    with tempfile.TemporaryDirectory() as folder:
        config = write_settings(Path(folder), 0.25)
        seconds = []
        for pair in range(pairs):
            run = Path(folder) / f"run-{pair}"
            ours = seconds_to_step(1, config, run, controller=controller, ranks=2)
            seconds.append((ours, bare_horovod(controller)))
    return ratio_of(f"start, 2 ranks over {controller}", "to the first step", "bare Horovod", seconds, BAR)


def resume_rows(pairs: int) -> Iterator[Ratio]:
    """Yield the time from the launch to the first step after a resume over that of a fresh start, for VGG9."""
    for width in (0.25, 1.0):
        with tempfile.TemporaryDirectory() as folder:
            config = write_settings(Path(folder), width)
            seconds = []
            for pair in range(pairs):
                run = Path(folder) / f"run-{pair}"
                first = seconds_to_step(1, config, run, controller="mpi", ranks=2)
                seconds.append((seconds_to_step(2, config, run, controller="mpi", ranks=2), first))
        row = f"resume, 2 ranks over mpi, width {width:g}"
        yield ratio_of(row, "resumed, to the first step", "first start, to the first step", seconds, None)


def bare_horovod(controller: str) -> float:
    """Return the seconds from the launch of the minimal program on two ranks until its allreduce was done."""
    started = time.time()
    return float(measure(on_ranks(controller, 2, module("benchmarks.bare_horovod")))) - started
