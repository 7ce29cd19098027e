"""What a launch refuses before it makes the run directory, and `dist-train config check` before a launch."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from dist_train.checkpoint.files import read_stored
from dist_train.checkpoint.state import find_initial, saved_config
from dist_train.config import Config
from dist_train.data.catalog import find_data
from dist_train.data.plan import BatchPlan, check_validation_size
from dist_train.monitoring.observers import check_installed
from dist_train.monitoring.prometheus.http_server import check_access
from dist_train.outcome import UsageError
from dist_train.rundir.paths import RunDirectory, StudyDirectory, refusing_unusable


def check_launch(config: Config, directory: RunDirectory) -> None:
    """Raise UsageError if a launch in `directory` is refused; an existing run's checkpoint and data are read later."""
    with refusing_unusable(directory.root):
        check_folder(directory)
        root = directory.root
        is_new = not root.exists() or all(path.match("join-*.json") for path in root.iterdir())  # of its launcher
    check_metrics(config)
    check_batches(config)
    if is_new:  # a refused start leaves none
        check_sources(config, directory)
        # many images take long to list, which is done when they are read
        if config.data.name != "imagefolder" or not config.data.folder.is_dir():
            check_data(config)


def refusals(config: Config, directory: Path | None = None) -> Iterator[UsageError]:
    """Yield every reason why `train` would refuse `config` here, in `directory` (default: that of the settings)."""
    run = RunDirectory(directory or config.run_directory)
    for check in (
        partial(check_folder, run),
        partial(check_metrics, config),
        partial(check_batches, config),
        partial(check_sources, config, run),
        partial(check_data, config),
    ):
        try:
            check()
        except UsageError as error:
            yield error
        except PermissionError as error:
            yield UsageError(f"{error.filename} may not be read", code="permission-denied")


def check_folder(directory: RunDirectory) -> None:
    """Check that a new run's folder is not that of a study, and has no file that it would replace.

    Raises UsageError.
    """
    if StudyDirectory(directory.root).runs.exists() and not directory.has_begun:
        raise UsageError(
            f"{directory.root} is the folder of a study: choose another by run.name or --run-dir",
            code="folder-is-study",
        )
    if directory.config.exists() and not directory.has_begun:
        raise UsageError(
            f"{directory.config} is not that of a run, and would be replaced: choose another folder by run.name or "
            f"--run-dir",
            code="folder-foreign-file",
        )


def check_metrics(config: Config) -> None:
    """Check the files of secrets for metrics, and that the loggers are installed. Raises UsageError."""
    if config.metrics.enabled:
        check_access(config.metrics)
    for logger in config.metrics.loggers:
        check_installed(logger.name)


def check_batches(config: Config) -> None:
    """Check that there are samples for every batch, if the settings say how many there are. Raises UsageError."""
    samples = [] if config.data.train_size is None else [config.data.train_size]
    if config.data.name == "synthetic":
        held_out = config.data.validation_size or 0
        check_validation_size(held_out, config.data.synthetic_samples)
        samples.append(config.data.synthetic_samples - held_out)
    batches = [size for _, size in config.batch.sizes]
    if config.schedule.keep_updates:
        batches.append(config.schedule.base_batch)
    if samples:
        for batch in batches:
            BatchPlan(batch, 1).steps_per_epoch(min(samples))


def check_data(config: Config) -> None:
    """Check that the data set's files exist or will be downloaded. Raises UsageError."""
    if not (config.data.download and config.data.data_set.can_download):
        find_data(config.data)


def check_sources(config: Config, directory: RunDirectory) -> None:
    """Check that what a run without checkpoints would begin with exists and fits. Raises UsageError."""
    if directory.checkpoint_steps():
        return
    if config.run.resume not in ("auto", "never"):
        saved_config(read_stored(Path(config.run.resume)).contents, config)
    elif config.run.init_from is not None:
        find_initial(config.run.init_from, config.model.name)
