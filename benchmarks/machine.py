"""The machine and the versions that measurements come from."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from dist_train.cluster.devices import device_name, device_type
from dist_train.cluster.inspection import installed_version

_PACKAGES = ("torch", "torchvision", "numpy", "horovod", "mpi4py")


@dataclass(frozen=True)
class Machine:
    """Processor, cores available to this process, memory in bytes, compute device, versions, date."""

    processor: str
    cores: int
    memory_bytes: int
    device: str
    versions: Mapping[str, str]
    date: str

    def in_words(self) -> str:
        """Return a description in one line."""
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        device = "" if self.device == "cpu" else f", {self.device}"
        return f"{self.cores} cores of {self.processor}{device}, {versions}, {self.date}"


def this_machine() -> Machine:
    """Return the machine that this process runs on."""
    installed = {name: version for name in _PACKAGES if (version := installed_version(name))}
    return Machine(
        processor=device_name(torch.device("cpu")),
        cores=len(os.sched_getaffinity(0)),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        device=device_name(torch.device("cuda")) if device_type() == "cuda" else "cpu",
        # Only torch.__version__ includes the CUDA version of PyPI's torch.
        versions={"Python": platform.python_version(), **installed, "torch": torch.__version__},
        date=time.strftime("%Y-%m-%d"),
    )
