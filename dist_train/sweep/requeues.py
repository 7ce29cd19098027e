"""What a batch job does after a launch of its run has ended: requeue, restart the run within the job, or end."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from dist_train.cluster.launch import current_job
from dist_train.monitoring import wording
from dist_train.outcome import ExitCode
from dist_train.rundir import atomic
from dist_train.rundir.lock import read_holder
from dist_train.rundir.paths import DISK_FULL, RunDirectory, StudyDirectory
from dist_train.rundir.status import State, Status, StatusFile, fallback_directory, read_status

_UNRECOVERABLE = frozenset({ExitCode.USAGE, ExitCode.DIVERGED, ExitCode.DISAGREEMENT})

_REFUSAL = re.compile(
    r"Unable to create step .*: (More processors|Requested (node config|partition|time)|Memory required|Job .*violates)"
    r"|Invalid (generic resource|MPI type|--|node name|numeric|account|partition|distribution)|\bunrecogni[sz]ed option"
    r"|cannot find mpi plugin|not enough slots|more processes than|Please correct your command line"
)
"""Messages of srun and mpirun about a launch that they would refuse again."""
_KILLED = re.compile(r"was killed by signal|^srun: error: .*: tasks? .*: Killed$")
_OUT_OF_MEMORY = re.compile(r"oom.kill event|: Out Of Memory$")  # what Slurm says of the memory that it limits
_DEATH = re.compile(r"(rank \d+ \(.*, process \d+\)) was killed by signal ")
_NO_CAUSE = re.compile(r"-*$|dist-train: warning|srun: (job|Job|Step|jobid)\b|srun: error: .*: Exited with exit code")
_MOST_LINES = 3
_LARGEST_PROBE = 1 << 20


@dataclass(frozen=True)
class Requeues:
    """Requeues in a row without a new checkpoint, the last one's step, and the restarts in the job since."""

    without_progress: int = 0
    step: int = 0
    restarts: int = 0


@dataclass(frozen=True)
class EndedLaunch:
    """What a batch script knows of the ended launch: its id, exit code, and the last lines of launcher and ranks."""

    id: str | None = None
    code: int | None = None
    words: Sequence[str] = ()

    @property
    def was_refused(self) -> bool:
        """Whether the same launch would be refused again, by the ranks or by the launcher."""
        return self.code == ExitCode.USAGE or any(map(_REFUSAL.search, self.words))

    @property
    def cause(self) -> str:
        """The most informative lines: about a killed rank, from dist-train, or else from the launcher."""
        lines = [line for line in self.words if not _NO_CAUSE.match(line)]
        killed = [line for line in lines if _KILLED.search(line)]
        # The parent process of the rank that died first is more exact than srun, which reports all tasks of a node.
        exact = [line for line in killed if not line.startswith("srun")]
        ours = [line.removeprefix("dist-train: ") for line in lines if line.startswith("dist-train: ")]
        return "; ".join((exact[:1] or killed or ours[:1] or list(dict.fromkeys(lines)))[:_MOST_LINES])

    @property
    def lack_of_memory(self) -> str:
        """Slurm's message that processes were killed since the job's memory on their node was full; empty if none."""
        return next(filter(_OUT_OF_MEMORY.search, self.words), "")

    def death_in(self, reason: str) -> str:
        """Return the line that says of a rank which `reason` names that it was killed; empty if there is none."""
        return next((line for line in self.words if (killed := _DEATH.match(line)) and killed[1] in reason), "")


Action = Literal["requeue", "restart", "end"]


@dataclass(frozen=True)
class Decision:
    """What the batch script does next: requeue its job, restart the run within the job, or end with `code`; and why."""

    action: Action
    why: str
    code: ExitCode = ExitCode.FINISHED


def decide(run: Path, limit: int, launch: EndedLaunch = EndedLaunch(), restarts: int = 0) -> Decision:
    """Decide what follows the ended launch of `run`, and update the counts.

    The run is restarted within its job up to `restarts` times, then requeued up to `limit` times in a row without a new
    checkpoint, then given up. The decision is written to the run's status, unless another job is running it.
    """
    files = RunDirectory(run)
    status = read_status(files.status)
    is_silent = status is None or (launch.id is not None and status.launch != launch.id)
    if is_silent and launch.was_refused:
        return _give_up(files, status, launch.cause or "the ranks refused to start", ExitCode.USAGE)
    reason = _end_of(None if is_silent else status, launch)
    if launch.lack_of_memory not in reason:
        reason = f"{reason}; {launch.lack_of_memory}"
    if status is not None and is_silent:
        status = replace(status, state="stopped", exit_code=None, reason="")
    if status is not None and status.exit_code == ExitCode.FINISHED:
        return Decision("end", "the run has finished", ExitCode.FAULT)
    if status is not None and status.exit_code in _UNRECOVERABLE:
        return Decision("end", f"the run would end the same way again: {status.reason}", ExitCode.FAULT)
    if limit == 0 and status is not None and status.exit_code == ExitCode.STOPPED:
        return Decision("end", reason, ExitCode.STOPPED)
    if not _has_room(files):
        why = f"{reason}; not started again, since the disk of {run} is full: free space, and submit it again"
        return _give_up(files, status, why, ExitCode.FAULT)
    step = max(files.checkpoint_steps(fallback_directory(files)), default=0)
    before = read_requeues(files)
    # A lower step, as after newer checkpoints were deleted, is no progress, but what comes after it is.
    before = Requeues(step=step) if step > before.step else replace(before, step=step)
    count = before.without_progress
    place = f"from step {step}" if step else "from the beginning"
    try:
        if before.restarts < restarts:
            _write_requeues(files, replace(before, restarts=before.restarts + 1))
            return Decision("restart", f"continues {place}, restart {before.restarts + 1} of at most {restarts}")
        if count >= limit:
            _write_requeues(files, Requeues(0, step))
            if limit > 0:
                times = wording.plural(count, "requeue")
                place = f"in a row without a checkpoint after step {step}"
                reason = f"given up after {times} {place}; the last time: {reason}"
            return _give_up(files, status, reason, ExitCode.FAULT)
        _write_requeues(files, Requeues(count + 1, step))
    except OSError as error:
        why = f"{reason}; not started again, since {files.requeues} cannot be written: {error.strerror}"
        return _give_up(files, status, why, ExitCode.FAULT)
    _write_end(files, status, "stopped", f"{reason}; to be started again", ExitCode.STOPPED)
    number = f"requeue {count + 1} of at most {limit} without a new checkpoint"
    return Decision("requeue", f"continues {place}, {number}; {reason}")


def read_requeues(files: RunDirectory) -> Requeues:
    """Return the stored counts; zeros if there are none or they cannot be read."""
    try:
        return Requeues(**json.loads(atomic.read_regular(files.requeues)))
    except (OSError, ValueError, TypeError):
        return Requeues()


def _write_requeues(files: RunDirectory, requeues: Requeues) -> None:
    """Store the counts, on a full disk in the reserved space. Raises OSError."""
    files.root.mkdir(mode=0o700, parents=True, exist_ok=True)
    files.spend_reserve(lambda: atomic.write_text(files.requeues, json.dumps(asdict(requeues)) + "\n"))


def _has_room(files: RunDirectory) -> bool:
    """Whether another checkpoint seems to fit; writes a probe, because a quota shows only on writing."""
    try:
        elsewhere = (path.with_suffix(".pt") for path in files.checkpoint_records(fallback_directory(files)))
        paths = (*files.checkpoints.glob("step-*.pt"), *elsewhere)
        size = max((path.stat().st_size for path in paths), default=0)
        if size == 0:
            return True
        with tempfile.TemporaryFile(dir=files.checkpoints) as probe:
            probe.write(secrets.token_bytes(min(size, _LARGEST_PROBE)))
            probe.flush()
            os.fsync(probe.fileno())
            return shutil.disk_usage(files.checkpoints).free + probe.tell() >= size
    except OSError as error:
        return error.errno not in DISK_FULL


def _end_of(status: Status | None, launch: EndedLaunch) -> str:
    cause = f": {launch.cause}" if launch.cause else ""
    if status is None:
        return f"the last launch ended before it wrote a status{cause}"
    if status.exit_code is None and status.state not in ("failed", "stopped"):
        return f"it died in state {status.state} at step {status.step}{cause}"
    reason = status.reason or f"it ended in state {status.state} at step {status.step}"
    # The others may notice its loss, and end, before its parent process says that it was killed.
    return "; ".join(filter(None, (reason, launch.death_in(reason))))


def _give_up(files: RunDirectory, status: Status | None, reason: str, code: ExitCode) -> Decision:
    was_finished = status is not None and status.state == "finished"  # which a launch that is refused does not change
    _write_end(files, status, "finished" if was_finished else "failed", reason, code)
    return Decision("end", reason, code)


def _write_end(files: RunDirectory, status: Status | None, state: State, reason: str, code: ExitCode) -> None:
    """Write the run's status, unless another job is running it; on a disk error the old status stays."""
    if not files.has_begun and (StudyDirectory(files.root).runs.exists() or files.config.exists()):
        return  # the launch was refused: with a status, the next would take the folder for its own, and replace files
    job = current_job()
    holder = read_holder(files.lock)
    if holder is not None and holder.slurm_job != (job.id if job else ""):
        return
    ended = (status or StatusFile(files.status, world_size=0).current).ended(state, code, reason)
    with suppress(OSError):
        files.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        files.spend_reserve(lambda: atomic.write_text(files.status, ended.to_json(), is_shared=True))
