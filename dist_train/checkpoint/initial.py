"""The weights that a new run begins with: of a checkpoint, of a file of another program, or torchvision's own."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_train.checkpoint.files import find_checkpoint, read_record, read_stored
from dist_train.outcome import UsageError

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
