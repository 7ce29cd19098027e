"""The norms' kernels as operators of torch, `torch.ops.dist_train`, known also to tensors without values (FakeTensor).

Triton is imported when the first of them is called.
"""

from __future__ import annotations

import os
import shutil
import sysconfig
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("dist_train", "DEF")
_LIBRARY.define(
    "ghost_norm(Tensor inputs, Tensor weight, Tensor bias, float epsilon, int size, int groups, str activation) "
    "-> (Tensor outputs, Tensor moments)"
)
_LIBRARY.define(
    "ghost_norm_backward(Tensor upstream, Tensor inputs, Tensor weight, Tensor bias, Tensor moments, int size, "
    "str activation) -> (Tensor of_inputs, Tensor of_groups)"
)


@cache
def has_triton() -> bool:
    """Whether Triton is there, and a C compiler and Python's header, by which it builds what starts its kernels."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    return find_spec("triton") is not None and compiler is not None and header.exists()


def _ghost_norm(
    inputs: Tensor, weight: Tensor, bias: Tensor, epsilon: float, size: int, groups: int, activation: str
) -> tuple[Tensor, Tensor]:
    from dist_train.models import norm_kernels

    return norm_kernels.normalize(inputs, weight, bias, epsilon, size, groups, activation == "relu")


def _ghost_norm_backward(
    upstream: Tensor, inputs: Tensor, weight: Tensor, bias: Tensor, moments: Tensor, size: int, activation: str
) -> tuple[Tensor, Tensor]:
    from dist_train.models import norm_kernels

    return norm_kernels.gradients(upstream, inputs, weight, bias, moments, size, activation == "relu")


def _shapes(
    inputs: Tensor, weight: Tensor, bias: Tensor, epsilon: float, size: int, groups: int, activation: str
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(inputs), weight.new_empty(3, groups, len(weight))


def _backward_shapes(
    upstream: Tensor, inputs: Tensor, weight: Tensor, bias: Tensor, moments: Tensor, size: int, activation: str
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(inputs), torch.empty_like(moments[:2])


_LIBRARY.impl("ghost_norm", _ghost_norm, "CompositeExplicitAutograd")
_LIBRARY.impl("ghost_norm_backward", _ghost_norm_backward, "CompositeExplicitAutograd")
_LIBRARY.impl("ghost_norm", _shapes, "Meta")
_LIBRARY.impl("ghost_norm_backward", _backward_shapes, "Meta")
