"""Ranks begin with different weights and momentum; after the broadcast all have rank 0's, in the same buffers."""

from __future__ import annotations

import torch

from dist_train.cluster.communicator import gather
from dist_train.cluster.rendezvous import join_ranks
from dist_train.config import parse_config
from dist_train.models import build_model
from dist_train.optim.flat_weights import FlatWeights, digest
from dist_train.optim.optimizers import build_optimizer, state_tensors
from tests.launching import small_settings
from tests.unit.small_trainers import state_of
from tests.waiting import PATIENCE

if __name__ == "__main__":
    comm = join_ranks(timeout=PATIENCE, device_type="cpu")
    settings = small_settings(run={"seed": comm.rank}, optimizer={"weight_decay": 0.1})
    config = parse_config(settings, source="test")
    model = build_model(config)
    weights = FlatWeights(model)
    optimizer = build_optimizer(config.optimizer, weights)
    for tensor in state_tensors(optimizer):
        tensor.fill_(comm.rank + 1.0)
    before = gather(comm, [digest(weights.values)], "before")
    assert before[0] != before[1]
    state_of(model, weights, optimizer).broadcast(comm)
    assert digest(weights.values) == before[0][0]
    assert all(bool((tensor == 1.0).all()) for tensor in state_tensors(optimizer))
    assert torch.equal(next(model.parameters()).flatten(), weights.values[: next(model.parameters()).numel()])
    print("equal", flush=True)
    comm.barrier()
    comm.close()
