"""Loss and accuracy at a place."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import yaml
from torch import nn
from torch.nn import functional

from dist_train.analysis.landscape_files import Point
from dist_train.analysis.landscape_points import (
    Batch,
    Place,
    PointEvaluator,
    axis,
    check_fixed,
    interpolation,
    place_in,
    place_of,
    variances_of,
)
from dist_train.analysis.subset_loss import SubsetLoss
from dist_train.checkpoint.files import Contents, Stored
from dist_train.cluster.communicator import SingleProcess
from dist_train.config import Config, dump_config
from dist_train.data.images import BatchRequest, ImageSet
from dist_train.data.loader import Samples
from dist_train.models import build_model
from dist_train.models.norms import GroupedBatchNorm, norm_modules
from dist_train.outcome import UsageError
from dist_train.training.compute import Compute
from dist_train.training.evaluation import evaluate, recompute_statistics
from tests.raising import raises
from tests.unit.small_trainers import small_config

pytestmark = pytest.mark.usefixtures("one_thread")

COMPUTE = Compute(torch.device("cpu"), torch.float32)


def images(samples: int) -> ImageSet:
    stream = torch.Generator().manual_seed(5)
    pixels = torch.randint(0, 256, (samples, 1, 8, 8), generator=stream).to(torch.uint8)
    return ImageSet(pixels, torch.randint(0, 10, (samples,), generator=stream), 10)


def batches(samples: int, size: int) -> list[Batch]:
    source = Samples(images(samples), torch.device("cpu"))
    return [
        source.read(BatchRequest(torch.arange(start, min(start + size, samples)))) for start in range(0, samples, size)
    ]


DRAWING = {"name": "tests.unit.drawing_model:drawing", "width": 1.0}


def network(settings: Mapping[str, Any] | None = None) -> nn.Module:
    model = build_model(small_config(model=settings or {}))
    with torch.no_grad():
        for norm in norm_modules(model):
            norm.running_mean += 0.1
            norm.running_var *= 0.7
    return model


def test_a_linear_network_is_interpolated_as_its_outputs_are() -> None:
    data = batches(70, 16)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10, bias=False))
    stream = torch.Generator().manual_seed(1)
    first, second = (Place(0.1 * torch.randn(640, generator=stream), torch.zeros(0)) for _ in range(2))
    inputs = torch.cat([batch[0] for batch in data]).flatten(1).double()
    labels = torch.cat([batch[1] for batch in data])
    start, end = (inputs @ place.weights.view(10, 64).double().T for place in (first, second))
    walk = interpolation(first, second, variances_of(model))
    evaluator = PointEvaluator(model, [data], [], COMPUTE)
    for alpha in axis(-0.5, 1.5, 41):
        [measured] = evaluator.evaluate(walk(Point(0, alpha)))
        expected = functional.cross_entropy(start + alpha * (end - start), labels)
        assert measured.loss == pytest.approx(float(expected), rel=1e-6)


def test_it_is_the_mean_over_all_samples_of_each_split() -> None:
    model = network().eval()
    train, test = batches(50, 16), batches(21, 16)
    evaluator = PointEvaluator(model, [train, test], [], COMPUTE)
    measured = evaluator.evaluate(place_of(model))
    for split, found in zip((train, test), measured, strict=True):
        inputs, labels = (torch.cat(parts) for parts in zip(*split, strict=True))
        with torch.no_grad():
            logits = model(inputs)
        assert found.loss == pytest.approx(functional.cross_entropy(logits, labels).item(), rel=1e-6)
        assert found.accuracy == (logits.argmax(1) == labels).sum().item() / len(labels)


def test_a_sample_whose_loss_is_not_finite_counts_as_misclassified() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10, bias=False))
    weights = torch.zeros(10, 64)
    weights[0, 0] = math.inf
    [(inputs, labels)] = batches(16, 16)
    evaluator = PointEvaluator(model, [[(inputs, torch.zeros_like(labels))]], [], COMPUTE)
    [measured] = evaluator.evaluate(Place(weights.flatten(), torch.zeros(0)))
    assert math.isnan(measured.loss)
    assert measured.accuracy == 0


def test_the_loss_of_a_confident_network_is_that_of_an_evaluation() -> None:
    model = network().eval()
    *_, (_, bias) = model.named_parameters()
    with torch.no_grad():
        bias[0] += 30.0
    [(inputs, labels)] = batches(16, 16)
    labels = torch.zeros_like(labels)
    evaluator = PointEvaluator(model, [[(inputs, labels)]], [], COMPUTE)
    [measured] = evaluator.evaluate(place_of(model))
    samples = Mock(read_all=lambda parts: [(inputs, labels)])
    evaluation = evaluate(model, samples, 16, batch_size=16, compute=COMPUTE, comm=SingleProcess())
    assert 0 < measured.loss < 1e-9
    assert measured.loss == pytest.approx(evaluation.loss, rel=1e-12, abs=0)


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("recomputes", [True, False])
@pytest.mark.parametrize("settings", [{}, DRAWING], ids=["plain", "drawing"])
def test_threads_do_not_change_a_bit(threads: int, recomputes: bool, settings: Mapping[str, Any]) -> None:
    model = network(settings)
    train, test = batches(130, 16), batches(50, 16)
    statistics = batches(60, 12) if recomputes else []
    origin = place_of(model)
    found = []
    for many in (1, threads):
        evaluator = PointEvaluator(model, [train, test], statistics, COMPUTE, threads=many)
        places = [Place(origin.weights * scale, origin.statistics) for scale in (1.0, 0.9, 1.2)]
        found.append([evaluator.evaluate(place) for place in places])
    assert found[0] == found[1]


def test_passes_over_the_same_batches_draw_the_same_and_leave_the_generators_as_they_were() -> None:
    model = network(DRAWING)
    evaluator = PointEvaluator(model, [batches(130, 16)], [], COMPUTE, threads=2)
    loss = SubsetLoss(network(DRAWING).eval(), batches(50, 16), threads=2)
    torch.manual_seed(1)
    expected = torch.rand(())
    torch.manual_seed(1)
    for _ in range(2):
        assert evaluator.evaluate(place_of(model)) == evaluator.evaluate(place_of(model))
        assert loss.value_at_flat(loss.clean) == loss.value_and_gradient(loss.point())[0]
    assert torch.equal(torch.rand(()), expected)


def test_recomputed_statistics_are_those_that_training_recomputes() -> None:
    model = network()
    train = batches(40, 16)
    evaluator = PointEvaluator(model, [train], batches(30, 6), COMPUTE)
    recomputed = evaluator.evaluate(place_of(model))
    assert evaluator.evaluate(place_of(model)) == recomputed, "nothing is left of an evaluation"
    reference = Samples(images(30), torch.device("cpu"))
    recompute_statistics(model, reference, torch.arange(30), micro_size=6, compute=COMPUTE, comm=SingleProcess())
    evaluator = PointEvaluator(model, [train], [], COMPUTE)
    assert evaluator.evaluate(place_of(model)) == recomputed


def test_statistics_that_cannot_be_computed_give_nan() -> None:
    model = network()
    place = place_of(model)
    place.weights[:9] = math.nan
    evaluator = PointEvaluator(model, [batches(20, 8)], batches(12, 6), COMPUTE)
    [measured] = evaluator.evaluate(place)
    [clean] = evaluator.evaluate(place_of(model))
    assert math.isnan(measured.loss)
    assert math.isnan(measured.accuracy)
    assert math.isfinite(clean.loss), "a bad point does not spoil the next one"


def test_the_network_itself_stays_as_it_was() -> None:
    model = network()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    place = place_of(model)
    place.weights.mul_(2.0)
    evaluator = PointEvaluator(model, [batches(20, 8)], batches(12, 6), COMPUTE)
    evaluator.evaluate(place)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


class TooLarge(nn.Linear):
    """A layer that no memory holds."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize("threads", [1, 2])
def test_a_lack_of_memory_is_refused_with_its_code(threads: int) -> None:
    model, data = TooLarge(3, 2), [(torch.ones(4, 3), torch.zeros(4, dtype=torch.int64))] * 2
    evaluator = PointEvaluator(model, [data], [], COMPUTE, threads=threads)
    with raises(UsageError, "out-of-memory"):
        evaluator.evaluate(place_of(model))


def test_variances_are_told_from_means() -> None:
    model = network()
    flags = variances_of(model)
    statistics = place_of(model).statistics
    assert torch.allclose(statistics[flags], torch.tensor(0.7))
    assert torch.allclose(statistics[~flags], torch.tensor(0.1))


def stored(model: nn.Module, config: Config | None = None) -> Stored:
    settings = yaml.safe_load(dump_config(config or small_config()))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return Stored(Path("other.pt"), "0" * 64, Contents(1, 1.0, state, {}, settings, {}))


def partly_frozen() -> nn.Module:
    frozen = nn.Linear(4, 4).requires_grad_(requires_grad=False)
    model = nn.Sequential(frozen, GroupedBatchNorm(4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    model.register_buffer("scale", torch.ones(1))
    return model


@pytest.mark.parametrize(
    ("name", "is_refused"),
    [
        ("0.weight", True),
        ("scale", True),
        ("2.running_mean", True),
        ("2.num_batches_tracked", False),
        ("1.running_mean", False),
        ("3.weight", False),
    ],
)
def test_a_line_is_refused_if_the_networks_differ_in_what_it_does_not_move(name: str, is_refused: bool) -> None:
    model = partly_frozen()
    other = stored(model)
    other.contents.model[name].add_(1)
    if is_refused:
        with raises(UsageError, "another-network") as caught:
            check_fixed(other, model)
        assert f"({name})" in str(caught.value)
    else:
        check_fixed(other, model)


@pytest.mark.parametrize(
    ("ours", "theirs", "seed", "is_warned"),
    [
        ({}, {}, 1, False),
        ({}, {"validation_size": 10}, 0, True),
        ({"validation_size": 10}, {"validation_size": 10}, 1, True),
        ({"validation_size": 10}, {"validation_size": 10}, 0, False),
        ({"train_size": 50}, {"train_size": 50}, 1, True),
    ],
)
def test_other_training_images_are_warned_of(
    ours: Mapping[str, Any], theirs: Mapping[str, Any], seed: int, is_warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = (
        small_config(data={"name": "fashion-mnist", **data}, run={"seed": seed})
        for data, seed in ((ours, 0), (theirs, seed))
    )
    model = build_model(first)
    with caplog.at_level(logging.WARNING, "dist_train.analysis"):
        place_in(stored(model, second), Mock(config=first, model=model))
    assert bool(caplog.records) == is_warned


@pytest.mark.parametrize(("theirs", "is_warned"), [("", False), ("0123", False), ("4567", True)])
def test_a_checkpoint_of_other_files_is_warned_of(
    theirs: str, is_warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    config = small_config()
    model = build_model(config)
    other = stored(model, config)
    other = replace(other, contents=replace(other.contents, data=theirs))
    with caplog.at_level(logging.WARNING, "dist_train.analysis"):
        place_in(other, Mock(config=config, model=model, data="0123"))
    assert bool(caplog.records) == is_warned
