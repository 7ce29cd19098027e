"""Promise 2: results depend on the seed alone; no global generator is used."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dist_train.config import parse_config
from dist_train.launching.run import train
from tests.launching import assert_same_run, small_settings, weights_digest

NOISY: dict[str, Any] = {"run": {"max_steps": 5}, "noise": {"sharing": "micro_batch"}, "data": {"augment": "crop-flip"}}


def _numpy_state() -> Any:
    return np.random.get_state(legacy=False)["state"]["key"].copy()


def test_global_generators_are_neither_read_nor_changed(tmp_path: Path) -> None:
    config = parse_config(small_settings(**NOISY), source="test")
    for run, seed in (("first", 1), ("second", 2)):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        before = (torch.get_rng_state(), _numpy_state(), random.getstate())
        train(config, tmp_path / run)
        assert torch.equal(torch.get_rng_state(), before[0])
        assert np.array_equal(_numpy_state(), before[1])
        assert random.getstate() == before[2]
    assert_same_run(tmp_path / "first", tmp_path / "second")


def test_another_seed_gives_other_weights(tmp_path: Path) -> None:
    for seed in (0, 1):
        config = parse_config(small_settings(**{**NOISY, "run": {"max_steps": 1, "seed": seed}}), source="test")
        train(config, tmp_path / str(seed))
    assert weights_digest(tmp_path / "0") != weights_digest(tmp_path / "1")
