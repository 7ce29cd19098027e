"""`dist-train submit --dry-run`: the batch script; the plan; nothing submitted that is wrong."""

from __future__ import annotations

import errno
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import yaml

from dist_train.cli.main import main, parse
from dist_train.config import load_config
from dist_train.config.loading import project_root
from dist_train.outcome import ExitCode, UsageError
from dist_train.sweep.submission import describe_batch
from tests.archives import write_fashion_mnist
from tests.programs import write_programs
from tests.raising import raises
from tests.unit.studies import finish_run, small_plan, write_study

SCRIPT = """\
#!/usr/bin/env bash
#SBATCH --job-name=large
#SBATCH --nodes=1-4
#SBATCH --ntasks-per-node=8
#SBATCH --time=4:00:00
#SBATCH --partition=gpu
#SBATCH --requeue
#SBATCH --no-kill
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
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "prefix", str(project_root() / ".venv"))
    arguments = ["submit", "config.yaml", "run.seed=1", "--nodes", "1-4", "--time", "4:00:00", "--partition", "gpu"]
    late = ["--dry-run", 'noise.exclude=["norm", "bias"]', "--", "--gpus-per-node=a100:8", "--comment=two words"]
    assert main([*arguments, *late]) == ExitCode.FINISHED
    printed = capsys.readouterr()
    assert printed.out.replace(str(tmp_path), "FOLDER").replace(shlex.quote(str(project_root())), "ROOT") == SCRIPT
    assert "32 ranks x 2 micro-batches a step" in printed.err
    assert sorted(tmp_path.iterdir()) == [config]


@pytest.mark.parametrize(
    ("is_on_nodes", "chosen", "used"), [(True, None, "this"), (True, "other", "other"), (False, None, "")]
)
def test_a_job_uses_the_python_that_submits_it(
    is_on_nodes: bool,
    chosen: str | None,
    used: str,
    config: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    this = tmp_path / "conda env" / "python"
    if is_on_nodes:
        this.parent.mkdir()
        this.symlink_to(sys.executable)
    monkeypatch.setattr(sys, "executable", str(this))
    monkeypatch.setattr(sys, "prefix", str(this.parent))
    assert main(["submit", str(config), "--dry-run"]) == ExitCode.FINISHED
    [line] = [line for line in capsys.readouterr().out.splitlines() if "DIST_TRAIN_PYTHON" in line]
    script = f"set -euo pipefail\n{line}\nprintenv DIST_TRAIN_PYTHON || true"
    environment = {"PATH": os.environ["PATH"]} | ({"DIST_TRAIN_PYTHON": chosen} if chosen else {})
    ended = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == (str(this) if used == "this" else used)


@pytest.mark.parametrize("is_there", [False, True])
def test_what_train_would_refuse_on_this_node_is_a_warning(
    config: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, is_there: bool
) -> None:
    if is_there:
        write_fashion_mnist(tmp_path, "train")
        write_fashion_mnist(tmp_path, "test")
    words = ("data.name=fashion-mnist", "data.root=.", "--dry-run")
    assert main(["submit", str(config), *words]) == ExitCode.FINISHED
    printed = capsys.readouterr()
    assert printed.out.startswith("#!/usr/bin/env bash\n")
    assert ("[data-missing]" in printed.err) is not is_there


def test_data_that_may_not_be_read_here_are_a_warning(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    locked = Mock(side_effect=PermissionError(errno.EACCES, "Permission denied", "/locked"))
    monkeypatch.setattr("dist_train.launching.preflight.find_data", locked)  # root may read everything
    assert main(["submit", str(config), "--dry-run"]) == ExitCode.FINISHED
    assert "[permission-denied]" in capsys.readouterr().err


def test_a_run_with_checkpoints_in_a_folder_of_its_own_needs_no_source_any_more(
    config: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    checkpoints = tmp_path / "elsewhere" / "checkpoints"
    checkpoints.mkdir(parents=True)
    (checkpoints / "step-00000002.json").touch()
    words = ("run.init_from=runs/removed", "--dry-run")
    for place, warns in (("elsewhere", False), ("new", True)):
        assert main(["submit", str(config), *words, "--run-dir", str(tmp_path / place)]) == ExitCode.FINISHED
        assert ("[target-missing]" in capsys.readouterr().err) is warns


def test_without_a_word_on_resources_it_asks_for_whole_nodes(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["submit", str(config), "--ranks-per-node", "2", "--dry-run"]) == ExitCode.FINISHED
    script = capsys.readouterr().out
    assert "#SBATCH --exclusive\n#SBATCH --mem=0\n" in script
    assert "export RANKS_PER_NODE=2\n" in script


@pytest.mark.parametrize(
    ("option", "ranks"),
    [
        ("--gres=gpu", 1),
        ("--gres=gpu:2", 2),
        ("--gres=gpu:a100:2", 2),
        ("--gres=gpu:1g.10gb:2", 2),
        ("--gres=nvme:1,gpu:2", 2),
        ("--tres-per-node=gres/gpu:2", 2),
        ("--tres-per-node=gres/gpu:a100=2", 2),
        ("--gpus-per-node=a100:2", 2),
        ("--gpus-per-node=a100:2,v100", 3),
        ("--gres=gpu:a100:2,nvme:1,gpu:v100:1", 3),
        ("--gpus=4", None),
        ("-G4", None),
        ("-Ga100:4", None),
        ("--gpus-per-task=1", None),
        ("--cpus-per-task=4", None),
        ("-n4", None),
        ("--mem=8G", None),
        ("--mem-per-cpu=2G", None),
    ],
)
def test_a_part_of_a_node_is_asked_for_however_it_is_spelt(
    config: Path, capsys: pytest.CaptureFixture[str], option: str, ranks: int | None
) -> None:
    assert main(["submit", str(config), "--dry-run", "--", option]) == ExitCode.FINISHED
    script = capsys.readouterr().out
    assert "--exclusive" not in script
    assert (f"#SBATCH --ntasks-per-node={ranks}\n" in script) is (ranks is not None)


@pytest.mark.parametrize(
    "option",
    [
        *("--gres=nvme:1", "--comment=gpu", "--nodelist=node1", "--mem=0", "--gpus-per-node=0"),
        *("--threads-per-core=1", "--ntasks-per-core=1", "--mem-bind=local", "--tres-bind=gres/gpu:closest"),
    ],
)
def test_other_options_leave_the_node_whole(config: Path, capsys: pytest.CaptureFixture[str], option: str) -> None:
    assert main(["submit", str(config), "--dry-run", "--", option]) == ExitCode.FINISHED
    assert "#SBATCH --exclusive\n" in capsys.readouterr().out


def test_what_sbatch_refuses_leaves_no_folder(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "sbatch").write_text("#!/bin/sh\necho no >&2\nexit 1\n")
    (programs / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", str(programs))
    assert main(["submit", str(config), "--run-dir", "some/where/run"]) == ExitCode.USAGE
    assert "[sbatch-refused]" in capsys.readouterr().err
    assert not (tmp_path / "some").exists()


def test_a_plugin_goes_into_the_job_but_not_into_a_study_s(
    config: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "mine.py").touch()
    assert main(["submit", str(config), "--plugin", "mine.py", "--dry-run"]) == ExitCode.FINISHED
    [run] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("run_in_job")]
    assert f" --plugin {tmp_path}/mine.py " in run
    command = ["submit", "--study", str(write_study(tmp_path)), "--plugin", "mine.py", "--dry-run"]
    assert main(command) == ExitCode.USAGE
    assert "[option-alone]" in capsys.readouterr().err


def test_a_second_job_for_one_run_is_refused_and_the_first_is_named(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "sbatch").write_text("#!/bin/sh\necho 17\n")
    (programs / "squeue").write_text("#!/bin/sh\necho 17 PENDING\n")
    for program in programs.iterdir():
        program.chmod(0o755)
    monkeypatch.setenv("PATH", str(programs))
    run = str(tmp_path / "two words")
    assert main(["submit", str(config), "--run-dir", run]) == ExitCode.FINISHED
    assert f"tail -F '{run}/slurm-17.log'" in capsys.readouterr().out
    assert main(["submit", str(config), "--run-dir", run]) == ExitCode.USAGE
    refusal = capsys.readouterr().err
    assert "[run-in-queue]" in refusal
    assert "job 17" in refusal
    assert main(["submit", str(config), "--run-dir", run, "--", "--array=1-4%1"]) == ExitCode.USAGE
    assert main(["submit", str(config), "--run-dir", run, "--", "--dependency=afterany:17"]) == ExitCode.FINISHED
    (programs / "squeue").write_text("#!/bin/sh\necho 17 COMPLETED\n")
    assert main(["submit", str(config), "--run-dir", run]) == ExitCode.FINISHED


def test_a_study_is_submitted_as_runs_analyses_and_report(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = tmp_path / "site set-up.sh"
    setup.touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DIST_TRAIN_SETUP", setup.name)
    study = write_study(tmp_path, analyse=[{"kind": "direction"}])
    command = ["submit", "--study", str(study), "optimizer.momentum=0.5", "--dry-run", "--time", "1:00:00"]
    assert main([*command, "--", "--gpus-per-node=1"]) == ExitCode.FINISHED
    runs, analyses, report = re.split(r"^# (?:analyses|report).*\n", capsys.readouterr().out, flags=re.MULTILINE)
    assert "#SBATCH --array=1-4\n" in runs
    assert f"STUDY={study}\n" in runs
    assert "OVERRIDES=optimizer.momentum=0.5\n" in runs
    assert f"analyses_in_job {study} optimizer.momentum=0.5 --directory {tmp_path}/runs\n" in analyses
    assert f"DIRECTORY={tmp_path}/runs/small\nOUTPUT=\nreport_in_job runs\n" in report
    assert all(f"export DIST_TRAIN_SETUP='{setup}'\n" in script for script in (runs, analyses, report))
    assert not (tmp_path / "runs").exists()


def test_the_commands_that_analyse_and_report_a_finished_study_are_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    plan = small_plan(tmp_path, analyse=[{"kind": "direction"}])
    for run in plan.runs:
        finish_run(run)
    assert main(["submit", "--study", str(plan.file), "--directory", str(tmp_path / "runs")]) == ExitCode.FAULT
    analyse = f"dist-train sweep {plan.file} --directory {tmp_path}/runs --analyses"
    assert f"{analyse}; of its report: dist-train report {plan.directory}\n" in capsys.readouterr().err


def test_each_of_a_study_s_jobs_has_the_options_that_concern_it(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    of_all = ["--account=a", "-qlong", "--partition=p", "--mail-user=me", "--constraint=x86", "--comment=two words"]
    of_ranks = ["--gpus-per-node=2", "-c4", "--mem=8G", "--exclusive", "--time=1"]
    of_runs = ["--array=1-4%2", "-a1-3", "--dependency=singleton", "-d5", "--output=%A_%a", "-o%a", "--error=e", "-ee"]
    study = write_study(tmp_path, analyse=[{"kind": "direction"}])
    command = ["submit", "--study", str(study), "--dry-run", "--", *of_all, *of_ranks, *of_runs]
    assert main(command) == ExitCode.FINISHED
    scripts = re.split(r"^# (?:analyses|report).*\n", capsys.readouterr().out, flags=re.MULTILINE)
    given = {*of_all, *of_ranks, *of_runs}
    for script, expected in zip(scripts, ([*of_all, *of_ranks, *of_runs], [*of_all, *of_ranks], of_all), strict=True):
        requests = re.findall(r'^#SBATCH "?(.*?)"?$', script, flags=re.MULTILINE)
        assert given.intersection(requests) == set(expected)


def test_a_study_s_jobs_in_the_queue_are_named_and_the_command_that_watches_them(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text("#!/bin/sh\necho 17\n")
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", str(sbatch.parent))
    study, folder = str(write_study(tmp_path)), str(tmp_path / "else where")
    command = ["submit", "--study", study, "run.epochs=1", "--run-dir", folder]
    assert main(command) == ExitCode.FINISHED
    watch = f"dist-train sweep {study} run.epochs=1 --directory '{folder}' --list\n"
    assert watch in capsys.readouterr().out
    sbatch.write_text("#!/bin/sh\n[ $# = 1 ] && echo 18\n")  # refuses jobs with a dependency
    assert main(command) == ExitCode.USAGE
    told = capsys.readouterr().err
    assert "[sbatch-refused]" in told
    assert "scancel 18" in told


def test_a_second_array_for_one_study_is_refused_unless_it_waits_or_its_tasks_are_chosen(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    count, asked, given = tmp_path / "count", tmp_path / "asked", tmp_path / "given"
    (tmp_path / "bin").mkdir()
    sbatch = f'n=$(cat {count} || echo 16); echo "$@" >>{given}; echo $((n + 1)) | tee {count}'
    write_programs(tmp_path / "bin", sbatch=sbatch, squeue=f'echo "$@" >{asked}; echo 17 RUNNING; echo 17 PENDING')
    monkeypatch.setenv("PATH", f"{tmp_path}/bin", prepend=os.pathsep)
    command = ["submit", "--study", str(write_study(tmp_path, analyse=[{"kind": "direction"}]))]
    assert main(command) == ExitCode.FINISHED
    assert re.findall(r"--dependency=(\S+)", given.read_text()) == ["afterany:17", "afterany:18"]
    assert main(command) == ExitCode.USAGE
    refusal = capsys.readouterr().err
    assert "[run-in-queue]" in refusal
    assert "job 17" in refusal
    assert "--jobs=17" in asked.read_text().split()  # not the analyses and the report, which wait for the array
    for option in ("--dependency=afterany:17", "--array=3-4"):
        assert main([*command, "--", option]) == ExitCode.FINISHED


@pytest.mark.parametrize("option", ["--run-dir", "--directory"])
def test_the_folder_of_studies_has_the_name_that_sweep_gives_it(
    option: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    command = ["submit", "--study", str(write_study(tmp_path)), "--dry-run", option, str(tmp_path / "there")]
    assert main(command) == ExitCode.FINISHED
    assert f"DIRECTORY={tmp_path}/there/small\nOUTPUT=\nreport_in_job runs\n" in capsys.readouterr().out


@pytest.mark.parametrize("command", [["sweep", "--list"], ["submit", "--study", "--dry-run"]])
def test_options_that_an_analysis_refuses_are_refused_before_the_runs(
    command: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    refused = {
        "interpolate": {"pionts": 5},
        "direction": {"points": 4},
        "plane": {"scale": "linaer"},
        "sharpness": {"samples": 0},
    }
    analyse: list[dict[str, object]] = [{"kind": kind, "options": options} for kind, options in refused.items()]
    analyse[0]["between"] = ["plain", "noisy"]
    good = {"kind": "sharpness", "options": {"only": ["width", "hessian"], "exclude": "norm,bias"}}
    assert main([*command, str(write_study(tmp_path, analyse=[good]))]) == ExitCode.FINISHED
    capsys.readouterr()
    analyse.append({"kind": "sharpness", "options": {"only": "flatness"}})
    analyse.append({"kind": "plane", "options": {"points": [5, 7]}})
    study = write_study(tmp_path, analyse=[*analyse, good])
    assert main([*command, str(study)]) == ExitCode.USAGE
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("[analysis-options]") == 6
    for words in ("analyse.0.options: unrecognized arguments: --pionts; did you mean --points?", "--points is 4"):
        assert words in printed.err


def test_what_slurm_would_replace_or_take_for_the_end_of_an_option_is_written_so_that_it_does_not(
    config: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    command = ["submit", str(config), "--run-dir", "50%j", "--dry-run", "--", '--comment=say "yes"']
    assert main(command) == ExitCode.FINISHED
    script = capsys.readouterr().out
    assert f"#SBATCH --output={tmp_path}/50%%j/slurm-%j.log\n" in script
    assert '#SBATCH "--comment=say \\"yes\\""\n' in script


@pytest.mark.parametrize(
    "words", [('run.directory="x\\ntouch pwned\\n"', "--dry-run"), ("--dry-run", "--", "--comment=x\ntouch pwned")]
)
def test_no_line_of_an_option_becomes_a_command_of_the_script(
    config: Path, words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["submit", str(config), *words]) == ExitCode.USAGE
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "[line-break]" in printed.err


def test_a_bad_configuration_is_refused(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["submit", str(config), "noise.amplitud=1", "--dry-run"]) == ExitCode.USAGE
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "[unknown-key]" in printed.err


@pytest.mark.parametrize(
    "option",
    [
        ["--nodes", "0"],
        ["--nodes", "4-2"],
        ["--ranks-per-node", "none"],
        *(["--time", time] for time in ("foo", "4h", "1:2:3:4", "1-", "1-2:3:4:5", "")),
    ],
)
def test_bad_options_are_refused(config: Path, option: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["submit", str(config), *option])
    assert ended.value.code == ExitCode.USAGE


@pytest.mark.parametrize("time", ["90", "90:00", "4:00:00", "1-12", "1-12:30", "1-12:30:00", "UNLIMITED"])
def test_time_has_any_of_slurm_s_forms(time: str) -> None:
    assert parse(["submit", "config.yaml", "--time", time]).time == time


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
                "micro-batch    decided on the node when the run begins, then kept: the largest power of two that fits "
                "its memory, at most a rank's even share",
            ),
        ),
        (
            ("batch.micro_size=auto",),
            None,
            (
                "global batch 8,192 = ranks x micro-batches of a rank x samples of a micro-batch",
                "micro-batch    decided on the node when the run begins, then kept: the largest power of two that fits "
                "its memory, at most a rank's even share",
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


def test_a_job_that_could_not_resume_is_refused(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["submit", str(config), "run.resume=never", "--dry-run"]) == ExitCode.USAGE
    assert "[resume-never]" in capsys.readouterr().err


def test_a_run_directory_that_cannot_be_made_is_refused(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("file").touch()
    assert main(["submit", str(config), "--run-dir", "file/run"]) == ExitCode.USAGE
    assert "[run-directory-unwritable]" in capsys.readouterr().err
