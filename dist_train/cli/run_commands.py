"""`dist-train train`, `lr-range`, `launch`, `evaluate`, and, for scripts, `outcome` and `requeue`."""

from __future__ import annotations

import argparse
import faulthandler
import gc
import json
import re
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from dist_train.cli.common import (
    TARGET,
    Subparsers,
    add_config,
    add_overrides,
    add_weights,
    check_readable_again,
    config_to_train,
    count,
    named_config,
)
from dist_train.cluster.launch import comment_on_job, current_launch
from dist_train.config import Config
from dist_train.outcome import ExitCode, UsageError, escaped, say_on_stderr
from dist_train.rundir.paths import RANGE_TEST, RunDirectory
from dist_train.start_up import own_command, without_collection

if TYPE_CHECKING:
    from dist_train.cluster.membership import Elasticity

_TRAINING = ("train", "lr-range", "replay")  # on request these save and stop; as in launch/common.sh
_ON_RANKS = (*_TRAINING, "evaluate", "landscape")
_limit = partial(count, least=0)
_STANDARD_ERROR = 2  # the descriptor itself: `sys.stderr` may be replaced by an object that has none


def _add_train(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "train",
        help="train one run, alone or under torchrun, horovodrun, mpirun or srun",
        description="Train as CONFIG says, resuming the run in the run directory, if any. "
        "The same command under torchrun, horovodrun, mpirun or srun trains on many ranks.",
    )
    add_config(parser)
    parser.set_defaults(run=_train)


def _train(arguments: argparse.Namespace) -> int:
    # prints a traceback if a library crashes the process
    faulthandler.enable(file=_STANDARD_ERROR)
    with without_collection():
        config = config_to_train(arguments)

        from dist_train.launching.run import train

        gc.freeze()  # modules live as long as this process: later collections skip them
    train(config, arguments.run_dir)
    return ExitCode.FINISHED


def _add_lr_range(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "lr-range",
        help="suggest a learning rate, by a range test: loss against a rising rate",
        description="Train as CONFIG says, with a learning rate that rises from A to B over N updates by a constant "
        "factor, without warm-up or decay, and suggest the rate at which the smoothed loss falls steepest. Writes "
        "lr_range.csv, lr_range.json and lr_range.png into the run directory, whose default name ends in -lr-range. "
        "Runs on many ranks as train does.",
    )
    add_config(parser)
    parser.add_argument(
        "--from", dest="low", type=float, default=1e-4, metavar="A", help="first rate (default: 0.0001)"
    )
    parser.add_argument("--to", dest="high", type=float, default=10.0, metavar="B", help="last rate (default: 10)")
    parser.add_argument("--updates", type=count, default=100, metavar="N", help="number of updates (default: 100)")
    parser.set_defaults(run=_lr_range)


def _lr_range(arguments: argparse.Namespace) -> int:
    from dist_train.diagnostics import learning_rate_range

    config = named_config(arguments)
    run_directory = arguments.run_dir or config.run.directory / f"{config.run.name}{RANGE_TEST}"
    test = learning_rate_range(config, arguments.low, arguments.high, arguments.updates, run_directory)
    if current_launch().rank == 0:
        result = "the loss does not fall: no suggestion"
        if test.suggestion is not None:
            result = f"suggestion: {test.suggestion:.3g}, where the smoothed loss falls steepest; try it and half of it"
            # the test's rates are not scaled, but the setting would be
            result += "" if config.schedule.scaling == "none" else ", with schedule.scaling=none"
        print(f"{len(test.rates)} updates, rates {test.rates[0]:.3g} to {test.rates[-1]:.3g}; {result}")
        print(escaped(str(run_directory / "lr_range.png")))
    return ExitCode.FINISHED


def _add_launch(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "launch",
        help="run a command on several ranks of this machine, without MPI or Horovod",
        description="Run `dist-train COMMAND ...` as N ranks on this machine, over torch.distributed. "
        "SIGTERM, SIGINT, SIGHUP and SIGUSR2 ask ranks that train to save and stop, and end others. The exit code is "
        "the command's own.",
    )
    parser.add_argument("-np", type=int, default=2, metavar="N", help="number of ranks on this machine (default: 2)")
    parser.add_argument(
        "--min-ranks",
        type=int,
        metavar="N",
        help="continue without a rank that dies or hangs, down to N ranks (default: CONFIG's launch.min_ranks, or else "
        "all: a lost rank ends the launch or, with --restarts, is waited for)",
    )
    parser.add_argument(
        "--restarts",
        type=_limit,
        metavar="N",
        help="restart a lost rank up to N times; it joins the others between two updates (default: CONFIG's "
        "launch.restarts, 0)",
    )
    parser.add_argument(
        "--listen",
        type=_address,
        metavar="HOST[:PORT]",
        help="let ranks of other nodes join, at this address of this node (default: do not)",
    )
    parser.add_argument(
        "--max-ranks",
        type=int,
        metavar="N",
        help="maximum number of ranks, including those of other nodes (default: CONFIG's launch.max_ranks, or else as "
        "many as the run begins with)",
    )
    parser.add_argument(
        "--start-with",
        type=int,
        metavar="N",
        help="begin once there are N ranks, including those of other nodes (default: -np)",
    )
    parser.add_argument(
        "--join",
        metavar="FILE|HOST:PORT",
        help="instead of a COMMAND: start ranks that join the run of another launcher, given the file that it prints, "
        "or its address and the token in DIST_TRAIN_MEMBERSHIP_TOKEN",
    )
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="COMMAND ...", help=", ".join(_ON_RANKS))
    parser.set_defaults(run=_launch)


def _launch(arguments: argparse.Namespace) -> int:
    from dist_train.cli.main import parse
    from dist_train.cluster.local_launch import blocked_signals, launch_ranks

    words = list(arguments.command)
    if words[:1] == ["--"]:
        del words[0]
    if arguments.join is not None:
        return _join(arguments)
    if not words:
        raise UsageError("no command given, for example: dist-train launch -np 2 train CONFIG", code="no-command")
    _check_range("-np", arguments.np, 0 if arguments.listen else 1, None)
    if words[0].isdecimal():
        raise UsageError(f"{words[0]} is no command; the number of ranks is -np {words[0]}", code="no-command")
    is_python = Path(words[0]).name.startswith("python")
    if is_python or words[0].endswith(".py"):
        script = " ".join(words[1:] if is_python else words)
        wrong = f"launch runs commands of dist-train; a script: torchrun --nproc-per-node {arguments.np} {script}"
        raise UsageError(wrong, code="not-on-ranks")
    command = parse(words)
    if words[0] not in _ON_RANKS:
        hint = "; its option --ranks gives each run several ranks" if words[0] == "sweep" else ""
        wrong = f"{words[0]} runs in one process: call it without launch{hint}"
        raise UsageError(f"{wrong}. On ranks run: {', '.join(_ON_RANKS)}", code="not-on-ranks")
    is_training = words[0] == "train"
    options = (arguments.min_ranks, arguments.max_ranks, arguments.restarts, arguments.start_with, arguments.listen)
    if not is_training and any(option is not None for option in options):
        wrong = "--min-ranks, --max-ranks, --start-with, --restarts and --listen are for the command train"
        raise UsageError(wrong, code="elastic-command")
    if "config" not in command:
        return launch_ranks(own_command(*words), arguments.np, saves=words[0] in _TRAINING)
    check_readable_again(command.config)
    # Checked here, so that errors are reported once and not by each rank; a plug-in, or a check, may load torch.
    with blocked_signals():
        config = config_to_train(command) if is_training else named_config(command)
        elasticity = _elasticity(arguments, config) if is_training else None
    if config.comm.engine == "horovod":
        fix = "leave comm.engine=horovod out, or start with horovodrun or mpirun"
        raise UsageError(f"launch connects its ranks by torch.distributed: {fix}", code="launcher-unsupported")
    run = command.run_dir or config.run_directory
    if elasticity is None:
        return launch_ranks(own_command(*words), arguments.np, run if is_training else None)
    from dist_train.cluster.elastic_launch import launch_elastic
    from dist_train.cluster.inspection import check_recovery

    check_recovery(partial(_device_type, config))
    return launch_elastic(words, arguments.np, elasticity, run, arguments.listen)


def _device_type(config: Config) -> str:
    from dist_train.cluster.devices import device_type

    return device_type(config.run.device)


def _elasticity(arguments: argparse.Namespace, config: Config) -> Elasticity | None:
    """Return the elasticity of the options, by default that of `config`; None if a lost rank ends the launch."""
    from dist_train.cluster.membership import Elasticity

    settings = config.launch
    min_ranks: int | None = settings.min_ranks if arguments.min_ranks is None else arguments.min_ranks
    max_ranks: int | None = settings.max_ranks if arguments.max_ranks is None else arguments.max_ranks
    restarts: int = settings.restarts if arguments.restarts is None else arguments.restarts
    options = (min_ranks, max_ranks, arguments.start_with, arguments.listen)
    if not restarts and all(option is None for option in options):
        return None
    start_with: int = arguments.np if arguments.start_with is None else arguments.start_with
    min_ranks = start_with if min_ranks is None else min_ranks
    max_ranks = start_with if max_ranks is None else max_ranks
    _check_range("--start-with", start_with, max(1, arguments.np), None)
    _check_range("--min-ranks" if arguments.min_ranks is not None else "launch.min_ranks", min_ranks, 1, start_with)
    _check_range("--max-ranks" if arguments.max_ranks is not None else "launch.max_ranks", max_ranks, start_with, None)
    if arguments.listen is None and max_ranks > arguments.np:
        wrong = f"--max-ranks (launch.max_ranks) or --start-with above -np, {arguments.np}, are ranks of other nodes"
        raise UsageError(f"{wrong}: add --listen", code="elastic-without-listen")
    if config.model.norm == "sync":  # now, and not when the last of them joins, which would end the run
        from dist_train.data.plan import check_shared_micro_batches  # loads torch

        check_shared_micro_batches(config, max_ranks)
    return Elasticity(start_with, min_ranks, max_ranks, restarts, config.comm.timeout)


def _join(arguments: argparse.Namespace) -> int:
    from dist_train.cluster.elastic_launch import entry_of, launch_joining

    others = (arguments.min_ranks, arguments.max_ranks, arguments.start_with, arguments.listen)
    if arguments.command or arguments.restarts or any(option is not None for option in others):
        wrong = "--join can be combined with -np only: the launcher that began the run decides all else"
        raise UsageError(wrong, code="join-options")
    _check_range("-np", arguments.np, 1, None)
    return launch_joining(entry_of(arguments.join), arguments.np)


def _check_range(option: str, value: int, least: int, most: int | None) -> None:
    if value < least or (most is not None and value > most):
        limits = f"{least} or more" if most is None else f"{least} to {most}"
        raise UsageError(f"{option} takes a number of ranks, {limits}, not {value}", code="option-range")


def _address(text: str) -> tuple[str, int]:
    """Return the host and the port (0 if there is none) of HOST[:PORT], [IPV6][:PORT] or IPV6."""
    bracketed = f"[{text}]" if text.count(":") > 1 and not text.startswith("[") else text
    found = re.fullmatch(r"(?:\[([\dA-Fa-f:.]+)\]|([^][:]+))(?::(\d*))?", bracketed)
    host, port = (found[1] or found[2], int(found[3] or 0)) if found else ("", 0)
    if host in ("", "0.0.0.0", "::") or port >= 2**16:  # nosec B104
        forms = "HOST, HOST:PORT or [IPV6]:PORT"
        raise argparse.ArgumentTypeError(f"{text!r} is no address that other nodes can reach: {forms}")
    return host, port


def _add_evaluate(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "evaluate",
        help="print loss and accuracy of a checkpoint",
        description="Print loss and accuracy of a checkpoint, or of a run's last checkpoint, as one line of JSON.",
    )
    parser.add_argument("target", type=Path, metavar="RUN_OR_CHECKPOINT", help=TARGET)
    add_overrides(parser)
    parser.add_argument(
        "--split", choices=("train", "validation", "test"), default="test", help="what to evaluate (default: test)"
    )
    add_weights(parser)
    parser.set_defaults(run=_evaluate)


def _evaluate(arguments: argparse.Namespace) -> int:
    from dist_train.training.evaluation import evaluate_stored

    result = evaluate_stored(arguments.target, arguments.split, arguments.overrides, arguments.weights)
    is_finite = result["loss"] is not None
    if current_launch().rank == 0:
        print(json.dumps(result, allow_nan=False), flush=True)
        if not is_finite:
            place = f"the {arguments.split} loss of {escaped(result['checkpoint'])}"
            say_on_stderr(f"dist-train: {place} is not finite [loss-not-finite]")
    return ExitCode.FINISHED if is_finite else ExitCode.DIVERGED


def _add_outcome(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "outcome",
        help="for scripts: exit with the code of a run's last launch",
        description="Exit with the code that the run's last launch wrote into status.json; if it wrote none, or its id "
        "is not that of --launch, with 2 if --code says that its ranks were refused, else with 1.",
    )
    parser.add_argument("run_directory", type=Path, metavar="RUN", help="a run directory")
    parser.add_argument("--launch", metavar="ID", help="the launch's DIST_TRAIN_LAUNCH")
    parser.add_argument(
        "--record-lost", metavar="WHO", help="once the launch has ended: if it recorded no end, record the loss of WHO"
    )
    parser.add_argument("--code", type=int, metavar="N", help="the launcher's exit status")
    parser.set_defaults(run=_outcome)


def _outcome(arguments: argparse.Namespace) -> int:
    from dist_train.rundir.status import read_status, record_lost

    path = RunDirectory(arguments.run_directory).status
    status = read_status(path)
    if status is None or (arguments.launch is not None and status.launch != arguments.launch):
        if arguments.code == ExitCode.USAGE:  # the ranks were refused before they had a status, and have said why
            return ExitCode.USAGE
        say_on_stderr(f"dist-train: the launch left no status in {escaped(str(arguments.run_directory))}")
        return ExitCode.FAULT
    if status.exit_code is None:
        # An mpirun may kill the other ranks before rank 0 can report the loss of one.
        reason = f"the launch died in state {status.state} at step {status.step}"
        if arguments.record_lost:
            reason = f"{arguments.record_lost}; {reason}"
        say_on_stderr(f"dist-train: {escaped(reason)} [rank-lost]")
        if arguments.record_lost is not None:
            record_lost(path, status.launch, reason)
        return ExitCode.FAULT
    return status.exit_code


def _add_requeue(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "requeue",
        help="for batch scripts: decide whether to start an unfinished run again",
        description="Decide whether to start an unfinished run again, count that in RUN/requeues.json, and report why. "
        "Prints restart (within the job) or requeue, with exit code 0. Otherwise it prints nothing: the run has "
        "finished, would fail again (bad configuration, refused by the launcher, diverged, ranks disagree), or has "
        "used up its requeues without progress: then its status.json says failed, and the reason. The exit code is "
        "then that of the job: 1; 2 if the request can never succeed; 75 if it has saved and stopped, and N is 0.",
    )
    parser.add_argument("run_directory", type=Path, metavar="RUN", help="a run directory")
    parser.add_argument(
        "--limit", type=_limit, default=3, metavar="N", help="requeues in a row without a new checkpoint (default: 3)"
    )
    parser.add_argument(
        "--restarts", type=_limit, default=0, metavar="N", help="restarts within the job before a requeue (default: 0)"
    )
    parser.add_argument("--launch", metavar="ID", help="the last launch's DIST_TRAIN_LAUNCH")
    parser.add_argument("--code", type=int, metavar="N", help="the launcher's exit status")
    parser.add_argument(
        "--messages", default="", metavar="TEXT", help="the last messages of launcher and ranks, one per line"
    )
    parser.set_defaults(run=_requeue)


def _requeue(arguments: argparse.Namespace) -> int:
    from dist_train.sweep.requeues import EndedLaunch, decide

    launch = EndedLaunch(arguments.launch, arguments.code, tuple(filter(None, arguments.messages.splitlines())))
    decision = decide(arguments.run_directory, arguments.limit, launch, arguments.restarts)
    if decision.action == "end":
        say_on_stderr(f"dist-train: not started again: {escaped(decision.why)}")
        # The log may be on the same full disk as the status.
        comment_on_job(decision.why)
        return decision.code
    say_on_stderr(f"dist-train: {decision.action}: {escaped(decision.why)}")
    print(decision.action)
    return ExitCode.FINISHED


COMMANDS = (_add_train, _add_launch, _add_lr_range, _add_evaluate)
FOR_SCRIPTS = (_add_outcome, _add_requeue)
