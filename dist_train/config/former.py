"""What settings were called before: what earlier versions saved, and users wrote, is read under its present name."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

_NAMES = {("metrics", "workers"): "ranks"}
_VALUES = {("noise", "sharing"): {"worker": "rank"}}

STREAM_OF_A_RANK = "worker"
"""Names the noise of one rank. By another name it would be another, and no run of before would resume bit-identical."""

_logger = logging.getLogger("dist_train.config")


def with_present_names(settings: Mapping[str, Any], source: str) -> Mapping[str, Any]:
    """Return nested `settings` with the present names and values of what was renamed; each is logged for `source`."""
    changed = dict(settings)
    for (section, name), now in _NAMES.items():
        inner = changed.get(section)
        if isinstance(inner, Mapping) and name in inner and now not in inner:
            changed[section] = {now if each == name else each: value for each, value in inner.items()}
            _logger.warning("%s: %s.%s is called %s.%s now", source, section, name, section, now)
    for (section, name), values in _VALUES.items():
        inner = changed.get(section)
        before = inner.get(name) if isinstance(inner, Mapping) else None
        if isinstance(inner, Mapping) and isinstance(before, str) and before in values:
            changed[section] = {**inner, name: values[before]}
            _logger.warning("%s: %s.%s=%s is called %s now", source, section, name, before, values[before])
    return changed
