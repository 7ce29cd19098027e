"""YAML, bases and overrides become a `Config`, and a `Config` becomes YAML again."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from dist_train.config import Config, ConfigError, dump_config, load_config, parse_config
from dist_train.config.combinations import unused_settings
from dist_train.config.loading import override_texts, parse_yaml, with_overrides
from dist_train.config.plugins import load_plugin, register
from dist_train.outcome import UsageError
from dist_train.sweep.study_file import load_study
from tests.raising import raises, raises_problems

LAUGHS = "a: &a [lol, lol]\n" + "".join(
    f"{b}: &{b} [*{a}, *{a}, *{a}, *{a}, *{a}, *{a}]\n" for a, b in pairwise("abcdefghij")
)
"""Ten lines that stand for 20 million words."""
PROPERTY = settings(deadline=None, max_examples=30)


def write(folder: Path, text: str, name: str = "config.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    return path


def load(folder: Path, text: str, *overrides: str) -> Config:
    return load_config(write(folder, text), overrides)


def refusal(folder: Path, text: str, *overrides: str) -> list[tuple[str, str]]:
    """Return the path and the code of each problem."""
    with pytest.raises(ConfigError) as caught:
        load(folder, text, *overrides)
    return [(problem.path, problem.code) for problem in caught.value.problems]


@pytest.mark.parametrize("text", ["", "# nothing\n", "{}"])
def test_an_empty_file_gives_the_defaults_to_overrides_and_is_no_run_alone(tmp_path: Path, text: str) -> None:
    assert load(tmp_path, text, "run.seed=1") == load_config({}, {"run.seed": 1})
    assert refusal(tmp_path, text) == [("(file)", "missing")]


def test_a_config_is_frozen(tmp_path: Path) -> None:
    config = load(tmp_path, "run: {seed: 3}")
    with pytest.raises(ValidationError):
        config.run.seed = 4  # type: ignore[misc]


def test_a_leading_tilde_is_the_home_in_every_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    config = load(
        tmp_path,
        "run: {directory: ~/runs, init_from: ~/a.pth, resume: ~/run}\ncheckpoint: {fallback_directory: ~/spare}",
        "data.root=~/data",
        "metrics.token_file=~/token",
    )
    home = Path("/home/me")
    assert (config.run.directory, config.run.init_from, config.run.resume) == (
        home / "runs",
        home / "a.pth",
        "/home/me/run",
    )
    assert (config.checkpoint.fallback_directory, config.data.root) == (home / "spare", home / "data")
    assert config.metrics.token_file == home / "token"
    assert load(tmp_path, "run: {directory: ~nobody-here/runs}").run.directory == Path("~nobody-here/runs")


@pytest.mark.parametrize(
    ("text", "number"), [("1e-4", 1e-4), ("5E+2", 500.0), ("1.e-3", 1e-3), ("0.5", 0.5), ("1", 1.0)]
)
def test_numbers_are_read_as_numbers(tmp_path: Path, text: str, number: float) -> None:
    assert load(tmp_path, f"optimizer: {{learning_rate: {text}}}").optimizer.learning_rate == number
    assert load(tmp_path, "", f"optimizer.learning_rate={text}").optimizer.learning_rate == number


def test_a_date_is_read_as_text(tmp_path: Path) -> None:
    assert load(tmp_path, "run: {name: 2026-01-31}").run.name == "2026-01-31"


def test_a_number_as_text_needs_quotes(tmp_path: Path) -> None:
    assert refusal(tmp_path, "run: {name: 7}") == refusal(tmp_path, "", "run.name=7") == [("run.name", "wrong-type")]
    assert load(tmp_path, 'run: {name: "7"}') == load(tmp_path, "", 'run.name="7"')


@pytest.mark.parametrize("text", ["010", "-010", "1:30", "1:30.5", "0_7"])
def test_what_yaml_1_1_takes_for_octal_or_sexagesimal_is_text(tmp_path: Path, text: str) -> None:
    config = load(tmp_path, f"run: {{directory: {text}}}")
    assert config.run.directory == Path(text)
    assert load(tmp_path, "", f"run.directory={text}") == load(tmp_path, dump_config(config)) == config
    for path in ("run.seed", "optimizer.learning_rate"):
        section, _, key = path.partition(".")
        assert refusal(tmp_path, f"{section}: {{{key}: {text}}}") == [(path, "wrong-type")]
        assert refusal(tmp_path, "", f"{path}={text}") == [(path, "wrong-type")]


def test_keys_are_text() -> None:
    text = "{no: 1, on: 2, 010: 3, 1: 4, 1e3: 5}"
    assert parse_yaml(text) == {"no": 1, "on": 2, "010": 3, "1": 4, "1e3": 5}


@pytest.mark.parametrize(
    "text",
    [
        "run: {seed: 1}\nrun: {seed: 2}",
        "run:\n  seed: 1\n  name: x\n  seed: 2",
        "noise: {schedule: {kind: cosine, kind: constant}}",
    ],
)
def test_a_key_that_stands_twice_is_refused(tmp_path: Path, text: str) -> None:
    assert refusal(tmp_path, text) == [("(file)", "not-yaml")]


def test_a_key_that_stands_twice_in_an_override_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path, "", "run={seed: 1, seed: 2}") == [("run", "not-yaml")]


def test_a_missing_file_is_named_with_the_nearest_one(tmp_path: Path) -> None:
    write(tmp_path, "", "lb_8192.yaml")
    with raises_problems(("(file)", "file-missing")) as refused:
        load_config(tmp_path / "lb_8129.yaml")
    assert "lb_8192.yaml" in str(refused.value)


@pytest.mark.parametrize("name", ["configs/demo.yaml", "demo.yaml", "dist_train:demo.yaml", "demo"])
def test_a_missing_file_of_the_package_is_named_as_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with raises_problems(("(file)", "file-missing")) as refused:
        load_config(name)
    assert "dist_train:configs/demo.yaml" in str(refused.value)


@pytest.mark.parametrize("name", ["folder.yaml", "a\0b", "x" * 5000])
def test_a_path_that_cannot_be_read_is_a_config_error(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder.yaml").mkdir()
    with raises_problems(("(file)", "unreadable")):
        load_config(tmp_path / name)


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
def test_a_file_in_another_encoding_is_to_be_saved_as_utf_8(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "mine.yaml").write_text("run: {name: mine} # ü\n", encoding=encoding)
    with raises_problems(("(file)", "unreadable")) as refused:
        load_config(tmp_path / "mine.yaml")
    assert "save the text as UTF-8" in str(refused.value)


def test_a_folder_is_refused_with_its_files(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").touch()
    with raises_problems(("(file)", "unreadable")) as refused:
        load_config(tmp_path)
    assert "config.yaml" in str(refused.value)


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("run:\n  name: a\n  seed: [1, 2\n", "line 4, column 1"),
        ("run:\n  name: a: b\n", "line 2, column 10"),
        ("run: {seed: 1}\nrun: {seed: 2}\n", "line 2, column 1"),
        ("run: {seed: !!int x}\n", "line 1, column 13"),
    ],
)
def test_text_that_is_not_yaml_is_named_with_its_file_line_and_column(tmp_path: Path, text: str, place: str) -> None:
    (tmp_path / "base.yaml").write_text(text)
    (tmp_path / "run.yaml").write_text("base: base.yaml\n")
    with pytest.raises(ConfigError) as refused:
        load_config(tmp_path / "run.yaml")
    assert str(tmp_path / "base.yaml") in str(refused.value)
    assert place in refused.value.problems[0].wrong
    assert "unicode string" not in str(refused.value)


def test_a_file_that_is_not_utf_8_is_a_config_error(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_bytes(b"run: {name: \xff}")
    with raises_problems(("(file)", "unreadable")):
        load_config(tmp_path / "config.yaml")


def test_plugins_that_are_no_list_are_a_problem_of_that_setting(tmp_path: Path) -> None:
    write(tmp_path, "plugins: 3")
    with raises_problems(("plugins", "wrong-type")):
        load_config(tmp_path / "config.yaml")


def test_a_plugin_that_cannot_be_imported_has_its_own_code(tmp_path: Path) -> None:
    write(tmp_path, "plugins: [missing.py]")
    with raises(UsageError, "plugin-import"):
        load_config(tmp_path / "config.yaml")


@pytest.mark.parametrize(
    ("source", "fix"),
    [
        ("import sys\nsys.exit('the end')\n", "__main__"),
        ("import argparse\nargparse.ArgumentParser().parse_args(['--lr', '1'])\n", "__main__"),
        ("from . import other\n", "package.module:NAME"),
        ("from ..nets import other\n", "package.module:NAME"),
    ],
)
def test_a_script_and_a_part_of_a_package_are_refused_with_what_to_do(tmp_path: Path, source: str, fix: str) -> None:
    file = write(tmp_path, source, "mine.py")
    with raises_problems(("model.name", "plugin-import")) as refused:
        load_config({}, {"model.name": f"{file}:net"})
    assert fix in str(refused.value)


def test_a_missing_function_of_a_plugin_is_named_with_the_nearest_one(tmp_path: Path) -> None:
    file = write(tmp_path, "def stripes(settings, split, seed): ...\nstriped = 3\n", "mine.py")
    with raises_problems(("data.name", "plugin-missing")) as refused:
        load_config({}, {"data": {"name": f"{file}:stripe", "shape": [1, 8, 8], "classes": 2}})
    assert "did you mean stripes?" in str(refused.value)


def test_names_of_a_relative_plugin_file_are_recorded_with_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source = "import dist_train\n@dist_train.register('models', 'net')\ndef net(images, width, norm): ...\n"
    write(tmp_path, source, "mine.py")
    name = f"{tmp_path}/mine.py:net"
    for files in (["mine.py"], "mine.py", Path("mine.py")):
        assert load_config({}, {"model.name": "net"}, files).model.name == name
    assert load_config({}, {"model.name": "net", "plugins": ["mine.py"]}, [Path("mine.py")]).model.name == name


def test_code_that_no_other_process_would_find_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def mine(images: object, width: object, norm: object) -> None: ...

    script = ModuleType("__main__")
    vars(script).update(__file__="/home/me/script.py", mine=register("models", "mine")(mine))
    monkeypatch.setitem(sys.modules, "__main__", script)
    with raises_problems(("model.name", "plugin-import")):
        load_config({}, {"model.name": "__main__:mine"})
    with raises_problems(("model.name", "no-such-choice")) as refused:
        load_config({}, {"model.name": "mine"})
    assert "/home/me/script.py:mine" in refused.value.problems[0].allowed


def test_types_that_only_type_checkers_import_do_not_matter_but_that_of_options_does(tmp_path: Path) -> None:
    source = (
        "from __future__ import annotations\nfrom typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from torch import Tensor\n    from pydantic import BaseModel\n"
        "def net(images: Tensor, width: float, norm: str, options: %s): ...\n"
    )
    write(tmp_path, source % "dict[str, int]", "mine.py")
    write(tmp_path, source % "BaseModel", "typed.py")
    write(tmp_path, "")
    load_config(tmp_path / "config.yaml", [f"model.name={tmp_path}/mine.py:net", "model.options={depth: 3}"])
    for name in (f"{tmp_path}/typed.py:net", "builtins:dict"):
        with raises_problems(("model.name", "plugin-import")):
            load_config(tmp_path / "config.yaml", [f"model.name={name}"])


@pytest.mark.parametrize("call", ["['model.name=script.py:net']", "['model.name=net'], ['script.py']"])
def test_a_script_that_names_itself_must_not_train_while_it_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    monkeypatch.chdir(tmp_path)
    source = "import dist_train\n@dist_train.register('models', 'net')\ndef net(images, width, norm): ...\n%s"
    write(tmp_path, "", "base.yaml")
    write(tmp_path, source % f"dist_train.load_config('base.yaml', {call})\n", "script.py")
    with raises_problems(("model.name", "plugin-import")):
        load_config("base.yaml", ["model.name=script.py:net"])
    guarded = f"if __name__ == '__main__':\n    dist_train.load_config('base.yaml', {call})\n"
    write(tmp_path, source % guarded, "script.py")
    load_config("base.yaml", ["model.name=script.py:net"])


CALLED = """
import dist_train
class Data:
    def __init__(self, root, train=True): ...
class Images:
    def __init__(self, root, train=True, transform=None, target_transform=None): ...
class Net:
    def __init__(self, classes=10): ...
class Transform:
    def __call__(self, *images): ...
transform = Transform()
class Mine(dist_train.Observer): ...
def takes_anything(*_, **__): ...
def of_epoch(epoch): return 0.9**epoch
def of_image(image): return image.flip(-1)
"""


@pytest.mark.parametrize(
    ("section", "path"),
    [
        ("data: {name: mine.py:Data, shape: [1, 8, 8], classes: 2}", "data.name"),
        ("data: {name: mine.py:Images, shape: [1, 8, 8], classes: 2}", "data.name"),
        ("optimizer: {name: torch.optim:RMSprop}", "optimizer.name"),
        ("model: {name: mine.py:Net}", "model.name"),
        ("data: {augment: mine.py:transform}", "data.augment"),
        ("data: {augment: mine.py:of_image}", "data.augment"),
        ("schedule: {decay: mine.py:of_epoch}", "schedule.decay"),
        ("metrics: {loggers: [{name: mine.py:takes_anything}, {name: mine.py:Mine}]}", "metrics.loggers.1.name"),
    ],
)
def test_a_plugin_that_takes_other_arguments_is_a_problem(tmp_path: Path, section: str, path: str) -> None:
    write(tmp_path, CALLED, "mine.py")
    assert refusal(tmp_path, section) == [(path, "plugin-arguments")]


def test_an_edited_plugin_is_imported_again(tmp_path: Path) -> None:
    text = "model: {name: mine.py:model}"
    source = "from torch import nn\n\n\ndef model(images, width, norm):\n    return nn.Linear(1, %d)\n"
    for width in (2, 30):  # of another length, since Python finds edits within a second by the length alone
        write(tmp_path, source % width, "mine.py")
        name = load(tmp_path, text).model.name
        assert load_plugin(name) is load_plugin(load(tmp_path, text).model.name)
        assert load_plugin(name)(None, 1.0, None).out_features == width
        write(tmp_path, source % 400, "mine.py")
        assert load_plugin(name)(None, 1.0, None).out_features == width  # a run is not disturbed
    (tmp_path / "mine.py").unlink()
    load(tmp_path, text)


class TestBase:
    def test_a_file_says_only_what_differs_from_its_base(self, tmp_path: Path) -> None:
        write(tmp_path, "run: {seed: 1, epochs: 7}\nbatch: {global_size: 64}", "grandparent.yaml")
        write(tmp_path, "base: grandparent.yaml\nrun: {seed: 2}", "parent.yaml")
        config = load(tmp_path, "base: parent.yaml\nrun: {name: child}")
        assert (config.run.seed, config.run.epochs, config.run.name) == (2, 7, "child")
        assert config.batch.global_size == 64

    def test_a_base_is_found_beside_the_file_that_names_it(self, tmp_path: Path) -> None:
        (tmp_path / "shared").mkdir()
        write(tmp_path / "shared", "run: {seed: 5}", "two.yaml")
        write(tmp_path / "shared", "base: two.yaml", "one.yaml")
        assert load(tmp_path, "base: shared/one.yaml").run.seed == 5

    def test_a_schedule_of_a_kind_replaces_the_whole_one_below(self, tmp_path: Path) -> None:
        write(tmp_path, "noise: {method: smoothout, schedule: {kind: cosine}}", "base.yaml")
        config = load(tmp_path, "base: base.yaml\nnoise: {schedule: {kind: constant}}")
        assert (config.noise.method, config.noise.schedule.kind) == ("smoothout", "constant")

    def test_a_list_replaces_the_one_below(self, tmp_path: Path) -> None:
        write(tmp_path, "noise: {exclude: [norm, bias]}", "base.yaml")
        assert load(tmp_path, "base: base.yaml\nnoise: {exclude: []}").noise.exclude == ()

    @pytest.mark.parametrize("chain", [["config"], ["a", "config"], ["a", "b", "a"], ["../{here}/config"]])
    def test_a_file_that_is_its_own_base_is_refused(self, tmp_path: Path, chain: list[str]) -> None:
        names = ["config", *(name.format(here=tmp_path.name) for name in chain)]
        for name, base in pairwise(names):
            if "/" not in name:
                write(tmp_path, f"base: {base}.yaml", f"{name}.yaml")
        with raises_problems(("base", "base-cycle")):
            load_config(tmp_path / "config.yaml")

    @pytest.mark.parametrize("base", ["3", "[a]", "null", '""', '"a\\0b"'])
    def test_a_base_that_names_no_file_is_refused(self, tmp_path: Path, base: str) -> None:
        assert refusal(tmp_path, f"base: {base}") == [("base", "wrong-form")]

    def test_a_base_that_is_missing_is_named_with_its_place_and_the_file_that_names_it(self, tmp_path: Path) -> None:
        write(tmp_path, "base: ../nowhere.yaml")
        with raises_problems(("(file)", "file-missing")) as refused:
            load_config(tmp_path / "config.yaml")
        assert f" at {tmp_path.parent / 'nowhere.yaml'}," in str(refused.value)
        assert str(tmp_path / "config.yaml") in str(refused.value)

    def test_a_fault_in_a_base_is_found(self, tmp_path: Path) -> None:
        write(tmp_path, "run: {sed: 1}", "base.yaml")
        assert refusal(tmp_path, "base: base.yaml") == [("run.sed", "unknown-key")]

    def test_links_that_go_round_in_circles_are_a_config_error(self, tmp_path: Path) -> None:
        (tmp_path / "loop.yaml").symlink_to(tmp_path / "loop.yaml")
        assert refusal(tmp_path, "base: loop.yaml") == [("(file)", "unreadable")]


def test_a_study_is_no_configuration(tmp_path: Path) -> None:
    assert refusal(tmp_path, "name: a\nbase: dist_train:configs/smoke.yaml\nvariants: {a: {}}\n") == [
        ("variants", "unknown-key")
    ]


def test_a_merge_key_is_refused_for_what_it_is(tmp_path: Path) -> None:
    with raises_problems(("(file)", "not-yaml")) as refused:
        load(tmp_path, "run: &a {seed: 3}\nnoise: {<<: *a}\n")
    assert "merge keys are not supported" in str(refused.value)
    assert parse_yaml('{"<<": 1}') == {"<<": 1}


class TestOverrides:
    def test_the_later_one_wins_and_the_file_s_other_settings_stay(self, tmp_path: Path) -> None:
        text = "run: {seed: 1, epochs: 3}"
        config = load(tmp_path, text, "run.seed=5", "run.seed=6", "noise.schedule.kind=cosine")
        assert (config.run.seed, config.run.epochs, config.noise.schedule.kind) == (6, 3, "cosine")

    def test_values_are_yaml(self, tmp_path: Path) -> None:
        config = load(
            tmp_path,
            "",
            "noise.exclude=[bias, 'hidden.*']",
            "metrics.enabled=false",
            "run.max_steps=null",
            "noise.schedule={kind: cosine}",
            "run.name='1e5'",
        )
        assert config.noise.exclude == ("bias", "hidden.*")
        assert (config.metrics.enabled, config.run.max_steps) == (False, None)
        assert (config.noise.schedule.kind, config.run.name) == ("cosine", "1e5")

    @pytest.mark.parametrize("override", ["run.seed", "=1", ".seed=1", "run.=1", "run..seed=1", ""])
    def test_what_is_no_override_is_refused(self, tmp_path: Path, override: str) -> None:
        assert refusal(tmp_path, "", override) == [(override or "''", "override-form")]

    def test_an_override_that_is_no_text_is_refused(self) -> None:
        pair: Any = ("run.seed", 1)
        with raises_problems((str(pair), "override-form")):
            load_config({}, [pair])

    def test_another_kind_of_noise_schedule_leaves_the_base_s_parameters_out(self, tmp_path: Path) -> None:
        base = "noise: {schedule: {kind: exponential, final_fraction: 0.1}}"
        assert load(tmp_path, base, "noise.schedule.kind=cosine").noise.schedule.kind == "cosine"
        own = ("noise.schedule.final_fraction=0.2", "noise.schedule.kind=exponential")
        for text in (base, "noise: {schedule: {kind: cosine}}"):
            assert load(tmp_path, text, *own).noise.schedule.model_dump()["final_fraction"] == 0.2
            assert load(tmp_path, text, *reversed(own)).noise.schedule.model_dump()["final_fraction"] == 0.2
        for own in (
            ("noise.schedule={final_fraction: 0.2}", "noise.schedule.kind=exponential"),
            ("noise={schedule: {final_fraction: 0.2}}", "noise.schedule.kind=exponential"),
        ):
            assert load(tmp_path, "", *own).noise.schedule.model_dump()["final_fraction"] == 0.2

    @pytest.mark.parametrize("text", ["/data/set #2", "#2", "'/data/set' #", "~", " ~ "])
    def test_what_would_lose_a_part_of_a_path_is_refused(self, tmp_path: Path, text: str) -> None:
        assert refusal(tmp_path, "", f"data.root={text}") == [("data.root", "override-form")]

    @pytest.mark.parametrize("text", ["/data/set#2", "'/data/set #2'", '"/data/#1 #2"', "~/#2", "|-\n  /data/set #2"])
    def test_a_path_may_have_the_sign_of_a_comment(self, tmp_path: Path, text: str) -> None:
        assert "#2" in str(load(tmp_path, "", f"data.root={text}").data.root)

    def test_a_null_that_is_no_path_has_two_names(self, tmp_path: Path) -> None:
        assert load(tmp_path, "run: {max_steps: 3}", "run.max_steps=~").run.max_steps is None

    def test_all_bad_overrides_are_told_at_once(self, tmp_path: Path) -> None:
        found = refusal(tmp_path, "run: {seed: 1}", "run.seed", "run.seed.deep=3", "run.name=[")
        assert found == [("run.seed", "override-form"), ("run.seed.deep", "wrong-type"), ("run.name", "not-yaml")]

    def test_a_misspelt_override_is_an_unknown_key(self, tmp_path: Path) -> None:
        assert refusal(tmp_path, "", "noise.amplitud=1") == [("noise.amplitud", "unknown-key")]

    def test_one_override_needs_no_list(self) -> None:
        assert with_overrides({}, "run.seed=2") == {"run": {"seed": 2}}

    def test_mappings_stand_for_a_file_and_for_overrides(self) -> None:
        settings = {"base": "dist_train:configs/smoke.yaml", "run": {"name": "mine"}}
        config = load_config(settings, {"run.epochs": 7, "noise.exclude": ("bias",), "run.max_steps": None})
        assert (config.data.name, config.run.name, config.run.epochs) == ("synthetic", "mine", 7)
        assert (config.noise.exclude, config.run.max_steps) == (("bias",), None)
        with raises_problems(("run.seed.deep", "wrong-type")):
            load_config({"run": {"seed": 1}}, {"run.seed.deep": 3})
        with raises_problems(("run.", "unknown-key")):
            load_config({}, {"run.": 3})

    def test_a_config_stands_for_what_it_was_loaded_from(self, tmp_path: Path) -> None:
        plugin = write(tmp_path, "def model(images, width, norm): ...\n", "mine.py")
        text = f"model: {{name: {plugin}:model}}\nnoise: {{schedule: {{kind: late}}}}\nbatch: {{global_size: 64}}\n"
        config = load(tmp_path, text)
        changed = load_config(config, {"noise.schedule.start": 0.5, "run.seed": 1})
        assert changed == load(tmp_path, text, "noise.schedule.start=0.5", "run.seed=1")
        assert unused_settings(changed) == unused_settings(load(tmp_path, text)) != {}
        assert load_config(config) == config

    def test_a_mapping_changes_only_what_it_has_as_over_a_base(self, tmp_path: Path) -> None:
        schedule = "{kind: late, start: 0.5}"
        text = f"optimizer: {{name: adamw}}\nnoise: {{schedule: {schedule}}}\naveraging: {{kind: lawa, every_steps: 7}}"
        changes = {
            "optimizer": {"learning_rate": 0.01},
            "noise": {"amplitude": 0.5, "schedule": {"kind": "late"}},
            "averaging": {"kind": "ema"},
        }
        config = load_config(write(tmp_path, text, "base.yaml"), changes)
        assert (config.optimizer.name, config.optimizer.learning_rate) == ("adamw", 0.01)
        assert config.noise.schedule.model_dump() == {"kind": "late", "start": 0.5}
        assert (config.averaging.kind, config.averaging.every_steps) == ("ema", 7)
        assert config == load(tmp_path, "base: base.yaml", *(f"{name}={value}" for name, value in changes.items()))
        assert config == load(tmp_path, yaml.safe_dump({"base": "base.yaml", **changes}))
        assert (
            load_config(tmp_path / "base.yaml", {"noise.schedule": {"kind": "cosine"}}).noise.schedule.kind == "cosine"
        )

    def test_options_of_a_plug_in_are_replaced(self, tmp_path: Path) -> None:
        write(
            tmp_path,
            "def net(images, width, norm, options): ...\ndef other(images, width, norm, options): ...\n",
            "mine.py",
        )
        before = {"model": {"name": f"{tmp_path}/mine.py:net", "options": {"depth": 3}}}
        changes = {"model": {"name": f"{tmp_path}/mine.py:other", "options": {"wide": True}}}
        assert load_config(before, changes).model.options == {"wide": True}
        assert load_config(before, {"model.options": {}}).model.options == {}

    def test_values_of_python_are_converted_or_refused_by_name(self) -> None:
        config = load_config(
            {"data": {"root": Path("x")}, "run": {"seed": np.int64(3)}}, {"model.width": np.float32(0.5)}
        )
        assert (config.data.root, config.run.seed, config.model.width) == (Path("x"), 3, 0.5)
        for path, value in (("run.seed", object()), ("data.shape", np.ones(3))):
            with raises_problems((path, "wrong-type")):
                load_config({}, {path: value})
            with raises_problems((path, "wrong-type")):
                override_texts({path: value})
        with raises_problems(("noise.exclude.0", "wrong-type")):
            load_config({}, {"noise.exclude": [{"bias"}]})
        with raises_problems(("model.name", "wrong-type")) as refused:
            load_config({"model": {"name": override_texts}})
        assert "FILE.py:NAME" in str(refused.value)
        words = override_texts({"run.seed": np.int64(3), "data.root": Path("x"), "run.init_from": np.str_("y")})
        assert words == ("run.seed=3", "data.root=x", "run.init_from=y")

    def test_the_mapping_that_is_overridden_stays_as_it_was(self) -> None:
        settings: dict[str, dict[str, int]] = {"run": {"seed": 1}}
        assert with_overrides(settings, ["run.seed=2"]) == {"run": {"seed": 2}}
        assert settings == {"run": {"seed": 1}}


NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,12}", fullmatch=True)
WORDS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12)
NUMBERS = st.floats(min_value=0, max_value=1e30, exclude_min=True)


@PROPERTY
@given(
    name=NAMES,
    directory=WORDS,
    seed=st.integers(0, 2**80),
    amplitude=NUMBERS,
    exclude=st.lists(WORDS, max_size=3),
    milestones=st.lists(NUMBERS, max_size=3),
    micro_size=st.sampled_from([2, 64, "auto"]),
    max_steps=st.none() | st.integers(1, 10**9),
    kind=st.sampled_from(["constant", "cosine"]),
    resume=WORDS,
)
@example(
    name="1e5",
    directory="2020-01-01",
    seed=0,
    amplitude=1e-7,
    exclude=["1e5", "null", "no", "~", "=", "", "\n", "1_0"],
    milestones=[],
    micro_size="auto",
    max_steps=None,
    kind="cosine",
    resume="0x1",
)
def test_what_is_dumped_is_loaded_again(tmp_path_factory: pytest.TempPathFactory, **drawn: object) -> None:
    settings: dict[str, dict[str, object]] = {
        "run": {name: drawn[name] for name in ("name", "directory", "seed", "max_steps", "resume")},
        "noise": {
            "amplitude": drawn["amplitude"],
            "exclude": drawn["exclude"],
            "schedule": {"kind": drawn["kind"]},
        },
        "schedule": {"milestones": drawn["milestones"]},
        "batch": {"micro_size": drawn["micro_size"]},
    }
    config = parse_config(settings, source="drawn")
    assert config.run.seed == drawn["seed"]
    text = dump_config(config)
    path = tmp_path_factory.getbasetemp() / "dumped.yaml"
    path.write_text(text, encoding="utf-8")
    loaded = load_config(path)
    assert loaded == config
    assert dump_config(loaded) == text
    assert parse_yaml(text, is_dumped=True) == parse_yaml(text)


def test_a_dump_holds_every_setting_and_is_plain_yaml() -> None:
    assert yaml.safe_load(dump_config(Config())) == Config().model_dump(mode="json")


KEYS = st.sampled_from(
    [
        *Config.model_fields,
        *("name", "seed", "epochs", "kind", "schedule", "exclude", "micro_size", "synthetic_shape", "milestones"),
        *("constant", "cosine", "int", "base", "0", "literal['auto']", "function-plain"),
    ]
)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | KEYS
TREES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS | SCALARS, inner, max_size=3),
    max_leaves=8,
)
SETTINGS = st.dictionaries(KEYS, TREES | st.dictionaries(KEYS, TREES, max_size=3), max_size=4)
FRAGMENTS = st.sampled_from(
    [
        *("run", "noise", "base", "kind", ": ", ":", "\n", "\n  ", "- ", "{", "}", "[", "]", ", ", "? ", "<<: "),
        *("&a ", "*a", "!!int ", "!!bool ", "!!timestamp ", "!!set ", "!!binary ", "!!float ", "!!map ", "!!x "),
        *("1e5", "0x", "2001-99-99", "~", "'", '"', "|\n", ">", "#", "%", "@", "\t", "=", "9" * 4999, "\\ud800"),
    ]
)
TEXTS = st.lists(FRAGMENTS | st.text(max_size=3), max_size=12).map("".join)
OVERRIDES = st.lists(st.builds("{}={}".format, st.lists(KEYS, max_size=4).map(".".join), TEXTS) | TEXTS, max_size=3)


def only_config_errors(folder: Path, text: str, overrides: Sequence[str]) -> None:
    loaded: Config | ConfigError
    try:
        loaded = load(folder, text, *overrides)
    except ConfigError as error:
        loaded = error
    if isinstance(loaded, ConfigError):
        assert loaded.problems
        assert all(problem.path and problem.wrong for problem in loaded.problems)


@PROPERTY
@given(settings=SETTINGS, overrides=OVERRIDES)
@example(settings={"cosine": 1}, overrides=[])
@example(settings={"run": {"constant": 1, "cosine": {}}}, overrides=[])
@example(settings={"noise": {"schedule": {"kind": "cosine", "constant": 1}}}, overrides=[])
@example(settings={"batch": {"micro_size": {"int": [1]}}}, overrides=[])
@example(settings={}, overrides=["a." * 5000 + "a=1"])
def test_any_settings_give_a_config_or_a_config_error(
    tmp_path_factory: pytest.TempPathFactory, settings: dict[str, object], overrides: list[str]
) -> None:
    text = yaml.safe_dump(settings, allow_unicode=False)
    only_config_errors(tmp_path_factory.getbasetemp(), text, overrides)


@PROPERTY
@given(text=TEXTS, overrides=OVERRIDES)
@example(text="? [a]\n: b", overrides=["a=? {b: c}\n: d"])
@example(text="a: !!int b", overrides=["a=!!bool b"])
@example(text="a: !!timestamp b", overrides=["a=2001-99-99"])
@example(text="a: " + "9" * 5000, overrides=["a=" + "9" * 5000])
@example(text='run: {name: "\\ud800"}', overrides=["run.name=\udcff"])
@example(text="a: " + "[\n" * 3000, overrides=["a=" + "[\n" * 3000])
@example(text="x: &a [*a]", overrides=["x=&a {b: *a}"])
def test_any_text_gives_a_config_or_a_config_error(
    tmp_path_factory: pytest.TempPathFactory, text: str, overrides: list[str]
) -> None:
    only_config_errors(tmp_path_factory.getbasetemp(), text, overrides)


@pytest.mark.parametrize("read", [load_config, load_study], ids=["config", "study"])
@pytest.mark.parametrize(
    "text", [LAUGHS, "run: &run {name: *run}", "run: " + "[\n" * 20_000], ids=["laughs", "itself", "deep"]
)
def test_yaml_that_stands_for_more_than_memory_holds_is_refused(
    read: Callable[[Path], object], text: str, tmp_path: Path
) -> None:
    path = tmp_path / "file.yaml"
    path.write_text(text)
    with raises_problems(("(file)", "not-yaml")):
        read(path)
    with pytest.raises(yaml.YAMLError):
        parse_yaml(text, is_dumped=True)


def test_an_override_with_such_aliases_is_refused(tmp_path: Path) -> None:
    inner = "[a]"
    for name in "abcdefghij":
        inner = f"[&{name} {inner}, {', '.join([f'*{name}'] * 9)}]"
    with raises_problems(("data.root", "not-yaml")):
        with_overrides({}, [f"data.root={inner}"])


def test_a_few_aliases_are_fine(tmp_path: Path) -> None:
    path = tmp_path / "file.yaml"
    path.write_text("run: {name: &name a-run, directory: *name}\n")
    assert load_config(path).run.directory == Path("a-run")
