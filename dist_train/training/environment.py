"""What a launch runs on: the versions of all that computes, and the device."""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path

import numpy as np
import torch

from dist_train.cluster.inspection import loaded_mpi_version


def launch_environment(revision: str, controller: str, device: torch.device) -> dict[str, str]:
    """Return names and versions for `status.json`.

    `revision` is dist_train's own; `controller` carries the ranks, by which MPI is used or not.
    """
    return {
        "dist_train": revision,
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": _installed("torchvision"),
        "Horovod": _installed("horovod"),
        "MPI": (loaded_mpi_version() or "unknown") if controller == "mpi" else f"not used ({controller})",
        "NumPy": np.__version__,
        "device": device_name(device),
    }


def device_name(device: torch.device, processors: Path = Path("/proc/cpuinfo")) -> str:
    """Return the name of the GPU, or of the processor as `processors` tells it, else its architecture."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = processors.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    # not told on every architecture
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.machine()


def _installed(package: str) -> str:
    # importing it only for its version would delay the first step
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
