"""For notebooks and scripts: the settings, records and model of a run, and exports."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dist_train.checkpoint.files import Stored, find_checkpoint, list_checkpoints, read_stored
from dist_train.checkpoint.state import Weights
from dist_train.cluster.inspection import installed_version
from dist_train.config import Config, load_config
from dist_train.config.loading import override_texts
from dist_train.config.plugins import is_plugin
from dist_train.data.augmentation import ChannelStatistics
from dist_train.data.images import Split
from dist_train.data.loader import Splits, open_splits
from dist_train.data.plan import BatchPlan
from dist_train.outcome import CodedError, UsageError, check_choice, writing
from dist_train.report.drawing import draw_learning_curve
from dist_train.rundir.metrics_file import read_records
from dist_train.rundir.paths import RunDirectory, in_utf8, run_folder
from dist_train.rundir.records import EvaluationRecord, Record, TrainRecord
from dist_train.rundir.status import Status, load_status
from dist_train.training.compute import restoring_torch
from dist_train.training.evaluation import (
    StoredEvaluation,
    evaluate_stored,
    stored_config,
    stored_model,
    stored_normalization,
    warn_of_edited_plugins,
)

Overrides = Sequence[str] | Mapping[str, object]
"""`section.key=value`, one or several, or a mapping of values by path, as for `load_config`."""

Target = str | os.PathLike[str]
"""A path, or a `Run`, whose overrides come before those given."""

Format = Literal["safetensors", "torch-export", "onnx"]


@dataclass(frozen=True)
class Run:
    """A run, read from its directory on demand; `load_run` returns it.

    Examples:
        >>> run = dist_train.load_run("runs/demo")
        >>> rows = run.metrics()  # a DataFrame if pandas is installed
        >>> images = torch.rand(5, *run.config.data.image_format.shape)  # [n, C, H, W]
        >>> model = run.model()
        >>> model(images).shape  # logits [n, classes]
        torch.Size([5, 10])
        >>> with torch.no_grad():
        ...     guesses = [(model(images).argmax(1), labels) for images, labels in run.batches("test")]
    """

    directory: RunDirectory
    overrides: Sequence[str] = ()

    def __repr__(self) -> str:
        return f"Run({', '.join(map(repr, (str(self.directory.root), *self.overrides)))})"

    def __fspath__(self) -> str:
        return str(self.directory.root)

    @property
    def config(self) -> Config:
        """Every setting of the run. Raises ConfigError if they cannot be read."""
        return load_config(self.directory.config, self.overrides)

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

    @restoring_torch()
    def model(self, step: int | Literal["best"] | None = None, weights: Weights = "raw") -> nn.Module:
        """Return the network of the checkpoint at `step` (default: the last one), in evaluation mode on the CPU.

        "best" is the checkpoint that `checkpoint.keep_best` keeps.

        It has the clean weights or, with `weights="averaged"`, the run's average of them. It takes images [n, C, H, W]
        as the run's data set gives them, and returns logits [n, classes].

        Raises:
            UsageError: there is no such checkpoint, it is damaged, or it holds no average.
        """
        contents = read_stored(self._target(step)).contents
        config = stored_config(contents, self.overrides)
        warn_of_edited_plugins(contents, config)
        model = stored_model(contents, config, weights)
        model.eval()  # not to be chained: `train` of a model of one's own may return nothing
        return model

    def checkpoint(self, step: int | Literal["best"] | None = None) -> Path:
        """Return the checkpoint at `step` (default: the last one), or the "best". Raises UsageError without one."""
        return find_checkpoint(self._target(step))

    def _target(self, step: int | Literal["best"] | None) -> Path:
        root = self.directory.root
        return root if step is None else Path(f"{root}@{step}")

    def evaluate(self, split: Split = "test", overrides: Overrides = (), weights: Weights = "raw") -> StoredEvaluation:
        """Return step, loss and accuracy of the last checkpoint on the whole of `split`. Raises UsageError.

        Every rank of a launch calls it, and gets the same result.
        """
        return evaluate_stored(self.directory.root, split, (*self.overrides, *override_texts(overrides)), weights)

    @restoring_torch()
    def batches(self, split: Split = "test") -> Iterator[tuple[Tensor, Tensor]]:
        """Return an iterator over `split` in order: images as `model` takes them, [n, C, H, W], and labels int64 [n].

        They are on the CPU, not augmented, in batches of `evaluation.batch_size`. Raises UsageError without the data,
        or without that split.
        """
        config = self.config
        samples = splits_of(config, self._stored_normalization(config)).of(split)
        plan = BatchPlan(len(samples), self.config.evaluation.batch_size)
        batches = samples.read_all(torch.arange(each.start, each.stop) for each in plan.micro_batches)
        # each is read when it is asked for, and then, too, whatever the caller has set of torch by then
        return iter(restoring_torch()(partial(next, batches, None)), None)

    @restoring_torch()
    def normalization(self) -> ChannelStatistics | None:
        """Return the `mean` and `deviation` of each channel by which `data.normalize` normalizes inputs; None without.

        They are in the last checkpoint. Without one, or if an older version wrote it, they are computed again from the
        training images. Raises UsageError if these are missing.
        """
        config = self.config
        if not config.data.normalize:
            return None
        return self._stored_normalization(config) or splits_of(config).normalization

    def _stored_normalization(self, config: Config) -> ChannelStatistics | None:
        has_checkpoint = config.data.normalize and bool(list_checkpoints(self.directory.checkpoints))
        return stored_normalization(read_stored(self.directory.root).contents) if has_checkpoint else None

    def class_names(self) -> tuple[str, ...]:
        """Return the names of classes in the order of labels, of an image folder its folders; else, none.

        They are in the last checkpoint, unless an older version wrote it. Raises UsageError without a checkpoint.
        """
        return tuple(read_stored(self.directory.root).contents.class_names)

    def learning_curve(self, output: Path | str | None = None) -> Path:
        """Draw loss and accuracy against epoch into `output` (.png, .svg or .pdf), and return its path."""
        output = Path(output or self.directory.learning_curve)
        draw_learning_curve([self.directory.root], output)
        return output


def _overrides_for(target: Target, overrides: Overrides) -> tuple[str, ...]:
    return (*(target.overrides if isinstance(target, Run) else ()), *override_texts(overrides))


def load_run(path: Target, overrides: Overrides = ()) -> Run:
    """Return the run in the directory `path`, or in runs/`path`.

    `overrides`: where its data and plug-ins are by now, such as `data.root=DIR` and `model.name=FILE.py:NAME`.

    Examples:
        >>> run = dist_train.load_run("runs/demo")
        >>> run.status.state, run.steps
        ('finished', (32,))

    Raises:
        UsageError: there is none, or its name is not UTF-8.
    """
    directory = RunDirectory(in_utf8(run_folder(Path(path), code="target-missing")))
    if not directory.config.is_file():
        raise UsageError(f"{os.fspath(path)}: there is no such run", code="target-missing")
    return Run(directory, _overrides_for(path, overrides))


def evaluate(
    target: Target, split: Split = "test", overrides: Overrides = (), weights: Weights = "raw"
) -> StoredEvaluation:
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
    return evaluate_stored(Path(target), split, _overrides_for(target, overrides), weights)


@dataclass(frozen=True)
class Export:
    """A model written to `path`; `difference`: the largest between logits of the loaded file and of the model."""

    path: Path
    step: int
    difference: float


@restoring_torch()
def export(
    target: Target, to: Format, output: Path | str | None = None, weights: Weights = "raw", overrides: Overrides = ()
) -> Export:
    """Write the model of a checkpoint with clean or averaged weights and norm statistics.

    `target` and `overrides` are those of `evaluate`.

    safetensors: the tensors by name. torch-export and onnx: also the network, for any number of images. The file is
    loaded back and compared with the model on four random images or, if your model takes none such, test images.

    Each holds as `dist_train`, in JSON, the checkpoint's `step` and `sha256`, the input's `shape` and `normalization`
    (`mean` and `deviation` of each channel; null without), the number of `classes`, and `class_names`, if known: as
    metadata in a safetensors or onnx file, as an extra file in torch-export's.

    Examples:
        >>> written = dist_train.export("runs/demo", "safetensors", "demo.safetensors")
        >>> written.step, written.difference
        (32, 0.0)

    Raises:
        UsageError: there is no such checkpoint, the library that writes `to` is missing or too old, it cannot represent
            your model, or `output` cannot be written, or is named as another format.
    """
    check_choice("to", to, Format)
    stored = read_stored(Path(target))
    contents = stored.contents
    config = stored_config(contents, _overrides_for(target, overrides))
    warn_of_edited_plugins(contents, config)
    model = stored_model(contents, config, weights)
    model.eval()
    suffix, write = _FORMATS[to]
    # not run.name, which all runs with --run-dir may share
    name = RunDirectory.of_checkpoint(stored.path.absolute()).root.resolve().name
    which = "-averaged" if weights == "averaged" else ""
    output = in_utf8(Path(output or f"{name}-{contents.step:08d}{which}{suffix}"))
    named = next((other for other, (ending, _) in _FORMATS.items() if ending == output.suffix), to)
    if named != to:
        raise UsageError(f"{output} is named as {named}: name it *{suffix}, or choose --to {named}", code="output-form")
    images, notes = _compared_images(model, config), {_NOTES: json.dumps(_notes(stored, config))}
    try:
        with torch.no_grad(), _replacing(output) as part:
            others = torch.cat((images, images[:1]))  # of another number than the file is made from
            expected = model(others)  # first, since safetensors loads the file into `model`
            loaded = write(model, images, part, notes)
            difference = float((loaded(others) - expected).abs().max())
    except ImportError as error:
        reason = f"{to}: {error}"
        if isinstance(error, ModuleNotFoundError):
            reason = f"{to} needs {error.name}, which is not installed: pip install 'dist_train[onnx]'"
        if str(error.name).startswith("onnxscript."):  # a part that each release adds for the next torch
            versions = f"onnxscript {installed_version('onnxscript')} is too old for torch {torch.__version__}"
            reason = f"{versions}: pip install --upgrade onnxscript onnx"
        raise UsageError(reason, code="export-missing") from error
    except Exception as error:  # of torch's exporters, of nearly any type
        if isinstance(error, CodedError) or not is_plugin(config.model.name):
            raise
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        if to != "safetensors":  # which holds tensors alone
            reason += (
                "; take the number of images from images.shape[0], not len(images), let no branch depend on pixels"
            )
        raise UsageError(f"{to} cannot represent {config.model.name}: {reason}", code="plugin-failed") from error
    return Export(output, contents.step, difference)


def _notes(stored: Stored, config: Config) -> dict[str, Any]:
    """Return what an exported file says of its model and input; without `normalization` if that is not known."""
    images, contents = config.data.image_format, stored.contents
    notes: dict[str, Any] = {"step": contents.step, "sha256": stored.sha256}
    notes |= {"shape": images.shape, "classes": images.classes, "class_names": contents.class_names}
    if config.data.normalize and not contents.normalization:
        return notes  # an older version wrote the checkpoint
    return {**notes, "normalization": contents.normalization or None}


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
            test = splits_of(config).test
            return next(test.read_all([torch.arange(min(4, len(test)))]))[0]
        except UsageError as error:
            reason = f"{type(failed).__name__}: {' '.join(str(failed).split())}"
            raise UsageError(
                f"{config.model.name} fails on four random images ({reason}), and test images are missing: {error}",
                code="plugin-failed",
            ) from failed
    return images


def splits_of(config: Config, normalization: ChannelStatistics | None = None) -> Splits:
    """Return the splits on the CPU, read without loader processes, so that there is nothing to close.

    With `data.normalize` they are normalized by `normalization`; None: by the training images.
    """
    settings = config.data.model_copy(update={"loader_workers": 0})
    return open_splits(settings, config.run.seed, torch.device("cpu"), statistics=normalization)


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


_NOTES = "dist_train"
_Loaded = Callable[[Tensor], Tensor]


def _safetensors(model: nn.Module, images: Tensor, output: Path, notes: dict[str, str]) -> _Loaded:
    from safetensors.torch import load_file, save

    # copies: safetensors refuses tied parameters, which share memory
    copies = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in model.state_dict().items()}
    output.write_bytes(save(copies, notes))  # its `save_file` raises no OSError if the disk is full
    model.load_state_dict(load_file(output))
    return model


def _any_number() -> Any:
    """Return the `dynamic_shapes` of a network for any number of images."""
    return ({0: torch.export.Dim("images", min=1)},)


def _torch_export(model: nn.Module, images: Tensor, output: Path, notes: dict[str, str]) -> _Loaded:
    program = torch.export.export(model, (images,), dynamic_shapes=_any_number())
    content = io.BytesIO()  # given a path, torch raises no OSError if the disk is full
    torch.export.save(program, content, extra_files=notes)
    output.write_bytes(content.getvalue())
    return torch.export.load(output).module()


def _onnx(model: nn.Module, images: Tensor, output: Path, notes: dict[str, str]) -> _Loaded:
    import onnxruntime

    # Given the network itself, torch.onnx falls back to a file for as many images as these alone.
    network = torch.export.export(model, (images,), dynamic_shapes=(sizes := _any_number()))
    options: dict[str, Any] = {"dynamo": True, "verbose": False, "dynamic_shapes": sizes}
    program: Any = torch.onnx.export(network, input_names=["images"], **options)
    program.model.metadata_props.update(notes)
    program.save(output, external_data=False)  # in one file: only networks of more than 2 GB need a second one
    session = onnxruntime.InferenceSession(output)
    return lambda given: torch.from_numpy(session.run(None, {"images": given.numpy()})[0])


_FORMATS: Mapping[Format, tuple[str, Callable[[nn.Module, Tensor, Path, dict[str, str]], _Loaded]]] = {
    "safetensors": (".safetensors", _safetensors),
    "torch-export": (".pt2", _torch_export),
    "onnx": (".onnx", _onnx),
}
