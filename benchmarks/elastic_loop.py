"""A rank of `benchmarks.elastic`: VGG9 under Horovod Elastic, as its users write it, committing every update.

`horovodrun ... python -m benchmarks.elastic_loop FOLDER STEPS FAIL_AT`; rank 0 appends a line for each update to
FOLDER/steps, every rank writes its process id to FOLDER/rank-<rank>. At update FAIL_AT, unless it is 0, the rank that
started as rank 1 raises an exception.
"""

from __future__ import annotations

import hashlib
import os
import sys
import time
from pathlib import Path
from typing import Any

import horovod.torch as hvd
import torch
from torch.nn import functional

from benchmarks.bare_loop import bare_vgg9
from benchmarks.elastic_task import GLOBAL_SIZE, WIDTH


def main() -> None:
    """Train to the end, even if other ranks are lost."""
    folder, steps, fail_at = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    hvd.init()
    (folder / f"rank-{hvd.rank()}").write_text(str(os.getpid()))
    began_as = hvd.rank()
    torch.manual_seed(0)
    model = bare_vgg9(3, 10, WIDTH)
    images = torch.rand(4 * GLOBAL_SIZE, 3, 32, 32)
    labels = torch.randint(0, 10, (len(images),))
    plain = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True)
    optimizer = hvd.DistributedOptimizer(plain, named_parameters=model.named_parameters())

    @hvd.elastic.run  # type: ignore[untyped-decorator]
    def train(state: Any) -> None:
        while state.step < steps:
            if state.step + 1 == fail_at and began_as == 1:
                raise ValueError("an exception in the training code")
            start = state.step % 4 * GLOBAL_SIZE
            share = GLOBAL_SIZE // hvd.size()
            mine = slice(start + hvd.rank() * share, start + (hvd.rank() + 1) * share)
            optimizer.zero_grad()
            functional.cross_entropy(model(images[mine]), labels[mine]).backward()
            optimizer.step()
            state.step += 1
            state.commit()
            if hvd.rank() == 0:
                with (folder / "steps").open("a") as lines:
                    lines.write(f"{state.step} {time.time()}\n")

    # The optimizer before the model: broadcasting its state takes a step, which changes the weights.
    train(hvd.elastic.TorchState(own_optimizer=optimizer, own_model=model, step=0))
    if hvd.rank() == 0:
        weights = b"".join(tensor.contiguous().numpy().tobytes() for tensor in model.state_dict().values())
        (folder / "digest").write_text(hashlib.sha256(weights).hexdigest())


if __name__ == "__main__":
    main()
