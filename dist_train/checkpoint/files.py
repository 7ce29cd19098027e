"""Checkpoint files: written whole or not at all, with a digest that is verified before they are read."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import io
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dist_train.cluster.communicator import (
    Communicator,
    SingleProcess,
    broadcast_value,
    gather_int,
    run_on_all_ranks,
    signed_digest,
)
from dist_train.outcome import UsageError
from dist_train.rundir import atomic
from dist_train.rundir.atomic import json_text
from dist_train.rundir.metrics_file import read_records
from dist_train.rundir.paths import RunDirectory, checkpoint_name, in_utf8, refuse_foreign, run_folder
from dist_train.rundir.records import EventRecord
from dist_train.rundir.status import fallback_directory, read_status

FORMAT = 1
OTHER_FALLBACK = "choose another checkpoint.fallback_directory"
WEIGHT_FILES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")
_DAMAGED = ".damaged"
_LOOKS = 5  # for the last checkpoint of a run at work
_NAME = re.compile(r"step-(\d{8,})\.(?:pt|json)")
_TYPES: Mapping[str, type | tuple[type, ...]] = {
    "step": int,
    "epoch": (float, int),
    "model": dict,
    "optimizer": dict,
    "config": dict,
    "metrics": dict,
}
_logger = logging.getLogger("dist_train.checkpoints")

Metrics = Mapping[str, float | int | None]


class DamagedCheckpointError(UsageError):
    """A checkpoint's bytes are not the ones that were written."""


class NoCompleteCheckpointError(UsageError):
    """Every checkpoint of a run is damaged."""


@dataclass(frozen=True)
class CheckpointFile:
    """A checkpoint on disk, as described by the JSON record beside it."""

    path: Path
    step: int
    epoch: float
    sha256: str
    size: int
    metrics: Metrics


@dataclass(frozen=True)
class Contents:
    """The contents of a checkpoint: plain tensors and values."""

    step: int
    epoch: float
    model: Mapping[str, torch.Tensor]
    optimizer: Mapping[str, Any]
    config: Mapping[str, Any]
    metrics: Metrics
    plugins: Mapping[str, str] = field(default_factory=dict)  # digests of the plug-ins' files, by name
    data: str = ""  # identifies the data set (`Splits.identity`); empty if unknown
    normalization: Mapping[str, Sequence[float]] = field(default_factory=dict)  # `mean` and `deviation` of each channel
    class_names: Sequence[str] = ()  # in the order of labels, if the data set has them
    average: Mapping[str, Any] = field(default_factory=dict)  # weights that make the average (`kept`), and `statistics`
    noise: Mapping[str, torch.Tensor] = field(default_factory=dict)  # the state of the noise method, if it has one
    grid_exponents: Sequence[int] | None = None  # per tensor, of `exact32` and `exact16`; of fp16 its scale's

    def to_dict(self) -> dict[str, Any]:
        """Return the dictionary that `torch.load(path, weights_only=True)` returns."""
        plain = {name: dict(value) if isinstance(value, Mapping) else value for name, value in vars(self).items()}
        return {"format": FORMAT, **plain}


def write_checkpoint(directory: Path, contents: Contents, before_publishing: Callable[[], None]) -> CheckpointFile:
    """Write `contents` into `directory`; call `before_publishing` when the bytes are on disk, before they are renamed.

    The record with the digest is written last: a checkpoint without a record is not whole, and is never read. A whole
    checkpoint of the same step, which a rank that takes over from rank 0 may find, holds the same state and is kept.
    Raises OSError if the disk is full, or the folder cannot be written; existing checkpoints are untouched.
    """
    path = directory / checkpoint_name(contents.step)
    record = path.with_suffix(".json")
    if (known := _whole(path)) is not None:
        before_publishing()
        atomic.flush_directory(directory)  # its writer may have ended before it did this
        return known
    buffer = io.BytesIO()
    torch.save(contents.to_dict(), buffer)
    content = buffer.getvalue()  # not a copy; unlike a view, it needs no release if writing fails
    digest = hashlib.sha256(content).hexdigest()
    with atomic.replacing(path) as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
        before_publishing()
        record.unlink(missing_ok=True)
    fields = {"sha256": digest, "bytes": len(content), "step": contents.step, "epoch": contents.epoch}
    fields["metrics"] = dict(contents.metrics)
    try:
        atomic.write_text(record, json_text(fields, indent=2) + "\n")
    except OSError:
        remove_checkpoint(path)
        raise
    return CheckpointFile(path, contents.step, contents.epoch, digest, len(content), contents.metrics)


def _whole(path: Path) -> CheckpointFile | None:
    """Return the checkpoint at `path` if its bytes are those of its record. Raises OSError if it cannot be read."""
    with suppress(DamagedCheckpointError, FileNotFoundError):
        known = read_record(path)
        if atomic.sha256_of(path) == known.sha256:
            return known
    return None


def list_checkpoints(directory: Path) -> list[CheckpointFile]:
    """Return the checkpoints in `directory` with a whole record, earliest first, digests unverified. Raises OSError."""
    files = []
    for path in filter(atomic.exists, _step_files(directory)):
        try:
            files.append(read_record(path))
        except DamagedCheckpointError:
            _logger.debug("%s has no whole record", path)
    return files


def read_record(path: Path) -> CheckpointFile:
    """Read the record beside the checkpoint at `path`. Raises DamagedCheckpointError or OSError.

    A record that exists and cannot be read at the moment, as when a file server does not answer, is not damaged.
    """
    record = path.with_suffix(".json")
    try:
        fields = json.loads(atomic.read_regular(record))
        return CheckpointFile(
            path,
            int(fields["step"]),
            float(fields["epoch"]),
            str(fields["sha256"]),
            int(fields["bytes"]),
            dict(fields["metrics"]),
        )
    except FileNotFoundError as error:
        raise DamagedCheckpointError(
            f"{path} is no checkpoint, or was copied without its record: there is no {record.name} beside it",
            code="checkpoint-record",
        ) from error
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise
        raise DamagedCheckpointError(
            f"{path} is damaged: its record {record.name} cannot be read", code="checkpoint-record"
        ) from error


def find_checkpoint(target: Path) -> Path:
    """Return `target` if it is a file (of a record, its checkpoint), else that of a run: the last one of RUN, or
    RUN@STEP, or RUN@best.

    RUN is a directory, or the name of a run below runs/. Raises UsageError.
    """
    if target.is_file():
        checkpoint = target.with_suffix(".pt")
        return in_utf8(checkpoint if target.suffix == ".json" and checkpoint.is_file() else target)
    if target.suffix in WEIGHT_FILES and not (target.exists() or Path("runs", target).exists()):
        raise UsageError(f"there is no file {target.absolute()}", code="target-missing")
    name, _, which = str(target).rpartition("@")
    if target.is_dir() or not (which.isdecimal() or which == "best"):
        name, which = str(target), ""
    run = RunDirectory(in_utf8(run_folder(Path(name), code="target-missing")))
    if not run.has_begun:
        raise UsageError(f"{run.root} is not a run directory: nothing has been trained there", code="target-missing")
    for _ in range(2):  # the run, which trains meanwhile, may delete what is being listed, for a newer one
        files = list_checkpoints(run.checkpoints)
        if (found := _named(files, which)) is not None:
            return found.path
    if not files:
        status = read_status(run.status)
        has_ended = status is not None and status.exit_code is not None
        fix = "it has ended without one; start it again" if has_ended else "wait for its first"
        fix = f"{fix}, or train with checkpoint.every_epochs above 0"
        if records := run.checkpoint_records(fallback_directory(run)):
            last = records[-1].with_suffix(".pt")
            is_own = last.parent == run.checkpoints
            fix = f"{last} is missing or damaged" if is_own else f"name that of its fallback directory, {last}"
        raise UsageError(f"{run.root} holds no checkpoint: {fix}", code="no-checkpoint")
    wanted = "best checkpoint" if which == "best" else f"checkpoint of step {which}"
    steps = ", ".join(str(file.step) for file in files)
    raise UsageError(f"{run.root} has no {wanted}; it has those of step {steps}", code="checkpoint-missing")


def _named(files: Sequence[CheckpointFile], which: str) -> CheckpointFile | None:
    """Return the checkpoint of a step, the "best" or, for an empty name, the last one; None if it is not in `files`."""
    if not (files and which):
        return files[-1] if files else None
    if which == "best":
        return _published_best(files, files[-1].metrics.get("best_saved_step"))
    return next((file for file in files if file.step == int(which)), None)


def _published_best(files: Sequence[CheckpointFile], step: float | None) -> CheckpointFile | None:
    """Return the checkpoint of the best `step` or, if that could not be written, the best one before it, if kept."""
    if step is None:
        return None
    return next((file for file in reversed(files) if file.step in (step, file.metrics.get("best_saved_step"))), None)


def read_checkpoint(path: Path) -> Contents:
    """Return the verified contents of the checkpoint at `path`.

    Raises DamagedCheckpointError, UsageError or OSError.
    """
    return _read_verified(path).contents


def _read_verified(path: Path) -> Stored:
    if not (atomic.exists(path) and path.is_file()):
        # Records are deleted first, and written last: a copy may have been interrupted, or a large file deleted.
        is_recorded = atomic.exists(path.with_suffix(".json"))
        kind, more = (DamagedCheckpointError, ", only its record") if is_recorded else (UsageError, "")
        raise kind(f"{path}: there is no such checkpoint{more}", code="checkpoint-missing")
    record = read_record(path)
    content = atomic.read_regular(path)
    if len(content) != record.size:
        raise DamagedCheckpointError(
            f"{path} is damaged: {len(content)} bytes instead of {record.size}", code="checkpoint-size"
        )
    if hashlib.sha256(content).hexdigest() != record.sha256:
        raise DamagedCheckpointError(
            f"{path} is damaged: its SHA-256 is not the one in {record.path.stem}.json", code="checkpoint-digest"
        )
    try:
        fields = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:
        # Of nearly any type, with advice that users should not follow. The bytes are those that were written: what is
        # missing is memory, or a torch that knows what they hold.
        raise UsageError(
            f"{path} is not damaged, but torch cannot load it here ({type(error).__name__}): use the torch version "
            f"that saved it, or more memory",
            code="checkpoint-unreadable",
        ) from error
    if not isinstance(fields, dict) or fields.get("format") != FORMAT:
        raise UsageError(f"{path} is not a checkpoint of format {FORMAT}", code="checkpoint-format")
    return Stored(path, record.sha256, _contents(path, fields))


@dataclass(frozen=True)
class Stored:
    """A checkpoint that has been read: its path, the digest of its bytes, and its contents."""

    path: Path
    sha256: str
    contents: Contents

    def record(self) -> dict[str, Any]:
        """Return the fields by which results refer to the checkpoint."""
        return {"path": str(self.path.resolve()), "sha256": self.sha256, "step": self.contents.step}


def read_stored(target: Path) -> Stored:
    """Read the checkpoint that `find_checkpoint` finds for `target`. Raises UsageError or OSError."""
    [stored] = read_same(SingleProcess(), lambda: [find_checkpoint(target)])
    return stored


def read_same(comm: Communicator, choose: Callable[[], Sequence[Path]]) -> Sequence[Stored]:
    """Read on each rank the checkpoints that rank 0 chooses: alone, each could find another last one.

    Called on all ranks. Raises UsageError or OSError on the first rank that fails, PeerFailedError on the others.
    """
    found: Sequence[Stored] | None = None
    for read in (*[_read_unless_gone] * (_LOOKS - 1), _read_all):
        chosen = run_on_all_ranks(comm, lambda: choose() if comm.rank == 0 else (), "find the checkpoint")
        paths = [Path(name) for name in broadcast_value(comm, [*map(str, chosen)], "chosen")]
        found = run_on_all_ranks(comm, partial(read, paths), "read the checkpoint")
        if all(gather_int(comm, found is not None, "checkpoint")):
            break
    assert found is not None, "the last look finds them or raises"
    digests = gather_int(comm, signed_digest("".join(each.sha256 for each in found).encode()), "digest")
    run_on_all_ranks(comm, partial(_check_same, found, digests, comm.rank), "agree with rank 0 on the checkpoint")
    return found


def _read_all(paths: Sequence[Path]) -> Sequence[Stored]:
    return [_read_verified(path) for path in paths]


def _read_unless_gone(paths: Sequence[Path]) -> Sequence[Stored] | None:
    """Return None if a checkpoint is gone: the run, which trains meanwhile, may have deleted it for a newer one."""
    try:
        return _read_all(paths)
    except (UsageError, OSError):  # a file server may have closed what was open
        if all(path.with_suffix(".json").exists() for path in paths):
            raise
        return None


def _check_same(found: Sequence[Stored], digests: Sequence[int], rank: int) -> None:
    if digests[rank] != digests[0]:
        names = ", ".join(str(each.path) for each in found)
        raise UsageError(
            f"{names}: another checkpoint here than on rank 0; give all nodes the same files",
            code="ranks-differ-in-checkpoint",
        )


def _contents(path: Path, fields: Mapping[str, Any]) -> Contents:
    wrong = next((name for name, kind in _TYPES.items() if not isinstance(fields.get(name), kind)), None)
    fault = f"{wrong} is missing or of another type" if wrong else ""
    if not fault and not all(isinstance(tensor, torch.Tensor) for tensor in fields["model"].values()):
        fault = "its model holds more than tensors"
    if fault:
        raise UsageError(f"{path} is not a checkpoint of format {FORMAT}: {fault}", code="checkpoint-format")
    # Older versions wrote fewer fields than there are now, newer ones may write more.
    return Contents(**{each.name: fields[each.name] for each in dataclasses.fields(Contents) if each.name in fields})


def newest_whole(directory: Path, damage: dict[str, str]) -> Contents | None:
    """Return the latest whole checkpoint, if any, and add to `damage` by name what is wrong with later ones.

    Call `set_aside` for these before training.

    Raises:
        NoCompleteCheckpointError: all are damaged or incomplete, now or when the run was started before.
        OSError: a file cannot be read at the moment.
    """
    without_record = 0
    for path in reversed(_step_files(directory)):
        try:
            return read_checkpoint(path)
        except DamagedCheckpointError as error:
            if path.with_suffix(".json").exists():
                damage[path.name] = str(error)
            else:
                without_record += 1
    # A writer that is killed between its two renames leaves one checkpoint that was never published.
    if without_record > 1 or (without_record and has_published(directory)):
        raise NoCompleteCheckpointError(
            f"{directory} holds checkpoints, but not their records: copy step-*.json, too, start a new run in another "
            f"directory (run.name), or delete them to begin again",
            code="no-whole-checkpoint",
        )
    if damage or any(name.endswith(_DAMAGED) for name in _names(directory)):
        raise NoCompleteCheckpointError(
            f"every checkpoint in {directory} is damaged or incomplete: copy a whole one and its record there, start a "
            f"new run in another directory (run.name), or delete all step-* there to begin again",
            code="no-whole-checkpoint",
        )
    return None


def set_aside(directory: Path, names: Iterable[str]) -> None:
    """Rename the damaged checkpoints `names`, the record of each first: none counts as the run's. Raises OSError."""
    for path in (directory / name for name in names):
        for file in filter(atomic.exists, (path.with_suffix(".json"), path)):
            file.rename(f"{file}{_DAMAGED}")


def has_published(directory: Path) -> bool:
    """Whether the run of the folder `directory` has recorded that a checkpoint was written. Raises OSError."""
    metrics = RunDirectory(directory.parent).metrics
    records = read_records(metrics) if atomic.exists(metrics) else ()
    return any(isinstance(record, EventRecord) and record.event == "checkpoint" for record in records)


def prune(directory: Path, *, keep: int, best_step: int | None) -> None:
    """Delete all checkpoints but the last `keep` and that of `best_step`, and older ones that were never published.

    If that of `best_step` could not be written, the best one before it is kept. Raises OSError.
    """
    published = list_checkpoints(directory)
    best = _published_best(published, best_step)
    old = [file.path for file in published[:-keep] if file != best]
    earlier = [path for path in _step_files(directory) if published and _step_of(path) < published[-1].step]
    _remove_each(old + [path for path in earlier if not atomic.exists(path.with_suffix(".json"))])


def remove_others(kept: CheckpointFile) -> None:
    """Delete all checkpoints beside `kept`, also damaged ones of later steps. Raises OSError."""
    others = [path for path in _step_files(kept.path.parent) if path != kept.path]
    _remove_each(path for path in others if _step_of(path) < kept.step or _whole(path) is None)


def _remove_each(paths: Iterable[Path]) -> None:
    """Delete the checkpoints at `paths`; raise the first OSError after all that can be deleted are."""
    first: OSError | None = None
    for path in paths:
        try:
            remove_checkpoint(path)
        except OSError as error:
            first = first or error
    if first is not None:
        raise first


def remove_checkpoint(path: Path) -> None:
    """Delete the checkpoint at `path`: its record first, without which the rest does not count as a checkpoint."""
    path.with_suffix(".json").unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def records_in(fallback: Path) -> Path:
    """Return the file for the records that the disk of the run directory may lack."""
    return fallback / "records.jsonl"


def remove_from_fallback(path: Path) -> None:
    """Delete the checkpoint at `path`, and the records beside it: the run directory has them now."""
    remove_checkpoint(path)
    records_in(path.parent).unlink(missing_ok=True)


def adopt(fallback: Path, directory: Path) -> None:
    """Call `copy_newest`, then delete those of `fallback` that are not newer than a whole one in `directory`."""
    newest = copy_newest(fallback, directory)
    for file in list_checkpoints(fallback):
        if newest is not None and file.step <= newest.step:
            remove_from_fallback(file.path)


def copy_newest(
    fallback: Path, directory: Path, suits: Callable[[Path], bool] = lambda path: True
) -> CheckpointFile | None:
    """Copy the newest whole checkpoint of `fallback` to `directory` if that has none as new, and it `suits`.

    The records beside it are appended to those of the run, from which `rewind` removes duplicates. Returns the newest
    whole one of `directory` then, or None if `fallback` is empty. Raises OSError; UsageError if another user could have
    put them there.
    """
    if not (in_fallback := list_checkpoints(fallback)):
        return None
    refuse_foreign(fallback, OTHER_FALLBACK)
    newest, there = _newest_verified(fallback), _newest_verified(directory)
    if newest != in_fallback[-1]:
        _logger.warning("%s is damaged", in_fallback[-1].path)
    if newest is None or (there is not None and there.step >= newest.step) or not suits(newest.path):
        return there
    if atomic.exists(records := records_in(fallback)):
        own = RunDirectory(directory.parent).metrics
        before = own.read_bytes() if atomic.exists(own) else b""
        atomic.write_bytes(own, before + b"\n" + records.read_bytes(), is_shared=True)
    for source in (newest.path, newest.path.with_suffix(".json")):
        atomic.write_bytes(directory / source.name, source.read_bytes())
    return _whole(directory / newest.path.name)


def _newest_verified(directory: Path) -> CheckpointFile | None:
    return next(filter(None, (_whole(file.path) for file in reversed(list_checkpoints(directory)))), None)


def _step_of(path: Path) -> int:
    return int(path.stem.removeprefix("step-"))


def has_checkpoints(directory: Path) -> bool:
    """Whether there are checkpoints in `directory`, whole or not. Raises OSError."""
    return bool(_step_files(directory))


def _step_files(directory: Path) -> list[Path]:
    """Return the checkpoints in `directory`, whole, without a record, or a record alone, by step. Raises OSError."""
    steps = {found[1] for name in _names(directory) if (found := _NAME.fullmatch(name))}
    return sorted((directory / f"step-{step}.pt" for step in steps), key=_step_of)


def _names(directory: Path) -> list[str]:
    """Return the names in `directory`, if it exists. Raises OSError, for which `Path.glob` may find nothing instead."""
    try:
        return os.listdir(directory)
    except (FileNotFoundError, NotADirectoryError):
        return []
