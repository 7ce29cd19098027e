"""One update: Algorithm 1 of SmoothOut over the global batch, whatever the number of ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from dist_train.cluster.communicator import Communicator, RankLostError, SingleProcess
from dist_train.config import ImageFormat, PrecisionSettings
from dist_train.config.resuming import with_setting
from dist_train.data.images import BatchRequest
from dist_train.data.plan import batch_indices, epoch_order
from dist_train.models import build_model
from dist_train.models.norms import NormFactory, running_statistics
from dist_train.optim.noise import Noise, Point
from dist_train.outcome import DivergedError, OutOfMemoryError, PluginResultError, UsageError
from dist_train.training.compute import Compute, set_up_compute
from dist_train.training.step import GlobalBatch, Update, clip_gradient
from dist_train.training.trainer import Trainer
from tests.raising import raises
from tests.unit.plain_step import noise_of, sam_gradients, scaled, smoothout_gradients
from tests.unit.simulated_ranks import SimulatedRanks, on_ranks, results
from tests.unit.small_trainers import build_trainer, gradient_bits, small_config, state_bits
from tests.unit.weights_in_force import in_force

pytestmark = pytest.mark.usefixtures("one_thread")


PLAIN = {"momentum": 0.0, "nesterov": False}


def take(trainer: Trainer, step: int = 0, rate: float = 0.05, stop: Callable[[], bool] = lambda: False) -> Update:
    """Make update `step` of the first epoch."""
    order = epoch_order(len(trainer.splits.train), trainer.config.run.seed, 0)
    indices = batch_indices(order, step, trainer.plan.global_size)
    mine = trainer.plan.share(trainer.comm.rank, trainer.comm.size)
    return trainer.training_step(GlobalBatch(step, 0, indices, mine, pace=trainer.comm.rank + 1), rate, stop)


def assert_equal_gradients(gradients: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Equal to float32 rounding and what a few ReLUs at their edges add; test_models_accuracy has the tight bound."""
    rounding = 1e-3 * max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=0, atol=rounding)


def gradients_of(trainer: Trainer) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in trainer.network.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("sharing", "reduction", "distribution", "scale"),
    [
        ("global", "exact", "uniform", "absolute"),
        ("global", "float", "normal", "absolute"),
        ("micro_batch", "exact", "normal", "filter"),
        ("micro_batch", "float", "uniform", "weight"),
        ("rank", "exact", "uniform", "filter"),
        ("rank", "float", "normal", "weight"),
    ],
)
@pytest.mark.parametrize("ranks", [1, 3])
def test_its_gradient_is_that_of_plain_pytorch_at_the_perturbed_weights(
    tmp_path: Path, sharing: str, reduction: str, distribution: str, scale: str, ranks: int
) -> None:
    noise = {"sharing": sharing, "distribution": distribution, "scale": scale, "amplitude": 0.05}
    config = small_config(model={"width": 0.0625}, noise=noise, comm={"reduction": reduction})
    expected, loss = smoothout_gradients(config, 1, ranks)

    def step(comm: SimulatedRanks) -> tuple[dict[str, Tensor], Update]:
        trainer = build_trainer(config, tmp_path, comm)
        update = take(trainer, 1, rate=0.0)
        return gradients_of(trainer), update

    for gradients, update in results(ranks, step):
        assert update.total.loss == pytest.approx(loss, rel=1e-6)
        norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in expected.values()))
        assert update.total.gradient_norm == pytest.approx(norm, rel=1e-3)  # a ReLU at its edge may take its other side
        assert_equal_gradients(gradients, expected)


SAM = {"method": "sam", "amplitude": 0.2, "sharing": "micro_batch"}


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("reduction", ["exact", "float"])
def test_sam_s_gradient_is_that_of_plain_pytorch(tmp_path: Path, reduction: str, ranks: int) -> None:
    config = small_config(model={"width": 0.0625}, noise=SAM, comm={"reduction": reduction})
    expected = sam_gradients(config, 1)

    def step(comm: SimulatedRanks) -> dict[str, Tensor]:
        trainer = build_trainer(config, tmp_path, comm)
        before = trainer.training_step.weights.values.clone()
        take(trainer, 1, rate=0.0)
        assert torch.equal(trainer.training_step.weights.values, before)
        return gradients_of(trainer)

    for gradients in results(ranks, step):
        assert_equal_gradients(gradients, expected)
    plain, _ = smoothout_gradients(small_config(model={"width": 0.0625}, noise={"method": "none", "amplitude": 0.0}), 1)
    with pytest.raises(AssertionError):
        assert_equal_gradients(plain, expected)


class InPlace(torch.optim.SGD):
    """Plain SGD, on the tensors that it finds."""

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # no closure
        for parameter in self.param_groups[0]["params"]:
            parameter.sub_(self.param_groups[0]["lr"] * parameter.grad)


class Replacing(InPlace):
    """Plain SGD, which gives the parameters tensors of its own, and drops the gradients."""

    def step(self) -> None:  # type: ignore[override]  # no closure
        for parameter in self.param_groups[0]["params"]:
            parameter.data = parameter.data - self.param_groups[0]["lr"] * parameter.grad
        self.zero_grad()


def in_place(settings: Any, groups: Sequence[Any]) -> torch.optim.Optimizer:
    return InPlace([parameter for group in groups for parameter in group.parameters])


def replacing(settings: Any, groups: Sequence[Any]) -> torch.optim.Optimizer:
    return Replacing([parameter for group in groups for parameter in group.parameters])


class OnAllGradients(Noise):
    """Noise on the whole buffer of gradients, the padding between tensors included."""

    def perturb_for(self, micro_batch: int, ascend: Callable[[], None], point: Point | None = None) -> None:
        self.weights.gradients.add_(1.0)

    def before_update(self, step: int, learning_rate: float) -> None:
        self.weights.gradients.add_(1.0)


@pytest.mark.parametrize("reduction", ["exact", "float"])
def test_noise_of_a_plug_in_on_all_gradients_does_not_reach_their_sum(tmp_path: Path, reduction: str) -> None:
    norms = []
    for method in ("none", f"{__name__}:OnAllGradients"):
        config = small_config(noise={"method": method}, comm={"reduction": reduction})
        trainer = build_trainer(config, tmp_path, SingleProcess())
        norms.append([take(trainer, 1, rate=0.0).total.gradient_norm for _ in range(2)])
    assert norms[0] == norms[1]


class TwiceAtAPoint(Noise):
    """Noise that names one and the same point twice."""

    def points(self, micro_batch: int) -> Sequence[Point]:
        return (Point(weight=0.5),) * 2


def test_a_point_that_is_named_twice_counts_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dist_train.training.reduction._BUCKET", 1)

    def step(method: str, comm: SimulatedRanks) -> dict[str, Tensor]:
        trainer = build_trainer(small_config(noise={"method": method}), tmp_path, comm)
        take(trainer, rate=0.0)
        return gradients_of(trainer)

    once, twice = (results(2, partial(step, method)) for method in ("none", f"{__name__}:TwiceAtAPoint"))
    for gradients, expected in zip(twice, once, strict=True):
        assert_equal_gradients(gradients, expected)


@pytest.mark.parametrize("noise", [SAM, {"method": "langevin"}])
def test_an_optimizer_may_replace_the_tensors_of_parameters(tmp_path: Path, noise: dict[str, Any]) -> None:
    trained = []
    for name in ("in_place", "replacing"):
        config = small_config(optimizer={"name": f"{__name__}:{name}"}, noise=noise, averaging={"kind": "ema"})
        trainer = build_trainer(config, tmp_path / name, SingleProcess())
        before = trainer.training_step.weights.values.clone()
        take(trainer, 0)
        take(trainer, 1)
        assert not torch.equal(before, trainer.training_step.weights.values)
        trained.append((state_bits(trainer.network), trainer.training_step.weights.values.tolist()))
    assert trained[0] == trained[1]


def test_a_model_that_moves_its_weights_is_refused_before_they_are_updated(tmp_path: Path) -> None:
    """As flatten_parameters of torch's recurrent layers does on a GPU."""
    trainer = build_trainer(small_config(noise={"method": "none"}), tmp_path, SingleProcess())
    weights = trainer.training_step.weights
    before = weights.values.clone()

    def move(*_: object) -> None:
        weights.parameters[1].data = weights.parameters[1].data.clone()

    trainer.training_step.model.register_forward_pre_hook(move)
    with raises(PluginResultError, code="plugin-result"):
        take(trainer, 1)
    assert torch.equal(weights.values, before)


def test_sam_s_statistics_count_each_sample_once(tmp_path: Path) -> None:
    trainer = build_trainer(small_config(noise={**SAM, "amplitude": 1e-6}), tmp_path, SingleProcess())
    take(trainer)
    sam = {name: buffer.clone() for name, buffer in trainer.network.named_buffers() if name.endswith("running_var")}
    plain = build_trainer(small_config(noise={"method": "none"}), tmp_path, SingleProcess())
    take(plain)
    for name, buffer in sam.items():
        torch.testing.assert_close(buffer, plain.network.get_buffer(name), rtol=1e-4, atol=0)


def test_statistics_over_several_points_are_means_over_them(tmp_path: Path) -> None:
    noise = {"amplitude": 1e-6, "draws": 2, "antithetic": True}
    trainer = build_trainer(small_config(noise=noise), tmp_path, SingleProcess())
    take(trainer)
    plain = build_trainer(small_config(noise={"method": "none"}), tmp_path, SingleProcess())
    take(plain)
    for name, buffer in running_statistics(trainer.network).items():
        torch.testing.assert_close(buffer, plain.network.get_buffer(name), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("scale", ["absolute", "weight", "filter"])
def test_langevin_s_updates_are_equation_1_and_its_momentum_has_no_noise(
    tmp_path: Path, scale: str, nesterov: bool
) -> None:
    noise = {"method": "langevin", "amplitude": 0.05, "scale": scale, "schedule": {"kind": "linear"}}
    config = small_config(noise=noise, optimizer={"momentum": 0.9, "nesterov": nesterov})
    trainer = build_trainer(config, tmp_path, SingleProcess())
    segments = trainer.training_step.weights.segments
    parameters = list(trainer.network.parameters())
    buffers = [torch.zeros_like(parameter) for parameter in parameters]
    for step, amplitude in enumerate((0.05, 0.05 * 5 / 6, 0.05 * 4 / 6)):
        before = [parameter.detach().clone() for parameter in parameters]
        take(trainer, step, rate=0.1)
        draws = noise_of(config, step, segments)
        gradients = [p.grad.clone() for p in parameters if p.grad is not None]
        for parameter, theta, g, v, u in zip(parameters, before, gradients, buffers, draws, strict=True):
            v.mul_(0.9).add_(g)
            descent = g + 0.9 * v if nesterov else v
            expected = theta - 0.1 * descent + amplitude * scaled(config, u, theta)
            torch.testing.assert_close(parameter.detach(), expected, rtol=1e-5, atol=1e-6)
            buffer = trainer.training_step.optimizer.state[parameter]["momentum_buffer"]
            torch.testing.assert_close(buffer, v, rtol=1e-5, atol=1e-6)


class Convolutions(nn.Module):
    def __init__(self, classes: int, norm: NormFactory, checkpoints: bool) -> None:
        super().__init__()
        self.checkpoints = checkpoints
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3), norm(4), nn.ReLU(), nn.Conv2d(4, 4, 3), norm(4), nn.ReLU())
        self.head = nn.Linear(4, classes)

    def forward(self, images: Tensor) -> Tensor:
        features = checkpoint(self.body, images, use_reentrant=False) if self.checkpoints else self.body(images)
        logits: Tensor = self.head(features.mean((2, 3)))
        return logits


def convolutions(images: ImageFormat, width: float, norm: NormFactory, options: dict[str, Any]) -> nn.Module:
    return Convolutions(images.classes, norm, **options)


def test_norms_do_not_count_what_activation_checkpointing_computes_again(tmp_path: Path) -> None:
    states = []
    for checkpoints in (False, True):
        model = {"name": f"{__name__}:convolutions", "options": {"checkpoints": checkpoints}, "width": 1.0}
        trainer = build_trainer(
            small_config(model=model, noise={"method": "none"}), tmp_path / str(checkpoints), SingleProcess()
        )
        take(trainer)
        states.append(state_bits(trainer.network))
    assert states[0] == states[1]


def test_langevin_s_gradient_is_taken_at_the_weights_themselves_and_a_rate_of_zero_leaves_a_walk(
    tmp_path: Path,
) -> None:
    config = small_config(noise={"method": "langevin", "amplitude": 0.05})
    plain, _ = smoothout_gradients(small_config(noise={"method": "none", "amplitude": 0.0}), 0)
    trainer = build_trainer(config, tmp_path, SingleProcess())
    start = [parameter.detach().clone() for parameter in trainer.network.parameters()]
    take(trainer, 0, rate=0.0)
    assert_equal_gradients(gradients_of(trainer), plain)
    take(trainer, 1, rate=0.0)
    segments = trainer.training_step.weights.segments
    draws = (noise_of(config, 0, segments), noise_of(config, 1, segments))
    for parameter, value, first, second in zip(trainer.network.parameters(), start, *draws, strict=True):
        torch.testing.assert_close(parameter.detach(), value + 0.05 * first + 0.05 * second, rtol=0, atol=1e-6)


def test_the_noise_matters_to_the_reference() -> None:
    noisy, _ = smoothout_gradients(small_config(), 0)
    clean, _ = smoothout_gradients(small_config(noise={"method": "none", "amplitude": 0.0}), 0)
    assert (noisy["classifier.weight"] - clean["classifier.weight"]).abs().max() > 1e-4


def test_promise_4_with_a_rate_of_zero_the_weights_stay_bit_identically(tmp_path: Path) -> None:
    shared: list[dict[str, Any]] = [{"sharing": sharing} for sharing in ("global", "rank", "micro_batch")]
    for noise in (*shared, {"scale": "filter", "distribution": "normal"}, SAM):
        trainer = build_trainer(small_config(noise=noise), tmp_path, SingleProcess())
        before = trainer.training_step.weights.values.clone()
        for step in range(3):
            take(trainer, step, rate=0.0)
        assert torch.equal(trainer.training_step.weights.values, before)
        assert torch.equal(in_force(trainer.training_step.weights), before)


def test_loss_and_accuracy_are_means_over_the_global_batch(tmp_path: Path) -> None:
    config = small_config(noise={"method": "none"}, model={"norm": "none", "width": 0.0625})
    trainer = build_trainer(config, tmp_path, SingleProcess())
    inputs, labels = trainer.splits.train.read(BatchRequest(epoch_order(100, 0, 0)[:26], 0))
    with torch.no_grad():
        logits = trainer.network(inputs)
    update = take(trainer)
    assert update.total.loss == pytest.approx(functional.cross_entropy(logits, labels).item(), rel=1e-6)
    assert update.total.accuracy == pytest.approx((logits.argmax(1) == labels).float().mean().item())


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_the_global_gradient_is_clipped_not_each_rank_s(tmp_path: Path, ranks: int) -> None:
    def moved(comm: SimulatedRanks, clip: float | None) -> tuple[Tensor, Update]:
        trainer = build_trainer(small_config(optimizer={**PLAIN, "clip_norm": clip}), tmp_path, comm)
        before = trainer.training_step.weights.values.clone()
        update = take(trainer, rate=1.0)
        return trainer.training_step.weights.values - before, update

    def both(comm: SimulatedRanks) -> tuple[tuple[Tensor, Update], tuple[Tensor, Update]]:
        return moved(comm, None), moved(comm, 0.25)

    for (free, update), (clipped, clipped_update) in results(ranks, both):
        assert update.total.gradient_norm > 0.5
        assert clipped_update.total.gradient_norm == update.total.gradient_norm
        torch.testing.assert_close(clipped, free * (0.25 / update.total.gradient_norm), rtol=1e-4, atol=1e-6)


def test_a_gradient_within_the_limit_is_not_touched() -> None:
    gradient = torch.tensor([3.0, 4.0])
    clip_gradient(gradient, 5.0, 5.0)
    clip_gradient(gradient, 5.0, None)
    assert gradient.tolist() == [3.0, 4.0]
    clip_gradient(gradient, 5.0, 2.5)
    assert gradient.tolist() == [1.5, 2.0]


class Changed:
    """Samples of which the inputs of one are changed."""

    def __init__(self, samples: Any, sample: int, change: Callable[[Tensor], Tensor]) -> None:
        self._samples, self._sample, self._change = samples, sample, change
        self.prefetch = samples.prefetch

    def read(self, batch: BatchRequest) -> tuple[Tensor, Tensor]:
        inputs, labels = self._samples.read(batch)
        return torch.where((batch.indices == self._sample).view(-1, 1, 1, 1), self._change(inputs), inputs), labels


@pytest.mark.parametrize("reduction", ["exact", "float"])
@pytest.mark.parametrize(("ranks", "place"), [(1, 0), (2, 25), (3, 7)])
def test_a_sample_that_is_not_finite_on_one_rank_stops_all_and_leaves_the_weights(
    tmp_path: Path, reduction: str, ranks: int, place: int
) -> None:
    states: list[tuple[Tensor, Tensor, dict[str, bytes], dict[str, bytes]]] = []

    def diverge(comm: SimulatedRanks) -> None:
        trainer = build_trainer(small_config(comm={"reduction": reduction}), tmp_path, comm)
        sample = int(epoch_order(100, 0, 0)[place])
        bad: Any = Changed(trainer.splits.train, sample, lambda inputs: inputs * math.nan)
        trainer.training_step = replace(trainer.training_step, samples=bad)
        before, state = trainer.training_step.weights.values.clone(), state_bits(trainer.network)
        try:
            take(trainer)
        finally:
            states.append((before, trainer.training_step.weights.values, state, state_bits(trainer.network)))

    ended = on_ranks(ranks, diverge)
    assert all(isinstance(error, DivergedError) for error in ended), ended
    assert len(states) == ranks
    for before, after, state_before, state_after in states:
        assert torch.equal(before, after)
        assert state_before == state_after


def test_a_gradient_out_of_the_integers_range_is_a_divergence_said_so(tmp_path: Path) -> None:
    def step(comm: Communicator, reduction: str) -> Update:
        config = small_config(model={"norm": "none", "width": 0.0625}, comm={"reduction": reduction})
        trainer = build_trainer(config, tmp_path, comm)
        large: Any = Changed(trainer.splits.train, int(epoch_order(100, 0, 0)[3]), lambda inputs: inputs * 1e7)
        trainer.training_step = replace(trainer.training_step, samples=large)
        return take(trainer)

    assert step(SingleProcess(), "float").total.gradient_norm > 16384
    for error in on_ranks(2, lambda comm: step(comm, "exact")):
        assert isinstance(error, DivergedError)
        assert error.code == "step-not-finite"


def steepen(trainer: Trainer, factor: float) -> None:
    """Multiply all gradients from now on."""

    def multiply(module: nn.Module, inputs: object, outputs: Tensor) -> None:
        outputs.register_hook(lambda gradient: gradient * factor)

    trainer.training_step.model.register_forward_hook(multiply)


def test_a_gradient_whose_norm_alone_is_not_finite_is_a_divergence(tmp_path: Path) -> None:
    config = small_config(model={"norm": "none", "width": 0.0625}, comm={"reduction": "float"})
    trainer = build_trainer(config, tmp_path, SingleProcess())
    steepen(trainer, 1e24)
    with raises(DivergedError, "step-not-finite"):
        take(trainer)
    gradients = trainer.training_step.weights.gradients
    assert bool(gradients.isfinite().all())
    assert gradients.any()


@pytest.mark.parametrize("factor", [1e-7, 1.0, 1e7])
def test_float16_on_its_way_costs_a_gradient_of_any_size_a_thousandth_at_most(tmp_path: Path, factor: float) -> None:
    config = small_config(model={"norm": "none", "width": 0.0625}, comm={"reduction": "float", "verify_every": 0})

    def gradient(comm: Communicator, compression: str) -> tuple[Tensor, int, object]:
        trainer = build_trainer(with_setting(config, "comm.compression", compression), tmp_path, comm)
        steepen(trainer, factor)
        repeats = take(trainer, rate=0.0).repeats
        take(trainer, rate=0.0)
        return trainer.training_step.weights.gradients.clone(), repeats, trainer.progress.grid_exponents

    true, *_ = gradient(SingleProcess(), "none")
    for ranks in (1, 3):
        compressed = results(ranks, lambda comm: gradient(comm, "fp16"))
        for each, repeats, exponents in compressed:
            assert (each - true).norm() <= 1e-3 * true.norm()
            assert repeats == (factor > 1.0)
            assert exponents == compressed[0][2]


def test_promise_7_one_rank_s_request_to_stop_reaches_all(tmp_path: Path) -> None:
    def step(comm: SimulatedRanks, asked: int | None) -> bool:
        trainer = build_trainer(small_config(), tmp_path, comm)
        return take(trainer, stop=lambda: comm.rank == asked).total.stop > 0

    assert results(3, lambda comm: step(comm, 2)) == [True] * 3
    assert results(3, lambda comm: step(comm, None)) == [False] * 3


def test_each_rank_s_pace_reaches_all(tmp_path: Path) -> None:
    paces = results(3, lambda comm: take(build_trainer(small_config(), tmp_path, comm)).total.paces)
    assert paces == [(1, 2, 3)] * 3


@pytest.mark.parametrize(
    ("ranks", "noise"),
    [
        *((comm, {"sharing": "micro_batch"}) for comm in (1, 2, 3, 5, 8)),
        (3, {"scale": "filter"}),
        (3, {"scale": "weight", "distribution": "normal", "sharing": "micro_batch"}),
        (2, {"method": "langevin", "scale": "filter"}),
        (3, SAM),
    ],
)
def test_promise_3_an_update_has_the_same_bits_on_any_number_of_ranks(
    tmp_path: Path, ranks: int, noise: dict[str, Any]
) -> None:
    def step(comm: SimulatedRanks) -> tuple[dict[str, bytes], bytes, Update]:
        trainer = build_trainer(small_config(noise=noise), tmp_path, comm)
        update = take(trainer)
        return state_bits(trainer.network), gradient_bits(trainer), update

    [alone] = results(1, step)
    assert results(ranks, step) == [alone] * ranks


class Limited(nn.Module):
    """A network whose device has memory for so many samples at once."""

    def __init__(self, network: nn.Module, largest: int, backward: bool = False) -> None:
        super().__init__()
        self.network, self.largest, self.backward = network, largest, backward

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.network(inputs)
        if len(inputs) > self.largest:
            if not self.backward:
                raise torch.OutOfMemoryError("CUDA out of memory")
            outputs.register_hook(self.run_out)
        return outputs

    @staticmethod
    def run_out(gradient: Tensor) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize(
    ("short", "sharing", "backward", "dealing"),
    [
        ([0], "global", True, "even"),
        ([1], "micro_batch", True, "measured"),
        ([0, 1], "global", False, "measured"),
        ([1], "global", False, "even"),
        ([1], "global", True, "dynamic"),
    ],
)
def test_a_run_that_runs_out_of_memory_goes_on_with_smaller_micro_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, short: list[int], sharing: str, backward: bool, dealing: str
) -> None:
    monkeypatch.setattr("dist_train.training.reduction._BUCKET", 1)  # so that there are hooks

    def train(comm: SimulatedRanks, micro_size: int, folder: str) -> tuple[dict[str, bytes], int, str]:
        config = small_config(batch={"micro_size": micro_size, "dealing": dealing}, noise={"sharing": sharing})
        trainer = build_trainer(config, tmp_path / folder, comm)
        if micro_size > 3 and comm.rank in short:
            limited = Limited(trainer.network, 3, backward)
            trainer.training_step = replace(trainer.training_step, model=limited)
        trainer.may_shrink = True
        trainer.run()
        assert max(len(each._post_accumulate_grad_hooks or ()) for each in trainer.network.parameters()) == 1
        saved = (tmp_path / folder / "config.yaml").read_text()
        return state_bits(trainer.network), trainer.plan.micro_size, saved

    [expected] = results(1, lambda comm: train(comm, 3, "small"))
    for state, micro_size, saved in results(2, lambda comm: train(comm, 6, "shrunk")):
        assert micro_size == 3
        assert state == expected[0]
        assert saved == expected[2]


@pytest.mark.parametrize(("deterministic", "micro_size"), [(True, 3), (False, 6)])
def test_an_exact_run_does_not_go_on_with_another_algorithm_of_a_convolution(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deterministic: bool, micro_size: int
) -> None:
    """For want of a workspace, torch takes one that needs less, which only the allocator's count tells."""
    counted = {"num_ooms": 2, "num_alloc_retries": 0}
    monkeypatch.setattr(torch.cuda, "memory_stats_as_nested_dict", lambda: counted)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: deterministic)
    trainer = build_trainer(small_config(), tmp_path, SingleProcess())
    trainer.may_shrink = True

    def run_out(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        counted["num_alloc_retries"] += 1
        counted["num_ooms"] += len(inputs[0]) > 3

    trainer.network.register_forward_pre_hook(run_out)
    trainer.advance()
    assert trainer.plan.micro_size == micro_size
    assert trainer.progress.step == (not deterministic)


def test_a_size_that_was_asked_for_is_not_changed_and_the_weights_are_as_before(tmp_path: Path) -> None:
    trainer = build_trainer(small_config(), tmp_path, SingleProcess())
    trainer.training_step = replace(trainer.training_step, model=Limited(trainer.network, 3))
    before = trainer.training_step.weights.values.clone()
    with raises(UsageError, "out-of-memory"):
        trainer.run()
    assert torch.equal(trainer.training_step.weights.values, before)


def test_a_rank_of_an_elastic_launch_that_runs_out_of_memory_fails_alone(tmp_path: Path) -> None:
    def run_out(comm: SimulatedRanks) -> None:
        comm.is_elastic = True
        trainer = build_trainer(small_config(), tmp_path, comm)
        if comm.rank:
            trainer.training_step = replace(trainer.training_step, model=Limited(trainer.network, 3))
        take(trainer)

    other, short = on_ranks(2, run_out)
    assert isinstance(other, RankLostError)
    assert isinstance(short, UsageError)
    assert not isinstance(short, OutOfMemoryError), "which ends all ranks"
    assert short.code == "out-of-memory"


def test_an_error_of_another_kind_is_not_taken_for_a_lack_of_memory(tmp_path: Path) -> None:
    trainer = build_trainer(small_config(), tmp_path, SingleProcess())
    trainer.training_step = replace(trainer.training_step, model=nn.Unflatten(0, (5,)))
    trainer.may_shrink = True
    before = trainer.training_step.weights.values.clone()
    with pytest.raises((RuntimeError, IndexError)) as caught:
        trainer.run()
    assert not isinstance(caught.value, OutOfMemoryError)
    assert torch.equal(trainer.training_step.weights.values, before)
    assert torch.equal(in_force(trainer.training_step.weights), before), "an elastic run continues with it"


class Putting(nn.Module):
    """A network with an operator that has no deterministic kernel."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.network(inputs)
        return outputs + torch.zeros(1).put_(torch.tensor([0]), torch.ones(1))


@pytest.mark.parametrize("micro_size", [6, "auto"])
def test_an_operator_without_a_deterministic_kernel_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, micro_size: int | str
) -> None:
    monkeypatch.setattr("dist_train.launching.assembly.build_model", lambda config: Putting(build_model(config)))
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    try:
        with raises(UsageError, "kernel-not-deterministic") as caught:
            build_trainer(
                small_config(batch={"micro_size": micro_size}, precision={"deterministic": True}),
                tmp_path,
                SingleProcess(),
            ).run()
    finally:
        torch.use_deterministic_algorithms(mode=False)
        torch.backends.cudnn.deterministic = False
    assert "put_" in str(caught.value)


@pytest.mark.parametrize(
    ("compute", "amplitude", "schedule", "warned"),
    [
        ("bfloat16", 1e-4, {"kind": "constant"}, True),
        ("bfloat16", 0.5, {"kind": "constant"}, False),
        ("float32", 1e-4, {"kind": "constant"}, False),
        ("bfloat16", 1e-4, {"kind": "late", "start": 0.5}, True),  # none at first
        ("bfloat16", 0.5, {"kind": "tanh", "steepness": 20}, False),  # 1e-9 at first
    ],
)
def test_a_run_warns_of_noise_that_its_precision_rounds_away(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    compute: str,
    amplitude: float,
    schedule: dict[str, Any],
    warned: bool,
) -> None:
    config = small_config(noise={"amplitude": amplitude, "schedule": schedule}, precision={"compute": compute})
    build_trainer(config, tmp_path, SingleProcess())
    assert ("rounds the noise away" in caplog.text) == warned


@pytest.mark.parametrize("tf32", [True, False])
def test_a_run_warns_of_noise_that_tf32_rounds_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tf32: bool
) -> None:
    def as_on_a_gpu(settings: PrecisionSettings, device: torch.device) -> Compute:
        return replace(set_up_compute(settings, device), uses_tf32=settings.tf32)

    monkeypatch.setattr("dist_train.launching.assembly.set_up_compute", as_on_a_gpu)
    build_trainer(small_config(noise={"amplitude": 1e-4}, precision={"tf32": tf32}), tmp_path, SingleProcess())
    assert ("precision.tf32 rounds the noise away" in caplog.text) == tf32


@pytest.mark.parametrize(
    ("are_sorted", "evaluated", "warned"), [(True, 40, True), (False, 40, False), (True, 80, False), (True, 0, False)]
)
def test_a_run_warns_of_training_images_whose_first_ones_lack_classes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, are_sorted: bool, evaluated: int, warned: bool
) -> None:
    labels = np.repeat(np.arange(4), 20) if are_sorted else np.arange(80) % 4
    for split in ("train", "test"):
        np.savez(tmp_path / f"{split}.npz", images=np.zeros((80, 8, 8), np.uint8), labels=labels)
    data = {"name": "numpy", "root": tmp_path, "shape": [1, 8, 8], "classes": 4}
    config = small_config(data=data, evaluation={"train_samples": evaluated})
    build_trainer(config, tmp_path / "run", SingleProcess())
    assert ("evaluation.train_samples" in caplog.text) == warned
    assert not warned or "2 of the 4 classes" in caplog.text
