"""Where a run lies, and what its files are called."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from dist_train.config import Config, dump_config
from dist_train.outcome import FaultError, UsageError
from dist_train.rundir import atomic


class BrokenFileError(Exception):
    """A file of a run that cannot be read; its text says why."""


@dataclass(frozen=True)
class RunDirectory:
    """The files of a run below `root`."""

    root: Path

    @property
    def config(self) -> Path:
        """Every setting, resolved."""
        return self.root / "config.yaml"

    @property
    def status(self) -> Path:
        """What the run is doing."""
        return self.root / "status.json"

    @property
    def metrics(self) -> Path:
        """One record a line."""
        return self.root / "metrics.jsonl"

    @property
    def lock(self) -> Path:
        """Held by the launch that is at work here."""
        return self.root / "run.lock"

    @property
    def event_counts(self) -> Path:
        """How often what has happened, over all launches."""
        return self.root / "counts.json"

    @property
    def ranks(self) -> Path:
        """How the last step went on each rank."""
        return self.root / "ranks.json"

    @property
    def tensorboard(self) -> Path:
        """Folder of TensorBoard's event files, where they were asked for."""
        return self.root / "tensorboard"

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.root / "checkpoints"

    @property
    def analysis(self) -> Path:
        """Folder of what was measured on the checkpoints."""
        return self.root / "analysis"

    @property
    def logs(self) -> Path:
        """Folder of the ranks' logs."""
        return self.root / "logs"

    @property
    def profile(self) -> Path:
        """Folder of profiler traces, where they were asked for."""
        return self.root / "profile"

    @property
    def has_begun(self) -> bool:
        """Whether a run has left something here."""
        return any(path.exists() for path in (self.status, self.metrics, self.checkpoints))

    def checkpoint(self, step: int) -> Path:
        """Return the file of the checkpoint at `step`."""
        return self.checkpoints / f"step-{step:08d}.pt"

    def checkpoint_records(self) -> tuple[Path, ...]:
        """Return the records beside the checkpoints that are whole, by step."""
        return tuple(sorted(self.checkpoints.glob("step-*.json")))

    def checkpoint_steps(self) -> tuple[int, ...]:
        """Return the steps of the checkpoints that are whole, in order."""
        steps = (path.stem.removeprefix("step-") for path in self.checkpoint_records())
        return tuple(sorted(int(step) for step in steps if step.isdigit()))

    def create(self) -> None:
        """Make the folders, for the user alone where they are new.

        Raises:
            UsageError: they cannot be made or written.
        """
        try:
            for folder in (self.root, self.checkpoints, self.logs):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            for folder in (self.root, self.checkpoints, self.logs):
                probe = folder / f".probe-{os.getpid()}"
                probe.touch()
                probe.unlink()
        except OSError as error:
            raise UsageError(
                f"the run directory {self.root} cannot be written: {error.strerror or error}; "
                f"choose another by run.directory or --run-dir"
            ) from error

    def save_config(self, config: Config) -> None:
        """Save every setting."""
        atomic.write_text(self.config, dump_config(config))


@contextmanager
def oserror_to_fault(directory: RunDirectory) -> Iterator[None]:
    """Have an OSError of the block, of a disk that is full or gone, as a FaultError that says what to do."""
    try:
        yield
    except OSError as error:
        place = f": {error.filename}" if error.filename else ""
        raise FaultError(
            f"{error.strerror or error}{place}; the checkpoints in {directory.root} are as they were: "
            f"mend it, and start the same command again"
        ) from error
