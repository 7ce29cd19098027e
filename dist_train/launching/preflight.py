"""Before a launch makes its run directory: what it refuses, and the checkpoint or weights from which it starts.

`dist-train config check` shows what would be refused.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from dist_train.checkpoint.files import (
    Contents,
    NoCompleteCheckpointError,
    adopt,
    copy_newest,
    find_checkpoint,
    has_checkpoints,
    newest_whole,
    read_checkpoint,
    read_stored,
)
from dist_train.checkpoint.state import InitialWeights, find_initial, read_initial
from dist_train.config import Config, differences, parse_config
from dist_train.config.plugins import with_places_of
from dist_train.config.resuming import SAVED, with_decisions
from dist_train.data.catalog import find_data
from dist_train.data.plan import BatchPlan, check_validation_size
from dist_train.monitoring.observers import check_installed
from dist_train.monitoring.prometheus.http_server import check_access
from dist_train.outcome import UsageError
from dist_train.rundir.paths import RunDirectory, StudyDirectory, checkpoint_name, refusing_unusable
from dist_train.rundir.status import fallback_directory

_NOT_THERE = ("checkpoint-missing", "no-checkpoint", "target-missing")
_logger = logging.getLogger("dist_train.training")


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
    yield from refusals_besides_data(config, directory)
    yield from _raised(partial(check_data, config))


def refusals_besides_data(config: Config, directory: Path | None = None) -> Iterator[UsageError]:
    """Yield the `refusals` for which the data set's files need not be looked for."""
    run = RunDirectory(directory or config.run_directory)
    yield from _raised(partial(check_folder, run))
    yield from _raised(partial(check_metrics, config))
    yield from _raised(partial(check_batches, config))
    yield from _raised(partial(check_sources, config, run))


def _raised(check: Callable[[], None]) -> Iterator[UsageError]:
    try:
        check()
    except UsageError as error:
        yield error
    except PermissionError as error:
        yield UsageError(f"{error.filename} may not be read", code="permission-denied")


def check_folder(directory: RunDirectory) -> None:
    """Check that a new run's folder is no study's, and has no file that it would replace. Raises UsageError."""
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


@dataclass(frozen=True)
class ResumePoint:
    """Where a launch starts."""

    config: Config  # with the decisions of earlier launches
    contents: Contents | None = None  # the checkpoint to resume from
    damage: Mapping[str, str] = field(default_factory=dict)  # what is wrong with damaged checkpoints, by file name
    epochs_before: int | None = None  # if the run is lengthened: those that its schedules spanned so far
    initial: InitialWeights | None = None  # of a new run, if its weights do not come from the seed
    gone: Path | None = None  # what `run.resume` names, if it is not there or cannot be read, and not needed
    source: Path | None = None  # the other run's checkpoint with which a new run begins
    former_records: Path | None = None  # those of the run so far, if it has no whole checkpoint any more


def find_resume_point(config: Config, directory: RunDirectory) -> ResumePoint:
    """Return where a launch of `config` in `directory` starts. Raises UsageError."""
    checkpoints, other_disk = directory.checkpoints, config.checkpoint.fallback_directory
    if config.run.resume == "never":
        folders = [checkpoints] if other_disk is None else [checkpoints, directory.fallback(other_disk)]
        if any(map(has_checkpoints, folders)):
            raise UsageError(
                f"{directory.root} already holds a run: choose another run.name, or resume it with run.resume=auto",
                code="run-exists",
            )
        return ResumePoint(config, initial=_initial_weights(config))
    _adopt_from_fallbacks(config, directory)
    named = None if config.run.resume == "auto" else Path(config.run.resume)
    contents, source, gone, damage = None, None, None, dict[str, str]()
    if named is not None:
        try:
            named = named if named.is_dir() else find_checkpoint(named)
        except (UsageError, OSError) as error:  # it is needed only if the run has no checkpoint of its own
            gone = named if getattr(error, "code", "target-missing") in _NOT_THERE else None
    try:
        contents = newest_whole(checkpoints, damage)
    except NoCompleteCheckpointError:
        if named is None:
            raise
    is_own = named is not None and gone is None and named.resolve().parent == checkpoints.resolve()
    last = () if contents is None else (checkpoint_name(contents.step), *damage)
    if contents is not None and named is not None and is_own and named.name not in last:
        # The later ones, and their records, would be lost, or undo this one at the next start.
        raise UsageError(
            f"run.resume names {named}, but the run's last checkpoint is that of step {contents.step}: start a new run "
            f"from it (another run.name), or move the later ones away and leave run.resume out",
            code="checkpoint-not-last",
        )
    if contents is None and named is not None:
        # The run starts from another run's checkpoint; once it has its own, it resumes from that, as when requeued.
        stored = read_stored(named)
        contents, source = stored.contents, stored.path
        no_best = {"best_saved_step": None, "best_saved_accuracy": None}  # that run's is not in this one's folder
        contents = replace(contents, metrics={**contents.metrics, **no_best})
    if contents is None:
        return ResumePoint(config, None, damage, initial=_initial_weights(config))
    saved = saved_config(contents, config)
    epochs_before = saved.run.epochs if config.run.epochs > saved.run.epochs else None
    return ResumePoint(with_decisions(config, saved), contents, damage, epochs_before, gone=gone, source=source)


def _adopt_from_fallbacks(config: Config, directory: RunDirectory) -> None:
    """Copy the newest checkpoint to `directory` from the fallback directory: that of `config`, or of the last launch.

    Raises UsageError or OSError if the former cannot be searched; of the latter, which may be gone for good, it warns.
    """
    now, before = config.checkpoint.fallback_directory, fallback_directory(directory)
    for other_disk in dict.fromkeys(filter(None, (now, before))):
        own = directory.fallback(other_disk)
        try:
            adopt(own, directory.checkpoints)
            for former in directory.fallbacks(other_disk):  # or of a copy that may have gone another way since
                if former != own:
                    copy_newest(former, directory.checkpoints, partial(_may_continue, config))
        except (OSError, UsageError) as error:
            if other_disk == now:
                raise
            _logger.warning("later checkpoints in %s, the fallback directory until now, are not used: %s", own, error)


def _may_continue(config: Config, path: Path) -> bool:
    with suppress(UsageError):
        return bool(saved_config(read_checkpoint(path), config))
    return False


def _initial_weights(config: Config) -> InitialWeights | None:
    return None if config.run.init_from is None else read_initial(config.run.init_from, config.model.name)


def saved_config(contents: Contents, config: Config) -> Config:
    """Return the settings in a checkpoint. Raises UsageError if a run with settings `config` may not resume from it."""
    given = config.model_dump(mode="json")
    # Loggers may change, and code may have moved: what is no longer there must not be imported.
    settings = dict(contents.config)
    if isinstance(settings.get("metrics"), Mapping):
        settings["metrics"] = given["metrics"]
    saved = parse_config(with_places_of(settings, given, Config), source=SAVED)
    is_longer = config.run.epochs > saved.run.epochs
    changed = [each for each in differences(saved, config) if not (is_longer and each.path == "run.epochs")]
    if changed:
        raise UsageError(
            f"the run that saved step {contents.step} began with other settings; restore them, "
            f"or start a new run (another run.name), from these weights by run.init_from:\n"
            + "\n".join(f"  {difference}" for difference in changed),
            code="settings-changed",
        )
    return saved
