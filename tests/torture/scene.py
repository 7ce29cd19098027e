"""One trial's disk, clock, run directory and running launch."""

from __future__ import annotations

import shutil
import socket
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from tests.torture.disk import Disk
from tests.torture.processes import Launch
from tests.torture.shim import Shim
from tests.torture.subject import Subject


@dataclass
class Scene:
    """A trial's state, on which faults act."""

    subject: Subject
    folder: Path
    disk: Disk
    shim: Shim
    random: Random
    patience: float
    """Seconds after which a launch that should end counts as hanging."""
    launch: Launch | None = None
    taken_ports: list[socket.socket] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    """Problems that faults found, such as a missing refusal or message."""
    launches: int = 0

    @property
    def run(self) -> Path:
        """The run directory."""
        return self.disk.root / "run"

    @property
    def running(self) -> Launch:
        """The running launch."""
        assert self.launch is not None
        return self.launch

    def start(self, ranks: int, controller: str, *overrides: str, program: tuple[str, ...] = ()) -> Launch:
        """Start a launch with the run directory."""
        self.launches += 1
        return Launch(
            ranks,
            controller,
            self.subject.arguments(self.run, *overrides),
            self.folder / f"output-{self.launches}.log",
            self.subject.code,
            {**self.subject.environment(), **self.shim.environment(), "TORTURE_FOLDER": str(self.folder)},
            program or ("-m", "dist_train"),
        )

    def lines(self) -> int:
        """Return the number of records of the run."""
        try:
            return (self.run / "metrics.jsonl").read_bytes().count(b"\n")
        except OSError:
            return 0

    def report(self, text: str) -> None:
        """Record a problem."""
        self.problems.append(text)

    def clear_run(self) -> None:
        """Remove the run directory, as a user would to start from the beginning."""
        shutil.rmtree(self.run, ignore_errors=True)

    def close(self) -> None:
        """End the launch and release all resources."""
        if self.launch is not None:
            self.launch.kill_all()
        for listener in self.taken_ports:
            listener.close()
        self.shim.close()
        self.disk.close()
