"""`micro_size: auto`: the largest that fits every rank's device."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dist_train.cluster.communicator import Communicator, SingleProcess
from dist_train.config import ImageFormat
from dist_train.launching.assembly import _with_micro_size
from dist_train.models import build_loss, build_model
from dist_train.optim.flat_weights import FlatWeights
from dist_train.outcome import OutOfMemoryError, UsageError
from dist_train.training.compute import Compute, runs_in_memory
from dist_train.training.micro_batches import find_micro_size, forward_and_backward, halve
from tests.raising import raises
from tests.unit.simulated_ranks import SimulatedRanks, results
from tests.unit.small_trainers import build_trainer, small_config, state_of

CPU = torch.device("cpu")


def room_for(largest: int, tried: list[int] | None = None) -> Callable[[int], None]:
    def try_size(size: int) -> None:
        if tried is not None:
            tried.append(size)
        if size > largest:
            raise torch.OutOfMemoryError("CUDA out of memory")

    return try_size


def found(largest: int, global_size: int, comm: Communicator, device: str = "cpu") -> int:
    return find_micro_size(room_for(largest), global_sizes=[global_size], device=torch.device(device), comm=comm)


@pytest.mark.parametrize(
    ("largest", "global_size", "device", "size"),
    [
        (10**6, 8192, "cpu", 128),
        (10**6, 8192, "cuda", 2048),
        (100, 8192, "cuda", 64),
        (64, 8192, "cuda", 64),
        (2, 8192, "cuda", 2),
        (10**6, 40, "cpu", 32),
        (10**6, 32, "cpu", 32),
    ],
)
def test_it_is_the_largest_power_of_two_that_fits(largest: int, global_size: int, device: str, size: int) -> None:
    assert found(largest, global_size, SingleProcess(), device) == size


def test_it_is_what_fits_every_rank_and_no_more_than_an_even_share() -> None:
    assert results(3, lambda each: found((1000, 20, 50)[each.rank], 8192, each)) == [16] * 3
    assert results(4, lambda each: found(1000, 256, each)) == [64] * 4
    assert results(4, lambda each: found(1000, 4, each)) == [2] * 4  # as many as a norm needs, though a share is 1


@pytest.mark.parametrize(("global_size", "fewest", "size"), [(98, 2, 32), (98, 3, 31), (8192, 5, 128), (129, 2, 127)])
def test_no_micro_batch_has_fewer_samples_than_must_share_it(global_size: int, fewest: int, size: int) -> None:
    found = find_micro_size(
        room_for(32 if global_size == 98 else 1000),
        global_sizes=[global_size],
        device=CPU,
        comm=SingleProcess(),
        fewest=fewest,
    )
    assert found == size
    assert global_size % found == 0 or global_size % found >= fewest


def test_with_sync_norm_every_micro_batch_has_a_sample_for_each_rank_that_may_join(tmp_path: Path) -> None:
    class MayGrow(SingleProcess):
        most_ranks = 12

    def found_by(comm: SimulatedRanks) -> int:
        return find_micro_size(room_for(1000), global_sizes=[96], device=CPU, comm=comm, fewest=12)

    config = small_config(model={"norm": "sync"}, batch={"micro_size": "auto"})
    trainer = build_trainer(config, tmp_path, MayGrow())
    assert all(part.size for rank in range(12) for part in trainer.plan.slices(rank, 12))
    assert results(8, found_by) == [16] * 8


def test_what_a_trial_leaves_in_the_allocator_is_given_back_before_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []
    emptied: list[list[int]] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append([*tried]))
    find_micro_size(room_for(5, tried), global_sizes=[1024], device=torch.device("cuda"), comm=SingleProcess())
    assert emptied == [[2], [2, 4], [2, 4, 8]]


def test_nothing_larger_is_tried_once_one_does_not_fit() -> None:
    tried: list[int] = []
    find_micro_size(room_for(5, tried), global_sizes=[1024], device=torch.device("cuda"), comm=SingleProcess())
    assert tried == [2, 4, 8]


def test_where_nothing_fits_all_ranks_say_so() -> None:
    with raises(UsageError, "out-of-memory"):
        results(2, lambda each: found(8 if each.rank else 0, 1024, each))


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")]
)
def test_a_cpu_s_lack_of_memory_counts_too(error: Exception) -> None:
    def try_size(size: int) -> None:
        if size > 8:
            raise error

    assert find_micro_size(try_size, global_sizes=[1024], device=CPU, comm=SingleProcess()) == 8


def test_a_size_for_which_a_convolution_takes_another_algorithm_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = {"num_ooms": 2}
    monkeypatch.setattr(torch.cuda, "memory_stats_as_nested_dict", lambda: counted)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)

    def try_size(size: int) -> None:
        counted["num_ooms"] += size > 8

    assert find_micro_size(try_size, global_sizes=[1024], device=CPU, comm=SingleProcess()) == 8


def test_the_tensors_of_a_pass_that_does_not_fit_are_freed_at_once() -> None:
    activations: list[weakref.ref[Tensor]] = []

    def try_size(size: int) -> None:
        computed = torch.ones(size)
        activations.append(weakref.ref(computed))
        raise torch.OutOfMemoryError("CUDA out of memory")

    gc.disable()
    try:
        assert not runs_in_memory(partial(try_size, 8))
        assert activations[0]() is None
    finally:
        gc.enable()


def test_other_errors_are_not_swallowed() -> None:
    def try_size(size: int) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes"):
        find_micro_size(try_size, global_sizes=[1024], device=CPU, comm=SingleProcess())


def test_each_batch_of_a_schedule_leaves_enough_samples() -> None:
    assert find_micro_size(room_for(32), global_sizes=[96, 129], device=CPU, comm=SingleProcess()) == 31


def test_batch_that_no_size_divides_is_refused() -> None:
    with raises(UsageError, "one-sample-left"):
        find_micro_size(room_for(2), global_sizes=[3], device=CPU, comm=SingleProcess())


@pytest.mark.parametrize(("before", "fewest", "after"), [(128, 2, 64), (7, 2, 4), (3, 2, 2), (2, 1, 1)])
def test_halving_rounds_up(before: int, fewest: int, after: int) -> None:
    assert halve(before, [8192], fewest) == after


@pytest.mark.parametrize(("before", "size", "fewest"), [(1, 8192, 1), (2, 8192, 2), (4, 65, 2)])
def test_fewer_samples_than_a_norm_needs_are_refused(before: int, size: int, fewest: int) -> None:
    with raises(OutOfMemoryError, "out-of-memory"):  # as all ranks do, so that one reports it
        halve(before, [size], fewest)


def test_a_trial_runs_the_model_both_ways_in_the_layout_of_training() -> None:
    config, compute = small_config(data={"synthetic_shape": [3, 8, 8]}), Compute(CPU, torch.float32)
    model, loss = build_model(config), build_loss(config, CPU)
    seen: list[Tensor] = []
    model.register_forward_pre_hook(lambda module, inputs: seen.extend(inputs))
    forward_and_backward(model, loss, ImageFormat((3, 8, 8), 10), compute, torch.channels_last, 4)
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    assert not seen[0].any()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize(("cuda_graphs", "found"), [(False, 16), (True, 8)])
def test_micro_batches_leave_room_for_the_graphs_of_the_others(cuda_graphs: bool, found: int) -> None:
    config = small_config(
        batch={"global_size": 32, "micro_size": "auto"}, precision={"cuda_graphs": cuda_graphs}, run={"device": "cuda"}
    )
    model = build_model(config)
    state = state_of(model, FlatWeights(model), torch.optim.SGD(model.parameters()))

    def take_memory(module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if len(inputs[0]) > 16:
            raise torch.OutOfMemoryError

    model.register_forward_pre_hook(take_memory)
    loss, compute = build_loss(config, CPU), Compute(CPU, torch.float32)
    assert _with_micro_size(config, SingleProcess(), model, loss, state, compute).batch.micro_size == found
