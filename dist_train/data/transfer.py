"""Copies from the machine's memory to the device, while it computes."""

from __future__ import annotations

import torch
from torch import Tensor


def move(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy to the device without making the host wait; on a CPU, nothing is copied."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def staging_buffer(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return memory that can be copied to `device` without a wait: `buffer.to(device, non_blocking=True)`.

    torch keeps a pinned block from being reused until the copy out of it is done.
    """
    return torch.empty(shape, dtype=dtype, pin_memory=device.type == "cuda")
