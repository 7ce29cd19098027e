"""For notebooks and scripts: the settings, records and model of a run; exports, range tests and replays of updates."""

from __future__ import annotations

import importlib.util
import io
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dist_train.checkpoint.files import find_checkpoint, list_checkpoints, read_checkpoint, read_stored
from dist_train.checkpoint.state import Weights
from dist_train.cluster.launch import current_launch
from dist_train.config import Config, ScheduleSettings, load_config, parse_config
from dist_train.config.loading import with_overrides
from dist_train.config.plugins import is_plugin
from dist_train.config.resuming import with_setting
from dist_train.data.augmentation import ChannelStatistics
from dist_train.data.images import Split
from dist_train.data.loader import Splits, open_splits
from dist_train.data.plan import BatchPlan
from dist_train.launching.run import train
from dist_train.outcome import CodedError, DivergedError, ExitCode, UsageError, check_choice, writing
from dist_train.report.drawing import RangeTest, draw_learning_curve, read_range_test, write_range_test
from dist_train.rundir.paths import RunDirectory, in_utf8, run_folder
from dist_train.rundir.records import EvaluationRecord, EventRecord, Record, TrainRecord, read_records
from dist_train.rundir.status import Status, load_status, record_end
from dist_train.training.evaluation import evaluate_stored, stored_config, stored_model

Format = Literal["safetensors", "torch-export", "onnx"]


@dataclass(frozen=True)
class Run:
    """A run, read from its directory on demand; `load_run` returns it.

    Examples:
        >>> run = dist_train.load_run("runs/demo")
        >>> rows = run.metrics()  # a DataFrame if pandas is installed
        >>> images = torch.rand(5, *run.config.data.image_format.shape)  # [n, C, H, W]
        >>> run.model()(images).shape  # logits [n, classes]
        torch.Size([5, 10])
    """

    directory: RunDirectory

    @property
    def config(self) -> Config:
        """Every setting of the run. Raises ConfigError if they cannot be read."""
        return load_config(self.directory.config)

    @property
    def status(self) -> Status:
        """The state of the run, or how it ended. Raises BrokenFileError if it cannot be read."""
        return load_status(self.directory.status)

    @property
    def records(self) -> tuple[Record, ...]:
        """The records in order: updates, evaluations, events. Raises OSError if there are none."""
        return read_records(self.directory.metrics)

    @property
    def steps(self) -> tuple[int, ...]:
        """The steps of the checkpoints, in order."""
        return tuple(file.step for file in list_checkpoints(self.directory.checkpoints))

    def metrics(self) -> Any:
        """Return the records of updates and evaluations: a DataFrame with pandas installed, else a list of mappings."""
        kinds = {TrainRecord: "train", EvaluationRecord: "eval"}
        rows = [{"kind": kinds[type(each)], **asdict(each)} for each in self.records if type(each) in kinds]
        if importlib.util.find_spec("pandas") is None:
            return rows
        import pandas

        return pandas.DataFrame(rows)

    def model(self, step: int | Literal["best"] | None = None, weights: Weights = "raw") -> nn.Module:
        """Return the network of the checkpoint at `step` (default: the last one), in evaluation mode on the CPU.

        "best" is the checkpoint that `checkpoint.keep_best` keeps.

        It has the clean weights or, with `weights="averaged"`, the run's average of them. It takes images [n, C, H, W]
        as the run's data set gives them, and returns logits [n, classes].

        Raises:
            UsageError: there is no such checkpoint, it is damaged, or it holds no average.
        """
        contents = read_checkpoint(self.checkpoint(step))
        return stored_model(contents, stored_config(contents, ()), weights).eval()

    def checkpoint(self, step: int | Literal["best"] | None = None) -> Path:
        """Return the checkpoint at `step` (default: the last one), or the "best". Raises UsageError without one."""
        root = self.directory.root
        return find_checkpoint(root if step is None else Path(f"{root}@{step}"))

    def evaluate(
        self, split: Split = "test", overrides: Sequence[str] = (), weights: Weights = "raw"
    ) -> dict[str, object]:
        """Return step, loss and accuracy of the last checkpoint on the whole of `split`. Raises UsageError.

        Every rank of a launch calls it, and gets the same result.
        """
        return evaluate_stored(self.directory.root, split, overrides, weights)

    def normalization(self) -> ChannelStatistics | None:
        """Return the `mean` and `deviation` of each channel by which `data.normalize` normalizes inputs; None without.

        They are computed again from the run's training images. Raises UsageError if these are missing.
        """
        return _splits(self.config).normalization

    def learning_curve(self, output: Path | str | None = None) -> Path:
        """Draw loss and accuracy against epoch into `output` (.png, .svg or .pdf), and return its path."""
        output = Path(output or self.directory.learning_curve)
        draw_learning_curve([self.directory.root], output)
        return output


def load_run(path: Path | str) -> Run:
    """Return the run in the directory `path`, or in runs/`path`.

    Examples:
        >>> run = dist_train.load_run("runs/demo")
        >>> run.status.state, run.steps
        ('finished', (32,))

    Raises:
        UsageError: there is none, or its name is not UTF-8.
    """
    directory = RunDirectory(in_utf8(run_folder(Path(path), code="target-missing")))
    if not directory.config.is_file():
        raise UsageError(f"{path}: there is no such run", code="target-missing")
    return Run(directory)


def evaluate(
    target: Path | str, split: Split = "test", overrides: Sequence[str] = (), weights: Weights = "raw"
) -> dict[str, object]:
    """Return step, loss and accuracy of a checkpoint on the whole of `split`.

    `target` is a checkpoint's file, or a run: its last checkpoint, or with RUN@STEP or RUN@best another one.

    Every rank of a launch calls it, and gets the same result: called on rank 0 alone, it would wait for the others.

    Examples:
        >>> found = dist_train.evaluate("runs/demo", "test")
        >>> found["step"], 0 <= found["accuracy"] <= 1
        (32, True)

    Raises:
        UsageError: there is no such checkpoint, or an override would change the model or its data.
    """
    return evaluate_stored(Path(target), split, overrides, weights)


@dataclass(frozen=True)
class Export:
    """A model written to `path`; `difference`: the largest between logits of the loaded file and of the model."""

    path: Path
    step: int
    difference: float


def export(target: Path | str, to: Format, output: Path | str | None = None, weights: Weights = "raw") -> Export:
    """Write the model of a checkpoint with clean or averaged weights and norm statistics; `target` as in `evaluate`.

    safetensors: the tensors by name. torch-export and onnx: also the network, for any number of images. The file is
    loaded back and compared with the model on four random images or, if your model takes none such, test images.

    Examples:
        >>> written = dist_train.export("runs/demo", "safetensors", "demo.safetensors")
        >>> written.step, written.difference
        (32, 0.0)

    Raises:
        UsageError: there is no such checkpoint, the library that writes `to` is not installed, it cannot represent your
            model, or `output` cannot be written, or is named as another format.
    """
    check_choice("to", to, Format)
    stored = read_stored(Path(target))
    contents = stored.contents
    config = stored_config(contents, ())
    model = stored_model(contents, config, weights).eval()
    suffix, write = _FORMATS[to]
    # not run.name, which all runs with --run-dir may share
    name = RunDirectory.of_checkpoint(stored.path.resolve()).root.name
    which = "-averaged" if weights == "averaged" else ""
    output = in_utf8(Path(output or f"{name}-{contents.step:08d}{which}{suffix}"))
    named = next((other for other, (ending, _) in _FORMATS.items() if ending == output.suffix), to)
    if named != to:
        raise UsageError(f"{output} is named as {named}: name it *{suffix}, or choose --to {named}", code="output-form")
    images = _compared_images(model, config)
    try:
        with torch.no_grad(), _replacing(output) as part:
            expected = model(images)  # first, since safetensors loads the file into `model`
            loaded = write(model, images, part)
            difference = float((loaded(images) - expected).abs().max())
    except ImportError as error:
        raise UsageError(
            f"{to} needs {error.name}, which is not installed: pip install 'dist_train[onnx]'", code="export-missing"
        ) from error
    except Exception as error:  # of torch's exporters, of nearly any type
        if isinstance(error, CodedError) or not is_plugin(config.model.name):
            raise
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise UsageError(f"{to} cannot represent {config.model.name}: {reason}", code="plugin-failed") from error
    return Export(output, contents.step, difference)


def _compared_images(model: nn.Module, config: Config) -> Tensor:
    """Return four random images or, if a plug-in's `model` fails on them, four test images. Raises UsageError."""
    images = torch.rand(4, *config.data.image_format.shape, generator=torch.Generator().manual_seed(0))
    if not is_plugin(config.model.name):
        return images
    try:
        with torch.no_grad():
            model(images)
    except Exception as failed:  # of any type: it may take the pixels for tokens
        try:
            test = _splits(config).test
            return next(test.read_all([torch.arange(min(4, len(test)))]))[0]
        except UsageError as error:
            reason = f"{type(failed).__name__}: {' '.join(str(failed).split())}"
            raise UsageError(
                f"{config.model.name} fails on four random images ({reason}), and test images are missing: {error}",
                code="plugin-failed",
            ) from failed
    return images


def _splits(config: Config) -> Splits:
    """Return the splits on the CPU, read without loader processes, so that there is nothing to close."""
    settings = config.data.model_copy(update={"loader_workers": 0})
    return open_splits(settings, config.run.seed, torch.device("cpu"))


@contextmanager
def _replacing(output: Path) -> Iterator[Path]:
    """Yield a path in a new folder to write to, then move the file to `output`, or where that links. Raises UsageError.

    A device or a pipe is refused: the file would replace it.
    """
    fix = "choose another file with -o FILE"
    with writing(output, fix):
        if output.exists() and not output.is_file() and not output.is_dir():
            raise UsageError(f"cannot write {output} (it is not a regular file): {fix}", code="output-unwritable")
        target = Path(os.path.realpath(output))
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as folder:
            yield Path(folder, output.name)
            os.replace(Path(folder, output.name), target)


_Loaded = Callable[[Tensor], Tensor]


def _safetensors(model: nn.Module, images: Tensor, output: Path) -> _Loaded:
    from safetensors.torch import load_file, save

    # copies: safetensors refuses tied parameters, which share memory
    copies = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in model.state_dict().items()}
    output.write_bytes(save(copies))  # its `save_file` raises no OSError if the disk is full
    model.load_state_dict(load_file(output))
    return model


def _torch_export(model: nn.Module, images: Tensor, output: Path) -> _Loaded:
    program = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim("images", min=1)},))
    content = io.BytesIO()  # given a path, torch raises no OSError if the disk is full
    torch.export.save(program, content)
    output.write_bytes(content.getvalue())
    return torch.export.load(output).module()


def _onnx(model: nn.Module, images: Tensor, output: Path) -> _Loaded:
    import onnxruntime

    sizes = ({0: torch.export.Dim("images", min=1)},)
    # in one file: only networks of more than 2 GB need a second one
    options: dict[str, Any] = {"dynamo": True, "external_data": False, "verbose": False}
    torch.onnx.export(model, (images,), output, dynamic_shapes=sizes, input_names=["images"], **options)
    session = onnxruntime.InferenceSession(output)
    return lambda given: torch.from_numpy(session.run(None, {"images": given.numpy()})[0])


_FORMATS: Mapping[Format, tuple[str, Callable[[nn.Module, Tensor, Path], _Loaded]]] = {
    "safetensors": (".safetensors", _safetensors),
    "torch-export": (".pt2", _torch_export),
    "onnx": (".onnx", _onnx),
}


_ONLY_RECORDS: Mapping[str, object] = {
    "early_stopping.patience": None,
    "checkpoint": {"every_epochs": 0, "every_steps": None, "fallback_directory": None},
    "evaluation": {"every_epochs": 0, "train_samples": 0},
    "metrics": {"enabled": False, "loggers": []},
}
"""Overrides of a run of which only the training records are needed."""


def learning_rate_range(config: Config, low: float, high: float, updates: int, run_directory: Path | str) -> RangeTest:
    """Train as `config` says with a rate that rises exponentially from `low` to `high` over `updates` updates.

    Every rank of a launch calls it. The result ends before the first loss that is not finite; it is also written into
    `run_directory`, as lr_range.csv, .json and .png.

    Raises:
        UsageError: the rates do not rise, or `train` refuses the settings.
    """
    low, high, updates = float(low), float(high), int(updates)  # NumPy's have another text
    if not (0 < low < high and high / low < math.inf) or updates < 2:
        raise UsageError(
            f"the rate must rise, from above 0, in 2 updates or more: not from {low:g} to {high:g} in {updates}",
            code="option-range",
        )
    splits = _splits(with_setting(config, "data.normalize", False))
    steps_per_epoch = BatchPlan(config.batch.global_size, 1).steps_per_epoch(len(splits.train))
    epochs = -(-updates // steps_per_epoch)
    # The schedule rises on to the end of the last epoch, where the rate must still be a number.
    least = 2 + math.floor(math.log(high / low, sys.float_info.max) * epochs * steps_per_epoch)
    if updates < least:
        raise UsageError(
            f"{updates} updates are too few where an epoch has {steps_per_epoch}: set --updates to {least} or more",
            code="option-range",
        )
    ratio = (high / low) ** (epochs * steps_per_epoch / (updates - 1))
    overrides: dict[str, object] = {
        **_ONLY_RECORDS,
        "run.epochs": epochs,
        "run.max_steps": updates,
        "run.resume": "auto",  # not from a checkpoint that the configuration names
        "optimizer.learning_rate": low,
        "schedule": ScheduleSettings(decay="exponential", final_fraction=ratio).model_dump(mode="json"),
        "averaging.kind": "none",
        "batch.schedule": [],
        "metrics.every_steps": 1,
    }
    tested = parse_config(with_overrides(config.model_dump(mode="json"), overrides), source="the range test")
    directory = RunDirectory(Path(run_directory))
    try:
        train(tested, directory.root)
    except DivergedError:  # the result is what was measured before
        if current_launch().rank == 0:
            record_end(directory.status, "finished", ExitCode.FINISHED, "the loss was no longer finite")
    except UsageError as error:
        if error.code != "settings-changed":
            raise
        raise UsageError(
            f"{directory.root} holds a range test with other settings, or other --from, --to or --updates: choose "
            f"another folder with --run-dir DIR",
            code="settings-changed",
        ) from error
    test = read_range_test(directory)
    if current_launch().rank == 0:
        write_range_test(test, directory)
    return test


_COMPARED = ("loss", "accuracy", "learning_rate", "noise_amplitude", "gradient_norm")


@dataclass(frozen=True)
class Replay:
    """A replayed update: the values that the run recorded of it, and those of the replay, by name.

    `weights_agree`: whether the weights after it equal those of the run's checkpoint; None if there is no such one.
    """

    step: int
    begun_at: int
    recorded: Mapping[str, float]
    replayed: Mapping[str, float]
    weights_agree: bool | None

    @property
    def agrees(self) -> bool:
        """Whether everything is bit-identical."""
        return self.recorded == self.replayed and self.weights_agree is not False


def replay(path: Path | str, step: int) -> Replay:
    """Repeat update `step` of a run, from the checkpoint before it or from the beginning; the run is only read.

    Every rank of a launch calls it, on any number of ranks. Only rank 0 compares: on the others `recorded` and
    `replayed` are empty.

    Examples:
        >>> again = dist_train.replay("runs/demo", 20)
        >>> again.begun_at, again.agrees
        (0, True)

    Raises:
        UsageError: the run has not recorded that update, or no longer has a checkpoint from which to repeat it.
    """
    run = load_run(path)
    recorded = _update(run, step)
    every = run.config.metrics.every_steps
    before = [each for each in run.steps if each <= step - every]
    begun_at = before[-1] if before else 0
    start = run.directory.checkpoint(begun_at) if before else None
    _check_replayable(run, step, begun_at)
    # Read before the overrides, so that a setting's former name does not survive them.
    begun = parse_config(dict(read_checkpoint(start).config), source="the checkpoint") if start else run.config
    settings = begun.model_dump(mode="json")
    overrides = {
        **_ONLY_RECORDS,
        "run.max_steps": step,
        "run.resume": str(start.absolute()) if start else "never",
        "run.profile_steps": 0,
        "run.epochs": _epochs_at(run, step),
    }
    config = parse_config(with_overrides(settings, overrides), source="the run")
    launch = current_launch()
    # The same folder on all ranks; a single process has its own.
    own = f"-{os.getpid()}" if launch.size == 1 else ""
    place = Path(tempfile.gettempdir()) / f"dist_train-replay-{run.directory.run_id()}-{step}{own}"
    is_ours = launch.rank == 0
    try:
        try:
            train(config, place)
        except DivergedError as error:
            # Otherwise the update is recorded: only the evaluation at the end is not finite.
            if error.code == "step-not-finite":
                raise
        if not is_ours:  # rank 0 may have removed the folder already, or another node has it
            return Replay(step, begun_at, {}, {}, None)
        again = load_run(place)
        replayed = _update(again, step)
        weights_agree = None
        if step in run.steps and step in again.steps:
            weights_agree = _same_weights(run.checkpoint(step), again.checkpoint(step))
    except UsageError as error:
        is_ours = is_ours and error.code != "run-in-use"  # another launch replays the same update
        raise
    finally:
        if is_ours:
            shutil.rmtree(place, ignore_errors=True)
    return Replay(step, begun_at, recorded, replayed, weights_agree)


def _lengthened(run: Run) -> list[EventRecord]:
    return [each for each in run.records if isinstance(each, EventRecord) and each.event == "lengthened"]


def _epochs_at(run: Run, step: int) -> Any:
    """Return the epochs that the schedules spanned at update `step`: the run may have been lengthened since."""
    later = (each.details["before"] for each in _lengthened(run) if each.step >= step)
    return next(later, run.config.run.epochs)


_BEFORE_START = ("corrupt_checkpoint", "requeued")  # events that may precede what a run begins with


def _check_replayable(run: Run, step: int, begun_at: int) -> None:
    """Raise UsageError unless one launch from `begun_at`, a checkpoint or 0, makes the run's updates up to `step`."""
    config, reason = run.config, ""
    is_stretched = (config.schedule.decay, config.noise.schedule.kind) != ("constant", "constant")
    if is_stretched and any(begun_at < each.step < step for each in _lengthened(run)):
        reason = "the run was lengthened, which changed its schedules"
    of_start = (each for each in run.records if not (isinstance(each, EventRecord) and each.event in _BEFORE_START))
    first = next(of_start, None)
    if not begun_at and isinstance(first, EventRecord) and first.event == "resumed":
        reason = "the run began from a checkpoint of another one"
    if reason:
        raise UsageError(
            f"{run.directory.root} has no checkpoint from which to repeat update {step}: {reason}; choose an update "
            f"after one of its checkpoints (checkpoint.keep says how many a run keeps)",
            code="step-not-replayable",
        )


def _update(run: Run, step: int) -> dict[str, float]:
    with suppress(FileNotFoundError):
        for record in run.records:
            if isinstance(record, TrainRecord) and record.step == step:
                return {name: float(getattr(record, name)) for name in _COMPARED}
    raise UsageError(
        f"{run.directory.root} has no record of update {step}: choose one of its metrics.jsonl",
        code="step-not-recorded",
    )


def _same_weights(one: Path, other: Path) -> bool:
    first, second = (read_checkpoint(path).model for path in (one, other))
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
