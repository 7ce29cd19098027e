"""What `train` refuses before its first step, checked before it touches a device, a run directory or an image."""

from __future__ import annotations

from collections.abc import Iterator

from dist_train.checkpoint.state import find_initial
from dist_train.config import Config
from dist_train.data.catalog import find_data
from dist_train.data.plan import BatchPlan
from dist_train.monitoring.observers import check_installed
from dist_train.monitoring.prometheus.http_server import check_access
from dist_train.outcome import UsageError
from dist_train.rundir.paths import RunDirectory


def check_settings(config: Config) -> None:
    """Raise UsageError if a file of secrets is unusable, a logger is missing, or there are too few samples."""
    check_metrics(config)
    check_batches(config)


def check_metrics(config: Config) -> None:
    """Check the files of secrets for metrics, and that the loggers are installed. Raises UsageError."""
    if config.metrics.enabled:
        check_access(config.metrics)
    if config.metrics.tensorboard:
        check_installed("tensorboard")
    for logger in config.metrics.loggers:
        check_installed(logger.name)


def check_batches(config: Config) -> None:
    """Check that there are samples for every batch, if the settings say how many there are. Raises UsageError."""
    samples = [] if config.data.train_size is None else [config.data.train_size]
    if config.data.name == "synthetic":
        samples.append(config.data.synthetic_samples - (config.data.validation_size or 0))
    batches = [size for _, size in config.batch.sizes]
    if config.schedule.keep_updates:
        batches.append(config.schedule.base_batch)
    if samples:
        for batch in batches:
            BatchPlan(batch, 1).steps_per_epoch(min(samples))


def check_data(config: Config) -> None:
    """Check that the data set's files exist or will be downloaded. Raises UsageError."""
    if not (config.data.download and config.data.name.startswith("cifar")):
        find_data(config.data)


def check_initial_weights(config: Config) -> None:
    """Check that the initial weights of a run that has not begun exist. Raises UsageError."""
    if config.run.init_from is not None and not RunDirectory(config.run_directory).checkpoint_steps():
        find_initial(config.run.init_from, config.model.name)


def refusals(config: Config) -> Iterator[UsageError]:
    """Yield every reason why `train` would refuse `config` here."""
    for check in (check_metrics, check_batches, check_data, check_initial_weights):
        try:
            check(config)
        except UsageError as error:
            yield error
