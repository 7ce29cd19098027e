"""Observers of a run, the promise that none of them can stop it, and the one that writes TensorBoard's files."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

from dist_train.outcome import UsageError
from dist_train.rundir.records import EvaluationRecord, Measurement, Observer, Outcome, Record, RunFacts, TrainRecord

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

logger = logging.getLogger(__name__)


class Observers(Observer):
    """Passes every call to each observer; one that raises is reported once and dropped."""

    def __init__(self, observers: Iterable[Observer] = ()) -> None:
        self._observers = tuple(observers)
        self._lock = Lock()

    def __bool__(self) -> bool:
        return bool(self._observers)

    def begin(self, facts: RunFacts) -> None:
        """Pass `begin` on."""
        self._each(lambda observer: observer.begin(facts))

    def record(self, record: Record) -> None:
        """Pass `record` on."""
        self._each(lambda observer: observer.record(record))

    def measurement(self, measurement: Measurement) -> None:
        """Pass `measurement` on."""
        self._each(lambda observer: observer.measurement(measurement))

    def progress(self, step: int) -> None:
        """Pass `progress` on."""
        self._each(lambda observer: observer.progress(step))

    def sync(self) -> None:
        """Have every observer flush to disk what it holds. May be called from any thread."""
        self._each(lambda observer: observer.sync())

    def end(self, outcome: Outcome) -> None:
        """Pass `end` on."""
        self._each(lambda observer: observer.end(outcome))

    def _each(self, call: Callable[[Observer], None]) -> None:
        for observer in self._observers:
            try:
                call(observer)
            except Exception as error:
                self._drop(observer, error)

    def _drop(self, failed: Observer, error: Exception) -> None:
        with self._lock:
            before = self._observers
            self._observers = tuple(observer for observer in before if observer is not failed)
            if self._observers == before:
                return
        name, reason = type(failed).__name__, f"{type(error).__name__}: {error}"
        logger.warning("%s failed and is left out from now on; training continues: %s", name, reason)
        logger.debug("where %s failed", name, exc_info=error)


def check_tensorboard() -> None:
    """Raise UsageError where TensorBoard is not installed; to be called before training starts."""
    try:
        import torch.utils.tensorboard  # noqa: F401  # the import is the check
    except ImportError as error:
        raise UsageError(
            "metrics.tensorboard is true, but TensorBoard is not installed: "
            "pip install 'dist_train[tensorboard]', or set metrics.tensorboard to false",
            code="tensorboard-missing",
        ) from error


class TensorBoard(Observer):
    """An observer that adds one event file a launch to `directory`.

    A run that resumes from a checkpoint declares what earlier launches wrote after it void.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._writer: SummaryWriter | None = None

    def begin(self, facts: RunFacts) -> None:
        """Open this launch's file. Raises ImportError without TensorBoard."""
        from torch.utils.tensorboard import SummaryWriter

        # All of the checkpoint's own step was recorded, and flushed, before the checkpoint: it stays.
        self._writer = SummaryWriter(self._directory, purge_step=facts.start_step + 1)

    def record(self, record: Record) -> None:
        """Add the numbers of `record`; an event has none."""
        match record:
            case TrainRecord():
                numbers = {
                    "loss/batch": record.loss,
                    "accuracy/batch": record.accuracy,
                    "optimizer/learning_rate": record.learning_rate,
                    "optimizer/noise_amplitude": record.noise_amplitude,
                    "optimizer/gradient_norm": record.gradient_norm,
                    "speed/samples_per_second": record.samples_per_second,
                    "speed/step_seconds": record.step_seconds,
                }
                self._add(numbers, record.step, record.time)
            case EvaluationRecord(split=split):
                numbers = {f"loss/{split}": record.loss, f"accuracy/{split}": record.accuracy}
                self._add(numbers, record.step, record.time)
                self.sync()

    def measurement(self, measurement: Measurement) -> None:
        """Add the weights' norms and the parts of the step."""
        parts = {f"step_parts/{name}": seconds for name, seconds in asdict(measurement.parts).items()}
        norms = {"weights/norm": measurement.weight_norm, "weights/distance_from_initial": measurement.distance}
        self._add(norms | parts, measurement.step, measurement.time)

    def sync(self) -> None:
        """Flush what was added. May be called from any thread."""
        if self._writer is not None:
            self._writer.flush()

    def end(self, outcome: Outcome) -> None:
        """Flush and close."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _add(self, numbers: dict[str, float], step: int, moment: float) -> None:
        assert self._writer is not None, "begin comes first"
        for tag, value in numbers.items():
            self._writer.add_scalar(tag, value, step, walltime=moment)
