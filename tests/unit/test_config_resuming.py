"""A run may be resumed only under settings that give the same result."""

from __future__ import annotations

import logging
from typing import Any, Literal

import pytest

from dist_train.config import Config, ConfigError, differences, parse_config
from dist_train.config.resuming import with_decisions, with_device


def parse(settings: dict[str, Any]) -> Config:
    return parse_config(settings, source="here")


DECIDED = parse(
    {
        "run": {"device": "cuda"},
        "batch": {"micro_size": 64},
        "precision": {"threads": 2, "deterministic": True},
    }
)


@pytest.mark.parametrize(
    "settings",
    [
        {"run": {"name": "other", "directory": "elsewhere", "max_steps": 7, "resume": "never"}},
        {"run": {"profile_steps": 3}},
        {"data": {"root": "there", "download": True, "loader_workers": 3}},
        {"batch": {"dealing": "measured"}},
        {"precision": {"cuda_graphs": True}},
        {"comm": {"verify_every": 1, "timeout": 5.0}},
        {"evaluation": {"every_epochs": 9, "batch_size": 3}},
        {"checkpoint": {"every_steps": 3, "keep": 1, "keep_best": False, "background": False}},
        {"metrics": {"enabled": False, "every_steps": 10}},
    ],
)
def test_what_cannot_change_the_result_may_differ(settings: dict[str, Any]) -> None:
    assert differences(Config(), parse(settings)) == []


@pytest.mark.parametrize(
    ("settings", "path"),
    [
        ({"run": {"seed": 1}}, "run.seed"),
        ({"run": {"epochs": 99}}, "run.epochs"),
        ({"data": {"train_size": 99}}, "data.train_size"),
        ({"model": {"width": 0.5}}, "model.width"),
        ({"batch": {"global_size": 64}}, "batch.global_size"),
        ({"noise": {"method": "smoothout"}}, "noise.method"),
        ({"noise": {"exclude": []}}, "noise.exclude"),
        ({"optimizer": {"momentum": 0.5}}, "optimizer.momentum"),
        ({"optimizer": {"betas": [0.8, 0.9]}}, "optimizer.betas"),
        ({"optimizer": {"exclude": []}}, "optimizer.exclude"),
        ({"schedule": {"keep_updates": True}}, "schedule.keep_updates"),
        ({"schedule": {"warmup_epochs": 1.0}}, "schedule.warmup_epochs"),
        ({"precision": {"compute": "bfloat16"}}, "precision.compute"),
        ({"comm": {"reduction": "float"}}, "comm.reduction"),
    ],
)
def test_what_can_change_the_result_is_told(settings: dict[str, Any], path: str) -> None:
    assert [difference.path for difference in differences(Config(), parse(settings))] == [path]


TENSORBOARD = {"name": "tensorboard"}


@pytest.mark.parametrize(
    ("metrics", "loggers", "warnings"),
    [
        ({"tensorboard": False}, [], 0),
        ({"tensorboard": True}, ["tensorboard"], 1),
        ({"tensorboard": True, "loggers": [{"name": "trackio"}]}, ["tensorboard", "trackio"], 1),
        ({"tensorboard": True, "loggers": [{"name": "trackio"}, TENSORBOARD]}, ["trackio", "tensorboard"], 1),
    ],
)
def test_the_former_setting_of_tensorboard_is_a_logger_and_logs_once(
    metrics: dict[str, Any], loggers: list[str], warnings: int, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        config = parse({"metrics": metrics})
    assert [logger.name for logger in config.metrics.loggers] == loggers
    assert len(caplog.records) == warnings


@pytest.mark.parametrize("metrics", [{"tensorboard": 1}, {"tensorboard": True, "loggers": "trackio"}])
def test_the_former_setting_of_tensorboard_has_no_other_form(metrics: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        parse({"metrics": metrics})


def test_another_kind_of_schedule_is_a_difference() -> None:
    [difference] = differences(Config(), parse({"noise": {"schedule": {"kind": "cosine"}}}))
    assert difference.path.startswith("noise.schedule")


def test_a_difference_says_both_values() -> None:
    [difference] = differences(Config(), parse({"run": {"seed": 7}}))
    assert str(difference) == "run.seed: 0 when the run began, 7 now"


def test_every_difference_is_told() -> None:
    changed = parse({"run": {"seed": 1}, "model": {"width": 2.0}, "optimizer": {"nesterov": False}})
    told = [difference.path for difference in differences(Config(), changed)]
    assert told == ["run.seed", "model.width", "optimizer.nesterov"]


def test_what_was_decided_may_be_left_to_auto_again_but_not_set_otherwise() -> None:
    assert differences(DECIDED, Config()) == []
    otherwise = parse(
        {
            "run": {"device": "cpu"},
            "batch": {"micro_size": 32},
            "precision": {"threads": 1, "deterministic": False},
        }
    )
    told = [difference.path for difference in differences(DECIDED, otherwise)]
    assert told == ["run.device", "batch.micro_size", "precision.deterministic", "precision.threads"]


def test_a_run_from_before_the_device_was_recorded_may_name_one() -> None:
    assert differences(Config(), parse({"run": {"device": "cpu"}})) == []


def test_decisions_fill_in_what_is_left_to_auto_and_nothing_else() -> None:
    settled = with_decisions(parse({"run": {"seed": 9}}), DECIDED)
    assert (settled.batch.micro_size, settled.precision.threads, settled.run.seed) == (64, 2, 9)
    assert (settled.run.device, settled.precision.deterministic) == ("cuda", True)
    own = parse(
        {
            "run": {"device": "cpu"},
            "batch": {"micro_size": 16},
            "precision": {"threads": 1, "deterministic": False},
        }
    )
    assert with_decisions(own, DECIDED) == own


@pytest.mark.parametrize(
    ("device", "settings", "deterministic"),
    [
        ("cuda", {}, True),
        ("cuda", {"comm": {"reduction": "float"}}, False),
        ("cuda", {"precision": {"deterministic": False}}, False),
        ("cpu", {}, False),
        ("cpu", {"precision": {"deterministic": True}}, True),
    ],
)
def test_an_exact_reduction_on_gpus_asks_for_deterministic_kernels(
    device: Literal["cpu", "cuda"], settings: dict[str, Any], deterministic: bool
) -> None:
    decided = with_device(parse(settings), device)
    assert (decided.run.device, decided.precision.deterministic) == (device, deterministic)
