"""`dist-train submit --dry-run`: the batch script; the plan; nothing submitted that is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from dist_train.cli.main import main
from dist_train.config import load_config
from dist_train.outcome import ExitCode, UsageError
from dist_train.sweep.submission import describe_batch, project_root
from tests.raising import raises

SCRIPT = """\
#!/usr/bin/env bash
#SBATCH --job-name=large
#SBATCH --nodes=1-4
#SBATCH --ntasks-per-node=8
#SBATCH --time=4:00:00
#SBATCH --partition=gpu
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
#SBATCH --open-mode=append
#SBATCH --output=FOLDER/runs/large/slurm-%j.log
#SBATCH --gpus-per-node=a100:8
#SBATCH "--comment=two words"
set -euo pipefail
root=ROOT
. "$root/slurm/prologue.sh"
run_in_job train FOLDER/config.yaml run.seed=1 'noise.exclude=["norm", "bias"]' --run-dir FOLDER/runs/large
"""


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"run": {"name": "large"}, "batch": {"global_size": 8192, "micro_size": 128}}))
    return path


def test_a_dry_run_prints_the_script_and_submits_nothing(
    config: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments = ["submit", "config.yaml", "run.seed=1", "--nodes", "1-4", "--time", "4:00:00", "--partition", "gpu"]
    late = ["--dry-run", 'noise.exclude=["norm", "bias"]', "--", "--gpus-per-node=a100:8", "--comment=two words"]
    assert main([*arguments, *late]) == ExitCode.FINISHED
    printed = capsys.readouterr()
    assert printed.out.replace(str(tmp_path), "FOLDER").replace(str(project_root()), "ROOT") == SCRIPT
    assert "32 ranks x 2 micro-batches a step" in printed.err
    assert sorted(tmp_path.iterdir()) == [config]


def test_without_a_word_on_resources_it_asks_for_whole_nodes(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["submit", str(config), "--ranks-per-node", "2", "--dry-run"]) == ExitCode.FINISHED
    script = capsys.readouterr().out
    assert "#SBATCH --exclusive\n#SBATCH --mem=0\n" in script
    assert "export RANKS_PER_NODE=2\n" in script


def test_a_bad_configuration_is_refused(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["submit", str(config), "noise.amplitud=1", "--dry-run"]) == ExitCode.USAGE
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "[unknown-key]" in printed.err


@pytest.mark.parametrize("option", [["--nodes", "0"], ["--nodes", "4-2"], ["--ranks-per-node", "none"]])
def test_bad_options_are_refused(config: Path, option: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["submit", str(config), *option])
    assert ended.value.code == ExitCode.USAGE


@pytest.mark.parametrize(
    ("settings", "ranks", "lines"),
    [
        (
            ("batch.micro_size=128",),
            4,
            ("global batch 8,192 = 64 micro-batches of 128", "4 ranks x 16 micro-batches a step"),
        ),
        (
            ("batch.micro_size=1000",),
            4,
            (
                "global batch 8,192 = 9 micro-batches of 1,000, the last of 192",
                "4 ranks x 2 or 3 micro-batches a step",
            ),
        ),
        (
            ("batch.micro_size=4096",),
            3,
            (
                "global batch 8,192 = 2 micro-batches of 4,096",
                "3 ranks x 0 or 1 micro-batches a step; 1 ranks have nothing to do",
            ),
        ),
        (
            ("batch.micro_size=auto",),
            4,
            (
                "global batch 8,192 = 4 ranks x micro-batches of a rank x samples of a micro-batch",
                "micro-batch    decided on the node when the run begins, then kept: the largest that fits its memory, "
                "at most a rank's even share",
            ),
        ),
        (
            ("batch.micro_size=auto",),
            None,
            (
                "global batch 8,192 = ranks x micro-batches of a rank x samples of a micro-batch",
                "micro-batch    decided on the node when the run begins, then kept: the largest that fits its memory, "
                "at most a rank's even share",
                "dealt out to one rank for each GPU of the nodes (without GPUs: one a node)",
            ),
        ),
        (
            (),
            None,
            (
                "global batch 8,192 = 64 micro-batches of 128",
                "dealt out to one rank for each GPU of the nodes (without GPUs: one a node)",
            ),
        ),
    ],
)
def test_the_plan_says_who_computes_what(
    config: Path, settings: tuple[str, ...], ranks: int | None, lines: tuple[str, ...]
) -> None:
    assert describe_batch(load_config(config, settings), ranks) == lines


def test_more_ranks_than_can_share_a_micro_batch_are_refused(config: Path) -> None:
    with raises(UsageError, "micro-batch-too-small"):
        describe_batch(load_config(config, ("model.norm=sync",)), 200)
