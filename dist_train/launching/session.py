"""What one launch of a run reports to the outside: status, records, logs, summary, and what it records about itself."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from dist_train.checkpoint.files import CheckpointFile, Contents, list_checkpoints
from dist_train.checkpoint.state import InitialWeights, Progress
from dist_train.cluster.communicator import Communicator, RankLostError, broadcast_value, gather_str
from dist_train.cluster.devices import describe_device, device_name
from dist_train.cluster.inspection import revision
from dist_train.cluster.launch import current_job
from dist_train.cluster.watchdog import Watchdog
from dist_train.config.plugins import by_content, call_plugin
from dist_train.config.sections import MetricsSettings
from dist_train.launching.preflight import ResumePoint
from dist_train.monitoring.console import open_console
from dist_train.monitoring.observers import Observers
from dist_train.monitoring.prometheus.exporter import Exporter
from dist_train.outcome import (
    SHARED_ERRORS,
    CodedError,
    DisagreementError,
    DivergedError,
    ExitCode,
    PeerFailedError,
    StoppedError,
    UsageError,
    exit_code_of,
    shortened,
)
from dist_train.rundir.lock import RunLock, check_of_run
from dist_train.rundir.metrics_file import JsonLines
from dist_train.rundir.paths import RunDirectory
from dist_train.rundir.records import Observer, Outcome, RunFacts
from dist_train.rundir.status import EventCounts, RanksFile, State, StatusFile, another_failed, read_status
from dist_train.training.consistency import changed_versions, kernels_on, launch_environment

if TYPE_CHECKING:
    from dist_train.training.trainer import Trainer

_logger = logging.getLogger("dist_train.training")


@dataclass(eq=False)
class Session:
    """Reports the beginning and end of a launch to observers and `status.json`: on rank 0, and on a rank that fails."""

    directory: RunDirectory
    comm: Communicator
    observers: Observers
    lock: RunLock | None = None  # of the run directory, on rank 0
    run_id: str = ""
    more_observers: Sequence[Observer] = ()  # those that are not from the settings; rank 0 calls them
    watchdog: Watchdog | None = None  # which can tell what ranks are lost
    trainer: Trainer | None = None  # whose run is reported, once there is one

    def __post_init__(self) -> None:
        self._check = check_of_run(self.directory)
        before = read_status(self.directory.status) if self.comm.rank == 0 else None
        self.was_finished = before is not None and before.state == "finished"
        self.status = self._status_file() if self.comm.rank == 0 else None
        self._launched = time.time()
        self._begun = time.monotonic()
        self._observers_have_begun = False
        if self.status:
            self.status.change("starting")

    def take_over(self, lock: RunLock) -> None:
        """Take over rank 0's reporting from a lost rank; this rank has the `lock` now."""
        # The exporter of this rank, if any, gives way to that of rank 0.
        self.observers.end(self._outcome("running", ExitCode.FINISHED, ""))
        settings, loggers = self._running.config.metrics, []
        for each in settings.loggers:
            try:
                loggers.append(call_plugin(each.name, each.options, Observer, self.directory.root))
            except UsageError as error:
                _logger.error("the run continues without the logger %s: %s", each.name, error)
        self.observers = _observers_of_rank_0(settings, self.directory, [*loggers, *self.more_observers])
        self.observers.add_first(JsonLines(self.directory.metrics))
        self._observers_have_begun = False
        self.lock = lock
        self.status = self._status_file()

    @property
    def _running(self) -> Trainer:
        assert self.trainer is not None, "set before anything is reported of it"
        return self.trainer

    def note_generation(self, nodes: tuple[str, ...]) -> None:
        """Report that the ranks, on `nodes`, have met again. All ranks call it."""
        self._show_facts(nodes)
        devices = self._compare_devices(self.status.current.environment.get("device", "") if self.status else "")
        if self.status:
            self.status.note(**self._running.status_fields())
            environment = {**self.status.current.environment, "device": devices}
            size, generation = self.comm.size, self.comm.generation
            self.status.change("running", world_size=size, generation=generation, environment=environment)

    def _show_facts(self, nodes: tuple[str, ...]) -> str:
        """Tell the observers the facts of this generation of ranks, and return the revision of the code, on rank 0.

        All ranks call it.
        """
        # One time for all, so that the exporter of a rank that takes over does not seem to be of an earlier launch.
        self._launched = broadcast_value(self.comm, self._launched, "launch time")
        # Rank 0 alone: in a large launch every rank would start git on the same file system.
        code = revision() if self.status else ""
        if self.observers:
            facts = run_facts(self._running, self._launched, code, self.run_id, nodes)
            (self.observers.regroup if self._observers_have_begun else self.observers.begin)(facts)
        self._observers_have_begun = True
        return code

    def _compare_devices(self, before: str) -> str:
        """Return the names of the ranks' devices; warn if they differ, also from those `before`. All ranks call it."""
        trainer = self._running
        names = {*gather_str(self.comm, device_name(trainer.training_step.compute.device), "device names")}
        devices = ", ".join(sorted(names))
        if self.status and trainer.config.comm.is_exact and devices != before and (before or len(names) > 1):
            which = f"{devices}; before: {before}" if before else devices
            _logger.warning(
                f"devices differ ({which}): they may round differently, so that the bits depend on which computes what"
            )
        return devices

    def begin(self, resume_point: ResumePoint) -> None:
        """Report that training begins, and from what. All ranks call it."""
        trainer = self._running
        code = self._show_facts(gather_str(self.comm, socket.gethostname(), "nodes"))
        environment = self.status.current.environment if self.status else {}  # of the launch before
        resumes = resume_point.contents is not None and trainer.has_work
        devices = self._compare_devices(environment.get("device", "") if resumes else "")
        if self.status is None:
            return
        self._warn_of_micro_batches(resume_point)
        if resume_point.gone is not None:
            step = trainer.progress.step
            _logger.warning(
                f"{resume_point.gone} is not there or cannot be read: the run resumes from its own last checkpoint, "
                f"step {step}"
            )
        if resume_point.former_records is not None:
            _logger.warning(
                f"the run has no whole checkpoint of its own any more, so its records begin anew: the former are in "
                f"{resume_point.former_records}"
            )
        for name, text in resume_point.damage.items():
            _logger.warning("%s; the checkpoint before it is used", text)
            trainer.event("corrupt_checkpoint", path=name)
        if (job := current_job()) is not None and job.restarts:
            trainer.event("requeued", restart=job.restarts)
        if resume_point.contents is not None:
            if resumes:
                trainer.event("resumed", ranks=self.comm.size)
            self._note_changed_plugins(resume_point.contents)
            if trainer.splits.differ_from(resume_point.contents.data):
                _logger.warning(
                    "the data set is not the one with which the checkpoint was saved: files or labels differ. To train "
                    "on other data, start a new run with run.init_from"
                )
                trainer.event("data_changed", before=resume_point.contents.data, now=trainer.splits.identity)
        kernels = kernels_on(trainer.training_step.compute.device.type)
        now = launch_environment(code, self.comm.backend, devices, kernels)
        if resumes and (changed := changed_versions(environment, now)):
            before, here = changed
            _logger.warning("the run resumes with %s; before: %s. They may round differently", here, before)
            trainer.event("versions_changed", before=before, now=here)
        if resume_point.epochs_before is not None:
            self._record_lengthening(resume_point.epochs_before)
        if (initial := resume_point.initial) is not None:
            self._note_initial_weights(initial)
        if trainer.has_work or not environment:
            environment = now | {f"plug-in {name}": digest for name, digest in trainer.plugins.items()}
        self.status.note(**trainer.status_fields())
        self.status.change("running", environment=environment)

    def _warn_of_micro_batches(self, resume_point: ResumePoint) -> None:
        config, plan = self._running.config, self._running.plan
        parts, ghost, micro = len(plan.micro_batches), config.model.ghost_size, plan.micro_size
        is_ghost = config.model.norm == "ghost" and bool(self._running.training_step.statistics.norms)
        if self.comm.size > parts and config.model.norm != "sync":  # of which every rank computes a part
            smaller = "" if is_ghost and micro <= ghost else "set a smaller batch.micro_size, or "
            _logger.warning(
                f"a batch of {parts} micro-batches of {micro} samples leaves {self.comm.size - parts} of the "
                f"{self.comm.size} ranks without work: {smaller}use fewer ranks"
            )
        step, largest = self._running.training_step, max(size for _, size in config.batch.sizes)
        passes = -(-largest // (micro * self.comm.size)) * len(step.noise.points(0))  # of a rank in an update, at most
        if step.graph_recorder is not None and passes == 1:
            _logger.warning(
                f"precision.cuda_graphs has no effect: a rank's last pass in an update is no graph, and with "
                f"micro-batches of {micro} samples it is its only one: choose a smaller batch.micro_size"
            )
        if is_ghost and micro < min(ghost, config.batch.global_size) and resume_point.contents is None:
            _logger.warning(
                f"ghost norm takes its statistics over micro-batches of {micro} samples, not over model.ghost_size, "
                f"{ghost}: set batch.micro_size to {ghost} or more, or model.ghost_size to {micro}"
            )

    def _note_initial_weights(self, initial: InitialWeights) -> None:
        trainer = self._running
        details: dict[str, int | str] = {} if initial.step is None else {"checkpoint_step": initial.step}
        _logger.info("the weights are those of %s%s", initial.path, f", step {initial.step}" if details else "")
        classes = trainer.config.data.image_format.classes
        if heads := ", ".join(initial.other_heads(trainer.network.state_dict(), classes)):
            _logger.warning("the file's head is not for %d classes: %s are initialized from the seed", classes, heads)
            details["from_seed"] = heads
        trainer.event("initialized", checkpoint=str(initial.path), sha256=initial.sha256, **details)

    def _note_changed_plugins(self, contents: Contents) -> None:
        trainer = self._running
        before, now = contents.plugins, trainer.plugins
        one, other = by_content(before), by_content(now)
        different = one.keys() ^ other.keys()
        loggers = trainer.config.model_dump(mode="json")["metrics"]["loggers"]
        if contents.config.get("metrics", {}).get("loggers") != loggers:  # whose files, which change no result, differ
            names = {name for name, _ in one} & {name for name, _ in other}
            different = {each for each in different if each[0] in names}
        if changed := ", ".join(sorted({({**one, **other})[each] for each in different})):
            _logger.warning("plug-ins have changed since the checkpoint was saved: %s", changed)
            trainer.event("plugins_changed", files=changed)

    def _record_lengthening(self, before: int) -> None:
        trainer = self._running
        now, step = trainer.config.run.epochs, trainer.progress.step
        rate, amplitude = trainer.learning_rate.at(step), trainer.training_step.noise.amplitude(step)
        _logger.info(
            f"lengthened from {before} to {now} epochs: schedules are laid out anew over {trainer.total_steps} "
            f"updates; the next one has learning rate {rate:g}, noise amplitude {amplitude:g}"
        )
        trainer.event("lengthened", before=before, now=now)

    def before_publishing(self) -> None:
        """Flush the records before a checkpoint gets its name, from any thread.

        Raises OSError if that fails, or the lock is gone.
        """
        if self.lock is not None:
            self.lock.check()
        for each in self.observers:
            if isinstance(each, JsonLines):  # as an observer that fails, it would be dropped
                each.flush()
        self.observers.sync()

    def waiting_records(self) -> bytes:
        """Return the last lines of `metrics.jsonl`, which the disk may lack, from any thread."""
        return b"".join(each.waiting for each in self.observers if isinstance(each, JsonLines))

    def finish(self) -> Outcome:
        """Report that the run is done, and return how it ended."""
        reason = self.trainer.stopped_early if self.trainer else ""
        outcome = self._end("finished", ExitCode.FINISHED, reason, is_recorded=False)
        if self.status:
            with suppress(OSError):
                self._check()
                self.directory.reserve.unlink(missing_ok=True)
        return outcome

    def recorded_outcome(self) -> Outcome | None:
        """Return how the run ended if rank 0 has recorded that it is done; None if not."""
        status = read_status(self.directory.status)
        if status is None or status.exit_code != ExitCode.FINISHED:
            return None
        return self._outcome("finished", ExitCode.FINISHED, status.reason)

    def fail(self, error: BaseException) -> None:
        """Report that the launch ends with `error`, after the checkpoint being written is on disk."""
        is_for_rank_0 = False
        if isinstance(error, RankLostError) and self.watchdog is not None:
            if missing := self.watchdog.absent():
                error.args = (f"{missing} does not answer; {error}",)
            is_for_rank_0 = not missing and self.watchdog.hears_rank_0  # which alone can tell who is lost
        if self.trainer is not None:
            self.trainer.saving.settle()
        # A rank that failed on its own knows why; the others know only that it is lost.
        is_recorded = isinstance(error, RankLostError | PeerFailedError) and another_failed(self.directory.status)
        is_exit = not isinstance(error, Exception)  # whose text, if any, is a number
        reason = ("" if is_exit else " ".join(str(error).split())) or type(error).__name__
        if isinstance(error, DivergedError):
            reason = f"{reason}; {self._last_good()}"
            error.args = (reason,)
        if self.trainer is not None and isinstance(error, DivergedError | DisagreementError):
            self.trainer.event("not_finite" if isinstance(error, DivergedError) else "disagreement", reason=reason)
        if not isinstance(error, StoppedError | PeerFailedError):
            is_bug = error.code == "plugin-failed" if isinstance(error, CodedError) else not is_exit
            _logger.info("%s", reason, exc_info=error if is_bug else None)
        reason = shortened(reason)
        code = exit_code_of(error)
        if self.status is None and not (is_recorded or is_for_rank_0) and self._ends_launch_alone(error):
            self._record_fault(code, reason)
        state: State = "stopped" if isinstance(error, StoppedError) else "failed"
        others_may_continue = self._others_may_continue(error)
        if code == ExitCode.FAULT and others_may_continue:  # if they do not, the launcher records it
            is_recorded = True
        elif is_recorded and (told := read_status(self.directory.status)) is not None and told.exit_code is not None:
            reason, code = told.reason, ExitCode(told.exit_code)
        self._end(state, code, reason, is_recorded=is_recorded, is_left=is_exit or others_may_continue)

    def _ends_launch_alone(self, error: BaseException) -> bool:
        """Whether `error` happened on this rank alone, and the others do not continue without it."""
        is_shared = isinstance(error, (*SHARED_ERRORS, PeerFailedError))
        if self.comm.is_joining or is_shared or self._others_may_continue(error):
            return False
        # A GPU without memory for NCCL is found by its rank alone, and so is a mistake in its samples or in a plug-in.
        is_own = getattr(error, "code", "") == "out-of-memory" or self.trainer is not None
        return exit_code_of(error) == ExitCode.FAULT or (isinstance(error, UsageError) and is_own)

    def _others_may_continue(self, error: BaseException) -> bool:
        """Whether the other ranks of an elastic launch, once this one has left with `error`, may train on."""
        is_shared = isinstance(error, (*SHARED_ERRORS, PeerFailedError, RankLostError))
        return self.comm.is_elastic and self.trainer is not None and not is_shared

    def lose(self, message: str) -> None:
        """Record that the launch ends because a rank is lost. From any thread; the process ends right after.

        Does not overwrite what a rank has recorded about its own failure, which says more, nor how this one has ended.
        """
        _logger.info("%s", message)
        if self.status and self.status.current.exit_code is not None:  # its observers know, too
            return
        if not another_failed(self.directory.status):
            if self.status:
                self.status.end("failed", ExitCode.FAULT, message)
            else:
                self._record_fault(ExitCode.FAULT, message)
        outcome = self._outcome("failed", ExitCode.FAULT, message)
        for each in self.observers:
            if isinstance(each, Exporter):  # whose process outlives this one; to end the others would take too long
                each.send_outcome(outcome)

    def _record_fault(self, code: ExitCode, reason: str) -> None:
        """Record the fault in the status on the rank where it happened, not rank 0: no other may know of it."""
        status = self._status_file()
        if self.trainer is not None:
            status.note(**self.trainer.status_fields())
        status.end("failed", code, f"rank {self.comm.rank}: {reason}")

    def _status_file(self) -> StatusFile:
        """Return the status file of this launch, which begins with the progress of the launch before it."""

        def address() -> str:
            return next((each.address or "" for each in self.observers if isinstance(each, Exporter)), "")

        before = read_status(self.directory.status)
        check = self._check if self.lock is None else self.lock.check
        return StatusFile(self.directory.status, self.comm.size, before, address, check)

    def _outcome(self, state: State, code: ExitCode, reason: str) -> Outcome:
        trainer = self.trainer
        progress = trainer.progress if trainer else Progress()
        checkpoints = self._checkpoints() if self.comm.rank == 0 else None
        return Outcome(
            state=state,
            reason=reason,
            exit_code=int(code),
            step=progress.step,
            epoch=trainer.epoch if trainer else 0.0,
            seconds=time.monotonic() - self._begun,
            train_accuracy=progress.train_accuracy,
            test_accuracy=progress.test_accuracy,
            best_accuracy=progress.best_accuracy,
            samples_per_second=trainer.samples_per_second if trainer else None,
            last_checkpoint=checkpoints[-1].path if checkpoints else None,
        )

    def _end(self, state: State, code: ExitCode, reason: str, *, is_recorded: bool, is_left: bool = False) -> Outcome:
        outcome = replace(self._outcome(state, code, reason), is_left=is_left)
        # Before the observers end, which may wait for a last scrape: a launcher may not wait that long.
        if self.status and not is_recorded:
            if self.trainer:
                self.status.progress(**self.trainer.status_fields())
            # A launch that is refused leaves a finished run finished.
            is_refused = self.trainer is None and code == ExitCode.USAGE
            self.status.end("finished" if self.was_finished and is_refused else state, code, reason)
        self.observers.end(outcome)
        return outcome

    def _checkpoints(self) -> list[CheckpointFile] | None:
        """Return the run's checkpoints; None if they cannot be read, which must not hide how the launch ended."""
        try:
            return list_checkpoints(self.directory.checkpoints)
        except OSError as error:
            _logger.warning("the records of the checkpoints cannot be read: %s", error)
            return None

    def _last_good(self) -> str:
        checkpoints = self._checkpoints()
        if checkpoints is None:
            return "which checkpoint is the last good one cannot be read"
        good = [file for file in checkpoints if file.metrics.get("non_finite_step") != file.step]
        return f"the last good checkpoint is {good[-1].path}" if good else "there is no good checkpoint"


def build_observers(
    settings: MetricsSettings,
    directory: RunDirectory,
    rank: int,
    more: Sequence[Observer] = (),
) -> Observers:
    """Return the observers of `rank`, but for `JsonLines`, which is added when training begins; on rank 0 also `more`.

    Raises UsageError if a logger cannot be built.
    """
    if rank != 0:
        return Observers([Exporter(settings)] if settings.enabled and settings.ranks == "all" else [])
    loggers = [call_plugin(each.name, each.options, Observer, directory.root) for each in settings.loggers]
    return _observers_of_rank_0(settings, directory, [*loggers, *more])


def _observers_of_rank_0(settings: MetricsSettings, directory: RunDirectory, more: Sequence[Observer]) -> Observers:
    """Return those that write files, the exporter, and `more`."""
    files = (EventCounts(directory.event_counts), open_console(), RanksFile(directory.ranks))
    return Observers([*files, *([Exporter(settings)] if settings.enabled else []), *more])


def run_facts(trainer: Trainer, launched: float, revision: str, run_id: str, nodes: tuple[str, ...]) -> RunFacts:
    """Return the facts of the run of `trainer`; `launched`: when this launch began, in seconds since 1970."""
    config, plan, ranks = trainer.config, trainer.plan, trainer.comm
    device = trainer.training_step.compute.device
    to_come = trainer.epochs.stages[trainer.epochs.number(trainer.progress.step) :]
    steps_per_epoch = max(stage.steps_per_epoch for stage in to_come)
    intervals = (config.checkpoint.every_steps or 0, config.checkpoint.every_epochs * steps_per_epoch)
    job = current_job()
    return RunFacts(
        name=trainer.directory.root.resolve().name,
        run_directory=trainer.directory.root,
        model=f"{config.model.name}, width {config.model.width:g}, {config.model.norm} norm",
        data=config.data.name,
        parameters=trainer.training_step.weights.count,
        global_size=plan.global_size,
        micro_size=plan.micro_size,
        micro_batches=len(plan.micro_batches),
        world_size=ranks.size,
        total_steps=trainer.last_step,
        steps_per_epoch=trainer.epochs.stage(min(trainer.progress.step, trainer.last_step - 1)).steps_per_epoch,
        epochs=trainer.epochs.done(trainer.last_step),
        stages=trainer.epochs.stages if len(trainer.epochs.stages) > 1 else (),
        noise=config.noise.summary,
        device=describe_device(config, device),
        start_step=trainer.progress.step,
        controller=ranks.backend,
        rank=ranks.rank,
        revision=revision,
        slurm_job=job.id if job else "",
        node=nodes[ranks.rank],
        nodes=nodes,
        launched=launched,
        best_accuracy=trainer.progress.best_accuracy,
        run_id=run_id,
        checkpoint_interval=min((each for each in intervals if 0 < each < trainer.last_step), default=0),
        time_limit=trainer.time_limit.end or 0.0,
        is_requeued=job is not None and job.is_requeued,
        generation=ranks.generation,
    )
