"""The commands in README and docs: those that are too long to run are at least ones that the programs take.

`tests/ranks/test_documented_commands.py` runs those of the pages on the daily work.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from dist_train.cli.main import parse

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def lines() -> Iterator[tuple[str, str]]:
    """Yield page and line of every code block for a shell, those on inner lines of a loop or a pipe too."""
    for page in PAGES:
        for block in re.findall(r"^```(?:sh)?\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                yield page.name, line.strip()


OURS = re.compile(r"(?:^|[\s(/])dist-train (?P<all>[^|;&)>`]+)|launch/\w+\.sh .*?(?P<train>train [^|;&)>]+)")
WORD = re.compile(r""" "[^"]*" | '[^']*' | \S+ """, flags=re.VERBOSE)


def our_commands(line: str) -> Iterator[list[str]]:
    """Yield the words after `dist-train`, or those that a script of `launch` hands on to it, in a line."""
    if line.startswith(("docker ", "podman ")):
        return  # where it is the name of an image
    for found in OURS.finditer(re.sub(r"(^|\s)#.*$", "", line)):
        yield [word.strip("\"'") for word in WORD.findall(found["all"] or found["train"])]


COMMANDS = [(page, words) for page, line in lines() for words in our_commands(line)]
FILES = sorted(
    {
        (page, found)
        for page, line in lines()
        for found in re.findall(r"(?<![\w./-])(?:configs|studies|slurm|launch|docker|benchmarks)/[\w./-]+\.\w+", line)
    }
)


def test_the_pages_are_read() -> None:
    assert len(COMMANDS) > 40
    assert len(FILES) > 20


@pytest.mark.parametrize(("page", "words"), COMMANDS, ids=lambda value: value if isinstance(value, str) else value[0])
def test_a_documented_command_is_one_that_the_program_takes(page: str, words: list[str]) -> None:
    assert parse([word for word in words if word != "..."]).run


@pytest.mark.parametrize(("page", "file"), FILES)
def test_a_documented_file_is_there(page: str, file: str) -> None:
    assert (ROOT / file).exists()
