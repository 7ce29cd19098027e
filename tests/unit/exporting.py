"""A run that is exported, for tests: its facts, records, and scrapes of its page."""

from __future__ import annotations

import math
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from dist_train.config.sections import MetricsSettings
from dist_train.monitoring.prometheus import exporter as exporter_module
from dist_train.monitoring.prometheus.exporter import Exporter
from dist_train.rundir.epochs import Stage
from dist_train.rundir.records import Measurement, Outcome, RankMeasurement, RunFacts, StepParts, TrainRecord
from tests.unit import records
from tests.waiting import PATIENCE

FACTS = RunFacts(
    name='a "run"\\',
    run_directory=Path("runs/demo"),
    model="vgg9",
    data="fashion-mnist",
    parameters=176_106,
    global_size=8192,
    micro_size=256,
    micro_batches=32,
    world_size=2,
    total_steps=210,
    steps_per_epoch=7,
    epochs=30,
    noise="smoothout 0.01",
    start_step=14,
    checkpoint_interval=7,
    controller="gloo",
    revision="0.1.0+abc",
    slurm_job="4711",
    node="node1",
    nodes=("node1", "node2"),
    launched=1_700_000_000.5,
    run_id="0123456789abcdef",
)
GROWING = (Stage(0, 0, 64, 40), Stage(1, 40, 1024, 10))
OUTCOME = Outcome("finished", "", 0, 210, 30.0, 1.0, None, None, None, None, None)
ON_A_DEVICE = RankMeasurement(
    *(0.2, 0.1, 1.5e10, 7.123456789e10, 7.23456789e10, 0.987654321, 16.0, 8.5e10),
    *(7.4e10, 687.5, 1.98e9, 2.619e9, 0x44, 3.0, 0.0),
)
"""Its power limit and its temperature hold it back; three errors of its memory were corrected."""
STOPPED = replace(OUTCOME, state="stopped", exit_code=75)
LEFT = replace(OUTCOME, state="failed", exit_code=1, is_left=True)


def train(step: int, seconds: float = 0.3) -> TrainRecord:
    return records.train(
        step,
        loss=0.4321,
        accuracy=0.85,
        learning_rate=0.4,
        noise_amplitude=0.0123,
        gradient_norm=1.5,
        step_seconds=seconds,
        samples_per_second=16_384.0,
        time=1_700_000_000.0 + step,
    )


def measurement(step: int, seconds: float = 0.3, ranks: int = 2) -> Measurement:
    parts = StepParts(0.002, 0.2, 0.01, 0.05, 0.03, 0.0)
    each = tuple(
        RankMeasurement(0.25 + 0.05 * rank, 0.05, 1e9 + rank, math.nan, math.nan, math.nan, 16.0)
        for rank in range(ranks)
    )
    return Measurement(step, 1_700_000_000.0 + step, seconds, parts, 12.5, 3.25, each)


@contextmanager
def serving(facts: RunFacts = FACTS, outcome: Outcome = OUTCOME, **settings: Any) -> Iterator[Exporter]:
    exporter = Exporter(MetricsSettings(**{"port": 0, "last_scrape_seconds": 0.0, **settings}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporter_module, "_START_SECONDS", PATIENCE)
        exporter.begin(facts)
    try:
        yield exporter
    finally:
        exporter.end(outcome)


def port_of(exporter: Exporter) -> int:
    assert exporter.address is not None
    return int(exporter.address.rsplit(":", 1)[1].split("/")[0])


def get(exporter: Exporter, accept: str = "") -> str:
    assert exporter.address is not None
    request = urllib.request.Request(exporter.address, headers={"Accept": accept})
    with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
        assert answer.status == 200
        return str(answer.read().decode())


def read(page: str) -> dict[tuple[str, tuple[str, ...]], float]:
    """Return the samples of `page` by name and label values."""
    return {
        (sample.name, tuple(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
    }


def scrape(exporter: Exporter) -> dict[tuple[str, tuple[str, ...]], float]:
    return read(get(exporter))
