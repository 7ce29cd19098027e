"""Rows of the number of kernels that a step starts on a GPU, or of operators on a CPU, by torch's profiler."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

from benchmarks.noise_cost import SCALES
from benchmarks.perturbation import BY_TENSOR, perturb_by_tensor, perturb_ours
from benchmarks.subject import QUIET, open_trainer, settings
from benchmarks.timing import Ratio, ratio_of
from dist_train.cluster.communicator import SingleProcess
from dist_train.cluster.devices import device_type

_NO_KERNEL = frozenset(
    f"aten::{name}"
    for name in (
        "_has_compatible_shallow_copy_type",
        "alias",
        "as_strided",
        "detach",
        "empty",
        "empty_strided",
        "lift_fresh",
        "resize_",
        "view",
    )
)
"""Operators that only create views or allocate memory."""


def rows(width: float) -> Iterator[Ratio]:
    """Yield counts: a noisy step over a plain one for each scale, and our perturbation over the reference's."""
    unit = "kernels" if device_type() == "cuda" else "operators"
    plain = started_by_step(width, "none", "absolute")
    for scale in SCALES:
        counts = [(float(started_by_step(width, "smoothout", scale)), float(plain))]
        title = f"{unit} of a step, width {width:g}, batch 128, scale {scale}"
        yield ratio_of(title, "SmoothOut", "no noise", counts, None, unit=unit)
    counts = [(float(started(perturb_ours(width))), float(started(perturb_by_tensor(width))))]
    yield ratio_of(f"{unit} of perturb and restore, width {width:g}", "SmoothOut", BY_TENSOR, counts, 0.5, unit=unit)


def started_by_step(width: float, method: str, scale: str) -> int:
    """Return the number of kernels or operators of one update of VGG9 of `width` with the noise."""
    noise = {"method": method, "scale": scale, "amplitude": 1e-4}
    with tempfile.TemporaryDirectory() as folder:
        trainer = open_trainer(settings(width, 128, noise=noise, **QUIET), SingleProcess(), Path(folder) / "run")
        for _ in range(2):
            trainer.advance()
        count = started(trainer.advance)
        trainer.close()
    return count


def started(call: Callable[[], object]) -> int:
    """Return the number of kernels that `call` starts on the GPU, or of operators on the CPU if there is no GPU."""
    call()
    on_gpu = device_type() == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiled:
        call()
        if on_gpu:
            torch.cuda.synchronize()
    events = profiled.events() or []
    return kernels(events) if on_gpu else operators(events)


def kernels(events: Sequence[FunctionEvent]) -> int:
    """Return the number of kernels among `events`, without copies, fills and named ranges."""
    return sum(
        event.device_type.name == "CUDA" and not event.is_user_annotation and not event.name.startswith("Mem")
        for event in events
    )


def operators(events: Sequence[FunctionEvent]) -> int:
    """Return the number of operators among `events` that compute something and call no other operator."""
    return sum(
        event.name.startswith("aten::") and event.name not in _NO_KERNEL and not event.cpu_children for event in events
    )
