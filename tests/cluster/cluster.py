"""A real Slurm of a few nodes on this machine (slurm_rig.sh), and what tests ask of it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.waiting import PATIENCE, wait_for

ROOT = Path(__file__).parents[2]
RIG = Path(__file__).with_name("slurm_rig.sh")
_PROGRAMS = ("slurmctld", "slurmd", "sbatch", "sshd", "ip", "unshare", "nsenter", "ps")
_ENDED = frozenset({"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "OUT_OF_MEMORY"})


def what_is_missing() -> str | None:
    """Return why there can be no cluster here; None where there can."""
    if os.geteuid() != 0:
        return "only root can make the cluster's nodes"
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    missing = [program for program in _PROGRAMS if shutil.which(program, path=path) is None]
    if missing:
        return f"missing: {', '.join(missing)} (docker/debian_packages.sh installs them)"
    if subprocess.run(["unshare", "--mount", "--net", "--pid", "--fork", "true"], capture_output=True).returncode:
        return "this machine does not let root make namespaces (CAP_SYS_ADMIN)"
    return None


@dataclass(frozen=True)
class Job:
    """What Slurm says of a job; `code` is the batch script's exit status."""

    state: str
    code: int
    restarts: int
    output: str


class Cluster:
    """The nodes node1, node2, ..., and their Slurm; `disk` is a small file system that all of them share."""

    def __init__(self, folder: Path, nodes: int = 2) -> None:
        """Boot it; its files lie in `folder`."""
        self.nodes = tuple(f"node{number}" for number in range(1, nodes + 1))
        self.disk = folder.with_name(f"{folder.name}-disk")
        self.disk.mkdir()
        # before the nodes, which see what is mounted when they boot
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(self.disk)], check=True)
        self._settings = {
            "SLURM_RIG_DIR": str(folder),
            "SLURM_RIG_NETWORK": f"10.{60 + os.getpid() % 150}.{time.time_ns() // 1000 % 250}",
        }
        self._rig("up", str(nodes))

    def down(self) -> None:
        """Stop all of it."""
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
        ended = self.run("sbatch", "--parsable", *options, program, folder=folder, **environment)
        assert ended.returncode == 0, ended.stderr
        return int(ended.stdout)

    def job(self, job: int | str) -> Job:
        """Return how a job, or a task of an array (17_2), stands."""
        text = self._rig("exec", "scontrol", "show", "job", str(job))
        fields = dict(re.findall(r"(\w+)=(\S+)", text))
        log = Path(fields["StdOut"])
        output = log.read_text() if log.is_file() else ""
        return Job(fields["JobState"], int(fields["ExitCode"].split(":")[0]), int(fields["Restarts"]), output)

    def batch_host(self, job: int) -> str:
        """Return the node that a job's batch script runs on."""
        found = re.search(r"BatchHost=(\S+)", self._rig("exec", "scontrol", "show", "job", str(job)))
        assert found is not None
        return found[1]

    def wait(self, job: int | str, seconds: float = PATIENCE) -> Job:
        """Return the job once it has ended for good."""
        wait_for(lambda: self.job(job).state in _ENDED, lambda: self.job(job).output, seconds)
        return self.job(job)

    def control(self, *arguments: str) -> None:
        """Run scontrol on the login node."""
        self._rig("exec", "scontrol", *arguments)

    def kill_node(self, node: str) -> None:
        """Let a node lose its power, and Slurm know at once rather than after its time-out."""
        self._rig("kill-node", node)
        self.control("update", f"nodename={node}", "state=down", "reason=test")

    def cut_power(self, node: str) -> None:
        """Let a node lose its power, without a farewell of its connections; Slurm finds out, or not, by itself."""
        self._rig("on", node, "ip", "link", "set", "eth0", "down")
        self._rig("kill-node", node)

    def boot(self, node: str) -> None:
        """Boot a node again."""
        self._rig("start-node", node)

    def start_node(self, node: str) -> None:
        """Boot a node again and wait until jobs can run there."""
        self._rig("start-node", node)

        def is_idle() -> bool:
            # Slurm refuses it for a node that it has taken back by itself
            self._start("exec", "scontrol", "update", f"nodename={node}", "state=resume", folder=ROOT)
            return self._rig("exec", "sinfo", "-h", "-n", node, "-p", "debug", "-o", "%T").strip() == "idle"

        wait_for(is_idle)

    def processes(self) -> list[str]:
        """Return what runs on the nodes beside their daemons."""
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


def status(run: Path) -> dict[str, Any]:
    """Return the run's status; nothing where there is none yet."""
    try:
        fields: dict[str, Any] = json.loads((run / "status.json").read_text())
    except (OSError, ValueError):
        return {}
    return fields
