"""What the launcher has said, read from its environment."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest

from dist_train.cluster import horovod, inspection, launch, rendezvous
from dist_train.cluster.communicator import SingleProcess
from dist_train.cluster.elastic_launch import launch_elastic
from dist_train.cluster.launch import MEMBERSHIP_VARIABLE, Launch, StoreAddress, current_launch, engine_of
from dist_train.cluster.local_launch import Ranks
from dist_train.cluster.membership import Elasticity
from dist_train.cluster.torch_engine import TorchCommunicator
from dist_train.config.sections import Engine
from dist_train.outcome import UsageError
from dist_train.rundir.status import StatusFile, read_status
from tests.raising import raises
from tests.waiting import PATIENCE, wait_for

ROOT = Path(__file__).parents[2]

MPIRUN = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3"}
SRUN = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "8", "SLURM_NTASKS": "8"}
HOROVODRUN = {"HOROVOD_SIZE": "2", "HOROVOD_RANK": "1"}
STEP = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "n[03-05,7],x"}
FIRST_TASK = {"SLURM_NODEID": "0", "SLURM_LOCALID": "0"}
STEP_STORE = StoreAddress("n03", 18719, "dist_train.7.0")
STORE_OF_SCRIPT = StoreAddress("n03", 23054, "dist_train.7.0.6f0a")
NAMED_STORE = StoreAddress("ib0", 99, "dist_train.7.0")
TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "MASTER_ADDR": "n1",
    "MASTER_PORT": "29400",
    "TORCHELASTIC_RUN_ID": "r",
    "TORCHELASTIC_RESTART_COUNT": "2",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
}
OURS = {
    "RANK": "0",
    "WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "4711",
    "DIST_TRAIN_LISTEN_FD": "5",
}
ENV = {"RANK": "5", "WORLD_SIZE": "8", "MASTER_ADDR": "job-master-0", "MASTER_PORT": "23456"}
STORE_OF_TORCHRUN = StoreAddress("n1", 29400, "dist_train.r.2")
STORE_OF_OURS = StoreAddress("127.0.0.1", 4711, "dist_train..0", serves=True, listen_fd=5)
STORE_OF_ENV = StoreAddress("job-master-0", 23456, "dist_train..0")
SHELL = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}
BATCH_SCRIPT = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}


@pytest.mark.parametrize(
    ("environment", "launch"),
    [
        ({}, Launch("alone", 1, 0)),
        (MPIRUN, Launch("mpirun", 4, 3)),
        (HOROVODRUN, Launch("horovodrun", 2, 1)),
        (SRUN, Launch("srun", 8, 2)),
        ({**SRUN, **STEP}, Launch("srun", 8, 2, STEP_STORE)),
        ({**SRUN, **STEP, "MASTER_ADDR": "ib0", "MASTER_PORT": "99"}, Launch("srun", 8, 2, NAMED_STORE)),
        ({**SRUN, **STEP, "DIST_TRAIN_LAUNCH": "6f0a"}, Launch("srun", 8, 2, STORE_OF_SCRIPT)),
        # where Slurm orders ranks by the network's topology
        ({**SRUN, **STEP, **FIRST_TASK}, Launch("srun", 8, 2, replace(STEP_STORE, serves=True))),
        ({**SRUN, **STEP, **FIRST_TASK, "SLURM_NODEID": "1", "SLURM_PROCID": "0"}, Launch("srun", 8, 0, STEP_STORE)),
        (TORCHRUN, Launch("torchrun", 4, 3, STORE_OF_TORCHRUN)),
        (OURS, Launch("dist-train launch", 2, 0, STORE_OF_OURS)),
        (ENV, Launch("env://", 8, 5, STORE_OF_ENV)),
        ({**ENV, "RANK": "0"}, Launch("env://", 8, 0, replace(STORE_OF_ENV, serves=True))),
        ({**TORCHRUN, "RANK": "0"}, Launch("torchrun", 4, 0, STORE_OF_TORCHRUN)),
        ({**ENV, **MPIRUN}, Launch("mpirun", 4, 3)),
        ({"RANK": "0", "WORLD_SIZE": "1"}, Launch("alone", 1, 0)),
        ({"WORLD_SIZE": "8"}, Launch("alone", 1, 0)),
        # mpirun and horovodrun within a Slurm job see its variables too
        ({**SRUN, **MPIRUN}, Launch("mpirun", 4, 3)),
        ({**SRUN, **HOROVODRUN}, Launch("horovodrun", 2, 1)),
        # torchrun started by srun or mpirun, once on each node
        ({**SRUN, **TORCHRUN}, Launch("torchrun", 4, 3, STORE_OF_TORCHRUN)),
        ({**MPIRUN, **TORCHRUN}, Launch("torchrun", 4, 3, STORE_OF_TORCHRUN)),
        # within an interactive step
        ({**SHELL, **ENV}, Launch("env://", 8, 5, STORE_OF_ENV)),
        ({**SHELL, **ENV, "PMI_SIZE": "8"}, Launch("env://", 8, 5, STORE_OF_ENV)),
        ({**SHELL, "RANK": "0", "WORLD_SIZE": "1"}, Launch("srun", 1, 0)),
        ({**SHELL, "WORLD_SIZE": "8"}, Launch("srun", 1, 0)),
        ({**SRUN, "RANK": "0", "WORLD_SIZE": "2"}, Launch("srun", 8, 2)),
        ({**SRUN, "PMI_SIZE": "1"}, Launch("srun", 8, 2)),  # of the shell that has called srun
        (BATCH_SCRIPT, Launch("alone", 1, 0)),
        ({**BATCH_SCRIPT, **HOROVODRUN}, Launch("horovodrun", 2, 1)),
        ({**MPIRUN, "HOROVOD_CONTROLLER": "mpi"}, Launch("mpirun", 4, 3)),
    ],
)
def test_each_launcher_is_known_by_its_variables(environment: dict[str, str], launch: Launch) -> None:
    assert current_launch(environment) == launch


@pytest.mark.parametrize("name", ["PMI_SIZE", "MV2_COMM_WORLD_SIZE"])
def test_ranks_of_another_mpi_do_not_train_alone(name: str) -> None:
    with raises(UsageError, "launcher-unsupported"):
        current_launch({name: "4"})
    assert current_launch({name: "1"}).launcher == "alone"
    for step in (SHELL, SRUN):  # which mpirun itself runs in, or has started on each node
        with raises(UsageError, "launcher-unsupported"):
            current_launch({name: "4", **step, **STEP})
    assert current_launch({name: "8", **SRUN, **STEP}).launcher == "srun"  # with --mpi=pmi2
    assert current_launch({name: "4", **TORCHRUN}).launcher == "torchrun"


@pytest.mark.parametrize("missing", ["MASTER_ADDR", "MASTER_PORT"])
def test_ranks_that_cannot_meet_do_not_train_alone(missing: str) -> None:
    with raises(UsageError, "launch-variables"):
        current_launch({name: value for name, value in ENV.items() if name != missing})


@pytest.mark.parametrize(
    "environment",
    [
        {**ENV, "RANK": "$(INDEX)"},
        {**ENV, "RANK": "8"},
        {**ENV, "RANK": "-1"},
        {**ENV, "WORLD_SIZE": "two"},
        {**ENV, "MASTER_PORT": "tcp://10.0.0.1:80"},
        {**ENV, "MASTER_PORT": "65536"},
        {**TORCHRUN, "MASTER_PORT": "70000"},
        {**SRUN, **STEP, "MASTER_PORT": "auto"},
    ],
)
def test_variables_that_are_no_ranks_and_no_port_are_refused(environment: dict[str, str]) -> None:
    with raises(UsageError, "launch-variables"):
        current_launch(environment)


_LAUNCHER = """
import os, signal, sys
from pathlib import Path
from dist_train.cluster import local_launch

run = Path(sys.argv[1])
if len(sys.argv) == 2:  # a rank
    from dist_train.rundir.status import StatusFile
    StatusFile(run / "status.json", 2).change("running", step=7)
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit(local_launch.launch_ranks([sys.executable, __file__, str(run)], 2, run))
"""


def test_launcher_records_that_all_ranks_are_lost(tmp_path: Path) -> None:
    script = tmp_path / "launcher.py"
    script.write_text(_LAUNCHER)
    ended = subprocess.run([sys.executable, script, tmp_path, "launch"], timeout=PATIENCE, cwd=ROOT, check=False)
    assert ended.returncode == 1
    status = read_status(tmp_path / "status.json")
    assert status is not None
    assert (status.state, status.step, status.exit_code) == ("failed", 7, 1)
    assert "was killed by SIGKILL" in status.reason


@pytest.mark.parametrize(("ends", "code", "first"), [(("exit 1", "exit 2"), 2, 1), (("exit 1", "kill -9 $$"), 1, 1)])
def test_a_rank_that_ended_because_another_had_failed_is_not_the_first(
    ends: Sequence[str], code: int, first: int, tmp_path: Path
) -> None:
    StatusFile(tmp_path / "status.json", 2).change("running")
    processes = [subprocess.Popen(["sh", "-c", end]) for end in ends]
    for process in processes:  # both, before the launcher looks
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert Ranks(processes).wait_and_record(tmp_path, "") == code
    status = read_status(tmp_path / "status.json")
    assert status is not None
    assert f"rank {first} (process {processes[first].pid})" in status.reason


_UNSTOPPABLE = """
import os, signal, sys, time
from dist_train.cluster import local_launch

if len(sys.argv) > 1:  # a rank, without a handler, as of `landscape`
    os.kill(os.getppid(), signal.SIGINT)
    time.sleep(1000)
sys.exit(local_launch.launch_ranks([sys.executable, __file__, "rank"], 2, saves=False))
"""


def test_ranks_that_do_not_save_end_at_the_first_request(tmp_path: Path) -> None:
    script = tmp_path / "launcher.py"
    script.write_text(_UNSTOPPABLE)
    ended = subprocess.run([sys.executable, script], timeout=PATIENCE, cwd=ROOT, check=False)
    assert ended.returncode == 1


@pytest.mark.parametrize("name", ["HOROVOD_CONTROLLER", "HOROVOD_CPU_OPERATIONS"])
@pytest.mark.parametrize("value", ["gloo", "GLOO"])
def test_gloo_under_mpirun_is_refused_with_the_fix(name: str, value: str) -> None:
    with raises(UsageError, "gloo-under-mpirun"):
        current_launch({**MPIRUN, name: value})
    assert current_launch({**HOROVODRUN, name: value}).launcher == "horovodrun"


@pytest.mark.parametrize("environment", [{}, {**SRUN, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}])
def test_a_single_process_is_alone_without_horovod(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]
) -> None:
    monkeypatch.setattr(rendezvous, "current_launch", lambda: current_launch(environment))
    comm = rendezvous.join_ranks(timeout=1.0, device_type="cpu")
    assert isinstance(comm, SingleProcess)
    assert (comm.rank, comm.size, comm.backend) == (0, 1, "alone")


def _refused_launcher() -> None:
    with suppress(UsageError):
        launch_elastic(["train"], 0, Elasticity(1, 1, 1, 0, 1.0), Path("unused"), ("192.0.2.77", 0))


@pytest.mark.parametrize("start", [lambda: rendezvous.join_ranks(timeout=1.0, device_type="cpu"), _refused_launcher])
def test_connections_to_a_thousand_ranks_do_not_meet_a_shell_s_limit_of_open_files(start: Callable[[], object]) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (512, hard))
    try:
        start()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (min(hard, 1 << 16) if hard > 0 else 1 << 16, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_rank_on_a_gpu_joins_no_elastic_run_with_an_old_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    # As under a launcher of another node, which may have found another torch or no GPU.
    monkeypatch.setenv(MEMBERSHIP_VARIABLE, "127.0.0.1:9")
    monkeypatch.setattr(inspection, "installed_version", lambda package: "2.9.1")
    with raises(UsageError, "torch-too-old"):
        rendezvous.join_ranks(timeout=1.0, device_type="cuda")


def test_the_process_s_own_environment_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "5")
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "4")
    assert current_launch() == Launch("mpirun", 5, 4)


def test_ranks_that_do_not_meet_are_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rendezvous, "current_launch", lambda: Launch("mpirun", 3, 0))
    ended = threading.Event()
    monkeypatch.setattr(rendezvous, "end_process", ended.set)
    with rendezvous.rendezvous_within(0.05):
        assert ended.wait(PATIENCE)
    assert "[ranks-cannot-meet]" in capsys.readouterr().err


@pytest.mark.parametrize(("launcher", "engine"), [("env://", "auto"), ("srun", "torch"), ("srun", "horovod")])
def test_ranks_that_do_not_meet_name_the_place_where_those_of_torch_look_for_rank_0(
    launcher: str, engine: Engine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    launch = Launch(launcher, 3, 0, StoreAddress("no-such-node", 29500))
    monkeypatch.setattr(rendezvous, "current_launch", lambda: launch)
    ended = threading.Event()
    monkeypatch.setattr(rendezvous, "end_process", ended.set)
    with rendezvous.rendezvous_within(0.05, engine=engine):
        assert ended.wait(PATIENCE)
    assert ("no-such-node:29500" in capsys.readouterr().err) is (engine != "horovod")


def test_ranks_that_do_not_meet_end_without_a_terminal_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "current_launch", lambda: Launch("mpirun", 3, 0))
    monkeypatch.setattr("sys.stderr", Mock(write=Mock(side_effect=OSError(errno.EIO, "Input/output error"))))
    ended = threading.Event()
    monkeypatch.setattr(rendezvous, "end_process", ended.set)
    with rendezvous.rendezvous_within(0.05):
        assert ended.wait(PATIENCE)


def test_ranks_that_have_met_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "current_launch", lambda: Launch("mpirun", 3, 0))
    before = set(threading.enumerate())
    with rendezvous.rendezvous_within(PATIENCE):
        assert set(threading.enumerate()) - before
    wait_for(lambda: set(threading.enumerate()) <= before, "the end of its clock")


@pytest.mark.parametrize(
    ("device", "launcher", "micro_batches", "milliseconds"),
    [
        ("cpu", "horovodrun", 1, "5"),
        ("cpu", "mpirun", 1, "1"),
        ("cpu", "mpirun", 32, "5"),
        ("cuda", "horovodrun", 1, "1"),
        ("cuda", "srun", 32, "1"),
    ],
)
def test_horovod_takes_turns_at_the_device_s_pace_and_copies_integers_whole(
    device: str, launcher: str, micro_batches: int, milliseconds: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment: dict[str, str] = {"HOROVOD_BATCH_D2D_MEMCOPIES": "1"}
    monkeypatch.setattr(os, "environ", environment)
    horovod.set_environment(60.0, device, launcher, micro_batches)
    assert environment["HOROVOD_CYCLE_TIME"] == milliseconds
    assert environment["HOROVOD_BATCH_D2D_MEMCOPIES"] == "0"
    environment["HOROVOD_CYCLE_TIME"] = "0.5"
    horovod.set_environment(60.0, device, launcher, micro_batches)
    assert environment["HOROVOD_CYCLE_TIME"] == "0.5"


@pytest.mark.parametrize(
    ("launcher", "asked", "has_horovod", "engine"),
    [
        ("horovodrun", "auto", True, "horovod"),
        ("mpirun", "auto", True, "horovod"),
        ("torchrun", "auto", True, "torch"),
        ("dist-train launch", "auto", True, "torch"),
        ("srun", "auto", True, "horovod"),
        ("srun", "auto", False, "torch"),
        ("srun", "torch", True, "torch"),
        ("torchrun", "horovod", True, "horovod"),
    ],
)
def test_the_engine_follows_the_launcher_unless_it_is_named(
    launcher: str, asked: Engine, has_horovod: bool, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "is_installed", lambda module: has_horovod)
    assert engine_of(launcher, asked) == engine


@pytest.mark.parametrize(
    ("launcher", "advice"),
    [
        ("srun", "set comm.engine=torch"),
        ("torchrun", "leave comm.engine=horovod out"),
        ("horovodrun", "dist-train doctor"),
    ],
)
def test_where_horovod_does_not_see_the_ranks_the_advice_fits_the_launcher(
    launcher: str, advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = Mock(size=lambda: 1)
    for name, module in (("horovod", Mock(torch=library)), ("horovod.torch", library)):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(horovod, "set_environment", Mock())
    with raises(UsageError, "rank-count") as caught:
        horovod.HorovodCommunicator(Launch(launcher, 8, 0), timeout=5.0, device_type="cpu", timeline=False)
    assert advice in str(caught.value)


@pytest.mark.parametrize("launcher", ["mpirun", "horovodrun"])
def test_torch_is_refused_where_the_launcher_names_no_place_to_meet(launcher: str) -> None:
    with raises(UsageError, "launcher-unsupported"):
        TorchCommunicator(Launch(launcher, 2, 0), timeout=5.0, device_type="cpu")
