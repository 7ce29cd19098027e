"""Our kernels as torch operators, `torch.ops.dist_train`, with shape functions for FakeTensor and torch.compile.

Those for GPUs are Triton's, imported when an operator is first called. Norms also have compiled kernels for CPUs.
"""

from __future__ import annotations

import os
import shutil
import sysconfig
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor


@cache
def why_no_triton() -> str:
    """Return why torch's operators are used on GPUs instead of Triton's kernels; empty if they are not.

    Triton builds its launchers with a C compiler and Python's header. `DIST_TRAIN_TRITON=off` must be set on all ranks.
    """
    if os.environ.get("DIST_TRAIN_TRITON") == "off":
        return "DIST_TRAIN_TRITON is off"
    if find_spec("triton") is None:
        return "Triton is not installed"
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "Triton needs a C compiler"
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    return "" if header.exists() else f"Triton needs {header}"


def has_triton() -> bool:
    """Whether Triton's kernels are used on GPUs."""
    return not why_no_triton()


def triton_version() -> str:
    """Return the version of Triton, whose distribution has another name in some builds of torch; "none" without it."""
    if not has_triton():
        return "none"
    import triton

    return str(triton.__version__)


@cache
def has_cpu_kernels() -> bool:
    """Whether the compiled kernels were built, which needs a C compiler, and find their OpenMP library."""
    try:
        from dist_train.kernels import _cpu  # noqa: F401
    except ImportError:
        return False
    return True


def has_norm_kernels(inputs: Tensor, weight: Tensor) -> bool:
    """Whether there are kernels for norms of `inputs`, on their device and of their type, and of `weight`."""
    if inputs.is_cuda:
        return inputs.dtype != torch.float64 and has_triton()
    if inputs.device.type != "cpu" or weight.dtype != torch.float32:
        return False
    return inputs.dtype in (torch.float32, torch.bfloat16) and has_cpu_kernels()


def norm_kernels(inputs: Tensor) -> ModuleType:
    """Return the module that normalizes tensors on the device of `inputs`; see `has_norm_kernels`."""
    if inputs.is_cuda:
        from dist_train.kernels import norms

        return norms
    from dist_train.kernels import cpu

    return cpu


def _normalize(inputs: Tensor, weight: Tensor, bias: Tensor, *others: object) -> object:
    _check_channels(inputs.shape[1], weight, bias)
    with torch.cuda.device_of(inputs):  # Triton launches on the current device
        return norm_kernels(inputs).normalize(inputs, weight, bias, *others)


def _gradients(
    upstream: Tensor, inputs: Tensor, weight: Tensor, bias: Tensor, moments: Tensor, *others: object
) -> object:
    if upstream.shape != inputs.shape:
        raise ValueError(f"the gradient of {list(inputs.shape)} has the shape {list(upstream.shape)}")
    _check_channels(inputs.shape[1], weight, bias, moments[0, 0])
    with torch.cuda.device_of(inputs):
        return norm_kernels(inputs).gradients(upstream, inputs, weight, bias, moments, *others)


def _check_channels(channels: int, *vectors: Tensor) -> None:
    """Raise ValueError unless each of `vectors` has as many values: kernels would read and write beyond their ends."""
    for each in vectors:
        if len(each) != channels:
            raise ValueError(f"a norm of {len(each)} channels was given {channels}")


def _flat_kernel(name: str) -> Callable[..., object]:
    """Return a function that calls the kernel `name` of `flat`, which loads Triton, on its first argument's device."""

    def call(tensor: Tensor, *others: object) -> object:
        from dist_train.kernels import flat

        with torch.cuda.device_of(tensor):
            return getattr(flat, name)(tensor, *others)

    return call


# schema, kernel, and the shapes of its results, for FakeTensor and torch.compile
_OPERATORS: tuple[tuple[str, Callable[..., object], Callable[..., object]], ...] = (
    (
        "ghost_norm(Tensor inputs, Tensor weight, Tensor bias, float epsilon, int size, int groups, bool relu) "
        "-> (Tensor outputs, Tensor moments)",
        _normalize,
        lambda inputs, weight, bias, epsilon, size, groups, relu: (
            torch.empty_like(inputs),
            weight.new_empty(3, groups, len(weight)),
        ),
    ),
    (
        "ghost_norm_backward(Tensor upstream, Tensor inputs, Tensor weight, Tensor bias, Tensor moments, int size, "
        "bool relu) -> (Tensor grad_inputs, Tensor grad_groups)",
        _gradients,
        lambda upstream, inputs, weight, bias, moments, size, relu: (
            torch.empty_like(inputs),
            torch.empty_like(moments[:2]),
        ),
    ),
    ("random_bits_(Tensor(a!) out, int low, int high) -> ()", _flat_kernel("random_bits"), lambda out, low, high: None),
    (
        "accumulate_(Tensor gradients, Tensor(a!) total, float scale, bool begun) -> Tensor largest",
        _flat_kernel("accumulate"),
        lambda gradients, total, scale, begun: gradients.new_empty(1),
    ),
    (
        "accumulate_on_grids_(Tensor gradients, Tensor(a!) total, Tensor(b!) largest, Tensor places, Tensor scales, "
        "int offset, bool begun) -> Tensor sizes",
        _flat_kernel("accumulate_on_grids"),
        lambda gradients, total, largest, places, scales, offset, begun: gradients.new_empty(len(places)),
    ),
)
_LIBRARY = torch.library.Library("dist_train", "DEF")
for _schema, _kernel, _shapes in _OPERATORS:
    _name = _LIBRARY.define(_schema)
    _LIBRARY.impl(_name, _kernel, "CompositeExplicitAutograd")
    _LIBRARY.impl(_name, _shapes, "Meta")
