"""The page of all settings, docs/settings.md: `python -m benchmarks.settings_page > docs/settings.md` writes it."""

from __future__ import annotations

import inspect
import re

from dist_train.config import Config
from dist_train.config.problems import models_of
from dist_train.config.reference import Setting, settings_of

_HEAD = """\
# Settings

Every setting of a configuration: what it takes, its default, its meaning, and an example for the command line. How
files, bases and overrides fit together: [configuration.md](configuration.md).

```sh
dist-train train configs/demo.yaml run.name=louder noise.amplitude=0.03 optimizer.learning_rate=0.2
```

In YAML a section is a mapping: `noise: {amplitude: 0.03}`. `null` is no value. This page is generated from
`dist_train/config`: `make dashboards`.
"""


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


if __name__ == "__main__":
    print(settings_markdown(), end="")
