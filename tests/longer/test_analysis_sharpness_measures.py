"""Every measure of sharpness, compared with closed forms."""

from __future__ import annotations

import copy
import math
import time
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from dist_train.analysis.directions import random_direction
from dist_train.analysis.landscape_points import cross_entropy_sum
from dist_train.analysis.sharpness import (
    basin_widths,
    coordinates,
    expected_rises,
    full_space,
    largest_eigenvalues,
    random_directions,
    spectrum,
    subspace,
    trace_with_error,
)
from dist_train.analysis.sharpness_record import SharpnessSettings
from dist_train.analysis.subset_loss import SubsetLoss, Vector
from dist_train.config import NoiseSettings
from dist_train.data.catalog import make_synthetic
from dist_train.data.images import BatchRequest
from dist_train.data.loader import Samples
from dist_train.models import build_model
from dist_train.optim.noise_draws import NoiseDraws
from dist_train.outcome import UsageError
from tests.raising import raises
from tests.unit.small_trainers import small_config, state_bits

EPSILON = 1e-3


class Parabola(SubsetLoss):
    """c + 1/2 sum of h_i (x_i - m_i)^2."""

    def __init__(self, curvatures: Vector, minimum: Vector, point: Vector, least: float) -> None:
        self.curvatures, self.minimum, self._point, self.least = curvatures, minimum, point, least
        self.calls = 0

    def point(self) -> Vector:
        return self._point

    def value_and_gradient(self, point: Vector) -> tuple[float, Vector]:
        self.calls += 1
        away = point - self.minimum
        return self.least + 0.5 * float(self.curvatures @ away**2), self.curvatures * away

    def highest(self) -> float:
        """Return the maximum over Keskar's box: its corner that is farthest from the minimum."""
        away = np.abs(self._point - self.minimum) + EPSILON * (np.abs(self._point) + 1)
        return self.least + 0.5 * float(self.curvatures @ away**2)


def random_parabola(weights: int, *, at_minimum: bool, factor: float = 1.0) -> Parabola:
    random = np.random.default_rng(weights)
    point = random.normal(size=weights)
    minimum = point if at_minimum else point + 1e-3 * random.normal(size=weights)
    return Parabola(factor * 10 ** random.uniform(-2, 2, weights), minimum, point, 0.3 * factor)


def sharpness(highest: float, value: float) -> float:
    return 100 * (highest - value) / (1 + value)


class TestKeskar:
    @pytest.mark.parametrize("at_minimum", [True, False])
    @pytest.mark.parametrize("weights", [1, 2, 5, 50])
    def test_parabola_has_the_closed_form(self, weights: int, at_minimum: bool) -> None:
        loss = random_parabola(weights, at_minimum=at_minimum)
        expected = sharpness(loss.highest(), loss.value_and_gradient(loss.point())[0])
        assert full_space(loss, SharpnessSettings()) == pytest.approx(expected, rel=1e-6)

    @pytest.mark.parametrize("bad", [np.nan, np.inf])
    @pytest.mark.parametrize("calls", [2, 3])
    def test_loss_that_is_not_finite_has_infinite_sharpness(self, bad: float, calls: int) -> None:
        class Divergent(Parabola):
            def value_and_gradient(self, point: Vector) -> tuple[float, Vector]:
                value, gradient = super().value_and_gradient(point)
                return (bad if self.calls > calls else value), gradient

        known = random_parabola(5, at_minimum=False)
        for starts in (1, 2):
            loss = Divergent(known.curvatures, known.minimum, known.point(), known.least)
            assert full_space(loss, SharpnessSettings(keskar_starts=starts)) == np.inf

    @pytest.mark.parametrize("factor", [1e-9, 1e6])
    def test_scale_of_the_loss_does_not_end_the_ascent(self, factor: float) -> None:
        loss = random_parabola(20, at_minimum=False, factor=factor)
        expected = sharpness(loss.highest(), loss.value_and_gradient(loss.point())[0])
        assert full_space(loss, SharpnessSettings()) == pytest.approx(expected, rel=1e-6)

    def test_one_dimensional_subspace_has_the_closed_form(self) -> None:
        point = np.random.default_rng(0).normal(size=30)
        loss = Parabola(np.full(30, 7.0), np.zeros(30), point, 0.1)
        [direction] = random_directions(30, 1, seed=3).double().numpy()
        assert np.linalg.norm(direction) == pytest.approx(1)
        along = float(direction @ point)
        radius = EPSILON * (abs(along) + 1)
        value = 0.1 + 3.5 * float(point @ point)
        found = subspace(loss, SharpnessSettings(seed=3, keskar_dimensions=1))
        assert found == pytest.approx(sharpness(value + 3.5 * (2 * radius * abs(along) + radius**2), value), rel=1e-5)

    def test_coordinates_in_a_subspace_use_the_pseudo_inverse(self) -> None:
        directions = random_directions(40, 6, seed=0)
        point = np.random.default_rng(1).normal(size=40)
        expected = np.linalg.pinv(directions.double().numpy().T) @ point
        np.testing.assert_allclose(coordinates(directions, point), expected, rtol=1e-4)

    def test_subspace_is_less_sharp_than_a_box_that_contains_it(self) -> None:
        loss = random_parabola(60, at_minimum=False)
        assert (
            0
            < subspace(loss, SharpnessSettings(keskar_dimensions=5))
            < full_space(loss, SharpnessSettings(keskar_epsilon=3e-3))
        )

    def test_minimum_needs_a_second_start(self) -> None:
        loss = random_parabola(5, at_minimum=True)
        assert full_space(loss, SharpnessSettings(keskar_starts=1)) == 0
        assert full_space(loss, SharpnessSettings(keskar_starts=2)) > 0

    def test_iterations_limit_the_calls(self) -> None:
        few, many = random_parabola(50, at_minimum=False), random_parabola(50, at_minimum=False)
        full_space(few, SharpnessSettings(keskar_iterations=1))
        full_space(many, SharpnessSettings(keskar_iterations=10))
        assert few.calls <= many.calls <= 100

    def test_subspace_and_starts_depend_on_the_seed(self) -> None:
        loss = random_parabola(60, at_minimum=False)
        found = [subspace(loss, SharpnessSettings(seed=seed, keskar_dimensions=5)) for seed in (0, 0, 1)]
        assert found[0] == found[1] != found[2]


INPUTS = torch.linspace(-1, 1, 70 * 6).reshape(70, 6).sin() * torch.arange(1, 7)
LABELS = torch.arange(70) % 4


def half_square(outputs: Tensor, labels: Tensor) -> Tensor:
    """Return half the squared outputs, summed: quadratic in the weights of a linear model."""
    return outputs.double().square().sum() / 2


def linear_model() -> nn.Linear:
    model = nn.Linear(6, 4)
    with torch.no_grad():
        model.weight.copy_(torch.arange(24).reshape(4, 6).cos())
        model.bias.copy_(torch.arange(4).sin())
    return model


def subset_loss(model: nn.Module, *, quadratic: bool = False, threads: int = 1) -> SubsetLoss:
    batches = [(INPUTS[:40], LABELS[:40]), (INPUTS[40:], LABELS[40:])]
    return SubsetLoss(model, batches, half_square if quadratic else cross_entropy_sum, threads)


def with_ones() -> Vector:
    ones: Vector = torch.cat([INPUTS, torch.ones(70, 1)], 1).double().numpy()
    return ones


def quadratic_hessian() -> Vector:
    """Return the Hessian in the weights [4, 6] and biases [4] of the linear model: the same block for every output."""
    moments = with_ones().T @ with_ones() / 70
    return reordered(np.kron(np.eye(4), moments))


def softmax_hessian(model: nn.Linear) -> Vector:
    """Return the mean over samples of (diag(p) - p p') x x'."""
    with torch.no_grad():
        probabilities = model(INPUTS).double().softmax(1).numpy()
    blocks = [
        np.kron(np.diag(p) - np.outer(p, p), np.outer(x, x)) for p, x in zip(probabilities, with_ones(), strict=True)
    ]
    return reordered(np.mean(blocks, axis=0))


def reordered(hessian: NDArray[Any]) -> Vector:
    """Reorder `hessian` from one block per output, bias last, to the model's order: all weights, then all biases."""
    order = [7 * output + entry for output in range(4) for entry in range(6)] + [7 * output + 6 for output in range(4)]
    ordered: Vector = hessian[np.ix_(order, order)].astype(np.float64)
    return ordered


class TestExpectedRise:
    def test_quadratic_rises_by_its_trace_within_the_standard_error(self) -> None:
        trace = float(np.trace(quadratic_hessian()))
        loss = subset_loss(linear_model(), quadratic=True)
        settings = SharpnessSettings(amplitudes=(0.01, 0.1), draws=250)
        for amplitude, mean, error in zip(settings.amplitudes, *expected_rises(loss, settings), strict=True):
            expected = amplitude**2 * trace / 6
            assert abs(mean - expected) < 3 * error
            assert 0 < error < 0.05 * expected

    def test_standard_error_is_that_of_the_mean(self) -> None:
        loss = subset_loss(linear_model(), quadratic=True)
        means, errors = [], []
        for seed in range(40):
            [mean], [error] = expected_rises(loss, SharpnessSettings(amplitudes=(0.1,), seed=seed))
            means.append(mean)
            errors.append(error)
        assert np.std(means) == pytest.approx(np.mean(errors), rel=0.3)

    def test_standard_error_of_two_draws_is_half_their_difference(self) -> None:
        loss = subset_loss(linear_model(), quadratic=True)
        settings = SharpnessSettings(amplitudes=(0.1,), draws=2)
        noise = NoiseDraws(NoiseSettings(exclude=settings.exclude), loss.weights, settings.seed)
        rises = []
        for draw in range(2):
            values = noise.draw(loss.clean, 1.0, draw, "expected rise").double().numpy()
            direction = values[loss.weights.mask(()).bool().numpy()]
            rises.append(0.01 * float(direction @ quadratic_hessian() @ direction) / 2)
        [mean], [error] = expected_rises(loss, settings)
        assert mean == pytest.approx(np.mean(rises), rel=1e-3)
        assert error == pytest.approx(abs(rises[0] - rises[1]) / 2, rel=1e-2)

    def test_excluded_weights_do_not_count(self) -> None:
        loss = subset_loss(linear_model(), quadratic=True)
        settings = SharpnessSettings(exclude=("bias",), amplitudes=(0.1,), draws=250)
        [mean], [error] = expected_rises(loss, settings)
        trace = float(np.trace(quadratic_hessian()[:24, :24]))
        assert abs(mean - 0.01 * trace / 6) < 3 * error

    def test_rise_follows_the_scale_of_the_noise(self) -> None:
        model = linear_model()
        squares = torch.cat([model.weight.detach().reshape(-1), model.bias.detach()]).double().numpy() ** 2
        expected = 0.01 * float(np.diag(quadratic_hessian()) @ squares) / 6
        settings = SharpnessSettings(scale="weight", amplitudes=(0.1,), draws=250)
        [mean], [error] = expected_rises(subset_loss(model, quadratic=True), settings)
        assert abs(mean - expected) < 3 * error


class Diagonal(SubsetLoss):
    """A loss whose Hessian has these `curvatures` on its diagonal, and zeros elsewhere."""

    def __init__(self, curvatures: Vector) -> None:
        self.curvatures, self.count = curvatures, len(curvatures)

    def hessian_product(self, direction: Vector) -> Vector:
        product: Vector = self.curvatures * direction
        return product


class TestHessian:
    def test_of_eigenvalues_that_did_not_all_converge_none_counts_as_the_largest(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        loss = Diagonal(np.concatenate([[10.0, 8.0], np.linspace(0, 1, 5000) ** 0.5]))
        settings = SharpnessSettings(hessian_eigenvalues=2, hessian_tolerance=1e-10, hessian_probes=2)
        assert spectrum(loss, settings).eigenvalues == pytest.approx((10.0, 8.0))
        assert not caplog.records
        found = spectrum(loss, settings.model_copy(update={"hessian_eigenvalues": 5}))
        assert found.eigenvalues == ()
        assert found.trace == pytest.approx(loss.curvatures.sum(), rel=0.01)
        assert len(caplog.records) == 1

    def test_eigenvalues_and_trace_of_a_linear_model_are_accurate_to_a_percent(self) -> None:
        model = linear_model()
        hessian = softmax_hessian(model)
        expected = np.sort(np.linalg.eigvalsh(hessian))[::-1]
        settings = SharpnessSettings(hessian_eigenvalues=4, hessian_probes=40)
        values, vectors = largest_eigenvalues(subset_loss(model), settings)
        np.testing.assert_allclose(values, expected[:4], rtol=0.01)
        trace, error = trace_with_error(subset_loss(model), values, vectors, settings)
        assert trace == pytest.approx(np.trace(hessian), rel=0.01)
        assert abs(trace - np.trace(hessian)) < 4 * error

    def test_product_is_the_hessian_times_the_vector(self) -> None:
        model = linear_model()
        direction = np.random.default_rng(0).normal(size=28)
        expected = softmax_hessian(model) @ direction
        np.testing.assert_allclose(subset_loss(model).hessian_product(direction), expected, rtol=1e-4, atol=1e-5)

    def test_too_many_requested_eigenvalues_give_all_but_one(self) -> None:
        values, vectors = largest_eigenvalues(
            subset_loss(linear_model(), quadratic=True), SharpnessSettings(hessian_eigenvalues=99)
        )
        assert values.shape == (27,)
        np.testing.assert_allclose(vectors.T @ vectors, np.eye(27), atol=1e-8)

    @pytest.mark.parametrize(("bias", "value"), [(1000.0, 0.0), (math.nan, math.nan)])
    def test_hessian_that_is_zero_or_not_finite_has_such_eigenvalues_and_trace(self, bias: float, value: float) -> None:
        model = linear_model()
        with torch.no_grad():
            model.bias[0] += bias
        settings = SharpnessSettings(hessian_eigenvalues=2)
        found = largest_eigenvalues(subset_loss(model), settings)
        np.testing.assert_array_equal(found[0], [value] * 2)
        np.testing.assert_array_equal(trace_with_error(subset_loss(model), *found, settings), [value] * 2)

    def test_standard_error_of_the_trace_is_that_of_the_mean_over_probes(self) -> None:
        loss, vectors = subset_loss(linear_model(), quadratic=True), np.zeros((28, 0))
        found = [trace_with_error(loss, np.zeros(0), vectors, SharpnessSettings(seed=seed)) for seed in range(40)]
        traces, errors = zip(*found, strict=True)
        assert np.std(traces) == pytest.approx(np.mean(errors), rel=0.3)

    def test_deflation_reduces_the_error_of_the_trace(self) -> None:
        loss = subset_loss(linear_model(), quadratic=True)
        errors = []
        for number in (1, 8):
            settings = SharpnessSettings(hessian_eigenvalues=number, hessian_probes=30)
            errors.append(trace_with_error(loss, *largest_eigenvalues(loss, settings), settings)[1])
        assert errors[1] < 0.5 * errors[0]


class TestWidths:
    @pytest.mark.parametrize("size", [1.0, 0.01])
    def test_widths_of_a_quadratic_follow_from_slope_and_hessian(self, size: float) -> None:
        model = linear_model()
        with torch.no_grad():
            model.weight.mul_(size)
            model.bias.mul_(size)
        loss, settings = subset_loss(model, quadratic=True), SharpnessSettings(exclude=("bias",), width_reach=1000.0)
        hessian, (_, slope) = quadratic_hessian(), loss.value_and_gradient(loss.point())
        directions = [
            random_direction(loss.weights, "filter", ("bias",), 0, index).numpy()[loss.weights.mask(()).bool().numpy()]
            for index in range(settings.width_directions)
        ]
        for found in basin_widths(loss, settings):
            widths = [
                2 * math.sqrt((d @ slope) ** 2 + 2 * (d @ hessian @ d) * found.rise) / (d @ hessian @ d)
                for d in directions
            ]
            assert found.mean == pytest.approx(np.mean(widths), rel=5e-3)
            assert found.standard_error == pytest.approx(np.std(widths, ddof=1) / math.sqrt(5), rel=0.05)
            assert (found.directions, found.censored) == (5, 0)

    def test_widths_beyond_the_reach_are_counted_as_censored(self) -> None:
        settings = SharpnessSettings(width_rises=(0.01, 1e9), width_reach=9.0)
        near, far = basin_widths(subset_loss(linear_model(), quadratic=True), settings)
        assert (near.censored, far.censored) == (0, 5)
        assert (far.mean, far.standard_error) == (18.0, 0.0)

    def test_direction_is_censored_if_either_side_is_beyond_the_reach(self) -> None:
        loss, rise = subset_loss(linear_model(), quadratic=True), 0.5
        hessian, (_, slope) = quadratic_hessian(), loss.value_and_gradient(loss.point())
        sides = []
        for index in range(5):
            values = random_direction(loss.weights, "filter", ("bias",), 0, index).numpy()
            d = values[loss.weights.mask(()).bool().numpy()]
            root = math.sqrt((d @ slope) ** 2 + 2 * (d @ hessian @ d) * rise)
            sides.append([(root - sign * (d @ slope)) / (d @ hessian @ d) for sign in (1, -1)])
        for pair in sides:
            settings = SharpnessSettings(exclude=("bias",), width_rises=(rise,), width_reach=float(np.mean(pair)))
            [found] = basin_widths(loss, settings)
            assert found.censored == sum(max(each) > settings.width_reach for each in sides)


def test_mean_of_batch_gradients_is_the_gradient() -> None:
    loss = subset_loss(linear_model())
    gradients, sizes = loss.batch_gradients()
    assert sizes == [40, 30]
    _, whole = loss.value_and_gradient(loss.point())
    np.testing.assert_allclose(np.average(gradients, axis=0, weights=sizes), whole, rtol=1e-5, atol=1e-7)


IMAGES = make_synthetic((1, 8, 8), 10, 30, "train", seed=0)


class TestLoss:
    def network(self) -> nn.Module:
        return build_model(small_config()).eval()

    def batches(self) -> list[tuple[Tensor, Tensor]]:
        samples = Samples(IMAGES, torch.device("cpu"))
        return [
            samples.read(BatchRequest(torch.arange(0, 12))),
            samples.read(BatchRequest(torch.arange(12, 24))),
            samples.read(BatchRequest(torch.arange(24, 30))),
        ]

    @pytest.mark.parametrize("training", [False, True])
    def test_derivatives_of_a_network_agree_with_float64(self, training: bool) -> None:
        model = self.network().train(training)
        loss = SubsetLoss(model, self.batches())
        reference = build_model(small_config()).double().train(training)
        parameters = tuple(reference.parameters())
        total = sum(
            (
                functional.cross_entropy(reference(inputs.double()), labels, reduction="sum")
                for inputs, labels in self.batches()
            ),
            start=torch.zeros((), dtype=torch.float64),
        ) / len(IMAGES)
        gradients = torch.autograd.grad(total, parameters, create_graph=True)
        expected = torch.cat([gradient.reshape(-1) for gradient in gradients])
        value, gradient = loss.value_and_gradient(loss.point())
        assert value == pytest.approx(float(total.detach()), rel=1e-6)
        np.testing.assert_allclose(gradient, expected.detach().numpy(), rtol=1e-3, atol=1e-5)
        products = torch.autograd.grad(expected @ expected.detach(), parameters)
        expected_product = torch.cat([product.reshape(-1) for product in products]).numpy()
        product = loss.hessian_product(expected.detach().numpy())
        assert np.linalg.norm(product - expected_product) < 1e-3 * np.linalg.norm(expected_product)

    @pytest.mark.parametrize("training", [False, True])
    def test_model_is_left_bit_identical(self, training: bool) -> None:
        model = self.network().train(training)
        before = state_bits(model)
        loss = SubsetLoss(model, self.batches())
        away = loss.point() + 1.0
        assert loss.value_and_gradient(away)[0] != loss.value_and_gradient(loss.point())[0]
        loss.value_at_flat(loss.clean + 1.0)
        loss.hessian_product(away)
        loss.accuracy()
        assert state_bits(model) == before
        assert model.training is training

    def test_weights_are_restored_after_an_error(self) -> None:
        def raise_error(outputs: Tensor, labels: Tensor) -> Tensor:
            raise RuntimeError("on purpose")

        model = linear_model()
        before = state_bits(model)
        loss = SubsetLoss(model, [(INPUTS, LABELS)], raise_error)
        with pytest.raises(RuntimeError, match="on purpose"):
            loss.value_at_flat(loss.clean + 1.0)
        assert state_bits(model) == before

    def test_loss_is_bit_identical_with_any_number_of_threads(self) -> None:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            found = []
            for number in (1, 2, 3, 8):
                loss = SubsetLoss(self.network(), self.batches(), threads=number)
                value, gradient = loss.value_and_gradient(loss.point() * 1.01)
                found.append((value, gradient.tobytes(), loss.hessian_product(loss.point()).tobytes()))
        finally:
            torch.set_num_threads(threads)
        assert found == [found[0]] * 4

    def test_threads_do_not_share_what_a_model_stores(self) -> None:
        model = Storing()
        batches = [(torch.full((4, 3), float(index)), torch.zeros(4, dtype=torch.int64)) for index in range(16)]
        one, several = (SubsetLoss(copy.deepcopy(model), batches, threads=number) for number in (1, 4))
        assert several.value_at_flat(several.clean) == one.value_at_flat(one.clean)

    def test_confident_prediction_has_a_positive_loss(self) -> None:
        outputs, labels = torch.tensor([[30.0, 0.0]]), torch.tensor([0])
        assert float(cross_entropy_sum(outputs, labels)) == pytest.approx(np.exp(-30.0), rel=1e-2, abs=0)


class Storing(nn.Module):
    """A network that stores its input, and reads it again later."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        self.stored = inputs
        time.sleep(0.01)
        logits: Tensor = self.layer(self.stored)
        return logits


class Refusing(nn.Module):
    """A network whose second derivatives are refused with `error`."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.layer, self.error = nn.Linear(3, 2), error

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.layer(inputs)
        outputs.register_hook(self.refuse)
        return outputs

    def refuse(self, gradient: Tensor) -> None:
        if gradient.requires_grad:
            raise self.error


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("error", "code"),
    [
        (RuntimeError("put_ does not have a deterministic implementation, but"), "kernel-not-deterministic"),
        (torch.OutOfMemoryError("CUDA out of memory"), "out-of-memory"),
        (NotImplementedError("derivative for aten::foo_backward is not implemented"), "derivative-missing"),
    ],
)
def test_what_a_device_cannot_do_is_told(error: Exception, code: str, threads: int) -> None:
    batch = torch.ones(4, 3), torch.zeros(4, dtype=torch.int64)
    loss = SubsetLoss(Refusing(error), [batch], threads=threads)
    loss.value_and_gradient(loss.point())
    with raises(UsageError, code):
        loss.hessian_product(loss.point())


@pytest.mark.parametrize("threads", [1, 2])
def test_attention_has_second_derivatives(threads: int) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 16, 0.0, activation="gelu", batch_first=True)
    model = nn.Sequential(nn.Flatten(2), layer, nn.Flatten(), nn.Linear(64, 3))
    loss = SubsetLoss(model, [(torch.randn(5, 4, 4, 4), torch.arange(5) % 3)] * 2, threads=threads)
    start, step = loss.point(), 1e-3 * np.random.default_rng(0).normal(size=loss.count)
    change = loss.value_and_gradient(start + step)[1] - loss.value_and_gradient(start - step)[1]
    np.testing.assert_allclose(loss.hessian_product(2 * step), change, atol=2e-2 * np.abs(change).max())
