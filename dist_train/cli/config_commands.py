"""`dist-train config` and `doctor`: commands that check a configuration, and this machine."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from dist_train.cli.common import Subparsers, add_config, add_overrides, named_config, warn_of_unused
from dist_train.cluster.launch import engine_of
from dist_train.config import Config, dump_config, load_config
from dist_train.config.loading import located
from dist_train.outcome import ExitCode, UsageError, printable, text_with_code
from dist_train.rundir.paths import in_utf8


def _add_config_command(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser("config", help="check a configuration, or show it resolved")
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    for name, text, action in (
        ("check", "list the problems of a configuration, if any", _check),
        ("show", "print every setting of a configuration, resolved", _show),
        ("run-directory", "print the directory of a configuration's run", _run_directory),
        ("engine", "print the communication library of a run's ranks under srun: horovod or torch", _engine),
    ):
        command = actions.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        add_config(command)
        command.set_defaults(run=action)
    path = actions.add_parser(
        "path",
        help="print the path of a file that comes with the program",
        description="Print the path of a configuration, study, launch or batch script of the installed package.",
    )
    path.add_argument("file", type=Path, metavar="FILE", help="such as dist_train:slurm/lb_8192.sh")
    path.set_defaults(run=_path)
    schema = actions.add_parser(
        "schema",
        help="print the JSON schema of a configuration",
        description="Print the JSON schema of a configuration, for editors: every key, its default, its meaning.",
    )
    schema.add_argument("config", nargs="?", type=Path, metavar="CONFIG", help="ignored: all have one schema")
    schema.set_defaults(run=_schema)


def _check(arguments: argparse.Namespace) -> int:
    config = named_config(arguments)
    warn_of_unused(config)

    from dist_train.launching.preflight import refusals

    refused = list(refusals(config, arguments.run_dir))
    for error in refused:
        print(printable(f"dist-train: {arguments.config}: {text_with_code(error)}"), file=sys.stderr)
    if refused:
        return ExitCode.USAGE
    print(f"{arguments.config}: fine")
    return ExitCode.FINISHED


def _show(arguments: argparse.Namespace) -> int:
    print(dump_config(named_config(arguments)), end="")
    return ExitCode.FINISHED


def _run_directory(arguments: argparse.Namespace) -> int:
    config = named_config(arguments)
    print(in_utf8(config.run_directory if arguments.run_dir is None else arguments.run_dir))
    return ExitCode.FINISHED


def _engine(arguments: argparse.Namespace) -> int:
    print(engine_of("srun", named_config(arguments).comm.engine))
    return ExitCode.FINISHED


def _path(arguments: argparse.Namespace) -> int:
    path = located(arguments.file).absolute()
    if not path.is_file():
        raise UsageError(f"there is no file at {path}", code="file-missing")
    print(path)
    return ExitCode.FINISHED


def _schema(arguments: argparse.Namespace) -> int:
    schema = Config.model_json_schema()
    file_keys = {
        "base": {"type": "string", "description": "Another file, whose settings this one starts from."},
        "plugins": {"type": "array", "items": {"type": "string"}, "description": "Files that register names."},
    }
    print(json.dumps({**schema, "properties": {**file_keys, **schema["properties"]}}, indent=2))
    return ExitCode.FINISHED


def _add_doctor(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "doctor",
        help="report what this machine has and lacks for training",
        description="Report what this machine has and lacks for training, and how to fix what it lacks. "
        "Exit code: 0 if training can run here, else 1.",
    )
    parser.add_argument(
        "config", nargs="?", type=Path, metavar="CONFIG", help="also check what this configuration needs"
    )
    add_overrides(parser, "settings to override")
    parser.add_argument("--json", action="store_true", help="one JSON document instead of the table")
    parser.add_argument(
        "--cluster",
        nargs="?",
        type=Path,
        const=Path(),
        metavar="DIR",
        help="instead, within a Slurm allocation, check whether its nodes can work together: network, names, clocks, "
        "versions, GPUs, and DIR (default: the current folder), which they must share",
    )
    parser.add_argument("--brief", action="store_true", help="with --cluster: faults, and lines for batch scripts")
    parser.add_argument("--node", type=Path, metavar="DIR", help=argparse.SUPPRESS)
    parser.set_defaults(run=_doctor)


def _survey_for_scripts(directory: Path) -> int:
    """Print faults, the usable nodes, and the interface to use. Does not load torch, since a job waits for it."""
    from dist_train.cluster.nodes import survey_nodes

    survey = survey_nodes(directory)
    # The batch script reports the first line as the reason.
    for fault in sorted(survey.faults, key=lambda fault: not fault.is_fatal):
        print(printable(f"dist-train: {', '.join(fault.nodes)}: {fault.text}: {fault.fix}"), file=sys.stderr)
    print(f"nodes {' '.join(survey.good)}\ninterface {survey.interface}")
    return ExitCode.FINISHED


def _doctor(arguments: argparse.Namespace) -> int:
    if arguments.node is not None:
        from dist_train.cluster.nodes import as_line, notice_survey_end, report_node

        print(as_line(report_node(arguments.node, notice_survey_end())))
        return ExitCode.FINISHED
    if arguments.brief and arguments.cluster is None:
        raise UsageError("--brief shortens the report of --cluster: add that", code="option-alone")
    if arguments.brief:
        return _survey_for_scripts(arguments.cluster)

    from rich.console import Console

    from dist_train.cluster.nodes import survey_nodes
    from dist_train.launching import doctor

    if arguments.cluster is not None:
        checks = doctor.check_nodes(survey_nodes(arguments.cluster))
    else:
        has_config = arguments.config is not None
        config = load_config(arguments.config, arguments.overrides) if has_config else Config()
        checks = doctor.examine(config, data_named=has_config)
    if arguments.json:
        print(doctor.as_json(checks))
    else:
        doctor.render(checks, Console(highlight=False, soft_wrap=False))
    return ExitCode.FINISHED if doctor.can_train(checks) else ExitCode.FAULT


COMMANDS = (_add_doctor, _add_config_command)
