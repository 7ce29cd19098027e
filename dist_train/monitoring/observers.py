"""Observers of a run, and the promise that none of them can stop it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from threading import Lock

from dist_train.rundir.records import Measurement, Observer, Outcome, Record, RunFacts

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

    def regroup(self, facts: RunFacts) -> None:
        """Pass `regroup` on."""
        self._each(lambda observer: observer.regroup(facts))

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
