"""What a launch begins with: nothing, or a checkpoint that it may resume from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from dist_train.config import Config, differences, parse_config
from dist_train.config.continuation import with_decisions
from dist_train.outcome import UsageError
from dist_train.training.checkpoints import Contents, newest_whole, read_checkpoint
from dist_train.training.run_directory import RunDirectory


@dataclass(frozen=True)
class ResumePoint:
    """Settings, with what an earlier launch decided; the checkpoint to resume from; damaged ones and their faults."""

    config: Config
    contents: Contents | None = None
    damage: Mapping[str, str] = field(default_factory=dict)


def find_resume_point(config: Config, directory: RunDirectory) -> ResumePoint:
    """Return where a launch of `config` in `directory` begins.

    Raises:
        UsageError: there is a run that `config` must not, or cannot, resume.
    """
    checkpoints = directory.checkpoints
    if config.run.resume == "never":
        if any(checkpoints.glob("step-*.pt")):
            raise UsageError(
                f"{directory.root} already holds a run: choose another run.name, or resume it by run.resume=auto"
            )
        return ResumePoint(config)
    named = None if config.run.resume == "auto" else Path(config.run.resume)
    damage: dict[str, str] = {}
    contents = None
    if named is None or named.resolve().parent != checkpoints.resolve():
        contents = newest_whole(checkpoints, lambda path, text: damage.update({path.name: text}))
    if contents is None and named is not None:
        # Another run's checkpoint is where this one begins; requeued, it resumes from its own.
        contents = read_checkpoint(named)
    if contents is None:
        return ResumePoint(config, None, damage)
    return ResumePoint(_settled(config, contents), contents, damage)


def _settled(config: Config, contents: Contents) -> Config:
    """Return `config` with what the run that saved `contents` decided when it began."""
    begun = parse_config(dict(contents.config), source="the checkpoint")
    changed = differences(begun, config)
    if changed:
        raise UsageError(
            f"the run that saved step {contents.step} began with other settings; restore them, "
            f"or begin a new run in another directory (run.name):\n"
            + "\n".join(f"  {difference}" for difference in changed)
        )
    return with_decisions(config, begun)
