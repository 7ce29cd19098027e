"""When Triton's kernels are used on GPUs, and why not; on which GPU they are launched."""

from __future__ import annotations

import shutil
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

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


def test_kernels_are_launched_on_the_device_of_their_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    current: list[Tensor] = []
    launched: list[Tensor] = []

    @contextmanager
    def device_of(tensor: Tensor) -> Iterator[None]:
        current.append(tensor)
        yield
        current.pop()

    def launch(*arguments: Tensor) -> None:
        launched.extend(current)

    def launch_norm(*arguments: Tensor) -> tuple[Tensor, Tensor]:
        launch()
        return torch.zeros(4, 2), torch.zeros(3, 1, 2)

    norms = SimpleNamespace(normalize=launch_norm, gradients=launch_norm)
    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(operators, "norm_kernels", lambda inputs: norms)
    monkeypatch.setitem(sys.modules, "dist_train.kernels.flat", SimpleNamespace(random_bits=launch))
    ours, inputs, ones, bits = torch.ops.dist_train, torch.zeros(4, 2), torch.ones(2), torch.zeros(2, dtype=torch.int32)
    ours.ghost_norm(inputs, ones, ones, 1e-5, 4, 1, False)
    ours.ghost_norm_backward(torch.ones(4, 2), inputs, ones, ones, torch.zeros(3, 1, 2), 4, False)
    ours.random_bits_(bits, 1, 2)
    assert [each.data_ptr() for each in launched] == [inputs.data_ptr(), inputs.data_ptr(), bits.data_ptr()]
