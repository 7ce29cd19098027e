"""The state that all ranks begin from: rank 0's, from a checkpoint or fresh."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dist_train.cluster.communicator import Communicator
from dist_train.optim.flat_weights import FlatWeights
from dist_train.optim.optimizers import state_tensors
from dist_train.outcome import UsageError
from dist_train.training.checkpoints import Contents


def load_into(contents: Contents, model: nn.Module, optimizer: Optimizer) -> None:
    """Copy what a checkpoint holds into `model` and `optimizer`.

    Raises:
        UsageError: it is of another model or optimizer.
    """
    try:
        model.load_state_dict(contents.model)
        # Right for an optimizer that nothing wraps: a wrapper would forget what is loaded before it.
        optimizer.load_state_dict({**contents.optimizer})
    except (RuntimeError, ValueError) as error:
        raise UsageError(f"the checkpoint is of another model or optimizer: {error}") from error


def broadcast_state(comm: Communicator, model: nn.Module, weights: FlatWeights, optimizer: Optimizer) -> None:
    """Give every rank rank 0's state: the optimizer's, the model's buffers, the weights.

    Horovod's own broadcast of the optimizer makes a step on ranks without state, and so moves their
    weights; here every rank has the whole state from the beginning. What is of one type and device travels as
    one tensor: each broadcast costs a round of all ranks.
    """
    parameters = {name for name, _ in model.named_parameters()}
    buffers = [value for name, value in model.state_dict().items() if name not in parameters]
    alike: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in (*(tensor for _, tensor in state_tensors(optimizer)), *buffers, weights.values):
        alike.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    with torch.no_grad():
        for index, tensors in enumerate(alike.values()):
            flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
            comm.broadcast(flat, f"state.{index}")
            for tensor, received in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
                tensor.copy_(received.view_as(tensor))
