"""Settings that do not go together are refused with the reason; settings without effect are told."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from dist_train.config import Config, NoiseSettings, parse_config
from dist_train.config.combinations import _unused, unused_settings
from dist_train.config.loading import with_overrides
from dist_train.data.augmentation import crop_flip
from tests.raising import raises_problems

FLOAT = {"reduction": "float"}
NOISE = {"method": "smoothout"}


def parse(settings: dict[str, Any]) -> Config:
    return parse_config(settings, source="here")


def overridden(overrides: str) -> Config:
    return parse(with_overrides({}, overrides.split()))


ADASUM = "comm.op=adasum comm.reduction=float"
GRAPHS = "precision.cuda_graphs"
STOPPING = "early_stopping.patience=2"
PERTURBED = "noise.method=smoothout"
PLAIN = "optimizer.momentum=0 optimizer.nesterov=false"


@pytest.mark.parametrize(
    ("settings", "fix", "path", "code"),
    [
        ("precision.compute=float16 run.device=cpu", "run.device=cuda", "precision.compute", "float16-on-cpu"),
        (f"{GRAPHS}=true run.device=cpu", f"{GRAPHS}=false", GRAPHS, "cuda-graphs-on-cpu"),
        (f"{GRAPHS}=true precision.compile=true run.device=cuda", f"{GRAPHS}=false", GRAPHS, "cuda-graphs-compile"),
        (f"{GRAPHS}=true model.norm=sync", f"{GRAPHS}=false", GRAPHS, "cuda-graphs-sync"),
        ("comm.compression=fp16", "comm.reduction=float", "comm.compression", "exact-compression"),
        ("comm.op=adasum", "comm.reduction=float", "comm.op", "adasum-exact"),
        (f"{ADASUM} {PERTURBED}", "comm.op=average", "comm.op", "adasum-with-noise"),
        (f"{ADASUM} noise.method=langevin", "noise.method=none", "comm.op", "adasum-with-noise"),
        (
            f"{ADASUM} noise.method=sam noise.sharing=micro_batch",
            "noise.method=none",
            "comm.op",
            "adasum-with-noise",
        ),
        ("batch.dealing=measured model.norm=sync", "batch.dealing=even", "batch.dealing", "dealing-sync"),
        (f"batch.dealing=measured {ADASUM}", "batch.dealing=even", "batch.dealing", "dealing-adasum"),
        (
            f"batch.dealing=measured noise.sharing=rank {PERTURBED}",
            "batch.dealing=even",
            "batch.dealing",
            "dealing-rank-noise",
        ),
        (
            f"{STOPPING} early_stopping.metric=validation.loss",
            "data.validation_size=10",
            "early_stopping.metric",
            "metric-not-measured",
        ),
        (
            f"{STOPPING} early_stopping.metric=test-averaged.accuracy",
            "averaging.kind=ema",
            "early_stopping.metric",
            "metric-not-measured",
        ),
        (
            f"{STOPPING} evaluation.every_epochs=0",
            "evaluation.every_epochs=3",
            "early_stopping.patience",
            "stopping-without-evaluations",
        ),
        (
            "batch.global_size=64 batch.micro_size=65",
            "batch.micro_size=64",
            "batch.micro_size",
            "micro-above-global",
        ),
        ("batch.global_size=65 batch.micro_size=16", "model.norm=none", "batch.micro_size", "one-sample-left"),
        (
            "batch.global_size=64 batch.micro_size=1 model.norm=batch",
            "batch.micro_size=2",
            "batch.micro_size",
            "one-sample-left",
        ),
        ("batch.global_size=1", "model.norm=none", "batch.global_size", "one-sample-batch"),
        ("optimizer.momentum=0", "optimizer.nesterov=false", "optimizer.nesterov", "nesterov-without-momentum"),
        ("schedule.decay=step", "schedule.milestones=[5]", "schedule.milestones", "step-without-milestones"),
        (
            "run.epochs=4 schedule.warmup_epochs=4.5",
            "schedule.warmup_epochs=4",
            "schedule.warmup_epochs",
            "warmup-too-long",
        ),
        (
            "loss.name=tests.unit.test_models_loss:squared regularization.label_smoothing=0.1",
            "regularization.label_smoothing=0",
            "regularization.label_smoothing",
            "smoothing-of-loss",
        ),
        (
            "noise.method=langevin noise.sharing=rank noise.scale=filter noise.distribution=normal",
            "noise.sharing=global",
            "noise.sharing",
            "langevin-sharing",
        ),
        (
            "noise.method=langevin noise.sharing=micro_batch",
            "noise.sharing=global",
            "noise.sharing",
            "langevin-sharing",
        ),
        (f"noise.method=ivon noise.sharing=rank {PLAIN}", "noise.sharing=global", "noise.sharing", "ivon-sharing"),
        ("noise.method=ivon", PLAIN, "optimizer.name", "ivon-optimizer"),
        (
            f"{PERTURBED} noise.mix=0.5 noise.passes=one batch.global_size=64 batch.micro_size=64",
            "batch.micro_size=32",
            "noise.passes",
            "passes-unequal",
        ),
        (f"{PERTURBED} noise.draws=2 noise.passes=one", "noise.draws=1", "noise.passes", "passes-unequal"),
        (f"{PERTURBED} noise.antithetic=true noise.passes=one", "noise.passes=all", "noise.passes", "passes-unequal"),
        (
            f"{PERTURBED} noise.antithetic=true noise.passes=one noise.sharing=rank batch.micro_size=32",
            "noise.sharing=micro_batch",
            "noise.sharing",
            "passes-rank-noise",
        ),
        (
            f"{PERTURBED} noise.target_rise=0.05 noise.schedule.kind=cosine",
            "noise.schedule.kind=constant",
            "noise.target_rise",
            "target-rise-schedule",
        ),
        (
            f"{PERTURBED} noise.target_rise=0.05 noise.amplitude=0",
            "noise.amplitude=0.1",
            "noise.amplitude",
            "target-rise-amplitude",
        ),
        ("noise.method=sam", "noise.sharing=micro_batch", "noise.sharing", "sam-sharing"),
        (
            "noise.method=sam noise.sharing=micro_batch noise.scale=filter",
            "noise.scale=absolute",
            "noise.scale",
            "sam-scale",
        ),
    ],
)
def test_what_does_not_go_together_is_refused_with_a_fix(settings: str, fix: str, path: str, code: str) -> None:
    with raises_problems((path, code)):
        overridden(settings)
    overridden(f"{settings} {fix}")


def test_a_later_batch_of_one_sample_is_a_problem_of_the_schedule() -> None:
    batch = {"micro_size": 1, "schedule": [{"epoch": 1, "global_size": 1}]}
    with raises_problems(("batch.schedule", "one-sample-batch"), ("batch.micro_size", "one-sample-left")):
        parse({"batch": batch, "model": {"norm": "batch"}})


@pytest.mark.parametrize(
    ("kind", "parameter", "owner"),
    [
        ("constant", "gamma", "inverse_power"),
        ("linear", "steepness", "tanh"),
        ("cosine", "final_fraction", "exponential"),
        ("exponential", "gamma", "inverse_power"),
        ("inverse_power", "steepness", "tanh"),
        ("tanh", "final_fraction", "exponential"),
    ],
)
def test_a_schedule_s_parameter_belongs_to_its_kind_alone(kind: str, parameter: str, owner: str) -> None:
    def noise(kind: str) -> dict[str, Any]:
        return {"noise": {**NOISE, "schedule": {"kind": kind, parameter: 0.5}}}

    with raises_problems((f"noise.schedule.{parameter}", "unknown-key")):
        parse(noise(kind))
    parse(noise(owner))


def test_all_conflicts_are_told_at_once() -> None:
    found = [("comm.op", "adasum-with-noise"), ("optimizer.nesterov", "nesterov-without-momentum")]
    with raises_problems(*found, ("schedule.milestones", "step-without-milestones")):
        parse(
            {
                "comm": {"op": "adasum", "compression": "fp16", **FLOAT},
                "noise": NOISE,
                "optimizer": {"momentum": 0.0},
                "schedule": {"decay": "step"},
            }
        )


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ("averaging.decay=0.9", "averaging.kind is not ema"),
        ("averaging.last=3", "averaging.kind is not lawa"),
        ("averaging.every_steps=3", "averaging.kind is none"),
        ("early_stopping.min_delta=1", "early_stopping.patience is not set"),
        ("schedule.final_fraction=0.1", "schedule.decay is not exponential"),
        ("noise.amplitude=0.1", "noise.method is none"),
        ("noise.sharing=global", "noise.method is none"),
        ('noise.schedule={"kind":"cosine"}', "noise.method is none"),
        ("noise.exclude=[]", "noise.method is none"),
        ("noise.distribution=normal", "noise.method is none"),
        ("noise.scale=filter", "noise.method is none"),
        ("noise.mix=0.5 noise.method=langevin", "this noise.method does not average over draws"),
        (f"noise.passes=one {PERTURBED}", "each micro-batch has a single point"),
        ("model.norm_samples=100 model.norm=group averaging.kind=ema", "the norm statistics are not recomputed"),
        (f"noise.amplitude=0.1 noise.method=ivon {PLAIN}", "ivon has its own way of drawing"),
        (f"noise.offset=0.1 {PERTURBED}", "noise.method is not asam"),
        (
            "noise.distribution=normal noise.method=sam noise.sharing=micro_batch",
            "this method draws nothing",
        ),
        ("model.ghost_size=8 model.norm=batch", "model.norm is not ghost"),
        ("model.norm_statistics=running model.norm=none", "this norm has no running statistics"),
        ("model.norm_samples=100", "the norm statistics are not recomputed"),
        ("optimizer.exclude=[norm]", "optimizer.weight_decay is 0"),
        ("schedule.base_batch=8", "schedule.scaling is none"),
        ("schedule.warmup_epochs=2", "schedule.scaling is none, so there is no higher rate to rise to"),
        ("schedule.milestones=[3]", "schedule.decay is not step"),
        (
            "schedule.milestones=[30,45] schedule.decay=step run.epochs=30",
            "the run ends before them, after run.epochs, 30",
        ),
        ("schedule.factor=0.5", "schedule.decay is not step"),
        ("precision.tf32=true run.device=cpu", "run.device is cpu"),
        (f"comm.compression=fp16 {ADASUM}", "adasum combines float32 gradients"),
        ("data.download=true", "only CIFAR can be downloaded"),
        ("data.root=/data data.name=synthetic", "synthetic images are generated"),
        ("data.loader_workers=2", "this data set is held in memory"),
        ("data.synthetic_samples=9", "data.name is not synthetic"),
        ("data.synthetic_shape=[1,8,8]", "data.name is not synthetic"),
        ("data.synthetic_classes=3", "data.name is not synthetic"),
        ("metrics.host=localhost metrics.enabled=false", "metrics.enabled is false"),
        ("metrics.port=1 metrics.enabled=false", "metrics.enabled is false"),
    ],
)
def test_a_setting_without_effect_is_told(settings: str, why: str) -> None:
    path = settings.partition("=")[0]
    assert list(unused_settings(overridden(settings)).values()) == [f"{path} has no effect: {why}"]


@pytest.mark.parametrize(
    ("shape", "is_told"),
    [
        ([32, 32, 3], True),
        ([28, 28, 1], True),
        ([480, 640, 3], True),
        ([3, 32, 32], False),
        ([1, 28, 28], False),
        ([12, 5000, 1], False),  # a signal of twelve channels
        ([8, 8, 8], False),
        ([4, 4, 4], False),
    ],
)
def test_a_shape_that_seems_to_have_its_channels_last_is_told(shape: list[int], is_told: bool) -> None:
    data = {"name": "numpy", "root": "here", "shape": shape, "classes": 2}
    assert list(unused_settings(parse({"data": data}))) == (["data.shape"] if is_told else [])
    synthetic = {"name": "synthetic", "synthetic_shape": shape}
    assert list(unused_settings(parse({"data": synthetic}))) == (["data.synthetic_shape"] if is_told else [])


@pytest.mark.parametrize(("height", "width"), [(1, 28), (28, 4), (2, 3), (5, 5)])
def test_shifts_that_leave_images_blank_are_told(height: int, width: int) -> None:
    data = {"name": "synthetic", "synthetic_shape": [1, height, width], "augment": "crop-flip"}
    told = unused_settings(parse({"data": data}))
    whole = crop_flip(torch.ones(9000, 1, height, width, dtype=torch.uint8), torch.arange(9000), seed=0, epoch=0)
    blank = float((whole.flatten(1).amax(1) == 0).float().mean())
    assert list(told) == (["data.augment"] if blank else [])
    shares = [int(number) / 100 for number in re.findall(r"(\d+)%", str(told))]
    assert shares == ([pytest.approx(blank, abs=0.02)] if blank else [])


@pytest.mark.parametrize(
    ("scaling", "decay", "is_told"),
    [("none", "cosine", True), ("none", f"{__name__}:any_plugin", True), ("sqrt", "cosine", False)],
)
def test_a_warm_up_at_a_constant_rate_is_told(scaling: str, decay: str, is_told: bool) -> None:
    schedule = {"warmup_epochs": 2, "scaling": scaling, "decay": decay}
    told = unused_settings(parse({"schedule": schedule}))
    assert list(told) == (["schedule.warmup_epochs"] if is_told else [])
    assert "no effect" not in str(told)  # it delays the decay


def test_settings_with_effect_and_settings_not_given_are_not_told() -> None:
    assert unused_settings(Config()) == {}
    recorded = Config().model_dump(mode="json")
    assert unused_settings(parse(recorded)) == {}
    del recorded["early_stopping"], recorded["noise"]["offset"]  # as by an older version
    assert unused_settings(parse(recorded)) == {}
    # the average has statistics of its own
    assert unused_settings(parse({"averaging": {"kind": "ema"}, "model": {"norm_samples": 64}})) == {}
    used = {
        "noise": {**NOISE, "amplitude": 0.1, "sharing": "global", "schedule": {"kind": "cosine"}},
        "model": {"norm": "ghost", "ghost_size": 8, "norm_samples": 64, "norm_statistics": "auto"},
        "schedule": {"scaling": "sqrt", "base_batch": 8, "decay": "step", "milestones": [3], "factor": 0.5},
        "data": {"name": "synthetic", "synthetic_samples": 9, "synthetic_shape": [1, 8, 8]},
        "metrics": {"host": "::", "port": 1},
    }
    assert unused_settings(parse(used)) == {}
    assert unused_settings(parse({"data": {"name": "cifar100", "download": True}})) == {}
    for optimizer in ({"weight_decay": 0.1}, {"name": "lars"}, {"name": "lamb"}):
        assert unused_settings(parse({"optimizer": {**optimizer, "exclude": ["norm"]}})) == {}


def any_plugin(*arguments: object, **keywords: object) -> None: ...


def test_a_plug_in_may_use_all_of_the_section_that_it_is_given() -> None:
    name = f"{__name__}:any_plugin"
    used = {
        "optimizer": {"name": name, "momentum": 0.8, "nesterov": False, "epsilon": 1e-7},
        "noise": {"method": name, "draws": 2, "antithetic": True, "offset": 0.1},
        "data": {"name": name, "shape": [1, 8, 8], "classes": 2, "download": True, "loader_workers": 1},
    }
    assert unused_settings(parse(used)) == {}


def test_every_setting_that_can_be_idle_is_a_setting() -> None:
    for section, names, _, _ in _unused(Config()):
        assert set(names.split()) <= type(getattr(Config(), section)).model_fields.keys(), names


@pytest.mark.parametrize(
    ("norm", "statistics", "method", "recomputed"),
    [
        ("ghost", "auto", "smoothout", True),
        ("ghost", "auto", "none", False),
        ("batch", "recomputed", "none", True),
        ("batch", "running", "smoothout", False),
        ("none", "recomputed", "smoothout", False),
    ],
)
def test_statistics_are_recomputed_where_noise_is_on_or_where_it_is_asked_for(
    norm: str, statistics: str, method: str, recomputed: bool
) -> None:
    model = {"norm": norm, "norm_statistics": statistics}
    assert parse({"model": model, "noise": {"method": method}}).recomputes_statistics is recomputed


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"method": "none"}, "none"),
        (
            {"method": "smoothout", "mix": 0.5, "draws": 2},
            "smoothout, uniform 0.01, global, constant, draws 2, mix 0.5",
        ),
        ({"method": "sam", "sharing": "micro_batch", "draws": 2}, "sam, 0.01, micro_batch, constant"),
        ({"method": "ivon", "draws": 2}, "ivon"),
    ],
)
def test_of_the_noise_only_what_its_method_uses_is_told(settings: dict[str, Any], told: str) -> None:
    assert NoiseSettings(**settings).summary == told
