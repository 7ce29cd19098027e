"""Plug-ins: which code a name selects, and which code a run records."""

from __future__ import annotations

from pathlib import Path

from dist_train.config import Config, load_config
from tests.raising import raises_problems

REGISTERED = """
import functools
from dist_train import register
"""


def write(file: Path, source: str) -> Path:
    file.parent.mkdir(exist_ok=True)
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

    def test_a_file_that_another_one_imports_has_its_names_once(self, tmp_path: Path) -> None:
        source = f"{REGISTERED}@register('models', 'net')\ndef net(images, width, norm): ...\n"
        file = write(tmp_path / "imported_by_another.py", source)
        another = write(tmp_path / "another.py", "from imported_by_another import *\n")
        assert load(file, another, model__name="net").model.name == f"{another}:net"
