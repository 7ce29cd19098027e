"""`Observers`, which isolates a run from failing observers, and the observers for TensorBoard and trackers.

TensorBoard, trackio, Weights & Biases and MLflow hold the same numbers as `metrics.jsonl`, also after a resume, which
discards what was recorded after its checkpoint. TensorBoard supports that by `purge_step`. The others do not offline:
wandb ignores a step below the last one, trackio and MLflow keep both values. With these, each launch therefore logs a
complete run of its own, beginning with the records that `metrics.jsonl` has kept. trackio and MLflow delete the
previous launch's run; wandb, whose runs may already be on a server, keeps it in the same group.
"""

from __future__ import annotations

import importlib
import logging
import os
import signal
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext, redirect_stdout, suppress
from dataclasses import asdict
from pathlib import Path
from threading import Lock, current_thread, main_thread
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal

import yaml
from pydantic import BaseModel, Field

from dist_train.cluster.launch import IN_CALLBACK
from dist_train.config.loading import flat_settings
from dist_train.config.plugins import place_of
from dist_train.outcome import UsageError
from dist_train.rundir.metrics_file import RecordKey, from_json, record_key
from dist_train.rundir.paths import RunDirectory
from dist_train.rundir.records import EvaluationRecord, Measurement, Observer, Outcome, Record, RunFacts, TrainRecord
from dist_train.start_up import restore_handlers

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


_logger = logging.getLogger(__name__)


# For an upload to a tracker, and more than the exporter may wait for a last scrape. One that hangs would keep the job's
# nodes to its time limit.
_LONGEST_END_SECONDS = 600.0


class Observers(Observer):
    """Forwards every call to each observer; an observer that raises is reported once and dropped."""

    def __init__(self, observers: Iterable[Observer] = ()) -> None:
        self._observers = tuple(observers)
        self._lock = Lock()

    def __bool__(self) -> bool:
        return bool(self._observers)

    def __iter__(self) -> Iterator[Observer]:
        return iter(self._observers)

    def add_first(self, observer: Observer) -> None:
        """Add an observer that is called before the others, before `begin`."""
        self._observers = (observer, *self._observers)

    def begin(self, facts: RunFacts) -> None:
        self._call_each(lambda observer: observer.begin(facts))

    def regroup(self, facts: RunFacts) -> None:
        self._call_each(lambda observer: observer.regroup(facts))

    def record(self, record: Record) -> None:
        self._call_each(lambda observer: observer.record(record))

    def measurement(self, measurement: Measurement) -> None:
        self._call_each(lambda observer: observer.measurement(measurement))

    def progress(self, step: int) -> None:
        self._call_each(lambda observer: observer.progress(step))

    def sync(self) -> None:
        self._call_each(lambda observer: observer.sync())

    def end(self, outcome: Outcome) -> None:
        self._call_each(lambda observer: _end(observer, outcome))

    def _call_each(self, call: Callable[[Observer], None]) -> None:
        token = IN_CALLBACK.set(True)
        try:
            for observer in self._observers:
                try:
                    call(observer)
                except Exception as error:
                    self._drop(observer, error)
        finally:
            IN_CALLBACK.reset(token)

    def _drop(self, failed: Observer, error: Exception) -> None:
        with self._lock:
            before = self._observers
            self._observers = tuple(observer for observer in before if observer is not failed)
            if self._observers == before:
                return
        name, reason = type(failed).__name__, f"{type(error).__name__}: {error}{place_of(error, type(failed))}"
        _logger.warning("%s failed and is disabled; training continues: %s", name, reason)
        _logger.info("where %s failed", name, exc_info=error)


def _end(observer: Observer, outcome: Outcome) -> None:
    """Call `observer.end`; in the main thread, raise TimeoutError if that takes too long."""
    if current_thread() is not main_thread():
        observer.end(outcome)
        return

    def give_up(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"its end() has not returned for {_LONGEST_END_SECONDS:g} s")

    before: dict[int, Any] = {signal.SIGALRM: signal.signal(signal.SIGALRM, give_up)}
    left, interval = signal.setitimer(signal.ITIMER_REAL, _LONGEST_END_SECONDS)
    begun = time.monotonic()
    try:
        observer.end(outcome)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        restore_handlers(before)
        if left > 0:  # the alarm of the caller, which may be late by now
            signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - begun), 0.001), interval)


_MODULES = {"tensorboard": "torch.utils.tensorboard", "trackio": "trackio", "wandb": "wandb", "mlflow": "mlflow"}


def check_installed(name: str) -> None:
    """Raise UsageError if the library of the logger `name` cannot be imported; called before training starts."""
    if name not in _MODULES:
        return
    try:
        if importlib.import_module(_MODULES[name]).__file__ is None:  # such as wandb/, which runs leave behind
            raise ImportError(f"{_MODULES[name]} is only a folder without a module")
    except Exception as error:  # whatever a broken installation raises
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise UsageError(
            f"the logger {name} cannot be imported ({reason}): pip install 'dist_train[{name}]', or leave it out",
            code=f"{name}-missing",
        ) from error


def numbers_of(record: Record) -> dict[str, float]:
    """Return the numbers of `record`, keyed by their names in trackers; empty for an event."""
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


class TensorBoard(Observer):
    """Writes an event file per launch into the run `directory`; a resume purges what came after its checkpoint."""

    def __init__(self, directory: Path) -> None:
        self._directory = RunDirectory(directory).tensorboard
        self._writer: SummaryWriter | None = None

    def begin(self, facts: RunFacts) -> None:
        """Open this launch's file. Raises ImportError if TensorBoard is not installed."""
        from torch.utils.tensorboard import SummaryWriter

        # The records of the checkpoint's own step were flushed before the checkpoint, so they stay.
        self._writer = SummaryWriter(self._directory, purge_step=facts.start_step + 1)

    def record(self, record: Record) -> None:
        self._add(numbers_of(record), record.step, record.time)
        if isinstance(record, EvaluationRecord):
            self.sync()

    def measurement(self, measurement: Measurement) -> None:
        parts = {f"step_parts/{name}": seconds for name, seconds in asdict(measurement.parts).items()}
        norms = {"weights/norm": measurement.weight_norm, "weights/distance_from_initial": measurement.distance}
        self._add(norms | parts, measurement.step, measurement.time)

    def sync(self) -> None:
        if self._writer is not None:
            self._writer.flush()

    def end(self, outcome: Outcome) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _add(self, numbers: dict[str, float], step: int, moment: float) -> None:
        assert self._writer is not None, "begin comes first"
        for tag, value in numbers.items():
            self._writer.add_scalar(tag, value, step, walltime=moment)


class Tracker(Observer, ABC):
    """Logs each launch as a tracker's run, beginning with earlier launches' records from `metrics.jsonl`."""

    _run: Any = None  # the tracker's run, or its id, once it is open

    def __init__(self) -> None:
        self._logged: set[RecordKey] = set()

    def begin(self, facts: RunFacts) -> None:
        """Open the tracker's run and log the records of earlier launches."""
        run = RunDirectory(facts.run_directory)
        self.open(facts, yaml.safe_load(run.config.read_text(encoding="utf-8")))
        with run.metrics.open("rb") as lines:  # one at a time: a million records would take 1.2 GB
            for line in lines:
                if (record := from_json(line)) is not None:
                    self.record(record)

    def record(self, record: Record) -> None:
        """Log the numbers of `record`, once: a resumed run may repeat an evaluation."""
        key = record_key(record)
        if (numbers := numbers_of(record)) and key not in self._logged:
            self._logged.add(key)
            self.log(numbers, record.step, record.time)

    @abstractmethod
    def open(self, facts: RunFacts, settings: Mapping[str, Any]) -> None:
        """Open the tracker's run with the run's `settings`."""

    @abstractmethod
    def log(self, numbers: Mapping[str, float], step: int, moment: float) -> None:
        """Log `numbers`, measured after update `step` at `moment` (seconds since 1970)."""


class TrackioOptions(BaseModel, extra="forbid"):
    """Options of the logger `trackio`."""

    project: str = Field("dist_train", min_length=1)


class WandbOptions(BaseModel, extra="forbid"):
    """Options of the logger `wandb`."""

    project: str = Field("dist_train", min_length=1)
    entity: str | None = None
    mode: Literal["offline", "online"] = "offline"


class Trackio(Tracker):
    """Logs into the project's trackio SQLite file; the run of an earlier launch is replaced."""

    def __init__(self, directory: Path, options: TrackioOptions) -> None:
        super().__init__()
        self._project = options.project

    def open(self, facts: RunFacts, settings: Mapping[str, Any]) -> None:
        """Open a trackio run of the same name, replacing the previous launch's."""
        import trackio

        with suppress(ValueError):  # there is no such project yet
            for run in trackio.Api().runs(self._project):
                if run.name == facts.name and (run.config or {}).get("run_id") == facts.run_id:
                    run.delete()
        # trackio prints a greeting, which does not belong on stdout.
        with redirect_stdout(sys.stderr):
            self._run = trackio.init(
                project=self._project,
                name=facts.name,
                config={"run_id": facts.run_id, **settings},
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )

    def log(self, numbers: Mapping[str, float], step: int, moment: float) -> None:
        """Log `numbers`; the library writes them from its own thread."""
        self._run.log(dict(numbers), step=step)

    def end(self, outcome: Outcome) -> None:
        """Wait until everything is written, so that nothing is left for the exit of the process."""
        if self._run is not None:
            import trackio

            with redirect_stdout(sys.stderr):
                trackio.finish()


class Wandb(Tracker):
    """Logs into a folder of the run directory or to W&B's server; the launches of a run are a group."""

    def __init__(self, directory: Path, options: WandbOptions) -> None:
        super().__init__()
        self._directory = directory
        self._options = options

    def open(self, facts: RunFacts, settings: Mapping[str, Any]) -> None:
        import wandb

        # Without a limit (in seconds) `finish` waits for a server that is away, and so does the job that is to end.
        is_free = "finish_timeout" in wandb.Settings.model_fields and "WANDB_FINISH_TIMEOUT" not in os.environ
        limit = {"finish_timeout": 60.0} if is_free else {}
        self._run = wandb.init(
            project=self._options.project,
            entity=self._options.entity,
            mode=self._options.mode,
            dir=self._directory,
            name=facts.name,
            group=f"{facts.name}-{facts.run_id}",
            config={"run_id": facts.run_id, "start_step": facts.start_step, **settings},
            settings=wandb.Settings(console="off", silent=True, **limit),
        )
        if self._options.mode == "online":
            _logger.info("logged to %s", self._run.url)

    def log(self, numbers: Mapping[str, float], step: int, moment: float) -> None:
        """Log `numbers` with the time at which they were measured; the library writes them from its own process."""
        self._run.log({**numbers, "_timestamp": moment}, step=step)

    def end(self, outcome: Outcome) -> None:
        """Wait until everything is written; what no server has taken stays on disk for `wandb sync`."""
        if self._run is not None:
            self._run.finish()


class MlflowOptions(BaseModel, extra="forbid"):
    """Options of the logger `mlflow`."""

    experiment: str = Field("dist_train", min_length=1)
    tracking_uri: str | None = None


_RUN_ID = "dist_train.run_id"
_FLUSH_SECONDS = 5.0
_PARAMS, _METRICS = 100, 1000  # MLflow's limits for one call
_STATES = {"finished": "FINISHED", "stopped": "KILLED"}
_LIMITS = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
"""With these, a call to a server that is away fails within a minute, before the other ranks give up; with MLflow's own
limits it takes four minutes or more. The user's variables take precedence."""


class Mlflow(Tracker):
    """Logs into MLflow's SQLite file or to its server; the run of an earlier launch is marked as deleted.

    Numbers are collected for a few seconds, so that training does not wait for every write.
    """

    def __init__(self, directory: Path, options: MlflowOptions) -> None:
        super().__init__()
        self._experiment = options.experiment
        self._uri = options.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
        self._client: Any = None
        self._limited: list[str] = []  # variables that this logger has set
        self._waiting: list[Any] = []
        self._flushed = time.monotonic()
        self._lock = Lock()

    def open(self, facts: RunFacts, settings: Mapping[str, Any]) -> None:
        """Open an MLflow run of the same name, replacing the previous launch's."""
        from mlflow.entities import Param

        client, experiment = self._open_experiment()
        for run in client.search_runs([experiment], f"tags.`{_RUN_ID}` = '{facts.run_id}'"):
            if run.info.run_name == facts.name:  # not that of the run which this one's folder was copied from
                client.delete_run(run.info.run_id)
        opened = client.create_run(experiment, run_name=facts.name, tags={_RUN_ID: facts.run_id})
        self._client, self._run = client, opened.info.run_id
        params = [Param(name, str(value)) for name, value in flat_settings(settings)]
        for start in range(0, len(params), _PARAMS):
            client.log_batch(self._run, params=params[start : start + _PARAMS])

    def _open_experiment(self) -> tuple[Any, str]:
        """Return a client and the experiment's id; locked, because creating one database twice would break it."""
        from filelock import FileLock
        from mlflow import MlflowClient

        self._limited = [name for name in _LIMITS if name not in os.environ]
        os.environ.update({name: _LIMITS[name] for name in self._limited})
        file = self._uri.removeprefix("sqlite:///")
        with FileLock(f"{file}.lock") if file != self._uri else nullcontext():
            client = MlflowClient(tracking_uri=self._uri)
            known = client.get_experiment_by_name(self._experiment)
            return client, known.experiment_id if known else client.create_experiment(self._experiment)

    def log(self, numbers: Mapping[str, float], step: int, moment: float) -> None:
        """Add `numbers`; write all that are waiting if the last write was a while ago."""
        from mlflow.entities import Metric

        with self._lock:
            self._waiting += [Metric(name, value, int(moment * 1000), step) for name, value in numbers.items()]
        if time.monotonic() - self._flushed > _FLUSH_SECONDS:
            self.sync()

    def sync(self) -> None:
        with self._lock:
            waiting, self._waiting, self._flushed = self._waiting, [], time.monotonic()
            for start in range(0, len(waiting), _METRICS):
                self._client.log_batch(self._run, metrics=waiting[start : start + _METRICS])

    def end(self, outcome: Outcome) -> None:
        """Write the waiting numbers and set the run's final status."""
        try:
            if self._run is not None:
                self.sync()
                self._client.set_terminated(self._run, status=_STATES.get(outcome.state, "FAILED"))
        finally:
            for name in self._limited:  # what a notebook logs next has MLflow's own limits
                os.environ.pop(name, None)
