"""Settings that do not go together are refused with the reason; settings without effect are told."""

from __future__ import annotations

from typing import Any

import pytest

from dist_train.config import Config, parse_config
from dist_train.config.combinations import _unused, unused_settings
from tests.raising import raises_problems

FLOAT = {"reduction": "float"}
NOISE = {"method": "smoothout"}
PLAIN = {"name": "sgd", "momentum": 0.0, "nesterov": False}


def parse(settings: dict[str, Any]) -> Config:
    return parse_config(settings, source="here")


@pytest.mark.parametrize(
    ("settings", "path", "code", "fix"),
    [
        (
            {"precision": {"compute": "float16"}, "run": {"device": "cpu"}},
            "precision.compute",
            "float16-on-cpu",
            {"precision": {"compute": "float16"}, "run": {"device": "cuda"}},
        ),
        *(
            (
                {"precision": {"cuda_graphs": True, **precision}, **beside},
                "precision.cuda_graphs",
                code,
                {"precision": {"cuda_graphs": False, **precision}, **beside},
            )
            for code, precision, beside in (
                ("cuda-graphs-on-cpu", {}, {"run": {"device": "cpu"}}),
                ("cuda-graphs-compile", {"compile": True}, {"run": {"device": "cuda"}}),
                ("cuda-graphs-sync", {}, {"model": {"norm": "sync"}}),
            )
        ),
        (
            {"comm": {"compression": "fp16"}},
            "comm.compression",
            "exact-compression",
            {"comm": {"compression": "fp16", **FLOAT}},
        ),
        (
            {"comm": {"op": "adasum"}},
            "comm.op",
            "adasum-exact",
            {"comm": {"op": "adasum", **FLOAT}},
        ),
        (
            {"comm": {"op": "adasum", **FLOAT}, "noise": NOISE},
            "comm.op",
            "adasum-with-noise",
            {"comm": {"op": "average", **FLOAT}, "noise": NOISE},
        ),
        *(
            (
                {"batch": {"dealing": "measured"}, **beside},
                "batch.dealing",
                code,
                {"batch": {"dealing": "even"}, **beside},
            )
            for code, beside in (
                ("dealing-sync", {"model": {"norm": "sync"}}),
                ("dealing-adasum", {"comm": {"op": "adasum", **FLOAT}}),
                ("dealing-rank-noise", {"noise": {"sharing": "rank", **NOISE}}),
            )
        ),
        (
            {"early_stopping": {"patience": 2, "metric": "validation.loss"}},
            "early_stopping.metric",
            "metric-not-measured",
            {"early_stopping": {"patience": 2, "metric": "validation.loss"}, "data": {"validation_size": 10}},
        ),
        (
            {"early_stopping": {"patience": 2, "metric": "test-averaged.accuracy"}},
            "early_stopping.metric",
            "metric-not-measured",
            {
                "early_stopping": {"patience": 2, "metric": "test-averaged.accuracy"},
                "averaging": {"kind": "ema"},
            },
        ),
        (
            {"early_stopping": {"patience": 2}, "evaluation": {"every_epochs": 0}},
            "early_stopping.patience",
            "stopping-without-evaluations",
            {"early_stopping": {"patience": 2}, "evaluation": {"every_epochs": 3}},
        ),
        (
            {"batch": {"global_size": 64, "micro_size": 65}},
            "batch.micro_size",
            "micro-above-global",
            {"batch": {"global_size": 64, "micro_size": 64}},
        ),
        (
            {"batch": {"global_size": 65, "micro_size": 16}},
            "batch.micro_size",
            "one-sample-left",
            {"batch": {"global_size": 65, "micro_size": 16}, "model": {"norm": "none"}},
        ),
        (
            {"batch": {"global_size": 64, "micro_size": 1}, "model": {"norm": "batch"}},
            "batch.micro_size",
            "one-sample-left",
            {"batch": {"global_size": 64, "micro_size": 2}, "model": {"norm": "batch"}},
        ),
        (
            {"batch": {"global_size": 1}},
            "batch.global_size",
            "one-sample-batch",
            {"batch": {"global_size": 1}, "model": {"norm": "none"}},
        ),
        (
            {"optimizer": {"momentum": 0.0}},
            "optimizer.nesterov",
            "nesterov-without-momentum",
            {"optimizer": {"momentum": 0.0, "nesterov": False}},
        ),
        (
            {"schedule": {"decay": "step"}},
            "schedule.milestones",
            "step-without-milestones",
            {"schedule": {"decay": "step", "milestones": [5]}},
        ),
        (
            {"run": {"epochs": 4}, "schedule": {"warmup_epochs": 4.5}},
            "schedule.warmup_epochs",
            "warmup-too-long",
            {"run": {"epochs": 4}, "schedule": {"warmup_epochs": 4}},
        ),
        (
            {"noise": {"method": "langevin", "sharing": "rank"}},
            "noise.sharing",
            "langevin-sharing",
            {"noise": {"method": "langevin", "sharing": "global", "scale": "filter", "distribution": "normal"}},
        ),
        (
            {"noise": {"method": "langevin", "sharing": "micro_batch"}},
            "noise.sharing",
            "langevin-sharing",
            {"noise": {"method": "langevin"}},
        ),
        (
            {"noise": {"method": "ivon", "sharing": "rank"}, "optimizer": PLAIN},
            "noise.sharing",
            "ivon-sharing",
            {"noise": {"method": "ivon"}, "optimizer": PLAIN},
        ),
        (
            {"noise": {"method": "ivon"}},
            "optimizer.name",
            "ivon-optimizer",
            {"noise": {"method": "ivon"}, "optimizer": PLAIN},
        ),
        (
            {"noise": {**NOISE, "mix": 0.5, "passes": "one"}, "batch": {"global_size": 64, "micro_size": 64}},
            "noise.passes",
            "passes-unequal",
            {"noise": {**NOISE, "mix": 0.5, "passes": "one"}, "batch": {"global_size": 64, "micro_size": 32}},
        ),
        (
            {"noise": {**NOISE, "draws": 2, "passes": "one"}},
            "noise.passes",
            "passes-unequal",
            {"noise": {**NOISE, "draws": 1, "passes": "one"}},
        ),
        (
            {"noise": {**NOISE, "target_rise": 0.05, "schedule": {"kind": "cosine"}}},
            "noise.target_rise",
            "target-rise-schedule",
            {"noise": {**NOISE, "target_rise": 0.05}},
        ),
        (
            {"noise": {**NOISE, "target_rise": 0.05, "amplitude": 0.0}},
            "noise.amplitude",
            "target-rise-amplitude",
            {"noise": {**NOISE, "target_rise": 0.05}},
        ),
        (
            {"noise": {**NOISE, "antithetic": True, "passes": "one"}},
            "noise.passes",
            "passes-unequal",
            {"noise": {**NOISE, "antithetic": True}},
        ),
        (
            {"noise": {"method": "sam"}},
            "noise.sharing",
            "sam-sharing",
            {"noise": {"method": "sam", "sharing": "micro_batch"}},
        ),
        (
            {"noise": {"method": "sam", "sharing": "micro_batch", "scale": "filter"}},
            "noise.scale",
            "sam-scale",
            {"noise": {"method": "sam", "sharing": "micro_batch", "scale": "absolute"}},
        ),
        *(
            (
                {"comm": {"op": "adasum", **FLOAT}, "noise": {"method": method, "sharing": sharing}},
                "comm.op",
                "adasum-with-noise",
                {"comm": {"op": "adasum", **FLOAT}, "noise": {"method": "none"}},
            )
            for method, sharing in (("langevin", "global"), ("sam", "micro_batch"))
        ),
    ],
)
def test_what_does_not_go_together_is_refused_with_a_fix(
    settings: dict[str, Any], path: str, code: str, fix: dict[str, Any]
) -> None:
    with raises_problems((path, code)):
        parse(settings)
    parse(fix)


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
    ("settings", "idle"),
    [
        ({"averaging": {"decay": 0.9}}, "averaging.decay has no effect: averaging.kind is not ema"),
        ({"averaging": {"last": 3}}, "averaging.last has no effect: averaging.kind is not lawa"),
        ({"averaging": {"every_steps": 3}}, "averaging.every_steps has no effect: averaging.kind is none"),
        (
            {"early_stopping": {"min_delta": 1.0}},
            "early_stopping.min_delta has no effect: early_stopping.patience is not set",
        ),
        (
            {"schedule": {"final_fraction": 0.1}},
            "schedule.final_fraction has no effect: schedule.decay is not exponential",
        ),
        ({"noise": {"amplitude": 0.1}}, "noise.amplitude has no effect: noise.method is none"),
        ({"noise": {"sharing": "global"}}, "noise.sharing has no effect: noise.method is none"),
        ({"noise": {"schedule": {"kind": "cosine"}}}, "noise.schedule has no effect: noise.method is none"),
        ({"noise": {"exclude": []}}, "noise.exclude has no effect: noise.method is none"),
        ({"noise": {"distribution": "normal"}}, "noise.distribution has no effect: noise.method is none"),
        ({"noise": {"scale": "filter"}}, "noise.scale has no effect: noise.method is none"),
        (
            {"noise": {"method": "langevin", "mix": 0.5}},
            "noise.mix has no effect: this noise.method does not average over draws",
        ),
        (
            {"noise": {"method": "ivon", "amplitude": 0.1}, "optimizer": PLAIN},
            "noise.amplitude has no effect: ivon has its own way of drawing",
        ),
        ({"noise": {**NOISE, "offset": 0.1}}, "noise.offset has no effect: noise.method is not asam"),
        (
            {"noise": {"method": "sam", "sharing": "micro_batch", "distribution": "normal"}},
            "noise.distribution has no effect: this method draws nothing",
        ),
        (
            {"model": {"norm": "batch", "ghost_size": 8}},
            "model.ghost_size has no effect: model.norm is not ghost",
        ),
        (
            {"model": {"norm": "none", "norm_statistics": "running"}},
            "model.norm_statistics has no effect: this norm has no running statistics",
        ),
        (
            {"model": {"norm_samples": 100}},
            "model.norm_samples has no effect: the norm statistics are not recomputed",
        ),
        ({"schedule": {"base_batch": 8}}, "schedule.base_batch has no effect: schedule.scaling is none"),
        (
            {"schedule": {"warmup_epochs": 2}},
            "schedule.warmup_epochs has no effect: schedule.scaling is none, so there is no higher rate to rise to",
        ),
        ({"schedule": {"milestones": [3]}}, "schedule.milestones has no effect: schedule.decay is not step"),
        ({"schedule": {"factor": 0.5}}, "schedule.factor has no effect: schedule.decay is not step"),
        ({"precision": {"tf32": True}, "run": {"device": "cpu"}}, "precision.tf32 has no effect: run.device is cpu"),
        ({"data": {"download": True}}, "data.download has no effect: only CIFAR can be downloaded"),
        (
            {"data": {"loader_workers": 2}},
            "data.loader_workers has no effect: this data set is held in memory",
        ),
        (
            {"data": {"synthetic_samples": 9}},
            "data.synthetic_samples has no effect: data.name is not synthetic",
        ),
        (
            {"data": {"synthetic_shape": [1, 8, 8]}},
            "data.synthetic_shape has no effect: data.name is not synthetic",
        ),
        (
            {"data": {"synthetic_classes": 3}},
            "data.synthetic_classes has no effect: data.name is not synthetic",
        ),
        (
            {"metrics": {"enabled": False, "host": "::"}},
            "metrics.host has no effect: metrics.enabled is false",
        ),
        (
            {"metrics": {"enabled": False, "port": 1}},
            "metrics.port has no effect: metrics.enabled is false",
        ),
    ],
)
def test_a_setting_without_effect_is_told(settings: dict[str, Any], idle: str) -> None:
    assert list(unused_settings(parse(settings)).values()) == [idle]


def test_settings_with_effect_and_settings_not_given_are_not_told() -> None:
    assert unused_settings(Config()) == {}
    assert unused_settings(parse(Config().model_dump(mode="json"))) == {}
    used = {
        "noise": {**NOISE, "amplitude": 0.1, "sharing": "global", "schedule": {"kind": "cosine"}},
        "model": {"norm": "ghost", "ghost_size": 8, "norm_samples": 64, "norm_statistics": "auto"},
        "schedule": {"scaling": "sqrt", "base_batch": 8, "decay": "step", "milestones": [3], "factor": 0.5},
        "data": {"name": "synthetic", "synthetic_samples": 9, "synthetic_shape": [1, 8, 8]},
        "metrics": {"host": "::", "port": 1},
    }
    assert unused_settings(parse(used)) == {}
    assert unused_settings(parse({"data": {"name": "cifar100", "download": True}})) == {}


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


def test_a_warm_up_moves_the_beginning_of_a_decay_also_without_scaling() -> None:
    assert unused_settings(parse({"schedule": {"warmup_epochs": 2, "decay": "cosine"}})) == {}
