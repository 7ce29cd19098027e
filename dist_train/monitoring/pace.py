"""How long the rest of a run takes, from how long the latest steps took."""

from __future__ import annotations

from collections import deque

_MARK_SECONDS = 1.0
_MARKS = 60


class Pace:
    """Seconds per step over the last minute or more, with all that happens between steps."""

    def __init__(self) -> None:
        self._marks: deque[tuple[float, int]] = deque(maxlen=_MARKS)
        self._latest: tuple[float, int] | None = None

    def mark(self, step: int, now: float) -> None:
        """Note that `step` updates were done at `now` (seconds, monotonic)."""
        self._latest = (now, step)
        if not self._marks or now - self._marks[-1][0] >= _MARK_SECONDS:
            self._marks.append((now, step))

    def seconds_per_step(self) -> float | None:
        """Return the pace; None before two marks at different steps."""
        if self._latest is None:
            return None
        seconds, steps = self._latest[0] - self._marks[0][0], self._latest[1] - self._marks[0][1]
        return seconds / steps if steps > 0 else None

    def seconds_left(self, total_steps: int) -> float | None:
        """Return how long the steps up to `total_steps` will take; None while the pace is not known."""
        pace = self.seconds_per_step()
        if pace is None or self._latest is None:
            return None
        return max(0, total_steps - self._latest[1]) * pace
