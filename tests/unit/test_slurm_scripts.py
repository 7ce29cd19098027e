"""The batch scripts as far as they go without Slurm: the command that starts the ranks, messages, help."""

from __future__ import annotations

import fcntl
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path

import pytest

from dist_train.cli.main import main
from dist_train.outcome import ExitCode
from dist_train.rundir.status import StatusFile
from tests.programs import write_programs
from tests.unit.studies import finish_run, small_plan, write_study

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(path.name for path in (ROOT / "slurm").glob("*.sh") if path.name != "prologue.sh")
TWO_NODES = {"SLURM_JOB_ID": "17", "SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_ON_NODE": "32"}
SETTLED = {**TWO_NODES, "MPI": "pmix"}
"""As `TWO_NODES`, and how srun starts the ranks, for which the scripts else start our program: it takes a while."""


def start(script: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LD_LIBRARY_PATH") if name in os.environ}
    return subprocess.run(
        [str(ROOT / "slurm" / script), *arguments],
        env={**kept, "DIST_TRAIN_PYTHON": sys.executable, **variables},
        capture_output=True,
        text=True,
    )


def command_of(**variables: str) -> str:
    ended = start("lb_8192.sh", DRY_RUN="1", **{**SETTLED, **variables})
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def assert_contains(command: str, *words: str) -> None:
    given = shlex.split(command)
    begin = given.index(words[0])
    assert given[begin : begin + len(words)] == [*words]


@pytest.fixture
def programs(tmp_path: Path) -> str:
    """A PATH with stand-ins for what this machine may lack; none of them is started."""
    write_programs(tmp_path, srun="exit 1", apptainer="exit 1", mpirun="exit 1")
    return f"{tmp_path}:{os.environ['PATH']}"


def test_one_rank_for_each_gpu(programs: str) -> None:
    command = command_of(PATH=programs, SLURM_GPUS_ON_NODE="8", MPI="")
    assert command.startswith("srun --mpi=pmix --nodes=2 --ntasks=16 --ntasks-per-node=8 --cpus-per-task=4 ")
    assert " --gpus-per-node=8 " in command
    program = (sys.executable, "-m", "dist_train", "train", f"{ROOT}/configs/lb_8192.yaml")
    assert_contains(command, f"{ROOT}/launch/rank.sh", *program)


def test_ranks_of_one_task_share_its_cores(programs: str) -> None:
    variables = {"SLURM_NTASKS": "2", "SLURM_CPUS_PER_TASK": "4", "SLURM_CPUS_ON_NODE": "4"}
    command = command_of(PATH=programs, RANKS_PER_NODE="2", **variables)
    assert " --ntasks=4 --ntasks-per-node=2 --cpus-per-task=2 " in command
    assert "--overcommit" not in command


@pytest.mark.parametrize(
    ("cores", "ranks", "each", "overcommits"),
    [("32", 4, 8, False), ("32,8", 4, 2, False), ("8,32(x2)", 4, 2, False), ("32,2", 4, 1, True)],
)
def test_ranks_have_the_cores_of_the_smallest_node(
    programs: str, cores: str, ranks: int, each: int, overcommits: bool
) -> None:
    command = command_of(PATH=programs, RANKS_PER_NODE=str(ranks), SLURM_JOB_CPUS_PER_NODE=cores)
    assert f" --cpus-per-task={each} " in command
    assert ("--overcommit" in command) is overcommits


def test_where_nodes_have_unequal_numbers_of_ranks_the_first_node_s_cores_are_shared(programs: str) -> None:
    tasks = {"SLURM_NTASKS": "5", "SLURM_TASKS_PER_NODE": "4,1"}
    assert " --cpus-per-task=8 " in command_of(PATH=programs, SLURM_JOB_CPUS_PER_NODE="32,8", **tasks)


def test_launchers_of_an_elastic_run_have_the_cores_of_the_smallest_node(programs: str, tmp_path: Path) -> None:
    (tmp_path / "srun").write_text(f'#!/bin/sh\necho "$@" >>{tmp_path}/words\n')
    lines = "read_allocation; count_ranks; find_our_program; set_rank_environment 1\nstart_on_node n1 entrance; wait"
    job = {**TWO_NODES, "SLURM_JOB_CPUS_PER_NODE": "32,8", "RANKS_PER_NODE": "2"}
    ended = start(script_of(tmp_path, lines), PATH=programs, **job)
    assert ended.returncode == 0, ended.stderr
    assert " --cpus-per-task=8 " in (tmp_path / "words").read_text()


@pytest.mark.parametrize(
    "start_ranks", ['"${command[@]}"', "start_on_node n1 entrance; wait", '"${dist_train[@]}" doctor']
)
def test_steps_see_all_gpus_of_a_node_with_any_slurm(programs: str, tmp_path: Path, start_ranks: str) -> None:
    # Slurm before 21.08 refuses --gpu-bind=none.
    (tmp_path / "srun").write_text(f'#!/bin/sh\necho "$@" >>{tmp_path}/words; env >{tmp_path}/variables\n')
    job = {**SETTLED, "SLURM_GPUS_ON_NODE": "2", "SLURM_GPU_BIND": "single:1", "SLURM_TRES_BIND": "gpu:single:1"}
    container = {"CONTAINER": "image"} if "doctor" in start_ranks else {}
    ended = start(script_of(tmp_path, f"prepare_ranks\n{start_ranks}"), PATH=programs, **job, **container)
    assert ended.returncode == 0, ended.stderr
    words = (tmp_path / "words").read_text()
    assert " --gpus-per-node=2 " in words
    assert "--gpu-bind" not in words
    assert "_BIND=" not in (tmp_path / "variables").read_text()


@pytest.mark.parametrize("launcher", ["srun", "mpirun"])
def test_what_the_job_requests_does_not_reach_the_srun_of_the_launcher(
    programs: str, tmp_path: Path, launcher: str
) -> None:
    (tmp_path / launcher).write_text(f"#!/bin/sh\nenv >{tmp_path}/variables\n")
    asked = {"SLURM_GPUS": "4", "SLURM_GPUS_PER_SOCKET": "1", "SLURM_GPUS_PER_TASK": "1", "SLURM_TRES_BIND": "gpu:1"}
    if launcher == "mpirun":  # the other one has an option for it
        asked |= {"SLURM_CPUS_PER_TASK": "4", "SRUN_CPUS_PER_TASK": "4"}  # the latter, sites advise to set
    job = {**SETTLED, "SLURM_GPUS_ON_NODE": "2", "SLURM_NTASKS": "4", **asked}
    lines = f'need_mpirun() {{ mpirun={tmp_path}/mpirun; }}\nprepare_ranks\n"${{command[@]}}"'
    ended = start(script_of(tmp_path, lines), PATH=programs, LAUNCHER=launcher, **job)
    assert ended.returncode == 0, ended.stderr
    variables = (tmp_path / "variables").read_text()
    assert not [name for name in asked if f"{name}=" in variables]


def test_without_gpus_one_rank_for_each_task(programs: str) -> None:
    command = command_of(PATH=programs, SLURM_NTASKS="4", SLURM_TASKS_PER_NODE="2(x2)")
    assert " --ntasks=4 --ntasks-per-node=2 --cpus-per-task=16 " in command
    assert "gpu" not in command


def test_the_variables_are_followed(programs: str) -> None:
    command = command_of(
        PATH=programs,
        RANKS_PER_NODE="3",
        MPI="pmi2",
        OVERRIDES="run.seed=1 run.name=other",
        RUN_DIR="/scratch/run",
        CONFIG="other.yaml",
        CPU_BIND="cores",
        LAUNCHER_OPTIONS="--label --verbose",
    )
    assert command.startswith("srun --mpi=pmi2 --nodes=2 --ntasks=6 ")
    assert " --cpu-bind=cores --label --verbose " in command
    assert " train other.yaml run.seed=1 run.name=other --run-dir /scratch/run" in command


def test_overrides_may_have_quotes_spaces_and_lines(programs: str) -> None:
    command = command_of(PATH=programs, OVERRIDES="run.seed=1\n 'data.root=/my data'\n  run.name=\"a b\"")
    assert shlex.split(command)[-3:] == ["run.seed=1", "data.root=/my data", "run.name=a b"]


def test_tasks_that_do_not_divide_are_started_as_asked(programs: str) -> None:
    assert " --ntasks=5 --ntasks-per-node=3 --cpus-per-task=10 " in command_of(
        PATH=programs, SLURM_NTASKS="5", SLURM_TASKS_PER_NODE="3,2"
    )


def test_of_a_whole_node_only_the_gpus_that_were_asked_for_are_used(programs: str) -> None:
    command = command_of(PATH=programs, SLURM_GPUS_ON_NODE="8", SLURM_GPUS_PER_NODE="a100:2")
    assert " --ntasks=4 --ntasks-per-node=2 " in command
    assert " --gpus-per-node=2 " in command


def with_scontrol(folder: Path, *lines: str) -> None:
    """Write a stand-in that prints `lines`, of `scontrol show job`."""
    text = "".join(f"   {line}\n" for line in lines)
    write_programs(folder, scontrol=f"cat <<'END'\n{text}END")


@pytest.mark.parametrize(
    ("asked", "gpus"),
    [
        *(("gpu:2", 2), ("gres:gpu:2", 2), ("gpu:a100:2", 2), ("gres/gpu:2", 2), ("gres/gpu:a100:2", 2)),
        *(("gres:nvme:1,gpu:2", 2), ("gres/gpu:3g.20gb:2", 2), ("gpu:2,nvme:1", 2), ("gres:nvme:1", 8)),
        *(("gres/gpu", 1), ("gpu", 1), ("gres/gpu:a100", 1), ("gres/gpu:a100:2,gres/gpu:v100:1", 3)),
    ],
)
def test_the_gpus_asked_for_by_gres_are_read_as_any_slurm_spells_them(
    programs: str, tmp_path: Path, asked: str, gpus: int
) -> None:
    with_scontrol(tmp_path, f"TresPerNode={asked}")
    command = command_of(PATH=programs, SLURM_GPUS_ON_NODE="8")
    assert f" --gpus-per-node={gpus} " in command


@pytest.mark.parametrize(
    ("asked", "gpus"),
    [
        *(({"SLURM_GPUS_PER_NODE": "a100"}, 1), ({"SLURM_GPUS_PER_NODE": "a100:2,v100"}, 3)),
        *(({"SLURM_GPUS": "gpu:4"}, 2), ({"SLURM_GPUS": "a100:4,v100:2"}, 3), ({"SLURM_GPUS": "a100,v100"}, 1)),
        ({"SLURM_GPUS_PER_TASK": "a100", "SLURM_NTASKS": "4"}, 2),
    ],
)
def test_gpus_may_be_asked_for_by_type_without_a_number(programs: str, asked: dict[str, str], gpus: int) -> None:
    assert f" --gpus-per-node={gpus} " in command_of(PATH=programs, SLURM_GPUS_ON_NODE="8", **asked)


@pytest.mark.parametrize(
    ("asked", "counts", "is_refused"),
    [
        ({}, (4, 4), False),
        ({}, (4, 2), True),
        ({"SLURM_GPUS_PER_NODE": "2"}, (4, 2), False),
        ({"SLURM_GPUS_PER_NODE": "4"}, (4, 4), False),
        ({"SLURM_GPUS": "6"}, (4, 2), True),
    ],
)
def test_nodes_may_have_more_gpus_than_were_asked_for(
    programs: str, tmp_path: Path, asked: dict[str, str], counts: tuple[int, int], is_refused: bool
) -> None:
    nodes = (f"Nodes=n{node} CPU_IDs=0-3 Mem=0 GRES=gpu:{count}(IDX:0-1)" for node, count in enumerate(counts))
    with_scontrol(tmp_path, *nodes)
    variables = {"PATH": programs, "DRY_RUN": "1", "SLURM_GPUS_ON_NODE": str(counts[0]), **SETTLED, **asked}
    ended = start("lb_8192.sh", **variables)
    assert ended.returncode == (2 if is_refused else 0), ended.stderr


@pytest.mark.parametrize("asked", ["cpu=4", "cpu=2,gres/gpu:a100=1", "gres/gpu=1", "gres/gpu:a100"])
def test_one_gpu_for_each_task_is_allowed_with_any_number_of_cores(programs: str, asked: str) -> None:
    variables = {"SLURM_TRES_PER_TASK": asked, "SLURM_NTASKS": "4", "SLURM_GPUS_ON_NODE": "2"}
    assert " --ntasks=4 --ntasks-per-node=2 " in command_of(PATH=programs, **variables)


@pytest.mark.parametrize(
    "asked",
    [
        {"SLURM_TRES_PER_TASK": "gres/gpu=2", "SLURM_NTASKS": "2"},
        {"SLURM_TRES_PER_TASK": "cpu=1,gres/gpu:a100=11", "SLURM_NTASKS": "2"},
        {"SLURM_GPUS_PER_TASK": "a100:2", "SLURM_NTASKS": "2"},
        {"SLURM_NTASKS_PER_GPU": "2", "SLURM_GPUS": "4", "SLURM_NTASKS": "8"},
        {"SLURM_NTASKS": "9", "SLURM_GPUS": "4"},
    ],
)
def test_what_one_rank_for_each_gpu_is_not_is_refused(programs: str, asked: dict[str, str]) -> None:
    ended = start("lb_8192.sh", PATH=programs, DRY_RUN="1", SLURM_GPUS_ON_NODE="2", **SETTLED, **asked)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert "each rank drives one GPU" in ended.stderr


@pytest.mark.parametrize(("facts", "count"), [("Restarts=0", ""), ("Restarts=1", "1"), ("", "1")])
def test_a_job_submitted_by_one_that_was_restarted_is_itself_not_restarted(
    programs: str, tmp_path: Path, facts: str, count: str
) -> None:
    tasks = f"JobId=16 ArrayJobId=17 Requeue=1 Restarts=0 \nJobId=17 ArrayJobId=17 Requeue=1 {facts} BatchFlag=1"
    write_programs(tmp_path, scontrol=f"echo '{tasks}'")
    lines = 'echo "restart ${SLURM_RESTART_COUNT:-}"'
    ended = start(script_of(tmp_path, lines), PATH=programs, SLURM_RESTART_COUNT="1", **TWO_NODES)
    assert ended.stdout.removeprefix("restart ").strip() == count, ended.stderr


@pytest.mark.parametrize(("facts", "name"), [("JobId=20 JobName=x", "20"), ("JobId=20 ArrayTaskId=7", "19_7")])
def test_a_job_submitted_by_an_array_s_task_does_not_take_its_name(
    programs: str, tmp_path: Path, facts: str, name: str
) -> None:
    write_programs(tmp_path, scontrol=f"echo '{facts} '")
    inherited = {"SLURM_ARRAY_JOB_ID": "19", "SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_COUNT": "9"}
    ended = start(script_of(tmp_path, 'echo "$job"'), PATH=programs, **{**TWO_NODES, "SLURM_JOB_ID": "20"}, **inherited)
    assert ended.stdout.split() == [name], ended.stderr


def test_spare_nodes_stay_idle(programs: str, tmp_path: Path) -> None:
    write_programs(tmp_path, scontrol="echo node1\necho node2")
    command = command_of(PATH=programs, SPARE_NODES="1", SLURM_JOB_NODELIST="node[1-2]", RANKS_PER_NODE="2")
    assert " --nodes=1 --ntasks=2 " in command
    assert " --nodelist=node1 --overlap " in command


def test_a_job_that_slurm_starts_again_on_one_node_has_no_spare_one(programs: str) -> None:
    command = command_of(PATH=programs, SPARE_NODES="1", RANKS_PER_NODE="2", SLURM_JOB_NUM_NODES="1")
    assert " --nodes=1 --ntasks=2 " in command
    assert "--nodelist" not in command


@pytest.mark.parametrize(("engine", "expected"), [("auto", "srun --mpi=none "), ("horovod", "mpirun -np 2 ")])
def test_where_srun_has_no_pmix_others_carry_the_ranks(
    programs: str, tmp_path: Path, engine: str, expected: str
) -> None:
    srun = tmp_path / "srun"
    srun.write_text("#!/bin/sh\nprintf 'MPI plugin types are...\\n\\tnone\\n\\tcray_shasta\\n\\tpmi2\\n'\n")
    command = command_of(PATH=programs, MPI="", OVERRIDES=f"comm.engine={engine}", PYTHONPATH=str(ROOT))
    assert expected in command
    assert ("comm.engine=torch" in command) is (engine == "auto")


def test_an_error_in_the_configuration_is_not_told_as_one_of_mpi(programs: str, tmp_path: Path) -> None:
    write_programs(tmp_path, srun="printf 'MPI plugin types are...\\n\\tnone\\n'")
    ended = start("lb_8192.sh", PATH=programs, OVERRIDES="noise.amplitud=1", **TWO_NODES)
    assert (ended.returncode, "[unknown-key]" in ended.stderr) == (2, True)
    assert "pmix" not in ended.stderr


@pytest.mark.parametrize(
    "listed",
    [
        "srun: MPI types are...\nsrun: none\nsrun: pmi2\nsrun: pmix\nsrun: pmix_v3",
        "MPI plugin types are...\n\tnone\n\tpmi2\n\tpmix\nspecific pmix plugin versions available: pmix_v5",
    ],
    ids=["20.11", "22.05"],
)
def test_pmix_is_found_in_the_list_of_any_slurm(programs: str, tmp_path: Path, listed: str) -> None:
    (tmp_path / "srun").write_text(f"#!/bin/sh\ncat >&2 <<'END'\n{listed}\nEND\n")
    command = command_of(PATH=programs, MPI="", OVERRIDES="comm.engine=horovod", PYTHONPATH=str(ROOT))
    assert command.startswith("srun --mpi=pmix ")


def test_a_run_that_continues_without_lost_nodes_begins_with_the_ranks_of_all(programs: str) -> None:
    command = command_of(PATH=programs, RANKS_PER_NODE="2", MIN_RANKS="1", RUN_DIR="/scratch/run", MAX_RESTARTS="5")
    limits = "--start-with 4 --min-ranks 1 --max-ranks 4 --restarts 5"
    expected = rf".+ -m dist_train launch -np 0 --listen (\S+) {limits} train .+ --run-dir /scratch/run"
    found = re.fullmatch(expected, command.strip())
    assert found is not None, command
    assert not found[1].startswith("127.")


@pytest.mark.parametrize(
    ("of_name", "of_interfaces", "expected"),
    [
        ("10.0.0.1 fd00::1", "10.0.0.2", "10.0.0.1"),
        ("127.0.1.1", "10.0.0.2 fd00::2 ", "10.0.0.2"),
        ("::1 fd00::1", "fe80::2 fd00::2", "fd00::1"),
        ("10.0.0.1", None, "10.0.0.1"),
        ("", "", "n1"),
    ],
)
def test_a_node_has_an_address_that_others_reach(
    programs: str, tmp_path: Path, of_name: str, of_interfaces: str | None, expected: str
) -> None:
    getent = f"printf '%s STREAM\\n' {of_name}" if of_name else "exit 2"
    hostname = "exit 1" if of_interfaces is None else f"echo '{of_interfaces}'"  # GNU's has no -I
    write_programs(tmp_path, getent=getent, hostname=hostname, uname="echo n1")
    ended = start(script_of(tmp_path, "own_address"), PATH=programs, **TWO_NODES)
    assert ended.stdout.split() == [expected], ended.stderr


def test_a_run_that_continues_without_lost_nodes_may_compute_on_gpus(programs: str) -> None:
    command = command_of(PATH=programs, SLURM_GPUS_ON_NODE="2", MIN_RANKS="1", RUN_DIR="/scratch/run")
    assert " --start-with 4 --min-ranks 1 --max-ranks 4 " in command


def test_the_set_up_file_is_sourced_first_whatever_it_does(programs: str, tmp_path: Path) -> None:
    setup = tmp_path / "set up.sh"
    setup.write_text("false\necho $UNSET_BY_THE_SITE >/dev/null\nroot=/elsewhere\nexport OVERRIDES=run.seed=7\n")
    command = command_of(PATH=programs, DIST_TRAIN_SETUP=str(setup))
    assert f" {ROOT}/launch/rank.sh " in command
    assert " run.seed=7" in command


def test_the_set_up_file_does_not_take_a_rank_s_arguments_for_its_own(tmp_path: Path) -> None:
    setup = tmp_path / "setup.sh"
    setup.write_text("echo $# arguments\nset -- others\n")
    variables = {**os.environ, "OMPI_COMM_WORLD_RANK": "0", "DIST_TRAIN_SETUP": str(setup)}
    command = [str(ROOT / "launch/rank.sh"), "printf", "%s\n", "two words"]
    ended = subprocess.run(command, env=variables, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (0, "0 arguments\ntwo words\n"), ended.stderr


def test_mpirun_gets_what_ranks_on_other_nodes_need(programs: str) -> None:
    given = {"NETWORK_INTERFACE": "ib0", "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    command = command_of(PATH=programs, LAUNCHER="mpirun", RANKS_PER_NODE="2", **given)
    assert "mpirun -np 4 --map-by ppr:2:node:OVERSUBSCRIBE --bind-to none --stdin none " in command
    variables = "DIST_TRAIN_LAUNCH", "OMP_NUM_THREADS", "NCCL_SOCKET_IFNAME", "HOROVOD_GLOO_IFACE", "PATH"
    for name in (*variables, "PYTORCH_CUDA_ALLOC_CONF"):
        assert f" -x {name} " in command


def test_ranks_communicate_over_the_interface_alone(programs: str, tmp_path: Path) -> None:
    (tmp_path / "srun").write_text(f"#!/bin/sh\nenv >{tmp_path}/variables\n")
    script = script_of(tmp_path, 'prepare_ranks\n"${command[@]}"')
    ended = start(script, PATH=programs, NETWORK_INTERFACE="eth1", HOROVOD_GLOO_IFACE="ib0", **SETTLED)
    assert ended.returncode == 0, ended.stderr
    variables = (tmp_path / "variables").read_text().splitlines()
    # NCCL takes a name without = for a prefix.
    expected = {"NCCL_SOCKET_IFNAME==eth1", "GLOO_SOCKET_IFNAME=eth1", "OMPI_MCA_btl_tcp_if_include=eth1"}
    assert {*expected, "HOROVOD_GLOO_IFACE=ib0"} <= {*variables}


def test_an_image_file_is_run_by_apptainer(programs: str, tmp_path: Path) -> None:
    image = tmp_path / "image.sif"
    image.touch()
    command = command_of(PATH=programs, CONTAINER=str(image), SLURM_GPUS_ON_NODE="4", CONTAINER_OPTIONS="--cleanenv")
    options = ("--nv", "--bind", str(Path.cwd()), "--bind", str(ROOT), "--cleanenv")
    program = ("apptainer", "exec", *options, str(image), "python3", "-m", "dist_train", "train")
    assert_contains(command, f"{ROOT}/launch/rank.sh", *program)


def test_any_other_image_is_run_by_pyxis(programs: str) -> None:
    command = command_of(PATH=programs, CONTAINER="registry.example.org#dist_train:1")
    here = Path.cwd()
    assert_contains(
        command,
        "--container-image=registry.example.org#dist_train:1",
        f"--container-mounts={here}:{here},{ROOT}:{ROOT}",
        f"--container-workdir={here}",
        *(f"{ROOT}/launch/rank.sh", "python3", "-m", "dist_train", "train"),
    )


def test_our_program_in_pyxis_does_not_request_what_the_job_does(programs: str, tmp_path: Path) -> None:
    lines = 'read_allocation\nfind_our_program\nprintf "%s\\n" "${dist_train[*]}"\n'
    variables = {"CONTAINER": "image", "SLURM_GPUS": "8", "SLURM_GPUS_ON_NODE": "4", **TWO_NODES}
    ended = start(script_of(tmp_path, lines), PATH=programs, **variables)
    assert ended.stdout.startswith("env --unset=SLURM_GPUS "), ended.stderr
    assert " -u SLURM_LABELIO srun --mpi=none --overlap --nodes=1 --ntasks=1 --gpus-per-node=4 " in ended.stdout


@pytest.mark.parametrize(
    ("variables", "visible"),
    [
        ({}, "none"),
        ({"SLURM_GPUS_ON_NODE": "4"}, "all"),
        ({"SLURM_GPUS_ON_NODE": "4", "NVIDIA_VISIBLE_DEVICES": "1,2"}, "1,2"),
    ],
)
def test_a_container_of_pyxis_gets_the_gpus_of_the_job(
    programs: str, tmp_path: Path, variables: dict[str, str], visible: str
) -> None:
    lines = "read_allocation\nfind_our_program\nenv | grep ^NVIDIA_VISIBLE_DEVICES= || echo =none\n"
    ended = start(script_of(tmp_path, lines), PATH=programs, CONTAINER="image", **variables, **TWO_NODES)
    assert ended.stdout.strip().partition("=")[2] == visible, ended.stderr


def test_the_shell_of_an_interactive_allocation_may_be_a_step_of_it(programs: str) -> None:
    assert command_of(PATH=programs, SLURM_STEP_ID="4294967290") == command_of(PATH=programs)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"LAUNCHER": "ssh"}, "LAUNCHER is srun or mpirun, not 'ssh'"),
        ({"MAX_RESTARTS": "three"}, "MAX_RESTARTS takes a number, 0 or more, not 'three'"),
        ({"MAX_REQUEUES": "-1"}, "MAX_REQUEUES takes a number, 0 or more, not '-1'"),
        ({"LOSS_SECONDS": "0"}, "LOSS_SECONDS takes a number, 1 or more, not '0'"),
        ({"GUARD_SECONDS": "0"}, "GUARD_SECONDS takes a number, 1 or more, not '0'"),
        ({"RANKS_PER_NODE": "all"}, "RANKS_PER_NODE takes a number, 1 or more, not 'all'"),
        ({"SPARE_NODES": "one"}, "SPARE_NODES takes a number, 0 or more, not 'one'"),
        ({"LAUNCHER": "mpirun", "CONTAINER": "image"}, "Pyxis needs srun"),
        ({"CONTAINER": "/nowhere.sif"}, "CONTAINER /nowhere.sif cannot be read"),
        ({"SLURM_STEP_ID": "0", "SLURM_NTASKS": "1"}, "another job's variables are set"),
        ({"SLURM_HET_SIZE": "2"}, "the other components of a heterogeneous job would stay idle"),
        ({"SLURM_HET_SIZE": "2"}, "use dist-train submit"),
        ({"MIN_RANKS": "3"}, "MIN_RANKS takes a number, 1 to the run's 2 ranks, not '3'"),
        ({"MIN_RANKS": "1", "LAUNCHER": "mpirun"}, "MIN_RANKS needs LAUNCHER=srun"),
        ({"MIN_RANKS": "1", "OVERRIDES": "comm.engine=horovod"}, "MIN_RANKS needs comm.engine=torch"),
        ({"MIN_RANKS": "1", "SLURM_NTASKS": "3", "SLURM_TASKS_PER_NODE": "2,1"}, "set RANKS_PER_NODE"),
    ],
)
def test_a_bad_variable_is_one_line_and_ends_with_2(programs: str, variables: dict[str, str], message: str) -> None:
    ended = start("lb_8192.sh", PATH=programs, DRY_RUN="1", **TWO_NODES, **variables)
    assert ended.returncode == 2
    assert message in ended.stderr
    assert len(ended.stderr.splitlines()) == 1


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_shows_what_slurm_is_asked_for(script: str) -> None:
    requests = [line for line in (ROOT / "slurm" / script).read_text().splitlines() if line.startswith("#SBATCH")]
    assert len(requests) > 5
    ended = start(script, "--help")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert all(f"  {request}\n" in ended.stdout for request in requests)


@pytest.mark.parametrize("script", SCRIPTS)
def test_arguments_are_refused(script: str) -> None:
    ended = start(script, "run.seed=1", **TWO_NODES)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert "it takes no arguments, but environment variables" in ended.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_started_by_hand_it_says_how(script: str) -> None:
    ended = start(script)
    assert ended.returncode == 2
    assert "this is a batch script: sbatch" in ended.stderr


def test_another_project_does_not_stand_in_for_one_that_is_not_there(tmp_path: Path) -> None:
    ended = start("lb_8192.sh", DIST_TRAIN_ROOT=str(tmp_path), SLURM_SUBMIT_DIR=str(ROOT), DRY_RUN="1", **TWO_NODES)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert "set DIST_TRAIN_ROOT to the project's folder" in ended.stderr


class TestSweep:
    """Each task of an array trains one run of a study."""

    TASK: Mapping[str, str] = {
        "SLURM_JOB_ID": "20",
        "SLURM_ARRAY_JOB_ID": "17",
        "SLURM_ARRAY_TASK_ID": "2",
        "SLURM_GPUS_ON_NODE": "1",
        "DRY_RUN": "1",
        "PYTHONPATH": str(ROOT),
    }

    def test_a_task_trains_the_run_of_its_number(self, programs: str, tmp_path: Path) -> None:
        study = write_study(tmp_path)
        ended = start(
            "sweep.sh",
            PATH=programs,
            STUDY=str(study),
            DIRECTORY=str(tmp_path / "some where"),
            OVERRIDES="data.synthetic_classes=4",
            **self.TASK,
        )
        assert ended.returncode == 0, ended.stderr
        assert ended.stdout.startswith("srun --mpi=pmix --nodes=1 --ntasks=1 ")
        folder = tmp_path / "some where" / "small"
        expected = [
            *(str(tmp_path / "base.yaml"), "noise.amplitude=0.02", "run.name=noisy-seed-0"),
            *(f'run.directory="{folder}"', "run.seed=0", "data.synthetic_classes=4"),
        ]
        assert shlex.split(ended.stdout.partition(" train ")[2]) == expected

    def test_a_task_whose_run_has_finished_ends_at_once(self, programs: str, tmp_path: Path) -> None:
        plan = small_plan(tmp_path)
        finish_run(plan.runs[1])
        ended = start("sweep.sh", PATH=programs, STUDY=str(plan.file), **self.TASK)
        assert (ended.returncode, ended.stdout) == (0, "")
        assert "run 2, noisy-seed-0, has finished" in ended.stderr

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"SLURM_ARRAY_TASK_ID": ""}, "each run is a task of an array: sbatch --array=$(dist-train sweep "),
            ({"SLURM_ARRAY_TASK_ID": "9"}, "the study small has the runs 1 to 4, not 9"),
            ({"OVERRIDES": "noise.amplitud=1"}, "noise.amplitud: unknown key"),
        ],
    )
    def test_what_cannot_be_ends_with_2(
        self, programs: str, tmp_path: Path, changes: dict[str, str], message: str
    ) -> None:
        study = str(write_study(tmp_path))
        ended = start("sweep.sh", **{"PATH": programs, "STUDY": study, **self.TASK, **changes})
        assert (ended.returncode, ended.stdout) == (2, "")
        assert message in ended.stderr


def script_of(folder: Path, lines: str) -> str:
    """Write a batch script that executes `lines`, and return its path."""
    script = folder / "job.sh"
    root = shlex.quote(str(ROOT))
    script.write_text(f'#!/usr/bin/env bash\nset -euo pipefail\nroot={root}\n. "$root/slurm/prologue.sh"\n{lines}\n')
    script.chmod(0o755)
    return str(script)


def test_a_message_that_cannot_be_written_does_not_end_the_job(programs: str, tmp_path: Path) -> None:
    ended = start(script_of(tmp_path, "exec 2>/dev/full\nsay something\necho continues"), PATH=programs, **TWO_NODES)
    assert (ended.returncode, ended.stdout) == (0, "continues\n")


def test_a_node_that_answers_again_gets_its_ranks_back(programs: str, tmp_path: Path) -> None:
    lines = 'prepare_ranks\nuse_nodes n1\necho "$rank_count"\nuse_nodes n1 n2\necho "$rank_count"'
    ended = start(script_of(tmp_path, lines), PATH=programs, RANKS_PER_NODE="4", **SETTLED)
    assert ended.stdout.split() == ["4", "8"], ended.stderr


def test_a_restart_leaves_out_nodes_that_the_check_has_refused(programs: str, tmp_path: Path) -> None:
    lines = """
        prepare_ranks
        fit_nodes=(n1 n3) error_log=/dev/null
        living_nodes() { printf '%s\\n' n1 n2 n3; }
        prepare_restart
        echo "$SLURM_JOB_NODELIST"
        living_nodes() { echo n2; }
        requeue_instead() { echo requeued && exit; }
        prepare_restart
    """
    ended = start(script_of(tmp_path, lines), PATH=programs, RANKS_PER_NODE="1", **SETTLED)
    assert ended.stdout.split() == ["n1,n3", "requeued"], ended.stderr


def test_a_restart_within_the_job_is_not_counted_as_another_requeue(programs: str, tmp_path: Path) -> None:
    lines = """
        prepare_ranks
        error_log=/dev/null
        living_nodes() { echo n1; }
        prepare_restart
        env | grep SLURM_RESTART_COUNT || echo none
    """
    ended = start(script_of(tmp_path, lines), PATH=programs, SLURM_RESTART_COUNT="1", RANKS_PER_NODE="1", **SETTLED)
    assert ended.stdout == "none\n", ended.stderr


@pytest.mark.parametrize(("living", "guards"), [("n1 n3", "on n1 n3\n"), ("n1 n2", "")])
def test_a_restart_without_the_node_of_the_guard_guards_the_batch_host_anew(
    programs: str, tmp_path: Path, living: str, guards: str
) -> None:
    lines = f"""
        prepare_ranks
        guard_step=$$ guard_node=n2 error_log=/dev/null
        living_nodes() {{ printf '%s\\n' {living}; }}
        guard_batch_host() {{ echo "on $*"; }}
        prepare_restart
    """
    ended = start(script_of(tmp_path, lines), PATH=programs, RANKS_PER_NODE="1", **SETTLED)
    assert (ended.returncode, ended.stdout) == (0, guards), ended.stderr


def test_lingering_ranks_are_ended_once_the_controller_answers_and_the_guard_stays(
    programs: str, tmp_path: Path
) -> None:
    silence = "slurm_load_jobs error: Unable to contact slurm controller (connect failure)"
    asked = tmp_path / "asked"
    squeue = f"""[ -e {asked} ] || {{ touch {asked}; echo '{silence}' >&2; exit 1; }}
        printf '%s\\n' '17.0 rank.sh' '17.1 bash' '17.batch batch'"""
    scancel = f'[ -n "$SCANCEL_INTERACTIVE$SCANCEL_STATE" ] || echo "$@" >{tmp_path}/ended'
    write_programs(tmp_path, squeue=squeue, scancel=scancel)
    lines = f"""
        sleep() {{ :; }}
        run_directory={tmp_path} launch_id=x error_log={tmp_path}/errors
        echo 'srun: error: Node failure on n2' >"$error_log"
        (exec sleep 10) &
        launcher=$!
        end_lingering_ranks &
        wait "$launcher" || echo "$?"
    """
    own = {"SCANCEL_INTERACTIVE": "true", "SCANCEL_STATE": "PENDING"}  # of the user's shell
    ended = start(script_of(tmp_path, lines), PATH=programs, **own, **TWO_NODES)
    assert ended.stdout == "137\n", ended.stderr
    assert (tmp_path / "ended").read_text() == "--signal=KILL 17.0\n"


@pytest.mark.parametrize(
    ("code", "is_locked", "seconds", "launcher"),
    [
        (ExitCode.FAULT, False, "40", "137\n"),
        (ExitCode.FAULT, True, "40", "0\n"),
        (ExitCode.FAULT, True, "15", "137\n"),
        (ExitCode.DIVERGED, False, "40", "0\n"),
    ],
)
def test_ranks_that_a_fault_has_ended_do_not_linger_but_rank_0_may_wait_for_a_scrape(
    programs: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    code: ExitCode,
    is_locked: bool,
    seconds: str,
    launcher: str,
) -> None:
    monkeypatch.setenv("DIST_TRAIN_LAUNCH", "x")
    StatusFile(tmp_path / "status.json", 2).end("failed", code, "")
    write_programs(tmp_path, squeue="", scancel="")
    lines = f"""
        sleep() {{ ((++seconds <= 20)) || {{ touch {tmp_path}/late; exit; }}; }}
        seconds=0 run_directory={tmp_path} launch_id=x error_log=/dev/null
        (until [[ -e {tmp_path}/late ]]; do command sleep 0.05; done) &
        launcher=$! code=0
        end_lingering_ranks &
        wait "$launcher" || code=$?
        echo "$code"
    """
    lock = tmp_path / "run.lock"
    with lock.open("w") if is_locked else nullcontext() as file:  # as by rank 0
        if file is not None:
            fcntl.flock(file, fcntl.LOCK_EX)
        ended = start(script_of(tmp_path, lines), PATH=programs, LOSS_SECONDS=seconds, **TWO_NODES)
    assert ended.stdout == launcher
    assert lock.exists() == is_locked, "to ask makes no file"


def test_the_check_of_the_nodes_requests_the_gpus_that_the_run_uses(programs: str, tmp_path: Path) -> None:
    with_scontrol(tmp_path, *(f"Nodes=n{count} CPU_IDs=0-3 Mem=0 GRES=gpu:{count}(IDX:0-1)" for count in (4, 2)))
    lines = """
        prepare_ranks
        run_directory=$PWD error_log=/dev/null dist_train=(bash -c 'echo "$SLURM_GPUS_ON_NODE GPUs" >&2')
        check_nodes
    """
    job = {"SLURM_GPUS_ON_NODE": "4", "SLURM_GPUS_PER_NODE": "2", **SETTLED}
    ended = start(script_of(tmp_path, lines), PATH=programs, **job)
    assert (ended.returncode, ended.stderr) == (0, "2 GPUs\n")


@pytest.mark.parametrize(
    ("seconds", "limit", "starts"),
    [
        (10, {"MAX_RESTARTS": "2"}, 3),
        (10, {"MAX_RESTARTS": "0"}, 1),
        (10, {"MAX_REQUEUES": "1"}, 2),
        (800, {"MAX_RESTARTS": "2"}, 6),
        (800, {"MAX_RESTARTS": "0"}, 6),
        (800, {"MAX_REQUEUES": "0"}, 6),
    ],
)
def test_a_node_whose_ranks_always_end_soon_is_given_up(
    programs: str, tmp_path: Path, seconds: int, limit: dict[str, str], starts: int
) -> None:
    """The launcher of a node ends so many seconds after it has joined; it is started up to six times."""
    lines = f"""
        run_directory={tmp_path} launch_id=x wanted_nodes=1 fit_nodes=() guard_step=1 starts=0 ticks=0
        connect() {{ echo "{{\\"nodes\\": [$1]}}" >"$run_directory/join-x.json"; }}
        connect ''
        living_nodes() {{ echo n1; }}
        start_on_node() {{
            echo "$1"
            ((++starts < 6)) || exit 0
            (exec sleep 1000) &
            launcher=$! started=$ticks
        }}
        sleep() {{ # drives the clock
            ticks=$((ticks + 1)) SECONDS=$((SECONDS + {seconds // 5}))
            case $((ticks - started)) in
                1) connect '"n1"' ;;
                7)
                    connect ''
                    kill -KILL "$launcher"
                    while kill -0 "$launcher" 2>/dev/null; do command sleep 0.01; done
                    ;;
                60) exit 0 ;;
            esac
        }}
        supervise_nodes
    """
    ended = start(script_of(tmp_path, lines), PATH=programs, **limit, **TWO_NODES)
    assert ended.stdout.split() == ["n1"] * starts, ended.stderr
    assert ("n1 is given up" in ended.stderr) is (starts < 6)


@pytest.mark.parametrize("code", ["null", "0"])
def test_a_node_whose_ranks_have_finished_is_not_started_again(programs: str, tmp_path: Path, code: str) -> None:
    """Rank 0, on another node, may still upload to a tracker: errors of launchers that were refused ended the log."""
    lines = f"""
        run_directory={tmp_path} launch_id=x wanted_nodes=1 fit_nodes=() guard_step=1
        echo '{{"nodes": []}}' >"$run_directory/join-x.json"
        living_nodes() {{ echo n1; }}
        start_on_node() {{
            echo "$1"
            echo '{{"exit_code": {code}, "launch": "x"}}' >"$run_directory/status.json"
            command sleep 0 &
        }}
        sleep() {{ # drives the clock
            ((++ticks < 20)) || exit 0
            SECONDS=$((SECONDS + 1))
            command sleep 0.05
        }}
        ticks=0
        supervise_nodes
    """
    ended = start(script_of(tmp_path, lines), PATH=programs, **TWO_NODES)
    assert ended.stdout.startswith("n1\n"), ended.stderr
    assert (ended.stdout == "n1\n") is (code == "0")


def test_the_longer_a_node_is_away_the_less_often_it_is_looked_for(programs: str, tmp_path: Path) -> None:
    lines = f"""
        unset SECONDS # the clock
        run_directory={tmp_path} launch_id=x wanted_nodes=1 fit_nodes=() SECONDS=0
        echo '{{"nodes": []}}' >"$run_directory/join-x.json"
        living_nodes() {{ echo "$SECONDS" >>{tmp_path}/looks; }}
        sleep() {{ (((SECONDS += 5) < 1200)) || exit 0; }}
        supervise_nodes
    """
    ended = start(script_of(tmp_path, lines), PATH=programs, **TWO_NODES)
    assert ended.returncode == 0, ended.stderr
    looks = [int(moment) for moment in (tmp_path / "looks").read_text().split()]
    pauses = [later - earlier for earlier, later in pairwise(looks)]
    assert pauses[:9] == [5] * 9
    assert pauses[-1] == 60
    assert sum(pauses) > 1100


@pytest.mark.parametrize(("silent", "calls"), [("", 0), ("n2", 1)])
def test_slurm_is_asked_whether_nodes_answer_only_if_their_ports_do_not_say(
    programs: str, tmp_path: Path, silent: str, calls: int
) -> None:
    sinfo = f"echo called >>{tmp_path}/calls; echo n2"
    write_programs(tmp_path, sinfo=sinfo, squeue="echo n[1-2]", scontrol="printf '%s\\n' n1 n2")
    lines = f"silent_nodes={silent}\nanswering_nodes() {{ echo n1; }}\nliving_nodes"
    ended = start(script_of(tmp_path, lines), PATH=programs, **TWO_NODES)
    assert ended.stdout.split() == ["n1", silent][: 1 + calls], ended.stderr
    assert (tmp_path / "calls").exists() is bool(calls)


@pytest.mark.parametrize(
    ("variables", "begins"),
    [
        ({"KNOWN": "n1 n2"}, "srun "),
        ({"KNOWN": "n1"}, "env MASTER_ADDR=10.0.0.1 srun "),
        ({"KNOWN": "n1", "MASTER_ADDR": "ib-n1"}, "srun "),
    ],
)
def test_ranks_meet_at_an_address_where_nodes_do_not_know_each_other_by_name(
    programs: str, tmp_path: Path, variables: dict[str, str], begins: str
) -> None:
    write_programs(tmp_path, getent='echo "$KNOWN" | grep -qw "$2"', scontrol="printf '%s\\n' n1 n2")
    lines = "node_addresses=$'n1 10.0.0.1\\nn2 10.0.0.2'\nprepare_ranks\necho \"${command[*]}\""
    job = {"RANKS_PER_NODE": "1", "SLURM_JOB_NODELIST": "n[1-2]", **SETTLED}
    ended = start(script_of(tmp_path, lines), PATH=programs, **job, **variables)
    assert ended.stdout.startswith(begins), ended.stderr


def test_the_step_that_guards_the_batch_script_s_node_holds_no_memory_nor_gpus(programs: str, tmp_path: Path) -> None:
    (tmp_path / "srun").write_text(f'#!/bin/sh\necho "$@" >{tmp_path}/words; env >{tmp_path}/variables\n')
    job = {"SLURMD_NODENAME": "n1", "SLURM_GPUS": "4", "SLURM_GPUS_PER_NODE": "2", **TWO_NODES}
    ended = start(script_of(tmp_path, "guard_batch_host n1 n2\nwait $guard_step"), PATH=programs, **job)
    assert ended.returncode == 0, ended.stderr
    words = (tmp_path / "words").read_text().split()
    assert {"--nodelist=n2", "--overlap", "--mem=0", "--gres=none"} <= {*words}
    assert "SLURM_GPUS" not in (tmp_path / "variables").read_text()


@pytest.mark.parametrize(
    ("answers", "requeues"),
    [
        pytest.param(["10:00 n[1-2]", "10:00 n2"], 1, id="the batch host is lost"),
        pytest.param(["10:00 n[1-2]", "11:00 n[3-4]"], 0, id="the job has been requeued to other nodes"),
        pytest.param(["10:00 n[1-2]", "", "10:00 n[1-2]"], 0, id="the job is suspended for a while"),
    ],
)
def test_only_a_job_that_has_lost_its_batch_host_is_requeued_by_the_guard(
    programs: str, tmp_path: Path, answers: list[str], requeues: int
) -> None:
    (tmp_path / "answers").write_text("".join(f"{answer}\n" for answer in answers))
    nodes = "case $3 in 'n[1-2]') printf 'n1\\nn2\\n' ;; *) echo $3 ;; esac"
    scontrol = f'case $1 in requeue) echo "$@" >>{tmp_path}/calls ;; *) {nodes} ;; esac'
    # The guard does not wait for the end of squeue once it has read the line.
    squeue = f'answer=$(head -n 1 {tmp_path}/answers); sed -i 1d {tmp_path}/answers; echo "$answer"'
    write_programs(tmp_path, squeue=squeue, scontrol=scontrol)
    lines = f"sleep() {{ [[ -s {tmp_path}/answers ]]; }}\nrequeue_once_lost 17 n1 {tmp_path}/log"
    ended = start(script_of(tmp_path, lines), PATH=programs, **TWO_NODES)
    assert ended.returncode == 0, ended.stderr
    calls = tmp_path / "calls"
    assert (calls.read_text().splitlines() if calls.exists() else []) == ["requeue 17"] * requeues


@pytest.mark.parametrize(
    ("script", "variables", "requeues"),
    [
        ("lb_8192.sh", {}, ["requeue 17"]),
        ("sweep.sh", {"SLURM_ARRAY_JOB_ID": "17", "SLURM_ARRAY_TASK_ID": "1"}, ["requeue 17_1"]),
        ("lb_8192.sh", {"MAX_REQUEUES": "0"}, []),
    ],
)
def test_a_job_that_is_stopped_during_its_set_up_is_requeued(
    programs: str, tmp_path: Path, script: str, variables: dict[str, str], requeues: list[str]
) -> None:
    write_programs(tmp_path, scontrol=f'echo "$@" >>{tmp_path}/calls', python="kill -USR1 $PPID; exit 1")
    ended = start(script, **{"PATH": programs, "DIST_TRAIN_PYTHON": f"{tmp_path}/python", **TWO_NODES, **variables})
    assert ended.returncode == ExitCode.STOPPED, ended.stderr
    calls = (tmp_path / "calls").read_text().splitlines()
    assert [call for call in calls if call.startswith("requeue")] == requeues


def test_a_job_that_is_stopped_during_its_set_up_does_not_check_its_nodes(programs: str, tmp_path: Path) -> None:
    python = """case "$3 $4" in
        'config run-directory') kill -USR1 $PPID; echo runs/run ;;
        outcome*) exit 1 ;;
        requeue*) echo requeue ;;
    esac"""
    write_programs(tmp_path, squeue="echo RUNNING", scontrol="exit 0", python=f'echo "$3" >>{tmp_path}/calls\n{python}')
    ended = start("lb_8192.sh", PATH=programs, **{**SETTLED, "DIST_TRAIN_PYTHON": f"{tmp_path}/python"})
    assert ended.returncode == ExitCode.STOPPED, ended.stderr
    assert "doctor" not in (tmp_path / "calls").read_text()


def test_a_stop_request_at_the_end_of_a_launch_does_not_end_what_decides_about_the_job(
    programs: str, tmp_path: Path
) -> None:
    # Slurm sends SIGTERM to every process of the batch script.
    python = """case "$3 $4" in
        'config run-directory') echo runs/run ;;
        outcome*) kill -TERM $PPID $$; exit 1 ;;
        requeue*) kill -TERM $$; echo requeue ;;
    esac"""
    scontrol = f'[ "$1" != requeue ] || kill -TERM $$; echo "$@" >>{tmp_path}/calls'
    write_programs(tmp_path, squeue="kill -TERM $$; echo RUNNING", scontrol=scontrol, python=python)
    ended = start("lb_8192.sh", PATH=programs, **{**SETTLED, "DIST_TRAIN_PYTHON": f"{tmp_path}/python"})
    assert ended.returncode == ExitCode.STOPPED, ended.stderr
    assert "requeue 17" in (tmp_path / "calls").read_text().splitlines()
    assert "job 17: requeued" in ended.stderr


@pytest.mark.parametrize(
    ("facts", "limit", "requeue"),
    [("Requeue=1", "", "1"), ("Requeue=1", "0", "0"), ("Requeue=0", "", "0"), ("", "", "0")],
)
@pytest.mark.parametrize("launcher", ["srun", "mpirun"])
def test_ranks_know_whether_their_job_comes_back(
    programs: str, tmp_path: Path, launcher: str, facts: str, limit: str, requeue: str
) -> None:
    write_programs(tmp_path, scontrol=f"echo 'JobId=17 {facts} Restarts=0'")
    lines = f"""
        need_mpirun() {{ mpirun={tmp_path}/mpirun; }}
        launch_or_show() {{ echo "${{command[*]}} DIST_TRAIN_REQUEUE=$DIST_TRAIN_REQUEUE"; }}
        end_job() {{ exit; }}
        run_in_job train {ROOT}/configs/lb_8192.yaml
    """
    job = {**SETTLED, "LAUNCHER": launcher, "MAX_REQUEUES": limit, "DIST_TRAIN_REQUEUE": "1"}
    ended = start(script_of(tmp_path, lines), PATH=programs, **job)
    assert ended.returncode == 0, ended.stderr
    words = ended.stdout.split()
    assert words[-1] == f"DIST_TRAIN_REQUEUE={requeue}"
    assert "--export=ALL" in words or ("-x", "DIST_TRAIN_REQUEUE") in pairwise(words)


@pytest.mark.parametrize("messages", ["dist-train: ä" + "é" * 1400, "-" * 76], ids=["long", "dashed"])
def test_any_messages_of_the_launcher_let_a_job_be_requeued(programs: str, tmp_path: Path, messages: str) -> None:
    log = tmp_path / "errors"
    log.write_text(f"{messages}\n" * 100)
    lines = f"""
        find_our_program
        run_directory={tmp_path}/run launch_id=x launcher_status=1 error_log={log}
        decide_what_follows 0
        echo "$verdict"
    """
    script = script_of(tmp_path, f"gpus=0\n{lines}")
    ended = start(script, PATH=programs, PYTHONPATH=str(ROOT), **TWO_NODES)
    assert (ended.returncode, ended.stdout) == (0, "requeue\n"), ended.stderr


@pytest.mark.parametrize("state", ["CANCELLED", "COMPLETING"])
def test_an_array_s_task_that_is_cancelled_during_its_set_up_is_not_requeued(
    programs: str, tmp_path: Path, state: str
) -> None:
    scontrol = f'echo "$@" >>{tmp_path}/calls'
    squeue = f'[ -n "$SQUEUE_STATES" ] || echo {state}'
    write_programs(tmp_path, scontrol=scontrol, squeue=squeue, python="kill -TERM $PPID; exit 1")
    variables = {"SLURM_ARRAY_JOB_ID": "17", "SLURM_ARRAY_TASK_ID": "1", "DIST_TRAIN_PYTHON": f"{tmp_path}/python"}
    ended = start("sweep.sh", PATH=f"{tmp_path}:{programs}", SQUEUE_STATES="RUNNING", **variables, **TWO_NODES)
    assert ended.returncode == ExitCode.STOPPED, ended.stderr
    calls = tmp_path / "calls"
    assert not calls.exists() or "requeue" not in calls.read_text()


def test_analyses_leave_no_temporary_file(programs: str, tmp_path: Path) -> None:
    lines = "prepare_ranks\nfor name in one two; do launch_or_show landscape direction $name; done"
    folder = tmp_path / "temporary"
    folder.mkdir()
    ended = start(script_of(tmp_path, lines), PATH=programs, TMPDIR=str(folder), **SETTLED)
    assert (ended.stderr.count("; landscape direction "), list(folder.iterdir())) == (2, [])


def test_jobs_start_on_nodes_without_the_login_node_s_temporary_folder(programs: str, tmp_path: Path) -> None:
    (tmp_path / "srun").write_text("#!/bin/sh\nexit 0\n")
    script = script_of(tmp_path, 'prepare_ranks\nlaunch_or_show landscape direction one\nexit "$launcher_status"')
    ended = start(script, PATH=programs, TMPDIR=str(tmp_path / "nowhere"), **SETTLED)
    assert ended.returncode == 0, ended.stderr


def test_a_dry_run_of_analyses_only_prints_them(programs: str, tmp_path: Path) -> None:
    analyses = "dist-train sharpness runs/one\ndist-train landscape direction runs/one"
    write_programs(tmp_path, python=f"[ $3 = sweep ] || touch {tmp_path}/started\necho '{analyses}'")
    variables = {"PATH": programs, "DRY_RUN": "1", **SETTLED}
    lines = f"find_programs() {{ dist_train=({tmp_path}/python -m dist_train); }}\nanalyses_in_job study"
    ended = start(script_of(tmp_path, lines), **variables)
    assert (ended.returncode, ended.stdout) == (0, f"{analyses}\n"), ended.stderr
    assert not (tmp_path / "started").exists()


def test_analyses_of_an_unreadable_study_end_with_2(programs: str, tmp_path: Path) -> None:
    script = script_of(tmp_path, f"analyses_in_job {tmp_path}/study.yaml")
    ended = start(script, PATH=programs, PYTHONPATH=str(ROOT), **TWO_NODES)
    assert ended.returncode == 2
    assert "study.yaml" in ended.stderr


class TestLandscape:
    """Points shared out over the ranks of all nodes."""

    @pytest.mark.parametrize(
        ("launcher", "begins"),
        [("srun", "srun --mpi=pmix --nodes=2 --ntasks=8 "), ("mpirun", "mpirun -np 8 --map-by ppr:4:node:")],
    )
    def test_the_variables_are_followed(self, programs: str, launcher: str, begins: str) -> None:
        targets = ("sb_128", "runs/lb_8192@best")  # the program finds them
        ended = start(
            "landscape.sh",
            PATH=programs,
            DRY_RUN="1",
            SLURM_GPUS_ON_NODE="4",
            LAUNCHER=launcher,
            KIND="interpolate",
            TARGETS=" ".join(targets),
            OPTIONS="--points 11 --scale log",
            OVERRIDES="data.root=/data",
            **TWO_NODES,
        )
        assert ended.returncode == 0, ended.stderr
        assert begins in ended.stdout
        words = shlex.split(ended.stdout)
        wanted = ["interpolate", *targets, "data.root=/data", "--points", "11", "--scale", "log"]
        assert words[words.index("landscape") + 1 :] == wanted

    @pytest.mark.parametrize("has_mpi4py", [True, False])
    def test_ranks_without_mpi4py_need_no_mpi(self, programs: str, tmp_path: Path, has_mpi4py: bool) -> None:
        (tmp_path / "srun").write_text("#!/bin/sh\nprintf 'MPI plugin types are...\\n\\tnone\\n\\tcray_shasta\\n'\n")
        if not has_mpi4py:
            (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['mpi4py'] = None\n")
        variables = {"TARGETS": str(tmp_path), "DRY_RUN": "1", "PYTHONPATH": str(tmp_path), **TWO_NODES}
        ended = start("landscape.sh", PATH=programs, **variables)
        assert ("mpirun -np 2 " if has_mpi4py else "srun --mpi=none ") in ended.stdout, ended.stderr

    @pytest.mark.parametrize(
        ("variables", "message"),
        [
            ({"KIND": "sphere"}, "KIND is interpolate, direction or plane, not 'sphere'"),
            ({"KIND": "interpolate", "TARGETS": "here"}, "TARGETS takes 2 runs or checkpoints"),
            ({"TARGETS": "one two"}, "TARGETS takes 1 run or checkpoint"),
        ],
    )
    def test_a_bad_variable_is_one_line_and_ends_with_2(
        self, programs: str, variables: dict[str, str], message: str
    ) -> None:
        ended = start("landscape.sh", PATH=programs, **TWO_NODES, **variables)
        assert (ended.returncode, ended.stdout) == (2, "")
        assert message in ended.stderr
        assert len(ended.stderr.splitlines()) == 1


class TestReport:
    """One page, by one process."""

    def test_the_variables_are_followed(self) -> None:
        ended = start("report.sh", DRY_RUN="1", DIRECTORY="runs/two words", OUTPUT="page.html", SLURM_JOB_ID="17")
        assert ended.returncode == 0, ended.stderr
        expected = [sys.executable, "-m", "dist_train", "report", "runs/two words", "-o", "page.html"]
        assert shlex.split(ended.stdout) == expected

    def test_that_of_a_submitted_study_does_not_follow_variables_of_other_scripts(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["submit", "--study", str(write_study(tmp_path)), "--dry-run"]) == ExitCode.FINISHED
        script = tmp_path / "report.sh"
        script.write_text(capsys.readouterr().out.rpartition("\n# report")[2].partition("\n")[2])
        script.chmod(0o755)
        ended = start(str(script), DRY_RUN="1", DIRECTORY="runs", OUTPUT="page.html", SLURM_JOB_ID="17")
        assert ended.returncode == 0, ended.stderr
        expected = [sys.executable, "-m", "dist_train", "report", str(tmp_path / "runs" / "small")]
        assert shlex.split(ended.stdout) == expected

    def test_a_folder_without_runs_is_one_line_and_ends_with_2(self, tmp_path: Path) -> None:
        ended = start("report.sh", DIRECTORY=str(tmp_path), SLURM_JOB_ID="17", PYTHONPATH=str(ROOT))
        assert (ended.returncode, ended.stdout) == (2, "")
        assert len(ended.stderr.splitlines()) == 1
