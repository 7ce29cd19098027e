"""How far a run is, which checkpoint or weights it begins from, and the state that all ranks begin from."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dist_train.checkpoint.files import Contents, adopt, find_checkpoint, newest_whole, read_record, read_stored
from dist_train.cluster.communicator import Communicator, broadcast_str
from dist_train.config import Config, differences, parse_config
from dist_train.config.resuming import with_decisions
from dist_train.optim.averaging import Averaging, averaged_state
from dist_train.optim.flat_weights import FlatWeights
from dist_train.optim.optimizers import state_tensors
from dist_train.outcome import UsageError
from dist_train.rundir.paths import RunDirectory


@dataclass(frozen=True)
class ResumePoint:
    """Settings, with what an earlier launch decided; the checkpoint to resume from; damaged ones and their faults.

    `epochs_before`: of a run that is lengthened, what its schedules were laid out over. `initial`: of a new run, where
    its weights come from, if not from the seed.
    """

    config: Config
    contents: Contents | None = None
    damage: Mapping[str, str] = field(default_factory=dict)
    epochs_before: int | None = None
    initial: InitialWeights | None = None


def find_resume_point(config: Config, directory: RunDirectory) -> ResumePoint:
    """Return where a launch of `config` in `directory` begins.

    Raises:
        UsageError: there is a run that `config` must not, or cannot, resume.
    """
    checkpoints = directory.checkpoints
    if config.run.resume == "never":
        if any(checkpoints.glob("step-*.pt")):
            raise UsageError(
                f"{directory.root} already holds a run: choose another run.name, or resume it by run.resume=auto",
                code="run-exists",
            )
        return ResumePoint(config)
    if config.checkpoint.fallback_directory is not None:
        adopt(directory.fallback(config.checkpoint.fallback_directory), checkpoints)
    named = None if config.run.resume == "auto" else Path(config.run.resume)
    damage: dict[str, str] = {}
    contents = None
    if named is None or named.resolve().parent != checkpoints.resolve():
        contents = newest_whole(checkpoints, lambda path, text: damage.update({path.name: text}))
    if contents is None and named is not None:
        # Another run's checkpoint is where this one begins; requeued, it resumes from its own.
        contents = read_stored(named).contents
    if contents is None:
        source = config.run.init_from
        initial = None if source is None else read_initial(source, config.model.name)
        return ResumePoint(config, None, damage, initial=initial)
    begun = parse_config(dict(contents.config), source="the checkpoint")
    is_longer = config.run.epochs > begun.run.epochs
    changed = [each for each in differences(begun, config) if not (is_longer and each.path == "run.epochs")]
    if changed:
        raise UsageError(
            f"the run that saved step {contents.step} began with other settings; restore them, "
            f"or begin a new run in another directory (run.name):\n"
            + "\n".join(f"  {difference}" for difference in changed),
            code="settings-changed",
        )
    before = begun.run.epochs if is_longer else None
    return ResumePoint(with_decisions(config, begun), contents, damage, before)


@dataclass
class Progress:
    """All that a checkpoint needs beside the weights and the optimizer's state; accuracies are in [0, 1]."""

    step: int = 0
    best_accuracy: float | None = None
    evaluated_step: int | None = None
    """Where `test_accuracy` was measured."""
    best_saved_step: int | None = None
    best_saved_accuracy: float | None = None
    """The best checkpoint: of those saved at an evaluation the one with the highest accuracy on the validation split,
    without one on the test split.
    """
    validation_accuracy: float | None = None
    test_accuracy: float | None = None
    train_accuracy: float | None = None
    loss_scale: float | None = None
    updates_since_overflow: int | None = None
    """Since the loss scale was last changed; both where there is one, in float16."""
    grid_exponents: Sequence[int] | None = None
    """Of `exact32`: the next update's grids, one for each parameter tensor."""
    non_finite_step: int | None = None
    """The latest step after which an evaluation, or the weights, were not finite; its checkpoint is never the best."""

    stopping_best: float | None = None
    """The best value so far of what early stopping looks at; and since how many evaluations it is."""
    stopping_waited: int | None = None

    def metrics(self) -> Mapping[str, float | int | None]:
        """Return what a checkpoint keeps of it beside the step."""
        return {name: value for name, value in asdict(self).items() if name not in ("step", "grid_exponents")}

    def note_non_finite(self) -> None:
        """Take in that the evaluation of this step is not finite: it has no accuracy."""
        self.non_finite_step = self.step
        self.train_accuracy = self.validation_accuracy = self.test_accuracy = None

    def note_accuracy(self, split: str, accuracy: float) -> None:
        """Take in the accuracy of an evaluation just made."""
        if split == "train":
            self.train_accuracy = accuracy
        if split == "validation":
            self.validation_accuracy = accuracy
        if split != "test":
            return
        self.test_accuracy, self.evaluated_step = accuracy, self.step
        if self.best_accuracy is None or accuracy > self.best_accuracy:
            self.best_accuracy = accuracy

    def note_saved(self) -> None:
        """Take in that a checkpoint of this step is being saved."""
        if self.test_accuracy is None or self.evaluated_step != self.step:
            return
        judged = self.test_accuracy if self.validation_accuracy is None else self.validation_accuracy
        if self.best_saved_accuracy is None or judged > self.best_saved_accuracy:
            self.best_saved_step, self.best_saved_accuracy = self.step, judged


def restored_progress(contents: Contents) -> Progress:
    """Return the progress that a checkpoint holds."""
    known = {name: contents.metrics.get(name) for name in Progress().metrics()}
    return Progress(step=contents.step, grid_exponents=contents.grid_exponents, **known)  # type: ignore[arg-type]  # as metrics() wrote them


def shared_progress(comm: Communicator, progress: Progress) -> Progress:
    """Return rank 0's progress."""
    fields = json.loads(broadcast_str(comm, json.dumps(asdict(progress)), "progress"))
    return Progress(**fields)


Weights = Literal["raw", "averaged"]
"""Which weights of a checkpoint: those of its step, or their average along the way."""


def stored_state(contents: Contents, weights: Weights) -> Mapping[str, Tensor]:
    """Return the model's state in a checkpoint. Raises UsageError where it holds no average, and that is asked for."""
    if weights == "raw":
        return contents.model
    if not contents.average:
        raise UsageError(
            "the checkpoint holds no averaged weights: its run had averaging.kind none", code="no-averaged-weights"
        )
    return averaged_state(contents.average, contents.model)


def load_into(contents: Contents, model: nn.Module, optimizer: Optimizer, averaging: Averaging | None = None) -> None:
    """Copy a checkpoint into `model`, `optimizer` and `averaging`; raise UsageError where it is of others."""
    load_model(contents.model, model, "the checkpoint")
    if averaging:
        averaging.load(contents.average["kept"])
    try:
        # Right for an optimizer that nothing wraps: a wrapper would forget what is loaded before it.
        optimizer.load_state_dict({**contents.optimizer})
    except (RuntimeError, ValueError) as error:
        raise UsageError(
            f"the checkpoint is of another optimizer: {error}", code="checkpoint-of-another-model"
        ) from error


def load_model(state: Mapping[str, Tensor], model: nn.Module, source: str) -> None:
    """Copy `state`, of `source`, into `model`; raise UsageError where it is another model's, naming what differs."""
    own = model.state_dict()
    shapes = {name: (_shape(state, name), _shape(own, name)) for name in dict.fromkeys((*state, *own))}
    differing = [f"{name}: {there} there, {here} here" for name, (there, here) in shapes.items() if there != here]
    if differing:
        more = f"; and {len(differing) - 1} more" if len(differing) > 1 else ""
        raise UsageError(
            f"{source} is of another model ({differing[0]}{more}): the sections model and data must give the same "
            f"layers, shapes and classes",
            code="checkpoint-of-another-model",
        )
    try:
        model.load_state_dict(state)
    except RuntimeError as error:  # of tensors that are not plain ones
        raise UsageError(f"{source} cannot be loaded: {error}", code="checkpoint-format") from error


def _shape(state: Mapping[str, Tensor], name: str) -> str:
    return "x".join(map(str, state[name].shape)) or "a scalar" if name in state else "missing"


def broadcast_state(
    comm: Communicator,
    model: nn.Module,
    weights: FlatWeights,
    optimizer: Optimizer,
    *more: Tensor,
    root: int = 0,
) -> None:
    """Give every rank the state of rank `root`: the optimizer's, the model's buffers, the weights, and `more`.

    Horovod's own broadcast of the optimizer makes a step on ranks without state, and so moves their
    weights; here every rank has the whole state from the beginning. What is of one type and device travels as
    one tensor: each broadcast costs a round of all ranks. All of it is taken or, where a rank is lost meanwhile, none.
    """
    parameters = {name for name, _ in model.named_parameters()}
    buffers = [value for name, value in model.state_dict().items() if name not in parameters]
    alike: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in (*(tensor for _, tensor in state_tensors(optimizer)), *buffers, weights.values, *more):
        alike.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    with torch.no_grad():
        received = [torch.cat([tensor.reshape(-1) for tensor in tensors]) for tensors in alike.values()]
        for index, flat in enumerate(received):
            comm.broadcast(flat, f"state.{index}", root)
        for flat, tensors in zip(received, alike.values(), strict=True):
            for tensor, values in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
                tensor.copy_(values.view_as(tensor))


_FILES = (".safetensors", ".pth", ".pt", ".bin")
_TORCHVISION = "torchvision:"
_WRAPPERS = ("state_dict", "model_state_dict", "model")
_COUNTS = ".num_batches_tracked"
_AVERAGES = (".running_mean", ".running_var")


@dataclass(frozen=True)
class InitialWeights:
    """Tensors by name, where they come from, and the step of the checkpoint, if it is one."""

    path: Path
    sha256: str
    tensors: Mapping[str, Tensor]
    step: int | None = None

    def fitted(self, own: Mapping[str, Tensor], classes: int) -> dict[str, Tensor]:
        """Return them as a model with the state `own` takes them; what does not fit is left for loading to refuse.

        Of files of other programs, the counts and averages of norms that the model does not keep are left out, and a
        head of another number of classes is the model's own.
        """
        if self.step is not None:
            return dict(self.tensors)
        heads = set(self.other_heads(own, classes))
        return {
            name: own[name] if name in heads else tensor
            for name, tensor in self.tensors.items()
            if name in own or not name.endswith((_COUNTS, *_AVERAGES))
        }

    def other_heads(self, own: Mapping[str, Tensor], classes: int) -> Iterator[str]:
        """Yield the tensors of `own` of `classes` rows, of which the file has another number, but else the same."""
        for name, tensor in own.items():
            here, there = tensor.shape, self.tensors[name].shape if name in self.tensors else ()
            if self.step is None and here and there and here[0] == classes != there[0] and here[1:] == there[1:]:
                yield name


def find_initial(source: Path, model: str) -> Path:
    """Return the file that `run.init_from` stands for, for the model of that name; see `read_initial`.

    Raises:
        UsageError: there is none.
    """
    if str(source).startswith(_TORCHVISION):
        return _torchvision_file(str(source).removeprefix(_TORCHVISION), model.removeprefix(_TORCHVISION))
    path = find_checkpoint(source)
    if not _is_foreign(path):
        read_record(path)
    return path


def read_initial(source: Path, model: str) -> InitialWeights:
    """Return the weights of `source`: a run, a checkpoint, a file of weights, or `torchvision:NAME`.

    A file of weights is `.safetensors`, or what `torch.save` wrote of a state dict: nothing in it is run. Tensors may
    lie below `state_dict` or `model`, and their names begin with `module.`, as wrappers leave them.

    Raises:
        UsageError: there is no such file, or it holds something else.
    """
    path = find_initial(source, model)
    if not _is_foreign(path):
        stored = read_stored(path)
        return InitialWeights(stored.path, stored.sha256, stored.contents.model, stored.contents.step)
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        tensors = _tensors(path)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}", code="weights-unreadable") from error
    # The name of a file of torch.hub ends in the first digits of its digest.
    named = re.search(r"-([0-9a-f]{8,})\.pth$", path.name) if str(source).startswith(_TORCHVISION) else None
    if named and not digest.startswith(named[1]):
        raise UsageError(
            f"{path} is damaged: its SHA-256 begins with {digest[:8]}; fetch it again", code="weights-unreadable"
        )
    return InitialWeights(path, digest, tensors)


def _is_foreign(path: Path) -> bool:
    """Whether the file is of another program: by its name, and for lack of the record that a checkpoint has."""
    return path.suffix in _FILES and not (path.suffix == ".pt" and path.with_suffix(".json").exists())


def _torchvision_file(name: str, model: str) -> Path:
    from torchvision import models

    if model not in models.list_models(module=models):
        raise UsageError(
            f"{_TORCHVISION}{name} needs a model of torchvision: set model.name to one, as in {_TORCHVISION}resnet50",
            code="weights-missing",
        )
    known = models.get_model_weights(model).__members__
    if name not in known:
        raise UsageError(
            f"torchvision has no weights {name} of {model}: choose one of {', '.join(known)}", code="weights-missing"
        )
    url = known[name].url
    path = Path(torch.hub.get_dir(), "checkpoints", os.path.basename(url))
    if not path.is_file():
        raise UsageError(f"the weights {name} of {model} are not here: fetch {url} to {path}", code="weights-missing")
    return path


def _tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file. Raises OSError, or UsageError where there are none."""
    try:
        found = _loaded(path)
    except OSError:
        raise
    except Exception as error:
        # What is damaged, or holds more than data, raises errors of nearly any type.
        raise UsageError(
            f"{path} is no file of weights that can be loaded safely ({type(error).__name__}): save the model's "
            f"state_dict(), as .safetensors or by torch.save",
            code="weights-unreadable",
        ) from error
    while isinstance(found, Mapping) and (inner := next((found[key] for key in _WRAPPERS if key in found), None)):
        found = inner
    named = {str(name).removeprefix("module."): value for name, value in dict(found).items()} if found else {}
    if not named or not all(isinstance(value, Tensor) for value in named.values()):
        raise UsageError(f"{path} holds more, or else, than tensors by name", code="weights-unreadable")
    return named


def _loaded(path: Path) -> Any:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)
