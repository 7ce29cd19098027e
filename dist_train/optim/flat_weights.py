"""All trainable weights of a model in one buffer, so that an operation on all of them is one kernel."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from itertools import chain, pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.parameter import is_lazy

from dist_train.models.norms import norm_parameters
from dist_train.outcome import PluginResultError, UsageError, did_you_mean

_ALIGNMENT = 16  # floats (64 bytes) at which tensors begin: a cache line, and the widest vector register
_FEW = 5  # names in a message
KINDS = frozenset({"weight", "bias", "norm"})


@dataclass(frozen=True)
class Segment:
    """The place [start, stop) of a parameter in the buffer, and its kind, one of KINDS."""

    name: str
    kind: str
    shape: torch.Size
    start: int
    stop: int


class FlatWeights:
    """Moves a model's trainable parameters into one buffer `values` [n], and their gradients into `gradients` [n].

    The parameters become views of them. Between tensors there is padding, which is zero in both. Tensors that shared
    memory no longer would, so `check_memory` refuses them.
    """

    def __init__(self, model: nn.Module) -> None:
        named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        self.parameters: tuple[nn.Parameter, ...] = tuple(parameter for _, parameter in named)
        norm_names = norm_parameters(model)
        segments: list[Segment] = []
        end = 0
        for name, parameter in named:
            kind = "norm" if name in norm_names else "bias" if parameter.dim() < 2 else "weight"
            segments.append(Segment(name, kind, parameter.shape, end, end + parameter.numel()))
            end += -(-parameter.numel() // _ALIGNMENT) * _ALIGNMENT
        self.segments: tuple[Segment, ...] = tuple(segments)
        device = self.parameters[0].device
        self.values = torch.zeros(end, device=device)
        self.gradients = torch.zeros(end, device=device)
        self._value_views, self._gradient_views = self.views_of(self.values), self.views_of(self.gradients)
        for parameter, view, gradient in zip(self.parameters, self._value_views, self._gradient_views, strict=True):
            view.copy_(parameter.detach())
            parameter.data = view
            parameter.grad = gradient

    def views_of(self, values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return each parameter's part of `values` [n], in its shape."""
        return tuple(values[segment.start : segment.stop].view(segment.shape) for segment in self.segments)

    def named(self, values: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the views of `values` [n] by the parameters' names."""
        return {segment.name: view for segment, view in zip(self.segments, self.views_of(values), strict=True)}

    def check_in_place(self) -> None:
        """Raise PluginResultError if the model has moved a parameter out of `values`.

        torch's recurrent layers do so by `flatten_parameters`, but only on a GPU, where no trial pass is made.
        """
        place = _storage(self.values)
        moved = [
            each.name
            for each, parameter in zip(self.segments, self.parameters, strict=True)
            if _storage(parameter) != place
        ]
        if moved:
            raise PluginResultError(
                f"the passes of an update leave {moved[0]} in other memory: leave out flatten_parameters(), and "
                f"assignments to .data, in the model; a plug-in's noise calls compute_with_values() in `restore`"
            )

    def compute_with(self, views: Sequence[torch.Tensor]) -> None:
        """Let the model compute with `views`, one for each parameter, instead of `values`, which do not change."""
        for parameter, view in zip(self.parameters, views, strict=True):
            parameter.data = view

    def compute_with_values(self) -> None:
        """Let the model compute with `values` again."""
        self.compute_with(self._value_views)

    def reclaim(self) -> None:
        """Copy the values of parameters that were given other tensors into `values`, and make them views again."""
        for parameter, view, gradient in zip(self.parameters, self._value_views, self._gradient_views, strict=True):
            if parameter.data_ptr() != view.data_ptr():
                view.copy_(parameter.detach())
                parameter.data = view
            parameter.grad = gradient

    def detach_gradients(self) -> None:
        """Let the next backward pass leave its gradients in tensors of its own, until `gather_gradients`.

        Otherwise it would add them to `gradients`, which would have to be zeroed first: two more passes over memory.
        """
        for parameter in self.parameters:
            parameter.grad = None

    def gather_gradients(self, first: int, last: int) -> None:
        """Copy the gradients of parameters `first` to `last` (exclusive) into `gradients`, zeros for missing ones."""
        views: list[torch.Tensor] = []
        computed: list[torch.Tensor] = []
        for parameter, view in zip(self.parameters[first:last], self._gradient_views[first:last], strict=True):
            if parameter.grad is None:
                view.zero_()
            elif parameter.grad is not view:
                views.append(view)
                computed.append(parameter.grad)
            parameter.grad = view
        if computed:
            torch._foreach_copy_(views, computed)

    def clear_padding(self) -> None:
        """Make the padding of `gradients` zero again: no backward pass overwrites it, but the reduction sums it."""
        self.gradients.index_fill_(0, self.padding, 0.0)

    @cached_property
    def padding(self) -> torch.Tensor:
        """The indices of the padding, in order."""
        return torch.tensor(self.masked_indices(()), device=self.gradients.device)

    @property
    def count(self) -> int:
        """Number of trainable weights, without padding."""
        return sum(segment.stop - segment.start for segment in self.segments)

    def mask(self, exclude: Sequence[str]) -> torch.Tensor:
        """Return 1.0 for each weight that `exclude` does not match, 0.0 for the others and for padding; [n]."""
        mask = torch.ones_like(self.values)
        mask[torch.tensor(self.masked_indices(exclude), device=mask.device)] = 0.0
        return mask

    def masked_indices(self, exclude: Sequence[str]) -> NDArray[np.int64]:
        """Return the indices at which `mask` is 0.0, in order."""
        left_out = set(self.excluded(exclude))
        kept = [segment for segment in self.segments if segment not in left_out]
        edges = [(0, 0), *((segment.start, segment.stop) for segment in kept), (len(self.values), 0)]
        return np.concatenate([np.arange(stop, start) for (_, stop), (start, _) in pairwise(edges)])

    def excluded(self, patterns: Sequence[str], setting: str = "exclude") -> list[Segment]:
        """Return the segments whose kind or name matches one of `patterns` (names with `*` and `?` as in a shell).

        Raises UsageError, which names the `setting`, if a pattern other than a kind matches none.
        """
        matched: set[Segment] = set()
        for pattern in patterns:
            found = [each for each in self.segments if each.kind == pattern or fnmatchcase(each.name, pattern)]
            if not found and pattern not in KINDS:
                names = [segment.name for segment in self.segments]
                hint = did_you_mean(pattern, names) or f"; names are such as {', '.join(names[:_FEW])}"
                raise UsageError(f"{setting}: no weight is called {pattern}{hint}", code="no-such-weight")
            matched.update(found)
        return [segment for segment in self.segments if segment in matched]


def check_movable(weights: FlatWeights, exclude: Sequence[str], setting: str) -> None:
    """Raise UsageError if `exclude`, the value of `setting`, leaves no weight, or a pattern in it matches none."""
    if len(weights.excluded(exclude, setting)) == len(weights.segments):
        raise UsageError(f"{setting} leaves no weight to move: exclude fewer", code="nothing-to-move")


def check_memory(model: nn.Module) -> None:
    """Raise UsageError if two tensors of `model`, at least one of them trained, share memory.

    Call it before the model is moved to its device, which gives each tensor memory of its own.
    """
    named = [each for each in chain(model.named_parameters(), model.named_buffers()) if not is_lazy(each[1])]
    named.sort(key=lambda each: not each[1].requires_grad)  # overlaps of the others do not matter
    sharing = Counter(map(_storage, (tensor for _, tensor in named)))
    owners: dict[object, torch.Tensor] = {}  # by storage: each element's owner, as its number in `named`, from 1
    for number, (name, tensor) in enumerate(named, start=1):
        if sharing[storage := _storage(tensor)] == 1 or not tensor.numel():
            continue
        size = tensor.untyped_storage().nbytes() // tensor.element_size()
        owner = owners.setdefault(storage, torch.zeros(size, dtype=torch.int32))
        elements = owner.as_strided(tensor.shape, tensor.stride(), int(tensor.storage_offset()))
        if other := int(elements.max()):
            raise PluginResultError(
                f"{name} and {named[other - 1][0]} have the same memory, but are two tensors, of which one would keep "
                f"its old values: to share weights assign the parameter itself, not its .data"
            )
        if tensor.requires_grad:
            elements.fill_(number)


def with_tied(tensors: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a file's `tensors`, those of tied parameters under all names that these have in the model's `state`.

    Files of Hugging Face's libraries have only one of the names.
    """
    given = {_place(state[name]): tensor for name, tensor in tensors.items() if name in state}
    missing = {name: given.get(_place(tensor)) for name, tensor in state.items() if name not in tensors}
    return {**tensors, **{name: tensor for name, tensor in missing.items() if tensor is not None}}


def _place(tensor: torch.Tensor) -> tuple[object, ...]:
    return (*_storage(tensor), tensor.storage_offset(), tensor.shape, tensor.stride())


def _storage(tensor: torch.Tensor) -> tuple[object, int]:
    return tensor.untyped_storage()._cdata, tensor.element_size()


_NORM_PART = 1 << 16


def norm(values: torch.Tensor) -> torch.Tensor:
    """Return the Euclidean norm [] of float32 `values` [n], computed on their device.

    In parts, since on CPUs torch adds up all squares in float32: for 25 million normal values, the norm would be 0.14 %
    too small.
    """
    length: torch.Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(values.split(_NORM_PART))))
    return length


def digest(values: torch.Tensor) -> int:
    """Return a 64-bit digest of float32 `values` [n], computed on their device; any single changed bit changes it."""
    bits = values.detach().view(torch.int32).to(torch.int64)
    odd = torch.arange(1, 2 * len(bits), 2, device=bits.device)
    return int((bits * odd).sum())
