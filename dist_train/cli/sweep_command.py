"""`dist-train sweep STUDY [section.key=value ...] [--list] [--only N] [--jobs K] [--ranks W] [--directory DIR]`."""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from dist_train.outcome import ExitCode, UsageError

if TYPE_CHECKING:
    from dist_train.sweep.planned_runs import Plan, PlannedRun


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command's arguments."""
    parser = subparsers.add_parser(
        "sweep",
        help="every run of a study, skipping the finished, resuming the broken",
        description="Train every run of STUDY (variants x grid x seeds) that has not finished, each in a process of "
        "its own. The same command resumes where it was stopped. Exit status: 0 all have finished, 1 some failed "
        "(they are named), 2 the study is wrong, 75 stopped after saving, or others are still at some runs.",
    )
    parser.add_argument("study", type=Path, metavar="STUDY", help="a YAML file, see docs/studies.md")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings of every run")
    parser.add_argument("--only", type=_count, metavar="N", help="the run of this number alone; its output is shown")
    parser.add_argument("--jobs", type=_count, default=1, metavar="K", help="runs at a time (default: 1)")
    parser.add_argument("--ranks", type=_count, default=1, metavar="W", help="ranks of a run (default: 1)")
    parser.add_argument(
        "--directory", type=Path, metavar="DIR", help="folder of studies (default: the base's run.directory, runs)"
    )
    actions = parser.add_mutually_exclusive_group()
    actions.add_argument("--list", dest="action", action="store_const", const=_list, help="show how the runs stand")
    actions.add_argument(
        "--array",
        dest="action",
        action="store_const",
        const=_array,
        help="print the numbers of the runs to do, as sbatch --array takes them",
    )
    actions.add_argument(
        "--arguments",
        dest="action",
        action="store_const",
        const=_arguments,
        help="with --only: print the arguments of dist-train that train the run, one a line; none where it is finished",
    )
    actions.add_argument(
        "--analyses",
        dest="action",
        action="store_const",
        const=_analyses,
        help="print the commands that measure the finished runs as the study says, one a line",
    )
    parser.set_defaults(run=run, action=_sweep)


def run(arguments: argparse.Namespace) -> int:
    """Look at the whole study, then do what is asked. Raises UsageError and ConfigError before anything starts."""
    from dist_train.sweep.planned_runs import plan_study

    plan = plan_study(arguments.study, arguments.directory, arguments.overrides)
    runs: tuple[PlannedRun, ...] = plan.runs
    if arguments.only is not None:
        only = plan.run(arguments.only)
        if only is None:
            raise UsageError(f"the study {plan.study.name} has the runs 1 to {len(plan.runs)}, not {arguments.only}")
        runs = (only,)
    action: Callable[[argparse.Namespace, Plan, tuple[PlannedRun, ...]], int] = arguments.action
    return action(arguments, plan, runs)


def _sweep(arguments: argparse.Namespace, plan: Plan, runs: tuple[PlannedRun, ...]) -> int:
    from dist_train.sweep.planned_runs import write_plan
    from dist_train.sweep.sweep import Launcher, share_of_threads, summary, sweep

    alone = arguments.only is not None
    jobs = min(arguments.jobs, len(runs))
    launcher = Launcher(arguments.ranks, share_of_threads(jobs, arguments.ranks), to_terminal=alone)
    launcher.command(plan, runs[0])
    write_plan(plan)
    print(f"study {plan.study.name}: {len(runs)} of {len(plan.runs)} runs, {jobs} at a time, in {plan.directory}")
    tally = sweep(plan, runs, jobs, launcher, _say)
    for line in summary(tally):
        print(line)
    return tally.exit_code


def _list(arguments: argparse.Namespace, plan: Plan, runs: tuple[PlannedRun, ...]) -> int:
    from rich.console import Console

    from dist_train.sweep.standing import render, standing_of

    console = Console(highlight=False)
    table = render([standing_of(run) for run in runs])
    if not console.is_terminal:
        # a file or a pipe has no width that a line must fit
        endless = console.options.update(width=10_000)
        console.width = max(console.width, console.measure(table, options=endless).maximum)
    console.print(table)
    return ExitCode.FINISHED


def _array(arguments: argparse.Namespace, plan: Plan, runs: tuple[PlannedRun, ...]) -> int:
    from dist_train.sweep.standing import as_ranges, standing_of

    left = [run.number for run in runs if standing_of(run).then == "start"]
    if not left:
        print(f"dist-train: no run of {plan.study.name} is left to do; see --list", file=sys.stderr)
        return ExitCode.FAULT
    print(as_ranges(left))
    return ExitCode.FINISHED


def _arguments(arguments: argparse.Namespace, plan: Plan, runs: tuple[PlannedRun, ...]) -> int:
    from dist_train.sweep.planned_runs import write_plan
    from dist_train.sweep.standing import standing_of
    from dist_train.sweep.sweep import train_arguments

    if arguments.only is None:
        raise UsageError("--arguments are those of one run: say which by --only")
    (run,) = runs
    standing = standing_of(run)
    match standing.then:
        case "start":
            write_plan(plan)
            print("\n".join(train_arguments(plan, run)))
            return ExitCode.FINISHED
        case "skip":
            print(f"dist-train: run {run.number}, {run.name}, has finished", file=sys.stderr)
            return ExitCode.FINISHED
    print(f"dist-train: run {run.number}, {run.name}, is {standing.state}: {standing.note}", file=sys.stderr)
    return ExitCode.STOPPED if standing.then == "busy" else ExitCode.FAULT


def _analyses(arguments: argparse.Namespace, plan: Plan, runs: tuple[PlannedRun, ...]) -> int:
    from dist_train.sweep.planned_runs import analysis_commands
    from dist_train.sweep.standing import standing_of

    for command in analysis_commands(plan.study, [run for run in runs if standing_of(run).then == "skip"]):
        print(shlex.join(["dist-train", *command]))
    return ExitCode.FINISHED


def _say(text: str) -> None:
    from datetime import datetime

    print(f"{datetime.now():%H:%M:%S}  {text}", flush=True)


def _count(text: str) -> int:
    if not re.fullmatch(r"[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"takes a number, 1 or more, not {text!r}")
    return int(text)
