"""What `train` refuses before its first step: found before a device, a run directory or an image is touched."""

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
    """Check what the settings alone, and the files of secrets that they name, let a run begin with.

    Raises:
        UsageError: a file of secrets is not what it should be, a logger is missing, or a batch has too few samples.
    """
    check_metrics(config)
    check_batches(config)


def check_metrics(config: Config) -> None:
    """Check what metrics are served with. Raises UsageError."""
    if config.metrics.enabled:
        check_access(config.metrics)
    for name in [
        *(["tensorboard"] if config.metrics.tensorboard else []),
        *(each.name for each in config.metrics.loggers),
    ]:
        check_installed(name)


def check_batches(config: Config) -> None:
    """Check that the training samples make up a batch, where the settings say how many there are. Raises UsageError."""
    made_up = config.data.synthetic_samples if config.data.name == "synthetic" else None
    if made_up is not None:
        made_up -= config.data.validation_size or 0
    sizes = [size for size in (made_up, config.data.train_size) if size is not None]
    batches = [size for _, size in config.batch.sizes]
    batches += [config.schedule.base_batch] if config.schedule.keep_updates else []
    if sizes:
        for batch in batches:
            BatchPlan(batch, 1).steps_per_epoch(min(sizes))


def check_data(config: Config) -> None:
    """Check that the data set's files are there, or will be fetched. Raises UsageError."""
    if not (config.data.download and config.data.name.startswith("cifar")):
        find_data(config.data)


def check_initial_weights(config: Config) -> None:
    """Check that what a run that has not begun is to begin from is there. Raises UsageError."""
    if config.run.init_from is not None and not RunDirectory(config.run_directory).checkpoint_steps():
        find_initial(config.run.init_from, config.model.name)


def refusals(config: Config) -> Iterator[UsageError]:
    """Yield every reason for which `train` would not begin with `config` here."""
    for check in (check_metrics, check_batches, check_data, check_initial_weights):
        try:
            check(config)
        except UsageError as error:
            yield error
