"""Norms: batch norm over groups is torch's over each group."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

from dist_train.cluster.communicator import SingleProcess
from dist_train.config import ImageFormat, ModelSettings
from dist_train.models import runs_sequentials_whole
from dist_train.models.norms import (
    BatchStatistics,
    GroupedBatchNorm,
    NormFactory,
    channel_groups,
    fuse_relus,
    norm_factory,
    norm_modules,
    sync_batch_norm,
)
from tests.unit.simulated_ranks import SimulatedRanks, results
from tests.unit.small_trainers import build_trainer, small_config

CHANNELS = 3
SHAPES = ((), (5, 4))


def batch(samples: int, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    source = torch.Generator().manual_seed(seed)
    return torch.randn(samples, CHANNELS, *shape, generator=source) * 3 + 1


def a_norm(group_size: int | None) -> GroupedBatchNorm:
    norm = GroupedBatchNorm(CHANNELS, group_size)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([0.5, 2.0, -1.0]))
        norm.bias.copy_(torch.tensor([0.1, 0.0, 3.0]))
    return norm


def torch_norm(norm: GroupedBatchNorm, shape: tuple[int, ...]) -> nn.Module:
    reference: nn.Module = nn.BatchNorm2d(CHANNELS) if shape else nn.BatchNorm1d(CHANNELS)
    reference.load_state_dict(norm.state_dict(), strict=False)
    return reference


def expected_groups(samples: int, group_size: int | None) -> list[slice]:
    """Whole groups in order; what is left over joins the last one."""
    if group_size is None or samples < 2 * group_size:
        return [slice(0, samples)]
    cuts = [*range(0, samples - group_size + 1, group_size)]
    cuts[-1:] = [cuts[-1], samples]
    return [slice(start, stop) for start, stop in pairwise(cuts)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("samples", "group_size", "sizes"),
    [
        (8, None, [8]),
        (8, 8, [8]),
        (8, 4, [4, 4]),
        (11, 4, [4, 7]),
        (7, 4, [7]),
        (3, 4, [3]),
        (12, 5, [5, 7]),
    ],
)
def test_each_group_is_normalized_as_torch_does_with_gradients(
    samples: int, group_size: int | None, sizes: list[int], shape: tuple[int, ...]
) -> None:
    groups = expected_groups(samples, group_size)
    assert [group.stop - group.start for group in groups] == sizes
    norm = a_norm(group_size)
    reference = torch_norm(norm, shape)
    inputs = batch(samples, shape).requires_grad_()
    twin = inputs.detach().clone().requires_grad_()
    outputs = norm(inputs)
    expected = torch.cat([reference(twin[group]) for group in groups])
    torch.testing.assert_close(outputs, expected)

    upstream = batch(samples, shape, seed=1)
    outputs.backward(upstream)
    expected.backward(upstream)
    torch.testing.assert_close(inputs.grad, twin.grad)
    torch.testing.assert_close(norm.weight.grad, reference.weight.grad)
    torch.testing.assert_close(norm.bias.grad, reference.bias.grad)


@pytest.mark.parametrize("group_size", [None, 4])
@pytest.mark.parametrize("layout", ["samples", "channels", "columns", "transposed"])
def test_activations_that_are_not_contiguous_are_normalized_as_others(layout: str, group_size: int | None) -> None:
    wide = torch.randn(22, 2 * CHANNELS, 6, 4, generator=torch.Generator().manual_seed(0)) + 1
    inputs = {
        "samples": wide[::2, :CHANNELS].contiguous()[::2],
        "channels": wide[:, :CHANNELS],
        "columns": wide[:, :CHANNELS].contiguous()[..., ::2],
        "transposed": wide[:, :CHANNELS].contiguous().mT,
    }[layout]
    assert not inputs.is_contiguous()
    found = []
    for each in (inputs, inputs.contiguous()):
        norm, leaf = a_norm(group_size), each.detach().requires_grad_()
        outputs = norm(leaf)
        outputs.square().sum().backward()
        [seen] = norm.seen
        found.append([outputs, seen.means, seen.variances, leaf.grad, norm.weight.grad, norm.bias.grad])
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_evaluation_uses_the_running_averages_and_gathers_nothing(shape: tuple[int, ...]) -> None:
    norm = a_norm(4)
    norm.running_mean.copy_(torch.tensor([1.0, 0.0, -1.0]))
    norm.running_var.copy_(torch.tensor([4.0, 1.0, 0.5]))
    reference = torch_norm(norm, shape)
    norm.eval()
    reference.eval()
    inputs = batch(10, shape)
    assert torch.equal(norm(inputs), reference(inputs))
    assert not norm.seen


def test_a_forward_pass_notes_its_groups_and_leaves_the_running_averages_where_they_are() -> None:
    norm = a_norm(2)
    inputs = batch(7, ())
    norm(inputs)
    assert torch.equal(norm.running_mean, torch.zeros(CHANNELS))
    assert torch.equal(norm.running_var, torch.ones(CHANNELS))
    [seen] = norm.seen
    groups = expected_groups(7, 2)
    assert seen.sizes == tuple(group.stop - group.start for group in groups)
    for mean, variance, group in zip(seen.means, seen.variances, groups, strict=True):
        torch.testing.assert_close(mean, inputs[group].mean(dim=0))
        torch.testing.assert_close(variance, inputs[group].var(dim=0))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("training", [True, False])
def test_a_norm_that_a_relu_was_joined_to_has_the_bits_of_both(shape: tuple[int, ...], training: bool) -> None:
    def run(model: nn.Sequential) -> list[torch.Tensor]:
        norm = model.train(training)[0]
        inputs = batch(11, shape).requires_grad_()
        outputs = model(inputs)
        return [outputs, *torch.autograd.grad(outputs.square().sum(), (inputs, *norm.parameters()))]

    apart, joined = (nn.Sequential(a_norm(4), nn.ReLU(inplace=True), nn.ReLU()) for _ in range(2))
    fuse_relus(joined)
    assert [type(module) for module in joined] == [GroupedBatchNorm, nn.Identity, nn.ReLU]
    assert joined.state_dict().keys() == apart.state_dict().keys()
    for found, expected in zip(run(joined), run(apart), strict=True):
        assert torch.equal(found, expected)


def tapped(images: ImageFormat, width: float, norm: NormFactory) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), norm(8), nn.ReLU(), nn.Linear(8, images.classes))


@pytest.mark.parametrize(("name", "joined"), [("vgg9", True), (f"{__name__}:tapped", False)])
def test_relus_are_joined_in_models_known_to_run_their_sequentials_whole(
    tmp_path: Path, name: str, joined: bool
) -> None:
    network = build_trainer(small_config(model={"name": name, "width": 0.03125}), tmp_path, SingleProcess()).network
    assert {norm.has_relu for norm in norm_modules(network)} == {joined}
    assert any(isinstance(module, nn.ReLU) for module in network.modules()) != joined
    assert runs_sequentials_whole("torchvision:resnet18")
    assert not runs_sequentials_whole("timm:resnet18")


class Residual(nn.Sequential):
    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        norm, relu = self
        outputs: torch.Tensor = relu(norm(inputs) + inputs)
        return outputs


def test_a_relu_that_does_not_directly_follow_its_norm_stays() -> None:
    apart, joined = (Residual(a_norm(4), nn.ReLU()) for _ in range(2))
    fuse_relus(joined)
    assert torch.equal(joined(batch(11, (5, 4))), apart(batch(11, (5, 4))))
    with_child = nn.Sequential(a_norm(4), nn.ReLU())
    with_child[0].add_module("act", nn.SiLU())
    fuse_relus(with_child)
    assert isinstance(with_child[1], nn.ReLU)


def test_the_state_dict_has_batch_norm_s_names_and_nothing_else() -> None:
    assert list(GroupedBatchNorm(2).state_dict()) == ["weight", "bias", "running_mean", "running_var"]


@pytest.mark.parametrize(("name", "group_size"), [("batch", None), ("ghost", 16), ("sync", None)])
def test_a_norm_is_built_by_its_name(name: str, group_size: int | None) -> None:
    norm = norm_factory(ModelSettings(norm=name, ghost_size=16))(7)  # type: ignore[arg-type]
    assert isinstance(norm, GroupedBatchNorm)
    assert (norm.group_size, len(norm.weight)) == (group_size, 7)


def test_no_norm_leaves_everything_as_it_is() -> None:
    norm = norm_factory(ModelSettings(norm="none"))(7)
    inputs = torch.randn(2, 7, generator=torch.Generator().manual_seed(0))
    assert torch.equal(norm(inputs), inputs)
    assert not list(norm.parameters())


@pytest.mark.parametrize(
    ("channels", "most", "least", "groups"),
    [
        (64, 32, 2, 32),
        (48, 32, 2, 24),
        (20, 32, 2, 10),
        (7, 32, 2, 1),
        (9, 4, 2, 3),
        (1, 32, 2, 1),
        (64, 1, 2, 1),
        (64, 32, 8, 8),
        (4, 32, 8, 1),
    ],
)
def test_channels_are_grouped_as_asked_or_as_near_below_as_they_divide(
    channels: int, most: int, least: int, groups: int
) -> None:
    assert channel_groups(channels, most, least) == groups
    norm = norm_factory(ModelSettings(norm="group", channel_groups=most))(channels, least=least)
    assert isinstance(norm, nn.GroupNorm)
    assert (norm.num_groups, norm.num_channels) == (groups, channels)


def test_group_norm_of_a_sample_does_not_depend_on_the_others() -> None:
    norm = norm_factory(ModelSettings(norm="group", channel_groups=2))(6)
    inputs = torch.randn(5, 6, 3, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(norm(inputs)[2:4], norm(inputs[2:4]))


class TestSyncBatchNorm:
    """Each rank holds a part of the samples; together they are one group."""

    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("cuts", [[4, 4], [1, 6], [3, 2, 4]])
    @pytest.mark.parametrize("offset", [0.0, 300.0])
    def test_outputs_and_gradients_are_those_of_batch_norm_over_all_samples(
        self, shape: tuple[int, ...], cuts: list[int], offset: float
    ) -> None:
        samples = sum(cuts)
        inputs, upstream = batch(samples, shape) + offset, batch(samples, shape, seed=1)
        parts, upstreams = inputs.split(cuts), upstream.split(cuts)
        reference = torch_norm(a_norm(None), shape).double()
        twin = inputs.double().requires_grad_()
        expected = reference(twin)
        expected.backward(upstream.double())

        def both_ways(comm: SimulatedRanks) -> tuple[GroupedBatchNorm, torch.Tensor, torch.Tensor]:
            norm = a_norm(None)
            mine = parts[comm.rank].clone().requires_grad_()
            with sync_batch_norm([norm], lambda tensor, name: comm.allreduce_async(tensor, name).wait()):
                outputs = norm(mine)
                outputs.backward(upstreams[comm.rank])
            assert mine.grad is not None
            assert comm.names == ["norm.0.forward", "norm.0.backward"]
            return norm, outputs.detach(), mine.grad

        ended = results(len(cuts), both_ways)

        def assert_near(values: torch.Tensor, others: torch.Tensor | None) -> None:
            torch.testing.assert_close(values.double(), others, rtol=1e-4, atol=1e-5 * (1 + offset))

        assert_near(torch.cat([outputs for _, outputs, _ in ended]), expected)
        assert_near(torch.cat([gradient for *_, gradient in ended]), twin.grad)
        norms = [norm for norm, *_ in ended]
        for name in ("weight", "bias"):
            gradients = [gradient for norm in norms if (gradient := norm.get_parameter(name).grad) is not None]
            assert_near(torch.stack(gradients).sum(dim=0), reference.get_parameter(name).grad)
        gathered = [BatchStatistics([norm], torch.device("cpu"), samples) for norm in norms]
        for statistics, samples_here in zip(gathered, cuts, strict=True):
            statistics.collect(samples_here)
        sums = torch.stack([statistics.sums for statistics in gathered]).sum(dim=0)
        gathered[0].absorb(sums, samples, momentum=0.1)
        torch.testing.assert_close(norms[0].running_mean, reference.get_buffer("running_mean").float())
        torch.testing.assert_close(norms[0].running_var, reference.get_buffer("running_var").float())

    def test_a_rank_out_of_the_block_normalizes_what_it_has(self) -> None:
        norm = a_norm(None)
        with sync_batch_norm([norm], lambda tensor, name: pytest.fail("summed outside the block")):
            pass
        inputs = batch(6, (2, 2))
        assert torch.equal(norm(inputs), a_norm(None)(inputs))

    def test_half_precision_inputs_stay_so_and_their_sums_do_not(self) -> None:
        norm = a_norm(None)
        seen: list[torch.dtype] = []
        inputs = batch(6, (2, 2)).bfloat16().requires_grad_()
        with sync_batch_norm([norm], lambda tensor, name: seen.append(tensor.dtype)):
            outputs = norm(inputs)
            outputs.float().square().sum().backward()
        assert outputs.dtype == torch.bfloat16
        assert inputs.grad is not None
        assert inputs.grad.dtype == torch.bfloat16
        assert set(seen) == {torch.float64}
        torch.testing.assert_close(outputs, a_norm(None)(inputs), rtol=2e-2, atol=2e-2)
