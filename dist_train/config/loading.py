"""From YAML and overrides to a frozen `Config`, and back."""

from __future__ import annotations

import difflib
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from dist_train.config.combinations import conflicts
from dist_train.config.plugins import from_folder, plugin_problems, with_long_names
from dist_train.config.problems import ConfigError, Problem, problems_of
from dist_train.config.resuming import with_present_names
from dist_train.config.sections import Config

SHIPPED = "dist_train:"
"""Begins the name of a file that comes with the program, as in `dist_train:configs/demo.yaml`."""

_FILE, _BASE, _PLUGINS = "(file)", "base", "plugins"
_COMMAND_LINE = "command line"


def shipped_folder() -> Path:
    """Return the folder of configs, studies, launch and slurm: a checkout, or `share` of an installed package."""
    package = Path(__file__).resolve().parents[1]
    share = package / "share"
    return share if share.is_dir() else package.parent


def located(path: Path) -> Path:
    """Return where the file at `path` is, which may be the name of a shipped one."""
    return shipped_folder() / str(path).removeprefix(SHIPPED) if str(path).startswith(SHIPPED) else path


def based_on(path: Path, name: str) -> Path:
    """Return the file that the one at `path` calls `name`: relative to it, absolute, or shipped."""
    return Path(name) if name.startswith(SHIPPED) else located(path).parent / name


def load_config(path: Path | str, overrides: Sequence[str] = (), plugins: Sequence[str] = ()) -> Config:
    """Return the checked configuration of the YAML file at `path`, with `section.key=value` overrides.

    `plugins` are files, or modules, whose registered names the configuration may use, beside those that it lists.

    A `path` such as `dist_train:configs/demo.yaml` is that of a file that comes with the program. The key `base` names
    another file, relative to this one, whose settings this one changes.

    Examples:
        >>> config = dist_train.load_config("dist_train:configs/demo.yaml", ["run.seed=1", "noise.method=none"])
        >>> config.run.seed, config.batch.global_size
        (1, 8192)

    Raises:
        ConfigError: the file cannot be read, or something in it or in the overrides is wrong.
    """
    path = Path(path)
    return parse_config(with_overrides(read_settings(path), overrides), source=str(path), plugins=plugins)


def read_settings(path: Path) -> dict[str, Any]:
    """Return the settings of the YAML file at `path` on top of those of its bases, not checked yet.

    Raises:
        ConfigError: a file cannot be read, or is no mapping.
    """
    return _read(path, ())


def read_mapping(path: Path) -> dict[str, Any]:
    """Return what the YAML file at `path` says, which must be a mapping.

    Raises:
        ConfigError: it cannot be read, or is none.
    """
    try:
        text = located(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        fault = f"there is no such file{_nearest_file(path)}"
        raise ConfigError.of(str(path), _FILE, fault, code="file-missing") from None
    except (OSError, ValueError) as error:
        raise ConfigError.of(str(path), _FILE, f"cannot be read: {error}", code="unreadable") from None
    try:
        settings = parse_yaml(text)
    except yaml.YAMLError as error:
        raise ConfigError.of(str(path), _FILE, f"not YAML: {yaml_fault(error)}", code="not-yaml") from None
    if isinstance(settings, dict) or settings is None:
        return settings or {}
    raise ConfigError.of(str(path), _FILE, "not a mapping of sections", code="wrong-type", value=settings)


def parse_yaml(text: str | bytes) -> Any:
    """Return what `text` says, with 1e-4 as a number and no dates.

    Raises yaml.YAMLError where it is not YAML, a key stands twice, it nests too deeply, or its aliases explode.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except RecursionError:
        raise yaml.YAMLError("it nests too deeply") from None


def yaml_fault(error: yaml.YAMLError) -> str:
    """Return where a text is not YAML, as people count lines and columns, and why: "line 3, column 5: ..."."""
    if isinstance(error, yaml.MarkedYAMLError):
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        return place + " ".join(filter(None, (error.context, error.problem)))
    return " ".join(str(error).split())


def with_overrides(settings: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Return `settings` with `section.key=value` overrides, the later ones on top.

    Raises:
        ConfigError: some are not of that form.
    """
    changed = dict(settings)
    found: list[Problem] = []
    for override in overrides:
        try:
            _apply(changed, override)
        except ConfigError as error:
            found.extend(error.problems)
    if found:
        raise ConfigError(_COMMAND_LINE, found)
    return changed


def write_override(path: str, value: object) -> str:
    """Return the override, of one line, that gives the setting at `path` the `value`."""
    text = json.dumps(value)
    if isinstance(value, str) and re.fullmatch(r"[\w./-]+", value) and parse_yaml(value) == value:
        text = value
    return f"{path}={text}"


def parse_config(settings: Mapping[str, Any], *, source: str, plugins: Sequence[str] = ()) -> Config:
    """Return the checked configuration of nested `settings`; `source` names it in errors, `plugins` are more files.

    Raises:
        ConfigError: something in it is wrong; every problem is listed.
    """
    try:
        settings = _with_plugins(with_present_names(settings, source), plugins)
        text = json.dumps(settings, default=_refuse)
        config = Config.model_validate_json(text, strict=True)
    except ValidationError as error:
        raise ConfigError(source, problems_of(error, Config)) from None
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError.of(source, _FILE, str(error), code="wrong-type") from None
    whole = config.model_dump(mode="json")
    found = [*_with_nul(whole, ""), *conflicts(config), *plugin_problems(whole)]
    if found:
        raise ConfigError(source, found)
    return config


def dump_config(config: Config) -> str:
    """Return every setting, resolved, as YAML that `load_config` reads back."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False)


def flat_settings(sections: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yield the settings of nested `sections` under dotted paths, in their order."""
    for name, value in sections.items():
        if isinstance(value, Mapping):
            yield from flat_settings(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _with_plugins(settings: Mapping[str, Any], more: Sequence[str]) -> dict[str, Any]:
    """Return `settings` without their list of plug-ins, whose short names are replaced."""
    files = settings.get(_PLUGINS, [])
    if not isinstance(files, list) or not all(isinstance(file, str) for file in files):
        raise ConfigError(_PLUGINS, [Problem(_PLUGINS, "not a list of files", code="wrong-type", value=files)])
    rest = {name: value for name, value in settings.items() if name != _PLUGINS}
    return with_long_names(rest, [*files, *more], Config)


def _read(path: Path, seen: tuple[str, ...]) -> dict[str, Any]:
    settings = from_folder(read_mapping(path), located(path).parent)
    if _BASE not in settings:
        return settings
    name = settings.pop(_BASE)
    if not isinstance(name, str) or not name or "\0" in name:
        raise ConfigError.of(str(path), _BASE, "not the name of a file", code="wrong-form", value=name)
    base, seen = based_on(path, name), (*seen, os.path.realpath(located(path)))
    if os.path.realpath(located(base)) in seen:
        raise ConfigError.of(str(path), _BASE, "the file is its own base", code="base-cycle", value=str(base))
    return _merge(_read(base, seen), settings)


def _merge(below: dict[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for name, value in above.items():
        inner = merged.get(name)
        # A schedule of another kind replaces the whole: the parameters of the one below are not its own.
        replaces = isinstance(value, dict) and "kind" in value
        merged[name] = (
            _merge(inner, value) if isinstance(inner, dict) and isinstance(value, dict) and not replaces else value
        )
    return merged


def _apply(settings: dict[str, Any], override: str) -> None:
    path, separator, text = override.partition("=")
    names = path.split(".")
    if not separator or not all(names):
        fault = "not an override; it has the form section.key=value, as in run.seed=1"
        raise ConfigError.of(_COMMAND_LINE, override or "''", fault, code="override-form")
    try:
        value = parse_yaml(text)
    except yaml.YAMLError as error:
        raise ConfigError.of(_COMMAND_LINE, path, f"not YAML: {yaml_fault(error)}", code="not-yaml") from None
    section = settings
    for name in names[:-1]:
        inner = section.get(name)
        if inner is not None and not isinstance(inner, dict):
            raise ConfigError.of(_COMMAND_LINE, path, f"{name} is not a section", code="wrong-type", value=inner)
        section[name] = dict(inner or {})
        section = section[name]
    section[names[-1]] = value


def _with_nul(value: object, path: str) -> Iterator[Problem]:
    """Yield a problem for each text below `path` that holds a NUL character: no name of a file or host can."""
    if isinstance(value, str) and "\0" in value:
        yield Problem(path, "holds a NUL character", code="nul-character", value=value.replace("\0", "\\0"))
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield from _with_nul(inner, f"{path}.{name}" if path else name)
    elif isinstance(value, list):
        for inner in value:
            yield from _with_nul(inner, path)


def _nearest_file(path: Path) -> str:
    try:
        names = [entry.name for entry in located(path).parent.glob("*.y*ml")]
    except OSError:
        return ""
    close = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {path.parent / close[0]}?" if close else ""


def _refuse(value: object) -> object:
    raise TypeError(f"{value!r} is not text, a number, true or false, a list or a mapping")


_LARGEST = 1 << 20
"""Characters of all values of a file, each alias replaced by what it stands for."""


def _written_out(node: yaml.Node, sizes: dict[yaml.Node, float]) -> float:
    """Return the characters below `node`, and one for each node; infinite where it holds itself."""
    if node not in sizes:
        sizes[node] = math.inf
        inner: Iterable[yaml.Node] = ()
        if isinstance(node, yaml.MappingNode):
            inner = chain.from_iterable(node.value)
        elif isinstance(node, yaml.SequenceNode):
            inner = node.value
        own = len(node.value) if isinstance(node, yaml.ScalarNode) else 0
        sizes[node] = 1 + own + sum(_written_out(each, sizes) for each in inner)
    return sizes[node]


class _Loader(yaml.SafeLoader):
    """Safe YAML 1.1 without its traps.

    Those are: duplicate keys pass, 1e-4 reads as text, 2020-01-01 as a date, and a few aliases of aliases of aliases
    stand for more than memory holds.
    """

    def compose_document(self) -> yaml.Node | None:
        """Return the root of the document. Raises ComposerError where it is too large with its aliases written out."""
        root: yaml.Node | None = super().compose_document()
        if root is not None and _written_out(root, {}) > _LARGEST:
            raise yaml.composer.ComposerError(
                None, None, "its aliases stand for too much, or for themselves", root.start_mark
            )
        return root

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Return what `node` stands for; a value that does not fit its tag is an error of YAML."""
        try:
            return super().construct_object(node, deep)
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise yaml.constructor.ConstructorError(
                None, None, f"not a value of {node.tag.rpartition(':')[2]}", node.start_mark
            ) from error


class _Dumper(yaml.SafeDumper):
    """Quotes what `_Loader` would read as a number."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    names: set[str] = set()
    for key, _ in node.value:
        fault = None
        if not isinstance(key, yaml.ScalarNode):
            fault = "a key must be one word"
        elif key.value in names:
            fault = f"the key {key.value} stands twice"
        if fault:
            raise yaml.constructor.ConstructorError(None, None, fault, key.start_mark)
        names.add(key.value)
    return dict(loader.construct_pairs(node, deep=True))


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"),
        list("-+0123456789"),
    )
