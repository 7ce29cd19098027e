"""Random directions."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dist_train.analysis.directions import check_exclusions, random_direction
from dist_train.models.norms import GroupedBatchNorm
from dist_train.optim.flat_weights import FlatWeights
from dist_train.outcome import UsageError
from tests.raising import raises

DEFAULT = ("norm", "bias")


@pytest.fixture
def weights() -> FlatWeights:
    stream = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 5, 3), GroupedBatchNorm(5), nn.Flatten(), nn.Linear(5, 4))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=stream))
    return FlatWeights(model)


def parts(weights: FlatWeights, flat: torch.Tensor) -> dict[str, torch.Tensor]:
    return {
        segment.name: flat[segment.start : segment.stop].view(segment.shape).double() for segment in weights.segments
    }


def test_every_filter_has_the_norm_of_the_weights_filter(weights: FlatWeights) -> None:
    drawn = parts(weights, random_direction(weights, "filter", (), 0, 0))
    for name, part in parts(weights, weights.values).items():
        filters = part.flatten(1) if part.dim() > 1 else part.view(1, -1)
        moved = drawn[name].flatten(1) if part.dim() > 1 else drawn[name].view(1, -1)
        torch.testing.assert_close(moved.norm(dim=1), filters.norm(dim=1), rtol=1e-12, atol=0)
        assert not torch.allclose(moved, filters)


def test_every_layer_has_the_norm_of_the_weights_layer_and_its_filters_have_not(weights: FlatWeights) -> None:
    drawn = parts(weights, random_direction(weights, "layer", (), 0, 0))
    here = parts(weights, weights.values)
    for name, part in here.items():
        torch.testing.assert_close(drawn[name].norm(), part.norm(), rtol=1e-12, atol=0)
    filters = drawn["0.weight"].flatten(1).norm(dim=1)
    assert not torch.allclose(filters, here["0.weight"].flatten(1).norm(dim=1), rtol=1e-3)


def test_without_normalization_components_have_variance_one(weights: FlatWeights) -> None:
    drawn = parts(weights, random_direction(weights, "none", (), 0, 0))
    assert drawn["0.weight"].std() == pytest.approx(1, abs=0.2)


@pytest.mark.parametrize("normalization", ["filter", "layer", "none"])
def test_what_is_excluded_stays_and_does_not_change_the_rest(weights: FlatWeights, normalization: str) -> None:
    everything = parts(weights, random_direction(weights, normalization, (), 3, 1))
    some = parts(weights, random_direction(weights, normalization, DEFAULT, 3, 1))
    for name, part in some.items():
        if name in ("0.weight", "3.weight"):
            assert torch.equal(part, everything[name])
        else:
            assert not part.any(), name
            assert everything[name].any(), name


def test_padding_is_not_moved(weights: FlatWeights) -> None:
    direction = random_direction(weights, "filter", (), 0, 0)
    for segment in weights.segments:
        direction[segment.start : segment.stop] = 0
    assert not direction.any()


def test_a_direction_depends_on_seed_and_number_alone(weights: FlatWeights) -> None:
    def drawn(seed: int, index: int) -> torch.Tensor:
        return random_direction(weights, "filter", DEFAULT, seed, index)

    torch.manual_seed(1)
    first = drawn(0, 0)
    torch.manual_seed(2)
    assert torch.equal(first, drawn(0, 0))
    assert not torch.equal(first, drawn(0, 1))
    assert not torch.equal(first, drawn(1, 0))


def test_a_pattern_that_names_nothing_is_refused(weights: FlatWeights) -> None:
    check_exclusions(weights, ["norm", "bias", "3.*"])
    with raises(UsageError, "no-such-weight"):
        check_exclusions(weights, ["clasifier"])
    with raises(UsageError, "nothing-to-move"):
        check_exclusions(weights, ["*"])
