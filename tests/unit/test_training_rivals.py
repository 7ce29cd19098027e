"""The methods beside SmoothOut, Langevin and SAM: three updates by each one's formula, in plain PyTorch.

Promises 3 and 5 with these methods, and with the optimizers beside SGD, on simulated ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from dist_train.cluster.communicator import SingleProcess
from dist_train.config import Config
from dist_train.data.images import BatchRequest
from dist_train.data.plan import BatchPlan, epoch_order
from dist_train.models import build_model
from dist_train.optim.flat_weights import FlatWeights
from tests.unit.plain_step import noise_of, samples_of
from tests.unit.simulated_ranks import SimulatedRanks, results
from tests.unit.small_trainers import build_trainer, small_config
from tests.unit.test_training_step import take

pytestmark = pytest.mark.usefixtures("one_thread")

Tensors = list[Tensor]
RATES = (0.05, 0.02, 0.04)
TOTAL = 6
"""Updates of a run of `small_config`: two epochs of three."""


class Plain:
    """A network in plain PyTorch, and what a formula needs of it; all lists are by parameter."""

    def __init__(self, config: Config) -> None:
        self.config, self.noise = config, config.noise
        self.model = build_model(config)
        self.weights: Tensors = [parameter.detach().clone() for parameter in self.model.parameters()]
        self.kept: dict[str, Tensors] = {}
        self._segments = FlatWeights(build_model(config)).segments
        self._samples = samples_of(config)
        self._order = epoch_order(len(self._samples), config.run.seed, 0)

    def parts(self, step: int) -> Iterator[tuple[int, Callable[[Tensors], Tensors], int]]:
        """Yield each micro-batch's index, the gradient of its share of the mean loss at given weights, its size."""
        size, micro_size = self.config.batch.global_size, self.config.batch.micro_size
        assert micro_size != "auto"
        for part in BatchPlan(size, micro_size).micro_batches:
            indices = self._order[step * size :][part.start : part.stop]
            inputs, labels = self._samples.read(BatchRequest(indices, 0))

            def gradient(at: Tensors, inputs: Tensor = inputs, labels: Tensor = labels) -> Tensors:
                parameters = list(self.model.parameters())
                for parameter, value in zip(parameters, at, strict=True):
                    parameter.data = value
                loss = functional.cross_entropy(self.model(inputs), labels, reduction="sum") / size
                return list(torch.autograd.grad(loss, parameters))

            yield part.index, gradient, part.size

    def first_loss(self, step: int, at: Tensors) -> float:
        """Return the mean loss of the step's first micro-batch at given weights."""
        size = self.config.batch.global_size
        part = BatchPlan(size, int(self.config.batch.micro_size)).micro_batches[0]
        inputs, labels = self._samples.read(BatchRequest(self._order[step * size :][part.start : part.stop], 0))
        names = [name for name, _ in self.model.named_parameters()]
        logits = torch.func.functional_call(self.model, dict(zip(names, at, strict=True)), inputs)
        return float(functional.cross_entropy(logits, labels))

    def gradient(self, step: int, at: Callable[[int], Sequence[tuple[float, Tensors]]]) -> Tensors:
        """Return the sum over micro-batches of their gradients at (share, weights), as `at` says by their index."""
        total = [torch.zeros_like(weight) for weight in self.weights]
        for index, gradient, _ in self.parts(step):
            for share, weights in at(index):
                total = [t + share * g for t, g in zip(total, gradient(weights), strict=True)]
        return total

    def u(self, step: int, *indices: int | str) -> Tensors:
        return list(noise_of(self.config, step, self._segments, *indices))

    def moved(self, way: Tensors, factor: float = 1.0) -> Tensors:
        return [w + factor * e for w, e in zip(self.weights, way, strict=True)]

    def descend(self, gradient: Tensors, rate: float) -> None:
        self.weights = self.moved(gradient, -rate)


def filter_norms(weight: Tensor) -> Tensor:
    """Return the norm of each filter, for each weight."""
    if weight.dim() < 2:
        return torch.full_like(weight, float(weight.norm()))
    norms: Tensor = weight.flatten(1).norm(dim=1).view(-1, *[1] * (weight.dim() - 1)).expand_as(weight)
    return norms


def late_noise(plain: Plain, step: int, rate: float) -> None:
    amplitude = 0.0 if step < 0.3 * TOTAL else 0.05
    noisy = plain.moved(plain.u(step), amplitude)
    plain.descend(plain.gradient(step, lambda index: [(1.0, noisy)]), rate)


def target_rise(plain: Plain, step: int, rate: float) -> None:
    """The amplitude moves towards that of the rise, by at most a tenth an update."""
    [strength] = plain.kept.setdefault("strength", [torch.ones(())])
    noisy = plain.moved(plain.u(step), 0.2 * float(strength))
    rise = plain.first_loss(step, noisy) - plain.first_loss(step, plain.weights)
    plain.descend(plain.gradient(step, lambda index: [(1.0, noisy)]), rate)
    factor = (0.5 / rise) ** 0.25 if rise > 0 else math.inf
    plain.kept["strength"] = [strength * min(max(factor, 1 / 1.1), 1.1)]


def m_rwp(plain: Plain, step: int, rate: float) -> None:
    """2404.00357, equation of the mixed gradient: l g(w + e) + (1 - l) g(w)."""

    def at(index: int) -> Sequence[tuple[float, Tensors]]:
        return [(0.3, plain.moved(plain.u(step, index), 0.05)), (0.7, plain.weights)]

    plain.descend(plain.gradient(step, at), rate)


def m_rwp_by_turns(plain: Plain, step: int, rate: float) -> None:
    """The same with two batches, as its authors do: half of the micro-batches at w + e, the other half at w."""

    def at(index: int) -> Sequence[tuple[float, Tensors]]:
        if index % 2 == 1:
            return [(2 * 0.7, plain.weights)]
        return [(2 * 0.3, plain.moved(plain.u(step), 0.05))]

    plain.descend(plain.gradient(step, at), rate)


def nso(plain: Plain, step: int, rate: float) -> None:
    """2306.08553: the mean over k draws of (g(w + u) + g(w - u)) / 2."""

    def at(index: int) -> Sequence[tuple[float, Tensors]]:
        draws = plain.u(step, index), plain.u(step, index, "draw", 1)
        return [(1 / 4, plain.moved(u, sign * 0.05)) for u in draws for sign in (1, -1)]

    plain.descend(plain.gradient(step, at), rate)


def lpf_sgd(plain: Plain, step: int, rate: float) -> None:
    """2201.08025: the mean over M draws of g(w + e), e ~ N(0, s_t^2 |w_f|^2), s_t rising as a cosine."""
    s = 0.02 * (1 + 3 / 2 * (1 - math.cos(math.pi * step / TOTAL))) / math.sqrt(3)
    norms = [filter_norms(weight) for weight in plain.weights]

    def at(index: int) -> Sequence[tuple[float, Tensors]]:
        draws = plain.u(step, index), plain.u(step, index, "draw", 1), plain.u(step, index, "draw", 2)
        # u has variance 1/3
        e = [[math.sqrt(3) * x * s * norm for x, norm in zip(u, norms, strict=True)] for u in draws]
        return [(1 / 3, plain.moved(each)) for each in e]

    plain.descend(plain.gradient(step, at), rate)


def arwp(plain: Plain, step: int, rate: float) -> None:
    """2404.00357 and its authors' code: e / sqrt(1 + eta F), F <- beta F + g^2 summed over each filter."""
    fisher = plain.kept.setdefault("fisher", [torch.zeros_like(weight) for weight in plain.weights])
    e = [
        0.2 * x * filter_norms(w) / torch.sqrt(1 + 0.5 * filter_norms(f.sqrt()).square())
        for x, w, f in zip(plain.u(step), plain.weights, fisher, strict=True)
    ]
    gradient = plain.gradient(step, lambda index: [(1.0, plain.moved(e))])
    plain.kept["fisher"] = [0.8 * f + g.square() for f, g in zip(fisher, gradient, strict=True)]
    plain.descend(gradient, rate)


def asam(plain: Plain, step: int, rate: float) -> None:
    """2102.11600: g at w + rho T^2 g / ||T g||, T = |w| + 0.01, for each micro-batch."""
    moving = [float(u.any()) for u in plain.u(step)]
    total = [torch.zeros_like(weight) for weight in plain.weights]
    for _, gradient, _ in plain.parts(step):
        t = [(w.abs() + 0.01) * m for w, m in zip(plain.weights, moving, strict=True)]
        tg = [a * b for a, b in zip(t, gradient(plain.weights), strict=True)]
        length = math.sqrt(sum(float(each.square().sum()) for each in tg))
        way = [a * b * 0.5 / length for a, b in zip(t, tg, strict=True)]
        total = [a + b for a, b in zip(total, gradient(plain.moved(way)), strict=True)]
    plain.descend(total, rate)


def sgld(plain: Plain, step: int, rate: float) -> None:
    """Welling and Teh: w - eta g + sqrt(2 eta tau) xi, xi ~ N(0, 1)."""
    tau = 0.05**2 / 6
    xi = [math.sqrt(3) * u for u in plain.u(step)]
    gradient = plain.gradient(step, lambda index: [(1.0, plain.weights)])
    stays = [math.sqrt(2 * rate * tau) * each for each in xi]
    plain.descend(gradient, rate)
    plain.weights = plain.moved(stays)


def fsgld(plain: Plain, step: int, rate: float) -> None:
    """2510.02174: w - eta g(w + sigma e) + sqrt(2 eta / beta) xi, sigma = beta^(-1.01 / 4)."""
    sigma = 0.2 / math.sqrt(3)
    beta = sigma ** (-4 / 1.01)
    e, xi = ([math.sqrt(3) * u for u in plain.u(step, *indices)] for indices in ((), ("stays",)))
    gradient = plain.gradient(step, lambda index: [(1.0, plain.moved(e, sigma))])
    plain.descend(gradient, rate)
    plain.weights = plain.moved(xi, math.sqrt(2 * rate / beta))


def ivon(plain: Plain, step: int, rate: float) -> None:
    """2402.17641, algorithm 1, with its authors' rescaled rate."""
    b1, b2, size, d, h0 = 0.8, 0.9, 500.0, 1e-3, 0.5
    m = plain.kept.setdefault("m", [torch.zeros_like(weight) for weight in plain.weights])
    h = plain.kept.setdefault("h", [torch.full_like(weight, h0) for weight in plain.weights])
    e = [math.sqrt(3) * u / (size * (x + d)).sqrt() for u, x in zip(plain.u(step), h, strict=True)]
    g = plain.gradient(step, lambda index: [(1.0, plain.moved(e))])
    f = [size * (x + d) * a * b for x, a, b in zip(h, e, g, strict=True)]
    m = [b1 * a + (1 - b1) * b for a, b in zip(m, g, strict=True)]
    h = [b2 * x + (1 - b2) * y + (1 - b2) ** 2 * (x - y).square() / (2 * (x + d)) for x, y in zip(h, f, strict=True)]
    way = [
        (h0 + d) * (a / (1 - b1 ** (step + 1)) + d * w) / (x + d) for a, w, x in zip(m, plain.weights, h, strict=True)
    ]
    plain.kept = {"m": m, "h": h}
    plain.descend(way, rate)


EVEN = {"batch": {"global_size": 24, "micro_size": 6}}
MICRO = {"sharing": "micro_batch"}
RIVALS: dict[Callable[[Plain, int, float], None], dict[str, Any]] = {
    late_noise: {"noise": {"amplitude": 0.05, "schedule": {"kind": "late", "start": 0.3}}},
    target_rise: {"noise": {"amplitude": 0.2, "target_rise": 0.5}},
    m_rwp: {"noise": {"amplitude": 0.05, "mix": 0.3, **MICRO}},
    m_rwp_by_turns: {"noise": {"amplitude": 0.05, "mix": 0.3, "passes": "one"}, **EVEN},
    nso: {"noise": {"amplitude": 0.05, "draws": 2, "antithetic": True, **MICRO}},
    lpf_sgd: {
        "noise": {
            "amplitude": 0.02,
            "draws": 3,
            "distribution": "normal",
            "scale": "filter_norm",
            "schedule": {"kind": "rise", "rise": 3.0},
            **MICRO,
        }
    },
    arwp: {
        "noise": {
            "method": "arwp",
            "amplitude": 0.2,
            "distribution": "normal",
            "scale": "filter_norm",
            "adaptation": 0.5,
            "memory": 0.8,
        }
    },
    asam: {"noise": {"method": "asam", "amplitude": 0.5, **MICRO}},
    sgld: {"noise": {"method": "sgld", "amplitude": 0.05, "distribution": "normal"}},
    fsgld: {"noise": {"method": "fsgld", "amplitude": 0.2, "distribution": "normal"}},
    ivon: {
        "noise": {
            "method": "ivon",
            "distribution": "normal",
            "exclude": [],
            "sample_size": 500.0,
            "curvature": 0.5,
            "damping": 1e-3,
            "betas": [0.8, 0.9],
        }
    },
}


def config_of(rival: Callable[[Plain, int, float], None], norm: str) -> Config:
    model = {"width": 0.0625, "norm": norm}
    return small_config(model=model, optimizer={"momentum": 0.0, "nesterov": False}, **RIVALS[rival])


@pytest.mark.parametrize("rival", RIVALS, ids=lambda rival: rival.__name__)
def test_three_updates_are_those_of_its_formula_in_plain_pytorch(
    tmp_path: Path, rival: Callable[[Plain, int, float], None]
) -> None:
    # Norms over few samples magnify roundings; this one has none of them.
    config = config_of(rival, "group")
    plain, trainer = Plain(config), build_trainer(config, tmp_path, SingleProcess())
    for step, rate in enumerate(RATES):
        rival(plain, step, rate)
        take(trainer, step, rate)
        for parameter, expected in zip(trainer.network.parameters(), plain.weights, strict=True):
            torch.testing.assert_close(parameter.detach(), expected, rtol=0, atol=1e-5)


def check_promises_3_and_5(config: Config, tmp_path: Path) -> None:
    """Take two updates on one, two and three ranks, the second one also after a resume."""

    def train(comm: SimulatedRanks) -> list[bytes]:
        folder = tmp_path / str(comm.size)
        trainer = build_trainer(config, folder, comm)
        take(trainer, 0, RATES[0])
        trainer.progress.step = 1
        contents = deepcopy(trainer.contents())  # as a file: they share tensors with the optimizer
        resumed = build_trainer(config, folder / "resumed", comm, contents=contents)
        bits = []
        for each in (trainer, resumed):
            take(each, 1, RATES[1])
            bits.append(each.training_step.weights.values.numpy().tobytes())
        return bits

    [alone] = results(1, train)
    assert alone[0] == alone[1]
    for ranks in (2, 3):
        assert results(ranks, train) == [alone] * ranks


@pytest.mark.parametrize("rival", RIVALS, ids=lambda rival: rival.__name__)
def test_promises_3_and_5_the_same_bits_on_any_number_of_ranks_and_when_it_resumes(
    tmp_path: Path, rival: Callable[[Plain, int, float], None]
) -> None:
    check_promises_3_and_5(config_of(rival, "ghost"), tmp_path)


@pytest.mark.parametrize("name", ["adam", "adamw", "lars", "lamb"])
def test_promises_3_and_5_hold_with_each_optimizer(tmp_path: Path, name: str) -> None:
    optimizer = {"name": name, "weight_decay": 1e-3, "clip_norm": 1.0}
    check_promises_3_and_5(small_config(model={"width": 0.0625}, optimizer=optimizer), tmp_path)
