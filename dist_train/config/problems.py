"""What is wrong with a configuration, so that it can be fixed: the path, the value, what is allowed by its types."""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from types import MappingProxyType
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from dist_train.outcome import UsageError, did_you_mean, printable

_MISSING = object()


@dataclass(frozen=True)
class Problem:
    """One problem: the dotted path of the setting, what is wrong, its code, the value if any, what is allowed."""

    path: str
    wrong: str
    _: KW_ONLY
    code: str
    value: object = _MISSING
    allowed: str = ""

    def __str__(self) -> str:
        lines = [f"  {self.path}: {self.wrong} [{self.code}]"]
        if self.value is not _MISSING:
            # in quotes, text that looks like a number is seen to be text
            is_quoted = self.code == "wrong-type" and isinstance(self.value, str)
            lines.append(f"      value:   {_shorten(repr(self.value) if is_quoted else self.value)}")
        if self.allowed:
            lines.append(f"      allowed: {self.allowed}")
        return "\n".join(lines)


class ConfigError(UsageError):
    """A configuration that cannot be used; its text lists every problem. Exit code 2."""

    def __init__(self, source: str, problems: Sequence[Problem]) -> None:
        """Report `problems`, found in `source` (a file's name)."""
        self.problems = tuple(problems)
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        super().__init__(printable("\n".join([f"{source}: {count}", *map(str, problems)])))

    @classmethod
    def of(cls, source: str, path: str, wrong: str, *, code: str, value: object = _MISSING) -> ConfigError:
        """Return an error with a single problem; the value may be omitted."""
        return cls(source, [Problem(path, wrong, code=code, value=value)])


@dataclass(frozen=True)
class _Location:
    """Where a fault is: path, section and setting, if any; `is_item`: in an item of a list or mapping."""

    names: tuple[int | str, ...]
    section: type[BaseModel] | None
    field: FieldInfo | None
    is_item: bool = False

    @property
    def path(self) -> str:
        return ".".join(map(str, self.names)) or "(file)"


def problems_of(
    error: ValidationError, model: type[BaseModel], names: Mapping[str, Sequence[str]] = MappingProxyType({})
) -> list[Problem]:
    """Return one problem for each fault that pydantic found in the input of `model`.

    `names`: what a setting accepts besides its choices; `*` stands for an index in its path.
    """
    problems: dict[str, Problem] = {}
    for fault in error.errors(include_url=False):
        location = _locate(fault["loc"], model)
        # pydantic does not count items with faults of their own: the list may be long enough.
        is_long_enough = fault["type"] == "too_short" and fault["ctx"]["actual_length"] < len(fault["input"])
        if location.path not in problems and not is_long_enough:
            problems[location.path] = _problem(fault, location, model, names)
    return list(problems.values())


def _problem(
    fault: ErrorDetails, location: _Location, model: type[BaseModel], names: Mapping[str, Sequence[str]]
) -> Problem:
    path = location.path
    match fault["type"]:
        case "extra_forbidden":
            return _unknown_key(location, model, fault["input"])
        case "union_tag_invalid":
            choices, tag = str(fault["ctx"]["expected_tags"]).replace("'", ""), fault["ctx"]["tag"]
            wrong = f"not a kind{did_you_mean(str(tag).lower(), choices.split(', '))}"
            return Problem(f"{path}.kind", wrong, code="unknown-kind", value=tag, allowed=choices)
        case "literal_error":
            more = names.get(".".join("*" if isinstance(name, int) else name for name in location.names), ())
            built_in = re.findall("'([^']*)'", fault["ctx"]["expected"])
            given = str(fault["input"])
            usual = _USUAL_VALUES.get(given.lower(), given.lower())
            meant = did_you_mean(usual, [*built_in, *more])
            if given.endswith(".py"):
                meant = f"; write {given}:NAME, with the name of its function or class"
            wrong = f"not one of the choices{meant}"
            allowed = "; also ".join(filter(None, (_allowed(location), ", ".join(more))))
            return Problem(path, wrong, code="no-such-choice", value=fault["input"], allowed=allowed)
        case "json_invalid":
            return Problem(path, f"cannot be read: {fault['ctx']['error']}", code="unreadable")
        case kind:
            code, wrong = _FAULTS.get(kind, ("wrong-type", ""))
            message = fault["msg"].removeprefix("Input ")
            wrong = wrong or message[:1].lower() + message[1:]
            is_key = fault["loc"][-1:] == (_KEY,)
            allowed = f"a name of the form {fault['ctx']['pattern']}" if is_key else _allowed(location)
            return Problem(path, wrong, code=code, value=fault["input"], allowed=allowed)


_KEY = "[key]"
"""What pydantic's location of a fault in a key, instead of its value, ends with."""
_NOT_TEXT = 'not text, unless quoted: "7", in a shell \'"7"\''
_FAULTS: Mapping[str, tuple[str, str]] = {
    "missing": ("missing", "missing"),
    "union_tag_not_found": ("missing", "a kind is missing"),
    "string_pattern_mismatch": ("wrong-form", "not of this form"),
    "model_type": ("wrong-type", "not a mapping"),
    "dict_type": ("wrong-type", "not a mapping"),
    "tuple_type": ("wrong-type", "not a list"),
    "list_type": ("wrong-type", "not a list"),
    "int_type": ("wrong-type", "not a whole number"),
    "float_type": ("wrong-type", "not a number"),
    "bool_type": ("wrong-type", "not true or false"),
    "string_type": ("wrong-type", _NOT_TEXT),
    "path_type": ("wrong-type", _NOT_TEXT),
    **dict.fromkeys(("greater_than", "greater_than_equal", "less_than", "less_than_equal"), ("out-of-range", "")),
    "finite_number": ("out-of-range", ""),
    "too_short": ("out-of-range", ""),
    "too_long": ("out-of-range", "too many items"),
}
"""Code and message for pydantic's types of errors; all others are wrong types, with pydantic's message."""


_USUAL_NAMES: Mapping[str, str] = {
    "amp": "precision.compute",
    "arch": "model.name",
    "bs": "batch.global_size",
    "batch_size": "batch.global_size",
    "lr": "optimizer.learning_rate",
    "max_epochs": "run.epochs",
    "max_grad_norm": "optimizer.clip_norm",
    "num_classes": "data.classes",
    "num_workers": "data.loader_workers",
    "output_dir": "run.directory",
    "pretrained": "run.init_from",
    "warmup": "schedule.warmup_epochs",
    "wd": "optimizer.weight_decay",
}
"""What other programs call a setting."""

_USUAL_VALUES: Mapping[str, str] = {"gpu": "cuda"}
"""What other programs call a choice."""

_SELECTORS = ("kind", "method", "name", "decay")
"""What sections call the setting that selects the method; one that has two of them, a kind and a decay, by the kind."""


def _locate(parts: tuple[int | str, ...], model: type[BaseModel]) -> _Location:
    """Follow pydantic's location, which also contains the tags of unions and the names of their members."""
    location = _Location((), None, None)
    choices: tuple[type[BaseModel], ...] = (model,)
    for part in (part for part in parts if part != _KEY):
        if choices and is_collection(location.field) and not location.is_item:
            location = replace(location, names=(*location.names, part), is_item=True)
        elif len(choices) > 1:
            choices = tuple(choice for choice in choices if part in get_args(choice.model_fields["kind"].annotation))
        elif choices:
            field = choices[0].model_fields.get(str(part))
            location = _Location((*location.names, part), choices[0], field)
            choices = models_of(field)
        elif isinstance(part, int):
            location = replace(location, names=(*location.names, part))
        elif location.field is not None and get_origin(location.field.annotation) is dict and not location.is_item:
            location = replace(location, names=(*location.names, part), is_item=True)
    return location


def settings_called(key: str, model: type[BaseModel]) -> list[str]:
    """Return the paths of the settings of `model` that are called `key`, here or in other programs, or nearly so."""
    paths = _all_paths(model)
    if _USUAL_NAMES.get(key) in paths:
        return [_USUAL_NAMES[key]]
    close = difflib.get_close_matches(key, [path.rpartition(".")[2] for path in paths], n=1, cutoff=0.8)
    return [path for path in paths if path.rpartition(".")[2] in close]


def _unknown_key(location: _Location, model: type[BaseModel], value: object) -> Problem:
    assert location.section is not None
    key, known = str(location.names[-1]), list(location.section.model_fields)
    prefix = "".join(f"{name}." for name in location.names[:-1])
    namesakes = settings_called(key, model) if key in _USUAL_NAMES else []
    if key in ("kind", "method", "name", "type"):
        # A run has a name, too, but it selects nothing.
        own = (
            name for name in _SELECTORS if name in known and location.section.model_fields[name].annotation is not str
        )
        namesakes = [f"{prefix}{name}" for name in own][:1]
    allowed = ", ".join(known)
    if not namesakes and (close := difflib.get_close_matches(key, known, n=1)):
        namesakes, allowed = [f"{prefix}{close[0]}"], ""
    elif not namesakes:
        namesakes = settings_called(key, model)
    hint = f"; did you mean {' or '.join(namesakes)}?" if namesakes else ""
    if not namesakes and "settings" in known and isinstance(value, Mapping):  # a section in a study's variant
        hint = f"; write settings: {{{key}.{next(iter(value), 'KEY')}: ...}}"
    first, *inner = key.split(".")
    if inner and first in known:
        nested = functools.reduce(lambda text, name: f"{{{name}: {text}}}", reversed(inner), "...")
        hint, allowed = f"; write {first}: {nested}", ""
    return Problem(location.path, f"unknown key{hint}", code="unknown-key", value=value, allowed=allowed)


def _all_paths(model: type[BaseModel], prefix: str = "") -> list[str]:
    paths: list[str] = []
    for name, field in model.model_fields.items():
        paths.append(f"{prefix}{name}")
        inner = models_of(field)
        if len(inner) == 1 and not is_collection(field):
            paths.extend(_all_paths(inner[0], f"{prefix}{name}."))
    return paths


def models_of(field: FieldInfo | None) -> tuple[type[BaseModel], ...]:
    """Return the models that a field, or each of its items, may be: one for a section, one per kind for a union."""
    return () if field is None else _models_in(field.annotation)


def _models_in(annotation: Any) -> tuple[type[BaseModel], ...]:
    if isinstance(annotation, type) and not get_args(annotation):
        return (annotation,) if issubclass(annotation, BaseModel) else ()
    return tuple(model for part in get_args(annotation) for model in _models_in(part))


def choices_of(model: type[BaseModel], path: str) -> tuple[str, ...]:
    """Return the built-in choices of the setting at `path` of `model`; `*` stands for an index."""
    *sections, name = path.replace(".*", "").split(".")
    for section in sections:
        model = models_of(model.model_fields[section])[0]
    field = model.model_fields.get(name)
    return choices_in(field.annotation) if field else ()


def choices_in(annotation: Any) -> tuple[str, ...]:
    """Return the choices of a setting with `annotation`: the values of its Literals, true and false for a bool."""
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    if annotation is bool:
        return "true", "false"
    return tuple(choice for part in get_args(annotation) for choice in choices_in(part))


def is_collection(field: FieldInfo | None) -> bool:
    """Whether a field is a list or a mapping."""
    return field is not None and get_origin(field.annotation) in (dict, list, tuple)


def allowed_at(path: str, model: type[BaseModel]) -> str:
    """Describe what the setting at the dotted `path` of `model` takes; empty if there is none."""
    return _allowed(_locate(tuple(path.split(".")), model))


def _allowed(location: _Location) -> str:
    """Describe what a setting takes, from its field: the choices, or the kind of number and its range."""
    if location.field is None:
        return ""
    models = models_of(location.field)
    if models:
        names = dict.fromkeys(name for model in models for name in model.model_fields)
        section = "a mapping with the keys " + ", ".join(names)
        if location.is_item or not is_collection(location.field):
            return section
        return f"{'names, each with' if get_origin(location.field.annotation) is dict else 'a list, each'} {section}"
    schema = schema_of(location.field)
    if isinstance(index := location.names[-1], int):
        items = schema.get("prefixItems")
        schema = items[index] if items and index < len(items) else schema.get("items", schema)
    elif location.is_item:
        schema = next(iter(schema.get("patternProperties", {}).values()), schema.get("additionalProperties", schema))
    return " or ".join(filter(None, map(_in_words, schema.get("anyOf", [schema]))))


def schema_of(field: FieldInfo) -> Mapping[str, Any]:
    """Return the JSON schema of a field that is not a section."""
    annotated: Any = Annotated[field.annotation, field]
    return TypeAdapter(annotated).json_schema()


def _in_words(schema: Mapping[str, Any]) -> str:
    if "enum" in schema:
        return ", ".join(map(str, schema["enum"]))
    if "const" in schema:
        return str(schema["const"])
    kind = str(schema.get("format") or schema.get("type", ""))
    if kind == "plugin":
        return "a plug-in (module:name, FILE.py:name, a name from `plugins`)"
    if kind == "array":
        if "prefixItems" in schema:
            fixed = schema["prefixItems"]
            return f"a list of {len(fixed)}, each {_in_words(fixed[0])}"
        items = _in_words(schema["items"])
        return f"a list, each {items}" if items else "a list"
    words = {
        "integer": "a whole number",
        "number": "a number",
        "boolean": "true or false",
        "string": "text",
        "null": "null",
        "object": "a mapping",
        "path": "a path",
    }.get(kind, kind)
    bounds = {"exclusiveMinimum": "above", "minimum": "at least", "exclusiveMaximum": "below", "maximum": "at most"}
    limits = [f"{word} {schema[name]:g}" for name, word in bounds.items() if name in schema]
    if "pattern" in schema:
        limits.append(f"of the form {schema['pattern']}")
    return " ".join([words, " and ".join(limits)]).strip()


def _shorten(value: object) -> str:
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else " ".join(str(value).split())
    return text if len(text) <= 60 else text[:57] + "..."
