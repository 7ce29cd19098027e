"""launch/local.sh and launch/mpirun.sh on real runs: exit codes, requests to stop, no process left behind."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import signal
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from dist_train.outcome import ExitCode
from tests.launching import mostly_lengthy, status, train_alone
from tests.waiting import PATIENCE, wait_for

ROOT = Path(__file__).parents[2]
LOCAL = (str(ROOT / "launch/local.sh"), "--gloo")
MPIRUN = (str(ROOT / "launch/mpirun.sh"),)
LAUNCHERS = pytest.mark.parametrize(
    "launcher", [LOCAL, pytest.param(MPIRUN, marks=pytest.mark.lengthy)], ids=["horovodrun", "mpirun"]
)
CONFIGURATION = """
run: {name: tiny, epochs: 100000}
data: {name: synthetic, synthetic_samples: 128, synthetic_shape: [1, 28, 28]}
model: {width: 0.0625, norm: ghost, ghost_size: 16}
batch: {global_size: 64, micro_size: 16}
optimizer: {learning_rate: 0.001}
evaluation: {every_epochs: 0}
checkpoint: {every_epochs: 0}
metrics: {enabled: false}
"""

pytestmark = pytest.mark.ranks


@pytest.fixture
def configuration(tmp_path: Path) -> str:
    file = tmp_path / "tiny.yaml"
    file.write_text(CONFIGURATION)
    return str(file)


@pytest.fixture
def mark() -> Iterator[str]:
    """The name of a variable that all processes of the test have; the test fails if it leaves any behind."""
    name = f"DIST_TRAIN_TEST_{os.getpid()}_{time.monotonic_ns()}"
    yield name
    try:
        wait_for(lambda: not processes_with(name), "processes were left behind")
    finally:
        for process in processes_with(name):
            os.kill(int(process), signal.SIGKILL)


def processes_with(name: str) -> set[str]:
    def is_marked(process: Path) -> bool:
        try:
            return f"{name}=".encode() in (process / "environ").read_bytes()
        except OSError:
            return False

    return {path.name for path in Path("/proc").iterdir() if path.name.isdigit() and is_marked(path)}


def is_rank(process: str) -> bool:
    try:
        variables = Path(f"/proc/{process}/environ").read_bytes()
    except OSError:
        return False
    return re.search(rb"\0(HOROVOD_RANK|OMPI_COMM_WORLD_RANK)=", variables) is not None


def start(mark: str, *command: str, environment: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command,
        env={**os.environ, mark: "1", **(environment or {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=PATIENCE)
    return process.returncode, out, err


def wait_while_running(process: subprocess.Popen[str], condition: Callable[[], bool]) -> None:
    wait_for(lambda: process.poll() is not None or condition(), "the condition of a running process")
    assert process.poll() is None, process.communicate()


def is_training(run: Path) -> bool:
    found = status(run)
    return bool(found.get("state") == "running" and found["step"] > 0)


def start_training(mark: str, *launcher: str, configuration: str, run: Path) -> subprocess.Popen[str]:
    """Start a run and wait for its first update."""
    process = start(mark, *launcher, "train", configuration, "--run-dir", str(run))
    wait_while_running(process, lambda: is_training(run))
    return process


@LAUNCHERS
def test_finished_run_exits_with_0_and_redraws_its_progress_bar_on_the_terminal(
    launcher: tuple[str, ...], configuration: str, tmp_path: Path, mark: str
) -> None:
    terminal, end = pty.openpty()
    run = tmp_path / "run"
    command = (*launcher, "train", configuration, "run.max_steps=20", "--run-dir", str(run))
    environment = {**os.environ, mark: "1", "TERM": "xterm"}
    process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=end, stderr=end)
    os.close(end)
    shown = b""
    with contextlib.suppress(OSError):  # reading a terminal whose programs have ended raises an I/O error
        while chunk := os.read(terminal, 65536):
            shown += chunk
    os.close(terminal)
    assert process.wait(timeout=PATIENCE) == ExitCode.FINISHED, shown
    assert b"\x1b[2K" in shown, "no line was redrawn"
    assert b"[0]<stdout>" not in shown
    assert (status(run)["state"], status(run)["world_size"]) == ("finished", 2)


@pytest.mark.parametrize(
    ("launcher", "number"),
    mostly_lengthy([(LOCAL, signal.SIGTERM), (LOCAL, signal.SIGUSR2), (MPIRUN, signal.SIGUSR2)]),
    ids=["horovodrun-SIGTERM", "horovodrun-SIGUSR2", "mpirun-SIGUSR2"],
)
def test_promise_7_signal_to_the_script_saves_and_exits_with_75(
    launcher: tuple[str, ...], number: signal.Signals, configuration: str, tmp_path: Path, mark: str
) -> None:
    run = tmp_path / "run"
    process = start_training(mark, *launcher, configuration=configuration, run=run)
    process.send_signal(number)
    code, _, err = finish(process)
    assert code == ExitCode.STOPPED, err
    found = status(run)
    assert found["state"] == "stopped"
    assert (run / "checkpoints" / f"step-{found['step']:08d}.pt").is_file()
    assert "Traceback" not in err


@LAUNCHERS
def test_promise_7_signal_during_start_up_stops_the_ranks(
    launcher: tuple[str, ...], configuration: str, tmp_path: Path, mark: str
) -> None:
    run = tmp_path / "run"
    process = start(mark, *launcher, "train", configuration, "--run-dir", str(run))
    wait_while_running(process, lambda: any(map(is_rank, processes_with(mark))))
    process.send_signal(signal.SIGTERM)
    code, _, err = finish(process)
    assert code == ExitCode.STOPPED, err
    assert status(run)["state"] == "stopped"


@LAUNCHERS
def test_diverged_run_exits_with_3(launcher: tuple[str, ...], configuration: str, tmp_path: Path, mark: str) -> None:
    run = tmp_path / "run"
    settings = ("optimizer.learning_rate=1e30", "model.norm=none", "run.max_steps=200")
    code, _, err = finish(start(mark, *launcher, "train", configuration, *settings, "--run-dir", str(run)))
    assert code == ExitCode.DIVERGED, err
    assert status(run)["state"] == "failed"


SLOW_LOGGER = """
import time
from dist_train import Observer

class Slow(Observer):
    def record(self, record):
        if getattr(record, "event", "") == "not_finite":
            time.sleep(8)  # longer than launchers let a rank live once another has ended with an error

def slow(directory):
    return Slow()
"""


@pytest.mark.lengthy
@LAUNCHERS
def test_diverged_run_exits_with_3_also_if_rank_0_takes_long_to_report_it(
    launcher: tuple[str, ...], configuration: str, tmp_path: Path, mark: str
) -> None:
    (tmp_path / "slow.py").write_text(SLOW_LOGGER)
    run = tmp_path / "run"
    logger = f"metrics.loggers=[{{name: {tmp_path / 'slow.py'}:slow}}]"
    settings = ("optimizer.learning_rate=1e30", "model.norm=none", "run.max_steps=200", logger)
    code, _, err = finish(start(mark, *launcher, "train", configuration, *settings, "--run-dir", str(run)))
    assert code == ExitCode.DIVERGED, err
    assert status(run)["exit_code"] == ExitCode.DIVERGED
    assert err.count("[step-not-finite]") == 1, err


@LAUNCHERS
def test_killed_rank_ends_the_run_with_1(
    launcher: tuple[str, ...], configuration: str, tmp_path: Path, mark: str
) -> None:
    run = tmp_path / "run"
    process = start_training(mark, *launcher, configuration=configuration, run=run)
    lost = next(pid for pid in processes_with(mark) if is_rank(pid) and int(pid) != status(run)["pid"])
    os.kill(int(lost), signal.SIGKILL)
    code, out, err = finish(process)
    assert code == ExitCode.FAULT
    assert "[rank-lost]" in out + err
    assert (status(run)["state"], status(run)["exit_code"]) == ("failed", ExitCode.FAULT)


@LAUNCHERS
def test_the_last_values_of_a_killed_run_are_served_until_they_are_scraped(
    launcher: tuple[str, ...], configuration: str, tmp_path: Path, mark: str
) -> None:
    """With the other leftovers of the launch the exporter was killed, before it had recorded the end for Prometheus."""
    run, targets = tmp_path / "run", tmp_path / "targets"
    settings = f"port: 0, targets_directory: {targets}, last_scrape_seconds: {PATIENCE}"
    Path(configuration).write_text(CONFIGURATION.replace("enabled: false", settings))
    process = start_training(mark, *launcher, configuration=configuration, run=run)
    page = status(run)["metrics"]
    with urllib.request.urlopen(page):
        os.kill(status(run)["pid"], signal.SIGKILL)
    code, _, err = finish(process)
    assert code == ExitCode.FAULT, err
    with urllib.request.urlopen(page) as response:
        assert b"dist_train_step" in response.read()
    [target] = targets.glob("*.json")
    wait_for(lambda: '"killed"' in target.read_text(), "the end in the target file")


@LAUNCHERS
def test_ranks_do_not_outlive_a_killed_script(
    launcher: tuple[str, ...], configuration: str, tmp_path: Path, mark: str
) -> None:
    run = tmp_path / "run"
    process = start_training(mark, *launcher, configuration=configuration, run=run)
    process.kill()
    process.communicate()
    wait_for(lambda: not processes_with(mark), "the ranks outlive the script")


def test_exit_code_ignores_the_status_of_an_earlier_launch(configuration: str, tmp_path: Path, mark: str) -> None:
    run = tmp_path / "run"
    train_alone(configuration, run, "run.max_steps=2")
    command = (*MPIRUN, "train", configuration, "run.max_steps=2", "--run-dir", str(run))
    # Horovod refuses this under mpirun, before the run writes a status.
    code, _, _ = finish(start(mark, *command, environment={"HOROVOD_CONTROLLER": "gloo"}))
    assert code != ExitCode.FINISHED


@LAUNCHERS
def test_bad_configuration_is_reported_once_and_nothing_is_launched(
    launcher: tuple[str, ...], configuration: str, tmp_path: Path, mark: str
) -> None:
    run = tmp_path / "run"
    code, out, err = finish(
        start(mark, *launcher, "-np", "3", "train", configuration, "noise.amplitud=1", "--run-dir", str(run))
    )
    assert code == ExitCode.USAGE
    assert err.count("noise.amplitud: unknown key") == 1
    assert err.count("dist-train:") == 1
    assert out == ""
    assert not run.exists()


@LAUNCHERS
def test_what_the_ranks_refuse_is_reported_once_and_exits_with_2(
    launcher: tuple[str, ...], configuration: str, tmp_path: Path, mark: str
) -> None:
    run = tmp_path / "run"
    settings = (f"run.init_from={tmp_path / 'weights.pt'}", "--run-dir", str(run))
    code, out, err = finish(start(mark, *launcher, "train", configuration, *settings))
    assert code == ExitCode.USAGE, err
    assert len([line for line in (out + err).splitlines() if line.strip()]) == 1, out + err
    assert "weights.pt" in out + err
    assert not run.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "no command given"),
        (("train",), "train takes a configuration"),
        (("-np", "none", "train", "x.yaml"), "-np takes a number of ranks, 1 or more, not 'none'"),
        (("--wrong", "train", "x.yaml"), "unknown option --wrong"),
    ],
)
@LAUNCHERS
def test_bad_usage_prints_one_line_and_exits_with_2(
    launcher: tuple[str, ...], arguments: tuple[str, ...], message: str, mark: str
) -> None:
    code, out, err = finish(start(mark, *launcher, *arguments))
    assert code == ExitCode.USAGE
    assert message in err
    assert len(err.splitlines()) == 1
    assert out == ""


@LAUNCHERS
def test_help_prints_usage(launcher: tuple[str, ...], mark: str) -> None:
    code, out, err = finish(start(mark, *launcher, "--help"))
    assert code == 0
    assert out.startswith("usage: launch/")
    assert err == ""


def test_ranks_of_a_host_file_save_and_stop_on_sigint(configuration: str, tmp_path: Path, mark: str) -> None:
    run = tmp_path / "run"
    hosts = tmp_path / "hosts"
    hosts.write_text("localhost slots=2\n")
    process = start_training(mark, *MPIRUN, "--hostfile", str(hosts), configuration=configuration, run=run)
    process.send_signal(signal.SIGINT)
    code, _, err = finish(process)
    assert code == ExitCode.STOPPED, err
