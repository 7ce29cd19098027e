"""Mixup and CutMix: a pure function of (seed, epoch, sample), however a global batch is cut."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from dist_train.config import RegularizationSettings
from dist_train.data.augmentation import Target, beta_shares, build_mix, unmixed
from dist_train.data.images import BatchRequest
from dist_train.data.plan import BatchPlan, MicroBatch
from dist_train.training.step import GlobalBatch, loss_sum

SAMPLES, CLASSES = 40, 5
BOTH = RegularizationSettings(mixup=0.4, cutmix=1.0)
KINDS = [RegularizationSettings(mixup=0.4), RegularizationSettings(cutmix=1.0), BOTH]


def read(request: BatchRequest) -> tuple[torch.Tensor, torch.Tensor]:
    """Return images that are their sample's number all over, and their labels."""
    numbers = request.indices.to(torch.float32)
    return numbers.view(-1, 1, 1, 1).expand(-1, 1, 6, 8).contiguous(), request.indices % CLASSES


def mixed(
    settings: RegularizationSettings, micro_batches: tuple[MicroBatch, ...], size: int, epoch: int = 3
) -> list[torch.Tensor]:
    """Return images, labels, partners' labels and shares of the first `size` samples of a shuffled set."""
    order = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(1))[:size]
    batch = GlobalBatch(0, epoch, order, micro_batches, partners=1)
    mix = build_mix(settings, 7, SAMPLES)
    parts = []
    for micro_batch in micro_batches:
        request = batch.request(micro_batch)
        inputs, target = mix(*read(request), request)
        assert target.partners is not None
        assert target.share is not None
        parts.append((inputs, target.labels, target.partners, target.share))
    return [torch.cat(list(tensors)) for tensors in zip(*parts, strict=True)]


@pytest.mark.parametrize("settings", KINDS)
@given(size=st.integers(1, SAMPLES), micro_size=st.integers(1, SAMPLES), ranks=st.integers(1, 3))
def test_neither_micro_batches_nor_shared_ones_change_what_is_mixed(
    settings: RegularizationSettings, size: int, micro_size: int, ranks: int
) -> None:
    plan = BatchPlan(size, min(size, micro_size))
    whole = mixed(settings, BatchPlan(size, size).micro_batches, size)
    cut = mixed(settings, plan.micro_batches, size)
    assert all(map(torch.equal, whole, cut))
    if plan.micro_batches[-1].size >= ranks:
        slices = sorted((part for rank in range(ranks) for part in plan.slices(rank, ranks)), key=lambda it: it.start)
        assert all(map(torch.equal, whole, mixed(settings, tuple(slices), size)))


@pytest.mark.parametrize("settings", KINDS)
def test_an_image_is_mixed_with_the_next_by_the_share_that_its_label_has(settings: RegularizationSettings) -> None:
    order = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(1)).to(torch.float32)
    images, labels, partners, share = mixed(settings, BatchPlan(SAMPLES, 16).micro_batches, SAMPLES)
    assert torch.equal(labels, order.long() % CLASSES)
    assert torch.equal(partners, labels.roll(-1))
    means = order * share + order.roll(-1) * (1 - share)
    assert torch.allclose(images.mean((1, 2, 3)), means, atol=1e-4)
    assert int((share < 1).sum()) > 0


def test_each_epoch_mixes_otherwise() -> None:
    plan = BatchPlan(SAMPLES, 16)
    first, second = (mixed(BOTH, plan.micro_batches, SAMPLES, epoch)[3] for epoch in (0, 1))
    assert not torch.equal(first, second)


@pytest.mark.parametrize(("alpha", "deviation"), [(0.01, 0.495), (0.2, 0.4226), (1.0, 0.2887), (5.0, 0.1508)])
def test_shares_follow_the_beta_distribution(alpha: float, deviation: float) -> None:
    shares = beta_shares(20_000, 0, 0, "mixup", alpha)
    assert bool(((shares >= 0) & (shares <= 1)).all())
    assert float(shares.mean()) == pytest.approx(0.5, abs=0.02)
    assert float(shares.std()) == pytest.approx(deviation, rel=0.02)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_the_cross_entropy_with_soft_labels(smoothing: float) -> None:
    source = torch.Generator().manual_seed(0)
    logits = torch.randn(6, CLASSES, generator=source)
    labels, partners = torch.arange(6) % CLASSES, (torch.arange(6) + 2) % CLASSES
    share = torch.rand(6, generator=source)
    hot = functional.one_hot(labels, CLASSES) * share[:, None] + functional.one_hot(partners, CLASSES) * (
        1 - share[:, None]
    )
    expected = functional.cross_entropy(logits, hot, label_smoothing=smoothing, reduction="sum")
    found = loss_sum(logits, Target(labels, partners, share), smoothing)
    assert float(found) == pytest.approx(float(expected), rel=1e-6)
    assert torch.equal(Target(labels, partners, share).main, torch.where(share >= 0.5, labels, partners))
    plain = functional.cross_entropy(logits, labels, label_smoothing=smoothing, reduction="sum")
    assert torch.equal(loss_sum(logits, Target(labels), smoothing), plain)


def test_without_settings_nothing_is_mixed() -> None:
    assert build_mix(RegularizationSettings(label_smoothing=0.1), 0, 10) is unmixed
