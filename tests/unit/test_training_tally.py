"""What the ranks tell each other in a step, in one sum of integers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from dist_train.cluster.communicator import Communicator, Pending, SingleProcess
from dist_train.data.images import ImageSet
from dist_train.data.loader import Samples
from dist_train.models.norms import BatchStatistics, GroupedBatchNorm
from dist_train.reproducible import LOSSES
from dist_train.training.compute import Compute
from dist_train.training.evaluation import evaluate
from dist_train.training.reduction import Tally, TallyResult
from tests.unit.simulated_ranks import results

CPU = torch.device("cpu")
LOGITS = torch.randn(23, 4, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(23) % 4


def count(comm: Communicator, size: int) -> TallyResult:
    """Tally micro-batches of `size` of the 23 samples, dealt out round robin."""
    tally = Tally(comm, BatchStatistics((), CPU, 12))
    tally.clear()
    parts = list(zip(torch.split(LOGITS, size), torch.split(LABELS, size), strict=True))
    for logits, labels in parts[comm.rank :: comm.size]:
        tally.add(functional.cross_entropy(logits, labels, reduction="sum"), logits, labels)
    tally.send()
    return tally.result()


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_promise_3_loss_and_accuracy_are_the_global_means_on_any_number_of_ranks(ranks: int) -> None:
    alone = count(SingleProcess(), 5)
    assert alone.loss == pytest.approx(functional.cross_entropy(LOGITS, LABELS).item(), rel=1e-6)
    assert alone.accuracy == (LOGITS.argmax(1) == LABELS).sum().item() / 23
    assert (alone.samples, alone.out_of_range, alone.out_of_memory, alone.stop) == (23, 0, 0, 0)
    for total in results(ranks, lambda each: count(each, 5)):
        assert (total.loss, total.accuracy, total.samples) == (alone.loss, alone.accuracy, 23)


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf, 2.0**31])
def test_a_loss_that_is_not_finite_or_too_large_is_told_by_the_rank_that_met_it(loss: float) -> None:
    def tell(comm: Communicator) -> TallyResult:
        tally = Tally(comm, BatchStatistics((), CPU, 12))
        tally.add(torch.tensor(loss if comm.rank == 1 else 1.0), LOGITS[:2], LABELS[:2])
        tally.send()
        return tally.result()

    for total in results(3, tell):
        assert total.out_of_range == 1
        assert math.isfinite(total.loss)


def test_a_sum_of_losses_within_the_range_does_not_leave_it() -> None:
    limit = torch.tensor(LOSSES.limit / 4096)
    for loss, told in ((limit.nextafter(torch.zeros(())), 0), (limit, 4096)):
        tally = Tally(SingleProcess(), BatchStatistics((), CPU, 12))
        for _ in range(4096):
            tally.add(loss, LOGITS[:2], LABELS[:2])
        tally.send()
        total = tally.result()
        assert total.out_of_range == told
        assert total.loss == pytest.approx(0.0 if told else float(loss) / 2)


def test_losses_too_large_for_a_sum_over_many_micro_batches_are_out_of_range() -> None:
    samples, many = 1 << 20, 1 << 14
    tally = Tally(SingleProcess(), BatchStatistics((), CPU, samples))
    labels = torch.zeros(samples // many, dtype=torch.int64)
    logits = torch.zeros(len(labels), 1)
    for mean, out_of_range in ((16_000.0, 0), (40_000.0, many)):
        tally.clear()
        for _ in range(many):
            tally.add(torch.tensor(mean * len(labels)), logits, labels)
        tally.send()
        total = tally.result()
        assert total.out_of_range == out_of_range
        assert total.loss == (0.0 if out_of_range else mean)


def test_what_one_rank_has_to_say_reaches_all() -> None:
    def tell(comm: Communicator) -> TallyResult:
        tally = Tally(comm, BatchStatistics((), CPU, 12))
        said = torch.tensor(comm.rank == 0)
        tally.send(out_of_range=said, out_of_memory=comm.rank > 0, stop=comm.rank == 2, pace=7 * comm.rank)
        return tally.result()

    for total in results(3, tell):
        assert (total.out_of_range, total.out_of_memory, total.stop) == (1, 2, 1)
        assert total.paces == (0, 7, 14)
        assert (total.samples, total.loss, total.accuracy) == (0, 0.0, 0.0)


class ReadByTheHost(Pending):
    """A sum on a GPU, for which the host would wait without end where a stream does."""

    def wait(self) -> None:
        pytest.fail("a stream waits, then the host reads")

    def wait_on_host(self) -> None:
        pass


def test_the_host_does_not_wait_without_end_for_what_it_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    comm = SingleProcess()
    monkeypatch.setattr(comm, "allreduce_async", lambda tensor, name: ReadByTheHost())
    assert count(comm, 5).samples == 23
    images, model = ImageSet(torch.zeros(6, 3, 8, 8, dtype=torch.uint8), torch.zeros(6).long(), 4), nn.Flatten()
    assert evaluate(model, Samples(images, CPU), 6, batch_size=2, compute=Compute(CPU, torch.float32), comm=comm)


def test_it_begins_anew_with_the_norms_statistics() -> None:
    norm = GroupedBatchNorm(2)
    statistics = BatchStatistics((norm,), CPU, 12)
    tally = Tally(SingleProcess(), statistics)
    norm(torch.ones(3, 2))
    statistics.collect(3)
    tally.add(torch.tensor(1.0), LOGITS[:2], LABELS[:2])
    tally.send(stop=True)
    tally.add(torch.tensor(1.0), LOGITS[:2], LABELS[:2])  # in an update that breaks off before it is sent
    tally.clear()
    tally.send()
    total = tally.result()
    assert (total.samples, total.stop) == (0, 0)
    assert not total.statistics.any()


def test_promise_3_statistics_of_all_norms_are_summed_over_the_ranks_and_absorbed_in_order() -> None:
    inputs = torch.randn(12, 3, generator=torch.Generator().manual_seed(1))

    def gather(comm: Communicator) -> list[torch.Tensor]:
        norms = (GroupedBatchNorm(3), GroupedBatchNorm(1))
        statistics = BatchStatistics(norms, CPU, 12)
        tally = Tally(comm, statistics)
        for part in torch.split(inputs, 3)[comm.rank :: comm.size]:
            norms[0](part)
            norms[1](part[:, :1] * 5)
            statistics.collect(len(part))
        tally.send()
        statistics.absorb(tally.result().statistics, 12, momentum=1.0)
        return [value.clone() for norm in norms for value in (norm.running_mean, norm.running_var)]

    [alone] = results(1, gather)
    torch.testing.assert_close(alone[0], inputs.mean(dim=0))
    torch.testing.assert_close(alone[2], inputs[:, :1].mean(dim=0) * 5)
    for size in (2, 3, 5):
        for gathered in results(size, gather):
            assert all(torch.equal(*pair) for pair in zip(gathered, alone, strict=True))
