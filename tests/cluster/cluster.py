"""A real Slurm cluster of a few nodes on this machine (slurm_rig.sh)."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.torture.disk import can_mount
from tests.waiting import PATIENCE, wait_for

ROOT = Path(__file__).parents[2]
RIG = Path(__file__).with_name("slurm_rig.sh")
_PROGRAMS = ("slurmctld", "slurmd", "sbatch", "sshd", "ip", "unshare", "nsenter", "ps")
_ENDED = frozenset({"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "OUT_OF_MEMORY"})


def missing_requirement() -> str | None:
    """Return why this machine cannot run the cluster, or None."""
    if os.geteuid() != 0:
        return "only root can create the cluster's nodes"
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    missing = [program for program in _PROGRAMS if shutil.which(program, path=path) is None]
    if missing:
        return f"missing: {', '.join(missing)} (docker/debian_packages.sh installs them)"
    namespaces = ("unshare", "--mount", "--net", "--pid", "--fork")
    with tempfile.TemporaryDirectory() as folder:
        device = ("mknod", f"{folder}/null", "c", "1", "3")
        if not can_mount() or subprocess.run([*namespaces, *device], capture_output=True).returncode:
            return "this machine does not let root mount, or create namespaces or devices (CAP_SYS_ADMIN, CAP_MKNOD)"
    return None


@dataclass(frozen=True)
class Job:
    """The state of a job in Slurm; `code` is the batch script's exit code."""

    state: str
    code: int
    restarts: int
    output: str


@contextmanager
def booted_cluster(folder: Path, nodes: int = 2) -> Iterator[Cluster]:
    """Boot a cluster for the block; skip the test where this machine cannot."""
    if missing := missing_requirement():
        pytest.skip(missing)
    cluster = Cluster(folder, nodes)
    try:
        cluster.up()
        yield cluster
    finally:
        cluster.down()


class Cluster:
    """The nodes node1, node2, ..., and their Slurm; `disk` is a small file system that they share."""

    def __init__(self, folder: Path, nodes: int = 2) -> None:
        """Choose names and addresses; the nodes' files are in `folder`."""
        self.nodes = tuple(f"node{number}" for number in range(1, nodes + 1))
        self.disk = folder.with_name(f"{folder.name}-disk")
        self._settings = {
            "SLURM_RIG_DIR": str(folder),
            "SLURM_RIG_NETWORK": f"10.{60 + os.getpid() % 150}.{time.time_ns() // 1000 % 250}",
        }

    def up(self) -> None:
        """Boot the nodes."""
        self.disk.mkdir()
        # before the nodes boot, which see earlier mounts only
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(self.disk)], check=True)
        self._rig("up", str(len(self.nodes)))

    def down(self) -> None:
        """Stop all nodes."""
        self._rig("down")
        subprocess.run(["umount", "--lazy", str(self.disk)], check=True)

    def run(self, *command: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run `command` on the login node, in `folder`; it may fail."""
        return self._start("exec", *command, folder=folder, **environment)

    def on(self, node: str, *command: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run `command` on a node, in `folder`; it may fail."""
        return self._start("on", node, *command, folder=folder, **environment)

    def sbatch(self, folder: Path, script: str, *options: str, **environment: str) -> int:
        """Submit the project's batch script `script` from `folder`; return the job's id."""
        program = str(ROOT / "slurm" / script)
        submitted = self.run("sbatch", "--parsable", *options, program, folder=folder, **environment)
        assert submitted.returncode == 0, submitted.stderr
        return int(submitted.stdout)

    def job(self, job: int | str) -> Job:
        """Return the state of a job, or of a task of an array (17_2)."""
        text = self._rig("exec", "scontrol", "show", "job", str(job))
        fields = dict(re.findall(r"(\w+)=(\S+)", text))
        log = Path(fields["StdOut"])
        output = log.read_text() if log.is_file() else ""
        return Job(fields["JobState"], int(fields["ExitCode"].split(":")[0]), int(fields["Restarts"]), output)

    def preempt(self, nodes: int, folder: Path) -> None:
        """Submit a short job of the preempting partition on so many nodes."""
        options = ("--partition=high", "--exclusive", f"--nodes={nodes}", "--output=/dev/null", "--wrap=true")
        submitted = self.run("sbatch", *options, folder=folder)
        assert submitted.returncode == 0, submitted.stderr

    def batch_host(self, job: int) -> str:
        """Return the node that a job's batch script runs on."""
        found = re.search(r"BatchHost=(\S+)", self._rig("exec", "scontrol", "show", "job", str(job)))
        assert found is not None
        return found[1]

    def wait(self, job: int | str, seconds: float = PATIENCE) -> Job:
        """Wait for the final state of the job and return it."""
        wait_for(lambda: self.job(job).state in _ENDED, lambda: self.job(job).output, seconds)
        return self.job(job)

    def control(self, *arguments: str) -> None:
        """Run scontrol on the login node."""
        self._rig("exec", "scontrol", *arguments)

    def stop_controller(self) -> None:
        """Stop Slurm's controller; jobs continue."""
        self.control("shutdown", "slurmctld")

    def start_controller(self) -> None:
        """Start Slurm's controller again and wait until it answers."""
        self._rig("on", "ctl", "sh", "-c", "setsid /usr/sbin/slurmctld -D </dev/null >/dev/null 2>&1 &")
        wait_for(lambda: self._start("exec", "sinfo", folder=ROOT).returncode == 0)

    def kill_node(self, node: str) -> None:
        """Kill all processes of a node, and tell Slurm at once that it is down."""
        self._rig("kill-node", node)
        self.control("update", f"nodename={node}", "state=down", "reason=test")

    def cut_power(self, node: str) -> None:
        """Kill all processes of a node without closing its connections; Slurm is not told."""
        self._rig("on", node, "ip", "link", "set", "eth0", "down")
        self._rig("kill-node", node)

    def boot(self, node: str) -> None:
        """Boot a node again."""
        self._rig("start-node", node)

    def start_node(self, node: str) -> None:
        """Boot a node again and wait until jobs can run there."""
        self.boot(node)

        def is_idle() -> bool:
            # Slurm refuses this for a node that it has already resumed itself.
            self._start("exec", "scontrol", "update", f"nodename={node}", "state=resume", folder=ROOT)
            return self._rig("exec", "sinfo", "-h", "-n", node, "-p", "debug", "-o", "%T").strip() == "idle"

        wait_for(is_idle)

    def processes(self) -> list[str]:
        """Return the processes of jobs on the nodes."""
        return [f"{node}: {line}" for node in self.nodes for line in self._rig("processes", node).splitlines()]

    def _rig(self, *arguments: str) -> str:
        ended = self._start(*arguments, folder=ROOT)
        assert ended.returncode == 0, ended.stdout + ended.stderr
        return ended.stdout

    def _start(self, *arguments: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
        inherited = {
            name: value for name, value in os.environ.items() if not name.startswith(("OMPI_", "PMIX_", "SLURM_"))
        }
        return subprocess.run(
            [str(RIG), *arguments],
            cwd=folder,
            env={**inherited, **self._settings, **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
