"""The update rules: torch's, and LARS and LAMB of timm, with their whole state there from the beginning."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import FunctionType
from typing import Any, cast

import torch
from torch import nn
from torch.optim import Optimizer

from dist_train.config import OptimizerSettings
from dist_train.config.plugins import call_plugin, is_plugin
from dist_train.optim.flat_weights import FlatWeights

_MARK = "__dynamo_disable"


@dataclass(frozen=True)
class Group:
    """Parameters, and whether weight decay and layer-wise adaptation are kept off them."""

    parameters: tuple[nn.Parameter, ...]
    excluded: bool


def build_optimizer(settings: OptimizerSettings, weights: FlatWeights) -> Optimizer:
    """Return the optimizer that `settings` name, on `weights`."""
    left_out = set(weights.excluded(settings.exclude))
    named = list(zip(weights.segments, weights.parameters, strict=True))
    groups = [
        Group(tuple(parameter for segment, parameter in named if (segment in left_out) == excluded), excluded)
        for excluded in (False, True)
    ]
    _pass_by_the_compiler()
    filled = [group for group in groups if group.parameters]
    if is_plugin(settings.name):
        return cast(Optimizer, call_plugin(settings.name, settings.options, Optimizer, settings, filled))
    return _OPTIMIZERS[settings.name](settings, filled)


def set_learning_rate(optimizer: Optimizer, rate: float) -> None:
    """Set the learning rate of the next update."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def optimizer_step(optimizer: Optimizer) -> None:
    """Do what `optimizer.step()` does, under torch's wrappers, which load its compiler: a second of every rank."""
    with torch.no_grad():
        inspect.unwrap(type(optimizer).step)(optimizer)


def state_tensors(optimizer: Optimizer) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every tensor of the optimizer's state with a name, in the same order on all ranks."""
    for index, group in enumerate(optimizer.param_groups):
        for name, value in sorted(group.items()):
            if isinstance(value, torch.Tensor):
                yield f"group.{index}.{name}", value
    for index, parameter in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        for name, value in sorted(optimizer.state[parameter].items()):
            if isinstance(value, torch.Tensor):
                yield f"{index}.{name}", value


def _sgd(settings: OptimizerSettings, groups: Sequence[Group]) -> Optimizer:
    optimizer = torch.optim.SGD(
        _decayed(settings, groups),
        lr=settings.learning_rate,
        momentum=settings.momentum,
        nesterov=settings.nesterov,
        fused=True,
    )
    return _begin_momentum(optimizer, settings)


def _adam(
    settings: OptimizerSettings, groups: Sequence[Group], kind: Callable[..., Optimizer] = torch.optim.Adam
) -> Optimizer:
    """Adam's weight decay is a part of the gradient, moments included; AdamW's is apart (arXiv 1711.05101)."""
    optimizer = kind(
        _decayed(settings, groups), lr=settings.learning_rate, betas=settings.betas, eps=settings.epsilon, fused=True
    )
    _begin_state(optimizer, "exp_avg", "exp_avg_sq")
    for parameter, state in optimizer.state.items():
        state["step"] = torch.zeros((), device=parameter.device)
    return optimizer


def _lars(settings: OptimizerSettings, groups: Sequence[Group]) -> Optimizer:
    """You et al., arXiv 1708.03888."""
    from timm.optim.lars import Lars

    optimizer = Lars(
        _adapted(settings, groups), lr=settings.learning_rate, momentum=settings.momentum, trust_coeff=settings.trust
    )
    return _begin_momentum(optimizer, settings)


def _lamb(settings: OptimizerSettings, groups: Sequence[Group]) -> Optimizer:
    """You et al., arXiv 1904.00962, its moments corrected for their beginning at zero."""
    from timm.optim.lamb import Lamb

    optimizer = Lamb(
        _adapted(settings, groups),
        lr=settings.learning_rate,
        betas=settings.betas,
        eps=settings.epsilon,
        # The global gradient is clipped before: optimizer.clip_norm.
        max_grad_norm=None,
    )
    for group in optimizer.param_groups:
        group["step"] = torch.zeros(())
    _begin_state(optimizer, "exp_avg", "exp_avg_sq")
    return optimizer


def _decayed(settings: OptimizerSettings, groups: Sequence[Group]) -> list[dict[str, Any]]:
    return [
        {"params": list(group.parameters), "weight_decay": 0.0 if group.excluded else settings.weight_decay}
        for group in groups
    ]


def _adapted(settings: OptimizerSettings, groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Return groups for timm, which adapts the rate of those that decay, and of those that always adapt."""
    decayed = _decayed(settings, groups)
    return [{**options, "always_adapt": not group.excluded} for options, group in zip(decayed, groups, strict=True)]


def _begin_momentum(optimizer: Optimizer, settings: OptimizerSettings) -> Optimizer:
    if settings.momentum > 0:
        _begin_state(optimizer, "momentum_buffer")
    return optimizer


def _begin_state(optimizer: Optimizer, *names: str) -> None:
    """Make the buffers that the first update would make: a broadcast and a checkpoint before it need them too."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            for name in names:
                optimizer.state[parameter][name] = torch.zeros_like(parameter)


_OPTIMIZERS: Mapping[str, Callable[[OptimizerSettings, Sequence[Group]], Optimizer]] = {
    "sgd": _sgd,
    "adam": _adam,
    "adamw": partial(_adam, kind=torch.optim.AdamW),
    "lars": _lars,
    "lamb": _lamb,
}


def _pass_by_the_compiler() -> None:
    """Let the methods of `Optimizer` that torch's compiler passes by be called without loading it.

    torch (`torch/_compile.py`) keeps under `_MARK` what it calls in place of such a method. Where it keeps that
    elsewhere, nothing changes.
    """
    for wrapper in vars(Optimizer).values():
        if not isinstance(wrapper, FunctionType) or _MARK not in wrapper.__code__.co_consts:
            continue
        method = getattr(wrapper, "__wrapped__", None)
        if isinstance(method, FunctionType) and not hasattr(method, _MARK):
            setattr(method, _MARK, method)
