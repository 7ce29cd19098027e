"""Generated parts of pages that people write: what lies between two markers."""

from __future__ import annotations

from dist_train.outcome import UsageError


def replaced_between(text: str, begin: str, end: str, content: str) -> str:
    """Return `text` with `content` between the lines `begin` and `end`. Raises UsageError where it has no markers."""
    before, found_begin, rest = text.partition(begin)
    _, found_end, after = rest.partition(end)
    if not found_begin or not found_end:
        raise UsageError(f"there is no place for the table: the file needs the lines {begin} and {end}")
    return f"{before}{begin}\n\n{content}\n{end}{after}"
