"""Where the time of an update goes: torch's trace of each rank, and Horovod's timeline, for a few updates."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from dist_train.cluster.communicator import Communicator

_FIRST_UPDATES = 2
"""Updates of a launch that are not profiled: they also allocate, tune and compile."""
_logger = logging.getLogger("dist_train.training")


class Profiler:
    """Profiles `updates` updates after the first two of a launch, on all ranks; writes Chrome traces into `folder`."""

    def __init__(self, updates: int, folder: Path, comm: Communicator) -> None:
        self._last = _FIRST_UPDATES + updates
        self._folder = folder
        self._comm = comm
        self._made = 0
        self._profile: profile | None = None
        self._first_step = 0

    def after_update(self, step: int) -> None:
        """Begin, or end, when it is time; all ranks after the same update."""
        self._made += 1
        if self._made == _FIRST_UPDATES:
            self._begin(step + 1)
        elif self._made == self._last:
            self.close()

    def close(self) -> None:
        """Write what has been seen so far."""
        if self._profile is None:
            return
        running, self._profile = self._profile, None
        self._comm.stop_timeline()
        running.stop()
        path = self._folder / f"trace-step-{self._first_step:08d}-rank-{self._comm.rank}.json"
        try:
            running.export_chrome_trace(str(path))
        except (OSError, RuntimeError) as error:
            _logger.error("the profiler's trace %s could not be written: %s", path, error)

    def _begin(self, first_step: int) -> None:
        try:
            self._folder.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            _logger.error("nothing is profiled, %s cannot be made: %s", self._folder, error.strerror or error)
            return
        self._first_step = first_step
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_initialized():
            activities.append(ProfilerActivity.CUDA)
        self._comm.start_timeline(self._folder / f"horovod-step-{first_step:08d}.json")
        self._profile = profile(activities=activities)
        self._profile.start()
