"""The least that a Horovod program does: import torch, meet, one allreduce. Tells when that was done.

`mpirun -np 2 python -m benchmarks.bare_horovod`
"""

from __future__ import annotations

import time

import horovod.torch as hvd
import torch

from benchmarks.launching import tell


def main() -> None:
    """Sum one number over the ranks, and tell the time since the epoch."""
    hvd.init()
    hvd.allreduce(torch.ones(1), name="one")
    if hvd.rank() == 0:
        tell(time.time())
    hvd.shutdown()


if __name__ == "__main__":
    main()
