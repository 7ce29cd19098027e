"""Where runs enter themselves for Prometheus, from the settings that each left behind."""

from __future__ import annotations

from pathlib import Path

import yaml

from dist_train.study.run_table import read_runs


def targets_directories(directory: Path) -> tuple[Path, ...]:
    """Return the `metrics.targets_directory` of the runs at or below `directory`, each folder once.

    Raises UsageError where `directory` is no folder.
    """
    folders: dict[Path, None] = {}
    for run in read_runs(directory):
        try:
            sections = yaml.safe_load((run.directory / "config.yaml").read_bytes())
            folder = sections["metrics"]["targets_directory"]
        except (OSError, yaml.YAMLError, TypeError, KeyError):
            continue  # the table of runs tells of it
        if isinstance(folder, str):
            folders[Path(folder).expanduser().absolute()] = None
    return tuple(folders)
