"""Signals that ask a run to stop: they set a flag, nothing else."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

_ALWAYS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)


class StopRequests:
    """While the block lasts, SIGTERM, SIGINT and SIGUSR2 are noted instead of ending the process.

    A second SIGINT ends it as usual, for whoever does not want to wait. Where SIGINT is ignored already, as in what a
    script starts in the background, it stays ignored.
    """

    def __init__(self, stop_signal: str = "SIGUSR2") -> None:
        """Heed `stop_signal`, the signal of the site, too."""
        self.reason: str | None = None
        """The signal's name, or what else has asked for the stop."""
        self._signals = {*_ALWAYS, signal.Signals[stop_signal]}
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequests:
        """Take over the signals."""
        for number in self._signals:
            if number != signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def requested(self) -> bool:
        """Whether this rank was asked to stop."""
        return self.reason is not None

    def request(self, reason: str) -> None:
        """Ask for a stop without a signal."""
        self.reason = self.reason or reason

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        self.reason = signal.Signals(number).name
