"""Every fault at once: its path, its value, what is allowed, and the nearest key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dist_train.config import Config, ConfigError, parse_config
from dist_train.config.plugins import register
from dist_train.config.problems import Problem
from dist_train.outcome import UsageError
from tests.raising import raises

SCHEDULE_KEYS = "a mapping with the keys kind, final_fraction, gamma, steepness, start, rise, function, options"
PLUGIN = "a plug-in (module:name, FILE.py:name, a name from `plugins`)"


def refusal(settings: dict[str, Any]) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        parse_config(settings, source="run.yaml")
    return caught.value


def only_problem(settings: dict[str, Any]) -> Problem:
    error = refusal(settings)
    assert len(error.problems) == 1, str(error)
    return error.problems[0]


def test_all_faults_are_told_at_once() -> None:
    error = refusal(
        {
            "run": {"sed": 1, "epochs": 0},
            "batchh": {"global_size": 64},
            "noise": {"amplitude": "much", "schedule": {"kind": "cosine", "kindd": 1}},
            "metrics": {"port": 70000},
        }
    )
    paths = {"run.sed", "run.epochs", "batchh", "noise.amplitude", "noise.schedule.kindd", "metrics.port"}
    assert {problem.path for problem in error.problems} == paths
    lines = str(error).splitlines()
    assert lines[0] == "run.yaml: 6 problems"
    assert len(lines) <= 24, "one screen"


def test_a_fault_is_told_with_its_value_and_what_is_allowed() -> None:
    assert str(only_problem({"metrics": {"port": 70000}})).splitlines() == [
        "  metrics.port: should be less than or equal to 65535 [out-of-range]",
        "      value:   70000",
        "      allowed: a whole number at least 0 and at most 65535",
    ]
    assert "      value:   '0.1'" in str(only_problem({"optimizer": {"learning_rate": "0.1"}})).splitlines()


@pytest.mark.parametrize(
    ("section", "key", "value", "code", "allowed"),
    [
        ("run", "epochs", "ten", "wrong-type", "a whole number above 0 and at most 1e+09"),
        ("run", "epochs", 10**20, "out-of-range", "a whole number above 0 and at most 1e+09"),
        ("run", "name", "../up", "wrong-form", "text of the form ^[A-Za-z0-9][A-Za-z0-9._-]*$"),
        ("run", "directory", 3, "wrong-type", "a path"),
        ("run", "max_steps", 0, "out-of-range", "a whole number above 0 and at most 1e+09 or null"),
        (
            "data",
            "name",
            "mnist",
            "no-such-choice",
            "fashion-mnist, cifar10, cifar100, imagefolder, parquet, webdataset, huggingface, numpy, synthetic or "
            f"{PLUGIN}",
        ),
        ("data", "download", "maybe", "wrong-type", "true or false"),
        ("data", "synthetic_shape", 3, "wrong-type", "a list of 3, each a whole number above 0"),
        ("batch", "micro_size", "large", "wrong-type", "a whole number above 0 or auto"),
        ("optimizer", "momentum", 1.0, "out-of-range", "a number at least 0 and below 1"),
        ("optimizer", "learning_rate", float("nan"), "out-of-range", "a number at least 0"),
        ("optimizer", "learning_rate", float("inf"), "out-of-range", "a number at least 0"),
        ("noise", "exclude", "bias", "wrong-type", "a list, each text"),
        ("noise", "schedule", "cosine", "wrong-type", SCHEDULE_KEYS),
        ("noise", "schedule", {}, "missing", SCHEDULE_KEYS),
    ],
)
def test_each_kind_of_setting_says_what_it_takes(
    section: str, key: str, value: object, code: str, allowed: str
) -> None:
    [problem] = refusal({section: {key: value}}).problems
    assert problem.path == f"{section}.{key}"
    assert repr(problem.value) == repr(value)  # NaN equals nothing
    assert problem.code == code
    assert problem.allowed == allowed


def test_a_fault_inside_a_list_is_told_with_its_place() -> None:
    error = refusal({"data": {"synthetic_shape": [1, 0]}, "schedule": {"milestones": [1.0, "late"]}})
    told = {problem.path: (problem.code, problem.allowed) for problem in error.problems}
    assert told == {
        "data.synthetic_shape.1": ("out-of-range", "a whole number above 0"),
        "data.synthetic_shape.2": ("missing", "a whole number above 0"),
        "schedule.milestones.1": ("wrong-type", "a number above 0"),
    }


def test_a_setting_that_takes_plugins_alone_says_so() -> None:
    problem = only_problem({"noise": {"schedule": {"kind": "plugin", "function": "hold"}}})
    assert (problem.code, problem.allowed) == ("wrong-form", PLUGIN)


def test_an_unknown_kind_is_told_with_the_kinds() -> None:
    problem = only_problem({"noise": {"schedule": {"kind": "step"}}})
    assert (problem.path, problem.code) == ("noise.schedule.kind", "unknown-kind")
    assert problem.allowed == "constant, linear, cosine, exponential, inverse_power, tanh, late, rise, plugin"


@pytest.mark.parametrize("value", [True, False])
@pytest.mark.parametrize(
    "path", ["run.seed", "run.epochs", "batch.micro_size", "noise.amplitude", "metrics.port", "run.max_steps"]
)
def test_true_and_false_are_no_numbers(path: str, value: bool) -> None:
    section, key = path.split(".")
    problem = only_problem({section: {key: value}})
    assert (problem.path, problem.code) == (path, "wrong-type")


@pytest.mark.parametrize(
    ("path", "value"), [("run.seed", 1.0), ("run.seed", "1"), ("run.name", 1), ("metrics.enabled", 1)]
)
def test_a_value_of_another_type_is_not_bent_into_shape(path: str, value: object) -> None:
    section, key = path.split(".")
    problem = only_problem({section: {key: value}})
    assert (problem.path, problem.code) == (path, "wrong-type")


@pytest.mark.parametrize(
    ("settings", "suggestion"),
    [
        ({"run": {"sed": 1}}, "run.seed"),
        ({"optimizer": {"learnig_rate": 1}}, "optimizer.learning_rate"),
        ({"noise": {"schedule": {"kind": "cosine", "kinds": 1}}}, "noise.schedule.kind"),
        ({"nois": {}}, "noise"),
        ({"noise": {"learning_rate": 1}}, "optimizer.learning_rate"),
        ({"noise": {"lerning_rate": 1}}, "optimizer.learning_rate"),
        ({"global_size": 8192}, "batch.global_size"),
        ({"optimizer": {"amplitude": 1}}, "noise.amplitude"),
        ({"noise": {"every_epochs": 1}}, "evaluation.every_epochs or checkpoint.every_epochs"),
        ({"run": {"evaluation": {}}}, "evaluation"),
        ({"lr": 1}, "optimizer.learning_rate"),
        ({"optimizer": {"lr": 1}}, "optimizer.learning_rate"),
        ({"batch_size": 1}, "batch.global_size"),
        ({"batch": {"batch_size": 1}}, "batch.global_size"),
        ({"model": {"pretrained": True}}, "run.init_from"),
        ({"num_classes": 3}, "data.classes"),
        ({"noise": {"kind": "sam"}}, "noise.method"),
        ({"noise": {"name": "sam"}}, "noise.method"),
        ({"averaging": {"method": "ema"}}, "averaging.kind"),
        ({"schedule": {"kind": "cosine"}}, "schedule.decay"),
        ({"optimizer": {"type": "adam"}}, "optimizer.name"),
        ({"metrics": {"loggers": [{"name": "wandb", "kind": "wandb"}]}}, "metrics.loggers.0.name"),
    ],
)
def test_an_unknown_key_suggests_the_nearest_here_else_elsewhere(settings: dict[str, Any], suggestion: str) -> None:
    problem = only_problem(settings)
    assert problem.code == "unknown-key"
    assert f"did you mean {suggestion}?" in problem.wrong


@pytest.mark.parametrize(
    ("settings", "fix"),
    [
        ({"run.seed": 3}, "write run: {seed: ...}"),
        ({"noise": {"schedule.kind": "cosine"}}, "write schedule: {kind: ...}"),
        ({"noise.schedule.kind": "cosine"}, "write noise: {schedule: {kind: ...}}"),
    ],
)
def test_a_dotted_key_is_written_as_a_section(settings: dict[str, Any], fix: str) -> None:
    assert fix in only_problem(settings).wrong


@pytest.mark.parametrize(
    ("settings", "suggestion"),
    [
        ({"optimizer": {"name": "sdg"}}, "sgd"),
        ({"optimizer": {"name": "SGD"}}, "sgd"),
        ({"metrics": {"loggers": [{"name": "tensorbord"}]}}, "tensorboard"),
        ({"model": {"norm": "bach"}}, "batch"),
        ({"noise": {"schedule": {"kind": "cosin"}}}, "cosine"),
        ({"model": {"name": "torchvision"}}, "torchvision:NAME"),
        ({"run": {"device": "gpu"}}, "cuda"),
    ],
)
def test_a_choice_that_does_not_exist_suggests_the_nearest(settings: dict[str, Any], suggestion: str) -> None:
    assert f"did you mean {suggestion}?" in only_problem(settings).wrong


def test_a_plugin_s_file_alone_needs_the_name_of_its_function() -> None:
    assert "write mine.py:NAME" in only_problem({"model": {"name": "mine.py"}}).wrong


def test_names_that_plugins_register_are_among_the_choices(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("import dist_train\n@dist_train.register('optimizers', 'mine')\ndef mine(settings, groups): ...\n")
    problem = only_problem({"plugins": [str(file)], "optimizer": {"name": "mein"}})
    assert problem.code == "no-such-choice"
    assert "did you mean mine?" in problem.wrong
    assert problem.allowed.endswith("; also mine")


def test_a_kind_of_plugin_that_does_not_exist_is_refused() -> None:
    kind: Any = "model"
    with raises(UsageError, "no-such-choice"):
        register(kind, "mine")


def test_a_key_like_no_other_is_told_with_those_of_its_section() -> None:
    problem = only_problem({"comm": {"zzz": 1}})
    assert (problem.path, problem.code) == ("comm.zzz", "unknown-key")
    assert problem.allowed.startswith("engine, reduction, compression, op, verify_every, timeout")


@pytest.mark.parametrize("key", ["constant", "cosine", "kind", "0"])
def test_a_key_named_like_a_kind_is_an_unknown_key_where_it_stands(key: str) -> None:
    assert refusal({key: 1}).problems[0].path == key
    assert refusal({"run": {key: 1}}).problems[0].path == f"run.{key}"


@pytest.mark.parametrize("section", sorted(Config.model_fields))
@pytest.mark.parametrize("value", [None, 3, "x", [1]])
def test_a_section_that_is_no_mapping_is_told_with_its_keys(section: str, value: object) -> None:
    problem = only_problem({section: value})
    assert (problem.path, problem.code) == (section, "wrong-type")
    assert problem.allowed.startswith("a mapping with the keys ")


def test_long_values_and_values_of_many_lines_stay_on_one_line() -> None:
    text = str(only_problem({"run": {"epochs": "many\nlines " * 100}}))
    [value] = [line for line in text.splitlines() if "value:" in line]
    assert len(value) < 80


def test_too_many_items_are_out_of_range() -> None:
    problem = only_problem({"optimizer": {"betas": [0.9, 0.99, 0.999]}})
    assert (problem.path, problem.code) == ("optimizer.betas", "out-of-range")
    assert "tuple" not in problem.wrong
    assert problem.allowed.startswith("a list of 2")


def test_settings_that_json_cannot_hold_are_refused() -> None:
    for name, path in ((b"bytes", "run.name"), ("\ud800", "(file)")):
        assert only_problem({"run": {"name": name}}).path == path


@pytest.mark.parametrize(
    ("url", "code"),
    [
        ("http://user:sesame@host:9091", "secret-in-url"),
        ("user:sesame@host", "wrong-form"),
        ("http://host/?token=sesame", "secret-in-url"),
        ("https://sesame@host", "secret-in-url"),
    ],
)
def test_a_pushgateway_s_secret_is_refused_and_not_shown(url: str, code: str) -> None:
    error = refusal({"metrics": {"pushgateway": url}})
    assert [(problem.path, problem.code) for problem in error.problems] == [("metrics.pushgateway", code)]
    assert "sesame" not in str(error)
