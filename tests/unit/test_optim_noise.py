"""Promise 4: noise is the same on every rank, and leaves no trace."""

from __future__ import annotations

import math
import re
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dist_train.config import NoiseSettings, parse_config
from dist_train.models import build_model
from dist_train.models.norms import GroupedBatchNorm
from dist_train.optim.flat_weights import FlatWeights
from dist_train.optim.noise import Noise, SmoothOut, _normalized, build_noise
from dist_train.outcome import UsageError
from dist_train.training.compute import Compute
from tests.raising import raises
from tests.unit.weights_in_force import in_force, perturbed

PROPERTY = settings(deadline=None, max_examples=25)
AMPLITUDE = 0.03


def weights_of(layers: int = 1) -> FlatWeights:
    torch.manual_seed(0)
    blocks = [module for _ in range(layers) for module in (nn.Linear(20, 20), GroupedBatchNorm(20))]
    return FlatWeights(nn.Sequential(*blocks))


def a_noise(weights: FlatWeights, *, seed: int = 0, rank: int = 0, **changes: Any) -> Noise:
    fields = {"method": "smoothout", "amplitude": AMPLITUDE, "exclude": (), **changes}
    return build_noise(NoiseSettings(**fields), weights, seed=seed, total_steps=100, rank=rank)


def nothing() -> None:
    """Take no gradient."""


def drawn(noise: Noise, weights: FlatWeights, step: int, micro_batch: int = 0) -> torch.Tensor:
    with perturbed(noise, step):
        noise.perturb_for(micro_batch, nothing)
        return in_force(weights) - weights.values


@pytest.mark.parametrize("sharing", ["global", "rank", "micro_batch"])
@pytest.mark.parametrize("fails", [False, True])
def test_promise_4_the_weights_are_restored_bit_identically_also_when_an_error_passes(
    sharing: str, fails: bool
) -> None:
    weights = weights_of()
    noise = a_noise(weights, sharing=sharing, amplitude=1e6)
    clean = weights.values.clone()
    for step in range(5):
        try:
            with perturbed(noise, step):
                for micro_batch in (0, 3):
                    noise.perturb_for(micro_batch, nothing)
                    assert not torch.equal(in_force(weights), clean)
                if fails:
                    raise RuntimeError("in the middle of a step")
        except RuntimeError:
            assert fails
        assert torch.equal(in_force(weights).view(torch.int32), clean.view(torch.int32))


def test_weights_that_are_not_finite_come_back_too() -> None:
    weights = weights_of()
    weights.values[:3] = torch.tensor([math.inf, math.nan, -0.0])
    clean = weights.values.clone()
    with perturbed(a_noise(weights), 0):
        pass
    assert torch.equal(weights.values.view(torch.int32), clean.view(torch.int32))


def test_noise_comes_back_as_it_was_after_the_clean_weights() -> None:
    weights = weights_of()
    noise = a_noise(weights)
    with perturbed(noise, 0):
        noisy = in_force(weights).clone()
        with noise.at_clean_weights():
            assert torch.equal(in_force(weights), weights.values)
        assert torch.equal(in_force(weights), noisy)


@PROPERTY
@given(st.floats(1e-3, 1e3), st.floats(1e-3, 1.0))
def test_the_amplitude_reaches_that_of_the_target_rise(curvature: float, target: float) -> None:
    noise = a_noise(weights_of(), target_rise=target)
    for step in range(150):
        used = noise.amplitude(step)
        noise.adapt(step, curvature * used**2)
        assert noise.amplitude(step) == used, "that of the last update does not change"
        assert 1 / 1.11 < noise.amplitude(step + 1) / used < 1.11
    assert curvature * noise.amplitude(150) ** 2 == pytest.approx(target, rel=0.01)


def test_the_amplitude_goes_half_of_the_way_at_once() -> None:
    noise = a_noise(weights_of(), target_rise=0.1)
    noise.adapt(0, 0.1 / 1.21)
    assert noise.amplitude(1) == pytest.approx(math.sqrt(1.1) * AMPLITUDE)


@pytest.mark.parametrize("rise", [0.0, -0.5])
def test_noise_that_raises_no_loss_grows(rise: float) -> None:
    noise = a_noise(weights_of(), target_rise=0.1)
    noise.adapt(0, rise)
    assert noise.amplitude(1) == pytest.approx(1.1 * AMPLITUDE)


@PROPERTY
@given(st.sampled_from(["global", "micro_batch"]), st.integers(0, 2**40), st.integers(0, 2**20), st.integers(0, 64))
def test_promise_4_two_ranks_draw_the_same(sharing: str, seed: int, step: int, micro_batch: int) -> None:
    one, other = weights_of(), weights_of()
    first, second = a_noise(one, seed=seed, sharing=sharing), a_noise(other, seed=seed, sharing=sharing)
    # what the other did before does not matter
    drawn(second, other, step + 1, 5)
    torch.manual_seed(step)
    assert torch.equal(drawn(first, one, step, micro_batch), drawn(second, other, step, micro_batch))
    assert first.digest(step) == second.digest(step)


def test_promise_4_digests_of_different_noise_differ() -> None:
    weights = weights_of()
    for sharing in ("global", "micro_batch"):
        digests = set()
        for seed in range(3):
            noise = a_noise(weights, seed=seed, sharing=sharing)
            for step in range(3):
                drawn(noise, weights, step, 4)
                digests.add(noise.digest(step))
        assert len(digests) == 9


def test_a_digest_of_the_micro_batches_noise_does_not_depend_on_which_of_them_was_ours() -> None:
    weights = weights_of()
    noise = a_noise(weights, sharing="micro_batch")
    digests = []
    for micro_batch in (0, 7):
        drawn(noise, weights, 3, micro_batch)
        digests.append(noise.digest(3))
    assert digests[0] == digests[1]


def test_global_noise_is_one_draw_a_step() -> None:
    weights = weights_of()
    noise = a_noise(weights)
    assert torch.equal(drawn(noise, weights, 4, 0), drawn(noise, weights, 4, 9))
    assert not torch.equal(drawn(noise, weights, 4), drawn(noise, weights, 5))


def test_noise_of_ranks_is_one_draw_each_whatever_the_micro_batch() -> None:
    weights = weights_of()
    noises = [a_noise(weights, rank=rank, sharing="rank") for rank in range(3)]
    own = [drawn(noise, weights, 4, 0) for noise in noises]
    assert all(torch.equal(drawn(noise, weights, 4, 9), draw) for noise, draw in zip(noises, own, strict=True))
    assert not torch.equal(own[0], own[1])
    assert not torch.equal(own[1], own[2])
    assert not torch.equal(own[0], drawn(noises[0], weights, 5))


def test_ranks_whose_noise_differs_on_purpose_agree_by_their_digests() -> None:
    digests = set()
    for rank in range(3):
        weights = weights_of()
        noise = a_noise(weights, rank=rank, sharing="rank")
        drawn(noise, weights, 4)
        digests.add(noise.digest(4))
    assert len(digests) == 1


def test_the_noise_of_fsgld_that_stays_is_independent_of_that_at_which_its_gradient_is_taken() -> None:
    weights = weights_of()
    noise = a_noise(weights, method="fsgld")
    taken, before = drawn(noise, weights, 4), weights.values.clone()
    noise.before_update(4, 0.1)
    noise.after_update(4)
    assert torch.corrcoef(torch.stack([taken, weights.values - before]))[0, 1].abs() < 0.5


def test_noise_of_micro_batches_is_one_draw_each_in_any_order() -> None:
    weights = weights_of()
    noise = a_noise(weights, sharing="micro_batch")
    apart = [drawn(noise, weights, 4, micro_batch) for micro_batch in range(4)]
    with perturbed(noise, 4):
        for micro_batch in (2, 0, 3, 1):
            noise.perturb_for(micro_batch, nothing)
            assert torch.equal(in_force(weights) - weights.values, apart[micro_batch])
    assert all(not torch.equal(apart[0], other) for other in apart[1:])
    assert not torch.equal(apart[1], drawn(noise, weights, 5, 1))


@pytest.mark.parametrize(
    ("exclude", "kept"),
    [
        (["norm"], ["1.weight", "1.bias"]),
        (["bias"], ["0.bias"]),
        (["0.*"], ["0.weight", "0.bias"]),
        ([], []),
    ],
)
@pytest.mark.parametrize("sharing", ["global", "rank", "micro_batch"])
def test_excluded_weights_are_not_moved_and_all_others_are(exclude: list[str], kept: list[str], sharing: str) -> None:
    weights = weights_of()
    sample = drawn(a_noise(weights, exclude=exclude, sharing=sharing), weights, 0)
    still = [s.name for s in weights.segments if not sample[s.start : s.stop].any()]
    moved = [s.name for s in weights.segments if (sample[s.start : s.stop] != 0).float().mean() > 0.9]
    assert still == kept
    assert sorted(still + moved) == sorted(segment.name for segment in weights.segments)


def test_micro_batches_that_take_turns_at_the_points_of_a_pair_share_its_draw() -> None:
    weights = weights_of()
    noise = a_noise(weights, sharing="micro_batch", antithetic=True, passes="one")
    moves = []
    with perturbed(noise, 0):
        for micro_batch in range(4):
            [point] = noise.points(micro_batch)
            noise.perturb_for(micro_batch, nothing, point)
            moves.append(in_force(weights) - weights.values)
    for first, second in (moves[:2], moves[2:]):
        torch.testing.assert_close(second, -first, rtol=0, atol=1e-6)
    assert not torch.allclose(moves[2], moves[0], rtol=0, atol=1e-3)


@pytest.mark.parametrize("method", ["sam", "asam"])
def test_an_ascent_moves_all_weights_but_the_excluded_and_the_padding(method: str) -> None:
    weights = weights_of()
    noise = a_noise(weights, method=method, sharing="micro_batch", exclude=("bias",))

    def ascend() -> None:
        weights.gradients.fill_(1.0)

    with perturbed(noise, 0):
        noise.perturb_for(0, ascend)
        moved = in_force(weights) != weights.values
    assert torch.equal(moved, weights.mask(("bias",)) > 0)


def test_an_exclude_that_leaves_nothing_is_refused_where_it_has_an_effect() -> None:
    for method in ("smoothout", "sam", "langevin"):
        with raises(UsageError, "nothing-to-move"):
            a_noise(weights_of(), method=method, exclude=("*",))
    a_noise(weights_of(), method="none", exclude=("*",))


PARTS = {
    "missing": "    list(drawn)\n    yield slice(0, len(noise) // 2)\n",
    "gap": "    parts = list(drawn)\n    yield slice(1, len(noise))\n",
    "nothing": "    yield from [part for part in drawn][:0]\n",
    "none": "    yield None\n",
    "in-place": "    for part in drawn:\n        noise[part].mul_(weights[part].abs_())\n        yield part\n",
    "in-place-last": "    yield from drawn\n    weights.mul_(0.5)\n",
    "whole": "    list(drawn)\n    noise.mul_(unit)\n    yield slice(0, len(noise))\n",
}


@pytest.mark.parametrize("kind", PARTS)
def test_a_scale_of_a_plug_in_yields_all_parts_in_order_and_leaves_the_weights_alone(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "mine.py"
    file.write_text(f"def scale(noise, weights, filters, drawn, amplitude, unit):\n{PARTS[kind]}")
    weights = weights_of()
    noise = a_noise(weights, scale=f"{file}:scale")
    with nullcontext() if kind == "whole" else raises(UsageError, "plugin-result"):
        assert drawn(noise, weights, 0).any()


METHODS = {
    "no-super": "def __init__(self, settings, weights, **keywords):\n        self.weights = weights",
    "no-tensor": "def __post_init__(self):\n        self.kept['mean'] = 0.5",
    "no-point": "def points(self, micro_batch):\n        return ()",
    "no-amplitude": "def amplitude(self, step):\n        pass",
}


@pytest.mark.parametrize("kind", METHODS)
def test_a_method_of_a_plug_in_that_training_could_not_use_is_refused(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "mine.py"
    file.write_text(f"from dist_train.optim.noise import Noise\n\nclass Mine(Noise):\n    {METHODS[kind]}\n")
    with raises(UsageError, "plugin-failed" if kind == "no-amplitude" else "plugin-result"):
        a_noise(weights_of(), method=f"{file}:Mine")


@pytest.mark.parametrize("size", [0.0, 1e-37, 1e-30, 1e-25, 1e-20, 1.0, 1e15])
def test_the_ascent_of_sam_is_never_longer_than_1(size: float) -> None:
    length = _normalized(torch.full((100_000,), size)).double().norm()
    assert length <= 1.001
    assert length > 0.999 or size < 1e-14


def test_without_a_method_there_is_no_noise() -> None:
    weights = weights_of()
    noise = build_noise(NoiseSettings(), weights, seed=0, total_steps=10, rank=0)
    assert not drawn(noise, weights, 0).any()
    assert (noise.amplitude(3), noise.digest(3)) == (0.0, 0)


def test_promise_2_no_global_generator_is_read_or_moved() -> None:
    weights = weights_of()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    sample = drawn(a_noise(weights), weights, 0)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert torch.equal(drawn(a_noise(weights), weights, 0), sample)


class _Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kernels: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not str(func).startswith(_VIEWS):
            self.kernels.append(str(func))
        return func(*args, **(kwargs or {}))


_VIEWS = ("aten.slice.", "aten.lift_fresh.")
"""These only name a part of what is there."""


@pytest.mark.parametrize(("scale", "most"), [("absolute", 5), ("weight", 7), ("filter", 29)])
@pytest.mark.parametrize("sharing", ["global", "micro_batch"])
def test_a_draw_a_perturbation_and_a_restoration_are_a_handful_of_kernels_for_any_number_of_tensors(
    sharing: str, scale: str, most: int
) -> None:
    counts = []
    for layers in (1, 25):
        noise = a_noise(weights_of(layers), sharing=sharing, scale=scale)
        with _Counting() as counting, perturbed(noise, 0):
            noise.perturb_for(0, nothing)
        counts.append(counting.kernels)
    assert counts[0] == counts[1]
    assert len(counts[0]) <= most, counts[0]


@pytest.mark.parametrize(
    ("amplitude", "in_bfloat16", "in_tf32"), [(1e-2, 0.01, 0.002), (1e-3, 0.13, 0.016), (1e-4, 0.65, 0.17)]
)
def test_the_shares_of_weights_whose_noise_is_rounded_away_are_those_of_the_method_s_page(
    amplitude: float, in_bfloat16: float, in_tf32: float
) -> None:
    data = {"name": "synthetic", "synthetic_shape": [1, 28, 28]}
    model = build_model(parse_config({"data": data, "model": {"name": "vgg9", "width": 0.25}}, source="test"))
    noise = a_noise(FlatWeights(model), amplitude=amplitude, exclude=("norm",))
    assert isinstance(noise, SmoothOut)
    bfloat16, float32 = (Compute(torch.device("cpu"), dtype) for dtype in (torch.bfloat16, torch.float32))
    assert noise.rounded_away(bfloat16.rounded, 0) == pytest.approx(in_bfloat16, abs=0.006)
    assert noise.rounded_away(replace(float32, uses_tf32=True).rounded, 0) == pytest.approx(in_tf32, abs=0.006)
    assert noise.rounded_away(float32.rounded, 0) == 0


def test_tf32_has_ten_bits_behind_the_leading_one() -> None:
    tf32 = Compute(torch.device("cpu"), torch.float32, uses_tf32=True)
    values = torch.tensor([1 + 2**-10, 1 + 2**-11, 1 + 2**-12, -1 - 2**-11, 1e-30, 0.0])
    expected = torch.tensor([1 + 2**-10, 1 + 2**-10, 1, -1 - 2**-10, 1e-30, 0.0])
    torch.testing.assert_close(tf32.rounded(values), expected, rtol=0, atol=1e-33)


@pytest.mark.parametrize("method", ["smoothout", "sam"])
def test_the_documented_loop_trains_and_its_sam_is_that_of_plain_torch(method: str) -> None:
    page = (Path(__file__).parents[2] / "docs" / "method.md").read_text(encoding="utf-8")
    [loop] = re.findall(r"```python\n# loop\.py\n(.*?)```", page, re.DOTALL)
    ours: dict[str, Any] = {}
    exec(loop.replace("smoothout", method), ours)
    plain: dict[str, Any] = {}
    exec(loop.partition("weights = ")[0], plain)
    model, rate = plain["model"], plain["RATE"]
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    for _ in range(plain["STEPS"]):
        inputs = torch.rand(64, 2)
        labels = (inputs[:, 0] > inputs[:, 1]).long()
        clean = [parameter.detach().clone() for parameter in model.parameters()]
        nn.functional.cross_entropy(model(inputs), labels).backward()
        length = nn.utils.get_total_norm([parameter.grad for parameter in model.parameters()])
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(parameter.grad / length, alpha=0.05)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), labels).backward()
        with torch.no_grad():
            for parameter, value in zip(model.parameters(), clean, strict=True):
                parameter.copy_(value)
        optimizer.step()
        optimizer.zero_grad()
    points = torch.rand(1000, 2)
    right = ours["model"](points).argmax(1) == (points[:, 0] > points[:, 1]).long()
    assert right.float().mean() > 0.9
    parts = zip(ours["model"].parameters(), model.parameters(), strict=True)
    is_sam = all(torch.allclose(one, other, rtol=1e-3, atol=1e-4) for one, other in parts)
    assert is_sam == (method == "sam")
