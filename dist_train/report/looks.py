"""The colours, dashes and marks of series: the same on the page and in files, also for colour-blind readers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

LIGHT = ("#1d2126", "#0a12e6", "#de6822", "#0d997b", "#d962d9", "#5c3405")
DARK = ("#f0f1f2", "#4e55ff", "#cc2e29", "#64ef8c", "#ae4985", "#eac327")
"""By number, on a light and on a dark ground: the base line's, then those of the other variants.

Found by a search for the largest least distance between any two, for normal and for each kind of colour-blind vision.
"""

_DASHES = ("", "7 3", "2 3", "9 3 2 3")
_ROLES = {"loss": 1, "accuracy": 2, "train": 1, "test": 2, "batch": 3}


@dataclass(frozen=True)
class Look:
    """`colour` is a number in LIGHT and DARK; `dashes` are lengths of strokes and gaps, none for a whole line."""

    colour: int
    dashes: tuple[float, ...] = ()
    is_hollow: bool = False
    """Whether marks are outlines."""


def look_of(style: str) -> Look:
    """Return how a series of `style` is drawn: s0 is the base line, beyond the colours s6 has that of s1, dashed."""
    role = style.split()[0]
    if role in _ROLES:
        return Look(_ROLES[role])
    turn, place = divmod(int(role[1:]) - 1, len(LIGHT) - 1) if role != "s0" else (0, -1)
    dashes = _DASHES[turn % len(_DASHES)]
    return Look(place + 1, tuple(map(float, dashes.split())), turn % 2 == 1)


def style_rules(styles: Iterable[str]) -> Iterator[str]:
    """Yield the rules of CSS that give the colours their names, and `styles` their looks."""
    light, dark = (";".join(f"--c{at}:{colour}" for at, colour in enumerate(colours)) for colours in (LIGHT, DARK))
    yield f":root{{{light}}}"
    yield f"@media screen and (prefers-color-scheme:dark){{:root{{{dark}}}}}"
    for style in styles:
        look = look_of(style)
        dashes = f";--dash:{' '.join(f'{each:g}' for each in look.dashes)};--stroke:dashed" if look.dashes else ""
        yield f".{style}{{--c:var(--c{look.colour}){dashes}{';--fill:var(--paper)' if look.is_hollow else ''}}}"
