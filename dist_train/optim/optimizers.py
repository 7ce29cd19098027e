"""The optimizers: torch's, and timm's LARS and LAMB. Their whole state is created before the first update."""

from __future__ import annotations

import inspect
import io
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from types import FunctionType
from typing import Any, cast

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from dist_train.config import OptimizerSettings
from dist_train.config.plugins import call_plugin, is_plugin
from dist_train.optim.flat_weights import FlatWeights
from dist_train.outcome import PluginResultError
from dist_train.reproducible import shown_state

_logger = logging.getLogger("dist_train.optim")

_DYNAMO_DISABLE = "__dynamo_disable"


@dataclass(frozen=True)
class Group:
    """Parameters, whether they are excluded from weight decay and layer-wise adaptation, and their names."""

    parameters: tuple[nn.Parameter, ...]
    excluded: bool
    names: tuple[str, ...] = ()


def build_optimizer(settings: OptimizerSettings, weights: FlatWeights) -> Optimizer:
    """Return the optimizer that `settings` select, for `weights`. Raises UsageError if a plug-in's cannot be used."""
    left_out = set(weights.excluded(settings.exclude, "optimizer.exclude"))
    named = list(zip(weights.segments, weights.parameters, strict=True))
    groups: list[Group] = []
    for excluded in (False, True):
        if part := [(parameter, segment.name) for segment, parameter in named if (segment in left_out) == excluded]:
            parameters, names = zip(*part, strict=True)
            groups.append(Group(parameters, excluded, names))
    _avoid_loading_the_compiler()
    if is_plugin(settings.name):
        optimizer = cast(Optimizer, call_plugin(settings.name, settings.options, Optimizer, settings, groups))
        _check_usable(optimizer, settings.name)
        _check_parameters(optimizer, settings.name, weights)
        for group in optimizer.param_groups:
            group["initial_lr"] = float(group.get("lr") or 0.0)  # as torch's own schedules name it
            group["lr"] = group["initial_lr"]  # a tensor would be part of the state until the first update
        first, *rates = (group["initial_lr"] for group in optimizer.param_groups)
        is_multiple = first != settings.learning_rate and settings.learning_rate in rates
        if is_multiple or (not first and any(rates)):
            raise PluginResultError(
                f"the schedule sets the rate of the first parameter group of {settings.name}, here {first:g}, and "
                f"scales the others alike: begin with the group whose rate is optimizer.learning_rate; freeze "
                f"parameters by requires_grad=False in the model"
            )
        if first and not math.isclose(first, settings.learning_rate, rel_tol=1e-6):  # it may be a float32
            _logger.warning(
                f"{settings.name} builds its optimizer with the rate {first:g}, which the schedule replaces by "
                f"optimizer.learning_rate, {settings.learning_rate:g}: set that to the rate you want"
            )
        return optimizer
    return _OPTIMIZERS[settings.name](settings, groups)


def _check_usable(optimizer: Optimizer, name: str) -> None:
    """Raise UsageError if `step` cannot be called as training does, or state, settings or the rate would be lost."""
    # a wrapper that an attribute holds, as torch's schedulers set one, has the signature of the function, with `self`
    if "step" not in vars(optimizer) and any(
        each.default is each.empty and each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)
        for each in inspect.signature(optimizer.step).parameters.values()
    ):
        raise PluginResultError(f"the step of {name} needs arguments: it is called without any")
    if callable(getattr(optimizer, "eval", None)):  # of schedule-free optimizers (arXiv 2405.15682)
        raise PluginResultError(
            f"{name} has other weights for evaluations, by its method eval, which is not called: use an optimizer "
            f"without, and averaging.kind for an average of the weights"
        )
    groups = set(map(id, optimizer.param_groups))
    for attribute, held in _held_by(optimizer):
        if held.state is not optimizer.state:
            raise PluginResultError(
                f"{name} holds another optimizer, in its attribute {attribute}, whose state a resume on several ranks "
                f"would not share: return that one alone, or make one class that keeps all in its own self.state"
            )
        if not groups.issuperset(map(id, held.param_groups)):
            raise PluginResultError(
                f"{name} holds another optimizer, in its attribute {attribute}, whose rates the schedule would not "
                f"set: let its param_groups be among {name}'s own"
            )
    _check_storable(partial(packed_numbers, optimizer), name)


def _held_by(optimizer: Optimizer) -> Iterator[tuple[str, Optimizer]]:
    """Yield the optimizers that attributes of `optimizer` hold, alone or in a list or mapping, with the attribute."""
    for attribute, value in vars(optimizer).items():
        held = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else (value,)
        yield from ((attribute, each) for each in held if isinstance(each, Optimizer))


def _check_storable(packed: Callable[[], bytes], name: str) -> None:
    """Raise UsageError if what `packed` returns, of the optimizer `name`, cannot be loaded without running code."""
    try:
        torch.load(io.BytesIO(packed()), weights_only=True)
    except Exception as error:  # of nearly any type
        raise PluginResultError(
            f"the param_groups or the state of {name} hold more than numbers, texts and tensors, which checkpoints "
            f"cannot give back ({type(error).__name__}): keep for example float(x), or a tensor, in place of a number "
            f"of NumPy"
        ) from error


@dataclass(eq=False)
class PluginUpdates:
    """Checks a plug-in's `optimizer` after each of its updates; a call returns the context for one.

    Most optimizers create their state at the first update. State that no checkpoint could hold is refused at once,
    before a resume misses it. Warnings name attributes that change, with which a resumed run would not begin, and
    tensors that would no longer be the same one.
    """

    optimizer: Optimizer
    name: str
    seeded: Callable[[int], AbstractContextManager[object]]
    """Seeds the global generators for the update whose number it takes."""

    def __post_init__(self) -> None:
        self._stored = frozenset[object]()
        saves_itself = type(self.optimizer).state_dict is not Optimizer.state_dict  # which may save attributes, too
        self._attributes = {} if saves_itself else _own_attributes(self.optimizer)

    @contextmanager
    def __call__(self, step: int) -> Iterator[None]:
        """Raise UsageError after the block, in which update `step` is made, if the state cannot be stored then."""
        with self.seeded(step):
            yield
        if (stored := frozenset(_kinds(self.optimizer))) != self._stored:
            _check_storable(partial(_saved_without_tensors, self.optimizer), self.name)
            self._stored = stored
            if names := _names_of_aliases(self.optimizer):
                _logger.warning(
                    "%s holds one tensor several times in its state (%s), which a resume makes several tensors, so "
                    "that a resumed run differs if updates change it: hold each once",
                    self.name,
                    ", ".join(names),
                )
        before, self._attributes = self._attributes, {}  # warned of once
        if before:
            now = _own_attributes(self.optimizer)
            if changed := [name for name, value in before.items() if now.get(name) != value]:
                _logger.warning(
                    "%s changes its %s at an update, which checkpoints do not hold, so that a resumed run differs: "
                    "keep it in self.state or in a parameter group",
                    self.name,
                    ", ".join(changed),
                )


def _kinds(optimizer: Optimizer) -> Iterator[object]:
    for part in (*optimizer.param_groups, *optimizer.state.values()):
        yield from ((name, type(value)) for name, value in part.items()) if isinstance(part, Mapping) else (type(part),)


def _names_of_aliases(optimizer: Optimizer) -> list[str]:
    """Return the names of the tensors that are several times in the state of the parameters."""
    named = [
        (name, each.data_ptr())
        for state in _states(optimizer)
        for name, each in state.items()
        if isinstance(each, torch.Tensor) and each.layout == torch.strided and each.data_ptr()
    ]
    times = Counter(place for _, place in named)
    return list(dict.fromkeys(str(name) for name, place in named if times[place] > 1))


def _saved_without_tensors(optimizer: Optimizer) -> bytes:
    content = io.BytesIO()
    torch.save(_without_tensors(optimizer.state_dict()), content)
    return content.getvalue()


def _without_tensors(value: Any) -> Any:
    """Return `value` without the tensors in it, in the containers of a checkpoint."""
    if isinstance(value, Mapping):
        return {key: _without_tensors(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_without_tensors(each) for each in value]
    return None if isinstance(value, torch.Tensor) else value


def _own_attributes(optimizer: Optimizer) -> dict[str, object]:
    """Return the attributes that show a change: numbers, generators, and tensors other than parameters."""
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}

    def shown(value: Any) -> object:
        if isinstance(value, torch.Tensor):
            return None if id(value) in held or value.is_inference() else (id(value), value._version)
        if isinstance(value, Mapping):
            return tuple(map(shown, value.values()))
        if isinstance(value, list | tuple):
            return tuple(map(shown, value))
        return value if type(value) in (int, float) else shown_state(value)

    others = {name: each for name, each in vars(optimizer).items() if name not in ("defaults", "state", "param_groups")}
    return {name: shown(value) for name, value in others.items()}


def _check_parameters(optimizer: Optimizer, name: str, weights: FlatWeights) -> None:
    """Raise UsageError if `optimizer` does not hold each parameter of `weights` once, and nothing else."""
    held = Counter(id(parameter) for group in optimizer.param_groups for parameter in group["params"])
    for segment, parameter in zip(weights.segments, weights.parameters, strict=True):
        if (times := held[id(parameter)]) != 1:
            raise PluginResultError(
                f"{name} holds the parameter {segment.name} {times} times: give each parameter of all groups to the "
                f"optimizer once; what is not to be trained has requires_grad=False in the model"
            )
    if extra := held.total() - len(weights.parameters):
        raise PluginResultError(f"{name} holds {extra} tensors that are no parameters of the model")


def set_learning_rate(optimizer: Optimizer, rate: float) -> None:
    """Set the learning rate of the next update; parameter groups of a plug-in keep the ratios they were built with."""
    base = optimizer.param_groups[0].get("initial_lr", 0.0)
    for group in optimizer.param_groups:
        group["lr"] = rate * (group["initial_lr"] / base) if base else rate


def optimizer_step(optimizer: Optimizer, weights: FlatWeights | None = None) -> None:
    """Call `optimizer.step()`; torch's and timm's without their wrappers, which load the compiler: seconds, and 70 MiB.

    Other optimizers may replace `p.data` and `p.grad` of the parameters: `weights` then reclaims them.
    """
    is_known = type(optimizer).__module__.startswith(("torch.optim.", "timm.optim.")) and "step" not in vars(optimizer)
    hooks = optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks
    if is_known and not any((*hooks, _global_optimizer_pre_hooks, _global_optimizer_post_hooks)):
        with torch.no_grad():  # the wrappers do this, and call the hooks
            inspect.unwrap(type(optimizer).step)(optimizer)
        return
    optimizer.step()
    if weights is not None:
        weights.reclaim()


def state_tensors(optimizer: Optimizer) -> Iterator[torch.Tensor]:
    """Yield every tensor of the optimizer's state, in the same order on all ranks."""
    for part in _parts(optimizer):
        named = sorted(part.items(), key=lambda item: str(item[0]))  # some are no texts
        yield from (value for _, value in named if isinstance(value, torch.Tensor))


def packed_numbers(optimizer: Optimizer) -> bytes:
    """Return what the optimizer saves besides `state_tensors`, and the shapes and types of these."""
    content = io.BytesIO()
    saved = optimizer.state_dict()  # a plug-in's may leave out what no checkpoint can hold
    further = {name: value for name, value in saved.items() if name not in ("state", "param_groups")}
    names = [*(group.keys() for group in saved["param_groups"]), *(state.keys() for state in _states(optimizer))]
    numbers = [
        {name: part[name] for name in kept if name != "params" and not isinstance(part[name], torch.Tensor)}
        for part, kept in zip(_parts(optimizer), names, strict=True)
    ]
    unattached = {key: value for key, value in optimizer.state.items() if not isinstance(key, torch.Tensor)}
    forms = [
        {name: (each.dtype, each.shape, each.device.type) for name, each in part.items() if torch.is_tensor(each)}
        for part in _parts(optimizer)
    ]
    torch.save((numbers, unattached, further, forms), content)
    return content.getvalue()


def create_missing(optimizer: Optimizer, packed: bytes) -> None:
    """Create the tensors that the optimizer of the rank that sent `packed` has; most appear with an update."""
    *_, forms = torch.load(io.BytesIO(packed), map_location="meta", weights_only=True)
    for part, others in zip(_parts(optimizer), forms, strict=True):
        for name, (dtype, shape, kind) in others.items():
            if name not in part:
                part[name] = torch.zeros(shape, dtype=dtype, device=kind)


def set_numbers(optimizer: Optimizer, packed: bytes, device: torch.device) -> None:
    """Set what `packed_numbers` returned on another rank, with the tensors of groups and state on `device`."""
    values, unattached, *_ = torch.load(io.BytesIO(packed), map_location=device, weights_only=True)
    *_, further, _ = torch.load(io.BytesIO(packed), map_location="cpu", weights_only=True)  # as from a checkpoint
    for part, numbers in zip(_parts(optimizer), values, strict=True):
        part.update(numbers)
    optimizer.state.update(unattached)
    if further:  # such as the state of a generator of its own: only the optimizer knows where it belongs
        load_state(optimizer, {**optimizer.state_dict(), **further})


def load_state(optimizer: Optimizer, saved: Mapping[str, Any]) -> None:
    """Load what `state_dict` returned. Raises RuntimeError or ValueError if it belongs to another optimizer.

    The state keeps its types, although torch casts all of it but `step` to the parameter's type; unless the optimizer
    itself has converted it to the types that it has at first. Optimizers that share it, and groups, keep doing so,
    although torch puts others in their place.
    """
    places = {id(group): place for place, group in enumerate(optimizer.param_groups)}
    sharing = [(held, [places[id(group)] for group in held.param_groups]) for _, held in _held_by(optimizer)]
    before = [{name: getattr(value, "dtype", None) for name, value in state.items()} for state in _states(optimizer)]
    # The optimizer must not be wrapped yet: a wrapper would drop the loaded state.
    optimizer.load_state_dict({**saved})
    for held, own in sharing:
        held.state, held.param_groups = optimizer.state, [optimizer.param_groups[place] for place in own]
    for index, (state, types) in enumerate(zip(_states(optimizer), before, strict=True)):
        for name, value in saved["state"].get(index, {}).items():
            if name in state and not (isinstance(state[name], torch.Tensor) and state[name].dtype == types.get(name)):
                state[name] = _with_types_of(value, state[name])


def _with_types_of(saved: Any, loaded: Any) -> Any:
    """Return what torch has `loaded`, with the types of what was `saved`."""
    if isinstance(saved, torch.Tensor) and isinstance(loaded, torch.Tensor):
        return loaded if loaded.dtype == saved.dtype else saved.to(loaded.device)
    if isinstance(saved, dict) and isinstance(loaded, dict):
        return {key: _with_types_of(saved[key], value) if key in saved else value for key, value in loaded.items()}
    if isinstance(saved, list | tuple) and isinstance(loaded, list | tuple):
        return type(loaded)(map(_with_types_of, saved, loaded))
    return saved if isinstance(saved, str) else loaded  # torch turns a text into that of a generator object


def _states(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Return the state of each parameter, in the order of the groups."""
    return [optimizer.state[parameter] for group in optimizer.param_groups for parameter in group["params"]]


def _parts(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Return what holds the optimizer's values: its groups, then the state of each parameter."""
    return [*optimizer.param_groups, *_states(optimizer)]


def _sgd(settings: OptimizerSettings, groups: Sequence[Group]) -> Optimizer:
    optimizer = torch.optim.SGD(
        _decayed(settings, groups),
        lr=settings.learning_rate,
        momentum=settings.momentum,
        nesterov=settings.nesterov,
        fused=True,
    )
    if settings.momentum > 0:
        _create_state(optimizer, "momentum_buffer")
    return optimizer


def _adam(
    settings: OptimizerSettings, groups: Sequence[Group], kind: Callable[..., Optimizer] = torch.optim.Adam
) -> Optimizer:
    """Adam adds weight decay to the gradient, and so to the moments; AdamW decouples it (arXiv 1711.05101)."""
    optimizer = kind(
        _decayed(settings, groups), lr=settings.learning_rate, betas=settings.betas, eps=settings.epsilon, fused=True
    )
    _create_state(optimizer, "exp_avg", "exp_avg_sq")
    for parameter, state in optimizer.state.items():
        state["step"] = torch.zeros((), device=parameter.device)
    return optimizer


def _lars(settings: OptimizerSettings, groups: Sequence[Group]) -> Optimizer:
    """You et al., arXiv 1708.03888."""
    from timm.optim.lars import Lars

    optimizer = Lars(
        _adapted(settings, groups), lr=settings.learning_rate, momentum=settings.momentum, trust_coeff=settings.trust
    )
    if settings.momentum > 0:
        _create_state(optimizer, "momentum_buffer")
    return optimizer


def _lamb(settings: OptimizerSettings, groups: Sequence[Group]) -> Optimizer:
    """You et al., arXiv 1904.00962, with bias correction of the moments."""
    from timm.optim.lamb import Lamb

    optimizer = Lamb(
        _adapted(settings, groups),
        lr=settings.learning_rate,
        betas=settings.betas,
        eps=settings.epsilon,
        max_grad_norm=None,  # the training step clips the global gradient: optimizer.clip_norm
    )
    for group in optimizer.param_groups:
        group["step"] = torch.zeros(())
    _create_state(optimizer, "exp_avg", "exp_avg_sq")
    return optimizer


def _decayed(settings: OptimizerSettings, groups: Sequence[Group]) -> list[dict[str, Any]]:
    return [
        {"params": list(group.parameters), "weight_decay": 0.0 if group.excluded else settings.weight_decay}
        for group in groups
    ]


def _adapted(settings: OptimizerSettings, groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Return parameter groups for timm, which adapts the rate of groups with weight decay or `always_adapt`."""
    decayed = _decayed(settings, groups)
    return [{**options, "always_adapt": not group.excluded} for options, group in zip(decayed, groups, strict=True)]


def _create_state(optimizer: Optimizer, *names: str) -> None:
    """Create the buffers that the first update would create: a broadcast or a checkpoint before it needs them."""
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


def _avoid_loading_the_compiler() -> None:
    """Let methods of `Optimizer` that torch excludes from compilation be called without loading the compiler.

    The wrapper of such a method (`torch/_compile.py`) calls the method's attribute `_DYNAMO_DISABLE`, and loads the
    compiler to create it if it is missing. A torch without these wrappers is left as it is.
    """
    for wrapper in vars(Optimizer).values():
        if not isinstance(wrapper, FunctionType) or _DYNAMO_DISABLE not in wrapper.__code__.co_consts:
            continue
        method = getattr(wrapper, "__wrapped__", None)
        if isinstance(method, FunctionType) and not hasattr(method, _DYNAMO_DISABLE):
            setattr(method, _DYNAMO_DISABLE, method)
