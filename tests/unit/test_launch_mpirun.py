"""launch/mpirun.sh as far as it goes without MPI: the command that it composes; and what launch scripts share."""

from __future__ import annotations

import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import pytest

from dist_train.rundir.status import load_status
from tests.programs import write_programs
from tests.waiting import PATIENCE, wait_for

ROOT = Path(__file__).parents[2]


def with_programs(folder: Path, launcher: str, version: str = "mpirun (Open MPI) 5.0.11") -> dict[str, str]:
    """Return an environment whose mpirun and horovodrun execute the line `launcher`."""
    programs = folder / "programs"
    programs.mkdir()
    launcher = f'if [ "$1" = --version ]; then echo "{version}"; exit; fi\n{launcher}'
    write_programs(programs, python=f'exec "{sys.executable}" "$@"', mpirun=launcher, horovodrun=launcher)
    kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
    return {**kept, "DIST_TRAIN_PYTHON": str(programs / "python")}


def command_of(folder: Path, *arguments: str, **variables: str) -> list[str]:
    """Return the arguments that mpirun gets."""
    environment = {**with_programs(folder, f"printf '%s\\n' \"$@\" >{folder}/out"), **variables}
    script = str(ROOT / "launch/mpirun.sh")
    ended = subprocess.run([script, *arguments], cwd=folder, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return (folder / "out").read_text().splitlines()


@pytest.mark.parametrize(
    "options", [("-np", "3", "--hostfile", "hosts"), ("--np", "3", "--hostfile=hosts"), ("--np=3", "--hostfile=hosts")]
)
def test_options_are_understood_as_mpirun_understands_them(options: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("node1 slots=3\n")
    command = command_of(tmp_path, *options, "runs")
    assert command[:2] == ["-np", "3"]
    assert command[command.index("--hostfile") + 1] == "hosts"
    assert command[-1] == "runs"


def test_a_second_signal_ends_the_ranks_after_two_whole_seconds_alone() -> None:
    # begins late in a second, since a clock of whole seconds would count two soon after it
    script = """
        . launch/common.sh
        until [[ $(date +%N) == 9* ]]; do :; done
        begun=$(date +%s%N)
        until ((end_now)); do
            note_stop_request
            sleep 0.05
        done
        echo $((($(date +%s%N) - begun) / 1000000))
    """
    milliseconds = subprocess.check_output(["bash", "-euo", "pipefail", "-c", script], cwd=ROOT, timeout=PATIENCE)
    assert int(milliseconds) >= 1990


@pytest.mark.parametrize("moment", range(1, 9))  # the last: right before it waits for the launcher
def test_a_signal_between_any_two_commands_of_the_script_stops_the_ranks(moment: int, tmp_path: Path) -> None:
    script = f"""
        . launch/common.sh
        set_rank_environment 1
        run_directory='' saves=1 commands=0
        stop_ranks() {{
            touch {tmp_path}/stopped
            kill -TERM "$launcher"
        }}
        signal_self() {{
            if [[ ${{FUNCNAME[1]:-}} == launch && -n $launcher ]] && ((++commands == {moment})); then
                kill -TERM $$
            fi
        }}
        set -o functrace
        trap signal_self DEBUG
        launch stop_ranks sleep 30
    """
    subprocess.run(["bash", "-euo", "pipefail", "-c", script], cwd=ROOT, check=True, timeout=PATIENCE)
    assert (tmp_path / "stopped").exists()


def test_a_signal_that_comes_after_the_end_of_the_ranks_does_not_change_the_exit_code() -> None:
    late = "kill -TERM $$; kill -INT $$; kill -USR2 $$; exit 3"
    script = f"""
        . launch/common.sh
        dist_train=(bash -c '{late}') run_directory=run launch_id=7 launcher_status=0
        finish
    """
    ended = subprocess.run(["bash", "-euo", "pipefail", "-c", script], cwd=ROOT, timeout=PATIENCE)
    assert ended.returncode == 3


def test_ranks_on_other_machines_get_the_variables_of_libraries_and_caches(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("node1 slots=3\n")
    names = ("UCX_TLS", "GLOO_SOCKET_IFNAME", "TORCH_LOGS", "NCCL_DEBUG", "DIST_TRAIN_CACHE", "XDG_CACHE_HOME")
    command = command_of(tmp_path, "--hostfile", "hosts", "runs", EDITOR="vi", **dict.fromkeys(names, "x"))
    passed = {name for option, name in pairwise(command) if option == "-x"}
    assert passed >= {*names, "PATH"}
    assert "EDITOR" not in passed


def test_on_the_nodes_of_a_slurm_job_daemons_do_not_have_the_share_of_one_task(tmp_path: Path) -> None:
    asked = {"SLURM_CPUS_PER_TASK": "4", "SLURM_GPUS_PER_TASK": "1", "SLURM_TRES_PER_TASK": "cpu=4,gres/gpu=1"}
    asked["SRUN_CPUS_PER_TASK"] = "4"
    environment = with_programs(tmp_path, f"env >{tmp_path}/variables")
    job = {"SLURM_JOB_ID": "17", "SLURM_JOB_NODELIST": "node[1-2]", **asked}
    subprocess.run([str(ROOT / "launch/mpirun.sh"), "runs"], env={**environment, **job}, check=True)
    assert "_PER_TASK=" not in (tmp_path / "variables").read_text()


@pytest.mark.parametrize(
    ("job", "are_here"),
    [
        ({}, True),
        ({"SLURM_JOB_NODELIST": "node1", "SLURMD_NODENAME": "node1"}, True),
        ({"SLURM_JOB_NODELIST": os.uname().nodename.partition(".")[0]}, True),
        ({"SLURM_JOB_NODELIST": "node1"}, False),  # a shell of salloc -N1 on a login node
        ({"SLURM_JOB_NODELIST": "node[1-2]", "SLURMD_NODENAME": "node1"}, False),
    ],
)
def test_the_cores_of_this_machine_are_shared_by_ranks_that_run_on_it(
    job: dict[str, str], are_here: bool, tmp_path: Path
) -> None:
    command = command_of(tmp_path, "runs", **job)
    assert ("OMP_NUM_THREADS" in command) is are_here
    assert ("slot:OVERSUBSCRIBE" in command) is are_here


def test_ranks_start_where_setpriv_lacks_an_option(tmp_path: Path) -> None:
    old = tmp_path / "old"
    old.mkdir()
    write_programs(old, setpriv="echo \"setpriv: unrecognized option '$1'\" >&2\nexit 1")
    assert command_of(tmp_path, "-np", "3", "runs", PATH=f"{old}:{os.environ['PATH']}")[:2] == ["-np", "3"]


@pytest.mark.parametrize(
    "version", ["HYDRA build details:\n    Version: 5.0.2", "Intel(R) MPI Library for Linux* OS, Version 2021.19.0"]
)
def test_the_mpirun_of_another_mpi_is_refused(version: str, tmp_path: Path) -> None:
    # The file may be a link to mpiexec.hydra, a copy of it, or a script that runs it.
    environment = with_programs(tmp_path, f"touch {tmp_path}/out", version)
    ended = subprocess.run([str(ROOT / "launch/mpirun.sh"), "runs"], env=environment, capture_output=True, text=True)
    assert ended.returncode == 1
    assert f"{tmp_path}/programs/mpirun is that of MPICH or Intel MPI" in ended.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "command",
    [
        '. launch/common.sh && echo "$root"',
        '. docker/common.sh && echo "$root"',
        'root=launch/.. && SLURM_JOB_ID=7 && . slurm/prologue.sh && echo "$root"',
        "launch/demo.sh --help >/dev/null && pwd",
    ],
)
def test_scripts_find_the_project_where_cd_prints_a_folder(command: str) -> None:
    ended = subprocess.run(
        ["bash", "-euc", command], cwd=ROOT, env={**os.environ, "CDPATH": "."}, capture_output=True, text=True
    )
    assert (ended.returncode, ended.stdout) == (0, f"{ROOT}\n"), ended.stderr


def test_scripts_run_their_own_project_whatever_lies_in_the_current_folder(tmp_path: Path) -> None:
    (tmp_path / "dist_train").mkdir()  # as where the project was cloned
    (tmp_path / "argparse.py").write_text("raise SystemExit('not Python's own')")
    lines = f'. {ROOT}/launch/common.sh; find_programs; "${{dist_train[@]}}" config path dist_train:configs/smoke.yaml'
    variables = {**os.environ, "DIST_TRAIN_PYTHON": sys.executable}
    variables.pop("PYTHONPATH", None)
    ended = subprocess.run(["bash", "-euc", lines], cwd=tmp_path, env=variables, capture_output=True, text=True)
    assert ended.stdout == f"{ROOT}/configs/smoke.yaml\n", ended.stderr


def test_ranks_start_on_a_terminal_without_a_name(tmp_path: Path) -> None:
    write_programs(tmp_path, tty="echo not a tty\nexit 1")
    terminal, end = pty.openpty()
    try:
        command = f'. launch/common.sh; set_rank_environment 1; echo "${{rank_environment[*]}}" >{tmp_path}/out'
        variables = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
        ended = subprocess.run(["bash", "-euc", command], cwd=ROOT, env=variables, stdout=end, timeout=PATIENCE)
    finally:
        os.close(terminal)
        os.close(end)
    assert ended.returncode == 0
    assert "DIST_TRAIN_TERMINAL" not in (tmp_path / "out").read_text()


@pytest.mark.parametrize("is_checkout", [True, False])
def test_advice_for_another_python_fits_the_installation(is_checkout: bool, tmp_path: Path) -> None:
    if is_checkout:
        (tmp_path / "Makefile").touch()
    write_programs(tmp_path, python3="exit 1")
    command = ["bash", "-c", f". launch/common.sh && root={tmp_path} && find_programs"]
    variables = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    ended = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
    assert ended.returncode == 1
    assert ("make setup" in ended.stderr, "set DIST_TRAIN_PYTHON" in ended.stderr) == (is_checkout, not is_checkout)


@pytest.mark.parametrize(("ranks", "threads"), [(1, 6), (4, 1), (99, 1)])
def test_ranks_share_the_cores_that_python_counts(ranks: int, threads: int, tmp_path: Path) -> None:
    write_programs(tmp_path, python="echo 6")
    command = ["bash", "-euc", f". launch/common.sh; python={tmp_path}/python; threads_each {ranks}"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert ended.stdout.split() == [str(threads)]


@pytest.mark.parametrize("option", [("--plugin", "mine.py"), ("--plugin=mine.py",)], ids=len)
def test_a_run_is_checked_with_its_plugins_before_the_launch(option: tuple[str, ...], tmp_path: Path) -> None:
    plugin = 'import dist_train\n@dist_train.register("schedules", "half")\ndef half(progress): return 0.5\n'
    (tmp_path / "mine.py").write_text(plugin)
    environment = with_programs(tmp_path, f"printf '%s\\n' \"$@\" >{tmp_path}/out") | {"PYTHONPATH": str(ROOT)}
    run = f"--run-dir={tmp_path}/run"
    words = ["train", str(ROOT / "configs/smoke.yaml"), *option, "schedule.decay=half", run]
    ended = subprocess.run(
        [str(ROOT / "launch/mpirun.sh"), *words], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert (tmp_path / "out").read_text().splitlines()[-len(words) :] == words, ended.stderr
    assert f"no status in {tmp_path}/run\n" in ended.stderr


@pytest.mark.parametrize(
    "notice",
    [
        "mpirun noticed that process rank 1 with PID 0 on node node2 exited on signal 9 (Killed).",
        "prterun noticed that process rank 1 with PID 2 on node node2 exited on\nsignal 9 (Killed).",
    ],
    ids=["Open MPI 4", "Open MPI 5"],
)
def test_the_status_names_the_rank_that_mpirun_reports_as_killed(notice: str, tmp_path: Path) -> None:
    run, line = tmp_path / "run", "-" * 74
    record = f"from dist_train.rundir.status import *; StatusFile(Path('{run}/status.json'), 2).change('running')"
    killed = f'mkdir {run}; "{sys.executable}" -c "{record}"; printf "%s\\n" {line} "{notice}" {line} >&2; exit 137'
    environment = with_programs(tmp_path, killed) | {"PYTHONPATH": str(ROOT)}
    command = [str(ROOT / "launch/mpirun.sh"), "train", str(ROOT / "configs/smoke.yaml"), f"--run-dir={run}"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ended.returncode == 1, ended.stderr
    assert load_status(run / "status.json").reason.startswith("rank 1 (node2) was killed by signal 9; ")
    assert notice in ended.stderr


def test_the_help_of_train_is_printed_once_and_nothing_is_launched(tmp_path: Path) -> None:
    environment = with_programs(tmp_path, f"touch {tmp_path}/out") | {"PYTHONPATH": str(ROOT)}
    command = [str(ROOT / "launch/mpirun.sh"), "train", "--help"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout.count("usage: ")) == (0, 1)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "script",
    [("mpirun.sh",), ("local.sh", "--gloo"), ("horovodrun.sh", "-H", "localhost:2")],
    ids=lambda words: words[0],
)
def test_first_request_to_stop_ends_a_command_that_does_not_save(script: tuple[str, ...], tmp_path: Path) -> None:
    environment = with_programs(tmp_path, f"touch {tmp_path}/started; exec sleep 1000")
    command = [str(ROOT / "launch" / script[0]), *script[1:], "landscape", "direction", "runs/demo"]
    with subprocess.Popen(command, env={**os.environ, **environment}) as process:
        try:
            wait_for((tmp_path / "started").exists)
            process.send_signal(signal.SIGTERM)
            assert process.wait(PATIENCE) == 1
        finally:
            process.kill()


@pytest.mark.parametrize("script", [("mpirun.sh",), ("local.sh",), ("local.sh", "--gloo")], ids=" ".join)
@pytest.mark.parametrize("code", [0, 1])
def test_a_request_to_stop_during_the_set_up_is_followed(script: tuple[str, ...], code: int, tmp_path: Path) -> None:
    # A signal to the script alone, or also to the Python that it runs.
    python = f'echo "$@" >>{tmp_path}/calls\n[ "$1" != -c ] || kill -INT $PPID\nexit {code}'
    write_programs(tmp_path, python=python, mpirun="")
    command = [str(ROOT / "launch" / script[0]), *script[1:], "landscape", "direction", "runs/demo"]
    ended = subprocess.run(command, env={**os.environ, "DIST_TRAIN_PYTHON": f"{tmp_path}/python"}, capture_output=True)
    assert (ended.returncode, ended.stderr) == (75, b"")
    assert "landscape" not in (tmp_path / "calls").read_text()


def test_a_request_to_stop_right_before_the_launch_is_not_lost(tmp_path: Path) -> None:
    write_programs(tmp_path, python=f'echo "$@" >>{tmp_path}/calls')
    (tmp_path / "first").write_text("""trap '[[ $BASH_COMMAND != exec* ]] || kill -TERM $$' DEBUG""")
    environment = {**os.environ, "DIST_TRAIN_PYTHON": f"{tmp_path}/python", "BASH_ENV": f"{tmp_path}/first"}
    ended = subprocess.run([str(ROOT / "launch/local.sh"), "evaluate", "runs/demo"], env=environment, check=False)
    assert ended.returncode == -signal.SIGTERM
    assert "evaluate" not in (tmp_path / "calls").read_text()


def other_end(pair: tuple[int, int]) -> int:
    """Close one end of a pipe or a terminal, and return the other one."""
    os.close(pair[0])
    return pair[1]


@pytest.mark.parametrize(
    "open_output",
    [lambda: os.open("/dev/full", os.O_WRONLY), lambda: other_end(os.pipe()), lambda: other_end(pty.openpty())],
    ids=["full disk", "end of tee", "closed terminal"],
)
def test_output_that_cannot_be_written_ends_neither_script_nor_ranks(
    open_output: Callable[[], int], tmp_path: Path
) -> None:
    lines = f"for each in 1 2 3; do echo $each; echo $each >&2; sleep 0.1; done; echo written >{tmp_path}/out"
    command = f"""
        . launch/common.sh
        say begins
        rank_environment=(NAME=value) launch_id=none error_log={tmp_path}/errors saves=0
        launch stop_at_once {tmp_path}/programs/mpirun
        echo "$launcher_status" >>{tmp_path}/out
    """
    words, environment = ["bash", "-euo", "pipefail", "-c", command], with_programs(tmp_path, lines)
    with os.fdopen(open_output(), "w") as output:
        subprocess.run(words, cwd=ROOT, env=environment, stdout=output, stderr=output, timeout=PATIENCE)
    assert (tmp_path / "out").read_text() == "written\n0\n"


def test_output_after_a_traceback_is_shown_at_once_and_that_of_horovodrun_is_left_out(tmp_path: Path) -> None:
    traceback = 'Traceback (most recent call last):\n  File "program.py", line 1, in <module>\n    work()\n'
    shown = tmp_path / "shown"
    command = ["sed", "-u", "-E", "-f", str(ROOT / "launch/output.sed")]
    with shown.open("w") as output, subprocess.Popen(command, stdin=subprocess.PIPE, stdout=output, text=True) as sed:
        assert sed.stdin is not None
        sed.stdin.write(f"{traceback}ValueError: harmless\nstep 1\n")
        sed.stdin.flush()
        wait_for(lambda: "step 1" in shown.read_text())
        end = "RuntimeError: Horovod detected that one or more processes exited with non-zero status"
        sed.stdin.write(f"{traceback}{end}\nProcess name: 1\nExit code: 3\n\n[0]<stdout>:step 2\n")
        sed.stdin.close()
    assert shown.read_text() == f"{traceback}ValueError: harmless\nstep 1\nstep 2\n"


@pytest.mark.parametrize(
    ("ends", "shown"),
    [
        pytest.param("{0:3}{1:3}\n{T}\nstep 1\n", "step 1\n", id="two on one line"),
        pytest.param("{1:2}\n{T}\n{0:143}\nstep 1\n", "step 1\n", id="one still exiting"),
        pytest.param("{1:2}{0:143}\n{T}\n", "", id="one still exiting, on one line"),
        pytest.param("{1:2}\n{T}\n{0:137}\nstep 1\n", "step 1\n", id="one that takes long to exit"),
        pytest.param("{1:137}\n{T}\n{0:143}\n", "{1:137}\n{0:143}\n", id="one killed"),
        pytest.param("{0:143}\n{T}\n{1:2}\n", "{0:143}\n", id="one ended by another first"),
        pytest.param("{0:1}\n{T}\n{1:143}\n", "{0:1}\n{1:143}\n", id="an error"),
        pytest.param("{1:2}{0:1}\n", "{1:2}{0:1}\n", id="an error beside"),
        pytest.param("Terminated\n[1]<stderr>:Terminated\n", "", id="what the shells say"),
        pytest.param("Terminated early\\n", "Terminated early\\n", id="what a program says"),
        pytest.param("sh: line 1: 812 Terminated   env A=1 python\n", "", id="what bash as sh says"),
    ],
)
def test_notices_of_horovodrun_about_our_exit_codes_are_left_out(ends: str, shown: str) -> None:
    if (spec := find_spec("horovod")) is None or spec.origin is None:
        pytest.skip("Horovod is not installed")
    source = (Path(spec.origin).parent / "runner" / "gloo_run.py").read_text()
    ended, terminating = re.findall(r"'(Process \{idx\} exit .*|Terminating remaining .*)'\.format", source)

    def printed(text: str) -> str:
        text = text.replace("{T}", terminating.format(idx=1))
        return re.sub(r"\{(\d):(\d+)\}", lambda found: ended.format(idx=found[1], ec=found[2]), text)

    command = ["sed", "-u", "-E", "-f", str(ROOT / "launch/output.sed")]
    run = subprocess.run(command, input=printed(ends), capture_output=True, text=True, check=True)
    assert run.stdout == printed(shown)


@pytest.mark.parametrize(
    ("command", "launch_in_status", "outcome"),
    [
        ("lr-range", "", "TERM"),
        ("replay", "", "TERM"),
        ("train", "", "not yet"),
        ("train", "another", "not yet"),
        ("train", "this", "USR2"),
    ],
)
def test_a_stop_request_reaches_ranks_that_are_all_on_other_machines(
    tmp_path: Path, command: str, launch_in_status: str, outcome: str
) -> None:
    if launch_in_status:
        (tmp_path / "status.json").write_text(f'{{"launch": "{launch_in_status}"}}')
    lines = f"""
        . launch/common.sh
        dist_train=(echo)
        check_run {command} config.yaml
        run_directory=${{run_directory:+{tmp_path}}}
        launch_id=this
        exec {{output}}< <(
            trap 'echo USR2; exit' USR2
            trap 'echo TERM; exit' TERM
            echo ready
            while sleep 0.05; do :; done
        )
        launcher=$!
        read -r <&"$output"
        if stop_through_mpirun; then
            read -r signal <&"$output"
        else
            signal='not yet'
            kill -KILL "$launcher"
        fi
        echo "$signal"
    """
    ended = subprocess.run(["bash", "-euc", lines], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert ended.stdout == f"{outcome}\n", ended.stderr


@pytest.mark.parametrize("command", ["lr-range", "replay"])
def test_a_stop_request_ends_horovodrun_where_all_ranks_are_on_other_machines(tmp_path: Path, command: str) -> None:
    write_programs(tmp_path, ssh="exit 0")
    environment = with_programs(tmp_path, f"touch {tmp_path}/started; exec sleep 600")
    environment["PATH"] = f"{tmp_path}:{environment['PATH']}"
    script = [str(ROOT / "launch/horovodrun.sh"), "-H", "elsewhere:2", command, "config.yaml"]
    with subprocess.Popen(script, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True) as process:
        wait_for((tmp_path / "started").exists)
        process.send_signal(signal.SIGUSR2)
        _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1, errors


@pytest.mark.parametrize(("host", "is_given"), [("elsewhere:2", True), ("localhost:2", False)])
def test_horovodrun_is_given_the_network_interface_for_ranks_on_other_machines(
    host: str, is_given: bool, tmp_path: Path
) -> None:
    # It sets HOROVOD_GLOO_IFACE itself, for ranks that are all on this machine to that of loopback.
    write_programs(tmp_path, ssh="exit 0")
    environment = with_programs(tmp_path, f"printf '%s\\n' \"$@\" >{tmp_path}/out")
    environment |= {"PATH": f"{tmp_path}:{environment['PATH']}", "HOROVOD_GLOO_IFACE": "ib0"}
    script = [str(ROOT / "launch/horovodrun.sh"), "-H", host, "runs"]
    subprocess.run(script, cwd=tmp_path, env=environment, check=True)
    options = (tmp_path / "out").read_text().splitlines()
    assert (["--network-interfaces", "ib0"] in map(list, pairwise(options))) == is_given
