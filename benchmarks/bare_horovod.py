"""A minimal Horovod program: import torch, connect, one allreduce. Prints the time when that was done.

`mpirun -np 2 python -m benchmarks.bare_horovod`
"""

from __future__ import annotations

import time

import horovod.torch as hvd
import torch

from benchmarks.launching import tell


def main() -> None:
    """Sum one number over the ranks, and print the time in seconds since 1970."""
    hvd.init()
    hvd.allreduce(torch.ones(1), name="one")
    if hvd.rank() == 0:
        tell(time.time())
    hvd.shutdown()


if __name__ == "__main__":
    main()
