"""Every setting with what it takes, its default and its meaning, read from the schema."""

from __future__ import annotations

import inspect
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from dist_train.config.loading import write_override
from dist_train.config.problems import allowed_at, is_collection, models_of, schema_of


@dataclass(frozen=True)
class Setting:
    """A setting: path, what it takes, default (YAML), meaning, an override that changes it, its choices."""

    path: str
    takes: str
    default: str
    meaning: str
    example: str
    choices: tuple[str, ...] = ()


def settings_of(model: type[BaseModel], prefix: str = "") -> Iterator[Setting]:
    """Yield the settings of `model` in their order, including those of its sections and of the kinds of a union."""
    for name, field in model.model_fields.items():
        path, models = f"{prefix}{name}", models_of(field)
        if len(models) > 1:
            yield from _settings_of_kinds(path, field, models)
        elif models and not is_collection(field):
            yield from settings_of(models[0], f"{path}.")
        elif "const" not in (schema := schema_of(field)):  # as the kind of a member of a union
            yield Setting(
                path,
                allowed_at(name, model),
                write_override(path, schema.get("default")).partition("=")[2],
                _meaning(field),
                shlex.quote(write_override(path, _example(schema))),
                tuple(_choices(schema)),
            )


def _meaning(field: FieldInfo) -> str:
    """Return the text below a setting in its section's source, on one line."""
    assert field.description is not None
    return " ".join(field.description.split())


def _settings_of_kinds(path: str, field: FieldInfo, models: tuple[type[BaseModel], ...]) -> Iterator[Setting]:
    """Yield the setting `kind` of a union, and the parameters of each kind."""
    default = field.get_default(call_default_factory=True).kind
    by_kind = {get_args(model.model_fields["kind"].annotation)[0]: model for model in models}
    yield Setting(
        f"{path}.kind",
        ", ".join(by_kind),
        default,
        " ".join([_meaning(field), *(f"{kind}: {inspect.getdoc(model)}" for kind, model in by_kind.items())]),
        write_override(f"{path}.kind", next(kind for kind in by_kind if kind != default)),
        tuple(by_kind),
    )
    for kind, model in by_kind.items():
        for setting in settings_of(model, f"{path}."):
            yield replace(setting, meaning=f"With kind {kind}: {setting.meaning}")


def _example(schema: Mapping[str, Any]) -> object:
    """Return a value other than the default: the setting's own example, or else the next choice."""
    if "examples" in schema:
        return schema["examples"][0]
    choices = list(_choices(schema)) if "anyOf" in schema else schema.get("enum", (True, False))
    return next(choice for choice in choices if choice != schema.get("default"))


def _choices(schema: Mapping[str, Any]) -> Iterator[str]:
    for each in schema.get("anyOf", (schema,)):
        yield from ("true", "false") if each.get("type") == "boolean" else each.get("enum", ())
        if "const" in each:
            yield each["const"]
