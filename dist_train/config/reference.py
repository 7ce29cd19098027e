"""Every setting with what it takes, its default and its meaning, read from the schema and its source."""

from __future__ import annotations

import ast
import inspect
import json
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from dist_train.config.loading import write_override
from dist_train.config.problems import in_words, is_collection, leaf_schema, models_of
from dist_train.config.sections import Config


@dataclass(frozen=True)
class Setting:
    """A setting: path, what it takes, default (YAML), meaning, an override that changes it, its choices."""

    path: str
    takes: str
    default: str
    meaning: str
    example: str
    choices: tuple[str, ...] = ()


def meanings_of(model: type[BaseModel]) -> dict[str, str]:
    """Return what the settings of `model` mean: the texts below them in its source, which pydantic does not keep."""
    [source] = ast.parse(inspect.getsource(model)).body
    assert isinstance(source, ast.ClassDef)
    found = {name: field.description for name, field in model.model_fields.items() if field.description}
    for pair in pairwise(source.body):
        match pair:
            case ast.AnnAssign(target=ast.Name(name)), ast.Expr(ast.Constant(str(text))):
                found[name] = " ".join(text.split())
    return found


def json_schema() -> dict[str, Any]:
    """Return the JSON schema of a configuration, with the meanings of the settings."""
    schema = Config.model_json_schema()

    def describe(model: type[BaseModel]) -> None:
        properties = schema["$defs"].get(model.__name__, schema)["properties"]
        for name, meaning in meanings_of(model).items():
            properties[name]["description"] = meaning
        for field in model.model_fields.values():
            for inner in models_of(field):
                describe(inner)

    describe(Config)
    return schema


def settings_of(model: type[BaseModel], prefix: str = "") -> Iterator[Setting]:
    """Yield the settings of `model` in their order, including those of its sections and of the kinds of a union."""
    meanings = meanings_of(model)
    for name, field in model.model_fields.items():
        path, models = f"{prefix}{name}", models_of(field)
        if models and is_collection(field):
            keys = ", ".join(models[0].model_fields)
            example = shlex.quote(write_override(path, _example(field, {}, ())))
            yield Setting(path, f"a list, each a mapping with the keys {keys}", "[]", meanings[name], example)
        elif len(models) > 1:
            yield from _settings_of_kinds(path, field, models, meanings[name])
        elif models:
            yield from settings_of(models[0], f"{path}.")
        else:
            yield _setting(path, field, meanings[name])


def _setting(path: str, field: FieldInfo, meaning: str) -> Setting:
    schema = leaf_schema(field)
    default = None if field.is_required() else field.get_default(call_default_factory=True)
    return Setting(
        path,
        in_words(schema),
        write_override(path, json.loads(json.dumps(default, default=str))).partition("=")[2],
        meaning,
        shlex.quote(write_override(path, _example(field, schema, default))),
        tuple(_choices(schema)),
    )


def _settings_of_kinds(
    path: str, field: FieldInfo, models: tuple[type[BaseModel], ...], meaning: str
) -> Iterator[Setting]:
    """Yield the setting `kind` of a union, and the parameters of each kind."""
    default = field.get_default(call_default_factory=True).kind
    by_kind = {get_args(model.model_fields["kind"].annotation)[0]: model for model in models}
    yield Setting(
        f"{path}.kind",
        ", ".join(by_kind),
        default,
        " ".join([meaning, *(f"{kind}: {inspect.getdoc(model)}" for kind, model in by_kind.items())]),
        write_override(f"{path}.kind", next(kind for kind in by_kind if kind != default)),
        tuple(by_kind),
    )
    for kind, model in by_kind.items():
        for name, text in meanings_of(model).items():
            yield _setting(f"{path}.{name}", model.model_fields[name], f"With kind {kind}: {text}")


def _example(field: FieldInfo, schema: Any, default: object) -> object:
    """Return a value other than the default: the field's own example, or else the next choice."""
    if field.examples:
        return field.examples[0]
    choices = list(_choices(schema)) if "anyOf" in schema else schema.get("enum", (True, False))
    return next(choice for choice in choices if choice != default)


def _choices(schema: Any) -> Iterator[str]:
    for each in schema.get("anyOf", (schema,)):
        yield from ("true", "false") if each.get("type") == "boolean" else each.get("enum", ())
        if "const" in each:
            yield each["const"]
