"""Observers of a run, and the promise that none of them can stop it; those that record in TensorBoard and in trackers.

What TensorBoard, trackio, Weights & Biases and MLflow hold equals `metrics.jsonl`, also after a resume. A resume takes
back what was recorded after its checkpoint. TensorBoard has a mark for that. The others have none that works offline:
wandb ignores a step below the last one, trackio and MLflow keep both values. With those each launch is therefore a
tracker's run of its own, and whole: it begins with what `metrics.jsonl` has kept. trackio and MLflow delete the run of
the launch before it; wandb, whose runs may be on a server already, keeps it in the same group.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext, redirect_stdout, suppress
from dataclasses import asdict
from pathlib import Path
from threading import Lock
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import yaml
from pydantic import BaseModel, Field

from dist_train.outcome import UsageError
from dist_train.rundir.paths import RunDirectory
from dist_train.rundir.records import (
    EvaluationRecord,
    Measurement,
    Observer,
    Outcome,
    Record,
    RunFacts,
    TrainRecord,
    read_records,
)

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


_logger = logging.getLogger(__name__)


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
        _logger.warning("%s failed and is left out from now on; training continues: %s", name, reason)
        _logger.debug("where %s failed", name, exc_info=error)


_MODULES = MappingProxyType(
    {"tensorboard": "torch.utils.tensorboard", "trackio": "trackio", "wandb": "wandb", "mlflow": "mlflow"}
)


def check_installed(name: str) -> None:
    """Raise UsageError where the library of the logger `name` is not installed; to be called before training starts."""
    if name not in _MODULES:
        return
    try:
        importlib.import_module(_MODULES[name])
    except ImportError as error:
        raise UsageError(
            f"the logger {name} cannot be imported ({error}): pip install 'dist_train[{name}]', or leave it out",
            code=f"{name}-missing",
        ) from error


def numbers_of(record: Record) -> dict[str, float]:
    """Return the numbers of `record` by their names in a tracker; an event has none."""
    match record:
        case TrainRecord():
            return {
                "loss/batch": record.loss,
                "accuracy/batch": record.accuracy,
                "optimizer/learning_rate": record.learning_rate,
                "optimizer/noise_amplitude": record.noise_amplitude,
                "optimizer/gradient_norm": record.gradient_norm,
                "speed/samples_per_second": record.samples_per_second,
                "speed/step_seconds": record.step_seconds,
            }
        case EvaluationRecord(split=split):
            return {f"loss/{split}": record.loss, f"accuracy/{split}": record.accuracy}
    return {}


def tensorboard(directory: Path) -> TensorBoard:
    """Return the observer that writes TensorBoard's files into the run `directory`."""
    return TensorBoard(RunDirectory(directory).tensorboard)


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
        """Add the numbers of `record`."""
        self._add(numbers_of(record), record.step, record.time)
        if isinstance(record, EvaluationRecord):
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


class Tracker(Observer, ABC):
    """Logs each launch as a run of a tracker, which begins with what `metrics.jsonl` has kept of earlier launches."""

    def __init__(self) -> None:
        self._logged: set[tuple[type[Record], int, str]] = set()

    def begin(self, facts: RunFacts) -> None:
        """Open the tracker's run and log what was recorded before."""
        run = RunDirectory(facts.run_directory)
        self.open(facts, yaml.safe_load(run.config.read_text(encoding="utf-8")))
        for record in read_records(run.metrics):
            self.record(record)

    def record(self, record: Record) -> None:
        """Log the numbers of `record`, once: a resume may evaluate again what it finds evaluated."""
        identity = (type(record), record.step, record.split if isinstance(record, EvaluationRecord) else "")
        if (numbers := numbers_of(record)) and identity not in self._logged:
            self._logged.add(identity)
            self.log(numbers, record.step, record.time)

    @abstractmethod
    def open(self, facts: RunFacts, settings: Mapping[str, Any]) -> None:
        """Open the tracker's run with the run's `settings`."""

    @abstractmethod
    def log(self, numbers: Mapping[str, float], step: int, moment: float) -> None:
        """Log `numbers` by their names, measured after update `step`, `moment` seconds since 1970."""


class TrackioOptions(BaseModel, extra="forbid"):
    """Options of the logger `trackio`."""

    project: str = Field("dist_train", min_length=1)


class WandbOptions(BaseModel, extra="forbid"):
    """Options of the logger `wandb`."""

    project: str = Field("dist_train", min_length=1)
    entity: str | None = None
    mode: Literal["offline", "online"] = "offline"


class WandbShaped(Tracker):
    """A tracker whose library has runs as W&B's: `log(numbers, step)` and `finish()`."""

    _run: Any = None

    def log(self, numbers: Mapping[str, float], step: int, moment: float) -> None:
        """Pass `numbers` on; the library writes them from a thread or process of its own."""
        self._run.log(dict(numbers), step=step)

    def end(self, outcome: Outcome) -> None:
        """Wait until all is written."""
        if self._run is not None:
            self._run.finish()


class Trackio(WandbShaped):
    """Logs into trackio's SQLite file of the project; the run of an earlier launch is replaced."""

    def __init__(self, directory: Path, options: TrackioOptions) -> None:
        super().__init__()
        self._project = options.project

    def open(self, facts: RunFacts, settings: Mapping[str, Any]) -> None:
        """Open the run, named as this one, in place of the one of the launch before."""
        import trackio

        with suppress(ValueError):  # there is no such project yet
            for run in trackio.Api().runs(self._project):
                if (run.config or {}).get("run_id") == facts.run_id:
                    run.delete()
        # its greeting is no result of ours
        with redirect_stdout(sys.stderr):
            self._run = trackio.init(
                project=self._project,
                name=facts.name,
                config={"run_id": facts.run_id, **settings},
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )

    def end(self, outcome: Outcome) -> None:
        """Wait until all is written, and leave nothing for the end of the process."""
        if self._run is not None:
            import trackio

            with redirect_stdout(sys.stderr):
                trackio.finish()


class Wandb(WandbShaped):
    """Logs into a folder of the run directory, or to W&B's server; the launches of one run are a group."""

    def __init__(self, directory: Path, options: WandbOptions) -> None:
        super().__init__()
        self._directory = directory
        self._options = options

    def open(self, facts: RunFacts, settings: Mapping[str, Any]) -> None:
        """Open a run of this launch."""
        import wandb

        self._run = wandb.init(
            project=self._options.project,
            entity=self._options.entity,
            mode=self._options.mode,
            dir=self._directory,
            name=facts.name,
            group=f"{facts.name}-{facts.run_id}",
            config={"run_id": facts.run_id, "start_step": facts.start_step, **settings},
            settings=wandb.Settings(console="off", silent=True),
        )
        if self._options.mode == "online":
            _logger.info("logged to %s", self._run.url)

    def log(self, numbers: Mapping[str, float], step: int, moment: float) -> None:
        """Pass `numbers` on, with the time at which they were measured."""
        super().log({**numbers, "_timestamp": moment}, step, moment)


class MlflowOptions(BaseModel, extra="forbid"):
    """Options of the logger `mlflow`."""

    experiment: str = Field("dist_train", min_length=1)
    tracking_uri: str | None = None


_RUN_ID = "dist_train.run_id"
_FLUSH_SECONDS = 5.0
_PARAMS, _METRICS = 100, 1000
"""The most that MLflow takes in one call."""
_STATES = MappingProxyType({"finished": "FINISHED", "stopped": "KILLED"})


class Mlflow(Tracker):
    """Logs into MLflow's SQLite file, or to its server; the run of an earlier launch is moved to the deleted ones.

    Numbers wait in memory for a few seconds, so that the training does not wait for every one to be written.
    """

    def __init__(self, directory: Path, options: MlflowOptions) -> None:
        super().__init__()
        self._experiment = options.experiment
        self._uri = options.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
        self._client: Any = None
        self._run = ""
        self._waiting: list[Any] = []
        self._flushed = time.monotonic()
        self._lock = Lock()

    def open(self, facts: RunFacts, settings: Mapping[str, Any]) -> None:
        """Open the run, named as this one, in place of the one of the launch before."""
        from mlflow.entities import Param

        client, experiment = self._open_experiment()
        for run in client.search_runs([experiment], f"tags.`{_RUN_ID}` = '{facts.run_id}'"):
            client.delete_run(run.info.run_id)
        opened = client.create_run(experiment, run_name=facts.name, tags={_RUN_ID: facts.run_id})
        self._client, self._run = client, opened.info.run_id
        params = [Param(name, str(value)) for name, value in _flat(settings)]
        for start in range(0, len(params), _PARAMS):
            client.log_batch(self._run, params=params[start : start + _PARAMS])

    def _open_experiment(self) -> tuple[Any, str]:
        """Return a client and the experiment's id, one run at a time: two that make one database would break it."""
        from filelock import FileLock
        from mlflow import MlflowClient

        file = self._uri.removeprefix("sqlite:///")
        with FileLock(f"{file}.lock") if file != self._uri else nullcontext():
            client = MlflowClient(tracking_uri=self._uri)
            known = client.get_experiment_by_name(self._experiment)
            return client, known.experiment_id if known else client.create_experiment(self._experiment)

    def log(self, numbers: Mapping[str, float], step: int, moment: float) -> None:
        """Add `numbers`, and write what has waited for long enough."""
        from mlflow.entities import Metric

        with self._lock:
            self._waiting += [Metric(name, value, int(moment * 1000), step) for name, value in numbers.items()]
        if time.monotonic() - self._flushed > _FLUSH_SECONDS:
            self.sync()

    def sync(self) -> None:
        """Write what waits. May be called from any thread."""
        with self._lock:
            waiting, self._waiting, self._flushed = self._waiting, [], time.monotonic()
            for start in range(0, len(waiting), _METRICS):
                self._client.log_batch(self._run, metrics=waiting[start : start + _METRICS])

    def end(self, outcome: Outcome) -> None:
        """Write what waits, and say how the run ended."""
        if self._run:
            self.sync()
            self._client.set_terminated(self._run, status=_STATES.get(outcome.state, "FAILED"))


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yield each setting by its dotted name."""
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
