"""How a rank computes: device, threads, precision, deterministic kernels, and the loss scale for float16."""

from __future__ import annotations

import gc
import logging
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from dist_train.checkpoint.state import Progress
from dist_train.cluster.communicator import Communicator, gather_int, signed_digest
from dist_train.config import PrecisionSettings
from dist_train.kernels import operators
from dist_train.outcome import CodedError, UsageError, refuse_nondeterministic
from dist_train.start_up import (
    bound_cores,
    keep_freed_memory,
    keep_small_objects_together,
    usable_cores,
    use_large_pages,
)

_PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_OUT_OF_MEMORY = (
    "can't allocate memory",
    ": out of memory",  # CUDA error, HIP error, Triton Error [CUDA]: a kernel's code takes memory when it is loaded
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED",  # from cublasCreate if its workspace does not fit
    "CUDNN_STATUS_ALLOC_FAILED",
    "_ALLOCATION_FAILED",  # cuDNN 9, for host and device memory
    "valid cuDNN algorithm to run convolution",  # all of them need more workspace than is free
    "unable to find an engine to execute",
)

_PRODUCTS = ("matmul", "conv", "rnn")
_GRAPHS_OF_A_SIZE = 8  # at most, of one function: with and without gradients, of modules that share it
_LONGEST_DETAIL = 300  # characters of an error: a compiler's has its whole command line


@dataclass(frozen=True)
class Compute:
    """A device and the precision of forward passes on it."""

    device: torch.device
    precision: torch.dtype
    uses_tf32: bool = False
    """Whether convolutions and matrix products round float32 to TF32."""

    def autocast(self) -> AbstractContextManager[None]:
        """Return a context in which forward passes use `precision`."""
        return torch.autocast(self.device.type, dtype=self.precision, enabled=self.precision != torch.float32)

    def rounded(self, weights: torch.Tensor) -> torch.Tensor:
        """Return float32 `weights` as convolutions and linear layers read them."""
        if self.uses_tf32:  # 10 bits behind the leading one, of the 23 of float32
            return weights.view(torch.int32).add(1 << 12).bitwise_and_(-1 << 13).view(torch.float32)
        return weights.to(self.precision)


def set_up_compute(settings: PrecisionSettings, device: torch.device) -> Compute:
    """Set up threads, memory and kernels according to `settings`, for `device`.

    Raises UsageError if the device does not support the precision, or Triton is there but unusable.
    """
    assert settings.threads != "auto", "decided when the run starts"
    if settings.compute == "float16" and device.type != "cuda":
        raise UsageError("precision.compute: float16 needs a GPU; use bfloat16", code="float16-on-cpu")
    uses_triton = device.type == "cuda" and operators.has_triton()
    # Before sm_80 torch emulates bfloat16, but our kernels do not compile: ptxas has no .bf16.
    compiles_bfloat16 = settings.compute == "bfloat16" and uses_triton and not torch.version.hip
    if compiles_bfloat16 and torch.cuda.get_device_capability(device) < (8, 0):
        raise UsageError("precision.compute: this GPU has no bfloat16; use float16", code="bfloat16-on-old-gpu")
    if settings.cuda_graphs and device.type != "cuda":
        raise UsageError("precision.cuda_graphs: CUDA graphs need a GPU; set it to false", code="cuda-graphs-on-cpu")
    lacks_bfloat16 = device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX2"  # oneDNN needs AVX-512
    if settings.compute == "bfloat16" and lacks_bfloat16:
        _logger.warning("precision.compute: this processor has no AVX-512: bfloat16 is many times slower than float32")
    torch.set_num_threads(settings.threads)
    if keep_freed_memory() and device.type == "cpu":
        use_large_pages()
        keep_small_objects_together()
    for products in _precisions():
        products.fp32_precision = "none"  # a caller's value would outlast the flags below, which do not set all
    torch.set_float32_matmul_precision("highest")  # a caller's "medium" means bfloat16 on CPUs
    # Not torch's newer fp32_precision: with it set, torch.compile fails to read these flags (2.15).
    torch.backends.cuda.matmul.allow_tf32 = settings.tf32
    torch.backends.cudnn.allow_tf32 = settings.tf32
    _set_deterministic(settings.deterministic is True)
    if uses_triton:
        _check_triton(device)
    is_float32 = settings.compute == "float32"
    uses_tf32 = is_float32 and settings.tf32 and device.type == "cuda" and torch.cuda.is_tf32_supported()
    return Compute(device, _PRECISIONS[settings.compute], uses_tf32)


def _set_deterministic(is_deterministic: bool) -> None:
    _use_deterministic_algorithms(is_deterministic, warn_only=False)
    torch.backends.cudnn.deterministic = is_deterministic
    # torch and cuBLAS read it only at the process's first matrix product on a GPU, and a later run may need it.
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    if not is_deterministic:
        return
    # A debugging aid that costs one more kernel for every new tensor. torch defines the property at run time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False


def _use_deterministic_algorithms(mode: bool, *, warn_only: bool) -> None:
    """Call torch's function of this name, which loads the compiler, only if it changes something."""
    if (mode, warn_only) != _deterministic_algorithms():
        torch.use_deterministic_algorithms(mode, warn_only=warn_only)


def _deterministic_algorithms() -> tuple[bool, bool]:
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()


@contextmanager
def restoring_torch() -> Iterator[None]:
    """Restore what `set_up_compute` and `choose_device` change of torch for the whole process, after the block.

    Within it gradients are recorded, and new tensors are by default float32 and on the CPU, whatever the caller set.
    No autocast of the caller applies: it would cast backward passes even where forward passes disable it, and keep the
    casts of weights for as long as it lasts.
    """
    cudnn, debugging = torch.backends.cudnn, torch.utils.deterministic
    with ExitStack() as stack:
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        if torch.cuda.is_initialized():
            stack.callback(_set_gpu, torch.cuda.current_device())
        mode, warn_only = _deterministic_algorithms()
        stack.callback(_use_deterministic_algorithms, mode, warn_only=warn_only)
        flags = (cudnn, "deterministic"), (cudnn, "benchmark"), (debugging, "fill_uninitialized_memory")
        for owner, name in flags:
            stack.callback(setattr, owner, name, getattr(owner, name))
        for products in _precisions():
            # Restored last: the older settings below change them, also when they are restored.
            stack.callback(_set_precision, products, products.fp32_precision)
        with suppress(RuntimeError):  # torch's newer fp32_precision is in use
            stack.callback(setattr, cudnn, "allow_tf32", cudnn.allow_tf32)
            stack.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
        stack.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.float32)
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        stack.enter_context(torch.inference_mode(mode=False))
        stack.enter_context(torch.enable_grad())
        _leave_autocasts(stack)
        yield


def _set_gpu(index: int) -> None:
    with suppress(RuntimeError):  # the GPU has failed, as the error says that ends the block
        torch.cuda.set_device(index)


def _leave_autocasts(stack: ExitStack) -> None:
    """Leave the caller's autocasts until `stack` ends: an inner autocast that is disabled would still count as one."""
    for kind in ("cpu", "cuda"):
        stack.callback(torch.set_autocast_enabled, kind, torch.is_autocast_enabled(kind))
        torch.set_autocast_enabled(kind, False)
    torch.autocast_increment_nesting()
    while torch.autocast_decrement_nesting() > 0:
        stack.callback(torch.autocast_increment_nesting)


def _set_precision(products: Any, precision: str) -> None:
    if products.fp32_precision != precision:
        products.fp32_precision = precision


def _precisions() -> list[Any]:
    """Return torch's owners of the newer `fp32_precision` (2.9 on), each before the one that its "none" refers to."""
    backends = torch.backends
    names = ((backend, name) for backend in (backends.cuda, backends.cudnn, backends.mkldnn) for name in _PRODUCTS)
    owners = (*(getattr(backend, name, None) for backend, name in names), backends.cudnn, backends.mkldnn, backends)
    return [owner for owner in owners if hasattr(owner, "fp32_precision")]


def _check_triton(device: torch.device) -> None:
    """Raise UsageError if Triton cannot build a kernel, or the device cannot run it."""
    try:
        torch.ops.dist_train.random_bits_(torch.empty(2, dtype=torch.int32, device=device), 0, 0)
        torch.cuda.synchronize(device)
    except Exception as error:  # of nearly any type: from Triton, the C compiler, the linker, the disk
        detail = " ".join(f"{type(error).__name__}: {error}".split())[:_LONGEST_DETAIL]
        raise UsageError(
            f"Triton cannot build its kernels ({detail}): it needs a C compiler with its headers (on Debian gcc and "
            f"libc6-dev) and a folder to write to, ~/.triton or TRITON_CACHE_DIR. Or set DIST_TRAIN_TRITON=off on all "
            f"ranks, which uses torch's slower operators",
            code="triton-unusable",
        ) from error


def compiled(network: nn.Module, sizes: int) -> nn.Module:
    """Return `network` compiled for batches of `sizes` sizes, each with kernels of its own.

    By default torch compiles the second size that it sees for all further sizes, too: the kernels, and with them the
    bits, would depend on which sizes a process has seen. If kernels must be deterministic, none is chosen by its time.
    """
    from torch._dynamo import config

    for name in ("recompile_limit", "accumulated_recompile_limit"):  # beyond these torch compiles no more
        setattr(config, name, max(getattr(config, name), _GRAPHS_OF_A_SIZE * sizes))
    options = _untimed_kernels() if torch.are_deterministic_algorithms_enabled() else None
    return cast(nn.Module, torch.compile(network, dynamic=False, options=options))


def _untimed_kernels() -> dict[str, Any]:
    """Return the options that keep Inductor from choosing, by time, between kernels that sum in different orders."""
    from torch._inductor import config

    wanted = {"deterministic": True, "dynamic_scale_rblock": False, "shape_padding": False}
    return {name: value for name, value in wanted.items() if hasattr(config, name)}


def share_of_threads(comm: Communicator) -> int:
    """Return this rank's CPU threads: OMP_NUM_THREADS if set, else its cores divided by the ranks that share them.

    All ranks call it. srun and mpirun may bind each rank to cores of its own.
    """
    cores = signed_digest(f"{socket.gethostname()} {sorted(bound_cores())}".encode())
    sharing = gather_int(comm, cores, "cores").count(cores)
    requested = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    if requested.isdecimal() and int(requested) > 0:
        return int(requested)
    return max(1, usable_cores() // sharing)


def runs_in_memory(work: Callable[[], object]) -> bool:
    """Call `work`; return False if memory runs out. Raises UsageError if an operator has no deterministic kernel."""
    failed_before = failed_allocations()
    try:
        work()
    except (RuntimeError, MemoryError) as error:
        refuse_nondeterministic(error)
        if not is_out_of_memory(error):
            raise
        # The error is not kept: the frames of its traceback hold the tensors of the failed pass.
        return False
    return failed_allocations() == failed_before


def free_device_memory() -> None:
    """Return unused memory to the device; on CPUs, only free what reference cycles still hold.

    A user's model or torch.compile may leave such cycles behind.
    """
    gc.collect()
    torch.cuda.empty_cache()  # does nothing if no GPU is in use


def failed_allocations() -> int:
    """Return how often the GPU's memory has run out in this process, if kernels must be deterministic; else 0.

    It need not have raised an error: if the workspace of a cuDNN convolution does not fit, torch uses another
    algorithm, with other bits, from then on. Torch's allocator counts that, but no attempt that succeeds once its cache
    is emptied.
    """
    if not torch.are_deterministic_algorithms_enabled():
        return 0
    return int(torch.cuda.memory_stats_as_nested_dict().get("num_ooms", 0))


@contextmanager
def fitting_memory(what: str, fix: str) -> Iterator[None]:
    """Turn a lack of memory in the block into a UsageError that says that `what` does not fit, and the `fix`."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise UsageError(f"{what} does not fit the memory of host or device: {fix}", code="out-of-memory") from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error`, raised by torch or CUDA's libraries, means that memory is exhausted."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    # A CodedError is this package's; the text of a GroupBrokenError may be the message of another rank that ran out.
    is_foreign = isinstance(error, RuntimeError) and not isinstance(error, CodedError)
    return is_foreign and any(text in str(error) for text in _OUT_OF_MEMORY)


FIRST_LOSS_SCALE = 2.0**16
LOWEST_LOSS_SCALE = 1.0
HIGHEST_LOSS_SCALE = 2.0**24
UPDATES_UNTIL_RAISED = 2000
_logger = logging.getLogger("dist_train.training")


class LossScale:
    """The factor by which losses are multiplied and their gradients divided; the same on all ranks.

    Without `progress` it is always 1: for types with the range of float32. For float16 it is kept in `progress`, which
    checkpoints hold; it is halved by each overflow and doubled after many updates without one.
    """

    def __init__(self, progress: Progress | None = None) -> None:
        self._progress = progress
        if progress is not None and progress.loss_scale is None:
            progress.loss_scale, progress.updates_since_overflow = FIRST_LOSS_SCALE, 0

    @property
    def value(self) -> float:
        """The factor: a power of two."""
        return self._progress.loss_scale or FIRST_LOSS_SCALE if self._progress is not None else 1.0

    def lower(self) -> None:
        """Halve the factor after an overflow, unless it is LOWEST_LOSS_SCALE: then the run has diverged."""
        assert self._progress is not None, "it is always the lowest"
        self._set(self._progress, self.value / 2, self._progress.step + 1)

    def note_update(self) -> None:
        """Count an update without overflow; double the factor after many of them."""
        if self._progress is None:
            return
        self._progress.updates_since_overflow = (self._progress.updates_since_overflow or 0) + 1
        if self._progress.updates_since_overflow >= UPDATES_UNTIL_RAISED:
            # This update is not yet counted in `step`.
            self._set(self._progress, min(HIGHEST_LOSS_SCALE, self.value * 2), self._progress.step + 2)

    def _set(self, progress: Progress, value: float, first_step: int) -> None:
        if value != progress.loss_scale:
            _logger.info("the loss scale is %g from step %d on", value, first_step)
        progress.loss_scale, progress.updates_since_overflow = value, 0
