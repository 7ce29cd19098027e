"""`dist-train submit` on a real Slurm."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from dist_train.outcome import ExitCode
from tests.cluster.cluster import Cluster
from tests.cluster.runs import Undisturbed
from tests.launching import status, weights_digest

pytestmark = [pytest.mark.ranks, pytest.mark.services]
_SUBMIT = (sys.executable, "-m", "dist_train", "submit")


def test_submitted_run_finishes(cluster: Cluster, tmp_path: Path, large_batch: Undisturbed) -> None:
    command = (*_SUBMIT, large_batch.config, "--nodes", "2", "--ranks-per-node", "1", "--time", "5")
    submitted = cluster.run(*command, "--run-dir", "rate%j x", "--", "--comment=two words", folder=tmp_path)
    assert submitted.returncode == 0, submitted.stderr
    run = tmp_path / "rate%j x"
    assert "global batch 8,192 = 8 micro-batches of 1,024\n2 ranks x 4 micro-batches a step\n" in submitted.stdout
    assert f"run directory  {run}\n" in submitted.stdout
    found = re.search(r"^job +(\d+)$", submitted.stdout, re.MULTILINE)
    assert found is not None
    ended = cluster.wait(int(found[1]))
    assert (ended.state, ended.code) == ("COMPLETED", 0), ended.output
    assert status(run)["world_size"] == 2
    assert weights_digest(run) == large_batch.weights
    assert (run / f"slurm-{found[1]}.log").is_file()
    assert f"tail -F '{run}/slurm-{found[1]}.log'" in submitted.stdout


@pytest.mark.lengthy
def test_run_submitted_within_a_job_has_all_its_ranks(
    cluster: Cluster, tmp_path: Path, large_batch: Undisturbed
) -> None:
    small = ("srun", "--ntasks=1", "--cpus-per-task=2", "--gpus-per-task=1", "--mem=1000")
    words = ("--nodes", "2", "--ranks-per-node", "2", "--time", "5", "--run-dir", "run")
    submitted = cluster.run(*small, *_SUBMIT, large_batch.config, *words, folder=tmp_path)
    assert submitted.returncode == 0, submitted.stderr
    found = re.search(r"^job +(\d+)$", submitted.stdout, re.MULTILINE)
    assert found is not None
    ended = cluster.wait(int(found[1]))
    assert (ended.state, ended.code) == ("COMPLETED", 0), ended.output
    assert status(tmp_path / "run")["world_size"] == 4


def test_bad_configuration_is_not_submitted(cluster: Cluster, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("noise: {amplitud: 1}")
    before = cluster.run("squeue", "--states=all", "--noheader", folder=tmp_path).stdout
    refused = cluster.run(*_SUBMIT, str(config), folder=tmp_path)
    assert refused.returncode == ExitCode.USAGE
    assert "[unknown-key]" in refused.stderr
    assert cluster.run("squeue", "--states=all", "--noheader", folder=tmp_path).stdout == before
    assert not (tmp_path / "runs").exists()


def test_refusal_by_sbatch_is_reported(cluster: Cluster, tmp_path: Path, large_batch: Undisturbed) -> None:
    command = (*_SUBMIT, large_batch.config, "--partition", "none", "--run-dir", "run")
    refused = cluster.run(*command, folder=tmp_path)
    assert refused.returncode == ExitCode.USAGE
    assert "[sbatch-refused]" in refused.stderr
    assert "Traceback" not in refused.stderr
