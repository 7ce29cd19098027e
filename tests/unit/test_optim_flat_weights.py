"""All weights in one buffer: the parameters stay views of it, padding stays zero, every bit counts."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dist_train.config import ImageFormat, OptimizerSettings
from dist_train.launching import assembly
from dist_train.models.norms import GroupedBatchNorm
from dist_train.optim.flat_weights import FlatWeights, check_memory, digest, norm
from dist_train.optim.optimizers import build_optimizer
from dist_train.outcome import UsageError
from tests.raising import raises
from tests.unit.small_trainers import small_config

PROPERTY = settings(deadline=None, max_examples=60)


def a_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 3, 3), GroupedBatchNorm(3), nn.Flatten(), nn.Linear(27, 2))


def views_of(buffer: torch.Tensor, tensors: list[torch.Tensor]) -> bool:
    start, end = buffer.data_ptr(), buffer.data_ptr() + buffer.nbytes
    return all(start <= tensor.data_ptr() < end for tensor in tensors)


def padding(weights: FlatWeights) -> torch.Tensor:
    outside = torch.ones(len(weights.values), dtype=torch.bool)
    for segment in weights.segments:
        outside[segment.start : segment.stop] = False
    return outside


def test_the_model_s_weights_keep_their_values_and_lie_in_the_buffer_in_order() -> None:
    before = {name: value.clone() for name, value in a_model().state_dict().items()}
    model = a_model()
    weights = FlatWeights(model)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert weights.count == sum(parameter.numel() for parameter in model.parameters()) == 92
    for segment, (name, parameter) in zip(weights.segments, model.named_parameters(), strict=True):
        assert (segment.name, segment.shape) == (name, parameter.shape)
        assert torch.equal(weights.values[segment.start : segment.stop], parameter.detach().flatten())
        assert segment.start % 16 == 0
    kinds = [segment.kind for segment in weights.segments]
    assert kinds == ["weight", "bias", "norm", "norm", "weight", "bias"]


def test_views_stay_views_and_padding_zero_over_updates_and_loading() -> None:
    model = a_model()
    weights = FlatWeights(model)
    optimizer = build_optimizer(OptimizerSettings(weight_decay=0.1), weights)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for step in range(3):
        weights.gradients.zero_()
        inputs = torch.randn(4, 1, 5, 5, generator=torch.Generator().manual_seed(step))
        torch.autograd.backward(model(inputs).square().sum())
        optimizer.step()
    moved = weights.values.clone()
    model.load_state_dict(state)
    assert not torch.equal(weights.values, moved)
    assert views_of(weights.values, [parameter.data for parameter in model.parameters()])
    assert views_of(weights.gradients, [p.grad for p in model.parameters() if p.grad is not None])
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert padding(weights).any()
    assert not weights.values[padding(weights)].any()
    assert not weights.gradients[padding(weights)].any()


def test_a_backward_pass_fills_the_flat_gradient() -> None:
    model, twin = a_model(), a_model()
    weights = FlatWeights(model)
    inputs = torch.ones(4, 1, 5, 5)
    torch.autograd.backward(model(inputs).square().sum())
    torch.autograd.backward(twin(inputs).square().sum())
    for segment, parameter in zip(weights.segments, twin.parameters(), strict=True):
        assert parameter.grad is not None
        assert torch.equal(weights.gradients[segment.start : segment.stop], parameter.grad.flatten())


def test_gradients_can_be_gathered_in_place_of_added() -> None:
    model, twin = a_model(), a_model()
    weights = FlatWeights(model)
    views = [parameter.grad for parameter in weights.parameters]
    weights.gradients.fill_(7.0)
    inputs = torch.ones(4, 1, 5, 5)
    weights.detach_gradients()
    torch.autograd.backward(model[0](inputs).square().sum())
    torch.autograd.backward(twin[0](inputs).square().sum())
    weights.gather_gradients(0, len(views))
    for view, parameter, other in zip(views, weights.parameters, twin.parameters(), strict=True):
        assert view is not None
        assert parameter.grad is view
        assert torch.equal(view, torch.zeros_like(view) if other.grad is None else other.grad)


def test_frozen_parameters_are_left_where_they_are() -> None:
    model = a_model()
    model[0].requires_grad_(False)
    weights = FlatWeights(model)
    assert [segment.name for segment in weights.segments] == ["1.weight", "1.bias", "3.weight", "3.bias"]
    assert not views_of(weights.values, [model.get_parameter("0.weight").data])


def test_tensors_that_share_memory_without_being_one_are_refused() -> None:
    tied, shared, watched, overlapping, parted = (
        nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)),
        *(a_model() for _ in range(4)),
    )
    tied[1].weight = tied[0].weight
    check_memory(tied)
    assert FlatWeights(tied).count == 9 + 3 + 3
    shared[0].bias.data = shared[1].weight.data
    watched.register_buffer("kernel", watched.get_parameter("0.weight").detach())
    memory = torch.arange(8.0)
    overlapping[0].bias.data, overlapping[1].bias.data = memory[:3], memory[2:5]
    for model in (shared, watched, overlapping):
        with raises(UsageError, "plugin-result"):
            check_memory(model)
    check_memory(watched.requires_grad_(requires_grad=False))
    parted[0].bias.data, parted[1].bias.data = memory[:6:2], memory[1:6:2]
    parted.register_buffer("none", memory[:0])
    check_memory(parted)


def shared_before_a_move(images: ImageFormat, width: float, norm: object) -> nn.Module:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, images.classes))
    model[2].weight.data = model[1].weight.data
    return model


def test_shared_memory_is_found_before_the_model_moves_to_a_device_where_nothing_is_shared() -> None:
    config = small_config(model={"name": f"{__name__}:shared_before_a_move", "norm": "none"})
    with raises(UsageError, "plugin-result"):
        assembly._build_network(config, torch.device("meta"))


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        ([], []),
        (["norm"], ["1.weight", "1.bias"]),
        (["bias"], ["0.bias", "3.bias"]),
        (["weight"], ["0.weight", "3.weight"]),
        (["3.*"], ["3.weight", "3.bias"]),
        (["?.bias"], ["0.bias", "1.bias", "3.bias"]),
        (["norm", "0.weight"], ["0.weight", "1.weight", "1.bias"]),
    ],
)
def test_weights_are_excluded_by_kind_and_by_name(patterns: list[str], names: list[str]) -> None:
    assert [segment.name for segment in FlatWeights(a_model()).excluded(patterns)] == names


def test_a_pattern_that_matches_nothing_is_refused() -> None:
    weights = FlatWeights(nn.Sequential(nn.Linear(2, 2)))
    assert weights.excluded(["norm"]) == []
    with raises(UsageError, "no-such-weight"):
        weights.excluded(["bias", "NORM", "clasifier.*"])
    with raises(UsageError, "no-such-weight"):
        build_optimizer(OptimizerSettings(exclude=("1.*",)), weights)
    many = FlatWeights(nn.Sequential(*(nn.Linear(1, 1) for _ in range(100))))
    with raises(UsageError, "no-such-weight") as refused:
        many.excluded(["99.wieght"], "noise.exclude")
    assert {"noise.exclude", "99.weight"} <= set(re.split("[:? ]", str(refused.value)))
    with raises(UsageError, "no-such-weight") as refused:
        many.excluded(["classifier"])
    assert "99" not in str(refused.value)


@PROPERTY
@given(
    st.lists(st.floats(width=32, allow_nan=True), min_size=1, max_size=50),
    st.integers(0, 49),
    st.integers(0, 31),
)
def test_promise_4_any_flipped_bit_changes_the_digest(values: list[float], place: int, bit: int) -> None:
    weights = torch.tensor(values, dtype=torch.float32)
    flipped = weights.clone()
    flipped.view(torch.int32)[place % len(values)] ^= -(2**31) if bit == 31 else 2**bit
    assert digest(weights) == digest(weights.clone())
    assert digest(flipped) != digest(weights)
    assert -(2**63) <= digest(weights) < 2**63


def test_the_digest_tells_places_apart() -> None:
    assert digest(torch.tensor([1.0, 2.0])) != digest(torch.tensor([2.0, 1.0]))


@pytest.mark.parametrize("length", [1, 65_536, 3_000_000])
def test_the_norm_of_many_values_is_accurate(length: int) -> None:
    values = torch.randn(length, generator=torch.Generator().manual_seed(0))
    assert float(norm(values)) == pytest.approx(float(values.double().norm()), rel=1e-6)
