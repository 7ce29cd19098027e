"""Real launches where something speaks for GPUs that torch cannot use."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from dist_train.outcome import ExitCode
from tests.launching import launch, small_settings, status, write_config

pytestmark = pytest.mark.ranks


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, and torch can use it")
@pytest.mark.parametrize(
    ("ranks", "controller", "sign"),
    [
        (1, "alone", {"SLURM_GPUS_ON_NODE": "4"}),
        (2, "gloo", {"CUDA_VISIBLE_DEVICES": "0,1"}),
    ],
)
def test_a_run_does_not_take_the_cpu_in_place_of_gpus_unasked(
    ranks: int, controller: str, sign: Mapping[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    config, run = write_config(tmp_path, small_settings(run={"max_steps": 1})), str(tmp_path / "run")
    refused = launch(ranks, controller, "train", config, "--run-dir", run, extra=sign)
    assert refused.code == (ExitCode.USAGE if controller == "alone" else ExitCode.FAULT), refused.output
    [name] = sign
    assert refused.output.count(f"({name}={sign[name]}), but torch cannot use any: ") == 1, refused.output
    found = status(tmp_path / "run")
    assert (found["state"], found["exit_code"]) == ("failed", ExitCode.USAGE)
    taken = launch(ranks, controller, "train", config, "run.device=cpu", "--run-dir", run, extra=sign)
    assert taken.code == 0, taken.output
    # a run that began on the CPU continues there
    resumed = launch(ranks, controller, "train", config, "--run-dir", run, extra=sign)
    assert resumed.code == 0, resumed.output
