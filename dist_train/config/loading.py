"""Loading YAML files and overrides into a frozen `Config`, and dumping it."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from dist_train.config.combinations import conflicts
from dist_train.config.plugin_modules import forget_edited
from dist_train.config.plugins import from_folder, plugin_problems, short_names, with_long_names
from dist_train.config.problems import ConfigError, Problem, allowed_at, problems_of
from dist_train.config.resuming import with_present_names
from dist_train.config.sections import Config
from dist_train.outcome import UsageError, did_you_mean

SHIPPED = "dist_train:"
"""Prefix of the name of a file that comes with the program, as in `dist_train:configs/demo.yaml`."""

_FILE, _BASE = "(file)", "base"
_COMMAND_LINE = "command line"
_logger = logging.getLogger("dist_train.config")


def shipped_folder() -> Path:
    """Return the folder that contains configs, studies, launch and slurm: the checkout, or the package's `share`."""
    package = Path(__file__).resolve().parents[1]
    share = package / "share"
    return share if share.is_dir() else package.parent


def project_root() -> Path:
    """Return the folder of the launch and batch scripts. Raises UsageError if they have been removed."""
    scripts = shipped_folder() / "slurm"
    if not (scripts / "prologue.sh").is_file():
        raise UsageError(f"there are no batch scripts at {scripts}: install dist_train again", code="scripts-missing")
    return scripts.parent


def located(path: Path) -> Path:
    """Return the file at `path`, which may be the name of a shipped file."""
    return shipped_folder() / str(path).removeprefix(SHIPPED) if str(path).startswith(SHIPPED) else path


def based_on(path: Path, name: str) -> Path:
    """Return the file to which the file at `path` refers as `name`: relative to it, absolute, or shipped."""
    return Path(name) if name.startswith(SHIPPED) else located(path).parent / name


def load_config(
    path: Path | str | Mapping[str, Any] | Config,
    overrides: Sequence[str] | Mapping[str, object] = (),
    plugins: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] = (),
) -> Config:
    """Return the checked configuration of the YAML file at `path`, with `section.key=value` overrides.

    In place of a file, a mapping of sections or another `Config` may be given, and for the overrides a mapping
    `{"section.key": value}`.
    Values from Python may be paths and NumPy's scalars. A mapping changes only the settings of its section that it has.
    `plugins`: a file or module, or several, whose registered names the configuration may use, besides those it lists.

    A `path` such as `dist_train:configs/demo.yaml` means a file that comes with the program. The key `base` names
    another file, relative to this one, whose settings this one changes.

    Examples:
        >>> config = dist_train.load_config("dist_train:configs/demo.yaml", ["run.seed=1", "noise.method=none"])
        >>> config.run.seed, config.batch.global_size
        (1, 8192)
        >>> dist_train.load_config({"run": {"seed": 1}}, {"noise.method": "none"}).run.seed
        1
        >>> dist_train.load_config(config, {"run.seed": 2}).run.seed
        2

    Raises:
        ConfigError: the file cannot be read, or something in it or in the overrides is wrong.
    """
    forget_edited()
    if isinstance(path, Config):
        path = path.model_dump(mode="json", exclude_unset=True)  # what was not given has no effect to be warned of
    if isinstance(path, Mapping):
        source, settings = "settings", _with_base(from_folder(path, Path()), Path("settings"))
    else:
        source, settings = str(path), read_settings(Path(path))
        if "variants" in settings:
            wrong = "this is a study: train it by dist-train sweep, or submit --study"
            raise ConfigError.of(source, "variants", wrong, code="unknown-key")
        if not settings and not overrides:
            wrong = "holds no settings, and no overrides are given: for a run of defaults give one, such as run.seed=0"
            raise ConfigError.of(source, _FILE, wrong, code="missing")
    files = [os.fspath(each) for each in ([plugins] if isinstance(plugins, str | os.PathLike) else plugins)]
    return parse_config(with_overrides(settings, overrides), source=source, plugins=files)


def read_settings(path: Path, seen: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return the unchecked settings of the YAML file at `path`, merged over those of its bases. Raises ConfigError.

    `seen`: the files of which it is a base.
    """
    return _with_base(from_folder(read_mapping(path, *seen[-1:]), located(path).parent), path, seen)


def _with_base(settings: dict[str, Any], path: Path, seen: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return the `settings` of `path`, merged over those of the base that they name."""
    if _BASE not in settings:
        return settings
    name = settings.pop(_BASE)
    name = os.fspath(name) if isinstance(name, os.PathLike) else name
    if not isinstance(name, str) or not name or "\0" in name:
        raise ConfigError.of(str(path), _BASE, "not the name of a file", code="wrong-form", value=name)
    base, seen = based_on(path, name), (*seen, os.path.realpath(located(path)))
    if os.path.realpath(located(base)) in seen:
        raise ConfigError.of(str(path), _BASE, "the file is its own base", code="base-cycle", value=str(base))
    return _merge(read_settings(base, seen), settings)


def read_mapping(path: Path, based: str = "") -> dict[str, Any]:
    """Return the content of the YAML file at `path`, the base of the file `based`, if given.

    Raises ConfigError if it cannot be read, or is not a mapping.
    """
    try:
        text = located(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        place = f" at {os.path.abspath(located(path))}, which is the base of {based}" if based else ""
        fault = f"there is no such file{place}{_nearest_file(path)}"
        raise ConfigError.of(str(path), _FILE, fault, code="file-missing") from None
    except IsADirectoryError:
        names = ", ".join(sorted(each.name for each in located(path).glob("*.y*ml"))[:5])
        fault = f"is a folder; name a YAML file in it{names and ', such as '}{names}"
        raise ConfigError.of(str(path), _FILE, fault, code="unreadable") from None
    except UnicodeDecodeError as error:
        fault = f"not UTF-8 at byte {error.start}: save the text as UTF-8"
        raise ConfigError.of(str(path), _FILE, fault, code="unreadable") from None
    except (OSError, ValueError) as error:
        raise ConfigError.of(str(path), _FILE, f"cannot be read: {error}", code="unreadable") from None
    try:
        settings = parse_yaml(text)
    except yaml.YAMLError as error:
        raise ConfigError.of(str(path), _FILE, f"not YAML: {yaml_fault(error)}", code="not-yaml") from None
    if isinstance(settings, dict) or settings is None:
        return settings or {}
    raise ConfigError.of(str(path), _FILE, "not a mapping of sections", code="wrong-type", value=settings)


def parse_yaml(text: str | bytes, *, is_dumped: bool = False) -> Any:
    """Return the value of the YAML `text`; 1e-4 is a number, and dates are text.

    If `is_dumped`, the text is from `dump_config` and libyaml parses it several times faster. Texts by hand may differ
    between the two, and PyYAML explains faults better.

    Raises yaml.YAMLError if it is not YAML, has duplicate keys, nests too deeply, or grows too large by its aliases.
    """
    try:
        root = None
        if is_dumped:
            with suppress(yaml.YAMLError):
                root = yaml.compose(text, Loader=_DumpedLoader)
        root = root or yaml.compose(text, Loader=_Loader)
        if root is None:
            return None
        if _expanded_size(root, {}) > _LARGEST_EXPANDED:
            fault = "its aliases expand to too much, or contain themselves"
            raise yaml.composer.ComposerError(None, None, fault, root.start_mark)
        return _Loader("").construct_document(root)
    except RecursionError:
        raise yaml.YAMLError("it nests too deeply") from None


def yaml_fault(error: yaml.YAMLError) -> str:
    """Return where and why a text is not YAML, with lines and columns counted from 1: "line 3, column 5: ..."."""
    if isinstance(error, yaml.MarkedYAMLError):
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        return place + " ".join(filter(None, (error.context, error.problem)))
    return " ".join(str(error).split())


def with_overrides(settings: Mapping[str, Any], overrides: Sequence[str] | Mapping[str, object]) -> dict[str, Any]:
    """Return `settings` with overrides: `section.key=value`, of which later ones take precedence, or values by path.

    Raises ConfigError.
    """
    changed, own = dict(settings), dict[str, Any]()
    problems: list[Problem] = []
    for override in [overrides] if isinstance(overrides, str) else overrides:
        try:
            path, value = (override, overrides[override]) if isinstance(overrides, Mapping) else _parsed(override)
            _set(own, path, value)
            if path == "noise.schedule.kind":  # replaces a schedule of another kind, but not the parameters given here
                path, value = "noise.schedule", own["noise"]["schedule"]
            _set(changed, path, value)
        except ConfigError as error:
            problems.extend(error.problems)
    if problems:
        raise ConfigError(_COMMAND_LINE, problems)
    return changed


def override_texts(overrides: Sequence[str] | Mapping[str, object]) -> tuple[str, ...]:
    """Return `overrides`, in one of the forms that `load_config` takes, as texts `section.key=value`."""
    if isinstance(overrides, Mapping):
        return tuple(write_override(path, value) for path, value in overrides.items())
    return (overrides,) if isinstance(overrides, str) else tuple(overrides)


def write_override(path: str, value: object) -> str:
    """Return the one-line override that sets the setting at `path` to `value`. Raises ConfigError if none can."""
    value = os.fspath(value) if isinstance(value, os.PathLike) else value
    text = json.dumps(value, default=lambda each: _plain(each, {path: value}, _COMMAND_LINE))
    if isinstance(value, str) and re.fullmatch(r"[\w./-]*\w[\w./-]*", value) and parse_yaml(value) == value:
        text = value
    return f"{path}={text}"


def parse_config(settings: Mapping[str, Any], *, source: str, plugins: Sequence[str] = ()) -> Config:
    """Return the checked configuration of nested `settings`; `source` names it in errors.

    `plugins`: as for `load_config`.

    Raises ConfigError if something in it is wrong; every problem is listed.
    """
    try:
        # as every key is text in YAML and in a run's records
        problems = [
            Problem(path or _FILE, f"the key {key!r} is not text", code="wrong-type")
            for path, value in _nested(settings)
            if isinstance(value, Mapping)
            for key in value
            if not isinstance(key, str)
        ]
        if problems:
            raise ConfigError(source, problems)
        present = with_present_names(settings, lambda text: _logger.warning("%s: %s", source, text))
        given = with_long_names(present, plugins, Config)
        text = json.dumps(given, default=lambda value: _plain(value, given, source))
        config = Config.model_validate_json(text, strict=True)
    except ValidationError as error:
        raise ConfigError(source, problems_of(error, Config, short_names(settings, plugins))) from None
    except UsageError:  # a ValueError, too, with a code of its own
        raise
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError.of(source, _FILE, str(error), code="wrong-type") from None
    problems = list(_unusable(config)) or [*conflicts(config), *plugin_problems(config.model_dump(mode="json"))]
    if problems:
        raise ConfigError(source, problems)
    return config


def _unusable(config: Config) -> Iterator[Problem]:
    """Yield a problem for each number, in options, and each text that cannot be used anywhere."""
    for path, value in _nested(config.model_dump()):
        if isinstance(value, float) and not math.isfinite(value):  # the run's records, as JSON, would have null instead
            wrong = 'not finite: leave it out, or write it as text: "inf"'
            yield Problem(path, wrong, code="out-of-range", value=value)
        if isinstance(value, str | Path) and "\0" in str(value):  # which names of files and hosts cannot contain
            yield Problem(path, "holds a NUL character", code="nul-character", value=str(value).replace("\0", "\\0"))


def dump_config(config: Config) -> str:
    """Return every setting, resolved, as YAML that `load_config` can read."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False)


def flat_settings(sections: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yield the settings of nested `sections` under dotted paths, in their order."""
    for name, value in sections.items():
        if isinstance(value, Mapping):
            yield from flat_settings(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _nested(value: object, path: str = "") -> Iterator[tuple[str, object]]:
    """Yield `value`, and each value in its mappings and lists, with its dotted path."""
    yield path, value
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list | tuple) else ()
    for name, inner in items:
        yield from _nested(inner, f"{path}.{name}" if path else str(name))


def _merge(base: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for name, value in changes.items():
        before = merged.get(name)
        if isinstance(before, dict) and isinstance(value, dict):
            # The parameters of a noise schedule may not apply to another kind, nor a plug-in's options to another one.
            is_another = name == "schedule" and value.get("kind", before.get("kind")) != before.get("kind")
            value = value if is_another or name.endswith("options") else _merge(before, value)
        merged[name] = value
    return merged


def _parsed(override: str) -> tuple[str, object]:
    path, separator, text = str(override).partition("=")  # from Python it may be anything
    if not separator or not all(path.split(".")):
        fault = "not an override; it has the form section.key=value, as in run.seed=1"
        raise ConfigError.of(_COMMAND_LINE, str(override) or "''", fault, code="override-form")
    try:
        value = parse_yaml(text)
    except yaml.YAMLError as error:
        raise ConfigError.of(_COMMAND_LINE, path, f"not YAML: {yaml_fault(error)}", code="not-yaml") from None
    if value is None and text.strip() == "~" and "a path" in allowed_at(path, Config):
        fault = "~ is YAML's null; the home folder is ~/"
        raise ConfigError.of(_COMMAND_LINE, path, fault, code="override-form", value=text)
    if _has_comment(text, value):
        whole = shlex.quote(write_override(path, text))
        fault = f"# begins a comment here: leave it out, or for a text with # write {whole}"
        raise ConfigError.of(_COMMAND_LINE, path, fault, code="override-form", value=text)
    return path, value


def _has_comment(text: str, value: object) -> bool:
    """Whether the YAML `text` of `value` has the same value without a # and what follows."""
    for mark in re.finditer(r"(?<!\S)#", text):
        with suppress(yaml.YAMLError):  # within quotes
            if parse_yaml(text[: mark.start()]) == value:
                return True
    return False


def _set(settings: dict[str, Any], path: str, value: object) -> None:
    section, names = settings, path.split(".")
    for name in names[:-1]:
        inner = section.get(name)
        if inner is not None and not isinstance(inner, dict):
            raise ConfigError.of(_COMMAND_LINE, path, f"{name} is not a section", code="wrong-type", value=inner)
        section[name] = dict(inner or {})
        section = section[name]
    section.update(_merge(section, {names[-1]: value}))


def _nearest_file(path: Path) -> str:
    name, near = located(path).name, ""
    with suppress(OSError):
        names = [entry.name for entry in located(path).parent.glob("*.y*ml")]
        near = did_you_mean(path.name, names, str(path).removesuffix(path.name))
    return _shipped_file(name) or near or _shipped_file(f"{name}.yaml")


def _shipped_file(name: str) -> str:
    """Return "; the package has FILE" if it has a configuration or study of this `name`, else ""."""
    found = (f"{folder}/{name}" for folder in ("configs", "studies") if (shipped_folder() / folder / name).is_file())
    return next((f"; the package has {SHIPPED}{each}" for each in found), "")


def _plain(value: Any, settings: Mapping[str, Any], source: str) -> object:
    """Return a path, or a scalar of NumPy, in `settings` as what YAML would give. Raises ConfigError for others."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if getattr(value, "shape", None) == ():
        return value.item()
    found = (path for path, each in _nested(settings) if each is value)
    wrong = "not text, a number, true or false, a list or a mapping"
    if callable(value):  # a class or function, which a resume and loader processes must find, too
        wrong = "code itself is no setting: name it, as FILE.py:NAME or package.module:NAME"
    raise ConfigError.of(source, next(found, _FILE), wrong, code="wrong-type", value=repr(value))


_LARGEST_EXPANDED = 1 << 20  # limit on the number of characters of all values in a file, with aliases expanded


def _expanded_size(node: yaml.Node, sizes: dict[yaml.Node, float]) -> float:
    """Return the number of characters below `node` plus one per node; infinite if it contains itself."""
    if node not in sizes:
        sizes[node] = math.inf
        inner: Iterable[yaml.Node] = ()
        if isinstance(node, yaml.MappingNode):
            inner = chain.from_iterable(node.value)
        elif isinstance(node, yaml.SequenceNode):
            inner = node.value
        own = len(node.value) if isinstance(node, yaml.ScalarNode) else 0
        sizes[node] = 1 + own + sum(_expanded_size(each, sizes) for each in inner)
    return sizes[node]


class _Loader(yaml.SafeLoader):
    """Safe YAML 1.1 without its traps.

    The traps: duplicate keys are accepted, 1e-4 is text, 2020-01-01 is a date, 010 is 8, 1:30 is 90, the key `no` is
    false, and a few aliases of aliases expand to more than fits into memory (`parse_yaml` refuses those).
    """

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Return the value of `node`. Raises ConstructorError if it does not fit its tag."""
        try:
            return super().construct_object(node, deep)
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            fault = f"not a value of {node.tag.rpartition(':')[2]}"
            raise yaml.constructor.ConstructorError(None, None, fault, node.start_mark) from error


class _DumpedLoader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc] # libyaml may be missing
    """Composes what `_Dumper` wrote."""


class _Dumper(yaml.SafeDumper):
    """Quotes what `_Loader` would read as a number."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in node.value:
        fault = None
        if not isinstance(key, yaml.ScalarNode):
            fault = "a key must be one word"
        elif key.tag == "tag:yaml.org,2002:merge":
            fault = "merge keys are not supported: name the file whose settings this one changes by base"
        elif key.value in values:
            fault = f"the key {key.value} occurs twice"
        if fault:
            raise yaml.constructor.ConstructorError(None, None, fault, key.start_mark)
        values[key.value] = loader.construct_object(value, deep=True)
    return values


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
_OCTAL_OR_SEXAGESIMAL = re.compile(r"^[-+]?(0[0-9_]+|[0-9][0-9_]*(:[0-9]+)+(\.[0-9_]*)?)$")
_Loader.yaml_implicit_resolvers = {
    first: [
        (yaml.resolver.BaseResolver.DEFAULT_SCALAR_TAG, _OCTAL_OR_SEXAGESIMAL),
        *((tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")),
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
    )
_DumpedLoader.yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers
