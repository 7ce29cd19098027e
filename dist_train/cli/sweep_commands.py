"""`dist-train sweep` and `submit`: the runs of a study, and a run as a batch job."""

from __future__ import annotations

import argparse
import io
import json
import re
import shlex
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout, suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from dist_train.cli.common import (
    Subparsers,
    add_config,
    add_overrides,
    check_readable_again,
    config_to_train,
    count,
    folder_path,
    print_table,
    terminal_width,
    warn_of_unused,
)
from dist_train.config import ConfigError
from dist_train.config.combinations import unused_settings
from dist_train.config.loading import located, project_root
from dist_train.config.plugins import from_folder
from dist_train.config.problems import Problem
from dist_train.outcome import ExitCode, UsageError, escaped, printable, say_on_stderr, text_with_code

if TYPE_CHECKING:
    from dist_train.sweep.planned_runs import Plan, PlannedRun
    from dist_train.sweep.submission import Submission


def _add_sweep(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "sweep",
        help="train every run of a study: skip finished runs, resume unfinished ones",
        description="Train every unfinished run of STUDY (variants x grid x seeds), each in its own process. "
        "The same command resumes a stopped sweep. Exit code: 0 all runs have finished, 1 some failed (they are "
        "named), 2 the study is invalid, 75 stopped after saving, or other processes still train some runs.",
    )
    parser.add_argument("study", type=Path, metavar="STUDY", help="a YAML file, see docs/studies.md")
    add_overrides(parser, "settings to override in every run")
    parser.add_argument("--only", type=count, metavar="N", help="only the run with this number; shows its output")
    parser.add_argument("--jobs", type=count, default=1, metavar="K", help="runs at a time (default: 1)")
    parser.add_argument("--ranks", type=count, default=1, metavar="W", help="ranks per run (default: 1)")
    parser.add_argument(
        "--directory",
        type=folder_path,
        metavar="DIR",
        help="folder of studies (default: the base's run.directory, runs)",
    )
    actions = parser.add_mutually_exclusive_group()
    for option, action, text in (
        ("--list", _list, "show the state of the runs"),
        ("--array", _array, "print the numbers of the unfinished runs, as sbatch --array takes them"),
        (
            "--arguments",
            _arguments,
            "with --only: print the arguments by which dist-train trains the run, one per line; none if it is finished",
        ),
        ("--analyses", _analyses, "print the study's commands that analyse the finished runs, one per line"),
        (
            "--best",
            _best,
            "for a search: print the best finished trial of each variant, by the objective, one line of JSON each",
        ),
    ):
        actions.add_argument(option, dest="action", action="store_const", const=action, help=text)
    parser.set_defaults(run=_study, action=_sweep)


def _study(arguments: argparse.Namespace) -> int:
    from dist_train.sweep.planned_runs import plan_study

    plan = plan_study(arguments.study, arguments.directory, arguments.overrides)
    _check_analyses(plan)
    if arguments.action in (_sweep, _list):
        _warn_of_unused(plan)
        _warn_of_statistics(plan)
    if arguments.action in (_sweep, _list, _best):
        _warn_of_objective(plan)
    runs: tuple[PlannedRun, ...] = plan.runs
    if arguments.only is not None:
        from dist_train.sweep.standing import run_of_requeued_task, with_trials

        if begun := run_of_requeued_task(plan, arguments.only):
            arguments.only = begun.number
        if arguments.only in plan.unasked and arguments.action in (_sweep, _arguments):
            plan = with_trials(plan, arguments.only)
        if arguments.only in plan.left_out:
            name = plan.left_out[arguments.only]
            say_on_stderr(f"dist-train: {name} is left out: Optuna suggested settings that do not go together")
            return ExitCode.FINISHED
        only = plan.run(arguments.only)
        if only is None:
            asked = " yet" if arguments.only in plan.unasked else ""
            wrong = f"the study {plan.study.name} has the runs 1 to {plan.total}, not {arguments.only}{asked}"
            raise UsageError(wrong, code="no-such-run-number")
        runs = (only,)
    action: Callable[[argparse.Namespace, Plan, tuple[PlannedRun, ...]], int] = arguments.action
    return action(arguments, plan, runs)


def _warn_of_unused(plan: Plan) -> None:
    """Warn of each setting that has no effect in a variant, unless every variant has it and it takes effect in one."""
    unused: dict[str, list[tuple[str, str]]] = {}
    for run in plan.runs:
        for path, sentence in unused_settings(run.config).items():
            unused.setdefault(path, []).append((run.family, sentence))
    given = {name: {*variant.settings, *variant.grid} for name, variant in plan.study.variants.items()}
    # A study that confirms a search gives all that was searched to every variant: the noise's strength to the baseline.
    shared = set.intersection(*given.values())
    for path, found in unused.items():
        for family, sentence in dict.fromkeys(found):
            is_own = any(f"{each}.".startswith(f"{path}.") for each in given[family] - shared)
            if is_own or len(found) == len(plan.runs):
                say_on_stderr(f"dist-train: warning: variant {family}: {sentence}")


def _warn_of_statistics(plan: Plan) -> None:
    """Warn if the norms' statistics are recomputed in some runs alone: that changes results, most of all short ones."""
    kinds = {run.config.recomputes_statistics for run in plan.runs if run.config.model.norm not in ("group", "none")}
    if len(kinds) > 1:
        wrong = "the norms' statistics are running averages in some variants, recomputed in others, so that results of"
        fix = "models with norms differ by that, too: set model.norm_statistics for all"
        say_on_stderr(f"dist-train: warning: {wrong} {fix}")


def _warn_of_objective(plan: Plan) -> None:
    """Warn if a search compares its trials on the test split without being told to."""
    search = plan.study.search
    if search is not None and "objective" not in search.model_fields_set:
        wrong = "the search compares its trials by test.accuracy, so that the best one's test accuracy is partly luck"
        fix = "set data.validation_size for all runs, in a study of another name if trials have begun"
        say_on_stderr(f"dist-train: warning: {wrong}: {fix}; or set search.objective, if that is meant")


def _check_analyses(plan: Plan) -> None:
    """Raise ConfigError if the command of an analysis, hours later, would refuse the options that the study gives."""
    from dist_train.cli.main import parse
    from dist_train.sweep.planned_runs import analysis_command

    refused = []
    for number, analysis in enumerate(plan.study.analyse):
        words = analysis_command(analysis, ["RUN"] * (2 if analysis.kind == "interpolate" else 1))
        printed = io.StringIO()
        try:
            with redirect_stdout(printed), redirect_stderr(printed):
                parsed = parse(list(words))
            parsed.check(parsed)
            if not parsed.overrides:
                continue
            wrong = f"too many values for an option: {' '.join(parsed.overrides)}"
        except SystemExit:
            wrong = printed.getvalue().rpartition("error: ")[2].strip()
        except UsageError as error:
            wrong = str(error)
        refused.append(Problem(f"analyse.{number}.options", wrong, code="analysis-options", value=analysis.options))
    if refused:
        raise ConfigError(str(plan.file), refused)


def _sweep(arguments: argparse.Namespace, plan: Plan, runs: tuple[PlannedRun, ...]) -> int:
    from dist_train.sweep.planned_runs import is_written
    from dist_train.sweep.standing import publish, with_trials
    from dist_train.sweep.sweep import Launcher, summary, sweep, threads_per_rank

    is_single = arguments.only is not None
    planned = len(runs) if is_single else plan.total
    jobs = min(arguments.jobs, planned)
    launcher = Launcher(arguments.ranks, threads_per_rank(jobs, arguments.ranks), to_terminal=is_single)
    publish(plan, arguments.only)
    print(f"study {plan.study.name}: {planned} of {plan.total} runs, {jobs} at a time, in {plan.directory}")
    current = plan

    def new_trials() -> list[PlannedRun]:
        nonlocal current
        before = {run.number for run in current.runs}
        new: list[PlannedRun] = []
        while current.unasked and not is_single and not new:
            current = with_trials(current)
            new = [run for run in current.runs if run.number not in before]
        return new

    tally = sweep(plan, runs, jobs, launcher, _say, new_trials)
    tally.unasked = 0 if is_single else len(current.unasked)
    # Of a search by Optuna the last results are left to report, unless a later sweep has changed the study.
    if plan.study.search is not None and is_written(current):
        publish(current, arguments.only)
    for line in summary(tally):
        print(escaped(line))
    return tally.exit_code


def _list(arguments: argparse.Namespace, plan: Plan, runs: tuple[PlannedRun, ...]) -> int:
    from dist_train.rundir.status import runs_with_result
    from dist_train.sweep.standing import render, standings_of

    print_table(render(standings_of(runs), terminal_width()))
    if plan.unasked and arguments.only is None:
        print(f"and {len(plan.unasked)} runs of trials that Optuna has not suggested yet")
    if plan.left_out and arguments.only is None:
        print(f"left out, since Optuna suggested invalid settings: {', '.join(plan.left_out.values())}")
    planned = {run.name for run in plan.runs}
    if others := [name for name in runs_with_result(plan.directory) if name not in planned]:
        names = escaped(", ".join(others))
        print(f"finished or diverged runs in {plan.directory} that the study does not have: {names}")
    return ExitCode.FINISHED


def _array(arguments: argparse.Namespace, plan: Plan, runs: tuple[PlannedRun, ...]) -> int:
    from dist_train.sweep.standing import numbers_left

    left = numbers_left(runs, plan.unasked if arguments.only is None else ())
    if not left:
        print(f"dist-train: no run of {plan.study.name} is left to start; see --list", file=sys.stderr)
        return ExitCode.FAULT
    print(left)
    return ExitCode.FINISHED


def _arguments(arguments: argparse.Namespace, plan: Plan, runs: tuple[PlannedRun, ...]) -> int:
    from dist_train.sweep.standing import publish, standing_of

    if arguments.only is None:
        raise UsageError("--arguments prints those of one run: choose it by --only", code="option-alone")
    (run,) = runs
    standing = standing_of(run)
    match standing.then:
        case "start":
            publish(plan)
            print("\n".join(plan.train_arguments(run)))
            return ExitCode.FINISHED
        case "skip":
            print(f"dist-train: run {run.number}, {run.name}, has finished", file=sys.stderr)
            return ExitCode.FINISHED
    print(f"dist-train: run {run.number}, {run.name}, is {standing.state}: {escaped(standing.note)}", file=sys.stderr)
    return ExitCode.STOPPED if standing.then == "busy" else ExitCode.FAULT


def _analyses(arguments: argparse.Namespace, plan: Plan, runs: tuple[PlannedRun, ...]) -> int:
    from dist_train.sweep.planned_runs import analysis_commands
    from dist_train.sweep.standing import standings_of

    finished = [standing.run for standing in standings_of(runs) if standing.then == "skip"]
    for command in analysis_commands(plan.study, finished):
        print(shlex.join(["dist-train", *command]))
    return ExitCode.FINISHED


def _best(arguments: argparse.Namespace, plan: Plan, runs: tuple[PlannedRun, ...]) -> int:
    from dist_train.sweep.standing import best_trials, numbers_without_result

    search = plan.study.search
    if search is None:
        raise UsageError(f"the study {plan.study.name} has no search: see its report", code="option-alone")
    if arguments.only is not None:
        raise UsageError("--best compares all trials: leave out --only", code="option-alone")
    found = list(best_trials(plan))
    if not found:
        print(f"dist-train: no trial of {plan.study.name} has finished; see --list", file=sys.stderr)
        return ExitCode.FAULT
    if lacking := numbers_without_result(plan):
        wrong = f"runs {lacking} have no result with the study's settings (see --list)"
        say_on_stderr(f"dist-train: warning: {wrong}: the best of all trials may be another one")
    for variant, value, best in found:
        settings = {path: best[0].settings[path] for path in search.space}
        names = [run.name for run in best]
        print(json.dumps({"variant": variant, search.objective: value, "settings": settings, "runs": names}))
    return ExitCode.FINISHED


def _say(text: str) -> None:
    with suppress(OSError):  # a full disk, or the end of tee at a Ctrl-C, is no reason to end the sweep
        print(f"{datetime.now():%H:%M:%S}  {escaped(text)}", flush=True)


def _add_submit(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "submit",
        help="check a run and submit it to Slurm",
        description="Check CONFIG, show how the batch is distributed over ranks, and submit the run by sbatch. The job "
        "is requeued when it is preempted, reaches its time limit, or loses a node, and resumes bit-identically. "
        "Options for sbatch follow --, each as one word: -- --account=me --gpus-per-node=4.",
    )
    add_config(parser)
    parser.add_argument(
        "--nodes", type=_nodes, default="1", metavar="N", help="number of nodes, or a range such as 1-4 (default: 1)"
    )
    parser.add_argument(
        "--ranks-per-node", type=count, metavar="K", help="ranks per node (default: one for each GPU; without GPUs one)"
    )
    parser.add_argument(
        "--time", type=_time, metavar="T", help="time limit in sbatch's format: 4:00:00 (default: the partition's)"
    )
    parser.add_argument("--partition", metavar="P", help="partition (default: the cluster's)")
    parser.add_argument("--dry-run", action="store_true", help="print the batch script without submitting it")
    parser.add_argument(
        "--study",
        dest="run",
        action="store_const",
        const=_submit_study,
        help="CONFIG is a study: submit its runs as an array, followed by its analyses and its report; --run-dir is "
        "then the folder of studies",
    )
    parser.add_argument(
        "--directory",
        dest="run_dir",
        type=folder_path,
        default=argparse.SUPPRESS,
        metavar="DIR",
        help="the same as --run-dir; sweep's name for the folder of studies",
    )
    parser.set_defaults(run=_submit, sbatch_options=[])


def _submission(arguments: argparse.Namespace, file: Path, directory: Path, name: str) -> Submission:
    from dist_train.sweep.submission import Submission

    return Submission(
        root=project_root(),
        config_file=file,
        overrides=tuple(arguments.overrides),
        run_directory=directory,
        name=name,
        nodes=arguments.nodes,
        ranks_per_node=arguments.ranks_per_node,
        time=arguments.time,
        partition=arguments.partition,
        options=tuple(arguments.sbatch_options),
        plugins=tuple(from_folder({"plugins": arguments.plugin}, Path())["plugins"]),
    )


def _submit(arguments: argparse.Namespace) -> int:
    from dist_train.launching.preflight import refusals
    from dist_train.sweep.submission import describe_batch, submit_run, write_script

    check_readable_again(arguments.config)
    config = config_to_train(arguments)
    if config.run.resume == "never":
        raise UsageError("run.resume=never: a job that is started again must resume: leave it out", code="resume-never")
    directory = (arguments.run_dir or config.run_directory).absolute()
    submission = _submission(arguments, located(arguments.config).absolute(), directory, config.run.name)
    plan = describe_batch(config, submission.ranks)
    warn_of_unused(config)
    # Only warnings: a login node may lack files that the job's nodes have.
    for error in refusals(config, directory):
        say_on_stderr(printable(f"dist-train: warning: on this node: {text_with_code(error)}"))
    # The standard output of a dry run is the script alone, so that it can be piped into a file.
    print("\n".join(plan), file=sys.stderr if arguments.dry_run else sys.stdout)
    if arguments.dry_run:
        print(write_script(submission), end="")
        return ExitCode.FINISHED

    job = submit_run(submission)
    print(f"job            {job}")
    print(f"run directory  {directory}")
    print(f"watch it       {shlex.join(['dist-train', 'runs', str(directory.parent)])}")
    print(f"               {shlex.join(['tail', '-F', str(submission.log_of(job))])}")
    print(f"               squeue --jobs {job}; scancel {job}")
    return ExitCode.FINISHED


def _submit_study(arguments: argparse.Namespace) -> int:
    from dist_train.sweep.planned_runs import plan_study
    from dist_train.sweep.standing import numbers_left, publish
    from dist_train.sweep.submission import study_jobs, submit_study

    if arguments.plugin:
        raise UsageError("--plugin: list the file under `plugins` in the study's base instead", code="option-alone")
    check_readable_again(arguments.config)
    parent = arguments.run_dir.absolute() if arguments.run_dir else None
    plan = plan_study(located(arguments.config), parent, arguments.overrides)
    _check_analyses(plan)
    _warn_of_unused(plan)
    _warn_of_statistics(plan)
    _warn_of_objective(plan)
    directory = ["--directory", str(parent)] if parent else []
    sweep = ["dist-train", "sweep", str(arguments.config), *arguments.overrides, *directory]
    left = numbers_left(plan.runs, plan.unasked)
    if not left:
        analyses = shlex.join([*sweep, "--analyses"])
        report = shlex.join(["dist-train", "report", str(plan.directory)])
        what = f"see --list of sweep; commands of its analyses: {analyses}; of its report: {report}"
        print(f"dist-train: no run of {plan.study.name} is left to start; {what}", file=sys.stderr)
        return ExitCode.FAULT
    submission = _submission(arguments, plan.file, plan.directory.absolute(), plan.study.name)
    jobs = study_jobs(plan, left, submission)
    if arguments.dry_run:
        for job in jobs:
            dependency = f", --dependency={job.after}:the one before" if job.after else ""
            print(f"# {job.name}{dependency}\n{job.script}")
        return ExitCode.FINISHED
    publish(plan)
    for name, number in submit_study(jobs, submission).items():
        print(f"{name:<14} {number}")
    print(f"study          {submission.run_directory}")
    print(f"watch it       {shlex.join([*sweep, '--list'])}")
    return ExitCode.FINISHED


def _time(text: str) -> str:
    if re.fullmatch(r"[0-9]+(:[0-9]+){0,2}|[0-9]+-[0-9]+(:[0-9]+){0,2}|(?i:unlimited|infinite)", text) is None:
        forms = "MINUTES, M:S, H:M:S, D-H, D-H:M, D-H:M:S or UNLIMITED"
        raise argparse.ArgumentTypeError(f"takes {forms}, not {text!r}")
    return text


def _nodes(text: str) -> str:
    match = re.fullmatch(r"([1-9]\d*)(?:-([1-9]\d*))?", text)
    if match is None or (match[2] and int(match[2]) < int(match[1])):
        raise argparse.ArgumentTypeError(f"takes a number of nodes, or a range such as 1-4, not {text!r}")
    return text


COMMANDS = (_add_submit, _add_sweep)
