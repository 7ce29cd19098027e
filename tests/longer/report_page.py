"""Reads a report's page: numbers, texts and addresses; and the records of its runs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

from dist_train.report.page import render, tables_in_markdown
from dist_train.report.stored_run import read_subject


class Page(HTMLParser):
    """The numbers, texts and addresses of a page."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.numbers: list[tuple[dict[str, str], str]] = []
        self.series: list[tuple[str, list[tuple[float, float, str, float]]]] = []
        self.addresses: list[str] = []
        self.policy = ""
        self._words: list[str] = []
        self._value: dict[str, str] | None = None
        self.feed(content)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self._words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = {name: value or "" for name, value in attrs}
        self._value = attributes if tag == "data" else None
        self.addresses += [attributes[name] for name in ("href", "src", "srcset", "action") if name in attributes]
        if attributes.get("http-equiv") == "Content-Security-Policy":
            self.policy = attributes["content"]
        if "data-points" in attributes:
            self.series.append((attributes["data-label"], json.loads(attributes["data-points"])))

    def handle_data(self, data: str) -> None:
        self._words.append(data)
        if self._value is not None:
            self.numbers.append((self._value, data))
            self._value = None

    def of(self, measure: str, **attributes: str) -> tuple[float, str]:
        """Return value and text of the only number with this measure and attributes."""
        wanted = {"data-measure": measure, **{f"data-{name}": value for name, value in attributes.items()}}
        found = [(float(has["value"]), text) for has, text in self.numbers if wanted.items() <= has.items()]
        assert len(found) == 1, (wanted, found)
        return found[0]


def cells(directory: Path) -> dict[tuple[str, str, str], str]:
    """Return the cells of the Markdown tables by title, row and column."""
    found = {}
    for section in tables_in_markdown(read_subject(directory)).split("## ")[1:]:
        title, *lines = section.splitlines()
        head, _, *rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("|")] or [[], []]
        for name, *values in rows:
            found.update({(title, name, column): value for column, value in zip(head[1:], values, strict=True)})
    return found


def rendered(directory: Path) -> Page:
    return Page(render(read_subject(directory)))


def evaluations(run: Path, split: str) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "eval" and line["split"] == split]


def runs_of(study: Path) -> Iterator[Path]:
    return (path.parent for path in sorted(study.glob("*/metrics.jsonl")))
