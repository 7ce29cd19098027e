"""One trial's stage: its disk, its clock, its run directory, and the launch that is at work."""

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
    """What faults act upon, and what they find wrong on their way."""

    subject: Subject
    folder: Path
    disk: Disk
    shim: Shim
    random: Random
    patience: float
    """Seconds: longer than this nothing may take that ought to end."""
    launch: Launch | None = None
    stolen: list[socket.socket] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)
    """What a fault itself saw go wrong: a refusal that did not come, a message that is missing."""
    launches: int = 0
    is_run_free: bool = False
    """Whether the run directory was emptied, so that nothing is lost when the next launch begins anew."""

    @property
    def run(self) -> Path:
        """The run directory."""
        return self.disk.root / "run"

    @property
    def at_work(self) -> Launch:
        """The launch that is at work."""
        assert self.launch is not None
        return self.launch

    def start(self, ranks: int, controller: str, *overrides: str, program: tuple[str, ...] = ()) -> Launch:
        """Start a launch on the run directory."""
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
        """Return how many records the run has written."""
        try:
            return (self.run / "metrics.jsonl").read_bytes().count(b"\n")
        except OSError:
            return 0

    def complain(self, text: str) -> None:
        """Take note that something is wrong."""
        self.complaints.append(text)

    def clear_run(self) -> None:
        """Empty the run directory, as a user would who begins anew."""
        shutil.rmtree(self.run, ignore_errors=True)
        self.is_run_free = True

    def close(self) -> None:
        """Give everything back."""
        if self.launch is not None:
            self.launch.kill_all()
        for thief in self.stolen:
            thief.close()
        self.shim.close()
        self.disk.close()
