"""Promise 4: workers that disagree stop, and the odd one is named."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dist_train.config import NoiseSettings
from dist_train.optim.flat_weights import FlatWeights
from dist_train.optim.noise import Noise, SmoothOut
from dist_train.outcome import DisagreementError
from dist_train.training.agreement import minority, verify_agreement
from tests.unit.simulated_workers import SimulatedWorkers, on_workers
from tests.unit.weights_in_force import perturbed


def weights_of() -> FlatWeights:
    return FlatWeights(nn.ParameterList([torch.arange(30.0)]))


def test_promise_4_a_single_flipped_bit_names_its_worker_on_all_workers() -> None:
    def check(workers: SimulatedWorkers) -> None:
        weights = weights_of()
        if workers.rank == 2:
            weights.values.view(torch.int32)[7] ^= 1
        verify_agreement(workers, weights, Noise(), 9)

    for error in on_workers(4, check):
        assert isinstance(error, DisagreementError)
        assert "after step 10 the weights of worker 2 differ" in str(error)


def test_promise_4_other_noise_names_its_worker_on_all_workers() -> None:
    def check(workers: SimulatedWorkers) -> None:
        weights = weights_of()
        settings = NoiseSettings(method="smoothout", exclude=())
        noise = SmoothOut(settings, weights, seed=int(workers.rank in (1, 3)), total_steps=10, rank=workers.rank)
        with perturbed(noise, 0):
            pass
        verify_agreement(workers, weights, noise, 0)

    for error in on_workers(5, check):
        assert isinstance(error, DisagreementError)
        assert "after step 1 the noise of workers 1, 3 differ" in str(error)


@pytest.mark.parametrize("size", [1, 3])
def test_workers_that_agree_go_on(size: int) -> None:
    ended = on_workers(size, lambda workers: verify_agreement(workers, weights_of(), Noise(), 0))
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
def test_the_minority_is_wrong_and_worker_0_decides_a_tie(digests: list[int], odd: list[int]) -> None:
    assert minority(digests) == odd
