"""A whole step on an emulated GPU: no operator mixes devices, and the host waits only where expected."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import traffic
from benchmarks.emulation import KNOWN_WAITS, Emulated, Job, emulate
from tests.launching import mostly_lengthy
from tests.unit.small_trainers import SETTINGS

Sections = dict[str, dict[str, Any]]

_DISTRIBUTIONS = ("uniform", "normal")
NOISE: list[Sections] = [
    {"noise": {"method": "none"}},
    {"noise": {"method": "sam", "sharing": "micro_batch"}},
    {"noise": {"method": "asam", "sharing": "micro_batch"}},
    {"noise": {"method": "sgld"}},
    {"noise": {"method": "fsgld", "antithetic": True}},
    {"noise": {"method": "arwp", "scale": "filter_norm", "draws": 2, "mix": 0.5}},
    {"noise": {"method": "smoothout", "sharing": "micro_batch", "target_rise": 0.05}},
    {"noise": {"method": "smoothout", "antithetic": True, "passes": "one", "sharing": "micro_batch"}},
    {"noise": {"method": "ivon"}, "optimizer": {"momentum": 0.0, "nesterov": False}},
    *({"noise": {"method": "langevin", "scale": scale}} for scale in ("absolute", "weight", "filter")),
    # Each scale with each sharing, both with both distributions.
    *(
        {
            "noise": {
                "method": "smoothout",
                "scale": scale,
                "sharing": sharing,
                "distribution": _DISTRIBUTIONS[(i + j) % 2],
            }
        }
        for i, scale in enumerate(("absolute", "weight", "filter"))
        for j, sharing in enumerate(("global", "rank", "micro_batch"))
    ),
]
NORMS: list[Sections] = [
    {"model": {"norm": norm}, "precision": {"compute": compute}, "run": {"device": "cuda"}}
    # SETTINGS uses ghost norm in float32.
    for norm, compute in (
        ("batch", "bfloat16"),
        ("batch", "float32"),
        ("ghost", "bfloat16"),
        ("ghost", "float16"),
        ("sync", "bfloat16"),
        ("sync", "float32"),
        ("group", "bfloat16"),
        ("group", "float32"),
        ("none", "float16"),
    )
]
OPTIMIZERS: list[Sections] = [
    {"optimizer": {"name": name, "weight_decay": 0.01, "clip_norm": 1.0}}
    for name in ("sgd", "adam", "adamw", "lars", "lamb")
]
REDUCTIONS: list[Sections] = [
    {"comm": {"reduction": "exact"}},
    {"comm": {"reduction": "exact32"}},
    {"comm": {"reduction": "exact16"}},
    {"comm": {"reduction": "float"}},
    {"comm": {"reduction": "float", "compression": "fp16"}},
    {"comm": {"reduction": "float", "op": "adasum"}, "noise": {"method": "none"}},
]
MODELS: list[Sections] = [
    {"model": {"name": "resnet18"}},
    {"precision": {"channels_last": False}},
    {"model": {"ghost_size": 2}, "data": {"augment": "crop-flip"}},
]
FEATURES: list[Sections] = [
    {"averaging": {"kind": "ema"}, "regularization": {"mixup": 0.2, "label_smoothing": 0.1}},
    {"batch": {"dealing": "measured"}},
    {"averaging": {"kind": "lawa", "every_steps": 1}, "regularization": {"mixup": 0.2, "cutmix": 1.0}},
]
GRAPHED: list[Sections] = [
    {"noise": {"method": "sam", "sharing": "micro_batch"}},
    {"noise": {"sharing": "micro_batch", "draws": 2, "mix": 0.5}, "model": {"norm": "batch"}},
    {"comm": {"reduction": "exact32"}, "regularization": {"mixup": 0.2, "cutmix": 1.0, "label_smoothing": 0.1}},
    {"comm": {"reduction": "float"}, "model": {"name": "resnet18", "norm": "group"}},
]
GRAPHS: list[Sections] = [{"precision": {"cuda_graphs": True}, **sections} for sections in GRAPHED]
WITH_TRITON = [*NOISE, *NORMS, *OPTIMIZERS, *REDUCTIONS, *MODELS, *FEATURES, *GRAPHS]
WITHOUT_TRITON = [NORMS[2], *REDUCTIONS[:3], *MODELS, GRAPHS[2]]
"""As where there is no compiler."""
CASES = [*((case, True) for case in WITH_TRITON), *((case, False) for case in WITHOUT_TRITON)]


EVERY_SIXTH = CASES[::6]
"""Not lengthy: all 59 take a minute."""


@pytest.fixture(scope="module")
def emulated(request: pytest.FixtureRequest) -> dict[tuple[str, bool], Emulated]:
    """The selected cases: one process emulates them all."""
    tests = [item for item in request.session.items if isinstance(item, pytest.Function)]
    values = [test.callspec.params for test in tests if "emulated" in test.fixturenames]
    selected = [(each["case"], each["triton"]) for each in values]
    cases = [case for case in CASES if case in selected]
    names = {*SETTINGS, *(name for case in WITH_TRITON for name in case)}
    small = {**SETTINGS, "batch": {"global_size": 16, "micro_size": 4}, "model": {"width": 0.03125, "ghost_size": 2}}
    jobs = [
        Job({name: {**small.get(name, {}), **case.get(name, {})} for name in names}, ranks=2, triton=triton)
        for case, triton in cases
    ]
    return {(str(case), triton): found for (case, triton), found in zip(cases, emulate(jobs), strict=True)}


@pytest.mark.parametrize(
    ("case", "triton"),
    mostly_lengthy([*EVERY_SIXTH, *(case for case in CASES if case not in EVERY_SIXTH)], keep=len(EVERY_SIXTH)),
    ids=str,
)
def test_step_mixes_no_devices_and_waits_only_for_its_result(
    emulated: dict[tuple[str, bool], Emulated], case: Sections, triton: bool
) -> None:
    found = emulated[str(case), triton]
    assert found.error == ""
    assert found.mixed == ()
    assert found.waits.keys() == KNOWN_WAITS
    assert found.operators > 0


def test_step_has_little_more_traffic_and_kernels_than_plain_pytorch() -> None:
    assert [row.row for row in traffic.rows() if not row.holds] == []
