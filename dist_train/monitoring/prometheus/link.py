"""The trainer's hold on the exporter's process: starts it, sends to it without ever waiting, sees it end."""

from __future__ import annotations

import os
import select
import subprocess
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from signal import Signals

from dist_train.monitoring.prometheus.channel import Channel, socket_pair
from dist_train.monitoring.prometheus.messages import Message, ToExporter

_KEPT = 1000
_ROOT = Path(__file__).parents[3]
_CHILD = (
    "import sys; sys.path.append(sys.argv[1]); from dist_train.monitoring.prometheus.process import main; "
    "main(int(sys.argv[2]), int(sys.argv[3]))"
)


class ExporterLink:
    """A process that has begun, and the channel to it."""

    def __init__(self) -> None:
        """Start the process, in a tenth of a second that nobody waits for. Raises OSError."""
        ours, theirs = socket_pair()
        with theirs:
            descriptor = theirs.fileno()
            command = [sys.executable, "-P", "-c", _CHILD, str(_ROOT), str(descriptor), str(os.getpid())]
            try:
                # none of the trainer's files stays open in it: a launcher would wait for its end
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    pass_fds=[descriptor],
                    start_new_session=True,
                )
            except OSError:
                ours.close()
                raise
        self._channel = Channel(ours)
        self._waiting: deque[ToExporter] = deque(maxlen=_KEPT)

    @property
    def process_id(self) -> int:
        """The number of the process."""
        return self._process.pid

    def send(self, message: ToExporter) -> None:
        """Send `message`, or drop it where the process is behind. Raises OSError where it is gone."""
        if self.send_waiting():
            self._channel.send(message)

    def send_surely(self, message: ToExporter) -> None:
        """Send `message` now, or before what is sent next. Raises OSError where the process is gone."""
        if not self.send_waiting() or not self._channel.send(message):
            self._waiting.append(message)

    def send_waiting(self) -> bool:
        """Send what waits for room; return whether nothing waits any more. Raises OSError."""
        while self._waiting:
            if not self._channel.send(self._waiting[0]):
                return False
            self._waiting.popleft()
        return True

    def answers(self, seconds: float) -> Iterator[Message]:
        """Yield what has come from the process, for which it has so many seconds.

        Raises:
            EOFError: the process is gone, and all that it sent has been taken.
            ValueError: what it sent is no message.
        """
        if seconds > 0:
            select.select([self._channel], [], [], seconds)
        return self._channel.receive()

    def close(self, seconds: float) -> str:
        """Have the process end, by force after so many seconds; return how it ended, in words."""
        self._channel.close()
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        assert self._process.stderr is not None
        with self._process.stderr as errors:
            os.set_blocking(errors.fileno(), False)
            said = (errors.read() or b"").decode(errors="replace").strip()
        status = self._process.returncode
        if status < 0:
            with suppress(ValueError):
                return f"its process was ended by {Signals(-status).name}"
        return said.rpartition("\n")[2] or f"its process ended with code {status}"
