"""What the step is held to: an update in plain PyTorch, one parameter and one micro-batch after another."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from dist_train.config import Config
from dist_train.config.resuming import STREAM_OF_A_RANK
from dist_train.data.images import BatchRequest
from dist_train.data.loader import SampleSource, open_splits
from dist_train.data.plan import BatchPlan, epoch_order
from dist_train.models import build_model
from dist_train.optim.flat_weights import FlatWeights, Segment
from dist_train.reproducible import bits, key


def noise_of(config: Config, step: int, segments: Sequence[Segment], *indices: int | str) -> Iterator[Tensor]:
    """Yield the draw of each parameter at amplitude 1, before any scale."""
    u = torch.empty(-(-segments[-1].stop // 16) * 16)
    stream = key(config.run.seed, "noise", step, *indices)
    random = torch.cat([part.clone() for part in bits(stream, len(u), u.device)])
    if config.noise.distribution == "uniform":
        u = (random | 1).float() / 2**15
    else:
        u = _normal()[random.long() + 2**15].float()
    for segment in segments:
        yield u[segment.start : segment.stop].view(segment.shape) * float(segment.kind not in config.noise.exclude)


def _normal() -> Tensor:
    """Return 65,536 quantiles of the normal distribution on a grid of 65,535 values, their variance 1/3."""
    quantiles = torch.special.ndtri((torch.arange(2**16).double() + 0.5) / 2**16)
    on_grid = (quantiles / quantiles.max() * 32767).round()
    normalized: Tensor = on_grid / on_grid.square().mean().sqrt() * math.sqrt(1 / 3)
    return normalized


def scaled(config: Config, u: Tensor, weight: Tensor) -> Tensor:
    """Return delta at amplitude 1: the table of the method's page."""
    if config.noise.scale == "absolute":
        return u
    if config.noise.scale == "weight":
        return weight.abs() * u
    rows = (1, -1) if weight.dim() < 2 else (len(weight), -1)
    norms = weight.reshape(rows).norm(dim=1), u.reshape(rows).norm(dim=1).clamp_min(1e-30)
    delta: Tensor = u.reshape(rows) * (norms[0] / norms[1])[:, None]
    return delta.view(u.shape)


def smoothout_gradients(config: Config, step: int, ranks: int = 1) -> tuple[dict[str, Tensor], float]:
    """Perturb, differentiate the mean loss over the whole global batch, restore: the paper's page in plain PyTorch."""
    model = build_model(config)
    assert config.batch.micro_size != "auto"
    segments = FlatWeights(build_model(config)).segments
    samples = samples_of(config)
    indices = epoch_order(len(samples), config.run.seed, 0)[step * config.batch.global_size :]
    loss = 0.0
    for part in BatchPlan(config.batch.global_size, config.batch.micro_size).micro_batches:
        shares: dict[str, list[int | str]] = {
            "micro_batch": [part.index],
            "rank": [STREAM_OF_A_RANK, part.index % ranks],
        }
        clean = [parameter.detach().clone() for parameter in model.parameters()]
        noise = noise_of(config, step, segments, *shares.get(config.noise.sharing, []))
        for parameter, u in zip(model.parameters(), noise, strict=True):
            parameter.data += config.noise.amplitude * scaled(config, u, parameter.data)
        inputs, labels = samples.read(BatchRequest(indices[part.start : part.stop], 0))
        share = functional.cross_entropy(model(inputs), labels, reduction="sum") / config.batch.global_size
        torch.autograd.backward(share)
        loss += share.item()
        for parameter, value in zip(model.parameters(), clean, strict=True):
            parameter.data = value
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, loss


def sam_gradients(config: Config, step: int) -> dict[str, Tensor]:
    """Ascend by each micro-batch's own gradient, differentiate there, come back: SAM in plain PyTorch."""
    model = build_model(config)
    assert config.batch.micro_size != "auto"
    samples = samples_of(config)
    indices = epoch_order(len(samples), config.run.seed, 0)[step * config.batch.global_size :]
    parameters = list(model.parameters())
    moving = [segment.kind != "norm" for segment in FlatWeights(build_model(config)).segments]
    total = [torch.zeros_like(parameter) for parameter in parameters]
    for part in BatchPlan(config.batch.global_size, config.batch.micro_size).micro_batches:
        inputs, labels = samples.read(BatchRequest(indices[part.start : part.stop], 0))
        uphill = torch.autograd.grad(functional.cross_entropy(model(inputs), labels), parameters)
        length = math.sqrt(sum(float(g.square().sum()) for g, moves in zip(uphill, moving, strict=True) if moves))
        clean = [parameter.detach().clone() for parameter in parameters]
        for parameter, g, moves in zip(parameters, uphill, moving, strict=True):
            parameter.data += config.noise.amplitude / length * g * float(moves)
        loss = functional.cross_entropy(model(inputs), labels, reduction="sum") / config.batch.global_size
        for sum_, g in zip(total, torch.autograd.grad(loss, parameters), strict=True):
            sum_ += g
        for parameter, value in zip(parameters, clean, strict=True):
            parameter.data = value
    return {name: sum_ for (name, _), sum_ in zip(model.named_parameters(), total, strict=True)}


def samples_of(config: Config) -> SampleSource:
    """Return the training samples that a run of `config` reads."""
    return open_splits(config.data, config.run.seed, torch.device("cpu"), config.precision.channels_last).train
