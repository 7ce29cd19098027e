"""Every sample of a split counts once, for any number of ranks and any size of batches."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import chain

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from dist_train.cluster.communicator import RankLostError, SingleProcess
from dist_train.data.catalog import make_synthetic
from dist_train.data.images import BatchRequest, ImageSet
from dist_train.data.loader import Samples
from dist_train.models import build_model
from dist_train.models.norms import norm_modules
from dist_train.outcome import SHARED_ERRORS, UsageError
from dist_train.training.compute import Compute
from dist_train.training.evaluation import Evaluation, evaluate, recompute_statistics, statistics_samples
from tests.raising import raises
from tests.unit.simulated_ranks import SimulatedRanks, on_ranks, results
from tests.unit.small_trainers import drawn, seed_all, small_config, state_bits

CPU = Compute(torch.device("cpu"), torch.float32)
COUNT = 53
IMAGES = make_synthetic((1, 8, 8), 10, 60, "test", seed=0)


def a_model() -> nn.Module:
    return build_model(small_config(model={"width": 0.0625}))


def samples() -> Samples:
    return Samples(IMAGES, CPU.device)


def evaluated(comm: SimulatedRanks | SingleProcess, batch_size: int, model: nn.Module | None = None) -> Evaluation:
    return evaluate(model or a_model(), samples(), COUNT, batch_size=batch_size, compute=CPU, comm=comm)


@pytest.mark.parametrize("batch_size", [1, 7, 53, 500])
@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_it_is_the_mean_over_all_samples(ranks: int, batch_size: int) -> None:
    model = a_model().eval()
    inputs, labels = samples().read(BatchRequest(torch.arange(0, COUNT)))
    with torch.no_grad():
        logits = model(inputs)
    for result in results(ranks, lambda each: evaluated(each, batch_size)):
        assert result.loss == pytest.approx(functional.cross_entropy(logits, labels).item(), rel=1e-5)
        assert result.accuracy == (logits.argmax(1) == labels).sum().item() / COUNT
        assert result.samples == COUNT


@pytest.mark.parametrize("ranks", [2, 3, 5, 9])
def test_promise_3_it_has_the_same_bits_on_any_number_of_ranks(ranks: int) -> None:
    [alone] = results(1, lambda each: evaluated(each, 7))
    assert results(ranks, lambda each: evaluated(each, 7)) == [alone] * ranks


class Counting(nn.Module):
    """Says for each sample which it is: its label lies in its first pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def forward(self, inputs: Tensor) -> Tensor:
        self.seen += (inputs[:, 0, 0, 0] * 255).round().int().tolist()
        return torch.zeros(len(inputs), 10)


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("batch_size", [1, 7, 53])
def test_each_sample_is_seen_by_exactly_one_rank(ranks: int, batch_size: int) -> None:
    numbered = torch.arange(60, dtype=torch.uint8).view(60, 1, 1, 1).expand(60, 1, 8, 8).contiguous()

    def see(comm: SimulatedRanks) -> list[int]:
        model = Counting()
        split = Samples(ImageSet(numbered, IMAGES.labels, 10), CPU.device)
        evaluate(model, split, COUNT, batch_size=batch_size, compute=CPU, comm=comm)
        return model.seen

    assert sorted(chain.from_iterable(results(ranks, see))) == list(range(COUNT))


class Keeping(nn.Module):
    """Scales its logits by what it has kept of the last evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 10)
        self.kept = torch.ones(10)

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.layer(inputs.flatten(1))
        if not self.training:
            self.kept = logits.std(0)
        return logits * self.kept


def test_what_a_model_keeps_of_an_evaluation_may_be_trained_with() -> None:
    model = Keeping()
    evaluated(SingleProcess(), 7, model)
    model(samples().read(BatchRequest(torch.arange(0, 7)))[0]).sum().backward()
    assert model.layer.weight.grad is not None


class OneOfTwo(SingleProcess):
    """A rank that finds in every sum its own part alone: threads would share the generators, which processes do not."""

    def __init__(self, rank: int) -> None:
        self.rank, self.size = rank, 2


def drawing_model() -> nn.Module:
    return build_model(small_config(model={"name": "tests.unit.drawing_model:drawing", "width": 1.0}))


def test_promise_3_draws_in_evaluation_mode_do_not_depend_on_the_rank() -> None:
    model = drawing_model()
    seed_all(1)
    expected = drawn()
    seed_all(1)
    whole, first, second = (evaluated(comm, 7, model).loss for comm in (SingleProcess(), OneOfTwo(0), OneOfTwo(1)))
    assert first + second == pytest.approx(whole, rel=1e-12)
    assert drawn() == expected, "the program's own draws are not disturbed"


def test_promise_3_draws_of_the_passes_that_recompute_statistics_do_not_depend_on_the_rank() -> None:
    model, indices = drawing_model(), statistics_samples(60, 40, 16, 0)

    def recomputed(comm: SingleProcess) -> Tensor:
        recompute_statistics(model, samples(), indices, micro_size=9, compute=CPU, comm=comm)
        return torch.cat([norm.running_var for norm in norm_modules(model)])

    seed_all(1)
    expected = drawn()
    seed_all(1)
    whole, first, second = (recomputed(comm) for comm in (SingleProcess(), OneOfTwo(0), OneOfTwo(1)))
    torch.testing.assert_close(first + second, whole, rtol=1e-6, atol=1e-7)
    assert drawn() == expected


def test_it_leaves_the_model_as_it_was() -> None:
    for training in (True, False):
        model = a_model().train(training)
        before = state_bits(model)
        evaluated(SingleProcess(), 7, model)
        assert model.training is training
        assert all(module.training is training for module in model.modules())
        assert state_bits(model) == before


def test_a_loss_that_is_not_finite_is_nan_on_all_ranks() -> None:
    def blown_up(comm: SimulatedRanks) -> Evaluation:
        model = a_model()
        with torch.no_grad():
            model.get_parameter("classifier.bias")[0] = math.inf
        return evaluated(comm, 7, model)

    for result in results(2, blown_up):
        assert math.isnan(result.loss)
        assert result.accuracy == 0.0, "a sample without a loss is not classified rightly"


class Short(nn.Module):
    """A network whose device has memory for four samples at once."""

    def forward(self, inputs: Tensor) -> Tensor:
        if len(inputs) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return torch.zeros(len(inputs), 10)


@pytest.mark.parametrize("short", [[0], [1], [0, 1]])
def test_a_lack_of_memory_on_some_rank_is_told_on_all(short: list[int]) -> None:
    def run_out(comm: SimulatedRanks) -> str:
        model = Short() if comm.rank in short else a_model()
        with raises(UsageError, "out-of-memory") as caught:
            evaluated(comm, 7, model)
        assert model.training
        return str(caught.value)

    for text in results(2, run_out):
        assert text.startswith(f"{len(short)} of the ranks")
        assert "evaluation.batch_size" in text


def test_a_lack_of_memory_for_norm_statistics_is_told_on_all_ranks() -> None:
    def run_out(comm: SimulatedRanks) -> None:
        indices = statistics_samples(60, 40, 16, 0)
        model = Short() if comm.rank else nn.Flatten()
        with raises(UsageError, "out-of-memory"):
            recompute_statistics(model, samples(), indices, micro_size=9, compute=CPU, comm=comm)

    results(2, run_out)


def test_a_rank_of_an_elastic_launch_that_lacks_memory_fails_alone() -> None:
    def compute_statistics(comm: SimulatedRanks, model: nn.Module) -> None:
        indices = statistics_samples(60, 40, 16, 0)
        recompute_statistics(model, samples(), indices, micro_size=9, compute=CPU, comm=comm)

    def run_out(work: Callable[[SimulatedRanks, nn.Module], object], comm: SimulatedRanks) -> None:
        comm.is_elastic = True
        work(comm, Short() if comm.rank else nn.Flatten())

    for work in (lambda comm, model: evaluated(comm, 7, model), compute_statistics):
        other, short = on_ranks(2, partial(run_out, work))
        assert isinstance(other, RankLostError)
        assert isinstance(short, UsageError)
        assert not isinstance(short, SHARED_ERRORS)
        assert short.code == "out-of-memory"


@pytest.mark.parametrize("scale", [1e7, 1e20, 3e38])
def test_a_loss_is_a_number_wherever_the_outputs_are(scale: float) -> None:
    def far_off(comm: SimulatedRanks) -> Evaluation:
        model = a_model()
        with torch.no_grad():
            model.get_parameter("classifier.bias")[0] = scale
        return evaluated(comm, 7, model)

    _, labels = samples().read(BatchRequest(torch.arange(0, COUNT)))
    expected = scale * (labels != 0).sum().item() / COUNT
    for size in (1, 3):
        assert [result.loss for result in results(size, far_off)] == [pytest.approx(expected, rel=1e-6)] * size


class TestRecomputedStatistics:
    def recompute(
        self,
        comm: SimulatedRanks | SingleProcess,
        micro_size: int = 9,
        seed: int = 0,
        factor: float = 1.0,
        *,
        trains: bool = True,
    ) -> nn.Module:
        model = a_model().train(trains)
        with torch.no_grad():
            model.get_parameter("convolution1_1.weight").mul_(factor)
        norms = norm_modules(model)
        for norm in norms:
            norm.running_mean.fill_(1e6)
            norm.running_var.fill_(1e6)
        recompute_statistics(
            model,
            samples(),
            statistics_samples(60, 40, 16, seed),
            micro_size=micro_size,
            compute=CPU,
            comm=comm,
        )
        assert not any(norm.seen for norm in norms)
        return model

    @pytest.mark.parametrize("ranks", [2, 3, 7])
    def test_promise_3_they_have_the_same_bits_on_any_number_of_ranks(self, ranks: int) -> None:
        [alone] = results(1, lambda each: state_bits(self.recompute(each)))
        ended = results(ranks, lambda each: state_bits(self.recompute(each)))
        assert ended == [alone] * ranks

    @pytest.mark.parametrize("trains", [True, False])
    def test_promise_4_they_replace_the_old_ones_by_those_of_the_weights_as_they_are(self, trains: bool) -> None:
        model = self.recompute(SingleProcess(), micro_size=40, trains=trains)
        assert model.training is trains
        first = norm_modules(model)[0]
        inputs, _ = samples().read(BatchRequest(statistics_samples(60, 40, 16, 0)))
        with torch.no_grad():
            outputs = model.get_submodule("convolution1_1")(inputs)
        # in groups of 4 samples of 64 pixels each
        groups = outputs.view(10, 4, -1, 8, 8)
        torch.testing.assert_close(first.running_mean, outputs.mean(dim=(0, 2, 3)))
        torch.testing.assert_close(first.running_var, groups.var(dim=(1, 3, 4)).mean(dim=0))

    @pytest.mark.parametrize("factor", [1e7, math.nan])
    def test_statistics_out_of_range_are_a_divergence_on_all_ranks(self, factor: float) -> None:
        ended = on_ranks(2, lambda comm: self.recompute(comm, factor=factor))
        assert [getattr(error, "code", "") for error in ended] == ["statistics-not-finite"] * 2

    def test_weights_stay(self) -> None:
        model, fresh = self.recompute(SingleProcess()), a_model()
        for (_, parameter), (_, before) in zip(model.named_parameters(), fresh.named_parameters(), strict=True):
            assert torch.equal(parameter, before)
            assert parameter.grad is None

    def test_promise_2_the_samples_are_a_fixed_choice_by_the_seed(self) -> None:
        chosen = statistics_samples(60, 40, 16, 3)
        assert torch.equal(chosen, statistics_samples(60, 40, 16, 3))
        assert not torch.equal(chosen, statistics_samples(60, 40, 16, 4))
        assert statistics_samples(20, 6, 4, 0).tolist() == [0, 14, 17, 5, 9, 13], "as of the version that began a run"
        assert len(set(chosen.tolist())) == 40
        assert len(statistics_samples(60, 400, 16, 3)) == 60
