"""`dist-train submit CONFIG [section.key=value ...] [--nodes N ...] [--dry-run] [-- sbatch options]`."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from dist_train.outcome import ExitCode


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command's arguments."""
    parser = subparsers.add_parser(
        "submit",
        help="check a run and submit it to Slurm",
        description="Check CONFIG, show how the batch is shared out, and submit the run by sbatch. It is requeued "
        "when it is preempted, meets its time limit, or loses a node, and resumes bit-identically. "
        "Options of sbatch follow --, each in one word: -- --account=me --gpus-per-node=4.",
    )
    parser.add_argument("config", type=Path, metavar="CONFIG", help="a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that differ from it")
    parser.add_argument("--run-dir", type=Path, metavar="DIR", help="the run's own directory")
    parser.add_argument("--nodes", type=_nodes, default="1", metavar="N", help="nodes, or a range 1-4 (default: 1)")
    parser.add_argument(
        "--ranks-per-node",
        type=_count,
        metavar="K",
        help="ranks of a node (default: one for each GPU; without GPUs one)",
    )
    parser.add_argument("--time", metavar="T", help="time limit, as sbatch has it: 4:00:00 (default: the partition's)")
    parser.add_argument("--partition", metavar="P", help="partition (default: the cluster's)")
    parser.add_argument("--dry-run", action="store_true", help="print the batch script, and submit nothing")
    parser.set_defaults(run=run, sbatch_options=[])


def run(arguments: argparse.Namespace) -> int:
    """Check, show, submit. Raises UsageError and ConfigError before anything reaches the queue."""
    from dist_train.config import load_config
    from dist_train.config.combinations import unused_settings
    from dist_train.config.loading import located
    from dist_train.sweep.submission import Submission, describe_batch, project_root, write_script

    config = load_config(arguments.config, arguments.overrides)
    directory = (arguments.run_dir or config.run_directory).absolute()
    submission = Submission(
        root=project_root(),
        config_file=located(arguments.config).absolute(),
        overrides=tuple(arguments.overrides),
        run_directory=directory,
        name=config.run.name,
        nodes=arguments.nodes,
        ranks_per_node=arguments.ranks_per_node,
        time=arguments.time,
        partition=arguments.partition,
        options=tuple(arguments.sbatch_options),
    )
    plan = describe_batch(config, submission.ranks)
    for sentence in unused_settings(config):
        print(f"dist-train: warning: {sentence}", file=sys.stderr)
    # What a dry run prints can be piped into a file, and is then the script alone.
    print("\n".join(plan), file=sys.stderr if arguments.dry_run else sys.stdout)
    script = write_script(submission)
    if arguments.dry_run:
        print(script, end="")
        return ExitCode.FINISHED

    from dist_train.cluster.launch import submit

    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    job = submit(script, ())
    print(f"job            {job}")
    print(f"run directory  {directory}")
    print(f"watch it       dist-train runs {directory.parent}")
    print(f"               tail -F {str(submission.log).replace('%j', job)}")
    print(f"               squeue --jobs {job}; scancel {job}")
    return ExitCode.FINISHED


def _nodes(text: str) -> str:
    match = re.fullmatch(r"([1-9]\d*)(?:-([1-9]\d*))?", text)
    if match is None or (match[2] and int(match[2]) < int(match[1])):
        raise argparse.ArgumentTypeError(f"takes a number of nodes, or a range such as 1-4, not {text!r}")
    return text


def _count(text: str) -> int:
    if not re.fullmatch(r"[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"takes a number, 1 or more, not {text!r}")
    return int(text)
