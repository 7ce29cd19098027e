"""Promise 4: ranks that disagree stop, and the odd one is named."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dist_train.config import AveragingSettings, NoiseSettings
from dist_train.optim.averaging import Averaging
from dist_train.optim.flat_weights import FlatWeights
from dist_train.optim.noise import Noise, SmoothOut
from dist_train.outcome import DisagreementError
from dist_train.training.consistency import minority, verify_agreement
from tests.unit.simulated_ranks import SimulatedRanks, on_ranks
from tests.unit.weights_in_force import perturbed


def weights_of() -> FlatWeights:
    return FlatWeights(nn.ParameterList([torch.arange(30.0)]))


def without_noise(weights: FlatWeights) -> Noise:
    return Noise(NoiseSettings(), weights, seed=0, total_steps=1, rank=0)


def test_promise_4_a_single_flipped_bit_names_its_rank_on_all_ranks() -> None:
    def check(comm: SimulatedRanks) -> None:
        weights = weights_of()
        if comm.rank == 2:
            weights.values.view(torch.int32)[7] ^= 1
        verify_agreement(comm, weights, without_noise(weights), 9)

    for error in on_ranks(4, check):
        assert isinstance(error, DisagreementError)
        assert error.code == "weights-differ"
        assert "rank 2 " in str(error)


def test_promise_4_other_noise_names_its_rank_on_all_ranks() -> None:
    def check(comm: SimulatedRanks) -> None:
        weights = weights_of()
        settings = NoiseSettings(method="smoothout", exclude=())
        noise = SmoothOut(settings, weights, seed=int(comm.rank in (1, 3)), total_steps=10, rank=comm.rank)
        with perturbed(noise, 0):
            pass
        verify_agreement(comm, weights, noise, 0)

    for error in on_ranks(5, check):
        assert isinstance(error, DisagreementError)
        assert error.code == "noise-differ"
        assert "ranks 1, 3 " in str(error)


def test_another_average_names_its_rank_on_all_ranks() -> None:
    def check(comm: SimulatedRanks) -> None:
        weights = weights_of()
        averaging = Averaging(AveragingSettings(kind="lawa", every_steps=1, last=2), weights, 1)
        averaging.after_update(0)
        if comm.rank == 1:
            averaging.kept.view(torch.int32)[0, 3] ^= 1
        verify_agreement(comm, weights, without_noise(weights), 0, averaging)

    for error in on_ranks(3, check):
        assert isinstance(error, DisagreementError)
        assert error.code == "average-differ"
        assert "rank 1 " in str(error)


@pytest.mark.parametrize("size", [1, 3])
def test_ranks_that_agree_go_on(size: int) -> None:
    ended = on_ranks(size, lambda comm: verify_agreement(comm, weights_of(), without_noise(weights_of()), 0))
    assert ended == [None] * size


@pytest.mark.parametrize(
    ("digests", "odd"),
    [
        ([5], []),
        ([5, 5, 5], []),
        ([5, 6], [1]),
        ([6, 5, 5], [0]),
        ([5, 6, 5], [1]),
        ([5, 5, 6, 6], [2, 3]),
        ([6, 5, 6, 5], [1, 3]),
        ([1, 2, 3], [1, 2]),
        ([9, 2, 3, 2, 3], [0, 2, 4]),
    ],
)
def test_the_minority_is_wrong_and_rank_0_decides_a_tie(digests: list[int], odd: list[int]) -> None:
    assert minority(digests) == odd
