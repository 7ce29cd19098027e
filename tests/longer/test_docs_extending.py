"""`docs/extending.md` is right: its blocks, put where they say into a copy of the package, train."""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n# (\S+), (above|in) (\S+)\n(.*?)```", PAGE, re.DOTALL)


def definition(tree: ast.Module, name: str) -> ast.Assign | ast.AnnAssign:
    """Return where `name`, or `Class.name`, gets its value or its type."""
    *owners, last = name.split(".")
    body: list[ast.stmt] = tree.body
    for owner in owners:
        [body] = [node.body for node in body if isinstance(node, ast.ClassDef) and node.name == owner]
    for node in body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if isinstance(node, ast.Assign | ast.AnnAssign) and any(
            isinstance(target, ast.Name) and target.id == last for target in targets
        ):
            return node
    raise AssertionError(f"there is no {name}")


def put(source: str, where: str, name: str, code: str) -> str:
    """Return `source` with `code` above the definition of `name`, or as one more entry in it."""
    node = definition(ast.parse(source), name)
    lines = source.encode().splitlines(keepends=True)
    if where == "above":
        lines.insert(node.lineno - 1, code.strip().encode() + b"\n\n\n")
        return b"".join(lines).decode()
    last, join = last_entry(node)
    assert last.end_lineno is not None
    line, column = last.end_lineno - 1, last.end_col_offset
    lines[line] = lines[line][:column] + join + code.strip().encode() + lines[line][column:]
    return b"".join(lines).decode()


def last_entry(node: ast.Assign | ast.AnnAssign) -> tuple[ast.expr, bytes]:
    """Return the last entry of a table, a Literal or a union of types, and what comes between two of them."""
    places: list[ast.AST] = [*filter(None, [getattr(node, "annotation", None), node.value])]
    for place in (found for top in places for found in ast.walk(top)):
        if isinstance(place, ast.Dict):
            return place.values[-1], b", "
        if isinstance(place, ast.Subscript) and getattr(place.value, "id", "") == "Literal":
            assert isinstance(place.slice, ast.Tuple)
            return place.slice.elts[-1], b", "
        if isinstance(place, ast.BinOp) and isinstance(place.op, ast.BitOr):
            return place.right, b" | "
    raise AssertionError("neither a table nor a type with choices")


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a copy of the package, to which the page has been done, and two updates trained with it."""
    folder = tmp_path_factory.mktemp("extended")
    shutil.copytree(ROOT / "dist_train", folder / "dist_train", ignore=shutil.ignore_patterns("__pycache__"))
    for file, where, name, code in BLOCKS:
        path = folder / file
        path.write_text(put(path.read_text(), where, name, code))
    [settings] = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    (folder / "extended.yaml").write_text(settings)
    command = [sys.executable, "-m", "dist_train", "train", "extended.yaml", "metrics.enabled=false"]
    ended = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "no effect" not in ended.stderr
    return folder


def test_every_python_block_of_the_page_says_where_it_goes() -> None:
    assert len(BLOCKS) == PAGE.count("```python") >= 14


def test_what_the_page_adds_is_what_trained(extended: Path) -> None:
    run = extended / "runs" / "extended"
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [r["noise_amplitude"] for r in records if r["kind"] == "train"] == [0.1, 0.0]
    [test] = [record for record in records if record["kind"] == "eval" and record["split"] == "test"]
    assert test["samples"] == 64
    saved = torch.load(max((run / "checkpoints").glob("*.pt")), weights_only=True)
    assert saved["model"]["1.weight"].shape == (64, 64)
    assert saved["step"] == 2
    assert {name for state in saved["optimizer"]["state"].values() for name in state} == {"square_avg", "step"}


def test_the_copy_is_well_formed(extended: Path) -> None:
    for file in {file for file, *_ in BLOCKS}:
        assert (extended / file).read_text() != (ROOT / file).read_text()
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F", "dist_train"]
    checked = subprocess.run(command, cwd=extended, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout
