"""The end of a job's time, foreseen: a run that is stopped in time is saved, and resumes in the next job."""

from __future__ import annotations

from dist_train.cluster.slurm import current_job, job_end

_TO_END_SECONDS = 15.0
"""For the ranks to leave, and for the batch script to requeue the job."""


class TimeLimit:
    """Learns from the run how long before `end` it must be asked to stop."""

    def __init__(self, end: float | None) -> None:
        """The job ends at `end`, in seconds since 1970; None: it does not."""
        self._end = end
        self._last: float | None = None
        self._longest = 0.0
        self._save = 0.0

    def note_saved(self, seconds: float) -> None:
        """Note that a checkpoint took `seconds` from its beginning until it was on disk."""
        self._save = max(self._save, seconds)

    def is_near(self, now: float) -> bool:
        """Note that a step is done, and return whether the run must be asked to stop now, since later is too late.

        All ranks learn of it in the next step, which may be as long as the longest so far, with its evaluation, as
        may the one before the next chance to ask; the checkpoint may take twice its longest time.
        """
        if self._end is None:
            return False
        if self._last is not None:
            self._longest = max(self._longest, now - self._last)
        self._last = now
        return now + 2 * self._longest + 2 * self._save + _TO_END_SECONDS >= self._end


def job_time_limit() -> TimeLimit:
    """Return the time limit of the Slurm job that this process belongs to; none outside of Slurm."""
    job = current_job()
    if job is None:
        return TimeLimit(None)
    return TimeLimit(job_end(job.id) if job.end is None else job.end)
