"""The documentation of the Python API: examples of every public name run, the site builds, the notebook runs."""

from __future__ import annotations

import doctest
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
import torch
from nbclient import NotebookClient

import dist_train
from dist_train.rundir.records import TrainRecord
from tests.launching import environment

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the examples; those of `train` write the run that the others read."""
    return tmp_path_factory.mktemp("examples")


@pytest.mark.parametrize("name", ["train", *sorted(set(dist_train.__all__) - {"train"})])
def test_examples_of_a_public_name_run(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(folder)
    documented = getattr(dist_train, name).__doc__
    if name not in ("Config", "Observer", "Run", "register"):
        assert "Raises:" in documented
    scope: dict[str, Any] = {
        "dist_train": dist_train,
        "torch": torch,
        "nn": torch.nn,
        "Path": Path,
        "TrainRecord": TrainRecord,
    }
    examples = doctest.DocTestParser().get_examples(documented)
    assert examples
    for example in examples:
        if example.want:
            assert f"{eval(example.source, scope)!r}\n" == example.want
        else:
            exec(example.source, scope)


def test_site_builds_without_warnings(tmp_path: Path) -> None:
    words = ("-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site"))
    variables = environment(PYTHONPATH=str(DOCS.parent), NO_MKDOCS_2_WARNING="1")
    built = subprocess.run([sys.executable, *words], cwd=DOCS.parent, env=variables, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    reference = (tmp_path / "site" / "api" / "index.html").read_text()
    assert all(f'id="dist_train.{name}"' in reference for name in dist_train.__all__)
    assert {page.stem for page in DOCS.glob("*.md")} <= {page.parent.name for page in tmp_path.rglob("index.html")}


def output_kinds(cell: nbformat.NotebookNode) -> set[str]:
    """Return what a cell shows: the streams and the formats of its outputs."""
    return {kind for output in cell.get("outputs", ()) for kind in output.get("data", (output.get("name", "error"),))}


@pytest.mark.lengthy
def test_notebook_is_stored_with_what_it_shows_when_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = nbformat.read(DOCS / "first_run.ipynb", as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == [*range(1, len(code) + 1)]
    stored = [output_kinds(cell) for cell in code]
    for variable, value in environment(PYTHONPATH=str(DOCS.parent), MPLBACKEND="agg").items():
        monkeypatch.setitem(os.environ, variable, value)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert [output_kinds(cell) for cell in code] == stored
    assert "image/png" in set().union(*stored)


def test_stored_notebook_is_small_without_warnings_or_paths_of_a_machine() -> None:
    page = DOCS / "first_run.ipynb"
    assert page.stat().st_size < 200_000
    cells = [cell for cell in nbformat.read(page, as_version=4).cells if cell.cell_type == "code"]
    assert not {"stderr", "error"} & set().union(*map(output_kinds, cells))
    texts = [
        output.get("text", "") + "".join(text for kind, text in output.get("data", {}).items() if kind != "image/png")
        for cell in cells
        for output in cell.outputs
    ]
    assert not [text for text in texts if re.search(r"(?<![\w./<])/\w", text)]
