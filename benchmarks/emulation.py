"""Emulates a step on a GPU: tensors have device, dtype and shape, but no values (torch's FakeTensor).

It shows operators that mix devices, where the host waits for the device, and how many bytes a step reads and writes.
Where there is no GPU autograd needs a small preloaded library: `emulate` starts a process with it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import dist_train
from benchmarks.bare_loop import bare_vgg9
from dist_train.checkpoint.state import Progress, TrainState
from dist_train.cluster.communicator import SingleProcess
from dist_train.config import Config, parse_config
from dist_train.data.images import BatchRequest
from dist_train.data.loader import open_splits
from dist_train.data.plan import BatchPlan
from dist_train.kernels import operators
from dist_train.launching.assembly import build_step
from dist_train.models import build_loss, build_model
from dist_train.models.norms import fuse_relus
from dist_train.optim.averaging import Averaging
from dist_train.optim.flat_weights import FlatWeights
from dist_train.optim.noise import build_noise
from dist_train.optim.optimizers import build_optimizer, optimizer_step
from dist_train.outcome import UsageError
from dist_train.training.compute import Compute
from dist_train.training.dealing import build_dealing
from dist_train.training.graphs import GraphRecorder
from dist_train.training.measuring import StepClock
from dist_train.training.step import GlobalBatch

KNOWN_WAITS = frozenset({"training/reduction.py:result"})
"""Where a step may wait for the device: for the sum over the ranks, with the gradient's norm."""

_DEVICE = torch.device("cuda", 0)
_PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_PACKAGE = Path(dist_train.__file__).parent
_SLOT_OF_SAMPLES = 2
"""Index in the tally; a step compares this entry with the number of samples that it expects."""
_NO_KERNEL = frozenset(
    {
        "alias",
        "detach",
        "empty",
        "empty_like",
        "empty_strided",
        "lift_fresh",
        "new_empty",
        "new_empty_strided",
        "_unsafe_view",
    }
)
_FUSED = frozenset({"_fused_sgd_", "_fused_adam_", "_fused_adamw_"})
_WRITTEN_ALONE = frozenset({"copy_", "fill_", "random_bits_", "zero_"})
"""Operators that write their first argument without reading it."""


@dataclass(frozen=True)
class Job:
    """A step to emulate: rank 0 of `ranks` ranks with the configuration `sections`.

    If `plain` is not 0, plain PyTorch (batch norm, fused SGD) computes the rank's share, `plain` samples per pass.
    Without `triton`, torch's operators take the place of our kernels, as where there is no compiler.
    """

    sections: Mapping[str, Mapping[str, Any]]
    ranks: int = 1
    plain: int = 0
    triton: bool = True


@dataclass(frozen=True)
class Emulated:
    """The number of device operators, the bytes that they read and write, and the host's waits by place.

    A replayed CUDA graph is one operator, with the bytes of all that it holds.

    `mixed`: operators with tensors on two devices; `error`: why the step ended early, empty if it did not.
    """

    operators: int
    bytes: int
    waits: Mapping[str, int]
    mixed: tuple[str, ...]
    error: str


def emulate(jobs: Sequence[Job]) -> list[Emulated]:
    """Emulate `jobs` in a separate process and return the results.

    Raises:
        UsageError: this torch cannot emulate a GPU here.
    """
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "LD_PRELOAD": str(_library(Path(folder)))}
        ended = subprocess.run(
            [sys.executable, "-m", "benchmarks.emulation"],
            input=json.dumps([asdict(job) for job in jobs]),
            env=environment,
            cwd=Path(__file__).parent.parent,
            capture_output=True,
            text=True,
        )
    if ended.returncode:
        raise UsageError(
            f"torch {torch.__version__} cannot emulate a GPU here: {ended.stderr[-2000:]}", code="emulation-failed"
        )
    return [Emulated(**{**found, "mixed": tuple(found["mixed"])}) for found in json.loads(ended.stdout)]


def _library(folder: Path) -> Path:
    """Compile the library to preload into `folder`, and return its path."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        raise UsageError("emulating a GPU needs a C++ compiler: install g++", code="compiler-missing")
    of_torch, library = Path(torch.__file__).parent, folder / "stand_in_gpu.so"
    libraries = of_torch / "lib"
    command = [compiler, "-std=c++20", "-shared", "-fPIC", f"-I{of_torch / 'include'}"]
    command += [f"-I{sysconfig.get_path('include')}", str(Path(__file__).with_name("stand_in_gpu.cpp"))]
    command += ["-o", str(library), f"-L{libraries}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{libraries}"]
    compiled = subprocess.run(command, capture_output=True, text=True)
    if compiled.returncode:
        raise UsageError(
            f"torch {torch.__version__} cannot emulate a GPU: stand_in_gpu.cpp does not compile: "
            f"{compiled.stderr[-2000:]}",
            code="emulation-failed",
        )
    return library


class _OperatorCounter(TorchDispatchMode):
    """Counts operators on the device, and supplies values when the host reads one, which fake tensors do not have."""

    def __init__(self, samples: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch gives it no types
        self._samples = samples
        self.operators: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self.mixed: list[str] = []
        self._is_recording = False

    def warm_up(self, launch: Callable[[], None]) -> None:
        """Call `launch`, as a `GraphRecorder`."""
        launch()

    def record(self, launch: Callable[[], None]) -> Callable[[], None]:
        """Call `launch` without counting it; return a function that counts it as one operator."""
        counted = self.operators, self.bytes
        self.operators, self.bytes, self._is_recording = Counter(), Counter(), True
        try:
            launch()
            size = self.bytes.total()
        finally:
            (self.operators, self.bytes), self._is_recording = counted, False

        def replay() -> None:
            self.operators["replay"] += 1
            self.bytes["replay"] += size

        return replay

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func._opname
        if name == "_local_scalar_dense":
            return self._value(args[0])
        if name == "_pin_memory":
            pinned = args[0].clone()
            pinned.is_pinned_here = True
            return pinned
        # FakeTensor does not support fused optimizers, which return nothing.
        result = None if name in _FUSED else func(*args, **kwargs)
        if name in ("convolution", "convolution_backward"):
            result = _in_layout_of(result, args[1] if name == "convolution_backward" else args[0])
        inputs, outputs = _tensors((args, kwargs)), _tensors(result)
        is_copy = name in ("_to_copy", "copy_")
        # Kernels take a number on the host as an argument; a copy reads it from memory.
        places = {tensor.device.type for tensor in (*inputs, *outputs) if tensor.dim() or tensor.is_cuda or is_copy}
        if "cuda" not in places or func.namespace not in ("aten", "dist_train") or name in _NO_KERNEL:
            return result
        if "cpu" in places:
            if self._is_recording:
                raise RuntimeError(f"a graph would keep the address of host memory: {func} in {_calling_function()}")
            if not is_copy:
                self.mixed.append(f"{func} in {_calling_function()}")
            elif not kwargs.get("non_blocking", args[2:] == (True,)) or any(
                # CUDA first waits for the stream before it copies from memory that is not pinned.
                not hasattr(tensor, "is_pinned_here")
                for tensor in inputs
                if not tensor.is_cuda
            ):
                self._note_wait(_calling_function())
        if not _is_view(func):
            self.operators[name] += 1
            self.bytes[name] += _bytes(func, args, kwargs, result)
        return result

    def _value(self, tensor: Tensor) -> bool | int | float:
        if tensor.is_cuda:
            place = _calling_function()
            self._note_wait(place)
            if place == "training/reduction.py:result":
                return self._samples if tensor.storage_offset() == _SLOT_OF_SAMPLES else 0
        return 1.0 if tensor.is_floating_point() else tensor.dtype != torch.bool and 0

    def _note_wait(self, place: str) -> None:
        if self._is_recording:
            raise RuntimeError(f"a graph cannot record a wait for the device: {place}")
        self.waits[place] += 1


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _in_layout_of(result: Any, inputs: Tensor) -> Any:
    """Return a convolution's result in the layout of `inputs`, as cuDNN does; torch's CPU build loses the layout."""
    if not inputs.is_contiguous(memory_format=torch.channels_last):
        return result
    return tree_map_only(Tensor, lambda each: _channels_last(each) if each.dim() == 4 else each, result)


def _channels_last(images: Tensor) -> Tensor:
    return torch.empty_like(images, memory_format=torch.channels_last)


def _is_view(func: Any) -> bool:
    """Whether `func` returns only views of its arguments."""
    returned = [value.alias_info for value in func._schema.returns]
    return bool(returned) and all(info is not None and not info.is_write for info in returned)


def _bytes(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> int:
    """Return the bytes that `func` reads and writes."""
    total = 0
    given = {**dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)), **kwargs}
    for index, argument in enumerate(func._schema.arguments):
        size = sum(tensor.nbytes for tensor in _tensors(given.get(argument.name)))
        written = argument.alias_info is not None and argument.alias_info.is_write
        reads = not written or not (argument.is_out or (index == 0 and func._opname in _WRITTEN_ALONE))
        total += size * (written + reads)
    results = result if isinstance(result, tuple | list) and len(func._schema.returns) > 1 else (result,)
    for value, described in zip(results, func._schema.returns, strict=False):
        if described.alias_info is None:
            total += sum(tensor.nbytes for tensor in _tensors(value))
    return total


def _calling_function() -> str:
    """Return the innermost running function of the package, as FILE:FUNCTION."""
    frame = sys._getframe()
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(_PACKAGE):
            return f"{path.relative_to(_PACKAGE)}:{frame.f_code.co_name}"
        frame = frame.f_back  # type: ignore[assignment]  # None after the outermost
    return "elsewhere"


class _Compute(Compute):
    """Compute on a GPU; torch's autocast context refuses to cast without a GPU."""

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """Use the precision in forward passes within the block."""
        torch.set_autocast_dtype("cuda", self.precision)
        torch.set_autocast_enabled("cuda", self.precision != torch.float32)
        torch.autocast_increment_nesting()
        try:
            yield
        finally:
            if torch.autocast_decrement_nesting() == 0:
                torch.clear_autocast_cache()
            torch.set_autocast_enabled("cuda", False)


class _Rank0(SingleProcess):
    """Rank 0 of `size` ranks; the others contribute nothing."""

    def __init__(self, size: int) -> None:
        self.size = size


def _on_device(network: nn.Module) -> nn.Module:
    """Return `network` on the device, with uninitialized values."""
    for module in network.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(torch.empty(parameter.shape, device=_DEVICE)))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype, device=_DEVICE))
    return network


def _our_step(config: Config, network: nn.Module, ranks: int, recorder: GraphRecorder) -> Callable[[], object]:
    """Return a function that makes one update as our program does; `network` is the model of `config`."""
    comm, compute = _Rank0(ranks), _Compute(_DEVICE, _PRECISIONS[config.precision.compute])
    splits = open_splits(config.data, config.run.seed, _DEVICE, config.precision.channels_last)
    fuse_relus(network)
    weights = FlatWeights(network)
    state = TrainState(
        network,
        weights,
        build_optimizer(config.optimizer, weights),
        Averaging(config.averaging, weights, 1),
        build_noise(config.noise, weights, seed=config.run.seed, total_steps=100, rank=0),
    )
    step = build_step(
        config,
        network,
        build_loss(config, compute.device),
        state,
        splits.train,
        comm,
        compute,
        # exact32's grids; without them this would be the first update, which sums in 64 bits.
        Progress(grid_exponents=[30] * len(weights.segments)),
        clock=StepClock(SingleProcess()),
        graph_recorder=recorder if config.precision.cuda_graphs else None,
    )
    assert config.batch.micro_size != "auto", "to be named"
    plan = BatchPlan(config.batch.global_size, config.batch.micro_size)
    mine = build_dealing(config, plan, comm).share(0)
    partners = int(config.regularization.mixes)
    pace = int(config.batch.dealing == "measured")
    batch = GlobalBatch(0, 0, torch.arange(config.batch.global_size), mine, partners=partners, pace=pace)
    return lambda: step(batch, 0.1, lambda: False)


def _plain_step(config: Config, network: nn.Module, samples: int, size: int) -> Callable[[], object]:
    """Return a function that makes one update of `samples` samples as in plain PyTorch, `size` per pass."""
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, nesterov=True, fused=True)
    images, labels = open_splits(config.data, 0, torch.device("cpu")).train.read(BatchRequest(torch.arange(0, samples)))
    images, labels = images.to(torch.uint8).to(_DEVICE), labels.to(_DEVICE)
    chosen = torch.arange(samples, device=_DEVICE)

    def update() -> None:
        optimizer.zero_grad()
        for part in chosen.split(size):
            inputs = images[part].to(torch.float32, memory_format=torch.channels_last).div_(255)
            loss = functional.cross_entropy(network(inputs), labels[part], reduction="sum") / samples
            loss.backward()
        optimizer_step(optimizer)

    return update


def _emulate(job: Job) -> tuple[Emulated, Counter[str], Counter[str]]:
    """Return the result of `job`, and its counts and bytes by operator."""
    config = parse_config(job.sections, source="emulation")
    images, share = config.data.image_format, config.batch.global_size // job.ranks
    network = bare_vgg9(images.shape[0], images.classes, config.model.width) if job.plain else build_model(config)
    points = config.noise.points if config.noise.passes == "all" else 1
    # Nothing is computed, so Triton is not needed.
    operators.has_triton = lambda: job.triton
    watch = _OperatorCounter(config.batch.global_size * points)
    error = ""
    with FakeTensorMode(), watch:
        try:
            on_device = _on_device(network)
            step = (
                _plain_step(config, on_device, share, job.plain)
                if job.plain
                else _our_step(config, on_device, job.ranks, watch)
            )
            if job.plain or config.precision.cuda_graphs:
                step()  # the plain optimizer creates its state, which ours has from the start; graphs are recorded
            for counter in (watch.operators, watch.bytes, watch.waits):
                counter.clear()
            step()
        except Exception as failure:
            error = f"{type(failure).__name__}: {failure} in {_raised_at(failure)}"
    work = sum(watch.operators.values()), sum(watch.bytes.values())
    return Emulated(*work, dict(watch.waits), tuple(watch.mixed), error), watch.operators, watch.bytes


def _raised_at(failure: BaseException) -> str:
    """Return the file and line of the package where `failure` was raised."""
    lines = []
    trace = failure.__traceback__
    while trace is not None:
        path = Path(trace.tb_frame.f_code.co_filename)
        if path.is_relative_to(_PACKAGE):
            lines.append(f"{path.relative_to(_PACKAGE)}:{trace.tb_lineno}")
        trace = trace.tb_next
    return lines[-1] if lines else "the emulation"


def _emulate_all(jobs: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    for job in jobs:
        yield asdict(_emulate(Job(**job))[0])


if __name__ == "__main__":
    print(json.dumps(list(_emulate_all(json.load(sys.stdin)))))
