"""A run's state and progress, as checkpoints hold them, and weights of other runs and programs."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dist_train.checkpoint.files import (
    WEIGHT_FILES,
    Contents,
    find_checkpoint,
    read_record,
    read_stored,
)
from dist_train.cluster.communicator import (
    Communicator,
    broadcast_bytes,
    gather_int,
    run_on_all_ranks,
    signed_digest,
)
from dist_train.config import Config
from dist_train.optim.averaging import Averaging, averaged_state
from dist_train.optim.flat_weights import FlatWeights, with_tied
from dist_train.optim.noise import Noise
from dist_train.optim.optimizers import create_missing, load_state, packed_numbers, set_numbers, state_tensors
from dist_train.outcome import PluginResultError, UsageError, check_choice, reading
from dist_train.rundir.atomic import read_regular, sha256_of


@dataclass
class Progress:
    """The state of a run apart from weights, optimizer and noise; accuracies are in [0, 1]."""

    step: int = 0
    best_accuracy: float | None = None
    evaluated_step: int | None = None  # the step at which `test_accuracy` was measured
    best_saved_step: int | None = None
    best_saved_accuracy: float | None = None  # of the best checkpoint, on the validation or else the test split
    validation_accuracy: float | None = None
    test_accuracy: float | None = None
    train_accuracy: float | None = None
    loss_scale: float | None = None
    updates_since_overflow: int | None = None  # or since its last change; both None unless float16
    grid_exponents: Sequence[int] | None = None  # per tensor, of `exact32` and `exact16`; of fp16 its scale's
    non_finite_step: int | None = None  # of the latest values not finite: its checkpoint is never the best

    stopping_best: float | None = None  # the best value of early stopping's metric so far
    stopping_waited: int | None = None  # evaluations since then without improvement

    def metrics(self) -> Mapping[str, float | int | None]:
        """Return the fields that checkpoints hold as `metrics`."""
        return {name: value for name, value in asdict(self).items() if name not in ("step", "grid_exponents")}

    def note_non_finite(self) -> None:
        """Note that the evaluation at this step is not finite, and drop its accuracies."""
        self.non_finite_step = self.step
        self.train_accuracy = self.validation_accuracy = self.test_accuracy = None

    def note_accuracy(self, split: str, accuracy: float) -> None:
        """Note the accuracy of the evaluation at this step."""
        if split == "train":
            self.train_accuracy = accuracy
        if split == "validation":
            self.validation_accuracy = accuracy
        if split == "test":
            self.test_accuracy, self.evaluated_step = accuracy, self.step
            if self.best_accuracy is None or accuracy > self.best_accuracy:
                self.best_accuracy = accuracy

    def note_saved(self) -> None:
        """Note that a checkpoint of this step is being saved."""
        if self.test_accuracy is None or self.evaluated_step != self.step:
            return
        accuracy = self.test_accuracy if self.validation_accuracy is None else self.validation_accuracy
        if self.best_saved_accuracy is None or accuracy > self.best_saved_accuracy:
            self.best_saved_step, self.best_saved_accuracy = self.step, accuracy


def restored_progress(contents: Contents) -> Progress:
    """Return the progress in a checkpoint."""
    known = {name: contents.metrics.get(name) for name in Progress().metrics()}
    return Progress(step=contents.step, grid_exponents=contents.grid_exponents, **known)  # type: ignore[arg-type]  # as metrics() wrote them


Weights = Literal["raw", "averaged"]  # which weights of a checkpoint: those of its step, or their average (`averaging`)


def stored_state(contents: Contents, weights: Weights) -> Mapping[str, Tensor]:
    """Return the model's state dict in a checkpoint; raise UsageError for other weights than it holds."""
    check_choice("weights", weights, Weights)
    if weights == "raw":
        return contents.model
    if not contents.average:
        raise UsageError(
            "the checkpoint holds no averaged weights, since its run had averaging.kind=none: choose --weights raw",
            code="no-averaged-weights",
        )
    return averaged_state(contents.average, contents.model)


def load_model(state: Mapping[str, Tensor], model: nn.Module, source: str) -> None:
    """Load `state`, read from `source`, into `model`; raise UsageError, with the difference, if it does not fit."""
    model_state = model.state_dict()
    shapes = {name: (_shape(state, name), _shape(model_state, name)) for name in dict.fromkeys((*state, *model_state))}
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
    except RuntimeError as error:  # for example sparse tensors
        raise UsageError(f"{source} cannot be loaded: {error}", code="checkpoint-format") from error


def _shape(state: Mapping[str, Tensor], name: str) -> str:
    return "x".join(map(str, state[name].shape)) or "a scalar" if name in state else "missing"


_SENT = (torch.float32, torch.float64, torch.float16, torch.int32, torch.int64)
"""Types that every engine sends; others travel as bytes."""


@dataclass(frozen=True)
class TrainState:
    """What training changes besides `Progress`: the same on all ranks."""

    network: nn.Module  # not compiled
    weights: FlatWeights  # of `network`
    optimizer: Optimizer
    averaging: Averaging
    noise: Noise
    changing: tuple[str, ...] = ()
    """Names of the buffers and frozen parameters that the model's own layers change in training."""

    def contents(self, progress: Progress, epoch: float, config: Config, plugins: Mapping[str, str]) -> Contents:
        """Return a checkpoint's contents, with views of the tensors, but no averaged weights and facts of the data.

        Its tensors may change at the next update, but not before: what the next forward pass may change is copied.
        """
        changing = {*self.changing, *(name for name, _ in self.network.named_buffers(remove_duplicate=False))}
        model = self.network.state_dict()
        return Contents(
            step=progress.step,
            epoch=epoch,
            model={name: value.clone() if name in changing else value for name, value in model.items()},
            optimizer=self.optimizer.state_dict(),
            config=config.model_dump(mode="json"),
            metrics=progress.metrics(),
            plugins=plugins,
            noise=self.noise.state(),
            grid_exponents=progress.grid_exponents,
        )

    def load(self, contents: Contents) -> None:
        """Load a checkpoint; raise UsageError if it does not fit."""
        load_model(contents.model, self.network, "the checkpoint")
        if self.averaging:
            self.averaging.load(contents.average["kept"])
        try:
            load_state(self.optimizer, contents.optimizer)
        except (RuntimeError, ValueError) as error:
            raise UsageError(
                f"the checkpoint is of another optimizer: restore the settings it was saved with ({error})",
                code="checkpoint-of-another-model",
            ) from error
        self.noise.load(contents.noise)

    def broadcast(self, comm: Communicator, root: int = 0) -> None:
        """Give every rank the state of rank `root`, with the buffers and frozen parameters of the network.

        Not Horovod's broadcast of the optimizer: on ranks without optimizer state it makes a step, which changes the
        weights. Our optimizers have their whole state from the beginning; of a plug-in's, what is missing is created.
        Tensors of one type and device are sent as one, since each broadcast costs a round of all ranks. If a rank is
        lost meanwhile, no value is changed.

        Raises UsageError if the state does not fit that of another rank: of a plug-in.
        """
        numbers = packed_numbers(self.optimizer) if comm.rank == root else b""
        numbers = broadcast_bytes(comm, numbers, "state.numbers", root)
        if comm.rank != root:
            create_missing(self.optimizer, numbers)
        groups = _by_type(self._tensors())
        layout = [(str(dtype), device.type, sum(map(Tensor.numel, each))) for (dtype, device), each in groups.items()]
        _check_same_layout(comm, layout, root)
        _broadcast(comm, groups.values(), "state", root)
        if comm.rank != root:
            set_numbers(self.optimizer, numbers, self.weights.values.device)

    def share_changing(self, comm: Communicator) -> None:
        """Give every rank what rank 0's passes have made of `changing`, as DistributedDataParallel does with buffers.

        Otherwise ranks would evaluate different models, and a checkpoint hold only one of them.
        """
        if self.changing and comm.size > 1:
            # Shapes of others, which checkpoints do not hold, may depend on the number of images.
            saved = [tensor for name, tensor in self.network.state_dict().items() if name in self.changing]
            _broadcast(comm, _by_type(saved).values(), "changing", root=0)

    def _tensors(self) -> Iterator[Tensor]:
        yield from state_tensors(self.optimizer)
        trained = {segment.name for segment in self.weights.segments}
        yield from (value for name, value in self.network.state_dict().items() if name not in trained)
        yield self.weights.values
        yield self.averaging.kept
        yield from self.noise.kept.values()


def _by_type(tensors: Iterable[Tensor]) -> dict[tuple[torch.dtype, torch.device], list[Tensor]]:
    groups: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    return groups


@torch.no_grad()
def _broadcast(comm: Communicator, groups: Collection[Sequence[Tensor]], name: str, root: int) -> None:
    """Overwrite tensors by those of rank `root`; those of a group are sent as one. If a rank is lost, none changes."""
    received = [torch.cat([tensor.reshape(-1) for tensor in tensors]) for tensors in groups]
    for index, flat in enumerate(received):
        comm.broadcast(flat if flat.dtype in _SENT else flat.view(torch.uint8), f"{name}.{index}", root)
    for flat, tensors in zip(received, groups, strict=True):
        for tensor, values in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(values.view_as(tensor))


def _check_same_layout(comm: Communicator, layout: Sequence[object], root: int) -> None:
    digests = gather_int(comm, signed_digest(repr(layout).encode()), "state.layout")

    def check() -> None:
        if digests[comm.rank] != digests[root]:
            raise PluginResultError(
                "the run's state does not fit that of a new rank: a plug-in's noise must create what it keeps at once, "
                "and its model have the same buffers on all ranks; until then, resume on one rank"
            )

    run_on_all_ranks(comm, check, "take over the run's state")


_TORCHVISION = "torchvision:"
_WRAPPERS = ("state_dict", "model_state_dict", "model")
_NORM_BUFFERS = (".num_batches_tracked", ".running_mean", ".running_var")


@dataclass(frozen=True)
class InitialWeights:
    """Tensors by name, and the file they come from; `step` if that is a checkpoint."""

    path: Path
    sha256: str
    tensors: Mapping[str, Tensor]
    step: int | None = None

    def fitted(self, state: Mapping[str, Tensor], classes: int) -> dict[str, Tensor]:
        """Return the tensors to load into a model with `state`; `load_model` refuses them if they do not fit.

        Norm buffers that the model does not have are left out, and heads for another number of classes are replaced by
        the model's.
        """
        heads = set(self.other_heads(state, classes))
        return {
            name: state[name] if name in heads else tensor
            for name, tensor in self._named_as(state).items()
            if name in state or not name.endswith(_NORM_BUFFERS)
        }

    def other_heads(self, state: Mapping[str, Tensor], classes: int) -> Iterator[str]:
        """Yield the names of tensors with `classes` rows in `state` and another number of rows, but else equal shapes,
        in the file.
        """
        tensors = self._named_as(state)
        for name, tensor in state.items():
            here, there = tensor.shape, tensors[name].shape if name in tensors else ()
            if here and there and here[0] == classes != there[0] and here[1:] == there[1:]:
                yield name

    def _named_as(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the tensors by the names of `state`: those below the attributes that hold the network, if any do.

        They are the attributes of a LightningModule, where a loss may hold others, of DistributedDataParallel
        (`module`), torch.compile (`_orig_mod`), and AveragedModel, which also has a count.
        """
        named = dict(self.tensors)
        if not state.keys() & named.keys():
            holders = sorted({name[: dot.end()] for name in named for dot in re.finditer(r"\.", name)})
            below = [
                {name.removeprefix(each): named[name] for name in named if name.startswith(each)} for each in holders
            ]
            shared = [len(state.keys() & part.keys()) for part in below]
            if (most := max(shared, default=0)) and shared.count(most) == 1:  # not a student's and its teacher's
                named = below[shared.index(most)]
        return with_tied(named, state)


def find_initial(source: Path, model: str) -> Path:
    """Return the file that `source`, of `run.init_from`, means for the model named `model`. Raises UsageError."""
    if str(source).startswith(_TORCHVISION):
        return _torchvision_file(str(source).removeprefix(_TORCHVISION), model.removeprefix(_TORCHVISION))
    path = find_checkpoint(source)
    if not _is_foreign(path):
        if path.suffix not in WEIGHT_FILES and not path.with_suffix(".json").exists():
            raise UsageError(
                f"{path} is neither a run's checkpoint nor named as weights: let it end in {', '.join(WEIGHT_FILES)}",
                code="weights-unreadable",
            )
        read_record(path)
    return path


def read_initial(source: Path, model: str) -> InitialWeights:
    """Return the weights of `source`: a run, a checkpoint, a file of weights, or `torchvision:NAME`.

    A file of weights is a `.safetensors` file, or a state dict saved by `torch.save`, from which no code is run, alone
    or under one of `_WRAPPERS`. Raises UsageError if there is no such file, or it does not hold weights.
    """
    path = find_initial(source, model)
    if not _is_foreign(path):
        stored = read_stored(source)
        return InitialWeights(stored.path, stored.sha256, stored.contents.model, stored.contents.step)
    with reading(path, code="weights-unreadable"):
        digest = sha256_of(path)
        tensors = _tensors(path)
    # File names of torch.hub end in the first digits of the digest.
    expected = re.search(r"-([0-9a-f]{8,})\.pth$", path.name) if str(source).startswith(_TORCHVISION) else None
    if expected and not digest.startswith(expected[1]):
        raise UsageError(
            f"{path} is damaged: its SHA-256 begins with {digest[:8]}; fetch it again", code="weights-unreadable"
        )
    return InitialWeights(path, digest, tensors)


def _is_foreign(path: Path) -> bool:
    """Whether the file comes from another program: by its suffix, and because it lacks a checkpoint's record."""
    return path.suffix in WEIGHT_FILES and not (path.suffix == ".pt" and _has_record(path))


def _has_record(path: Path) -> bool:
    """Whether the JSON file beside `path`, if there is one, is a checkpoint's record, or a damaged one."""
    try:
        fields = json.loads(read_regular(path.with_suffix(".json")))
    except FileNotFoundError:
        return False
    except (OSError, ValueError, RecursionError):
        return True
    return isinstance(fields, dict) and "sha256" in fields


def _torchvision_file(name: str, model: str) -> Path:
    from torchvision import models

    if model not in models.list_models(module=models):
        raise UsageError(
            f"{_TORCHVISION}{name} needs a model of torchvision: set model.name, for example {_TORCHVISION}resnet50",
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
        raise UsageError(f"the weights {name} of {model} are missing: download {url} to {path}", code="weights-missing")
    return path


def _tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors in a file by name. Raises OSError, or UsageError if it does not hold such tensors."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            content: Any = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:
        # Damaged files, and files that hold more than data, raise errors of nearly any type.
        raise UsageError(
            f"{path} cannot be loaded safely as weights ({type(error).__name__}): save the model's "
            f"state_dict(), as .safetensors or by torch.save",
            code="weights-unreadable",
        ) from error
    named: Mapping[Any, Any] = content if isinstance(content, Mapping) else {}
    while inner := next((named[key] for key in _WRAPPERS if isinstance(named.get(key), Mapping)), None):
        named = inner
    tensors = {str(name): value for name, value in named.items()}
    if not tensors or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise UsageError(
            f"{path} does not hold tensors by name only, but {', '.join(list(tensors)[:8]) or 'nothing'}: save the "
            f"model's state_dict(), alone or under the key {' or '.join(_WRAPPERS)}",
            code="weights-unreadable",
        )
    return tensors
