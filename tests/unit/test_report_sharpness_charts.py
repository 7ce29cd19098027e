"""Sharpness along training: the limit of stability is where torch's own SGD begins to diverge."""

from __future__ import annotations

import pytest
import torch

from dist_train.report.sharpness_charts import stability_factor


def largest_on_a_parabola(eigenvalue: float, momentum: float, *, nesterov: bool) -> float:
    """Return |x| after many updates on eigenvalue x^2 / 2 at rate 1."""
    x = torch.ones(1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([x], lr=1.0, momentum=momentum, nesterov=nesterov)
    for _ in range(2000):
        optimizer.zero_grad()
        (eigenvalue * x**2 / 2).sum().backward()
        optimizer.step()
    return float(x.detach().abs())


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
    assert stability_factor({}) is None
