"""Averages of weights: torch's own moving average, and the mean of the latest, whatever the number of updates."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim import swa_utils
from torch.utils._python_dispatch import TorchDispatchMode

from dist_train.config import AveragingSettings
from dist_train.models.norms import GroupedBatchNorm, running_statistics
from dist_train.optim.averaging import AveragedModel, Averaging, averaged_state, mean_of
from dist_train.optim.flat_weights import FlatWeights


def a_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3))


def move(weights: FlatWeights, step: int) -> None:
    """Change the weights as an update of `step` might."""
    source = torch.Generator().manual_seed(step)
    for view in weights.views_of(weights.values):
        view.add_(torch.randn(view.shape, generator=source))


@pytest.mark.parametrize("decay", [0.5, 0.99, 0.999])
def test_the_moving_average_is_that_of_torch(decay: float) -> None:
    model = a_model()
    weights = FlatWeights(model)
    averaging = Averaging(AveragingSettings(kind="ema", decay=decay), weights, 4)
    expected = swa_utils.AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(decay))
    for step in range(30):
        move(weights, step)
        averaging.after_update(step)
        expected.update_parameters(model)
    named = dict(expected.module.named_parameters())
    for name, value in weights.named(averaging.value(30)).items():
        assert torch.equal(value, named[name].detach()), name


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("steps", [0, 1, 2, 7, 12])
def test_the_share_of_the_first_weights_in_the_moving_average(every: int, steps: int) -> None:
    weights = FlatWeights(a_model())
    averaging = Averaging(AveragingSettings(kind="ema", decay=0.75, every_steps=every), weights, 4)
    for step in range(steps):
        weights.values.fill_(float(step + 1 <= every))  # those after the first `every` updates are 0
        averaging.after_update(step)
    expected = float(averaging.value(steps)[0]) if steps else 1.0
    assert averaging.share_of_first(steps) == pytest.approx(expected)
    assert Averaging(AveragingSettings(kind="lawa"), weights, 4).share_of_first(steps) == 0.0


@given(st.integers(2, 5), st.integers(1, 3), st.integers(0, 20))
def test_the_latest_weights_are_averaged_however_many_there_are(last: int, every: int, steps: int) -> None:
    weights = FlatWeights(a_model())
    averaging = Averaging(AveragingSettings(kind="lawa", last=last, every_steps=every), weights, 4)
    taken = []
    for step in range(steps):
        move(weights, step)
        averaging.after_update(step)
        if (step + 1) % every == 0:
            taken.append(weights.values.clone())
    expected = torch.stack(taken[-last:]).double().mean(0) if taken else weights.values.double()
    assert torch.allclose(averaging.value(steps).double(), expected, rtol=1e-6, atol=1e-6)


class _Divisors(TorchDispatchMode):
    """Notes the divisors of tensors, None for a number: by one, CUDA multiplies by its reciprocal, and CPUs divide."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch gives it no types
        self.noted: list[torch.device | None] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._opname in ("div", "div_"):
            self.noted.append(args[1].device if isinstance(args[1], torch.Tensor) else None)
        return func(*args, **(kwargs or {}))


def test_a_mean_has_the_same_bits_on_gpus_and_cpus() -> None:
    with _Divisors() as divisors:
        mean_of(torch.ones(3, 2, device="meta"))
    assert divisors.noted == [torch.device("meta")]


@pytest.mark.parametrize("kind", ["ema", "lawa"])
def test_it_resumes_from_its_state_bit_identically(kind: str) -> None:
    settings = AveragingSettings(kind=kind, decay=0.9, last=3, every_steps=2)  # type: ignore[arg-type]
    weights = FlatWeights(a_model())
    averaging = Averaging(settings, weights, 4)
    twin = averaging
    for step in range(17):
        if step == 7:
            twin = Averaging(settings, weights, 4)
            twin.load(averaging.state(7))
        move(weights, step)
        averaging.after_update(step)
        if step >= 7:
            twin.after_update(step)
    assert torch.equal(twin.value(17), averaging.value(17))
    assert twin.digest() == averaging.digest()
    twin.kept[-1, 3] += 1
    assert twin.digest() != averaging.digest()
    stored = averaged_state({"kept": averaging.state(17), "statistics": {}}, {})
    assert all(torch.equal(stored[name], value) for name, value in weights.named(averaging.value(17)).items())


def test_the_model_computes_with_the_average_within_the_block_alone() -> None:
    model = a_model()
    weights = FlatWeights(model)
    averaging = Averaging(AveragingSettings(kind="lawa", every_steps=1, last=2), weights, 4)
    images = torch.ones(1, 7)
    before = model(images)
    averaging.after_update(0)
    weights.values.mul_(3)
    after = model(images)
    with AveragedModel(model, averaging, lambda: None).in_force(1):
        assert torch.equal(model(images), before)
    assert torch.equal(model(images), after)


def test_the_average_has_statistics_of_its_own_computed_once_a_step() -> None:
    model = nn.Sequential(nn.Linear(7, 5), GroupedBatchNorm(5))
    averaging = Averaging(AveragingSettings(kind="ema"), FlatWeights(model), 4)
    statistics = running_statistics(model)
    before = {name: value.clone() for name, value in statistics.items()}
    computed: list[int] = []

    def recompute() -> None:
        computed.append(len(computed))
        for value in statistics.values():
            value.fill_(10 + len(computed))

    averaged = AveragedModel(model, averaging, recompute)
    for steps, expected in ((1, 11), (1, 11), (2, 12), (2, 12)):
        with averaged.in_force(steps):
            assert all(bool((value == expected).all()) for value in statistics.values())
        assert all(torch.equal(value, before[name]) for name, value in statistics.items())
    averaged.forget()
    with averaged.in_force(2):
        assert all(bool((value == 13).all()) for value in statistics.values())


def test_without_an_average_nothing_is_kept() -> None:
    averaging = Averaging(AveragingSettings(), FlatWeights(a_model()), 4)
    averaging.after_update(0)
    assert not averaging
    assert averaging.kept.numel() == 0
    assert averaging.state(1) == []
