from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from dist_train.optim.eager_step import eager_step


def optimizer_of(kind: type[torch.optim.Optimizer], **options: Any) -> tuple[torch.optim.Optimizer, torch.nn.Parameter]:
    weight = torch.nn.Parameter(torch.linspace(-1, 1, 7))
    optimizer = kind([weight], lr=0.1, **options)  # type: ignore[call-arg]  # every kind has a rate
    return optimizer, weight


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (torch.optim.SGD, {"momentum": 0.9, "nesterov": True, "fused": True}),
        (torch.optim.Adam, {"fused": True}),
        (torch.optim.AdamW, {"weight_decay": 0.1}),
    ],
)
def test_it_does_to_the_bit_what_the_optimizer_s_own_step_does(
    kind: type[torch.optim.Optimizer], options: dict[str, Any]
) -> None:
    (theirs, expected), (other, weight) = optimizer_of(kind, **options), optimizer_of(kind, **options)
    step = eager_step(other)
    for update in range(3):
        for parameter in (expected, weight):
            parameter.grad = torch.full((7,), 0.5 + update)
        theirs.step()
        step()
        assert torch.equal(expected, weight)
        assert weight.requires_grad


def test_the_hooks_before_a_step_are_run() -> None:
    optimizer, weight = optimizer_of(torch.optim.SGD)
    weight.grad = torch.ones(7)
    called: list[object] = []
    optimizer.register_step_pre_hook(lambda *arguments: called.append(arguments[0]))
    eager_step(optimizer)()
    assert called == [optimizer]


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_an_update_does_not_load_torch_s_compiler(name: str) -> None:
    script = f"""
import sys, torch
from dist_train.config import OptimizerSettings
from dist_train.optim.flat_weights import FlatWeights
from dist_train.optim.optimizers import build_optimizer
weights = FlatWeights(torch.nn.Linear(3, 2))
optimizer = build_optimizer(OptimizerSettings(name="{name}"), weights)
optimizer.load_state_dict(optimizer.state_dict())
weights.gradients.fill_(1.0)
optimizer.step()
print("torch._dynamo" in sys.modules)
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "False"
