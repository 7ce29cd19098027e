"""Plug-ins: a user's own code, named in a configuration as `package.module:name` or `FILE.py:name`.

`plugins: [FILE.py]` at the top of a configuration, `--plugin FILE.py`, and the entry points of installed packages
(groups `dist_train.models`, `dist_train.data_sets`, ...) give plug-ins short names. These are replaced by the long
names before settings are checked, so that a run records where its code is. Naming a plug-in runs its code.
"""

from __future__ import annotations

import copy
import inspect
import os
import sys
import sysconfig
import tomllib
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import is_dataclass, replace
from functools import cache, lru_cache, partial
from importlib import metadata
from pathlib import Path
from types import ModuleType, SimpleNamespace, UnionType
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel, Field, ValidationError

from dist_train.config.plugin_modules import edited_files, is_installed, plugin_module, source_digests
from dist_train.config.problems import ConfigError, Problem, choices_of, problems_of
from dist_train.outcome import (
    CodedError,
    PluginResultError,
    UsageError,
    check_choice,
    did_you_mean,
    refuse_nondeterministic,
)

Kind = Literal[
    "models",
    "data_sets",
    "augmentations",
    "noise_methods",
    "noise_scales",
    "noise_schedules",
    "losses",
    "optimizers",
    "schedules",
    "loggers",
]

PluginName = Annotated[
    str, Field(pattern=r"^[^:]*[^:\s]:[A-Za-z_]\w*$", json_schema_extra={"format": "plugin"}, max_length=4096)
]
"""`package.module:name` or `FILE.py:name`."""

Options = dict[str, Any]

_PLACES: Mapping[str, Kind] = {
    "model.name": "models",
    "data.name": "data_sets",
    "data.augment": "augmentations",
    "noise.method": "noise_methods",
    "noise.scale": "noise_scales",
    "noise.schedule.function": "noise_schedules",
    "loss.name": "losses",
    "optimizer.name": "optimizers",
    "schedule.decay": "schedules",
    "metrics.loggers.*.name": "loggers",
}
"""The settings that may name a plug-in, and its kind."""

_CALLS: Mapping[Kind, tuple[str, str]] = {
    "models": ("images, width, norm", "an nn.Module"),
    "data_sets": ("settings, split, seed", "a map-style Dataset or an ImageSet"),
    "augmentations": ("images", "a transform of an image"),
    "noise_methods": ("settings, weights, seed=, total_steps=, rank=", "a Noise"),
    "noise_scales": ("noise, weights, filters, drawn, amplitude, unit", "an iterator of the parts scaled"),
    "noise_schedules": ("step, total_steps", "the factor on the amplitude"),
    "losses": ("images", "a loss of logits and labels, such as nn.CrossEntropyLoss(reduction='none')"),
    "optimizers": ("settings, groups", "a torch.optim.Optimizer"),
    "schedules": ("over", "the factor on the rate at the fraction `over` of the time after warm-up"),
    "loggers": ("directory", "an Observer"),
}
"""The arguments of each kind, of which those with `=` are passed by name, and what it returns."""

_OTHER_FORMS: Mapping[Kind, frozenset[str]] = {
    "optimizers": frozenset({"params"}),
    "data_sets": frozenset({"root"}),
    "schedules": frozenset({"epoch", "step"}),
    "augmentations": frozenset({"image", "img"}),
    "losses": frozenset({"weight", "size_average", "reduction"}),
}
"""First parameters of what is refused as a plug-in: torch's optimizers, torchvision's data sets, functions of an epoch
as torch's LambdaLR takes them, and transforms and torch's losses themselves.
"""

OPTION_KEYS: Mapping[str, str] = {"noise.scale": "scale_options", "data.augment": "augment_options"}
"""The key of a plug-in's options, if it is not `options`: sections with more than one plug-in."""

_MARK = "_dist_train_plugin"
"""Attribute of registered objects: each kind and short name, with the object, which tells it from others' copies."""

_Target = TypeVar("_Target", bound=Callable[..., Any])


def register(kind: Kind, name: str) -> Callable[[_Target], _Target]:
    """Return a decorator that gives a function or class the short `name`, in files that `plugins` lists.

    docs/extending.md says what arguments each `kind` is called with and what it must return. `load_config` looks up the
    name, and raises ConfigError if something is wrong with it.

    Examples:
        >>> @dist_train.register("models", "perceptron")
        ... def perceptron(images, width, norm):  # images [n, C, H, W] to logits [n, classes]
        ...     channels, height, breadth = images.shape
        ...     return nn.Sequential(nn.Flatten(), nn.Linear(channels * height * breadth, images.classes))

    Raises:
        UsageError: there is no such `kind`.
    """
    check_choice("the kind of a plug-in", kind, Kind)

    def mark(target: _Target) -> _Target:
        own = [each for each in vars(target).get(_MARK, ()) if each[1] is target]
        setattr(target, _MARK, (*own, ((kind, name), target)))
        return target

    return mark


def is_plugin(name: str) -> bool:
    """Whether `name` names code outside the package."""
    return ":" in name


def may_name_one_plugin(path: str, name: str, other: str, model: type[BaseModel]) -> bool:
    """Whether two names in the setting at `path` of `model`, the configuration, may be of one plug-in.

    A file may be named by several paths. A short name, whose file is not known, may be any plug-in's.
    """
    if path not in _PLACES or not (is_plugin(name) or is_plugin(other)):
        return False
    if not {name, other}.isdisjoint(choices_of(model, path)):
        return False
    (place, _, own), (other_place, _, other_own) = (each.rpartition(":") for each in (name, other))
    if place.endswith(".py") and other_place.endswith(".py"):
        place, other_place = Path(place).name, Path(other_place).name
    return not (place and other_place) or (place, own) == (other_place, other_own)


def with_places_of(settings: Mapping[str, Any], given: Mapping[str, Any], model: type[BaseModel]) -> dict[str, Any]:
    """Return `settings` with the places of plug-ins in complete `given` settings, where both may name one plug-in.

    They were saved where the code may no longer be.
    """
    changed: dict[str, Any] = copy.deepcopy(dict(settings))
    for path in _PLACES:
        sections = zip(_sections_with(changed, path.split(".")), _sections_with(given, path.split(".")), strict=False)
        for (_, section, key), (_, other, _) in sections:
            before, now = str(section.get(key)), str(other.get(key))
            if is_plugin(before) and is_plugin(now) and may_name_one_plugin(path, before, now, model):
                section[key] = now
    return changed


def load_plugin(name: str) -> Any:
    """Return the function or class that `name` names. Raises UsageError if there is none, or it cannot be imported."""
    place, _, attribute = name.rpartition(":")
    if not place:
        return load_plugin(_shipped("loggers")[name])
    if place in (libraries := _shipped("model_libraries")):
        return load_plugin(libraries[place])(attribute)
    module = plugin_module(place)
    target = getattr(module, attribute, None)
    if not callable(target):
        hint = did_you_mean(attribute, [name for name, each in vars(module).items() if callable(each)])
        raise UsageError(f"{place} has no function or class {attribute}{hint}", code="plugin-missing")
    return target


def call_plugin(name: str, options: Options, returns: type[Any], *arguments: Any, **keywords: Any) -> Any:
    """Call the plug-in `name`, with its checked `options` if it takes any, and return the result, of type `returns`.

    It gets copies of options and settings, which it may change. Raises UsageError if there is no such plug-in, it
    rejects the options, raises, or returns another type.
    """
    target = load_plugin(name)
    if (kind := _options_type(name, target)) is not None:
        own = copy.deepcopy(options)
        keywords["options"] = kind.model_validate(own) if issubclass(kind, BaseModel) else own
    copies = (each.model_copy(deep=True) if isinstance(each, BaseModel) else each for each in arguments)
    with failing_clearly(name):
        result = target(*copies, **keywords)
    if not isinstance(result, returns):
        wrong = f"{name} returned {type(result).__name__}, not {returns.__module__}.{returns.__qualname__}"
        raise PluginResultError(wrong)
    return _iterate(name, result) if inspect.isgenerator(result) else result


def _options_type(name: str, target: Any) -> type[Any] | None:
    """Return the pydantic model, or else dict, of a plug-in's parameter `options`; None if it has no such parameter.

    Raises UsageError if the parameters, or the type of `options`, cannot be found, or it is another class of data.
    """
    try:
        parameter = inspect.signature(target).parameters.get("options")
        if parameter is None:
            return None
        # The other types may be imported only for type checkers.
        only = SimpleNamespace(__annotations__={"options": parameter.annotation})
        function = inspect.unwrap(target.__init__ if inspect.isclass(target) else target)
        hint = get_type_hints(only, getattr(function, "__globals__", {})).get("options")
    except (NameError, TypeError, ValueError, AttributeError) as error:
        fix = "write it as a function or class, and import the type of its options outside of TYPE_CHECKING"
        wrong = f"the parameters of the plug-in {name} cannot be found ({error}): {fix}"
        raise UsageError(wrong, code="plugin-import") from error
    types = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    models = [each for each in types if inspect.isclass(each) and issubclass(each, BaseModel)]
    if len(models) > 1 or any(map(is_dataclass, types)):
        fix = "annotate its parameter `options` with one pydantic model, or with dict"
        raise UsageError(f"the options of {name} are of {hint}: {fix}", code="plugin-options")
    return models[0] if models else dict


def _iterate(name: str, generator: Iterator[Any]) -> Iterator[Any]:
    with failing_clearly(name):
        yield from generator


@contextmanager
def failing_clearly(name: str) -> Iterator[None]:
    """Turn errors of the plug-in `name` in the block into a UsageError that says where it failed."""
    try:
        yield
    except CodedError:
        raise
    except Exception as error:
        refuse_nondeterministic(error)
        words = " ".join([str(error), *getattr(error, "__notes__", ())]).split()
        reason = f"{place_of(error, load_plugin(name))}: {type(error).__name__}: {' '.join(words)}"
        raise UsageError(f"the plug-in {name} failed{reason}", code="plugin-failed") from error


def place_of(error: Exception, target: Any) -> str:
    """Return " at FILE:LINE", the last line that raised `error` in the file of a function or class.

    If none did, it is the last one of a file that neither this package nor Python or an installed package has; else "".
    """
    file = getattr(inspect.getmodule(target), "__file__", None)
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if frame.filename == file] or [each for each in frames if _is_own(each.filename)]
    return "".join(f" at {Path(frame.filename).name}:{frame.lineno}" for frame in own[-1:])


def _is_own(file: str) -> bool:
    """Whether `file`, of a traceback, is a user's."""
    others = Path(__file__).parents[1], Path(sysconfig.get_path("stdlib"))
    return Path(file).is_file() and not is_installed(file) and not any(map(Path(file).is_relative_to, others))


class _Named(NamedTuple):
    """A plug-in that settings name: its kind, its setting, its name, the setting of its options, and the options."""

    kind: Kind
    path: str
    name: str
    options_path: str
    options: Options


def _named_plugins(settings: Mapping[str, Any]) -> Iterator[_Named]:
    """Yield each plug-in in complete `settings`."""
    for path, kind in _PLACES.items():
        for place, section, key in _sections_with(settings, path.split(".")):
            name = section.get(key)
            if isinstance(name, str) and (is_plugin(name) or kind == "loggers"):
                options = OPTION_KEYS.get(path, "options")
                yield _Named(kind, f"{place}{key}", name, f"{place}{options}", section.get(options, {}))


def _sections_with(settings: Any, names: Sequence[str], prefix: str = "") -> Iterator[tuple[str, dict[str, Any], str]]:
    """Yield each mapping in `settings` that may have the setting at `names`, with its path and the setting's key."""
    first, *rest = names
    if first == "*":
        for index, item in enumerate(settings if isinstance(settings, list | tuple) else ()):
            yield from _sections_with(item, rest, f"{prefix}{index}.")
    elif isinstance(settings, dict) and rest:
        yield from _sections_with(settings.get(first), rest, f"{prefix}{first}.")
    elif isinstance(settings, dict):
        yield prefix, settings, first


def plugin_problems(settings: Mapping[str, Any]) -> Iterator[Problem]:
    """Load the plug-ins in complete `settings`, and yield what is wrong with them and their options."""
    for named in _named_plugins(settings):
        try:
            target = load_plugin(named.name)
            yield from _problems_of_call(named, target)
            yield from _problems_of_options(named, _options_type(named.name, target))
        except UsageError as error:
            yield Problem(named.path, str(error), code=error.code, value=named.name)


def _problems_of_call(named: _Named, target: Any) -> Iterator[Problem]:
    """Yield a problem if the plug-in `target` does not take the arguments of its kind."""
    try:
        signature = inspect.signature(target)
    except (TypeError, ValueError):  # of which `_options_type` says that it cannot be found
        return
    arguments, result = _CALLS[named.kind]
    if "options" in signature.parameters:
        arguments = f"{arguments}, options="
    by_place = [each for each in arguments.split(", ") if not each.endswith("=")]
    by_name = [each[:-1] for each in arguments.split(", ") if each.endswith("=")]
    wrong = ""
    try:
        signature.bind(*by_place, **dict.fromkeys(by_name))
    except TypeError:
        wrong = f"takes {signature}"
    is_function = inspect.isroutine(target) or inspect.isclass(target) or isinstance(target, partial)
    if (first := next(iter(signature.parameters), "")) in _OTHER_FORMS.get(named.kind, ()):
        wrong = f"takes `{first}` first"
    if named.kind == "augmentations" and not is_function:  # a transform itself would take any arguments
        wrong = f"is a {type(target).__name__}"
    if wrong:
        fix = f"name a function that is called as {named.name.rpartition(':')[2]}({arguments}) and returns {result}"
        yield Problem(named.path, f"{wrong}: {fix}", code="plugin-arguments", value=named.name)


def _problems_of_options(named: _Named, kind: type[Any] | None) -> Iterator[Problem]:
    """Yield what is wrong with the options of a plug-in, which are to be of type `kind`; None if it takes none."""
    path, options = named.options_path, named.options
    if kind is None and options:
        wrong = f"{named.name} takes no options: give it a parameter `options`"
        yield Problem(path, wrong, code="plugin-options", value=options)
    if kind is None or not issubclass(kind, BaseModel):
        return
    if kind.model_config.get("extra", "ignore") == "ignore":  # as by default
        known = ", ".join(kind.model_fields)
        for name in options.keys() - kind.model_fields.keys():
            yield Problem(f"{path}.{name}", "unknown key", code="unknown-key", value=options[name], allowed=known)
    try:
        kind.model_validate(options)
    except ValidationError as error:
        for found in problems_of(error, kind):
            inner = "" if found.path == "(file)" else f".{found.path}"
            yield replace(found, path=f"{path}{inner}")


def with_long_names(settings: Mapping[str, Any], more: Sequence[str], model: type[BaseModel]) -> dict[str, Any]:
    """Return `settings` without the list `plugins`, and with each short name replaced by its long name.

    A short name is from one of the files that the list names, from one of `more`, or an entry point. The built-in
    choices of `model`, the configuration, stay. Raises UsageError if a file cannot be imported, or a name is ambiguous.
    """
    files = settings.get("plugins", [])
    if not isinstance(files, list | tuple) or not all(isinstance(file, str | os.PathLike) for file in files):
        raise ConfigError.of("plugins", "plugins", "not a list of files", code="wrong-type", value=files)
    changed = from_folder({**settings, "plugins": [*files, *more]}, Path())
    registered: dict[tuple[Kind, str], str] = {}
    found: dict[tuple[Kind, str], tuple[Any, object]] = {}
    for file in changed.pop("plugins"):
        for mark, attribute, value in _registered(plugin_module(file)):
            # a listed file may be imported once more, under its plain name, by another one
            place = getattr(inspect.getmodule(value), "__file__", None), getattr(value, "__qualname__", attribute)
            other, other_place = found.setdefault(mark, (value, place))
            if other is not value and other_place != place:
                wrong = f"two {mark[0]} are registered as {mark[1]}: {registered[mark]} and {file}:{attribute}"
                raise ConfigError.of("plugins", "plugins", wrong, code="plugin-ambiguous", value=mark[1])
            registered[mark] = f"{file}:{attribute}"
    for path, kind in _PLACES.items():
        for _, section, key in _sections_with(changed, path.split(".")):
            name = section.get(key)
            if isinstance(name, str) and not is_plugin(name) and name not in choices_of(model, path):
                section[key] = registered.get((kind, name)) or _entry_points(kind).get(name, name)
    return changed


def short_names(settings: Mapping[str, Any], more: Sequence[str]) -> dict[str, list[str]]:
    """Return the names that each setting of a plug-in accepts besides its built-in choices, for messages."""
    files = map(os.fspath, (*settings.get("plugins", ()), *more))
    marks = [mark for file in files for mark, _, _ in _registered(plugin_module(file))]
    script = sys.modules["__main__"]
    # what a script registers is found once the settings name its file
    file = getattr(script, "__file__", "FILE.py")
    marks += [(kind, f"{file}:{name}") for (kind, _), name, _ in _registered(script)]
    names = {path: [name for each, name in marks if each == kind] for path, kind in _PLACES.items()}
    for path, kind in _PLACES.items():
        names[path].extend(sorted(_entry_points(kind)))
    names["model.name"].extend(f"{library}:NAME" for library in _shipped("model_libraries"))
    return names


def from_folder(settings: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return `settings` with absolute paths of plug-in files, which are relative to `folder`."""
    changed: dict[str, Any] = copy.deepcopy(dict(settings))
    files = changed.get("plugins")
    if isinstance(files, list | tuple):
        changed["plugins"] = [_absolute(folder, file) for file in files]
    for path in _PLACES:
        for _, section, key in _sections_with(changed, path.split(".")):
            if isinstance(name := section.get(key), str) and is_plugin(name):
                place, _, attribute = name.rpartition(":")
                section[key] = f"{_absolute(folder, place)}:{attribute}"
    return changed


def plugin_files(settings: Mapping[str, Any]) -> dict[str, str]:
    """Return `source_digests` of the plug-ins in complete `settings`. Raises UsageError as that does."""
    return source_digests(_modules_of(settings))


def by_content(files: Mapping[str, str]) -> dict[tuple[str, str], str]:
    """Return the names of plug-ins' `files`, keyed by name within the plug-in's folder, which may move, and digest."""
    return {(name.partition("/")[2], digest): name for name, digest in files.items()}


def check_unedited(settings: Mapping[str, Any]) -> None:
    """Raise UsageError if a plug-in in complete `settings` was edited since its import: loaders would import that."""
    folders = {os.path.dirname(os.path.abspath(place)) for place in _modules_of(settings) if place.endswith(".py")}
    for folder, file in edited_files():
        if folder in folders:
            raise UsageError(f"{file} was edited after load_config: call load_config again", code="plugin-edited")


def _modules_of(settings: Mapping[str, Any]) -> set[str]:
    """Return the files and modules of the plug-ins in complete `settings`."""
    return {named.name.rpartition(":")[0] for named in _named_plugins(settings) if is_plugin(named.name)}


def _absolute(folder: Path, place: object) -> Any:
    """Return a Python file's path as absolute text, anything else as it is."""
    place = os.fspath(place) if isinstance(place, os.PathLike) else place
    return os.path.abspath(folder / place) if isinstance(place, str) and place.endswith(".py") else place


def _registered(module: ModuleType) -> Iterator[tuple[tuple[Kind, str], str, Any]]:
    """Yield the kind and short name of each plug-in that `module` registers, its name there, and itself.

    A subclass is other code, and so is a function to which `functools.wraps` has copied its attributes, unless the
    module has only that one: then the plug-in was decorated after it was registered.
    """
    marked = [
        (name, value, *mark)
        for name, value in vars(module).items()
        for mark in getattr(value, "__dict__", {}).get(_MARK, ())
    ]
    present = {id(owner) for _, value, _, owner in marked if value is owner}
    for name, value, mark, owner in marked:
        if value is owner or (id(owner) not in present and getattr(owner, "__module__", None) == module.__name__):
            yield mark, name, value


@cache
def _shipped(group: str) -> Mapping[str, str]:
    """Return a table of `plugins.toml`: plug-ins that come with the package."""
    file = Path(__file__).parents[1] / "plugins.toml"
    table: Mapping[str, str] = tomllib.loads(file.read_text(encoding="utf-8"))[group]
    return table


def _entry_points(kind: Kind) -> Mapping[str, str]:
    """Return the plug-ins of `kind` that installed packages have, by short name."""
    return _entry_points_in(tuple((path, _changed(path)) for path in map(os.path.abspath, sys.path)))[kind]


def _changed(folder: str) -> int:
    """Return when a file or folder was last put into `folder` or removed from it, in ns; 0 if it is not there."""
    with suppress(OSError):
        return os.stat(folder).st_mtime_ns
    return 0


@lru_cache(maxsize=1)  # reading the metadata of all packages takes as long as checking hundreds of configurations
def _entry_points_in(folders: tuple[tuple[str, int], ...]) -> Mapping[str, Mapping[str, str]]:
    """Return the plug-ins in `folders`, Python's path with the time of each folder's last change, by kind and name."""
    points = metadata.entry_points()
    by_kind = {kind: tuple(points.select(group=f"dist_train.{kind}")) for kind in _CALLS}
    # of two packages with one name, that of the first folder counts
    return {kind: {point.name: point.value for point in reversed(found)} for kind, found in by_kind.items()}
