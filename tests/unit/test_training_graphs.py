"""Micro-batches replayed as graphs, which a CPU emulates operator by operator: the same bits as without them."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

from dist_train.cluster.communicator import Communicator, SingleProcess
from dist_train.data.augmentation import Target
from dist_train.data.images import BatchRequest
from dist_train.outcome import DivergedError, UsageError
from dist_train.training.compute import LossScale
from dist_train.training.graphs import CudaGraphRecorder, MicroBatchGraphs
from dist_train.training.trainer import Trainer
from tests.raising import raises
from tests.unit.operator_recorder import OperatorRecorder, address_of
from tests.unit.simulated_ranks import results
from tests.unit.small_trainers import build_trainer, small_config, state_bits

pytestmark = pytest.mark.usefixtures("one_thread")

UPDATES = 4
PASSES = 4
"""In an update of `small_config`, but for the last one, which is never a graph."""

Sections = Mapping[str, Mapping[str, Any]]


def trainer_of(folder: Path, sections: Sections, recorder: OperatorRecorder | None, comm: Communicator) -> Trainer:
    """Return a trainer that has its micro-batches recorded by `recorder`, if there is one."""
    trainer = build_trainer(small_config(**{"evaluation": {"every_epochs": 0}, **sections}), folder, comm)
    trainer.training_step = replace(trainer.training_step, graph_recorder=recorder)
    return trainer


def train(trainer: Trainer, state: list[Tensor] | None = None) -> list[tuple[float, ...]]:
    """Make the updates; return loss, accuracy and gradient norm of each. Add to `state` what `state_of` returns."""
    told: list[tuple[float, ...]] = []
    for _ in range(UPDATES):
        update = trainer._make_update()
        assert update is not None
        trainer._complete_step(update)
        if state is not None:
            state += state_of(trainer)  # after its first update, exact32 sums in another tensor
        record = update.record
        told.append((record.loss, record.accuracy, record.gradient_norm))
    return told


def state_of(trainer: Trainer) -> list[Tensor]:
    """Return all tensors of the step that live as long as it does, and change."""
    step = trainer.training_step
    accumulator, noise = step.reduction.accumulator, step.noise
    tensors = [step.weights.values, step.weights.gradients, accumulator._total, accumulator.largest, step.tally._slots]
    tensors += [step.statistics.sums, step.statistics.out_of_range, *step.noise.kept.values()]
    return tensors + [
        getattr(of, name) for of, name in ((accumulator, "_scales"), (noise, "_perturbed")) if hasattr(of, name)
    ]


CASES: list[Sections] = [
    {"noise": {"method": "none"}},
    {"comm": {"reduction": "exact32"}},
    {"comm": {"reduction": "exact16"}, "noise": {"method": "langevin"}},
    {"comm": {"reduction": "float"}, "noise": {"sharing": "micro_batch", "scale": "filter"}},
    {"noise": {"sharing": "micro_batch", "draws": 2, "mix": 0.5}, "optimizer": {"clip_norm": 0.5}},
    {"noise": {"method": "sam", "sharing": "micro_batch"}},
    {"noise": {"method": "arwp", "sharing": "micro_batch", "target_rise": 0.05}},
    {"regularization": {"mixup": 0.2, "cutmix": 1.0, "label_smoothing": 0.1}, "data": {"augment": "crop-flip"}},
    {"precision": {"compute": "bfloat16"}, "model": {"norm": "batch"}},
    {"batch": {"schedule": [{"epoch": 1, "global_size": 50}]}, "model": {"norm": "group"}},
]


@pytest.mark.parametrize("sections", CASES, ids=str)
def test_graphs_give_the_same_bits_and_read_what_changes_from_their_buffers(tmp_path: Path, sections: Sections) -> None:
    plain = trainer_of(tmp_path / "plain", sections, None, SingleProcess())
    recorder = OperatorRecorder()
    graphed = trainer_of(tmp_path / "graphed", sections, recorder, SingleProcess())
    state: list[Tensor] = []
    assert train(graphed, state) == train(plain)
    assert state_bits(graphed.network) == state_bits(plain.network)
    assert recorder.replays > recorder.warm_ups
    graphs = graphed.training_step._graphs
    assert graphs is not None
    buffers = {address_of(buffer) for group in graphs._buffers.values() for buffer in group}
    assert buffers <= recorder.changed.keys()
    assert recorder.changed.keys() - buffers <= set(map(address_of, state))


def test_each_kind_of_pass_is_made_once_then_recorded_then_replayed(tmp_path: Path) -> None:
    recorder = OperatorRecorder()
    train(trainer_of(tmp_path, {}, recorder, SingleProcess()))
    assert (recorder.warm_ups, recorder.recordings, recorder.replays) == (1, 1, UPDATES * PASSES - 1)


@pytest.mark.parametrize("ranks", [2, 3])
def test_graphs_give_the_same_bits_on_several_ranks(tmp_path: Path, ranks: int) -> None:
    alone = trainer_of(tmp_path / "alone", {}, None, SingleProcess())
    train(alone)

    def bits(comm: Communicator) -> dict[str, bytes]:
        trainer = trainer_of(tmp_path / "graphed", {}, OperatorRecorder(), comm)
        train(trainer)
        return state_bits(trainer.network)

    assert results(ranks, bits) == [state_bits(alone.network)] * ranks


def test_a_gradient_out_of_range_within_a_graph_ends_the_run_with_clean_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_of(tmp_path, {}, OperatorRecorder(), SingleProcess())
    trainer.advance()
    step = trainer.training_step
    before, read = step.weights.values.clone(), step.samples.read

    def read_with_a_damaged_pixel(request: BatchRequest) -> tuple[Tensor, Tensor]:
        inputs, labels = read(request)
        if len(labels) == 6:  # not the last micro-batch, which is no graph
            inputs[0, 0, 0, 0] = torch.nan
        return inputs, labels

    monkeypatch.setattr(step.samples, "read", read_with_a_damaged_pixel)
    with raises(DivergedError, "step-not-finite"):
        trainer.advance()
    assert torch.equal(step.weights.values, before)
    assert step.weights.parameters[0].data_ptr() == step.weights.values.data_ptr()


def test_a_graph_is_replayed_only_with_the_constants_and_the_layout_of_its_recording() -> None:
    recorder = OperatorRecorder()
    graphs = MicroBatchGraphs(recorder)
    total = torch.zeros(1)

    def run(size: int, factor: float) -> None:
        graphs.run(
            lambda inputs, target: total.add_(inputs.sum() * factor),
            torch.ones(size, 2),
            Target(torch.ones(size, dtype=torch.int64)),
            factor,
        )

    for size, factor in [(2, 1.0), (2, 2.0), (3, 1.0)] * 3:
        run(size, factor)
    assert total == 3 * (4 + 8 + 6)
    assert (recorder.warm_ups, recorder.recordings, recorder.replays) == (3, 3, 6)


def test_a_batch_of_twice_the_size_at_twice_the_loss_scale_records_anew(tmp_path: Path) -> None:
    """The sum of losses is divided by the same number, the gradient is not."""
    sections: Sections = {"batch": {"schedule": [{"epoch": 1, "global_size": 52}]}, "model": {"norm": "group"}}

    def bits(folder: Path, recorder: OperatorRecorder | None) -> dict[str, bytes]:
        trainer = trainer_of(folder, sections, recorder, SingleProcess())
        trainer.training_step = replace(trainer.training_step, loss_scale=LossScale(trainer.progress))
        for _ in range(3):
            trainer.advance()
        trainer.progress.loss_scale = 2 * trainer.training_step.loss_scale.value
        trainer.advance()
        return state_bits(trainer.network)

    assert bits(tmp_path / "graphed", OperatorRecorder()) == bits(tmp_path / "plain", None)


def test_a_step_with_another_reduction_records_anew(tmp_path: Path) -> None:
    recorder = OperatorRecorder()
    trainer = trainer_of(tmp_path, {}, recorder, SingleProcess())
    trainer.advance()
    step = trainer.training_step
    trainer.training_step = replace(step, clock=step.clock)
    assert trainer.training_step._graphs is not step._graphs


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Mock:
    """Stand-ins for what torch.cuda needs a GPU for."""
    found = Mock()
    found.graph.return_value = nullcontext()
    found.stream.side_effect = lambda stream: nullcontext()
    for name in ("CUDAGraph", "Stream", "current_stream", "graph", "graph_pool_handle", "set_stream", "stream"):
        monkeypatch.setattr(torch.cuda, name, getattr(found, name))
    return found


def test_a_cuda_graph_is_recorded_on_the_stream_that_was_warm_and_other_threads_may_go_on(cuda: Mock) -> None:
    recorder, launch = CudaGraphRecorder(), Mock()
    recorder.warm_up(launch)
    stream, current = cuda.Stream.return_value, cuda.current_stream.return_value
    stream.wait_stream.assert_called_once_with(current)
    current.wait_stream.assert_called_once_with(stream)
    replay = recorder.record(launch)
    graph, pool = cuda.CUDAGraph.return_value, cuda.graph_pool_handle.return_value
    cuda.graph.assert_called_once_with(graph, pool, stream, capture_error_mode="thread_local")
    assert launch.call_count == 2
    assert replay is graph.replay


def test_no_garbage_is_collected_while_a_graph_is_recorded(cuda: Mock) -> None:
    collects: list[bool] = []
    CudaGraphRecorder().record(lambda: collects.append(gc.isenabled()))
    assert collects == [False]
    assert gc.isenabled()


def test_graphs_share_a_pool_until_all_of_them_are_gone(cuda: Mock) -> None:
    cuda.CUDAGraph.side_effect = Mock
    cuda.graph_pool_handle.side_effect = ["first", "second"]
    recorder = CudaGraphRecorder()
    replays = [recorder.record(Mock()), recorder.record(Mock())]
    assert [call.args[1] for call in cuda.graph.call_args_list] == ["first", "first"]
    cuda.reset_mock()  # its calls hold the graphs
    replays.clear()
    gc.collect()
    recorder.record(Mock())
    assert cuda.graph.call_args.args[1] == "second"


@contextmanager
def failing_at_its_end() -> Iterator[None]:
    """As torch's context of a recording in which something has failed."""
    try:
        yield
    finally:
        raise RuntimeError("operation failed due to a previous error during capture")


@pytest.mark.parametrize("recording", [nullcontext, failing_at_its_end])
def test_what_cannot_be_recorded_is_refused_and_named(
    cuda: Mock, recording: Callable[[], AbstractContextManager[None]]
) -> None:
    cuda.graph.return_value = recording()
    error = RuntimeError("CUDA error: not permitted when stream is capturing\nCompile with TORCH_USE_CUDA_DSA")
    with raises(UsageError, "cuda-graphs-capture") as caught:
        CudaGraphRecorder().record(Mock(side_effect=error))
    assert "not permitted when stream is capturing; set precision.cuda_graphs" in str(caught.value)
    cuda.set_stream.assert_called_once_with(cuda.current_stream.return_value)


@pytest.mark.parametrize("recording", [nullcontext, failing_at_its_end])
def test_a_lack_of_memory_while_recording_stays_one(
    cuda: Mock, recording: Callable[[], AbstractContextManager[None]]
) -> None:
    cuda.graph.return_value = recording()
    with pytest.raises(torch.OutOfMemoryError):
        CudaGraphRecorder().record(Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory")))


def test_reading_a_value_within_a_pass_cannot_be_recorded() -> None:
    graphs = MicroBatchGraphs(OperatorRecorder())
    inputs, target = torch.ones(1, 1), Target(torch.ones(1, dtype=torch.int64))
    graphs.run(lambda inputs, target: float(inputs), inputs, target)
    with pytest.raises(AssertionError, match="wait for the device"):
        graphs.run(lambda inputs, target: float(inputs), inputs, target)
