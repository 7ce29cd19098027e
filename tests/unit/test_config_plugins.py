"""Plug-ins: which code a name selects, and which code a run records."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import py_compile
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType
from unittest.mock import Mock

import pytest

from dist_train.config import Config, load_config
from dist_train.config.plugins import call_plugin, check_unedited, load_plugin, plugin_files
from dist_train.launching.run import train
from dist_train.outcome import UsageError
from tests.raising import raises, raises_problems
from tests.unit.small_trainers import small_config

REGISTERED = """
import functools
from dist_train import register
"""


def write(file: Path, source: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(source, encoding="utf-8")
    return file


def load(file: Path, *more: Path, **names: object) -> Config:
    """Return the settings with the plug-ins of `file` and `more`, and short `names`."""
    changes = {name.replace("__", "."): value for name, value in names.items()}
    return load_config({"plugins": [str(file), *map(str, more)]}, changes)


class TestShortNames:
    def test_a_subclass_is_not_registered(self, tmp_path: Path) -> None:
        source = f"{REGISTERED}@register('models', 'small')\nclass Small:\n    def __init__(self, *arguments): ..."
        file = write(tmp_path / "mine.py", f"{source}\nclass Wide(Small): ...\n")
        assert load(file, model__name="small").model.name == f"{file}:Small"

    def test_a_function_that_wraps_another_is_not_registered(self, tmp_path: Path) -> None:
        source = f"{REGISTERED}@register('models', 'plain')\ndef plain(images, width, norm): ...\n"
        wraps = "@functools.wraps(plain)\ndef deeper(images, width, norm): ...\n"
        file = write(tmp_path / "wrapped_here.py", source + wraps)
        assert load(file, model__name="plain").model.name == f"{file}:plain"
        others = f"import functools, wrapped_here\n{wraps.replace('plain', 'wrapped_here.plain')}"
        importing = write(tmp_path / "importing.py", others)
        with raises_problems(("model.name", "no-such-choice")):
            load(importing, model__name="plain")

    def test_a_wrapper_that_is_registered_itself_counts(self, tmp_path: Path) -> None:
        source = f"{REGISTERED}@register('models', 'plain')\ndef plain(images, width, norm): ...\n"
        wraps = "@register('models', 'deeper')\n@functools.wraps(plain)\ndef deeper(images, width, norm): ...\n"
        file = write(tmp_path / "mine.py", source + wraps)
        assert load(file, model__name="plain").model.name == f"{file}:plain"
        assert load(file, model__name="deeper").model.name == f"{file}:deeper"

    def test_what_was_decorated_after_it_was_registered_is_meant(self, tmp_path: Path) -> None:
        decorator = "def twice(f):\n    @functools.wraps(f)\n    def g(images, width, norm): ...\n    return g\n"
        source = "@twice\n@register('models', 'net')\ndef net(images, width, norm): ...\n"
        file = write(tmp_path / "mine.py", REGISTERED + decorator + source)
        assert load(file, model__name="net").model.name == f"{file}:net"

    def test_one_function_may_have_several(self, tmp_path: Path) -> None:
        source = "@register('noise_schedules', 'half')\n@register('schedules', 'half')\ndef half(*times): return 0.5\n"
        file = write(tmp_path / "mine.py", f"{REGISTERED}{source}the_same = half\n")
        config = load(file, schedule__decay="half", noise__schedule={"kind": "plugin", "function": "half"})
        chosen = {config.schedule.decay, config.noise.schedule.model_dump()["function"]}
        assert chosen <= {f"{file}:half", f"{file}:the_same"}

    def test_one_name_for_two_functions_is_refused(self, tmp_path: Path) -> None:
        source = f"{REGISTERED}@register('models', 'net')\ndef first(images, width, norm): ...\n"
        twice = write(tmp_path / "twice.py", source + source.replace("first", "second"))
        with raises_problems(("plugins", "plugin-ambiguous")):
            load(twice, model__name="net")
        one = write(tmp_path / "one.py", source)
        with raises_problems(("plugins", "plugin-ambiguous")):
            load(one, write(tmp_path / "another.py", source), model__name="net")

    def test_those_of_a_package_are_found_once_it_is_installed_without_reading_all_packages_for_each_configuration(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        source = "def installed_here(images, width, norm): ...\n"
        write(tmp_path / "site" / "package_of_models.py", source)
        monkeypatch.syspath_prepend(tmp_path / "site")
        read = Mock(wraps=metadata.entry_points)
        monkeypatch.setattr(metadata, "entry_points", read)
        for _ in range(3):
            with raises_problems(("model.name", "no-such-choice")):
                load_config({"model": {"name": "installed"}})
        assert read.call_count == 1
        info = tmp_path / "site" / "package_of_models-1.0.dist-info"
        write(info / "entry_points.txt", "[dist_train.models]\ninstalled = package_of_models:installed_here\n")
        write(info / "METADATA", "Metadata-Version: 2.1\nName: package_of_models\nVersion: 1.0\n")
        assert load_config({"model": {"name": "installed"}}).model.name == "package_of_models:installed_here"

    def test_a_file_that_another_one_imports_has_its_names_once(self, tmp_path: Path) -> None:
        source = f"{REGISTERED}@register('models', 'net')\ndef net(images, width, norm): ...\n"
        file = write(tmp_path / "imported_by_another.py", source)
        another = write(tmp_path / "another.py", "from imported_by_another import *\n")
        assert load(file, another, model__name="net").model.name == f"{another}:net"


class TestModulesBeside:
    """Each test has names of its own: what it imports stays in this process."""

    NET = "from %s import width\nfrom torch import nn\ndef net(images, norm_width, norm): return nn.Linear(1, width)\n"

    def experiment(self, folder: Path, width: int, module: str) -> str:
        write(folder / f"{module}.py", f"width = {width}\n")
        return f"{write(folder / 'net.py', self.NET % module)}:net"

    def test_those_of_another_folder_are_not_taken(self, tmp_path: Path) -> None:
        first, second = (self.experiment(tmp_path / f"{each}", each, "layers_beside") for each in (1, 2))
        assert load_plugin(load_config({}, {"model.name": first}).model.name)(None, 1.0, None).out_features == 1
        assert load_plugin(load_config({}, {"model.name": second}).model.name)(None, 1.0, None).out_features == 2
        assert load_plugin(load_config({}, {"model.name": first}).model.name)(None, 1.0, None).out_features == 1
        assert plugin_files({"model": {"name": second}})
        with raises(UsageError, code="plugin-import"):  # what it imports later would be the second one's
            plugin_files({"model": {"name": first}})

    def test_those_that_a_script_has_imported_are_not_taken(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write(tmp_path / "script" / "layers_of_script.py", "width = 1\n")
        monkeypatch.syspath_prepend(tmp_path / "script")
        importlib.import_module("layers_of_script")
        with raises_problems(("model.name", "plugin-import")) as refused:
            load_config({}, {"model.name": self.experiment(tmp_path / "2", 2, "layers_of_script")})
        assert str(tmp_path / "script" / "layers_of_script.py") in str(refused.value)

    def test_its_own_package_may_have_a_module_of_the_same_name(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        package = tmp_path / "netpackage"
        for module in ("__init__", "netpackage", "layers"):
            write(package / f"{module}.py", "width = 2\n")
        monkeypatch.syspath_prepend(tmp_path)
        name = f"{write(package / 'net.py', self.NET % 'netpackage.layers')}:net"
        assert load_plugin(load_config({}, {"model.name": name}).model.name)(None, 1.0, None).out_features == 2
        assert plugin_files({"model": {"name": name}})

    def test_nor_are_those_that_they_import_or_of_folders_without_init(self, tmp_path: Path) -> None:
        for each in (1, 2):
            write(tmp_path / f"{each}" / "outer_beside.py", "from folder_beside import inner\nwidth = inner.width\n")
            write(tmp_path / f"{each}" / "folder_beside" / "inner.py", f"width = {each}\n")
            write(tmp_path / f"{each}" / "net.py", self.NET % "outer_beside")
        load_config({}, {"model.name": f"{tmp_path}/1/net.py:net"})
        name = load_config({}, {"model.name": f"{tmp_path}/2/net.py:net"}).model.name
        assert load_plugin(name)(None, 1.0, None).out_features == 2

    def test_its_own_folder_comes_before_those_of_other_plug_ins(self, tmp_path: Path) -> None:
        write(tmp_path / "1" / "rarely_beside.py", "width = 1\n")
        write(tmp_path / "1" / "net.py", "def net(images, width, norm): ...\n")
        load_config({}, {"model.name": f"{tmp_path}/1/net.py:net"})
        name = load_config({}, {"model.name": self.experiment(tmp_path / "2", 2, "rarely_beside")}).model.name
        assert load_plugin(name)(None, 1.0, None).out_features == 2

    def test_other_names_and_those_of_libraries_are_no_obstacle(self, tmp_path: Path) -> None:
        for each in ("1", "2"):
            for module in ("random", "torch", "unused_beside"):
                write(tmp_path / each / f"{module}.py", "")
            write(tmp_path / each / "net.py", "import random, torch, os.path\ndef net(images, width, norm): ...\n")
            load_config({}, {"model.name": f"{tmp_path}/{each}/net.py:net"})

    def test_what_was_imported_late_is_found_when_the_run_begins(self, tmp_path: Path) -> None:
        late = "def net(images, width, norm):\n    from late_beside import width\n    return width\n"
        names = []
        for each in (1, 2):
            write(tmp_path / f"{each}" / "late_beside.py", f"width = {each}\n")
            names.append(f"{write(tmp_path / f'{each}' / 'net.py', late)}:net")
            load_config({}, {"model.name": names[-1]})
        assert [load_plugin(each)(None, 1.0, None) for each in names] == [2, 2]
        assert plugin_files({"model": {"name": names[1]}})
        with raises(UsageError, code="plugin-import"):
            plugin_files({"model": {"name": names[0]}})


class TestEdits:
    SOURCE = (
        "from torch import nn\ndef net(images, width, norm): return nn.Sequential(nn.Flatten(), nn.LazyLinear(%s))\n"
    )

    def test_the_code_that_runs_is_recorded_not_what_its_file_holds_by_now(self, tmp_path: Path) -> None:
        file = write(tmp_path / "mine.py", "def net(images, width, norm): ...\n")
        settings = load_config({}, {"model.name": f"{file}:net"}).model_dump()
        recorded = plugin_files(settings)
        write(file, "def net(images, width, norm): return 1\n")
        assert plugin_files(settings) == recorded
        file.unlink()
        assert plugin_files(settings) == recorded

    def test_a_run_with_a_file_edited_since_is_refused_until_it_is_loaded_again(self, tmp_path: Path) -> None:
        file = write(tmp_path / "mine.py", self.SOURCE % "images.classes")
        config = small_config(model={"name": f"{file}:net", "width": 1.0}, run={"max_steps": 1})
        write(file, self.SOURCE % "images.classes, bias=False")
        with raises(UsageError, code="plugin-edited"):
            train(config, tmp_path / "run")
        assert not (tmp_path / "run").exists()
        load_config({}, {"model.name": f"{file}:net"})
        train(config, tmp_path / "run")
        status = json.loads((tmp_path / "run" / "status.json").read_text())
        digest = hashlib.sha256(file.read_bytes()).hexdigest()[:16]
        assert status["environment"][f"plug-in {tmp_path.name}/mine.py"] == digest

    def test_modules_beside_are_recorded_imported_anew_and_refused_likewise(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sys, "dont_write_bytecode", False)
        helper = write(tmp_path / "folder_edited" / "helper_edited.py", "width = 1\n")
        without_source = tmp_path / "folder_edited" / "compiled_alone.pyc"
        py_compile.compile(str(helper), cfile=str(without_source))
        source = (
            "from folder_edited import compiled_alone, helper_edited\n"
            "def net(images, width, norm): return helper_edited.width\n"
        )
        name = f"{write(tmp_path / 'mine.py', source)}:net"
        settings = load_config({}, {"model.name": name}).model_dump()
        recorded = plugin_files(settings)
        times = helper.stat()
        write(helper, "width = 2\n")
        os.utime(helper, (times.st_atime, times.st_mtime))  # as if at once, for which the bytecode looks up to date
        assert plugin_files(settings) == recorded
        with raises(UsageError, code="plugin-edited") as refused:
            check_unedited(settings)
        assert str(helper) in str(refused.value)
        load_config({}, {"model.name": name})
        check_unedited(settings)
        assert load_plugin(name)(None, 1.0, None) == 2
        assert plugin_files(settings) != recorded
        assert without_source.is_file()

    def test_a_script_beside_is_no_part_of_a_plug_in_that_imports_multiprocessing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        script = ModuleType("__main__")
        script.__file__ = str(write(tmp_path / "script.py", ""))
        monkeypatch.setitem(sys.modules, "__main__", script)
        monkeypatch.delitem(sys.modules, "__mp_main__", raising=False)
        source = "import sys\nsys.modules['__mp_main__'] = sys.modules['__main__']\ndef net(images, width, norm): ..."
        name = f"{write(tmp_path / 'mine.py', source)}:net"
        settings = load_config({}, {"model.name": name}).model_dump()
        write(tmp_path / "script.py", "# edited while it trains\n")
        check_unedited(settings)
        load_config({}, {"model.name": name})
        assert sys.modules["__main__"] is script


class TestFromPython:
    def test_files_may_be_paths_and_their_list_a_tuple(self, tmp_path: Path) -> None:
        source = f"{REGISTERED}@register('models', 'net')\ndef net(images, width, norm): ...\n"
        file = write(tmp_path / "mine.py", source)
        base = write(tmp_path / "base.yaml", "model: {name: net}\n")
        for files in ([file], (str(file),)):
            assert load_config({"base": base, "plugins": files}).model.name == f"{file}:net"
            assert load_config(base, {"plugins": files}).model.name == f"{file}:net"
            with raises_problems(("model.name", "no-such-choice")):
                load_config({"plugins": files}, {"model.name": "nett"})

    def test_what_a_file_prints_is_no_part_of_a_command_s_answer(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        load(write(tmp_path / "talking.py", "print('hello')"))
        assert capsys.readouterr() == ("", "hello\n")

    def test_a_key_that_is_not_text_is_refused(self, tmp_path: Path) -> None:
        file = write(tmp_path / "mine.py", "def net(images, width, norm, options): ...\n")
        model = {"name": f"{file}:net", "options": {"widths": [{1: 8}]}}
        with raises_problems(("model.options.widths.0", "wrong-type")):
            load_config({"model": model})

    @pytest.mark.parametrize("number", ["inf", "nan"])
    def test_an_option_that_records_cannot_hold_is_refused(self, tmp_path: Path, number: str) -> None:
        file = write(tmp_path / "mine.py", "def net(images, width, norm, options): ...\n")
        model = {"name": f"{file}:net", "options": {"widths": [1.0, number]}}
        assert load_config({"model": model}).model.options == {"widths": [1.0, number]}
        with raises_problems(("model.options.widths.1", "out-of-range")):
            load_config({"model": {**model, "options": {"widths": [1.0, float(number)]}}})


class TestTypesOfOptions:
    SOURCE = """
from dataclasses import dataclass
from typing import Optional
from pydantic import BaseModel, Field
class Options(BaseModel):
    depth: int = Field(1, ge=1)
class Others(Options): ...
@dataclass
class Data:
    depth: int
def net(images, width, norm, options: %s): return options
"""

    @pytest.mark.parametrize("annotation", ["Options", "Options | None = None", "Optional[Options]"])
    def test_the_model_of_an_optional_one_is_meant(self, tmp_path: Path, annotation: str) -> None:
        name = f"{write(tmp_path / 'mine.py', self.SOURCE % annotation)}:net"
        with raises_problems(("model.options.depth", "out-of-range")):
            load_config({"model": {"name": name, "options": {"depth": 0}}})
        options = call_plugin(name, {"depth": 3}, object, None, 1.0, None)
        assert (type(options).__name__, options.depth) == ("Options", 3)

    @pytest.mark.parametrize("annotation", ["Data", "Data | None", "Options | Others"])
    def test_others_are_refused(self, tmp_path: Path, annotation: str) -> None:
        name = f"{write(tmp_path / 'mine.py', self.SOURCE % annotation)}:net"
        with raises_problems(("model.name", "plugin-options")):
            load_config({"model": {"name": name, "options": {"depth": 3}}})

    @pytest.mark.parametrize("annotation", ["dict[str, Options]", "dict", "list[int] | None"])
    def test_any_other_type_gets_the_mapping(self, tmp_path: Path, annotation: str) -> None:
        name = f"{write(tmp_path / 'mine.py', self.SOURCE % annotation)}:net"
        assert call_plugin(name, {"depth": 3}, object, None, 1.0, None) == {"depth": 3}

    @pytest.mark.parametrize("annotation", ["dict", "Options"])
    def test_what_the_code_changes_is_its_own(self, tmp_path: Path, annotation: str) -> None:
        source = """
from pydantic import BaseModel
class Options(BaseModel):
    depths: dict
def data(settings, split, seed, options: %s):
    settings.options["depths"].clear()
    (options if isinstance(options, dict) else vars(options))["depths"].pop("first")
    return options
"""
        name = f"{write(tmp_path / 'mine.py', source % annotation)}:data"
        settings = {"name": name, "shape": [1, 8, 8], "classes": 2, "options": {"depths": {"first": 1}}}
        config = load_config({"data": settings})
        for _ in range(2):
            call_plugin(name, config.data.options, object, config.data, "train", 0)
        assert config.data.options == {"depths": {"first": 1}}
