"""Ranks that die, hang, fail and rejoin at random: results are bit-identical, and no process is left behind."""

from __future__ import annotations

import random
import signal
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import torch

from dist_train.outcome import ExitCode
from tests.elastic import FAILING, ElasticRun, Faults
from tests.launching import final_checkpoint, results, small_settings, train_alone, write_config
from tests.waiting import wait_for, wait_for_lines

pytestmark = [pytest.mark.ranks, pytest.mark.timeout(3600)]  # a busy machine takes longer for a hundred faults

Sections: TypeAlias = Mapping[str, Mapping[str, Any]]


def assert_equal(one: object, other: object) -> None:
    if isinstance(one, torch.Tensor):
        assert isinstance(other, torch.Tensor)
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert isinstance(other, dict)
        assert one.keys() == other.keys()
        for key in one:
            assert_equal(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert isinstance(other, list | tuple)
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_equal(a, b)
    else:
        assert one == other


STATEFUL: Sections = {
    "comm": {"reduction": "exact32"},
    "averaging": {"kind": "ema"},
    "batch": {"dealing": "measured"},
}
"""Settings with state besides the weights and the optimizer's."""


def run_with_faults(folder: Path, ranks: int, seed: int, count: int, sections: Sections, joining: int = 0) -> None:
    """Train with `count` faults, stop the run, and compare it with an undisturbed run.

    Another launch joins with `joining` ranks.
    """
    plugin = folder / "failing.py"
    plugin.write_text(FAILING)
    own: Sections = {
        "run": {"epochs": 50_000},
        "noise": {"method": f"{plugin}:Failing"},
        "comm": {"verify_every": 1, "timeout": 5},
        "evaluation": {"every_epochs": 3},
        "checkpoint": {"every_epochs": 2},
    }
    names = {*own, *sections}
    settings = small_settings(**{name: {**sections.get(name, {}), **own.get(name, {})} for name in names})
    config = write_config(folder, settings)
    options: tuple[str, ...] = ("--min-ranks", "1", "--restarts", str(10 * count))
    if joining:
        options += ("--listen", "127.0.0.2", "--max-ranks", str(ranks + joining))
    with ElasticRun(config, folder / "run", ranks, options) as launch, ExitStack() as stack:
        wait_for_lines(folder / "run/metrics.jsonl", 4)
        if joining:
            stack.enter_context(launch.join(joining))
            wait_for(lambda: len(launch.joined()) == joining, lambda: launch.log.read_text()[-3000:])
        faults = Faults(launch, random.Random(seed), folder)
        faults.inject(count)
        if not joining:
            # Each lost rank is restarted, whatever has ended it.
            wait_for(lambda: len(launch.slots()) == ranks, lambda: launch.log.read_text()[-3000:])
        step = launch.step()
        wait_for(lambda: launch.step() > step + 3, lambda: launch.log.read_text()[-3000:])
        launch.process.send_signal(signal.SIGTERM)
        ended = launch.wait()
        assert [other.wait().code for other in launch.others] == [ExitCode.STOPPED] * bool(joining)
    assert ended.code == ExitCode.STOPPED, ended.output[-3000:]
    assert faults.injected.total() == count
    last = final_checkpoint(folder / "run")["step"]
    train_alone(config, folder / "undisturbed", f"run.max_steps={last}")
    for kind in ("train", "eval"):
        expected = results(folder / "undisturbed", [kind])
        # The undisturbed run is also evaluated where run.max_steps ends it.
        assert results(folder / "run", [kind]) == [
            each for each in expected if kind == "train" or each["step"] % 24 == 0
        ]
    one, other = final_checkpoint(folder / "run"), final_checkpoint(folder / "undisturbed")
    for part in ("model", "optimizer", "step", "epoch", "average", "noise", "grid_exponents"):
        assert_equal(one[part], other[part])


def test_random_faults_change_nothing(tmp_path: Path) -> None:
    run_with_faults(tmp_path, 3, seed=2, count=3, sections={**STATEFUL, "batch": {"dealing": "dynamic"}})


@pytest.mark.lengthy
@pytest.mark.parametrize(
    ("ranks", "sections"),
    [(2, {}), (3, STATEFUL), (4, {"batch": {"dealing": "dynamic"}})],
    ids=["2", "3", "4"],
)
def test_hundred_faults_change_nothing(tmp_path: Path, ranks: int, sections: Sections) -> None:
    run_with_faults(tmp_path, ranks, seed=ranks, count=100, sections=sections)


@pytest.mark.lengthy
def test_hundred_faults_of_two_launches_change_nothing(tmp_path: Path) -> None:
    run_with_faults(tmp_path, 2, seed=5, count=100, sections=STATEFUL, joining=2)
