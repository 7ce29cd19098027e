"""The files for maintainers are of their formats, and the version stands in one place."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dist_train import __version__

ROOT = Path(__file__).parents[2]
TEXT = {".py", ".toml", ".cfg", ".cff", ".yml", ".yaml", ".sh", ""}


@pytest.mark.parametrize(
    ("schema", "pattern"),
    [
        ("vendor.github-workflows", ".github/workflows/*.yml"),
        ("vendor.github-issue-forms", ".github/ISSUE_TEMPLATE/*.yml"),
        ("vendor.citation-file-format", "CITATION.cff"),
    ],
)
def test_a_file_for_the_hosting_site_is_of_its_format(schema: str, pattern: str) -> None:
    files = [str(path) for path in ROOT.glob(pattern)]
    assert files
    program = Path(sys.executable).with_name("check-jsonschema")
    subprocess.run([program, "--builtin-schema", schema, *files], check=True, capture_output=True)


def test_make_help_has_every_target_with_its_whole_text() -> None:
    shown = subprocess.run(
        ["make", "--no-print-directory", "help"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.splitlines()
    written = re.findall(r"^([a-z-]+):[^#\n]*## (.*)", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert [line.split(maxsplit=2)[1:] for line in shown] == [[target, text] for target, text in written]


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("demo", ["docker/environment.sh", "launch/demo.sh"]),
        *(
            (target, ["docker/environment.sh", "docker/debian_packages.sh", "pytest"])
            for target in ("test", "test-cluster", "test-containers", "test-lengthy")
        ),
    ],
)
def test_a_target_comes_after_what_it_needs(target: str, words: list[str]) -> None:
    planned = subprocess.run(["make", "--dry-run", target], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert all(word in planned for word in words), planned
    assert sorted(words, key=planned.index) == words


def test_ci_runs_lint_and_tests_on_the_oldest_and_the_newest_python() -> None:
    [job] = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"].values()
    assert [step["run"] for step in job["steps"] if "run" in step] == ["make lint", "make docs", "make test"]
    named = re.findall(r"Python :: (3\.\d+)", (ROOT / "pyproject.toml").read_text())
    assert job["strategy"]["matrix"]["python"] == [named[0], named[-1]]


def test_every_hook_runs_a_tool_of_the_environment() -> None:
    [repository] = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repository["repo"] == "local"
    assert all(hook["entry"].startswith(".venv/bin/") for hook in repository["hooks"])


def test_the_version_stands_in_one_place_and_in_the_changelog() -> None:
    folders = ("dist_train", "docker", "launch", "slurm", "configs")
    files = [path for path in ROOT.iterdir() if path.is_file()]
    files += [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]
    assigned = re.compile(rf"""version["']?\s*[:=]\s*["']?{re.escape(__version__)}\b""", re.IGNORECASE)
    found = [path for path in files if path.suffix in TEXT and assigned.search(path.read_text(errors="replace"))]
    assert [str(path.relative_to(ROOT)) for path in found] == []
    assert f"## [{__version__}] - " in (ROOT / "CHANGELOG.md").read_text()
