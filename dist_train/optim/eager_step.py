"""Optimizers whose update runs as it is, without torch's compiler, which takes a second of every worker to load.

Torch wraps some methods of its optimizers so that its compiler passes them by, and loads it at the first call.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from types import FunctionType

import torch
from torch.optim import Optimizer

_MARK = "__dynamo_disable"
"""Where torch (`torch/_compile.py`) keeps what it calls in place of such a method."""


def mark_methods() -> None:
    """Let such methods of `Optimizer` be called as they are. Where torch keeps its marks elsewhere, nothing changes."""
    for method in _passed_by():
        if not hasattr(method, _MARK):
            setattr(method, _MARK, method)


def eager_step(optimizer: Optimizer) -> Callable[[], None]:
    """Return what `optimizer.step()` does, with the hooks that are to run before it, under torch's wrappers."""
    update = inspect.unwrap(type(optimizer).step)

    def step() -> None:
        for hook in optimizer._optimizer_step_pre_hooks.values():
            hook(optimizer, (), {})
        with torch.no_grad():
            update(optimizer)

    return step


def _passed_by() -> Iterator[FunctionType]:
    for wrapper in vars(Optimizer).values():
        if not isinstance(wrapper, FunctionType) or _MARK not in wrapper.__code__.co_consts:
            continue
        method = getattr(wrapper, "__wrapped__", None)
        if isinstance(method, FunctionType):
            yield method
