"""A run from start to end: `train(config, run_directory)`."""

from __future__ import annotations

import logging
import math
import os
import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from dist_train.checkpoint.files import has_published, set_aside
from dist_train.cluster.communicator import (
    Communicator,
    Generation,
    RankLostError,
    broadcast_str,
    broadcast_value,
    gather_int,
    run_long_on_all_ranks,
    run_on_all_ranks,
)
from dist_train.cluster.devices import device_type
from dist_train.cluster.rendezvous import join_ranks, rendezvous_within
from dist_train.cluster.watchdog import Watchdog, start_watchdog
from dist_train.config import Config, parse_config
from dist_train.config.combinations import unused_settings
from dist_train.config.loading import parse_yaml
from dist_train.config.plugins import check_unedited
from dist_train.config.resuming import with_setting
from dist_train.launching.assembly import assemble, naming_plugins, set_up_writing
from dist_train.launching.preflight import ResumePoint, check_launch, find_resume_point
from dist_train.launching.session import Session, build_observers
from dist_train.monitoring.console import open_logs
from dist_train.monitoring.prometheus.http_server import access_warnings
from dist_train.outcome import SHARED_ERRORS, CodedError, FaultError, UsageError, say_on_stderr
from dist_train.rundir.lock import LEASE_SECONDS, LockRequest, RunLock
from dist_train.rundir.metrics_file import RECENT_BYTES, JsonLines, read_last_records, record_key, rewind
from dist_train.rundir.paths import RunDirectory, may_be_written, oserror_to_fault
from dist_train.rundir.records import EventRecord, Observer, Outcome
from dist_train.start_up import without_collection
from dist_train.training.compute import free_device_memory, restoring_torch, share_of_threads
from dist_train.training.consistency import check_consistent_across_ranks
from dist_train.training.micro_batches import sums_floats
from dist_train.training.recovery import ElasticTrainer
from dist_train.training.stopping import StopRequests

_logger = logging.getLogger("dist_train.launching")

_SILENCE_SHARE = 2 / 3  # part of `comm.timeout` in silence; the rest is for the launcher, to end the others
_RENDEZVOUS_TIMEOUTS = 2.0  # in units of `comm.timeout`: on a large launch some ranks start late
_POLLS_IN_TIMEOUT = 4  # how often within `comm.timeout` ranks that wait for the run directory synchronize


def train(config: Config, run_directory: Path | str | None = None, observers: Sequence[Observer] = ()) -> Outcome:
    """Train as `config` says, in `run_directory` (default: `run.directory`/`run.name`), resuming a run found there.

    Every rank of a launch calls this; without a launcher there is one rank. `observers` are callbacks of your own,
    called on rank 0 like the run's loggers: one that raises is reported once and dropped.

    Examples:
        >>> config = dist_train.load_config("dist_train:configs/smoke.yaml")
        >>> outcome = dist_train.train(config, "runs/demo")  # 4 epochs of 8 updates
        >>> outcome.state, outcome.step
        ('finished', 32)

    Raises:
        UsageError: something that the user can fix.
        DivergedError: a loss, a gradient or the last evaluation is not finite; on all ranks.
        DisagreementError: ranks hold different weights or noise; on all ranks.
        StoppedError: asked to stop, and saved; on all ranks.
        RankLostError: a rank is gone.
        FaultError: the run directory could not be written, or something else failed that is not the user's mistake.
    """
    check_is_config(config)
    if not (isinstance(observers, Sequence) and all(isinstance(each, Observer) for each in observers)):
        raise UsageError(f"observers: not a list of Observer objects but {observers!r}", code="wrong-type")
    directory = RunDirectory(config.run_directory if run_directory is None else Path(run_directory))
    free_device_memory()  # of earlier runs of this process, whose trainers are in reference cycles
    # The stack unwinds in this order: trainer and data, which still log; the log, which lies in the locked directory;
    # the lock, now that nothing is written; the wait for the other ranks, if all have the error, in which the watchdog
    # still reports one that hangs; the watchdog; the ranks; last the signal handlers, since until the others are done
    # another request to stop must not kill this rank.
    with restoring_torch(), oserror_to_fault(directory), ExitStack() as stack:
        stop = stack.enter_context(StopRequests(config.run.stop_signal))
        comm, watchdog = _meet(config, stack)
        resume_point, run_id, lock = _open_run(config, directory, comm, stack)
        metrics = resume_point.config.metrics
        open_loggers = partial(build_observers, metrics, directory, comm.rank, observers)
        opened = run_on_all_ranks(comm, open_loggers, "open its loggers")
        session = Session(directory, comm, opened, lock, run_id, observers, watchdog)
        if watchdog is not None:
            watchdog.on_loss = session.lose
        regroup = Regrouping(session, stack)
        try:
            if not comm.is_joining:
                run_on_all_ranks(comm, partial(regroup.open_first_logs, comm.rank), "open its log")
            if comm.rank == 0:
                exposed = access_warnings(metrics) if metrics.enabled else ()
                for warning in (*unused_settings(config).values(), *exposed):
                    _logger.warning("%s", warning)
                other_disk = config.checkpoint.fallback_directory
                if other_disk is not None and not may_be_written(other_disk):
                    _logger.warning("checkpoint.fallback_directory: %s cannot be made or written here", other_disk)
            with without_collection():
                trainer = assemble(resume_point, session, stop, given=config, regroup=regroup, stack=stack)
            stack.callback(trainer.close)
            session.trainer = trainer
            if not comm.is_joining:
                run_on_all_ranks(comm, partial(_open_records, session, resume_point), "open its records")
                session.begin(resume_point)
                # Not earlier: what a launch leaves that is refused, or killed, the next one finds and records.
                put_away = partial(set_aside, directory.checkpoints, resume_point.damage)
                run_on_all_ranks(comm, put_away, "set damaged checkpoints aside")
            # An elastic launch restarts a rank that fails alone, but not one that ends with exit code 2.
            with naming_plugins(() if comm.is_elastic else trainer.plugins):
                trainer.run()
        except BaseException as error:  # after a second Ctrl-C, or sys.exit in a callback, a notebook lives on
            _fail(session, error)
            raise
        return _finish(session)


def check_is_config(config: object) -> None:
    """Raise UsageError if a caller of the Python API gave something else, such as a path."""
    if not isinstance(config, Config):
        raise UsageError(f"not a Config but {config!r}: give load_config(PATH, overrides)", code="wrong-type")


_KEEP_ALL_STEPS = 2**62


@dataclass
class Regrouping:
    """Called with a trainer whose ranks, of an elastic launch, have just met and hold the same state."""

    session: Session
    stack: ExitStack  # the run's exit stack: closes what is opened here when the run ends
    _logs: ExitStack = field(default_factory=ExitStack)
    _logging_as: int | None = None
    _owes_records: bool = False  # what the lost rank 0 may not have written; another loss may come before that is done

    def __post_init__(self) -> None:
        self.stack.callback(self._logs.close)

    def open_logs(self, rank: int) -> None:
        """Write this process's log to the file of `rank`. Raises OSError."""
        if rank != self._logging_as:
            self._logs.close()
            self._logging_as = None
            self._logs.enter_context(open_logs(self.session.directory.logs, rank))
            self._logging_as = rank

    def open_first_logs(self, rank: int) -> None:
        """Call `open_logs`, in the folder that rank 0 has just made. Raises OSError or FaultError."""
        try:
            self.open_logs(rank)
        except FileNotFoundError as error:  # the file server may have been slow: a restart may succeed
            raise FaultError(
                f"rank {rank} on {socket.gethostname()} does not see {self.session.directory.logs.absolute()}, which "
                f"rank 0 has made: the run directory must be on a file system that all ranks share (run.directory, "
                f"--run-dir)",
                code="run-directory-not-shared",
            ) from error

    def __call__(self, trainer: ElasticTrainer, generation: Generation) -> None:
        """Let a rank that has become rank 0 take over writing the run directory.

        If it cannot, it raises OSError, or FaultError if the lost rank keeps the lock. On the other ranks this breaks
        the group: on another node, the next rank 0 may be able to.
        """
        try:
            self.open_logs(trainer.comm.rank)
        except OSError as error:  # the disk may fail as the rank is lost; one that becomes rank 0 needs it below
            say_on_stderr(f"dist-train: rank {trainer.comm.rank} continues without its log: {error}")
        # The lost rank's node may be cut off without having noticed, or the file server may still hold its lock.
        request = LockRequest(trainer.directory, patience=LEASE_SECONDS)
        while not all(gather_int(trainer.comm, self._take_over(trainer, request), "take over the run directory")):
            pass
        self.session.note_generation(generation.nodes)
        if self._owes_records:
            self._write_owed_records(trainer)
            self._owes_records = False

    def _take_over(self, trainer: ElasticTrainer, request: LockRequest) -> bool:
        """Take over if this rank has become rank 0; return False if the lost rank 0 still holds the lock."""
        if trainer.comm.rank != 0 or trainer.saving.writer is not None:
            return True
        try:
            lock = request.wait(trainer.config.comm.timeout / _POLLS_IN_TIMEOUT)
        except CodedError as error:
            raise FaultError(f"the lost rank 0 keeps its lock: {error}", code="lock-not-released") from error
        if lock is None:
            return False
        self.stack.callback(lock.release)
        trainer.directory.remove_partial_files(trainer.config.checkpoint.fallback_directory)
        self._owes_records = True
        rewind(trainer.directory.metrics, _KEEP_ALL_STEPS)
        self.session.take_over(lock)
        set_up_writing(trainer, self.session)
        return True

    def _write_owed_records(self, trainer: ElasticTrainer) -> None:
        written = {record_key(each): each for each in read_last_records(trainer.directory.metrics, RECENT_BYTES)}
        for record in trainer.recent.all():
            if record_key(record) not in written:
                trainer.observers.record(record)
        for record in written.values():
            match record:
                case EventRecord(event="checkpoint", details={"seconds": float(seconds)}):
                    trainer.time_limit.note_saved(seconds)
            if record.step >= trainer.progress.step:  # of work that may be redone now
                trainer.recent.add(record)


def _meet(config: Config, stack: ExitStack) -> tuple[Communicator, Watchdog | None]:
    """Return the ranks of this launch, which `stack` leaves, and their watchdog. Raises UsageError if they differ."""
    timeout, micro_size = config.comm.timeout, config.batch.micro_size
    if sums_floats(config):
        # Horovod sums what is ready at the same time as one tensor, whose length decides in what order ranks are added.
        os.environ.setdefault("HOROVOD_FUSION_THRESHOLD", "0")
    with without_collection(), rendezvous_within(timeout * _RENDEZVOUS_TIMEOUTS, engine=config.comm.engine):
        comm = join_ranks(
            timeout=timeout,
            device_type=device_type(config.run.device),
            engine=config.comm.engine,
            timeline=config.run.profile_steps > 0,
            micro_batches=1 if micro_size == "auto" else config.batch.global_size // micro_size,
        )
        stack.push(partial(_leave, comm))
        if not comm.is_joining:
            check_consistent_across_ranks(comm, config)
        watchdog = start_watchdog(comm, timeout=timeout * _SILENCE_SHARE)
        if watchdog is not None:
            stack.enter_context(watchdog)
        stack.push(partial(_await_others, comm))
    return comm, watchdog


def _finish(session: Session) -> Outcome:
    """Report on all ranks that the run is done, and return how it ended.

    None leaves before rank 0, which may wait for a last scrape, or for a tracker: srun would end it soon after another.
    """
    if session.comm.is_elastic:  # whose launcher ends none
        return session.finish()
    try:
        return run_long_on_all_ranks(session.comm, session.finish, "report its end")
    except RankLostError:
        if (outcome := session.recorded_outcome()) is None:
            raise
        return outcome  # nobody needs the lost rank any more


def _fail(session: Session, error: BaseException) -> None:
    """Report that the launch ends with `error`; if all ranks have it, none leaves before rank 0, as in `_finish`."""
    if not _is_shared(error, session.comm):
        session.fail(error)
        return
    with suppress(RankLostError):
        run_long_on_all_ranks(session.comm, partial(session.fail, error), "report its end")
    session.comm.last_action_failed = True  # again, for `_await_others`


def _is_shared(error: BaseException | None, comm: Communicator) -> bool:
    """Whether all ranks have `error`, and wait for each other; in an elastic launch, whose launcher ends none: no."""
    is_shared = isinstance(error, SHARED_ERRORS) or (isinstance(error, Exception) and comm.last_action_failed)
    return is_shared and not comm.is_elastic


def _await_others(comm: Communicator, kind: object, error: BaseException | None, traceback: object) -> None:
    """Wait until all ranks have closed their files, as an exit callback, with an error that all of them have.

    Launchers end a rank that the others have left.
    """
    if _is_shared(error, comm):
        with suppress(RankLostError):
            comm.barrier()


def _leave(comm: Communicator, kind: object, error: BaseException | None, traceback: object) -> None:
    """Leave the ranks, as an exit callback: in order, or because of an error of this rank alone."""
    try:
        comm.close(None if isinstance(error, SHARED_ERRORS) else error)
    except RuntimeError:  # of a group that is broken already; it must not hide `error`
        if error is None:
            raise


def _open_run(
    config: Config, directory: RunDirectory, comm: Communicator, stack: ExitStack
) -> tuple[ResumePoint, str, RunLock | None]:
    """Return where the run starts, its id and, on rank 0, the lock of its directory, which `stack` releases."""
    if comm.is_joining:
        return _join(directory), directory.run_id(), None
    if lock := _lock(config, directory, comm):
        stack.callback(lock.release)
    find = partial(_find_resume_point, config, directory, comm)
    # A large checkpoint may be read for minutes.
    resume_point = run_long_on_all_ranks(comm, find, "open the run directory")
    resume_point = replace(resume_point, config=_shared_config(comm, resume_point.config))
    return resume_point, broadcast_str(comm, directory.run_id() if comm.rank == 0 else "", "run id"), lock


def _join(directory: RunDirectory) -> ResumePoint:
    """Return the settings of the run under way that this rank joins; it gets its state from the other ranks."""
    try:
        text = directory.config.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RankLostError(f"{directory.root} holds no run that this rank could join") from None
    return ResumePoint(parse_config(parse_yaml(text, is_dumped=True), source=str(directory.config)))


def _lock(config: Config, directory: RunDirectory, comm: Communicator) -> RunLock | None:
    """Make and lock the run directory on rank 0; return the lock there, None on the ranks that wait for it."""
    request = run_on_all_ranks(comm, partial(_request_lock, config, directory, comm.rank), "make the run directory")
    return run_long_on_all_ranks(comm, lambda: request.wait(math.inf) if request else None, "lock the run directory")


def _request_lock(config: Config, directory: RunDirectory, rank: int) -> LockRequest | None:
    check_unedited(config.model_dump(mode="json"))
    if rank != 0:
        return None
    check_launch(config, directory)
    directory.create()
    return LockRequest(directory)


def _find_resume_point(config: Config, directory: RunDirectory, comm: Communicator) -> ResumePoint:
    """Return what rank 0 resumes from; on other ranks an empty resume point."""
    if comm.rank != 0:
        return ResumePoint(config)
    directory.run_id()  # made here, so that an error of the disk is raised on all ranks
    directory.remove_partial_files(config.checkpoint.fallback_directory)
    directory.make_reserve()
    resume_point = find_resume_point(config, directory)
    begins = resume_point.contents is None or resume_point.source is not None
    if begins and has_published(directory.checkpoints):
        kept = directory.metrics.with_name(f"metrics-{time.strftime('%Y%m%dT%H%M%S')}.jsonl")
        resume_point = replace(resume_point, former_records=kept)
    return resume_point


def _open_records(session: Session, resume_point: ResumePoint) -> None:
    """Rewind the records to where rank 0 begins to train, and write them from now on. Raises OSError.

    Not earlier: after a launch that is refused, a later checkpoint may be there again, as when a copy is complete.
    """
    if session.comm.rank != 0:
        return
    metrics = session.directory.metrics
    if resume_point.former_records is not None:
        metrics.rename(resume_point.former_records)
    step = resume_point.contents.step if resume_point.contents else 0
    # Before it has a checkpoint of its own, a run may begin at another one's again, which has advanced since.
    rewind(metrics, step, first=0 if resume_point.source is None else step)
    session.observers.add_first(JsonLines(metrics))
    if resume_point.contents is not None and resume_point.source is None:
        saved = resume_point.contents.config.get("metrics")
        every = saved.get("every_steps", 1) if isinstance(saved, Mapping) else 1
        last = max((record.step for record in read_last_records(metrics)), default=0)
        if last < step - step % every:
            _logger.warning(f"{metrics} ends at step {last}: records up to the checkpoint, step {step}, are lost")


def _shared_config(comm: Communicator, config: Config) -> Config:
    """Return rank 0's settings, with a number of threads that suits all ranks."""
    for path in ("checkpoint.fallback_directory", "metrics.targets_directory"):
        if (folder := config.value(path)) is not None:  # later launches and other programs read it from config.yaml
            config = with_setting(config, path, folder.absolute())
    config = parse_config(broadcast_value(comm, config.model_dump(mode="json"), "config"), source="rank 0")
    threads = min(gather_int(comm, share_of_threads(comm), "threads"))
    return with_setting(config, "precision.threads", threads) if config.precision.threads == "auto" else config
