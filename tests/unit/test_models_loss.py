"""A loss of one's own: what training minimizes instead of cross entropy."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from dist_train.cluster.communicator import SingleProcess
from dist_train.config import Config, ImageFormat
from dist_train.models import build_loss
from dist_train.outcome import CodedError
from tests.raising import raises, raises_problems
from tests.unit.small_trainers import build_trainer, small_config

CPU = torch.device("cpu")
HERE = __name__

SampleLosses = Callable[[Tensor, Tensor], Tensor]


def weighted(images: ImageFormat, options: dict[str, Any]) -> nn.Module:
    return nn.CrossEntropyLoss(weight=torch.tensor(options["weights"]), reduction="none")


def squared(images: ImageFormat) -> SampleLosses:
    return lambda logits, labels: (logits - functional.one_hot(labels, images.classes)).square().sum(1)


def of_the_mean(images: ImageFormat) -> SampleLosses:
    return nn.CrossEntropyLoss()


def of_classes(images: ImageFormat) -> SampleLosses:
    return nn.BCEWithLogitsLoss(reduction="none")


def numbers(images: ImageFormat) -> Any:
    return lambda logits, labels: 0.5


def constant(images: ImageFormat) -> SampleLosses:
    return lambda logits, labels: torch.zeros(len(labels))


def infinite(images: ImageFormat) -> SampleLosses:
    return lambda logits, labels: logits.sum(1).mul(0).log().neg()


class Trained(nn.Module):
    def __init__(self, images: ImageFormat) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(()))

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return functional.cross_entropy(logits / self.temperature, labels, reduction="none")


class Counting(nn.Module):
    def __init__(self, images: ImageFormat) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        self.calls += 1
        return self.calls * functional.cross_entropy(logits, labels, reduction="none")


def centred(images: ImageFormat) -> SampleLosses:
    return lambda logits, labels: functional.cross_entropy(logits - logits.mean(0), labels, reduction="none")


def direct(logits: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(logits, labels, reduction="none")


def with_loss(name: str, **options: Any) -> Config:
    return small_config(loss={"name": f"{HERE}:{name}", "options": options})


def samples(config: Config) -> tuple[Tensor, Tensor]:
    classes = config.data.image_format.classes
    return torch.randn(6, classes, generator=torch.Generator().manual_seed(0)), torch.arange(6) % classes


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_it_is_cross_entropy_by_default(smoothing: float) -> None:
    config = small_config(regularization={"label_smoothing": smoothing})
    logits, labels = samples(config)
    expected = functional.cross_entropy(logits, labels, label_smoothing=smoothing, reduction="sum")
    assert torch.equal(build_loss(config, CPU)(logits, labels, reduction="sum"), expected)


def test_a_module_of_torch_may_weigh_classes() -> None:
    classes = small_config().data.image_format.classes
    config = with_loss("weighted", weights=[float(each) for each in range(classes)])
    logits, labels = samples(config)
    expected = labels * functional.cross_entropy(logits, labels, reduction="none")
    loss = build_loss(config, CPU)
    torch.testing.assert_close(loss(logits, labels, reduction="none"), expected)
    torch.testing.assert_close(loss(logits, labels, reduction="sum"), expected.sum())


@pytest.mark.parametrize("name", ["of_the_mean", "of_classes", "numbers", "constant", "infinite", "Trained"])
def test_a_loss_by_which_training_would_be_wrong_is_refused(name: str) -> None:
    with raises(CodedError, code="plugin-failed" if name == "of_classes" else "plugin-result"):
        build_loss(with_loss(name), CPU)


@pytest.mark.parametrize(
    ("name", "words"), [("Counting", "has a state"), ("centred", "depends on the other samples"), ("squared", "")]
)
def test_a_loss_with_a_state_or_of_other_samples_gets_a_warning(
    name: str, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        build_loss(with_loss(name), CPU)
    assert [words in record.message for record in caplog.records] == ([True] if words else [])


@pytest.mark.parametrize("name", [f"{HERE}:direct", "torch.nn:CrossEntropyLoss", "torch.nn:MSELoss"])
def test_a_loss_itself_is_refused_where_a_function_that_builds_one_is_named(name: str) -> None:
    with raises_problems(("loss.name", "plugin-arguments")):
        small_config(loss={"name": name})


@pytest.mark.parametrize("mixup", [0.0, 0.4])
def test_training_minimizes_it(mixup: float, tmp_path: Path) -> None:
    classes = small_config().data.image_format.classes
    twice = {"name": f"{HERE}:weighted", "options": {"weights": [2.0] * classes}}
    trained = []
    for name, loss, rate in (("plain", {}, 0.05), ("twice", twice, 0.025)):
        config = small_config(loss=loss, optimizer={"learning_rate": rate}, regularization={"mixup": mixup})
        trainer = build_trainer(config, tmp_path / name, SingleProcess())
        trainer.run()
        trained.append(trainer.state.weights.values.clone())
    torch.testing.assert_close(*trained, rtol=0.0, atol=1e-4)
