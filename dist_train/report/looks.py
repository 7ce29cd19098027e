"""The colours, dashes and marks of series: the same on the page and in files, also for colour-blind readers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

LIGHT = ("#1d2126", "#0a12e6", "#de6822", "#0d997b", "#d962d9", "#5c3405")
DARK = ("#f0f1f2", "#4e55ff", "#cc2e29", "#64ef8c", "#ae4985", "#eac327")
"""By number, on a light and on a dark ground: the base line's, then those of the other variants.

Found by a search for the largest least distance between any two, for normal and for each kind of colour-blind vision.
"""

_DASHES = ("", "7 3", "2 3", "9 3 2 3")


@dataclass(frozen=True)
class Look:
    """`colour` is a number in LIGHT and DARK; `dashes` are lengths of strokes and gaps, none for a whole line."""

    colour: int
    dashes: tuple[float, ...] = ()
    is_hollow: bool = False
    """Whether marks are outlines."""


_AVERAGED = (7.0, 3.0)
ROLES: Mapping[str, Look] = MappingProxyType(
    {
        "train": Look(1),
        "validation": Look(4),
        "test": Look(2),
        "train-averaged": Look(1, _AVERAGED),
        "validation-averaged": Look(4, _AVERAGED),
        "test-averaged": Look(2, _AVERAGED),
        "batch": Look(3),
        "loss": Look(1),
        "accuracy": Look(2),
    }
)
"""Series that are not variants'. One of a landscape has two, such as loss and train: of those the last one counts."""


def look_of(style: str) -> Look:
    """Return how a series of `style` is drawn: s0 is the base line, beyond the colours s6 has that of s1, dashed."""
    role = style.split()[0]
    if role in ROLES:
        return ROLES[role]
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
