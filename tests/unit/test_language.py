"""The field's terms: no private word, in code, documentation or messages."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("dist_train", "docs", "launch", "slurm", "docker", "benchmarks", "configs", "studies", "tests")
PAGES = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "Makefile", "pyproject.toml", "setup.py")
SUFFIXES = {".py", ".md", ".sh", ".yml", ".yaml", ".jinja", ".html", ".def", ""}
PROCESSES_OF_A_LOADER = re.compile(r"(?i)loader[_ ]workers|(max|num|wait_for|persistent)_workers|worker_init")

FORMER = (Path(__file__), ROOT / "dist_train/config/resuming.py", ROOT / "tests/unit/former_run/config.yaml")
"""Where the words of before must stand: the settings' former names, and a run that has them."""

PRIVATE = {
    "rank; of a data loader: loader process": r"(?i)workers?(?![a-z])",
    "layer": r"(?i)\brooms\b|\brooms? (?:knows?|below|above|of)\b",
    "variant": r"\b[Aa]rms?\b",  # not the processors, ARM
    "fix": r"(?i)\bcures?\b",
    "resume, continue": r"(?i)\b(?:go|goes|went|going|gone) on\b(?! (?:the|a|its|GPUs|CPUs)\b)",
    "bit-identical": r"(?i)\bto the bit\b",
    "unrecoverable": r"(?i)\bhopeless",
    "check_consistent_across_ranks": r"\bcheck_alike\b",
    "ResumePoint": r"\bfind_beginning\b|\bclass Beginning\b",
    "broadcast_str, allreduce_async": r"\bshare_text\b|\bstart_sum\b",
    "sync_batch_norm": r"\bover_workers\b",
    "GradientAccumulator": r"\b(?:Exact|Float|Adasum)Codec\b",
    "Noise": r"\b_Still\b",
    "BatchRequest, prefetch": r"\bWanted\b",
    "InProcessDecoder": r"\bDecodingHere\b",
    "Endpoint, probe all peers": r"\b[Ss]eats?\b|(?i:call(?:s|ed)? the roll)",
    "unused_settings": r"\bidle_settings\b",
    "avoid_short_last_micro_batch": r"\bwithout_remnant\b",
    "_failure_already_recorded": r"\b_another_told\b",
    "oserror_to_fault": r"\btold_as_faults\b",
    "monitoring on": r"(?i)\bwhat is watched\b",
    "By default": r"(?i)\bwithout a word\b",
    "Our batch scripts request": r"(?i)\bhas its say\b",
    "accept the same options": r"(?i)\btake the same words\b",
    "is disconnected": r"(?i)\bis let go\b",
    "rank 0 reports": r"(?i)\brank 0 tells\b",
}
"""What a reader of the field expects, and the words that once stood in its place."""


def lines() -> Iterator[tuple[str, str]]:
    """Yield every line of what people read, with its place."""
    files = [ROOT / page for page in PAGES]
    files += [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*"))]
    for path in files:
        if path.is_file() and path.suffix in SUFFIXES and "__pycache__" not in path.parts and path not in FORMER:
            text = path.read_text(encoding="utf-8", errors="ignore")
            yield from ((f"{path.relative_to(ROOT)}:{number}", line) for number, line in enumerate(text.split("\n"), 1))


@pytest.fixture(scope="module")
def text() -> tuple[list[str], str]:
    """The places of all lines, and the lines as one text."""
    found = list(lines())
    return [place for place, _ in found], PROCESSES_OF_A_LOADER.sub("", "\n".join(line for _, line in found))


@pytest.mark.parametrize("term", list(PRIVATE))
def test_no_private_word_stands_where_the_field_has_one(term: str, text: tuple[list[str], str]) -> None:
    places, whole = text
    # no word spans two lines
    numbers = dict.fromkeys(whole.count("\n", 0, match.start()) for match in re.finditer(PRIVATE[term], whole))
    every = whole.split("\n") if numbers else []
    found = [f"{places[number]}: {every[number].strip()}" for number in numbers]
    assert not found, f"say {term}: {len(found)} lines\n" + "\n".join(found[:20])


@pytest.mark.parametrize(
    ("line", "term"),
    [
        ("an ARM Neoverse, or another processor", None),
        ("Arms of a study", "variant"),
        ("the arm with noise", "variant"),
        ("Kubernetes' worker nodes", "rank; of a data loader: loader process"),
    ],
)
def test_a_line_is_rejected_for_its_private_word_alone(line: str, term: str | None) -> None:
    assert [each for each, pattern in PRIVATE.items() if re.search(pattern, line)] == ([] if term is None else [term])
