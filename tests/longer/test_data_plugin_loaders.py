"""User code in loader processes behaves as in the training process, including errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dist_train.data.images import BatchRequest
from dist_train.outcome import UsageError
from tests.raising import raises
from tests.unit.test_data_plugin_samples import HERE, OWN, opened, read


def test_promise_2_loaders_draw_like_the_training_process() -> None:
    values: dict[str, Any] = {**OWN, "augment": f"{HERE}:erased"}
    alone, with_loaders = opened(**values), opened(**values, loader_workers=2)
    try:
        with_loaders.train.prefetch([BatchRequest(torch.tensor([1, 9])), BatchRequest(torch.tensor([2, 7]), 3)])
        for indices, epoch in (([9], 3), ([2, 7], 3), ([4], None)):
            assert torch.equal(read(with_loaders, indices, epoch), read(alone, indices, epoch))
        assert torch.equal(read(with_loaders, [4], 1, "test"), read(alone, [4], 1, "test"))
        batch = BatchRequest(torch.arange(24), 1)
        assert torch.equal(with_loaders.train.read(batch)[1], alone.train.read(batch)[1])
    finally:
        with_loaders.close()


@pytest.mark.parametrize(("how", "code"), [("shape", "plugin-data-form"), ("raises", "plugin-failed")])
def test_error_in_a_loader_process_names_the_sample(how: str, code: str) -> None:
    name = f"{HERE}:broken"
    splits = opened(**{**OWN, "name": name, "options": {"index": 13, "how": how}, "loader_workers": 1})
    try:
        read(splits, range(12), 0)
        with raises(UsageError, code) as error:
            read(splits, range(12, 24), 0)
        assert f"sample 13 of {name} (train)" in str(error.value)
    finally:
        splits.close()


def test_options_may_be_long_and_are_on_no_command_line() -> None:
    options = {"dropped": list(range(100_000, 130_000)), "token": "confidential"}
    splits = opened(**{**OWN, "options": options, "loader_workers": 1})
    try:
        assert torch.equal(read(splits, [3], 1), read(opened(**{**OWN, "options": options}), [3], 1))
        [loader] = splits.train._decoder._processes  # type: ignore[attr-defined]
        command = Path(f"/proc/{loader.pid}/cmdline").read_bytes()
        assert b"loader_workers" in command
        assert b"confidential" not in command
    finally:
        splits.close()
