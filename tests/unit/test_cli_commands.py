"""The commands: what they print, and the codes that they end with."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import jsonschema
import pytest
import yaml

from dist_train import __version__
from dist_train.cli import main as program
from dist_train.cli.main import main
from dist_train.cluster.launch import Launch
from dist_train.cluster.membership import Elasticity
from dist_train.config import load_config
from dist_train.config.sections import LaunchSettings
from dist_train.diagnostics import _COMPARED
from dist_train.outcome import CodedError, DivergedError, ExitCode, OutOfMemoryError, PeerFailedError, UsageError
from dist_train.rundir.status import StatusFile, load_status, read_status
from tests.unit.small_trainers import SETTINGS

pytestmark = pytest.mark.usefixtures("threads_as_before")

ROOT = Path(__file__).parents[2]
SMOKE = "dist_train:configs/smoke.yaml"


def write_config(folder: Path, **sections: Any) -> str:
    path = folder / "config.yaml"
    names = {*SETTINGS, *sections}
    merged = {name: {**SETTINGS.get(name, {}), **sections.get(name, {})} for name in names}
    path.write_text(yaml.safe_dump(merged))
    return str(path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has finished."""
    folder = tmp_path_factory.mktemp("trained")
    assert main(["train", write_config(folder), "--run-dir", str(folder / "run")]) == ExitCode.FINISHED
    return folder / "run"


class TestProgram:
    def test_it_answers_to_help_and_version(self, capsys: pytest.CaptureFixture[str]) -> None:
        for arguments, *texts in (
            ("--help", "train"),
            ("--version", f"dist-train {__version__}"),
            ("launch --help", *(f"launch.{name}" for name in LaunchSettings.model_fields)),
            ("replay --help", *(name.replace("_", " ") for name in _COMPARED)),
        ):
            with pytest.raises(SystemExit) as ended:
                main(arguments.split())
            assert ended.value.code == 0
            printed = " ".join(capsys.readouterr().out.split())
            assert not [text for text in texts if text not in printed]

    @pytest.mark.parametrize(
        ("command", "unbuffered"), [(["config", "path", SMOKE], ""), (["config", "path", SMOKE], "1"), (["--help"], "")]
    )
    def test_an_output_that_cannot_be_written_is_told_in_one_line_and_a_reader_that_has_gone_is_not(
        self, command: list[str], unbuffered: str
    ) -> None:
        def printed_to(output: int) -> tuple[int, str]:
            program = [sys.executable, "-m", "dist_train", *command]
            environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
            ended = subprocess.run(program, stdout=output, stderr=subprocess.PIPE, env=environment, text=True)
            os.close(output)
            return ended.returncode, ended.stderr

        reader, gone = os.pipe()
        os.close(reader)
        assert printed_to(gone) == (ExitCode.FAULT, "")
        code, told = printed_to(os.open("/dev/full", os.O_WRONLY))
        assert code == ExitCode.FAULT
        assert told.splitlines() == [told.strip()]
        assert "[output-unwritable]" in told

    def test_an_exceeded_quota_is_reported_as_a_full_disk_is(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        full = Mock(flush=Mock(side_effect=OSError(errno.EDQUOT, "Disk quota exceeded")))
        monkeypatch.setattr(sys, "stdout", full)
        assert main(["config", "path", SMOKE]) == ExitCode.FAULT
        assert "[output-unwritable]" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("error", "reporting"),
        [
            (DivergedError("not finite"), [0]),
            (OutOfMemoryError("too large"), [0]),
            (UsageError("wrong"), [0, 1]),
            (PeerFailedError("another failed", ExitCode.USAGE), []),
        ],
    )
    def test_an_error_of_all_ranks_is_reported_by_rank_0_and_that_of_a_peer_by_the_peer(
        self,
        error: CodedError,
        reporting: list[int],
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.setattr(program, "parse", lambda words: Namespace(run=Mock(side_effect=error)))
        reported = []
        for rank in (0, 1):
            monkeypatch.setattr(program, "current_launch", lambda rank=rank: Launch("torchrun", 2, rank))
            assert main(["train"]) == error.exit_code
            reported += [rank] * (str(error) in capsys.readouterr().err)
        assert reported == reporting

    @pytest.mark.parametrize("command", ["train", "sweep", "submit", "lr-range", "evaluate"])
    def test_what_is_missing_is_named_without_the_optional_settings(
        self, command: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit) as ended:
            main([command])
        assert ended.value.code == ExitCode.USAGE
        assert "section.key=value" not in capsys.readouterr().err.splitlines()[-1]

    @pytest.mark.parametrize(
        ("options", "code"),
        [
            (["--min-ranks", "3", "train", SMOKE], "option-range"),
            (["--min-ranks", "0", "train", SMOKE], "option-range"),
            (["--restarts", "1", "evaluate", "x"], "elastic-command"),
            (["sweep", "x"], "not-on-ranks"),
            (["--min-ranks", "1", "train", SMOKE, "comm.engine=horovod"], "launcher-unsupported"),
            (["lr-range", SMOKE, "comm.engine=horovod"], "launcher-unsupported"),
            (["lr-range", SMOKE, "run.sed=1"], "unknown-key"),
            (["--max-ranks", "1", "--listen", "127.0.0.1", "train", SMOKE], "option-range"),
            (["--start-with", "1", "train", SMOKE], "option-range"),
            (["--max-ranks", "3", "train", SMOKE], "elastic-without-listen"),
            (["train", SMOKE, "launch.min_ranks=3"], "option-range"),
            (["train", SMOKE, "launch.max_ranks=3"], "elastic-without-listen"),
            (
                ["--max-ranks", "40", "--listen", "127.0.0.1", "train", SMOKE, "model.norm=sync"],
                "micro-batch-too-small",
            ),
            (["--join", "node1:9", "train", "x.yaml"], "join-options"),
            (["--join", "node1:9", "--max-ranks", "3"], "join-options"),
            (["--join", "node1:9"], "join-token"),
            (["--join", "nowhere.json"], "join-place"),
            (["2", "train", SMOKE], "no-command"),
            (["script.py"], "not-on-ranks"),
            (["/usr/bin/python3", "script.py"], "not-on-ranks"),
        ],
    )
    def test_a_launch_that_cannot_be_is_refused(
        self, options: list[str], code: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["launch", "-np", "2", *options]) == ExitCode.USAGE
        assert f"[{code}]" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("node1", ("node1", 0)),
            ("node1:80", ("node1", 80)),
            ("10.0.0.1:80", ("10.0.0.1", 80)),
            ("fd00::2", ("fd00::2", 0)),
            ("[fd00::2]", ("fd00::2", 0)),
            ("[fd00::2]:80", ("fd00::2", 80)),
        ],
    )
    def test_a_launch_listens_at_a_name_or_an_address_of_either_kind(
        self, text: str, expected: tuple[str, int]
    ) -> None:
        assert program.parse(["launch", "--listen", text]).listen == expected

    @pytest.mark.parametrize(
        "text",
        ["", ":80", "0.0.0.0", "::", "[::]:80", "node1:x", "node1:65536", "node1:80:80", "[node1]:80", "[fd00::2"],
    )
    def test_a_launch_does_not_listen_where_other_nodes_cannot_reach_it(self, text: str) -> None:
        with pytest.raises(SystemExit) as ended:
            program.parse(["launch", "--listen", text])
        assert ended.value.code == ExitCode.USAGE

    @pytest.mark.parametrize(
        ("options", "settings", "expected"),
        [
            ([], ["launch.min_ranks=1", "launch.restarts=3"], Elasticity(2, 1, 2, 3, 60.0)),
            (["--min-ranks", "2", "--restarts", "1"], ["launch.min_ranks=1"], Elasticity(2, 2, 2, 1, 60.0)),
            (["--listen", "127.0.0.1"], ["launch.max_ranks=4"], Elasticity(2, 2, 4, 0, 60.0)),
            (["--restarts", "0"], ["launch.restarts=3"], None),
            ([], [], None),
        ],
    )
    def test_a_launch_is_elastic_as_its_options_say_or_else_the_configuration(
        self, options: list[str], settings: list[str], expected: Elasticity | None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        launched: list[Elasticity | None] = []

        def launch(words: list[str], count: int, *more: object) -> int:
            launched.append(next((each for each in more if isinstance(each, Elasticity)), None))
            return 0

        monkeypatch.setattr("dist_train.cluster.elastic_launch.launch_elastic", launch)
        monkeypatch.setattr("dist_train.cluster.local_launch.launch_ranks", launch)
        assert main(["launch", "-np", "2", *options, "train", SMOKE, *settings]) == 0
        assert launched == [expected]

    @pytest.mark.parametrize(
        ("options", "version", "found", "code"),
        [
            (["--restarts", "1"], "2.9.1", "cuda", ExitCode.USAGE),
            (["--restarts", "1"], "2.10.0", "cuda", ExitCode.FINISHED),
            (["--restarts", "1"], "2.9.1", "cpu", ExitCode.FINISHED),
            ([], "2.9.1", "cuda", ExitCode.FINISHED),
        ],
    )
    def test_a_launch_on_gpus_is_not_elastic_with_an_old_torch(
        self,
        options: list[str],
        version: str,
        found: str,
        code: ExitCode,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.setattr("dist_train.cluster.inspection.installed_version", lambda package: version)
        monkeypatch.setattr("dist_train.cluster.devices.device_type", lambda asked: found)
        monkeypatch.setattr("dist_train.cluster.elastic_launch.launch_elastic", lambda *_: ExitCode.FINISHED)
        monkeypatch.setattr("dist_train.cluster.local_launch.launch_ranks", lambda *_: ExitCode.FINISHED)
        assert main(["launch", "-np", "2", *options, "train", SMOKE]) == code
        assert ("[torch-too-old]" in capsys.readouterr().err) is (code == ExitCode.USAGE)

    @pytest.mark.parametrize(
        ("words", "saves"),
        [
            (["replay", "x@1"], True),
            (["lr-range", SMOKE], True),
            (["evaluate", "x"], False),
            (["--", "evaluate", "x"], False),
        ],
    )
    def test_a_launch_knows_which_commands_save_on_request(
        self, words: list[str], saves: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        launched: list[bool] = []

        def launch(command: list[str], count: int, run: Path | None = None, *, saves: bool = True) -> int:
            launched.append(saves)
            return 0

        monkeypatch.setattr("dist_train.cluster.local_launch.launch_ranks", launch)
        assert main(["launch", *words]) == 0
        assert launched == [saves]

    def test_what_follows_two_dashes_is_no_option(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        Path(write_config(tmp_path)).rename("-config.yaml")
        assert main(["config", "check", "--run-dir", "x", "--", "-config.yaml", "run.epochs=1"]) == ExitCode.FINISHED

    @pytest.mark.parametrize(
        "arguments",
        [
            [],
            ["trian"],
            ["train"],
            ["evaluate", "x", "--split", "half"],
            ["report", "x", "-o", "y.html", "--figures", "z"],
            ["watch", "x", "--interval", "abc"],
            ["landscape", "direction", "x", "--samples", "abc"],
        ],
    )
    def test_bad_usage_ends_with_2_and_names_no_function(
        self, arguments: list[str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 2
        assert "invalid _" not in capsys.readouterr().err

    @pytest.mark.parametrize("arguments", [["report", "x", "--format", "pdf"], ["doctor", "--brief"]])
    def test_an_option_that_would_be_ignored_is_refused(
        self, arguments: list[str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(arguments) == ExitCode.USAGE
        assert "[option-alone]" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("arguments", "meant"),
        [
            (["trian", "configs/demo.yaml"], "train"),
            (["config", "chekc", "configs/demo.yaml"], "check"),
            (["train", "configs/demo.yaml", "--rundir", "x"], "--run-dir"),
            (["train", "configs/demo.yaml", "--rundir=x"], "--run-dir"),
            (["train", "configs/demo.yaml", "run.seed=1", "-run-dir", "x"], "--run-dir"),
            (["evaluate", "x", "--split", "tset"], "test"),
            (["help"], "--help"),
            (["version"], "--version"),
        ],
    )
    def test_a_mistyped_word_ends_with_2_and_names_the_nearest(
        self, arguments: list[str], meant: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 2
        assert capsys.readouterr().err.rstrip().endswith(f"; did you mean {meant}?")

    @pytest.mark.parametrize("words", ["launch train x.yaml -np 2", "train x.yaml --min-ranks=2"])
    def test_an_option_of_launch_at_another_command_is_told_so(
        self, words: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit) as ended:
            main(words.split())
        assert ended.value.code == 2
        assert "dist-train launch -np 2 train" in capsys.readouterr().err

    @pytest.mark.parametrize("words", ["x.yaml", "launch -np 2 x.yaml run.seed=1"])
    def test_a_configuration_without_a_command_is_told_which(
        self, words: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit) as ended:
            main(words.split())
        assert ended.value.code == 2
        assert capsys.readouterr().err.rstrip().endswith(": train x.yaml")

    @pytest.mark.parametrize(("words", "value"), [(["--run.epochs=3"], "3"), (["--run.epochs", "3"], "VALUE")])
    def test_a_setting_with_dashes_is_told_without_them(
        self, words: list[str], value: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit) as ended:
            main(["train", "x.yaml", *words])
        assert ended.value.code == 2
        assert capsys.readouterr().err.rstrip().endswith(f": run.epochs={value}")

    @pytest.mark.parametrize(
        ("words", "setting"),
        [
            (["--epochs", "3"], "run.epochs"),
            (["--batch-size=64"], "batch.global_size"),
            (["--lr", "0.1"], "optimizer.learning_rate"),
            (["--device", "cpu"], "run.device"),
        ],
    )
    def test_an_option_of_other_programs_is_told_its_setting(
        self, words: list[str], setting: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit) as ended:
            main(["train", "x.yaml", *words])
        assert ended.value.code == 2
        assert capsys.readouterr().err.rstrip().endswith(f": {setting}=VALUE")

    def test_a_file_in_place_of_a_run_is_named_once(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = write_config(tmp_path)
        assert main(["report", path]) == main(["report", f"{path}/none"]) == 2
        assert capsys.readouterr().err.count(path) == 2

    def test_a_word_like_no_other_ends_with_2_and_names_none(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as ended:
            main(["runs", "--zzz"])
        assert ended.value.code == 2
        assert "did you mean" not in capsys.readouterr().err

    @pytest.mark.parametrize(
        "words",
        [
            "watch dmo",
            "curve dmo",
            "report runs/dmo",
            "evaluate dmo",
            "evaluate dmo@best",
            "export dmo --to onnx",
            "replay dmo@3",
        ],
    )
    def test_a_mistyped_run_is_told_with_the_nearest(
        self, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "runs" / "demo" / "checkpoints").mkdir(parents=True)
        monkeypatch.chdir(tmp_path)
        assert main(words.split()) == 2
        assert "; did you mean runs/demo?" in capsys.readouterr().err

    def test_python_m_is_the_same_program(self) -> None:
        ended = subprocess.run(
            [sys.executable, "-m", "dist_train", "config", "check", "nowhere.yaml"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert ended.returncode == 2
        assert "[file-missing]" in ended.stderr
        assert "Traceback" not in ended.stderr


class TestConfig:
    def test_check_says_that_a_file_is_fine_and_warns_of_idle_settings(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = write_config(tmp_path)
        assert main(["config", "check", path, "data.download=true"]) == 0
        told = capsys.readouterr()
        assert told.out == f"{path}: fine\n"
        assert "warning: data.download has no effect" in told.err

    def test_check_lists_every_fault_and_ends_with_2(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = write_config(tmp_path, run={"sed": 1}, noise={"amplitud": 0.1})
        assert main(["config", "check", path]) == 2
        told = capsys.readouterr()
        assert told.out == ""
        assert told.err.count("[unknown-key]") == 2

    @pytest.mark.parametrize(
        ("sections", "word"),
        [
            ({"batch": {"global_size": 150, "micro_size": 50}}, "batch.global_size"),
            ({"data": {"name": "imagefolder", "classes": 2, "root": "nowhere"}}, "data.root"),
            ({"data": {"name": "cifar10", "root": "nowhere"}}, "data.download"),
            ({"data": {"name": "parquet", "classes": 2, "root": "nowhere"}}, "nowhere"),
            ({"data": {"train_size": 5}, "batch": {"global_size": 10, "micro_size": 5}}, "data.train_size"),
            ({"run": {"directory": "a\0b"}}, "run.directory"),
            ({"metrics": {"enabled": True, "token_file": "nowhere"}}, "metrics.token_file"),
            ({"run": {"init_from": "nowhere"}}, "nowhere"),
        ],
    )
    def test_check_refuses_what_train_refuses(
        self, tmp_path: Path, sections: dict[str, Any], word: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = write_config(tmp_path, **sections)
        codes = []
        for command in (["config", "check", path], ["train", path, "--run-dir", str(tmp_path / "run")]):
            assert main(command) == ExitCode.USAGE
            message = capsys.readouterr().err
            assert word in message
            codes.append(re.findall(r"\[([a-z-]+)\]$", message, flags=re.MULTILINE))
        assert codes[0] == codes[1] != []

    def test_check_refuses_a_batch_of_more_samples_than_there_are(self) -> None:
        smoke = str(Path(__file__).parents[2] / "configs" / "smoke.yaml")
        assert main(["config", "check", smoke]) == ExitCode.FINISHED
        assert main(["config", "check", smoke, "batch.global_size=8192"]) == ExitCode.USAGE

    def test_show_prints_every_setting_so_that_it_can_be_loaded(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = write_config(tmp_path)
        assert main(["config", "show", path, "run.seed=7"]) == 0
        shown = tmp_path / "shown.yaml"
        shown.write_text(capsys.readouterr().out)
        assert load_config(shown) == load_config(path, ["run.seed=7"])

    def test_schema_is_a_json_schema_that_our_own_configurations_follow(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["config", "schema"]) == 0
        schema = json.loads(capsys.readouterr().out)
        assert {"run", "noise", "comm"} <= set(schema["properties"])
        for path in sorted((ROOT / "configs").glob("*.yaml")):
            jsonschema.validate(yaml.safe_load(path.read_text()), schema)

    def test_run_directory_is_where_the_run_lies(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = write_config(tmp_path, run={"name": "a", "directory": "b"})
        assert main(["config", "run-directory", path]) == 0
        assert main(["config", "run-directory", path, "run.name=c"]) == 0
        assert main(["config", "run-directory", path, "--run-dir", "d/e"]) == 0
        assert capsys.readouterr().out == "b/a\nb/c\nd/e\n"


class TestTrain:
    def test_a_run_leaves_what_is_documented(self, trained: Path) -> None:
        assert sorted(path.name for path in trained.iterdir()) == [
            "checkpoints",
            "config.yaml",
            "counts.json",
            "logs",
            "metrics.jsonl",
            "run.lock",
            "run_id",
            "status.json",
        ]
        status = read_status(trained / "status.json")
        assert status is not None
        assert (status.state, status.exit_code, status.step, status.world_size) == ("finished", 0, 6, 1)
        lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines if line["kind"] == "train"] == [1, 2, 3, 4, 5, 6]
        assert load_config(trained / "config.yaml").precision.threads == 1

    def test_the_same_command_again_goes_on_with_the_run(self, tmp_path: Path) -> None:
        config, run = write_config(tmp_path), tmp_path / "run"
        for until in (2, 5):
            assert main(["train", config, f"run.max_steps={until}", "--run-dir", str(run)]) == 0
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines if line["kind"] == "train"] == [1, 2, 3, 4, 5]
        assert [line["step"] for line in lines if line.get("event") == "resumed"] == [2]

    def test_fewer_steps_than_trained_are_not_recorded_of_a_finished_run(self, tmp_path: Path) -> None:
        config, run = write_config(tmp_path), tmp_path / "run"
        for until in (3, 2):
            assert main(["train", config, f"run.max_steps={until}", "--run-dir", str(run)]) == 0
            assert load_config(run / "config.yaml").run.max_steps == 3
            status = read_status(run / "status.json")
            assert status is not None
            assert (status.step, status.total_steps, status.epoch, status.total_epochs) == (3, 3, 1.0, 1.0)

    def test_a_bad_configuration_ends_with_2_and_leaves_nothing(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        config = write_config(tmp_path, optimizer={"learnig_rate": 1})
        assert main(["train", config, "--run-dir", str(tmp_path / "run")]) == 2
        assert "[unknown-key]" in capsys.readouterr().err
        assert not (tmp_path / "run").exists()

    def test_other_settings_than_the_run_began_with_end_with_2(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        config, run = write_config(tmp_path, run={"max_steps": 1}), str(tmp_path / "run")
        assert main(["train", config, "--run-dir", run]) == 0
        assert main(["train", config, "model.width=0.5", "--run-dir", run]) == 2
        told = capsys.readouterr().err
        assert "model.width: 0.03125 when the run began, 0.5 now" in told
        assert "Traceback" not in told

    def test_only_a_run_that_has_made_all_its_epochs_is_lengthened(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        config, run = write_config(tmp_path), tmp_path / "run"

        def ended(*overrides: str) -> tuple[int, str]:
            return main(["train", config, *overrides, "--run-dir", str(run)]), capsys.readouterr().err

        assert ended("run.max_steps=4")[0] == ExitCode.FINISHED
        code, told = ended("run.epochs=3", "run.max_steps=4")
        assert (code, "[run-unfinished]" in told) == (ExitCode.USAGE, True)
        assert "finish it with run.epochs=2 run.max_steps=null, then" in told
        assert ended()[0] == ended("run.epochs=3")[0] == ended("run.epochs=3")[0] == ExitCode.FINISHED
        code, told = ended("run.epochs=2")
        assert (code, "[settings-changed]" in told) == (ExitCode.USAGE, True)
        status = read_status(run / "status.json")
        assert status is not None
        assert (status.step, status.total_steps, status.epoch) == (9, 9, 3.0)

    def test_a_run_that_another_run_s_checkpoint_leaves_nothing_to_train_is_refused(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        config, run = write_config(tmp_path), tmp_path / "run"
        assert main(["train", config, "--run-dir", str(run)]) == ExitCode.FINISHED
        new = ["train", config, f"run.resume={run}", "--run-dir", str(tmp_path / "new")]
        assert main(new) == ExitCode.USAGE
        assert "[nothing-to-train]" in capsys.readouterr().err
        assert main([*new, "run.epochs=3"]) == main([*new, "run.epochs=3"]) == ExitCode.FINISHED

    def test_advice_on_an_unfinished_run_finishes_it_although_it_stopped_early(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        stops = {"patience": 1, "min_delta": 1.0, "metric": "test.accuracy"}
        config, run = write_config(tmp_path, run={"epochs": 3}, early_stopping=stops), tmp_path / "run"

        def ended(*words: str) -> tuple[int, str]:
            return main(["train", config, *words]), capsys.readouterr().err

        there = ("--run-dir", str(run))
        assert ended(*there)[0] == ExitCode.FINISHED
        code, told = ended("run.epochs=4", *there)
        assert (code, "[run-unfinished]" in told, "run.init_from" in told) == (ExitCode.USAGE, True, False)
        advice = told.partition("finish it with ")[2].partition(", then")[0].split()
        assert advice == ["run.epochs=3", "early_stopping.patience=null"]
        code, told = ended("run.epochs=4", f"run.resume={run}@6", "--run-dir", str(tmp_path / "other"))
        assert (code, "run.init_from" in told) == (ExitCode.USAGE, True)
        assert ended(*advice, *there)[0] == ExitCode.FINISHED
        assert ended("run.epochs=4", *there)[0] == ExitCode.FINISHED

    @pytest.mark.parametrize(
        ("override", "code"),
        [
            ("model.width=0.0625", "checkpoint-of-another-model"),
            ("model.name=vgg16", "checkpoint-of-another-model"),
            ("run.init_from=nowhere", "target-missing"),
        ],
    )
    def test_weights_that_do_not_fit_end_with_2(
        self, trained: Path, tmp_path: Path, override: str, code: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        config = write_config(tmp_path)
        words = [config, f"run.init_from={trained}", override]
        assert main(["train", *words, "--run-dir", str(tmp_path / "run")]) == ExitCode.USAGE
        [told] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("dist-train: ")]
        assert told.endswith(f"[{code}]")

    def test_foreign_weights_are_loaded_as_safely_as_a_checkpoint(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        source = tmp_path / "source.pt"
        source.write_bytes(pickle.dumps({"format": 1, "model": print}))
        digest = hashlib.sha256(source.read_bytes()).hexdigest()
        record = {"sha256": digest, "bytes": source.stat().st_size, "step": 1, "epoch": 1.0, "metrics": {}}
        source.with_suffix(".json").write_text(json.dumps(record))
        command = ["train", write_config(tmp_path), f"run.init_from={source}", "--run-dir", str(tmp_path / "run")]
        assert main(command) == ExitCode.USAGE
        assert "[checkpoint-unreadable]" in capsys.readouterr().err

    def test_a_run_that_diverges_ends_with_3_and_names_the_last_good_checkpoint(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        config = write_config(
            tmp_path,
            model={"norm": "none", "width": 0.25},
            optimizer={"learning_rate": 1e30},
            checkpoint={"every_steps": 1},
        )
        run = tmp_path / "run"
        ended = main(["train", config, "--run-dir", str(run)])
        assert ended == 3
        told = capsys.readouterr().err
        assert "not finite or out of range" in told
        assert "the last good checkpoint is" in told
        assert "Traceback" not in told
        status = read_status(run / "status.json")
        assert status is not None
        assert (status.state, status.exit_code) == ("failed", 3)
        assert "step-0000000" in status.reason

    def test_a_last_evaluation_that_is_not_finite_ends_it_with_3_every_time(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        config = write_config(
            tmp_path,
            run={"max_steps": 1},
            model={"norm": "none"},
            noise={"method": "none"},
            optimizer={"learning_rate": 1e38},
        )
        run = tmp_path / "run"
        for _ in range(2):
            assert main(["train", config, "--run-dir", str(run)]) == ExitCode.DIVERGED
            told = capsys.readouterr()
            assert "[evaluation-not-finite]" in told.err
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        [event] = [line for line in lines if line.get("event") == "non_finite_evaluation"]
        assert (event["step"], event["what"]) == (1, "train loss, test loss")
        assert [line["loss"] for line in lines if line["kind"] == "eval"] == [None, None]
        record = json.loads((run / "checkpoints" / "step-00000001.json").read_text())
        assert record["metrics"]["test_accuracy"] is record["metrics"]["best_saved_step"] is None
        assert main(["evaluate", str(run)]) == ExitCode.DIVERGED
        told = capsys.readouterr()
        assert json.loads(told.out)["loss"] is None
        assert "[loss-not-finite]" in told.err


class TestEvaluate:
    def test_it_prints_one_line_of_json(self, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
        capsys.readouterr()
        assert main(["evaluate", str(trained)]) == 0
        told = json.loads(capsys.readouterr().out)
        assert (told["split"], told["samples"], told["step"]) == ("test", 25, 6)
        assert main(["evaluate", str(trained), "evaluation.batch_size=10", "--split", "train"]) == 0
        assert json.loads(capsys.readouterr().out)["samples"] == 100

    def test_a_run_that_is_not_there_ends_with_2(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["evaluate", str(tmp_path / "nowhere")]) == 2
        assert "[target-missing]" in capsys.readouterr().err


def test_a_replay_of_a_run_without_records_names_the_update(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(trained, tmp_path / "run")
    (run / "metrics.jsonl").unlink()
    assert main(["replay", f"{run}@1"]) == ExitCode.USAGE
    assert "step-not-recorded" in capsys.readouterr().err


def test_configuration_of_a_copied_run_does_not_train_elsewhere(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(trained, tmp_path / "copy")
    for command in (["train"], ["submit", "--dry-run"]):
        assert main([*command, str(run / "config.yaml")]) == ExitCode.USAGE
        assert "[run-moved]" in capsys.readouterr().err
    assert main(["train", str(run / "config.yaml"), "--run-dir", str(run)]) == ExitCode.FINISHED
    for names in (["run.name=new", f"run.directory={tmp_path}"], [f"run={{name: newer, directory: {tmp_path}}}"]):
        assert main(["train", str(run / "config.yaml"), *names]) == ExitCode.FINISHED
    assert (tmp_path / "new" / "status.json").is_file()
    assert (tmp_path / "newer" / "status.json").is_file()


class TestOutcome:
    @pytest.mark.parametrize("code", list(ExitCode))
    def test_it_ends_with_the_code_of_the_last_launch(self, tmp_path: Path, code: ExitCode) -> None:
        StatusFile(tmp_path / "status.json", 2).end("failed", code, "")
        assert main(["outcome", str(tmp_path)]) == code

    def test_a_launch_that_died_ends_with_1(self, tmp_path: Path) -> None:
        StatusFile(tmp_path / "status.json", 2).change("running", step=7)
        assert main(["outcome", str(tmp_path)]) == 1
        assert load_status(tmp_path / "status.json").state == "running", "the launch may still be at work"

    def test_a_launch_that_died_is_recorded_as_failed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("DIST_TRAIN_LAUNCH", "first")
        StatusFile(tmp_path / "status.json", 2).change("running", step=7)
        assert main(["outcome", str(tmp_path), "--launch", "first", "--record-lost", ""]) == 1
        status = load_status(tmp_path / "status.json")
        assert (status.state, status.exit_code) == ("failed", 1)

    def test_no_status_and_another_launch_s_status_end_with_1(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert main(["outcome", str(tmp_path)]) == 1
        monkeypatch.setenv("DIST_TRAIN_LAUNCH", "first")
        StatusFile(tmp_path / "status.json", 2).end("finished", ExitCode.FINISHED, "")
        assert main(["outcome", str(tmp_path), "--launch", "first"]) == 0
        assert main(["outcome", str(tmp_path), "--launch", "second"]) == 1

    def test_a_launch_that_was_refused_before_it_wrote_a_status_ends_with_2(
        self, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["outcome", str(tmp_path), "--launch", "first", "--code", "2"]) == ExitCode.USAGE
        assert capfd.readouterr().err == "", "the ranks have said why"
        StatusFile(tmp_path / "status.json", 2).end("failed", ExitCode.DIVERGED, "")
        assert main(["outcome", str(tmp_path), "--code", "2"]) == ExitCode.DIVERGED

    def test_a_finished_run_s_is_0(self, trained: Path) -> None:
        assert main(["outcome", str(trained)]) == 0
