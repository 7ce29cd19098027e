"""The documentation of the Python API: examples of every public name run, the site builds, the notebook runs."""

from __future__ import annotations

import doctest
import os
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


def test_notebook_runs_and_is_stored_without_outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = nbformat.read(DOCS / "first_run.ipynb", as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook.cells)
    variables = environment(PYTHONPATH=str(DOCS.parent), MPLBACKEND="agg")
    for variable, value in variables.items():
        monkeypatch.setitem(os.environ, variable, value)
    client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    shown = [kind for cell in notebook.cells for output in cell.get("outputs", ()) for kind in output.get("data", ())]
    assert "image/png" in shown
