"""Observers of a run, and the promise that none of them can stop it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from threading import Lock
from typing import Protocol

from dist_train.rundir.records import Measurement, Outcome, Record, RunFacts

logger = logging.getLogger(__name__)


class Observer(Protocol):
    """The calls that a run makes, in their order; a subclass overrides those that it needs, the others do nothing.

    A call may raise: the observer is then dropped, and the run continues.
    """

    def begin(self, facts: RunFacts) -> None:
        """The run is about to do its first step."""
        return

    def record(self, record: Record) -> None:
        """Something was measured, or happened."""
        return

    def measurement(self, measurement: Measurement) -> None:
        """What a step took on every rank; at most once per `metrics.every_steps`."""
        return

    def progress(self, step: int) -> None:
        """`step` updates are done; called at every one and within evaluations, so it must cost next to nothing."""
        return

    def sync(self) -> None:
        """Flush to disk what was recorded; called, from any thread, before a checkpoint becomes durable."""
        return

    def end(self, outcome: Outcome) -> None:
        """The run has ended, well or not; release everything."""
        return


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
            if not any(observer is failed for observer in self._observers):
                return
            self._observers = tuple(observer for observer in self._observers if observer is not failed)
        name, reason = type(failed).__name__, f"{type(error).__name__}: {error}"
        logger.warning("%s failed and is left out from now on; training continues: %s", name, reason)
        logger.debug("where %s failed", name, exc_info=error)
