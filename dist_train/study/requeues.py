"""Whether a run that did not finish is worth starting again: as long as it makes progress."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from dist_train import atomic
from dist_train.outcome import ExitCode
from dist_train.status import Status, StatusFile, read_status

COUNT_FILE = "requeues.json"
_CHECKPOINT = re.compile(r"step-(\d+)\.pt")
_HOPELESS = frozenset({ExitCode.USAGE, ExitCode.DIVERGED, ExitCode.DISAGREEMENT})


@dataclass(frozen=True)
class Requeues:
    """Requeues in a row without a new checkpoint, and the step of the newest one at the last of them."""

    without_progress: int = 0
    step: int = 0


@dataclass(frozen=True)
class Decision:
    """Whether to start the run again, and why, in a sentence."""

    requeue: bool
    why: str


def decide(run: Path, limit: int, launch: str | None = None, death: str = "") -> Decision:
    """Decide about `run`, whose last launch (called `launch`, where that is known) has ended, and count.

    `death` is what is known of a rank that was killed: the others may have had no time to write it down. A run that
    has been requeued `limit` times in a row without a new checkpoint is given up: its status says so.
    """
    status = read_status(run / "status.json")
    if status is not None and launch is not None and status.launch != launch:
        status = replace(status, exit_code=None, reason="the last launch ended before it wrote a status")
    if status is not None and status.exit_code == ExitCode.FINISHED:
        return Decision(False, "the run has finished")
    if status is not None and status.exit_code in _HOPELESS:
        return Decision(False, f"the run would end in the same way: {status.reason}")
    step = newest_step(run)
    before = read_requeues(run)
    count = before.without_progress if step <= before.step else 0
    if count >= limit:
        reason = _end_of(status, death)
        if limit > 0:
            reason = (
                f"given up after {count} requeue{'s' if count != 1 else ''} in a row without a checkpoint after step "
                f"{step}; the last time: {reason}"
            )
        _give_up(run, status, reason)
        return Decision(False, reason)
    write_requeues(run, Requeues(count + 1, step))
    place = f"from step {step}" if step else "from the beginning"
    return Decision(True, f"continues {place}, requeue {count + 1} of at most {limit} without a new checkpoint")


def newest_step(run: Path) -> int:
    """Return the step of the newest checkpoint in `run`; 0 where there is none."""
    matches = (_CHECKPOINT.fullmatch(path.name) for path in (run / "checkpoints").glob("step-*.pt"))
    return max((int(match[1]) for match in matches if match), default=0)


def read_requeues(run: Path) -> Requeues:
    """Return what has been counted; nothing where there is no count that can be read."""
    try:
        return Requeues(**json.loads((run / COUNT_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return Requeues()


def write_requeues(run: Path, requeues: Requeues) -> None:
    """Write the count down."""
    run.mkdir(mode=0o700, parents=True, exist_ok=True)
    atomic.write_text(run / COUNT_FILE, json.dumps(asdict(requeues)) + "\n")


def _end_of(status: Status | None, death: str) -> str:
    cause = f": {death}" if death else ""
    if status is None:
        return f"it ended before it wrote a status{cause}"
    if status.exit_code is None and status.state not in ("failed", "stopped"):
        return f"it died in state {status.state} at step {status.step}{cause}"
    return status.reason or f"it ended in state {status.state} at step {status.step}"


def _give_up(run: Path, status: Status | None, reason: str) -> None:
    """Let the run's status say that it has failed; whoever requeues it by hand gets all tries anew."""
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    last = status or StatusFile(run / "status.json", world_size=0).current
    ended = replace(last, state="failed", exit_code=int(ExitCode.FAULT), reason=reason, updated=now, finished=now)
    run.mkdir(mode=0o700, parents=True, exist_ok=True)
    atomic.write_text(run / "status.json", json.dumps(asdict(ended), indent=2) + "\n")
    write_requeues(run, Requeues(0, newest_step(run)))
