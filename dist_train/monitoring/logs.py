"""One log file per rank, through the `dist_train` logger."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

_LOGGER = "dist_train"


@contextmanager
def open_logs(directory: Path, rank: int, level: int = logging.INFO) -> Iterator[Path]:
    """Send the `dist_train` logger to `directory`/rank-`rank`.log, which is yielded, and rank 0's warnings to stderr.

    Raises OSError where the file cannot be opened.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"rank-{rank}.log"
    handlers = [_RankFile(path, rank), *([_Stderr()] if rank == 0 else ())]
    logger = logging.getLogger(_LOGGER)
    logger.setLevel(level)
    for handler in handlers:
        logger.addHandler(handler)
    try:
        yield path
    finally:
        for handler in handlers:
            logger.removeHandler(handler)
            handler.close()


class _RankFile(logging.FileHandler):
    """Appends to the rank's file; when that fails, says so once and gives up."""

    def __init__(self, path: Path, rank: int) -> None:
        super().__init__(path, encoding="utf-8")
        form = logging.Formatter(
            f"%(asctime)s.%(msecs)03dZ %(levelname)-7s rank {rank}  %(message)s", "%Y-%m-%dT%H:%M:%S"
        )
        form.converter = time.gmtime
        self.setFormatter(form)

    def close(self) -> None:
        with suppress(OSError):  # what was left to flush was reported when it was written
            super().close()

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (the name is logging's)
        logging.getLogger(_LOGGER).removeHandler(self)
        if sys.stderr is not None:
            with suppress(OSError, ValueError):
                reason = sys.exc_info()[1]
                print(f"{self.baseFilename} cannot be written, logging ends: {reason}", file=sys.stderr)


class _Stderr(logging.StreamHandler[TextIO]):
    """Warnings and above, to whatever `sys.stderr` is at the time: a progress bar may stand in for it."""

    def __init__(self) -> None:
        logging.Handler.__init__(self, logging.WARNING)
        self.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stderr

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (the name is logging's)
        logging.getLogger(_LOGGER).removeHandler(self)
