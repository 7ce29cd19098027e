"""Batch scripts for a run or a study, and how the global batch is distributed over ranks."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from dist_train.cluster.launch import JOB_IS_ALIVE, array_states, job_states, submit
from dist_train.config import Config
from dist_train.data.plan import BatchPlan
from dist_train.outcome import UsageError, writing
from dist_train.rundir.paths import RunDirectory
from dist_train.rundir.status import read_status
from dist_train.sweep.planned_runs import Plan

_GPU = re.compile(r"(?:gres/)?gpu(?=[:=]|$)")
"""How an item of --gres or --tres-per-node begins that requests GPUs."""
_PART = re.compile(
    r"--(?:ntasks(?:-per-(?:node|gpu|socket))?|exclusive|(?:gpus|mem)(?:-per-\w+)?|(?:tres|cpus)-per-\w+)(?:=(?!0$).*)?"
    r"|--gres=.*\bgpu\b.*|-[nGc].*"
)
"""Options that request part of a node; 0 does not, and neither does binding."""
_ARRAY_OPTIONS = re.compile(r"--(?:array|dependency|output|error)=.*|-[adoe].*")
"""Options that a study's other jobs do not share."""
_REPORT_OPTIONS = re.compile(
    r"--(?:account|partition|qos|reservation|clusters?|wckey|mail-\w+|exclude|constraint|export|chdir|comment)=.*"
    r"|-[ApqMxCD].*"
)
"""Options that its report shares: those that request no resources."""
_MOST_JOBS = 100


@dataclass(frozen=True)
class Submission:
    """What to run, and what to request from Slurm; paths are absolute, `nodes` is a number or a range (1-2)."""

    root: Path
    config_file: Path
    overrides: tuple[str, ...]
    run_directory: Path
    name: str
    nodes: str = "1"
    ranks_per_node: int | None = None
    time: str | None = None
    partition: str | None = None
    options: tuple[str, ...] = ()
    plugins: tuple[str, ...] = ()

    def log_of(self, job: str) -> Path:
        """Return the output file of the job with this id."""
        return self.run_directory / f"slurm-{job}.log"

    @property
    def ranks(self) -> int | None:
        """The largest possible number of ranks; None if it depends on the nodes' GPUs."""
        each = self.ranks_per_node or _gpus(self.options)
        return None if each is None else each * int(self.nodes.split("-")[-1])


def submit_run(submission: Submission) -> str:
    """Submit the batch script of `submission` and return the job's id; if sbatch refuses, new folders are removed.

    Raises UsageError if another job runs or will run it, its directory cannot be made, or sbatch is missing or refuses.
    """
    files = RunDirectory(submission.run_directory)
    _refuse_second_job(submission, jobs_of(files), r"--dependency\b|-d")
    new = [folder for folder in (files.root, *files.root.parents) if not folder.exists()]
    with writing(files.root, "choose another by run.directory or --run-dir", code="run-directory-unwritable"):
        files.root.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        job = submit(write_script(submission), ())
    except UsageError:
        with suppress(OSError):
            for folder in new:
                folder.rmdir()
        raise
    _record_job(files, job)
    return job


def jobs_of(files: RunDirectory) -> dict[str, str]:
    """Return the run's active and pending jobs with their Slurm states."""
    status = read_status(files.status)
    known = dict.fromkeys([*_recorded_jobs(files), *filter(str.isdecimal, [status.slurm_job if status else ""])])
    return {job: state for job, state in job_states(list(known)).items() if state in JOB_IS_ALIVE}


def _recorded_jobs(files: RunDirectory) -> list[str]:
    with suppress(OSError, UnicodeDecodeError):
        return list(filter(str.isdecimal, files.jobs.read_text().split()[-_MOST_JOBS:]))
    return []


def _record_job(files: RunDirectory, job: str) -> None:
    with suppress(OSError), files.jobs.open("a") as file:
        file.write(f"{job}\n")


def _refuse_second_job(submission: Submission, busy: Mapping[str, str], unless: str) -> None:
    """Raise UsageError if jobs are `busy` with the same, unless an option of sbatch matches the pattern `unless`."""
    if busy and not any(re.match(unless, option) for option in submission.options):
        job, state = next(iter(busy.items()))
        raise UsageError(
            f"{submission.run_directory} belongs to job {job}, which is {state}: two jobs must not write into one run "
            f"directory; scancel {job}, let this job wait for it (-- --dependency=afterany:{job}), "
            f"or choose another directory with --run-dir",
            code="run-in-queue",
        )


def write_script(submission: Submission) -> str:
    """Return the text of the batch script."""
    plugins = [word for plugin in submission.plugins for word in ("--plugin", plugin)]
    directory = ["--run-dir", str(submission.run_directory)]
    run = ["train", str(submission.config_file), *submission.overrides, *plugins, *directory]
    requests = (*_requests(submission), *_RUN_OPTIONS, _log_option(submission.run_directory, "%j"))
    return _script(submission, (*requests, *submission.options), f"run_in_job {shlex.join(run)}")


@dataclass(frozen=True)
class Job:
    """One of a study's jobs; `after` is its type of dependency on the previous job."""

    name: str
    script: str
    after: str = ""


def study_jobs(plan: Plan, numbers: str, submission: Submission) -> tuple[Job, ...]:
    """Return a study's jobs, as `submission` requests: the runs `numbers` as an array, analyses if any, the report."""
    folder = submission.run_directory
    study = [str(plan.file.absolute()), *submission.overrides, "--directory", str(folder.parent)]
    variables = (
        f"STUDY={shlex.quote(study[0])}",
        f"DIRECTORY={shlex.quote(str(folder.parent))}",
        f"OVERRIDES={shlex.quote(shlex.join(submission.overrides))}",
    )
    array = (*_requests(submission), *_RUN_OPTIONS, f"--array={numbers}")
    runs = (*array, _log_option(folder, "%A_%a"), *submission.options)
    dependent = ("--kill-on-invalid-dep=yes", "--open-mode=append", _log_option(folder, "%j"))
    jobs = [Job("runs", _script(submission, runs, *variables, "sweep_in_job"))]
    if plan.study.analyse:
        shared = (option for option in submission.options if not _ARRAY_OPTIONS.fullmatch(option))
        analyses = (*_requests(submission), *dependent, *shared)
        line = f"analyses_in_job {shlex.join(study)}"
        jobs.append(Job("analyses", _script(submission, analyses, line), "afterany"))
    partition = [f"--partition={submission.partition}"] if submission.partition else []
    site = filter(_REPORT_OPTIONS.fullmatch, submission.options)
    report = ("--nodes=1", *dependent, *partition, *site)
    # DIRECTORY and OUTPUT may be exported for other scripts, for which DIRECTORY is the folder of studies.
    body = (f"DIRECTORY={shlex.quote(str(folder))}", "OUTPUT=", "report_in_job runs")
    jobs.append(Job("report", _script(submission, report, *body), "afterany"))
    return tuple(jobs)


def submit_study(jobs: Sequence[Job], submission: Submission) -> dict[str, str]:
    """Submit a study's jobs, each dependent on the previous one; return their ids by name.

    Raises UsageError, which names the jobs that are in the queue already, also if an earlier array still trains.
    """
    files = RunDirectory(submission.run_directory)  # of which a study has the record of its arrays alone
    # The user may have chosen tasks that the other array does not have.
    _refuse_second_job(submission, array_states(_recorded_jobs(files)), r"--(dependency|array)\b|-[da]")
    files.root.mkdir(mode=0o700, parents=True, exist_ok=True)
    ids: dict[str, str] = {}
    for job in jobs:
        before = list(ids.values())[-1:]
        try:
            ids[job.name] = submit(job.script, [f"--dependency={job.after}:{each}" for each in before])
        except UsageError as error:
            if not ids:
                raise
            queued = " ".join(ids.values())
            text = f"{error}; in the queue already: {queued} (to start over, first scancel {queued})"
            raise UsageError(text, code=error.code) from None
        if not before:
            _record_job(files, ids[job.name])
    return ids


_PYTHON = "[[ -n ${{DIST_TRAIN_PYTHON:-}} || ! -x {0} ]] || export DIST_TRAIN_PYTHON={0}"
_RUN_OPTIONS = ("--requeue", "--no-kill", "--signal=B:USR1@120", "--open-mode=append")


def _log_option(folder: Path, job: str) -> str:
    """Return the option for the output file; Slurm replaces % and a letter, here only those in `job`."""
    return f"--output={str(folder).replace('%', '%%')}/slurm-{job}.log"


def _script(submission: Submission, requests: Sequence[str], *body: str) -> str:
    ranks, setup = submission.ranks_per_node, os.environ.get("DIST_TRAIN_SETUP")
    # Nodes may lack this Python. The scripts find that of the project's .venv, and its mpirun, themselves.
    is_found = Path(sys.prefix).resolve() == (submission.root / ".venv").resolve()
    python = shlex.quote(sys.executable)
    return "\n".join(
        (
            "#!/usr/bin/env bash",
            *(f"#SBATCH {_quoted(request)}" for request in (f"--job-name={submission.name}", *requests)),
            "set -euo pipefail",
            f"root={shlex.quote(str(submission.root))}",
            *([f"export RANKS_PER_NODE={ranks}"] if ranks else []),
            *([f"export DIST_TRAIN_SETUP={shlex.quote(os.path.abspath(setup))}"] if setup else []),
            *([] if is_found else [_PYTHON.format(python)]),
            '. "$root/slurm/prologue.sh"',
            *body,
            "",
        )
    )


def describe_batch(config: Config, ranks: int | None) -> tuple[str, ...]:
    """Return lines on how the global batch is distributed over ranks. Raises UsageError if it cannot be."""
    micro_size = config.batch.micro_size
    if micro_size == "auto":
        who = "ranks" if ranks is None else f"{ranks:,} ranks"
        return (
            f"global batch {config.batch.global_size:,} = {who} x micro-batches of a rank x samples of a micro-batch",
            "micro-batch    decided on the node when the run begins, then kept: the largest power of two that fits "
            "its memory, at most a rank's even share",
            *((_dealt(0, None),) if ranks is None else ()),
        )
    return tuple(
        line
        for epoch, size in config.batch.sizes
        for line in _describe_plan(config, BatchPlan(size, micro_size), ranks, epoch)
    )


def _describe_plan(config: Config, plan: BatchPlan, ranks: int | None, epoch: int) -> tuple[str, str]:
    count, size = len(plan.micro_batches), plan.micro_size
    if config.model.norm == "sync" and ranks:
        plan.check_shared(ranks)
    last = plan.micro_batches[-1].size
    shorter = "" if last == size else f", the last of {last:,}"
    since = f", from epoch {epoch + 1:,}" if epoch else ""
    cut = f"global batch {plan.global_size:,} = {count:,} micro-batches of {size:,}{shorter}{since}"
    return cut, _dealt(count, ranks)


def _dealt(count: int, ranks: int | None) -> str:
    if ranks is None:
        return "dealt out to one rank for each GPU of the nodes (without GPUs: one a node)"
    fewest, most = count // ranks, -(-count // ranks)
    each = f"{most:,}" if fewest == most else f"{fewest:,} or {most:,}"
    idle = f"; {ranks - count:,} ranks have nothing to do" if ranks > count else ""
    return f"{ranks:,} ranks x {each} micro-batches a step{idle}"


def _requests(submission: Submission) -> list[str]:
    """Return the options for nodes, time limit and partition; whole nodes unless the user's options request less."""
    gpus = _gpus(submission.options)
    # A job with whole nodes has all of their GPUs, so these need not be requested.
    part = ["--exclusive", "--mem=0"]
    if gpus is not None:
        part = [f"--ntasks-per-node={submission.ranks_per_node or gpus}"]
    elif any(map(_PART.fullmatch, submission.options)):
        part = []
    limits = {"--time": submission.time, "--partition": submission.partition}
    return [f"--nodes={submission.nodes}", *part, *(f"{name}={value}" for name, value in limits.items() if value)]


def _gpus(options: Sequence[str]) -> int | None:
    """Return how many GPUs of a node, of all types, `options` request; None if they request none."""
    for option in options:
        name, _, value = option.partition("=")
        items = value.split(",")
        if name in ("--gres", "--tres-per-node"):
            items = list(filter(_GPU.match, items))
        elif name != "--gpus-per-node":
            continue
        counts = (re.split("[:=]", item)[-1] for item in items)  # a type alone, such as a100 or 1g.10gb, is one GPU
        if total := sum(int(count) if count.isdecimal() else 1 for count in counts):
            return total
    return None


def _quoted(option: str) -> str:
    if "\n" in option:  # the shell would run what follows
        raise UsageError(
            f"an option for sbatch has a line break, {option!r}: give the folder another name, or write it on one line",
            code="line-break",
        )
    return option if re.fullmatch(r"[\w@%+=:,./-]+", option) else '"' + option.replace('"', '\\"') + '"'
