"""`dist-train config check|show|schema|run-directory|path`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from dist_train.outcome import ExitCode, UsageError


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command's arguments."""
    parser = subparsers.add_parser("config", help="check a configuration, or show it resolved")
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    for name, text, action in (
        ("check", "say what is wrong with it, or that nothing is", _check),
        ("show", "print every setting, resolved", _show),
        ("run-directory", "print where its run lies", _run_directory),
    ):
        command = actions.add_parser(name, help=text, description=text)
        command.add_argument("config", type=Path, metavar="CONFIG", help="a YAML file")
        command.add_argument("overrides", nargs="*", metavar="section.key=value")
        command.add_argument("--run-dir", type=Path, metavar="DIR", help="the run's own directory")
        command.set_defaults(run=action)
    path = actions.add_parser("path", help="print where a file lies that comes with the program")
    path.add_argument("file", type=Path, metavar="FILE", help="such as dist_train:slurm/lb_8192.sh")
    path.set_defaults(run=_path)
    schema = actions.add_parser("schema", help="print the JSON schema of a configuration")
    schema.add_argument("config", nargs="?", type=Path, metavar="CONFIG", help="not needed")
    schema.set_defaults(run=_schema)


def _check(arguments: argparse.Namespace) -> int:
    from dist_train.config import load_config
    from dist_train.config.combinations import unused_settings

    config = load_config(arguments.config, arguments.overrides)
    for sentence in unused_settings(config):
        print(f"dist-train: warning: {sentence}", file=sys.stderr)
    print(f"{arguments.config}: fine")
    return ExitCode.FINISHED


def _show(arguments: argparse.Namespace) -> int:
    from dist_train.config import dump_config, load_config

    print(dump_config(load_config(arguments.config, arguments.overrides)), end="")
    return ExitCode.FINISHED


def _run_directory(arguments: argparse.Namespace) -> int:
    from dist_train.config import load_config

    config = load_config(arguments.config, arguments.overrides)
    print(config.run_directory if arguments.run_dir is None else arguments.run_dir)
    return ExitCode.FINISHED


def _path(arguments: argparse.Namespace) -> int:
    from dist_train.config.loading import located

    path = located(arguments.file).absolute()
    if not path.is_file():
        raise UsageError(f"there is no file at {path}")
    print(path)
    return ExitCode.FINISHED


def _schema(arguments: argparse.Namespace) -> int:
    from dist_train.config import Config

    print(json.dumps(Config.model_json_schema(), indent=2))
    return ExitCode.FINISHED
