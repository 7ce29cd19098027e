"""`dist-train launch`: exit codes, requests to stop, killed ranks; and torchrun."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

from dist_train.cluster.communicator import RankLostError
from dist_train.cluster.launch import Launch, StoreAddress
from dist_train.cluster.torch_engine import TorchCommunicator
from dist_train.outcome import ExitCode
from tests.launching import (
    command,
    descendants,
    environment,
    kill,
    launch,
    mostly_lengthy,
    process_of_rank,
    small_settings,
    start,
    status,
    train_alone,
    train_ranks,
    wait_for_ends,
    weights_digest,
    write_config,
)
from tests.services.servers import free_port
from tests.waiting import PATIENCE, wait_for, wait_for_lines, wait_until_gone

pytestmark = pytest.mark.ranks

ENDLESS = small_settings(run={"epochs": 5000}, evaluation={"every_epochs": 0}, checkpoint={"every_epochs": 0})


@pytest.fixture
def running(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    process = start(2, "torch", "train", write_config(tmp_path, ENDLESS), "--run-dir", str(tmp_path / "run"))
    try:
        wait_for_lines(tmp_path / "run/metrics.jsonl", 4)
        yield process
    finally:
        kill(process)


def wait_for_end(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Wait for the end of the launcher and all its processes; return exit code and output."""
    left = descendants(process.pid)
    try:
        output, _ = process.communicate(timeout=PATIENCE)
        wait_until_gone(left)
    finally:
        kill(process)
    return process.returncode, output


@pytest.mark.parametrize("number", mostly_lengthy([signal.SIGINT, signal.SIGHUP, signal.SIGUSR2], keep=2))
def test_signal_to_the_launcher_saves_and_stops_ranks_of_one_launch_id(
    running: subprocess.Popen[str], tmp_path: Path, number: signal.Signals
) -> None:
    environments = [Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") for pid in descendants(running.pid)[:2]]
    ids = {variable for each in environments for variable in each if variable.startswith(b"DIST_TRAIN_LAUNCH=")}
    assert (len(environments), len(ids)) == (2, 1)
    running.send_signal(number)
    code, output = wait_for_end(running)
    assert code == ExitCode.STOPPED, output
    after = status(tmp_path / "run")
    assert (after["state"], after["exit_code"]) == ("stopped", ExitCode.STOPPED)
    assert (tmp_path / f"run/checkpoints/step-{after['step']:08d}.pt").exists()


def test_launcher_that_cannot_print_saves_and_stops_ranks(tmp_path: Path) -> None:
    words = "train", write_config(tmp_path, ENDLESS), "--run-dir", str(tmp_path / "run")
    with Path("/dev/full").open("w") as full:
        process = subprocess.Popen(command(2, "torch", *words), env=environment(), stdout=full, stderr=full)
    try:
        wait_for_lines(tmp_path / "run/metrics.jsonl", 4)
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == ExitCode.STOPPED
    finally:
        kill(process)
    assert status(tmp_path / "run")["state"] == "stopped"


def test_signal_during_start_up_stops_the_ranks(tmp_path: Path) -> None:
    process = start(2, "torch", "train", write_config(tmp_path, ENDLESS), "--run-dir", str(tmp_path / "run"))
    try:
        wait_for(lambda: process.poll() is not None or len(descendants(process.pid)) >= 2)
        process.send_signal(signal.SIGTERM)
        code, output = wait_for_end(process)
    finally:
        kill(process)
    assert code == ExitCode.STOPPED, output


def test_closed_terminal_does_not_stop_a_launch_under_nohup(tmp_path: Path) -> None:
    words = ("launch", "-np", "1", "train", write_config(tmp_path, ENDLESS), "--run-dir", str(tmp_path / "run"))
    program = ("-c", "import os, sys; os.execvp('nohup', ['nohup', sys.executable, '-m', 'dist_train', *sys.argv[1:]])")
    process = start(1, "alone", *words, program=program)
    try:
        wait_for_lines(tmp_path / "run/metrics.jsonl", 4)
        process.send_signal(signal.SIGHUP)
        wait_for_lines(tmp_path / "run/metrics.jsonl", 40)
        process.send_signal(signal.SIGTERM)
        code, output = wait_for_end(process)
        assert code == ExitCode.STOPPED, output
        assert "SIGHUP" not in status(tmp_path / "run")["reason"]
    finally:
        kill(process)


def test_plugin_threads_do_not_receive_the_launcher_signals(tmp_path: Path) -> None:
    plugin = tmp_path / "threads.py"
    plugin.write_text(
        "import threading, time\n"
        "from dist_train.optim.noise import SmoothOut as Method\n"
        "threading.Thread(target=time.sleep, args=(1e6,), daemon=True).start()\n"
    )
    settings = {**ENDLESS, "noise": {**ENDLESS["noise"], "method": f"{plugin}:Method"}}
    words = "train", write_config(tmp_path, settings), "--run-dir", str(tmp_path / "run")
    process = start(1, "torch", "--restarts", "1", *words)
    try:
        wait_for_lines(tmp_path / "run/metrics.jsonl", 4)
        process.send_signal(signal.SIGUSR2)
        code, output = wait_for_end(process)
    finally:
        kill(process)
    assert code == ExitCode.STOPPED, output


def test_second_signal_ends_hanging_ranks(running: subprocess.Popen[str]) -> None:
    for pid in descendants(running.pid):
        os.kill(pid, signal.SIGSTOP)
    running.send_signal(signal.SIGTERM)
    assert running.stdout is not None
    assert any("asked to stop" in line for line in running.stdout)
    time.sleep(2)  # a second signal within 2 s counts as the same request
    running.send_signal(signal.SIGTERM)
    code, output = wait_for_end(running)
    assert code == ExitCode.FAULT, output


def test_killed_rank_is_named_and_ends_the_launch_with_1(running: subprocess.Popen[str], tmp_path: Path) -> None:
    pid = process_of_rank(running.pid, 1)
    os.kill(pid, signal.SIGKILL)
    code, output = wait_for_end(running)
    assert code == ExitCode.FAULT
    after = status(tmp_path / "run")
    assert after["state"] == "failed"
    assert after["reason"].startswith("rank 1 (")
    assert f"process {pid})" in output
    assert "[rank-lost]" in output
    assert "SIGKILL" in output


def test_status_names_a_killed_rank_that_another_than_rank_0_notices_first(tmp_path: Path) -> None:
    process = start(3, "torch", "train", write_config(tmp_path, ENDLESS), "--run-dir", str(tmp_path / "run"))
    try:
        wait_for_lines(tmp_path / "run/metrics.jsonl", 4)
        os.kill(process_of_rank(process.pid, 2), signal.SIGKILL)
        code, output = wait_for_end(process)
    finally:
        kill(process)
    assert code == ExitCode.FAULT, output
    assert status(tmp_path / "run")["reason"].startswith("rank 2 ("), output


@pytest.mark.parametrize("ending", ["kill -KILL $$", "kill -35 $$", "exit 1"])
def test_launcher_learns_how_ranks_end_where_sigchld_is_ignored(ending: str) -> None:
    lines = f"""
import signal
from dist_train.cluster.local_launch import launch_ranks
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
raise SystemExit(launch_ranks(["sh", "-c", {ending!r}], 2))
"""
    ended = subprocess.run([sys.executable, "-c", lines], env=environment(), capture_output=True, text=True)
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr
    assert ("was killed by signal 35" in ended.stderr) is ("35" in ending)


def test_a_rank_that_dies_while_rank_0_waits_for_a_last_scrape_does_not_change_the_exit_code(tmp_path: Path) -> None:
    diverged = tmp_path / "status.json"
    rank_0 = f"""
import time
from pathlib import Path
from dist_train.outcome import ExitCode
from dist_train.rundir.status import StatusFile
StatusFile(Path({str(diverged)!r}), 2).end("failed", ExitCode.DIVERGED, "")
time.sleep(1.0)
raise SystemExit(ExitCode.DIVERGED)
"""
    (tmp_path / "rank_0.py").write_text(rank_0)
    ranks = f"""
        [ "$RANK" != 0 ] || exec "{sys.executable}" "{tmp_path}/rank_0.py"
        until [ -e "{diverged}" ]; do sleep 0.05; done
        kill -KILL $$
    """
    lines = f"""
from pathlib import Path
from dist_train.cluster.local_launch import launch_ranks
raise SystemExit(launch_ranks(["sh", "-c", {ranks!r}], 2, Path({str(tmp_path)!r})))
"""
    ended = subprocess.run([sys.executable, "-c", lines], env=environment(), capture_output=True, text=True)
    assert ended.returncode == ExitCode.DIVERGED, ended.stderr
    assert "rank 1 " in ended.stderr


def test_stopped_rank_does_not_delay_the_end_of_the_launch(running: subprocess.Popen[str]) -> None:
    first, second = sorted(descendants(running.pid))
    started = time.monotonic()
    os.kill(first, signal.SIGSTOP)
    os.kill(second, signal.SIGKILL)
    code, output = wait_for_end(running)
    assert code == ExitCode.FAULT, output
    assert time.monotonic() - started < 40, output  # so long the launcher waits for ranks that may end by themselves


def test_ranks_die_with_their_launcher(running: subprocess.Popen[str]) -> None:
    ranks = descendants(running.pid)
    running.kill()
    wait_until_gone(ranks)
    kill(running)


UPLOADS = """
import time
from pathlib import Path
from dist_train import Observer

class Uploads(Observer):
    def __init__(self, directory):
        self.done = Path(directory, "uploaded")

    def end(self, outcome):
        while not self.done.exists():
            time.sleep(0.05)
"""


def test_a_rank_that_dies_after_the_run_has_finished_changes_nothing(tmp_path: Path) -> None:
    """Rank 0 may still wait for a last scrape, or for a tracker."""
    (tmp_path / "uploads.py").write_text(UPLOADS)
    logger = {"loggers": [{"name": f"{tmp_path / 'uploads.py'}:Uploads"}]}
    config, run = write_config(tmp_path, small_settings(run={"max_steps": 2}, metrics=logger)), tmp_path / "run"
    process = start(2, "torch", "train", config, "--run-dir", str(run))
    try:
        wait_for(lambda: (run / "status.json").exists() and status(run)["state"] == "finished")
        lost = process_of_rank(process.pid, 1)
        os.kill(lost, signal.SIGKILL)
        wait_until_gone([lost])
        (run / "uploaded").touch()
        code, output = wait_for_end(process)
    finally:
        kill(process)
    assert code == ExitCode.FINISHED, output
    assert "[rank-lost]" not in output
    assert status(run)["exit_code"] == ExitCode.FINISHED


@pytest.mark.parametrize(
    ("settings", "code"),
    [
        ({"noise": {"amplitude": -1}}, ExitCode.USAGE),
        ({"optimizer": {"learning_rate": 1e30}}, ExitCode.DIVERGED),
        ({"comm": {"reduction": "float", "op": "adasum"}}, ExitCode.USAGE),
    ],
)
def test_exit_code_is_that_of_the_ranks(tmp_path: Path, settings: dict[str, dict[str, object]], code: int) -> None:
    config = write_config(tmp_path, small_settings(**settings))
    result = launch(2, "torch", "train", config, "--run-dir", str(tmp_path / "run"))
    assert result.code == code, result.output
    assert "Traceback" not in result.output


def test_torchrun_is_bit_identical_to_one_rank(tmp_path: Path) -> None:
    config = write_config(tmp_path, small_settings(run={"max_steps": 5}))
    train_alone(config, tmp_path / "alone")
    train_ranks(2, "torchrun", config, tmp_path / "torchrun")
    assert weights_digest(tmp_path / "torchrun") == weights_digest(tmp_path / "alone")


@pytest.mark.parametrize("launcher", ["srun", "env://"])
def test_its_variables_suffice_to_start_ranks(tmp_path: Path, launcher: str) -> None:
    config = write_config(tmp_path, small_settings(run={"max_steps": 5}))
    train_alone(config, tmp_path / "alone")
    if launcher == "srun":
        # not that of another session of tests on this machine: the port where the ranks meet is derived from it
        step = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2"}
        step |= {"SLURM_STEP_NODELIST": "localhost", "SLURM_NODEID": "0"}
        # the first task of the first node is not rank 0: Slurm may number them by the network's topology
        variables = [{**step, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(1 - rank)} for rank in range(2)]
    else:
        shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
        variables = [{**shared, "RANK": str(rank)} for rank in range(2)]
    command = ("train", config, "comm.engine=torch", "--run-dir", str(tmp_path / "run"))
    ended = wait_for_ends(*(start(1, "alone", *command, extra=each) for each in variables))
    assert [each.code for each in ended] == [0, 0], ended
    assert weights_digest(tmp_path / "run") == weights_digest(tmp_path / "alone")


def test_a_run_directory_on_the_disk_of_one_node_ends_all_ranks_with_its_name(tmp_path: Path) -> None:
    command = ("train", write_config(tmp_path, small_settings()), "--run-dir")
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
    folders = [tmp_path / f"disk{rank}/run" for rank in range(2)]
    tasks = [start(1, "alone", *command, str(folders[rank]), extra={**shared, "RANK": str(rank)}) for rank in range(2)]
    ended = wait_for_ends(*tasks)
    assert [each.code for each in ended] == [ExitCode.FAULT, ExitCode.FAULT], ended
    assert str(folders[1]) in ended[1].output
    assert "[run-directory-not-shared]" in ended[1].output
    assert "rank 1" in status(folders[0])["reason"]


@pytest.mark.parametrize(
    ("launcher", "engine"), mostly_lengthy([("mpi", "horovod"), ("torchrun", "torch"), ("env://", "torch")])
)
def test_script_trains_and_evaluates_repeatedly(tmp_path: Path, launcher: str, engine: str) -> None:
    config = write_config(tmp_path, small_settings(run={"max_steps": 2}, evaluation={"every_epochs": 0}))
    script = tmp_path / "script.py"
    script.write_text(f"""
import dist_train
if __name__ == "__main__":
    for number in range(3):
        overrides = ["comm.engine={engine}", f"run.profile_steps={{number // 2}}"]
        dist_train.train(dist_train.load_config({str(config)!r}, overrides), f"{tmp_path}/run{{number}}")
        loss = dist_train.load_run(f"{tmp_path}/run{{number}}").evaluate()["loss"]
        print(f"final loss {{loss}};")
""")
    if launcher != "env://":
        tasks = [start(2, launcher, program=[str(script)])]
    else:
        shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
        tasks = [start(1, "alone", extra={**shared, "RANK": str(rank)}, program=[str(script)]) for rank in range(2)]
    ended = wait_for_ends(*tasks)
    assert [each.code for each in ended] == [0] * len(tasks), ended
    losses = re.findall(r"final loss [0-9.]+;", "".join(each.output for each in ended))  # two ranks' lines may be mixed
    assert len(losses) == 6
    assert len(set(losses)) == 1


def test_local_script_uses_torch_gloo_by_default(tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "launch/local.sh"
    config = write_config(tmp_path, small_settings(run={"max_steps": 2}))
    command = [str(script), "-np", "2", "train", config, "--run-dir", str(tmp_path / "run")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert result.returncode == 0, result.stderr
    assert "2 ranks (torch-gloo)" in result.stdout


def test_rank_lost_during_the_rendezvous_raises_rank_lost_error() -> None:
    server = """
import torch.distributed as dist
store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
print(store.port, flush=True)
dist.PrefixStore("dist_train", store).wait(["here"])
"""
    with subprocess.Popen([sys.executable, "-c", server], stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        address = StoreAddress("127.0.0.1", int(first.stdout.readline()))
        dist.PrefixStore(address.prefix, dist.TCPStore(address.host, address.port)).set("here", "1")
        with pytest.raises(RankLostError):
            TorchCommunicator(Launch("test", 2, 1, address), timeout=PATIENCE, device_type="cpu")
    assert first.returncode == 0
