"""The page of all settings, docs/settings.md: `python -m benchmarks.settings_page > docs/settings.md` writes it."""

from __future__ import annotations

import inspect
import re
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from dist_train.config import Config
from dist_train.config.loading import write_override
from dist_train.config.problems import allowed_at, choices_in, is_collection, models_of, schema_of

_HEAD = """\
# Settings

Every setting of a configuration: what it takes, its default, its meaning, and an example for the command line. How
files, bases and overrides fit together: [configuration.md](configuration.md). The formulas of the noise and of the
learning rate, whose letters some meanings use: [method.md](method.md).

```sh
dist-train train configs/demo.yaml run.name=louder noise.amplitude=0.03 optimizer.learning_rate=0.2
```

In YAML a section is a mapping: `noise: {amplitude: 0.03}`. `null` is no value. This page is generated from
`dist_train/config`: `make dashboards`.
"""


@dataclass(frozen=True)
class Setting:
    """A setting: path, what it takes, default (YAML), meaning, an override that changes it."""

    path: str
    takes: str
    default: str
    meaning: str
    example: str


def settings_markdown() -> str:
    """Return the page."""
    parts = [_HEAD]
    for name, field in Config.model_fields.items():
        [section] = models_of(field)
        parts.append(f"## `{name}`\n\n{inspect.getdoc(section)}\n")
        parts.append("| setting | takes | default | meaning | example |\n|---|---|---|---|---|")
        parts.extend(_row(setting) for setting in settings_of(section, f"{name}."))
        parts.append("")
    return "\n".join(parts)


def _row(setting: Setting) -> str:
    cells = (
        f"`{setting.path}`",
        re.sub(r"(?<=of the form )\S+", r"`\g<0>`", setting.takes),
        f"`{setting.default}`",
        setting.meaning,
        f"`{setting.example}`",
    )
    row = " | ".join(cell.replace("|", "\\|") for cell in cells)
    return f"| {row} |"


def settings_of(model: type[BaseModel], prefix: str = "") -> Iterator[Setting]:
    """Yield the settings of `model` in their order, including those of its sections and of the kinds of a union."""
    for name, field in model.model_fields.items():
        path, models = f"{prefix}{name}", models_of(field)
        if len(models) > 1:
            yield from _settings_of_kinds(path, field, models)
        elif models and not is_collection(field):
            yield from settings_of(models[0], f"{path}.")
        elif "const" not in (schema := schema_of(field)):  # as the kind of a member of a union
            default = write_override(path, schema.get("default")).partition("=")[2]
            if "examples" in schema:
                example = write_override(path, schema["examples"][0])
            else:
                example = _other(path, choices_in(field.annotation), default)
            yield Setting(path, allowed_at(name, model), default, _meaning(field), shlex.quote(example))


def _settings_of_kinds(path: str, field: FieldInfo, models: tuple[type[BaseModel], ...]) -> Iterator[Setting]:
    """Yield the setting `kind` of a union, and the parameters of each kind."""
    default = field.get_default(call_default_factory=True).kind
    by_kind = {get_args(model.model_fields["kind"].annotation)[0]: model for model in models}
    meaning = " ".join([_meaning(field), *(f"{kind}: {inspect.getdoc(model)}" for kind, model in by_kind.items())])
    yield Setting(f"{path}.kind", ", ".join(by_kind), default, meaning, _other(f"{path}.kind", by_kind, default))
    for kind, model in by_kind.items():
        for setting in settings_of(model, f"{path}."):
            yield replace(setting, meaning=f"With kind {kind}: {setting.meaning}")


def _meaning(field: FieldInfo) -> str:
    """Return the text below a setting in its section's source, on one line."""
    assert field.description is not None
    return " ".join(field.description.split())


def _other(path: str, choices: Iterable[str], default: str) -> str:
    """Return an override with the first of `choices` that is not the default."""
    return f"{path}={next(choice for choice in choices if choice != default)}"


if __name__ == "__main__":
    print(settings_markdown(), end="")
