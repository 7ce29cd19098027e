"""Runs the runs of a study, one or several at a time, each in its own process."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from dist_train.cluster.launch import command_output, without_launcher
from dist_train.monitoring import wording
from dist_train.outcome import ExitCode, signal_name
from dist_train.rundir.lock import try_to_lock
from dist_train.rundir.status import read_status
from dist_train.start_up import own_command, restore_handlers, stop_ignoring_sigchld, usable_cores
from dist_train.sweep.planned_runs import Plan, PlannedRun
from dist_train.sweep.standing import Standing, standing_of


@dataclass(frozen=True)
class Launcher:
    """How runs are started: ranks per run, and threads per rank."""

    ranks: int = 1
    threads: int = 1
    to_terminal: bool = False  # whether a run's output goes to the terminal instead of its log

    def command(self, plan: Plan, run: PlannedRun) -> list[str]:
        """Return the command line of `run`."""
        # If the sweep is killed, its runs get SIGTERM: they save and stop. Before util-linux 2.33 (as on RHEL 8),
        # setpriv does not know the option.
        guard = ["setpriv", "--pdeathsig", "TERM"]
        if not command_output(*guard, "echo", "known"):
            guard = []
        launch = ["launch", "-np", str(self.ranks)] if self.ranks > 1 else []
        return [*guard, *own_command(*launch, *plan.train_arguments(run))]

    def environment(self) -> Mapping[str, str]:
        """Return the run's environment variables: the sweep may be one of several tasks, but the run is not."""
        return {"OMP_NUM_THREADS": str(self.threads), **without_launcher(os.environ)}


def threads_per_rank(jobs: int, ranks: int) -> int:
    """Return the threads per rank if `jobs` concurrent runs of `ranks` ranks share this machine's cores."""
    return max(1, usable_cores() // (jobs * ranks))


class RunProcess:
    """The process of a started run."""

    def __init__(self, plan: Plan, run: PlannedRun, launcher: Launcher, lock: int) -> None:
        """Start `run`; the file descriptor `lock` stays locked as long as the run or this process lives."""
        self.run = run
        self._lock = lock
        self._has_launcher = launcher.ranks > 1
        self._begun = time.monotonic()
        self._before = read_status(run.files.status)
        self._log = None if launcher.to_terminal else run.files.output_log
        if self._log is not None:
            self._log.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with self._log.open("ab") if self._log is not None else nullcontext() as log:
            # In its own session, so that Ctrl-C at the terminal reaches only the sweep, which forwards it.
            self._process = subprocess.Popen(
                launcher.command(plan, run),
                env=launcher.environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[lock],
                start_new_session=True,
            )

    def ended(self) -> int | None:
        """Return None while the run continues, then once its exit code, which releases the lock."""
        code = self._process.poll()
        if code is not None:
            os.close(self._lock)
        return code

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._begun

    def stop(self) -> None:
        """Ask the run to save and stop."""
        self._process.send_signal(signal.SIGTERM)

    def end(self) -> None:
        """End the run without waiting for it to save."""
        # At a second SIGTERM `dist-train launch` ends its ranks at once.
        self._process.send_signal(signal.SIGTERM if self._has_launcher else signal.SIGKILL)

    def reason(self, code: int) -> str:
        """Return why the run ended with the non-zero `code`."""
        status = read_status(self.run.files.status)
        if status is not None and status != self._before and status.exit_code == code:
            return status.reason
        if code < 0:
            where = f" at step {status.step}" if status is not None and status != self._before else ""
            return f"ended by {signal_name(-code)}{where}"
        if code == ExitCode.STOPPED:
            return "stopped before it started"
        return self._last_message() or f"ended with code {code}"

    def _last_message(self) -> str:
        if self._log is None:
            return ""
        try:
            lines = self._log.read_text(encoding="utf-8", errors="replace").split("dist-train: ")[-1].splitlines()
        except OSError:
            return ""
        return " ".join(" ".join(lines[:20]).split())


def lock_for_sweep(run: PlannedRun) -> int | None:
    """Lock `run` for this sweep; return the file descriptor that holds the lock, or None if another process does."""
    run.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(run.files.sweep_lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    if not try_to_lock(descriptor, run.files.sweep_lock):
        os.close(descriptor)
        return None
    return descriptor


_POLL_SECONDS = 0.1
_INSIST_SECONDS = 2.0  # a second signal within this time counts as the same request

Say = Callable[[str], None]


class StopSignals:
    """Within the block, SIGINT, SIGTERM and the signals of batch systems ask the sweep to stop.

    Signals that are ignored stay ignored: SIGHUP under nohup, SIGINT in background processes of a script.
    """

    _SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
    _INSISTENT = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.is_asked = False
        self.is_insistent = False
        self._first = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        stop_ignoring_sigchld()
        handled = [number for number in self._SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._handle) for number in handled}
        return self

    def __exit__(self, *_: object) -> None:
        restore_handlers(self._before)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self.is_asked:
            self.is_asked, self._first = True, time.monotonic()
        elif number in self._INSISTENT and time.monotonic() - self._first >= _INSIST_SECONDS:
            self.is_insistent = True


@dataclass
class Tally:
    """The outcome of a sweep's runs; `busy` are those that other processes are running."""

    finished: list[PlannedRun] = field(default_factory=list)
    failed: list[tuple[PlannedRun, str]] = field(default_factory=list)
    stopped: list[tuple[PlannedRun, str]] = field(default_factory=list)
    busy: list[tuple[PlannedRun, str]] = field(default_factory=list)
    left: list[PlannedRun] = field(default_factory=list)
    unasked: int = 0  # number of runs whose trials Optuna has not suggested yet

    @property
    def exit_code(self) -> ExitCode:
        """STOPPED if runs are left to do, otherwise FAULT if a run failed."""
        if self.left or self.stopped or self.unasked or self.busy:
            # A stopped sweep is to be started again, even if some runs failed.
            return ExitCode.STOPPED
        return ExitCode.FAULT if self.failed else ExitCode.FINISHED


@dataclass
class _StartedRuns:
    """The runs that a sweep of `plan` has started: those that are `active`, and the outcome of the others."""

    plan: Plan
    launcher: Launcher
    report: Say
    tally: Tally = field(default_factory=Tally)
    active: list[RunProcess] = field(default_factory=list)

    def start_if_needed(self, run: PlannedRun) -> None:
        lock: int | None = None
        try:
            lock = lock_for_sweep(run)
            standing = standing_of(run)
            # Another sweep that only reads the state of a finished run holds its lock, too.
            if lock is None and standing.then != "skip":
                standing = Standing(run, standing.state, "another sweep is running it", "busy")
            match standing.then:
                case "skip":
                    self.tally.finished.append(run)
                    self._say(run, f"finished before{_accuracy(standing)}")
                case "busy" | "diverged" | "mismatch":
                    (self.tally.busy if standing.then == "busy" else self.tally.failed).append((run, standing.note))
                    self._say(run, f"{standing.state}, {standing.note}")
                case "start":
                    assert lock is not None
                    self._say(run, standing.announcement)
                    self.active.append(RunProcess(self.plan, run, self.launcher, lock))
                    return
        except OSError as error:
            reason = f"cannot be started: {error}"
            self.tally.failed.append((run, reason))
            self._say(run, reason)
        if lock is not None:
            os.close(lock)

    def wait_a_moment(self) -> None:
        self.active = [process for process in self.active if not self._has_ended(process)]
        if self.active:
            time.sleep(_POLL_SECONDS)

    def _has_ended(self, process: RunProcess) -> bool:
        code, run = process.ended(), process.run
        if code is None:
            return False
        took = wording.duration(process.seconds)
        finished = standing_of(run) if code == ExitCode.FINISHED else None
        if finished is not None and finished.then != "mismatch":
            self.tally.finished.append(run)
            self._say(run, f"finished in {took}{_accuracy(finished)}")
        elif code in (ExitCode.STOPPED, -signal.SIGTERM):
            # Before a run installs its signal handlers, SIGTERM kills it; there was nothing to save.
            self.tally.stopped.append((run, process.reason(code)))
            self._say(run, f"stopped after {took}")
        else:
            # A run reads the base itself. If that was changed during the sweep, it has finished with other settings.
            reason = finished.note if finished is not None else process.reason(code)
            self.tally.failed.append((run, reason))
            self._say(run, f"failed after {took}: {reason}")
        return True

    def _say(self, run: PlannedRun, what: str) -> None:
        self.report(f"{run.number}/{self.plan.total} {run.name}: {what}")


More = Callable[[], Sequence[PlannedRun]]


def sweep(
    plan: Plan, runs: Sequence[PlannedRun], jobs: int, launcher: Launcher, say: Say, more: More = lambda: ()
) -> Tally:
    """Run `runs` in order, `jobs` at a time; report progress by `say`. A failed run does not stop the others.

    When all have been started, `more` is called for further runs until it returns none. On a signal the active runs
    save and stop, and no other is started.
    """
    waiting, started = list(runs), _StartedRuns(plan, launcher, say)
    with StopSignals() as signals:
        try:
            while not signals.is_asked:
                while len(started.active) < jobs and not signals.is_asked and (waiting := waiting or list(more())):
                    started.start_if_needed(waiting.pop(0))
                if not started.active and not waiting:
                    return started.tally
                started.wait_a_moment()
            started.tally.left = waiting
            say(f"asked to stop: waiting for {wording.plural(len(started.active), 'run')} to save and end")
            for process in started.active:
                process.stop()
            while started.active and not signals.is_insistent:
                started.wait_a_moment()
            if started.active:
                say("asked again: ending the runs without waiting")
            due = time.monotonic()
            while started.active:
                if time.monotonic() >= due:
                    for process in started.active:
                        process.end()
                    # A launcher takes one that comes too soon after the first for the same request.
                    due = time.monotonic() + _INSIST_SECONDS
                started.wait_a_moment()
        finally:
            for process in started.active:
                process.stop()
    return started.tally


def summary(tally: Tally) -> list[str]:
    """Return lines that say how many runs finished, and which did not and why."""
    lines = [f"{wording.plural(len(tally.finished), 'run')} finished"]
    for word, runs in (("failed", tally.failed), ("stopped", tally.stopped), ("left to others", tally.busy)):
        if runs:
            lines.append(f"{len(runs)} {word}:")
            same: dict[str, list[str]] = {}  # missing data stop every run
            for run, reason in runs:
                same.setdefault(reason or "no reason given", []).append(f"{run.number} {run.name}")
            lines += [f"  {', '.join(names)}: {reason}" for reason, names in same.items()]
    if not_started := len(tally.left) + tally.unasked:
        lines.append(f"{wording.plural(not_started, 'run')} not started")
    if tally.exit_code == ExitCode.STOPPED:
        lines.append("the same command continues")
    return lines


def _accuracy(standing: Standing) -> str:
    last = standing.evaluated
    return "" if last is None else f", {last.split} accuracy {wording.percent(last.accuracy)}"
