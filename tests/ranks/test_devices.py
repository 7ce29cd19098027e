"""Real launches where the environment announces GPUs that torch cannot use."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from dist_train.outcome import ExitCode
from tests.launching import launch, mostly_lengthy, small_settings, status, train_ranks, write_config

pytestmark = pytest.mark.ranks


@pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="there is a GPU, which the launches see")
@pytest.mark.parametrize(
    ("ranks", "controller", "variables"),
    mostly_lengthy([(1, "alone", {"SLURM_GPUS_ON_NODE": "4"}), (2, "mpi", {"CUDA_VISIBLE_DEVICES": "0,1"})]),
)
def test_run_uses_the_cpu_instead_of_gpus_only_on_request(
    ranks: int, controller: str, variables: Mapping[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    config, run = write_config(tmp_path, small_settings(run={"max_steps": 1})), tmp_path / "run"
    refused = launch(ranks, controller, "train", config, "--run-dir", str(run), extra=variables)
    assert refused.code == ExitCode.USAGE, refused.output
    [name] = variables
    assert refused.output.count(f"({name}={variables[name]}), but torch cannot use any: ") == 1, refused.output
    found = status(run)
    assert (found["state"], found["exit_code"]) == ("failed", ExitCode.USAGE)
    train_ranks(ranks, controller, config, run, "run.device=cpu", extra=variables)
    # A run that began on the CPU resumes there.
    train_ranks(ranks, controller, config, run, extra=variables)
