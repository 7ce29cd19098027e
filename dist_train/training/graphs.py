"""CUDA graphs of micro-batches: the host launches a whole forward and backward pass by one call.

As in whole-network capture (pytorch.org/docs/stable/notes/cuda.html), the pass reads its samples from buffers that stay
where they are, and leaves what it computes (gradients, counts, statistics) in tensors allocated before. So graphs can
share a pool of memory, and be replayed in any order.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, Protocol
from weakref import WeakSet

import torch
from torch import Tensor

from dist_train.data.augmentation import Target
from dist_train.outcome import UsageError
from dist_train.start_up import without_collection
from dist_train.training.compute import is_out_of_memory

Pass = Callable[[Tensor, Target], object]
"""Adds up the gradient of a micro-batch's inputs and target; nothing that it allocates is used afterwards."""


class GraphRecorder(Protocol):
    """Records what a function launches on the device."""

    def warm_up(self, launch: Callable[[], None]) -> None:
        """Call `launch`, so that what it sets up at its first call is not recorded later."""

    def record(self, launch: Callable[[], None]) -> Callable[[], None]:
        """Record `launch`, without computing anything, and return a function that replays it."""


class CudaGraphRecorder:
    """Records CUDA graphs, which share a pool of memory."""

    def __init__(self) -> None:
        self._graphs: WeakSet[torch.cuda.CUDAGraph] = WeakSet()
        self._pool: Any = None
        # Both warm up and record: cuBLAS has a workspace for each stream.
        self._stream = torch.cuda.Stream()

    def warm_up(self, launch: Callable[[], None]) -> None:
        """Call `launch` on the stream on which it will be recorded."""
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                launch()
        finally:
            current.wait_stream(self._stream)

    def record(self, launch: Callable[[], None]) -> Callable[[], None]:
        """Record `launch` as a CUDA graph.

        Raises UsageError if it does something that cannot be recorded, such as a wait for the device.
        """
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        if not self._graphs:
            # torch refuses to record into a pool that has lost all its graphs while a tensor in it is in use.
            self._pool = torch.cuda.graph_pool_handle()
        self._graphs.add(graph)
        try:
            # Other threads (checkpoints, NCCL's, the loader's) may call CUDA meanwhile. A collection that destroyed an
            # earlier step's graphs would break the recording; torch makes none before it (since 2.9).
            with (
                without_collection(),
                torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"),
            ):
                launch()
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            # The failure may also make the end of the recording fail: with an error that says less, and before torch
            # has left the stream of the recording.
            torch.cuda.set_stream(current)
            first = error.__context__ or error
            if is_out_of_memory(first):
                raise first from None
            why = str(first).partition("\n")[0]  # CUDA's error has general advice below
            raise UsageError(
                f"the model's passes cannot be recorded: {why}; set precision.cuda_graphs to false",
                code="cuda-graphs-capture",
            ) from error
        return graph.replay


class MicroBatchGraphs:
    """Graphs of a training step's passes, one for each kind of pass. The first pass of a kind is not recorded."""

    def __init__(self, recorder: GraphRecorder) -> None:
        self._recorder = recorder
        self._buffers: dict[Hashable, tuple[Tensor, ...]] = {}
        self._replays: dict[Hashable, Callable[[], None] | None] = {}
        """None for a kind that is warm."""

    def run(self, add_gradient: Pass, inputs: Tensor, target: Target, *constants: Hashable) -> None:
        """Do what `add_gradient(inputs, target)` does.

        `constants` are all numbers and addresses in it that may change between calls: a graph keeps those that it was
        recorded with.
        """
        given = tuple(each for each in (inputs, target.labels, target.partners, target.share) if each is not None)
        layout = tuple((each.shape, each.stride(), each.dtype) for each in given)
        if layout not in self._buffers:
            self._buffers[layout] = tuple(map(torch.empty_like, given))
        buffers = self._buffers[layout]
        for buffer, each in zip(buffers, given, strict=True):
            buffer.copy_(each)

        def launch() -> None:
            add_gradient(buffers[0], Target(*buffers[1:]))

        kind = (layout, constants)
        if kind not in self._replays:
            self._recorder.warm_up(launch)
            self._replays[kind] = None
            return
        replay = self._replays[kind]
        if replay is None:
            replay = self._replays[kind] = self._recorder.record(launch)
        replay()
