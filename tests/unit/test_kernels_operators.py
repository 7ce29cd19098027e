"""When Triton's kernels are used on GPUs, and why not."""

from __future__ import annotations

import shutil
import sysconfig
from pathlib import Path

import pytest

from dist_train.kernels import operators


@pytest.mark.parametrize(
    ("missing", "why"),
    [
        ("", ""),
        ("triton", "not installed"),
        ("gcc", "C compiler"),
        ("Python.h", "Python.h"),
        ("DIST_TRAIN_TRITON", "DIST_TRAIN_TRITON"),
    ],
)
def test_triton_needs_a_compiler_and_a_header(
    missing: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if missing != "Python.h":
        (tmp_path / "Python.h").touch()
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    monkeypatch.setattr(operators, "find_spec", lambda name: None if name == missing else object())
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}" if name == "gcc" != missing else None)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("DIST_TRAIN_TRITON", "off" if missing == "DIST_TRAIN_TRITON" else "")
    found = operators.why_no_triton.__wrapped__()
    assert why in found
    assert bool(found) is bool(why)
