"""JSON text that every reader takes: JSON has no NaN and no infinity, so that such a number is written as null."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping


def finite(number: float) -> float | None:
    """Return `number`, or None where it is NaN or infinite."""
    return number if math.isfinite(number) else None


def json_text(value: object, indent: int | None = None) -> str:
    """Return `value`, of plain mappings, sequences and scalars, as JSON; numbers that are not finite become null."""
    return json.dumps(_plain(value), indent=indent, allow_nan=False)


def _plain(value: object) -> object:
    match value:
        case float():
            return finite(value)
        case Mapping():
            return {key: _plain(inner) for key, inner in value.items()}
        case list() | tuple():
            return [_plain(inner) for inner in value]
    return value
