"""Stands for CUDA graphs on a CPU: records the operators of a pass, and calls them again on the same memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_READS = ("_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "equal", "unique", "_unique")
_ALLOCATIONS = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")


class Call(NamedTuple):
    """An operator, its arguments and its results."""

    operator: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    results: list[Tensor]


class _Recording(TorchDispatchMode):
    """The operators called within the block. It keeps their tensors, so that no memory is used twice."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch gives it no types
        self.calls: list[Call] = []
        self.outside: dict[int, Tensor] = {}
        """The memory that it uses and has not allocated, as bytes, by address."""
        self.before: dict[int, Tensor] = {}
        """What that held."""
        self._within: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        assert func._opname not in _READS, f"{func} makes the host wait for the device"
        kwargs = kwargs or {}
        for tensor in _tensors((args, kwargs)):
            if (address := address_of(tensor)) not in self._within and address not in self.outside:
                self.outside[address] = _bytes_of(tensor)
                self.before[address] = self.outside[address].clone()
        result = func(*args, **kwargs)
        results = _tensors(result)
        self._within |= {address_of(each) for each in results} - self.outside.keys()
        self.calls.append(Call(func, args, kwargs, results))
        return result


class OperatorRecorder:
    """A `GraphRecorder` for the CPU. Reading a value on the host fails, as it does while a CUDA graph is recorded."""

    def __init__(self) -> None:
        self.warm_ups = self.recordings = self.replays = 0
        self.changed: dict[int, Tensor] = {}
        """The memory from outside that differed between two replays of a graph, by address."""

    def warm_up(self, launch: Callable[[], None]) -> None:
        """Call `launch`."""
        self.warm_ups += 1
        launch()

    def record(self, launch: Callable[[], None]) -> Callable[[], None]:
        """Record `launch`, undo what it has computed, and return a function that calls its operators again."""
        self.recordings += 1
        with _Recording() as recording:
            launch()
        for address, before in recording.before.items():
            recording.outside[address].copy_(before)
        seen: dict[int, bytes] = {}

        def replay() -> None:
            self.replays += 1
            for address, memory in recording.outside.items():
                content = memory.numpy().tobytes()
                if seen.setdefault(address, content) != content:
                    self.changed[address] = memory
            with torch.no_grad():
                for call in recording.calls:
                    _call_again(call)

        return replay


def address_of(tensor: Tensor) -> int:
    """Return the address of the memory that holds `tensor`."""
    return tensor.untyped_storage().data_ptr()


def _bytes_of(tensor: Tensor) -> Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())


def _call_again(call: Call) -> None:
    returned = [value.alias_info for value in call.operator._schema.returns]
    is_view = bool(returned) and all(info is not None and not info.is_write for info in returned)
    if is_view or call.operator._opname in _ALLOCATIONS:
        return
    for result, again in zip(call.results, _tensors(call.operator(*call.args, **call.kwargs)), strict=True):
        if result is not again:
            result.copy_(again)


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
