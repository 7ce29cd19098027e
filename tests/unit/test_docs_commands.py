"""The commands in README and docs: those that are too long to run are at least ones that the programs take.

`tests/ranks/test_documented_commands.py` runs those of the pages on the daily work.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from dist_train.cli.main import parse
from dist_train.config import load_config
from dist_train.rundir.paths import RunDirectory, StudyDirectory
from dist_train.sweep.planned_runs import plan_study

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def lines() -> Iterator[tuple[str, str]]:
    """Yield page and line of every code block for a shell, those on inner lines of a loop or a pipe too."""
    for page in PAGES:
        for language, block in re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL):
            if language in ("", "sh"):
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


RUNS = [words for _, words in COMMANDS if words[0] in ("train", "submit")]


@pytest.mark.parametrize("words", RUNS, ids=" ".join)
def test_a_documented_run_has_settings_that_go_together(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    parsed = parse([word for word in words if word != "..."])
    if str(parsed.config).startswith(("configs/", "dist_train:")):
        load_config(parsed.config, parsed.overrides)


@pytest.mark.parametrize(("page", "file"), FILES)
def test_a_documented_file_is_there(page: str, file: str) -> None:
    assert (ROOT / file).exists()


def test_documented_extras_are_those_of_the_package() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = {
        name
        for page in (*PAGES, ROOT / "docs" / "first_run.ipynb")
        for name in re.findall(r"dist_train\[(\w+)\]", page.read_text())
    }
    assert named - {"NAME"} <= set(extras)


ARRAYS = [
    (place, found["study"], int(found["last"]))
    for place, text in (
        *lines(),
        *(("slurm/sweep.sh", line) for line in (ROOT / "slurm" / "sweep.sh").read_text().splitlines()),
    )
    for found in re.finditer(r"STUDY=(?P<study>\S+) sbatch --array=1-(?P<last>\d+)", text)
]


@pytest.mark.parametrize(("place", "study", "last"), ARRAYS)
def test_a_documented_array_has_a_task_for_each_run_of_its_study(place: str, study: str, last: int) -> None:
    assert len(plan_study(ROOT / study).runs) == last


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_each_row_of_a_table_has_the_cells_of_its_heading(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for table in re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE):
        heading, rule, *rows = [re.split(r"(?<!\\)\|", row)[1:-1] for row in table.splitlines()]
        assert all(re.fullmatch(r" *:?-+:? *", cell) for cell in rule), table
        assert {len(row) for row in (rule, *rows)} == {len(heading)}, table


def test_each_file_of_a_run_and_of_a_study_is_named() -> None:
    text = "".join((ROOT / "docs" / page).read_text() for page in ("watching.md", "studies.md", "training_options.md"))
    names = {path.name for files in (RunDirectory(ROOT), StudyDirectory(ROOT)) for path in vars(files).values()}
    assert not [name for name in names - {ROOT.name} if not re.search(rf"[`/]{re.escape(name)}[`/]", text)]


def test_each_variable_that_mpirun_passes_on_is_named() -> None:
    function = re.search(r"^passed_variables\(\).*?^}", (ROOT / "launch" / "common.sh").read_text(), re.M | re.S)
    assert function
    patterns = " | ".join(re.findall(r"^ +([A-Z][\w*| ]+)\) ", function[0], re.M)).split(" | ")
    text = (ROOT / "docs" / "cluster.md").read_text()
    assert len(patterns) > 10
    assert not [pattern for pattern in patterns if f"`{pattern}`" not in text]


def test_each_variable_that_a_run_sets_is_named() -> None:
    sources = "".join(path.read_text() for path in (ROOT / "dist_train").rglob("*.py"))
    names = set(re.findall(r"os\.environ(?:\.setdefault\(|\[)\"(\w+)\"(?:, |\] = )", sources))
    text = "".join((ROOT / "docs" / page).read_text() for page in ("configuration.md", "recovery.md"))
    assert len(names) > 9
    assert not [name for name in names if not re.search(rf"`{name}[`=]", text)]
