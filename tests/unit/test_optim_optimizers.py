"""Every update rule by its formulas, its whole state there from the beginning, and what is excluded left alone."""

from __future__ import annotations

import copy
import functools
import io
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import numpy
import pytest
import torch
from timm.optim.lookahead import Lookahead
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from dist_train.checkpoint.files import Contents
from dist_train.config import OptimizerSettings
from dist_train.optim.flat_weights import FlatWeights
from dist_train.optim.optimizers import (
    Group,
    PluginUpdates,
    build_optimizer,
    load_state,
    optimizer_step,
    packed_numbers,
    set_learning_rate,
    set_numbers,
    state_tensors,
)
from dist_train.outcome import UsageError
from tests.raising import raises
from tests.unit.small_trainers import state_of

RATES = (0.1, 0.4, 0.05, 0.0)
Name = Literal["sgd", "adam", "adamw", "lars", "lamb"]
NAMES: tuple[Name, ...] = ("sgd", "adam", "adamw", "lars", "lamb")
DECAY = 0.05


def a_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))


def set_gradients(model: nn.Module, step: int) -> list[torch.Tensor]:
    """Give `model` the gradients of `step` and return them in double precision."""
    source = torch.Generator().manual_seed(step)
    drawn = [torch.randn(parameter.shape, generator=source) for parameter in model.parameters()]
    for parameter, gradient in zip(model.parameters(), drawn, strict=True):
        assert parameter.grad is not None
        parameter.grad.copy_(gradient)
    return [gradient.double() for gradient in drawn]


class Reference:
    """One parameter's updates by a formula, in double precision."""

    def __init__(self, parameter: nn.Parameter, settings: OptimizerSettings, *, excluded: bool) -> None:
        self.weight = parameter.detach().double()
        self.settings = settings
        self.excluded = excluded
        self.decay = 0.0 if excluded else settings.weight_decay
        self.first = torch.zeros_like(self.weight)
        self.second = torch.zeros_like(self.weight)
        self.updates = 0

    def moments(self, gradient: torch.Tensor) -> torch.Tensor:
        """Return Adam's direction."""
        self.updates += 1
        beta1, beta2 = self.settings.betas
        self.first = beta1 * self.first + (1 - beta1) * gradient
        self.second = beta2 * self.second + (1 - beta2) * gradient**2
        mean, square = self.first / (1 - beta1**self.updates), self.second / (1 - beta2**self.updates)
        return mean / (square.sqrt() + self.settings.epsilon)


def sgd(state: Reference, gradient: torch.Tensor, rate: float) -> None:
    momentum = state.settings.momentum
    whole = gradient + state.decay * state.weight
    state.first = momentum * state.first + whole
    state.weight = state.weight - rate * (whole + momentum * state.first if state.settings.nesterov else state.first)


def adam(state: Reference, gradient: torch.Tensor, rate: float) -> None:
    state.weight = state.weight - rate * state.moments(gradient + state.decay * state.weight)


def adamw(state: Reference, gradient: torch.Tensor, rate: float) -> None:
    state.weight = state.weight * (1 - rate * state.decay) - rate * state.moments(gradient)


def lars(state: Reference, gradient: torch.Tensor, rate: float) -> None:
    trust = 1.0
    if not state.excluded:
        length = float(state.weight.norm())
        trust = state.settings.trust * length / (float(gradient.norm()) + state.decay * length)
    state.first = state.settings.momentum * state.first + trust * (gradient + state.decay * state.weight)
    state.weight = state.weight - rate * state.first


def lamb(state: Reference, gradient: torch.Tensor, rate: float) -> None:
    move = state.moments(gradient) + state.decay * state.weight
    trust = 1.0 if state.excluded else float(state.weight.norm() / move.norm())
    state.weight = state.weight - rate * trust * move


FORMULAS: Mapping[str, Callable[[Reference, torch.Tensor, float], None]] = {
    "sgd": sgd,
    "adam": adam,
    "adamw": adamw,
    "lars": lars,
    "lamb": lamb,
}
CASES: list[dict[str, Any]] = [
    {"name": "sgd", "momentum": 0.0, "nesterov": False},
    {"name": "sgd", "momentum": 0.9, "nesterov": False},
    {"name": "sgd", "momentum": 0.9, "nesterov": True},
    {"name": "sgd", "momentum": 0.5, "nesterov": False, "weight_decay": DECAY},
    {"name": "sgd", "weight_decay": DECAY, "exclude": ()},
    {"name": "adam"},
    {"name": "adam", "betas": (0.8, 0.95), "epsilon": 1e-3, "weight_decay": DECAY},
    {"name": "adamw", "weight_decay": DECAY},
    {"name": "adamw", "betas": (0.8, 0.95), "epsilon": 1e-3, "weight_decay": DECAY, "exclude": ("0.*",)},
    {"name": "lars"},
    {"name": "lars", "momentum": 0.0, "trust": 0.02},
    {"name": "lars", "weight_decay": DECAY, "trust": 0.1},
    {"name": "lars", "weight_decay": DECAY, "exclude": ()},
    {"name": "lars", "weight_decay": DECAY, "exclude": ("1.weight", "bias")},
    {"name": "lamb"},
    {"name": "lamb", "betas": (0.8, 0.95), "epsilon": 1e-3, "weight_decay": DECAY},
    {"name": "lamb", "weight_decay": DECAY, "exclude": ()},
    {"name": "lamb", "weight_decay": DECAY, "exclude": ("*.weight",)},
]


@pytest.mark.parametrize("fields", CASES, ids=[str(case) for case in CASES])
def test_it_follows_its_formula_and_spares_what_is_excluded(fields: dict[str, Any]) -> None:
    model = a_model()
    settings = OptimizerSettings(**fields)
    weights = FlatWeights(model)
    left_out = {segment.name for segment in weights.excluded(settings.exclude)}
    references = [
        Reference(parameter, settings, excluded=name in left_out) for name, parameter in model.named_parameters()
    ]
    optimizer = build_optimizer(settings, weights)
    for step, rate in enumerate(RATES):
        drawn = set_gradients(model, step)
        set_learning_rate(optimizer, rate)
        optimizer.step()
        for reference, gradient in zip(references, drawn, strict=True):
            FORMULAS[settings.name](reference, gradient, rate)
        for parameter, reference in zip(model.parameters(), references, strict=True):
            torch.testing.assert_close(parameter.detach().double(), reference.weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_promise_4_a_rate_of_zero_moves_no_bit(name: Name) -> None:
    model = a_model()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = build_optimizer(OptimizerSettings(name=name, weight_decay=0.1), FlatWeights(model))
    set_learning_rate(optimizer, 0.0)
    for step in range(3):
        set_gradients(model, step)
        optimizer.step()
    assert all(torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_the_whole_state_is_there_before_the_first_update_and_keeps_its_names(name: Name) -> None:
    weights = FlatWeights(a_model())
    optimizer = build_optimizer(OptimizerSettings(name=name), weights)

    def forms() -> list[object]:
        names = [sorted(state) for state in optimizer.state_dict()["state"].values()]
        return [names, *((tensor.shape, tensor.dtype) for tensor in state_tensors(optimizer))]

    before = forms()
    assert sum(tensor.numel() for tensor in state_tensors(optimizer)) >= weights.count
    optimizer.step()
    assert forms() == before


@pytest.mark.parametrize("name", ["sgd", "lars"])
def test_without_momentum_there_is_no_state(name: Literal["sgd", "lars"]) -> None:
    settings = OptimizerSettings(name=name, momentum=0.0, nesterov=False)
    optimizer = build_optimizer(settings, FlatWeights(a_model()))
    optimizer.step()
    assert list(state_tensors(optimizer)) == []


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("stop", [0, 2])
def test_promise_5_a_restored_optimizer_resumes_bit_identically(name: Name, stop: int) -> None:
    settings = OptimizerSettings(name=name, weight_decay=DECAY)
    model, twin = a_model(), a_model()
    weights, twins = FlatWeights(model), FlatWeights(twin)
    optimizer = build_optimizer(settings, weights)
    for step in range(stop):
        set_gradients(model, step)
        optimizer.step()
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    stored = torch.load(file, weights_only=True)
    restored = build_optimizer(settings, twins)
    state_of(twin, twins, restored).load(Contents(stop, 0.0, stored["model"], stored["optimizer"], {}, {}))
    for step in range(stop, 5):
        for one, its in ((model, optimizer), (twin, restored)):
            set_gradients(one, step)
            its.step()
    assert torch.equal(weights.values, twins.values)
    pairs = zip(state_tensors(optimizer), state_tensors(restored), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)


@pytest.mark.parametrize("name", NAMES)
def test_promise_5_all_that_an_update_depends_on_is_broadcast(name: Name) -> None:
    """A rank that was not restored continues like one that was, given weights and state tensors alone."""
    settings = OptimizerSettings(name=name, weight_decay=DECAY)
    model, peer = a_model(), a_model()
    weights, peers = FlatWeights(model), FlatWeights(peer)
    optimizer, fresh = build_optimizer(settings, weights), build_optimizer(settings, peers)
    for step in range(3):
        set_gradients(model, step)
        optimizer.step()
    peers.values.copy_(weights.values)
    for tensor, other in zip(state_tensors(optimizer), state_tensors(fresh), strict=True):
        other.copy_(tensor)
    for one, its in ((model, optimizer), (peer, fresh)):
        set_gradients(one, 3)
        its.step()
    assert torch.equal(weights.values, peers.values)


@pytest.mark.parametrize("exclude", [(), ("norm", "bias"), ("*",)])
def test_a_group_may_be_empty(exclude: tuple[str, ...]) -> None:
    model = a_model()
    for name in NAMES:
        optimizer = build_optimizer(OptimizerSettings(name=name, exclude=exclude), FlatWeights(model))
        set_gradients(model, 0)
        optimizer.step()
        assert sum(len(group["params"]) for group in optimizer.param_groups) == 4


def with_numpys_numbers(
    settings: OptimizerSettings, groups: Sequence[Group], options: dict[str, Any]
) -> torch.optim.Optimizer:
    optimizer = torch.optim.SGD([parameter for group in groups for parameter in group.parameters])
    parts = {"group": optimizer.param_groups[0], "state": optimizer.state[optimizer.param_groups[0]["params"][0]]}
    parts[options["part"]]["momentum"] = numpy.float64(0.9)
    return optimizer


@pytest.mark.parametrize("part", ["group", "state"])
def test_a_plugin_whose_numbers_checkpoints_could_not_give_back_is_refused_at_once(part: str) -> None:
    settings = OptimizerSettings(name=f"{__name__}:with_numpys_numbers", options={"part": part})
    with raises(UsageError, code="plugin-result"):
        build_optimizer(settings, FlatWeights(a_model()))


def with_a_schedule(settings: OptimizerSettings, groups: Sequence[Group]) -> torch.optim.Optimizer:
    optimizer = torch.optim.SGD([parameter for group in groups for parameter in group.parameters], lr=0.1)
    torch.optim.lr_scheduler.StepLR(optimizer, 2)
    return optimizer


def test_a_plugin_may_be_under_a_schedule_of_torch() -> None:
    """Which replaces its `step` by one whose signature has `self`."""
    settings = OptimizerSettings(name=f"{__name__}:with_a_schedule", learning_rate=0.1)
    weights = FlatWeights(model := a_model())
    optimizer = build_optimizer(settings, weights)
    before = weights.values.clone()
    set_gradients(model, 0)
    optimizer_step(optimizer, weights)
    assert not torch.equal(weights.values, before)


def by_timms_lookahead(settings: OptimizerSettings, groups: Sequence[Group]) -> torch.optim.Optimizer:
    build: Callable[..., torch.optim.Optimizer] = Lookahead
    return build(torch.optim.SGD([parameter for group in groups for parameter in group.parameters], momentum=0.9))


class Mixture(torch.optim.Optimizer):
    """An optimizer for weights, and another one for all others: it may share their state, and their groups."""

    def __init__(self, settings: OptimizerSettings, groups: Sequence[Group], options: dict[str, Any]) -> None:
        self.parts = [torch.optim.SGD(group.parameters, momentum=0.9) for group in groups]
        super().__init__([parameter for group in groups for parameter in group.parameters], {"lr": 0.1})
        for part in self.parts if options.get("state") else ():
            part.state = self.state
        if options.get("groups"):
            self.param_groups = [group for part in self.parts for group in part.param_groups]

    def step(self) -> None:  # type: ignore[override]  # no closure
        for part in self.parts:
            part.step()


@pytest.mark.parametrize(
    ("name", "options", "holder"),
    [
        ("by_timms_lookahead", {}, "_base_optimizer"),
        ("Mixture", {"groups": True}, "parts"),
        ("Mixture", {"state": True}, "parts"),
    ],
)
def test_a_plugin_whose_state_or_rates_another_optimizer_keeps_is_refused(
    name: str, options: dict[str, bool], holder: str
) -> None:
    with raises(UsageError, code="plugin-result") as refused:
        build_optimizer(OptimizerSettings(name=f"{__name__}:{name}", options=options), FlatWeights(a_model()))
    assert holder in str(refused.value)


def test_a_plugin_may_hold_other_optimizers_that_share_its_state_and_rates() -> None:
    weights = FlatWeights(model := a_model())
    shared = {"state": True, "groups": True}
    optimizer = build_optimizer(OptimizerSettings(name=f"{__name__}:Mixture", options=shared), weights)
    set_gradients(model, 0)
    optimizer_step(optimizer)
    assert len(list(state_tensors(optimizer))) == 4
    before = weights.values.clone()
    set_learning_rate(optimizer, 0.0)
    optimizer_step(optimizer)
    assert torch.equal(weights.values, before)


def test_promise_5_optimizers_that_share_their_state_share_it_after_a_resume() -> None:
    settings = OptimizerSettings(name=f"{__name__}:Mixture", options={"state": True, "groups": True})
    models = [a_model() for _ in range(2)]
    weights, resumed = map(FlatWeights, models)
    before, after = (build_optimizer(settings, each) for each in (weights, resumed))
    set_gradients(models[0], 0)
    optimizer_step(before)
    resumed.values.copy_(weights.values)
    load_state(after, copy.deepcopy(before.state_dict()))
    for model, optimizer in zip(models, (before, after), strict=True):
        set_learning_rate(optimizer, 0.5)
        set_gradients(model, 1)
        optimizer_step(optimizer)
    assert torch.equal(weights.values, resumed.values)


class ScheduleFree(torch.optim.SGD):
    """One with other weights for evaluations, as those of the package schedulefree."""

    def __init__(self, settings: OptimizerSettings, groups: Sequence[Group]) -> None:
        super().__init__([parameter for group in groups for parameter in group.parameters], settings.learning_rate)

    def eval(self) -> None:
        """Exchange the weights for their average."""


def test_an_optimizer_whose_weights_are_others_in_evaluations_is_refused() -> None:
    with raises(UsageError, code="plugin-result"):
        build_optimizer(OptimizerSettings(name=f"{__name__}:ScheduleFree"), FlatWeights(a_model()))


class Packed(torch.Tensor):
    """A tensor without memory of its own, as those of optimizers whose state has 8 bits."""

    @staticmethod
    def __new__(cls, codes: torch.Tensor) -> Packed:
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape)

    @classmethod
    def __torch_dispatch__(cls, *arguments: Any) -> Any:
        raise NotImplementedError


class Descent(torch.optim.Optimizer):
    """Gradient descent that keeps one more thing, of a kind, at each update."""

    def __init__(self, settings: OptimizerSettings, groups: Sequence[Group], options: dict[str, Any]) -> None:
        super().__init__([parameter for group in groups for parameter in group.parameters], {"lr": 0.1})
        self.kind = options["kind"]
        self.updates, self.moments, self.parameters = 0, [torch.zeros(1)], self.param_groups[0]["params"]
        self.generators = random.Random(0), torch.Generator(), numpy.random.default_rng(0)

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # no closure
        for parameter in self.parameters:
            parameter.sub_(parameter.grad, alpha=0.1)
        state = self.state[self.parameters[0]]
        match self.kind:
            case "numpy" | "numpy-later" if self.kind == "numpy" or "count" in state:
                state["momentum"] = numpy.float64(0.9)
            case "object":
                self.state["shared"] = object()  # type: ignore[index]  # of no parameter
            case "group":
                self.param_groups[0]["update"] = lambda: None
            case "number":
                self.updates += 1
            case "tensors":
                self.moments[0] += 1
            case "aliases":
                state["last"] = state["mean"] = state.get("mean", torch.zeros(3))
            case "packed":
                state["last"], state["mean"] = Packed(torch.zeros(3)), Packed(torch.zeros(3))
            case "generator of Python":
                self.generators[0].random()
            case "generator of torch":
                torch.rand(1, generator=self.generators[1])
            case "generator of NumPy":
                self.generators[2].random()
        state["count"] = state.get("count", 0) + 1


class Saving(Descent):
    """Saves its own attributes, too."""

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "updates": self.updates}


def updates_of(kind: str, name: str = "Descent") -> PluginUpdates:
    """Return the updates of a plug-in's optimizer, after the first two."""
    settings, model = OptimizerSettings(name=f"{__name__}:{name}", options={"kind": kind}), a_model()
    optimizer = build_optimizer(settings, FlatWeights(model))
    updates = PluginUpdates(optimizer, settings.name, lambda step: nullcontext())
    for step in range(2):
        set_gradients(model, step)
        with updates(step):
            optimizer_step(optimizer)
    return updates


@pytest.mark.parametrize("kind", ["numpy", "numpy-later", "object", "group"])
def test_a_plugin_whose_state_of_an_update_checkpoints_could_not_give_back_is_refused(kind: str) -> None:
    with raises(UsageError, code="plugin-result"):
        updates_of(kind)


@pytest.mark.parametrize(
    ("kind", "name", "warnings"),
    [
        ("nothing", "Descent", 0),
        ("number", "Descent", 1),
        ("tensors", "Descent", 1),
        ("aliases", "Descent", 1),
        ("packed", "Descent", 0),
        *((f"generator of {library}", "Descent", 1) for library in ("Python", "torch", "NumPy")),
        ("number", "Saving", 0),
    ],
)
def test_what_a_plugin_keeps_that_a_resume_would_change_is_warned_of_once(
    kind: str, name: str, warnings: int, caplog: pytest.LogCaptureFixture
) -> None:
    updates_of(kind, name)
    assert len(caplog.messages) == warnings


class Scheduled(torch.optim.SGD):
    """Has a function in its groups, which its state dict leaves out."""

    def __init__(self, settings: OptimizerSettings, groups: Sequence[Group]) -> None:
        super().__init__([parameter for group in groups for parameter in group.parameters])
        self.param_groups[0]["factor"] = lambda update: 1.0

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        for group in state["param_groups"]:
            del group["factor"]
        return state


def test_what_a_plugin_leaves_out_of_its_state_dict_need_not_fit_a_checkpoint() -> None:
    optimizer = build_optimizer(OptimizerSettings(name=f"{__name__}:Scheduled"), FlatWeights(a_model()))
    set_numbers(optimizer, packed_numbers(optimizer), torch.device("cpu"))
    assert optimizer.param_groups[0]["factor"](3) == 1.0


@dataclass(frozen=True)
class Holding:
    """Makes optimizers of too few, too many, repeated or other parameters."""

    kind: str

    def __call__(self, settings: OptimizerSettings, groups: Sequence[Group]) -> torch.optim.Optimizer:
        every = [parameter for group in groups for parameter in group.parameters]
        other = nn.Parameter(torch.zeros(3))
        held = {"part": every[:-1], "others": [*every, other], "other": [other]}
        optimizer = torch.optim.SGD(held.get(self.kind, every))
        if self.kind == "twice":
            optimizer.param_groups.append({**optimizer.param_groups[0], "params": every[:1]})
        return optimizer


part, others, other, twice, every = map(Holding, ("part", "others", "other", "twice", "every"))


@pytest.mark.parametrize("kind", ["part", "others", "other", "twice"])
def test_an_optimizer_of_other_parameters_than_the_model_s_is_refused(kind: str) -> None:
    build_optimizer(OptimizerSettings(name=f"{__name__}:every"), FlatWeights(a_model()))
    with raises(UsageError, code="plugin-result") as refused:
        build_optimizer(OptimizerSettings(name=f"{__name__}:{kind}"), FlatWeights(a_model()))
    assert {"part": "1.bias", "other": "0.weight", "twice": "0.weight"}.get(kind, "1 tensors") in str(refused.value)


def with_a_slower_group(settings: OptimizerSettings, groups: Sequence[Group]) -> torch.optim.Optimizer:
    parts: list[dict[str, Any]] = [{"params": group.parameters} for group in groups]
    parts[1]["lr"] = 0.1 * settings.learning_rate
    return torch.optim.SGD(parts, lr=settings.learning_rate)


def test_a_plugin_s_groups_keep_the_ratio_of_their_rates_over_a_resume() -> None:
    settings = OptimizerSettings(name=f"{__name__}:with_a_slower_group", learning_rate=2.0, exclude=("bias", "norm"))
    optimizer = build_optimizer(settings, FlatWeights(a_model()))
    for rate in (0.0, 0.5):
        set_learning_rate(optimizer, rate)
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([rate, 0.1 * rate])
    set_learning_rate(optimizer, 0.0)
    resumed = build_optimizer(settings, FlatWeights(a_model()))
    resumed.load_state_dict(optimizer.state_dict())
    set_learning_rate(resumed, 3.0)
    assert [group["lr"] for group in resumed.param_groups] == pytest.approx([3.0, 0.3])


def with_a_faster_head(settings: OptimizerSettings, groups: Sequence[Group]) -> torch.optim.Optimizer:
    named = [pair for group in groups for pair in zip(group.names, group.parameters, strict=True)]
    heads = [parameter for name, parameter in named if name.startswith("1.")]
    others = [parameter for name, parameter in named if not name.startswith("1.")]
    parts: list[dict[str, Any]] = [{"params": heads}, {"params": others, "lr": 0.1 * settings.learning_rate}]
    return torch.optim.SGD(parts, lr=settings.learning_rate)


def test_a_plugin_may_give_rates_by_the_names_of_parameters() -> None:
    weights = FlatWeights(a_model())
    optimizer = build_optimizer(OptimizerSettings(name=f"{__name__}:with_a_faster_head", learning_rate=2.0), weights)
    rates = {parameter: group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
    for segment, parameter in zip(weights.segments, weights.parameters, strict=True):
        assert rates[parameter] == pytest.approx(2.0 if segment.name.startswith("1.") else 0.2), segment.name


def with_a_rate_of_its_own(
    settings: OptimizerSettings, groups: Sequence[Group], options: dict[str, Any]
) -> torch.optim.Optimizer:
    return torch.optim.SGD([each for group in groups for each in group.parameters], lr=options["rate"])


@pytest.mark.parametrize("rate", [0.5, torch.tensor(0.1), 1e-3])
def test_a_rate_that_the_schedule_replaces_is_warned_of(rate: Any, caplog: pytest.LogCaptureFixture) -> None:
    for wanted in (0.1, 0.5):
        caplog.clear()
        name, options = f"{__name__}:with_a_rate_of_its_own", {"rate": rate}
        settings = OptimizerSettings(name=name, options=options, learning_rate=wanted)
        build_optimizer(settings, FlatWeights(a_model()))
        is_replaced = float(rate) != pytest.approx(wanted)
        assert [f"{float(rate):g}" in message for message in caplog.messages] == [True] * is_replaced


def with_a_first_group_of(
    settings: OptimizerSettings, groups: Sequence[Group], options: dict[str, float]
) -> torch.optim.Optimizer:
    parts: list[dict[str, Any]] = [{"params": group.parameters} for group in groups]
    parts[0]["lr"] = options["factor"] * settings.learning_rate
    return torch.optim.SGD(parts, lr=settings.learning_rate)


@pytest.mark.parametrize("factor", [0.0, 0.1, 10.0])
def test_a_first_group_with_another_rate_than_that_of_the_settings_which_others_have_is_refused(factor: float) -> None:
    name, options = f"{__name__}:with_a_first_group_of", {"factor": factor}
    settings = OptimizerSettings(name=name, options=options, exclude=("bias", "norm"))
    with raises(UsageError, code="plugin-result"):
        build_optimizer(settings, FlatWeights(a_model()))


class WithoutRate(torch.optim.SGD):
    """Has no rate of its own until the first update sets one."""

    def __init__(self, settings: OptimizerSettings, groups: Sequence[Group]) -> None:
        super().__init__([parameter for group in groups for parameter in group.parameters])
        self.param_groups[0]["lr"] = None


def test_a_rate_of_none_is_that_of_the_schedule() -> None:
    optimizer = build_optimizer(OptimizerSettings(name=f"{__name__}:WithoutRate"), FlatWeights(a_model()))
    set_learning_rate(optimizer, 0.5)
    assert optimizer.param_groups[0]["lr"] == 0.5


def optimizer_of(kind: type[torch.optim.Optimizer], **options: Any) -> tuple[torch.optim.Optimizer, FlatWeights]:
    """Return an optimizer of seven weights, and these with a gradient of 0."""
    weights = FlatWeights(nn.ParameterList([nn.Parameter(torch.linspace(-1, 1, 7))]))
    optimizer = kind(weights.parameters, lr=0.1, **options)  # type: ignore[call-arg]  # every kind has a rate
    return optimizer, weights


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (torch.optim.SGD, {"momentum": 0.9, "nesterov": True, "fused": True}),
        (torch.optim.Adam, {"fused": True}),
        (torch.optim.AdamW, {"weight_decay": 0.1}),
    ],
)
def test_optimizer_step_does_bit_for_bit_what_the_optimizer_s_own_step_does(
    kind: type[torch.optim.Optimizer], options: dict[str, Any]
) -> None:
    (theirs, expected), (other, weights) = optimizer_of(kind, **options), optimizer_of(kind, **options)
    for update in range(3):
        for each in (expected, weights):
            each.gradients.fill_(0.5 + update)
        theirs.step()
        optimizer_step(other, weights)
        assert torch.equal(expected.values, weights.values)
        assert weights.parameters[0].requires_grad


def bounded(step: Callable[[Any], None]) -> Callable[[Any], None]:
    @functools.wraps(step)
    def step_within_bounds(optimizer: Any) -> None:
        step(optimizer)
        with torch.no_grad():
            for parameter in optimizer.param_groups[0]["params"]:
                parameter.clamp_(-0.5, 0.5)

    return step_within_bounds


class BoundedSgd(torch.optim.SGD):
    @bounded
    def step(self) -> None:  # type: ignore[override]  # no closure
        super().step()


def test_what_a_plugin_s_optimizer_does_around_its_step_is_done() -> None:
    (optimizer, weights), (hooked, others) = optimizer_of(BoundedSgd), optimizer_of(torch.optim.SGD)
    called: list[object] = []
    hooked.register_step_post_hook(lambda optimizer, *_: called.append(optimizer))
    optimizer_step(optimizer, weights)
    optimizer_step(hooked, others)
    assert float(weights.values.abs().max()) == 0.5
    assert called == [hooked]


class Replacing(torch.optim.SGD):
    """Which gives each parameter new tensors."""

    def step(self) -> None:  # type: ignore[override]  # no closure
        for parameter in self.param_groups[0]["params"]:
            parameter.data, parameter.grad = parameter.data * 0.5, None


def test_weights_and_gradients_that_a_plugin_replaces_are_in_their_buffers_again() -> None:
    optimizer, weights = optimizer_of(Replacing)
    expected = weights.values * 0.5
    optimizer_step(optimizer, weights)
    assert torch.equal(weights.values, expected)
    weights.gradients.zero_()
    torch.autograd.backward([parameter.sum() for parameter in weights.parameters])  # as SAM's ascent
    assert torch.equal(weights.gradients, weights.mask(()))


@pytest.mark.parametrize(
    "register", [register_optimizer_step_pre_hook, register_optimizer_step_post_hook], ids=["pre", "post"]
)
def test_hooks_of_all_optimizers_are_called(register: Callable[[Callable[..., None]], RemovableHandle]) -> None:
    optimizer, weights = optimizer_of(torch.optim.SGD)
    called: list[object] = []
    handle = register(lambda optimizer, *_: called.append(optimizer))
    try:
        optimizer_step(optimizer, weights)
    finally:
        handle.remove()
    assert called == [optimizer]


def test_a_step_that_a_plugin_has_replaced_is_called() -> None:
    optimizer, weights = optimizer_of(torch.optim.SGD)
    called: list[object] = []
    vars(optimizer)["step"] = lambda: called.append(optimizer)
    optimizer_step(optimizer, weights)
    assert called == [optimizer]
