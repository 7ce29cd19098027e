"""Elastic launches for tests: their ranks by slot, what is done to them at random, and how the run ended."""

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

from tests.launching import Ended, descendants, environment, kill, records
from tests.waiting import PATIENCE, is_alive, wait_for, wait_until_gone

ROOT = Path(__file__).parents[1]


def slot_of(pid: int) -> int | None:
    """Return the slot of the process; None where it is none of an elastic launch's ranks, or has ended."""
    try:
        fields = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        is_rank = b"launch" in Path(f"/proc/{parent}/cmdline").read_bytes().split(b"\0")
    except (OSError, ValueError):
        return None
    named = [field for field in fields if field.startswith(b"DIST_TRAIN_SLOT=")]
    return int(named[0].partition(b"=")[2]) if named and is_rank else None


@dataclass
class ElasticRun:
    """A launch of `dist-train train CONFIG` in `run`; a context manager, after which nothing of it is left."""

    config: str
    run: Path
    ranks: int
    options: tuple[str, ...]
    extra: Mapping[str, str] | None = None
    others: list[JoinedLaunch] = field(default_factory=list)
    """Launches that have joined, and have begun."""

    def __enter__(self) -> ElasticRun:
        self.log = self.run.with_suffix(".log")
        program = [sys.executable, "-m", "dist_train", "launch", "-np", str(self.ranks), *self.options]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*program, "train", self.config, "--run-dir", str(self.run)],
                env=environment(OMP_NUM_THREADS="1", **(self.extra or {})),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        kill(self.process)

    def join(self, ranks: int) -> JoinedLaunch:
        """Return a launch of so many ranks that join this one, as from another node."""
        (file,) = wait_for(lambda: list(self.run.glob("join-*.json")), lambda: self.log.read_text())
        joined = JoinedLaunch(file, ranks, self.run.with_name(f"joined-{time.monotonic_ns()}.log"))
        self.others.append(joined)
        return joined

    def slots(self) -> dict[int, int]:
        """Return the living ranks' process ids by slot, those that other launches have brought included."""
        launchers = [self.process, *(other.process for other in self.others)]
        found = {slot_of(pid): pid for launcher in launchers for pid in descendants(launcher.pid)}
        return {slot: pid for slot, pid in found.items() if slot is not None}

    def send(self, slot: int, number: signal.Signals) -> int:
        """Send a signal to the process of `slot`; return its id."""
        pid = self.slots()[slot]
        os.kill(pid, number)
        return pid

    def wait(self, timeout: float = PATIENCE) -> Ended:
        """Wait for the end of the launch and of all that it started."""
        left = descendants(self.process.pid)
        self.process.wait(timeout)
        wait_until_gone(left)
        return Ended(self.process.returncode, self.log.read_text())

    def joined(self) -> set[int]:
        """Return the processes that have joined, and have made an update."""
        told = [each["who"] for each in records(self.run, "event") if each["event"] == "rank_joined"]
        return {int(pid) for who in told for pid in re.findall(r"process (\d+)", who)}

    def step(self) -> int:
        """Return the last update that was recorded."""
        try:
            lines = (self.run / "metrics.jsonl").read_bytes().split(b"\n")[:-1]
        except FileNotFoundError:
            return 0
        return max((json.loads(line)["step"] for line in lines[-5:]), default=0)


@dataclass
class JoinedLaunch:
    """A launch of `ranks` that join that of `file`; a context manager, after which nothing of it is left."""

    file: Path
    ranks: int
    log: Path

    def __enter__(self) -> JoinedLaunch:
        program = [sys.executable, "-m", "dist_train", "launch", "-np", str(self.ranks), "--join", str(self.file)]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                program,
                cwd="/",
                env=environment(OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT)),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        kill(self.process)

    def pids(self) -> list[int]:
        """Return the processes of its ranks."""
        return [pid for pid in descendants(self.process.pid) if slot_of(pid) is not None]

    def wait(self, timeout: float = PATIENCE) -> Ended:
        """Wait for its end, and that of its ranks."""
        left = descendants(self.process.pid)
        self.process.wait(timeout)
        wait_until_gone(left)
        return Ended(self.process.returncode, self.log.read_text())


FAILING = """
import os
from pathlib import Path
from dist_train.optim.noise import SmoothOut


class Failing(SmoothOut):
    def perturb(self, step):
        order = Path(__file__).with_name(f"fail-{os.getpid()}")
        if order.exists():
            raise RuntimeError("ordered to fail")
        super().perturb(step)
"""
"""A noise method as `smoothout` is, of a rank that can be made to fail by a file."""

Fault = Literal["kill", "stop", "pause", "fail"]


@dataclass
class Faults:
    """Does something to the ranks of `launch` at random, but leaves one that holds the state; `orders` is the folder
    of the plug-in `FAILING`.
    """

    launch: ElasticRun
    random: random.Random
    orders: Path
    done: Counter[Fault] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._veterans = set(self.launch.slots().values())
        self._condemned: set[int] = set()
        self._paused: dict[int, float] = {}

    def inflict(self, count: int, gap: tuple[float, float] = (0.0, 1.0)) -> None:
        """Do `count` things, with a pause of so many seconds between them, in which what comes back may come back."""
        for _ in range(count):
            self._rest(self.random.uniform(*gap))
            victim = wait_for(self._choose, lambda: self.launch.log.read_text()[-3000:])
            kinds: tuple[Fault, ...] = ("kill", "kill", "stop", "pause", "fail")
            self._do(self.random.choice(kinds), victim)
        for pid in list(self._paused):
            self._resume(pid)

    def _choose(self) -> int | None:
        """Return a rank that something may be done to, once there is one beside another that holds the state."""
        self._rest(0.05)
        living = {pid for pid in self.launch.slots().values() if is_alive(pid)}
        self._veterans |= self.launch.joined()
        whole = sorted((living & self._veterans) - self._condemned - set(self._paused))
        candidates = sorted(living - self._condemned - set(self._paused))
        joining = [pid for pid in candidates if pid not in whole]
        # They take seconds to start: most may come in.
        if joining and whole and self.random.random() < 0.02:
            return self.random.choice(joining)
        return self.random.choice(whole) if len(whole) >= 2 else None

    def _do(self, fault: Fault, pid: int) -> None:
        self.done[fault] += 1
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
                (self.orders / f"fail-{pid}").touch()
        self._condemned.add(pid)

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
