"""Sharpness along training: the limit of stability is where torch's own SGD begins to diverge."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dist_train.report.sharpness_charts import sharpness_courses, stability_factor
from dist_train.report.stored_run import read_subject
from dist_train.report.variants import panels_of
from tests.unit.report_study import make_run, treatments


def largest_on_a_parabola(eigenvalue: float, momentum: float, *, nesterov: bool) -> float:
    """Return |x| after many updates on eigenvalue x^2 / 2 at rate 1."""
    x = torch.ones(1, dtype=torch.float64)
    optimizer = torch.optim.SGD([x], lr=1.0, momentum=momentum, nesterov=nesterov)
    for _ in range(2000):
        x.grad = eigenvalue * x
        optimizer.step()
    return float(x.abs())


@pytest.mark.parametrize(
    ("momentum", "nesterov", "factor"), [(0.0, False, 2.0), (0.9, False, 3.8), (0.9, True, 3.8 / 2.8), (0.5, True, 1.5)]
)
def test_sgd_is_stable_up_to_the_limit(momentum: float, nesterov: bool, factor: float) -> None:
    settings = {"optimizer.name": "sgd", "optimizer.momentum": momentum, "optimizer.nesterov": nesterov}
    limit = stability_factor(settings)
    assert limit == pytest.approx(factor)
    assert limit is not None
    assert largest_on_a_parabola(0.99 * limit, momentum, nesterov=nesterov) < 1e-3
    assert largest_on_a_parabola(1.01 * limit, momentum, nesterov=nesterov) > 1e3


def test_other_optimizers_have_no_such_limit() -> None:
    assert stability_factor({"optimizer.name": "adamw", "optimizer.momentum": 0.9}) is None
    assert stability_factor({"optimizer.name": "sgd", "optimizer.momentum": 0.0, "noise.method": "ivon"}) is None
    assert stability_factor({}) is None


@pytest.mark.parametrize(("steps", "count"), [((100, 200), [2]), ((200, 201), [1]), ((201, 202), [])])
def test_checkpoints_after_the_last_record_are_not_drawn(
    tmp_path: Path, steps: tuple[int, int], count: list[int]
) -> None:
    treatment = treatments()[0]  # of 200 steps
    run = make_run(tmp_path / "run", treatment, 0, treatment.settings)
    [path] = run.glob("analysis/sharpness-*.json")
    fields = json.loads(path.read_text())
    path.unlink()
    for step in steps:
        fields["checkpoint"] |= {"step": step}
        path.with_name(f"sharpness-{step}.json").write_text(json.dumps(fields))
    drawn = sharpness_courses(panels_of(read_subject(tmp_path).runs))
    assert [len(each.points) for chart in drawn for each in chart.series if each.form != "dashed"] == count
