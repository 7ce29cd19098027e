"""`--help` of every script names the environment variables that it reads, and no others."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.waiting import PATIENCE

ROOT = Path(__file__).parents[2]
LAUNCH = ("launch/local.sh", "launch/mpirun.sh", "launch/horovodrun.sh", "launch/demo.sh")
BATCH = tuple(sorted(f"slurm/{path.name}" for path in (ROOT / "slurm").glob("*.sh") if path.name != "prologue.sh"))
SHARED = {"launch": ("launch/common.sh",), "slurm": ("slurm/prologue.sh", "launch/common.sh")}

NO_KNOBS = {
    r"SLURMD?_.*": "Slurm tells the job by them where it runs",
    r"BASH_.*|SECONDS|PWD": "bash's own",
    r"OMPI_MCA_.*": "Open MPI's settings: where one is set, it is kept",
    r"NCCL_SOCKET_IFNAME": "NCCL's setting: where it is set, it is kept over NETWORK_INTERFACE",
    r"NVIDIA_VISIBLE_DEVICES": "the container runtime's setting: where it is set, it is kept",
    r"PYTHONPATH": "Python's setting: the project goes before it",
    r"MASTER_ADDR": "torch's name for where the ranks meet: where it is set, it is kept",
}
"""Names that scripts read, but that are not theirs to explain, and why."""

KEPT_OVER_OURS = {"HOROVOD_GLOO_IFACE", "GLOO_SOCKET_IFNAME"}
"""Settings of Horovod and torch that batch scripts keep over NETWORK_INTERFACE."""

PASSED_ON = {
    "launch/horovodrun.sh": {"HOROVOD_GLOO_IFACE", "HOROVOD_CYCLE_TIME"},
    "launch/local.sh": {"HOROVOD_CYCLE_TIME"},
}
"""Horovod reads them; the script hands its environment on."""


def code_of(path: str) -> str:
    """Return the script without comments and without the text of its help."""
    text = re.sub(r"<<'(\w+)'\n.*?^\1$", "", (ROOT / path).read_text(), flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"(^|\s)#.*", r"\1", text)


def variables_read(script: str) -> set[str]:
    """Return the names in capitals that `script` reads, itself or in the functions that it comes to."""
    shared = "\n".join(code_of(path) for path in SHARED[script.split("/")[0]])
    function = re.compile(r"^(\w+)\(\) \{\n(.*?)^\}$", re.MULTILINE | re.DOTALL)
    bodies = dict(function.findall(shared))
    reached = code_of(script) + function.sub("", shared)
    waiting = dict(bodies)
    while found := [name for name in waiting if re.search(rf"(?<![\w./-]){name}(?![\w=-])", reached)]:
        for name in found:
            reached += waiting.pop(name)
    return set(re.findall(r"\$(?:\{#?)?([A-Z][A-Z0-9]+(?:_[A-Za-z0-9]+)*)", reached))


def variables_named(script: str) -> set[str]:
    """Return the names that `script --help` lists, one at the beginning of a line."""
    ended = subprocess.run([str(ROOT / script), "--help"], capture_output=True, text=True, timeout=PATIENCE)
    assert (ended.returncode, ended.stderr) == (0, "")
    return set(re.findall(r"^  ([A-Z][A-Z0-9_]+) ", ended.stdout, re.MULTILINE))


@pytest.mark.parametrize("script", [*LAUNCH, *BATCH])
def test_help_names_the_variables_that_are_read_and_no_others(script: str) -> None:
    read = {name for name in variables_read(script) if not any(re.fullmatch(kind, name) for kind in NO_KNOBS)}
    if script in BATCH:
        read -= KEPT_OVER_OURS
    assert variables_named(script) == read | PASSED_ON.get(script, set())


def test_the_reader_follows_calls_and_skips_comments() -> None:
    assert "MAX_REQUEUES" in variables_read("slurm/lb_8192.sh")
    assert "MAX_REQUEUES" not in variables_read("slurm/report.sh")
    assert "DIRECTORY" not in variables_read("slurm/lb_8192.sh")
    assert "SLURM_RESTART_COUNT" in variables_read("slurm/landscape.sh")
