"""Elastic launches for tests: their ranks by slot, and random faults of them."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Literal

from tests.launching import LaunchResult, descendants, environment, events, kill
from tests.waiting import PATIENCE, is_alive, wait_for, wait_until_gone

ROOT = Path(__file__).parents[1]


def slot_of(pid: int) -> int | None:
    """Return the slot of a rank of an elastic launch; None for other or ended processes."""
    try:
        fields = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        is_rank = b"launch" in Path(f"/proc/{parent}/cmdline").read_bytes().split(b"\0")
    except (OSError, ValueError):
        return None
    variables = {name: value for name, _, value in (field.partition(b"=") for field in fields)}
    return int(variables[b"RANK"]) if b"DIST_TRAIN_MEMBERSHIP" in variables and is_rank else None


class _LaunchProcess:
    """The process of a `dist-train launch`; a context manager that kills it and its descendants at the end."""

    log: Path
    process: subprocess.Popen[bytes]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        kill(self.process)

    def wait(self, timeout: float = PATIENCE) -> LaunchResult:
        """Wait for the end of the launch and all its processes."""
        left = descendants(self.process.pid)
        self.process.wait(timeout)
        wait_until_gone(left)
        return LaunchResult(self.process.returncode, self.log.read_text())

    def _start(self, *arguments: str, cwd: Path | None = None, variables: Mapping[str, str]) -> None:
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "dist_train", "launch", *arguments],
                cwd=cwd,
                env=environment(OMP_NUM_THREADS="1", **variables),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )


@dataclass
class ElasticRun(_LaunchProcess):
    """A launch of `dist-train train CONFIG --run-dir RUN` on so many ranks."""

    config: str
    run: Path
    ranks: int
    options: tuple[str, ...]
    extra: Mapping[str, str] = field(default_factory=dict)
    others: list[JoinedLaunch] = field(default_factory=list)
    """Launches that have joined."""

    def __enter__(self) -> ElasticRun:
        self.log = self.run.with_suffix(".log")
        command = ["train", self.config, "--run-dir", str(self.run)]
        self._start("-np", str(self.ranks), *self.options, *command, variables=self.extra)
        return self

    def join(self, ranks: int) -> JoinedLaunch:
        """Return a launch of so many ranks that join this one, as from another node."""
        (file,) = wait_for(lambda: list(self.run.glob("join-*.json")), lambda: self.log.read_text())
        joined = JoinedLaunch(file, ranks, self.run.with_name(f"joined-{time.monotonic_ns()}.log"))
        self.others.append(joined)
        return joined

    def slots(self) -> dict[int, int]:
        """Return the process ids of the living ranks by slot, including those of joined launches."""
        launchers = [self.process, *(other.process for other in self.others)]
        found = {slot_of(pid): pid for launcher in launchers for pid in descendants(launcher.pid)}
        return {slot: pid for slot, pid in found.items() if slot is not None}

    def send(self, slot: int, number: signal.Signals) -> int:
        """Send a signal to the process of `slot`; return its id."""
        pid = self.slots()[slot]
        os.kill(pid, number)
        return pid

    def joined(self) -> set[int]:
        """Return the ids of the processes that have joined and made an update."""
        return {
            int(pid) for event in events(self.run, "rank_joined") for pid in re.findall(r"process (\d+)", event["who"])
        }

    def step(self) -> int:
        """Return the last update that was recorded."""
        try:
            lines = (self.run / "metrics.jsonl").read_bytes().split(b"\n")[:-1]
        except FileNotFoundError:
            return 0
        return max((json.loads(line)["step"] for line in lines[-5:]), default=0)


@dataclass
class JoinedLaunch(_LaunchProcess):
    """A launch of `ranks` that join the one that wrote `file`."""

    file: Path
    ranks: int
    log: Path

    def __enter__(self) -> JoinedLaunch:
        variables = {"PYTHONPATH": str(ROOT)}
        self._start("-np", str(self.ranks), "--join", str(self.file), cwd=Path("/"), variables=variables)
        return self

    def pids(self) -> list[int]:
        """Return the process ids of its ranks."""
        return [pid for pid in descendants(self.process.pid) if slot_of(pid) is not None]


FAILING = """
import os
from pathlib import Path
from dist_train.optim.noise import SmoothOut


class Failing(SmoothOut):
    def perturb(self, step):
        if Path(__file__).with_name(f"fail-{os.getpid()}").exists():
            raise RuntimeError("told to fail")
        super().perturb(step)
"""
"""A noise method like `smoothout` that raises on a rank where a file tells it to."""

HELD = """
import time
from pathlib import Path
from dist_train.optim.noise import SmoothOut


class Held(SmoothOut):
    def perturb(self, step):
        while step == 12 and not Path(__file__).with_name("go-on").exists():
            time.sleep(0.01)
        super().perturb(step)
"""
"""A noise method like `smoothout` whose run does not end before a file tells it to."""

Fault = Literal["kill", "stop", "pause", "fail"]


@dataclass
class Faults:
    """Random faults of the ranks of `launch`, of which at least one keeps the state.

    `plugin_folder` is the folder of the plug-in `FAILING`.
    """

    launch: ElasticRun
    random: random.Random
    plugin_folder: Path
    injected: Counter[Fault] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._with_state = set(self.launch.slots().values())
        self._lost: set[int] = set()
        self._paused: dict[int, float] = {}

    def inject(self, count: int, gap: tuple[float, float] = (0.0, 1.0)) -> None:
        """Inject `count` faults, of all kinds in five, each after a random pause between the seconds of `gap`."""
        kinds: list[Fault] = []
        for _ in range(count):
            self._rest(self.random.uniform(*gap))
            victim = wait_for(self._choose, lambda: self.launch.log.read_text()[-3000:])
            if not kinds:
                kinds = ["kill", "kill", "stop", "pause", "fail"]
                self.random.shuffle(kinds)
            self._inject(kinds.pop(), victim)
        for pid in list(self._paused):
            self._resume(pid)

    def _choose(self) -> int | None:
        """Return a rank to disturb; None while no other rank holds the state."""
        self._rest(0.05)
        living = {pid for pid in self.launch.slots().values() if is_alive(pid)}
        self._with_state |= self.launch.joined()
        holders = sorted((living & self._with_state) - self._lost - set(self._paused))
        candidates = sorted(living - self._lost - set(self._paused))
        joining = [pid for pid in candidates if pid not in holders]
        # Ranks take seconds to start: most may join undisturbed.
        if joining and holders and self.random.random() < 0.02:
            return self.random.choice(joining)
        return self.random.choice(holders) if len(holders) >= 2 else None

    def _inject(self, fault: Fault, pid: int) -> None:
        self.injected[fault] += 1
        match fault:
            case "pause":
                os.kill(pid, signal.SIGSTOP)
                self._paused[pid] = time.monotonic() + self.random.uniform(0.05, 1.5)
                return
            case "kill":
                os.kill(pid, signal.SIGKILL)
            case "stop":
                os.kill(pid, signal.SIGSTOP)
            case "fail":
                (self.plugin_folder / f"fail-{pid}").touch()
        self._lost.add(pid)

    def _rest(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while True:
            for pid, due in list(self._paused.items()):
                if time.monotonic() >= due:
                    self._resume(pid)
            if time.monotonic() >= until:
                return
            time.sleep(0.01)

    def _resume(self, pid: int) -> None:
        del self._paused[pid]
        if is_alive(pid):
            os.kill(pid, signal.SIGCONT)
