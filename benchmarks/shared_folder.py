"""A temporary folder that all ranks of a node use, removed once they are done."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dist_train.cluster.communicator import Communicator, broadcast_str


@contextmanager
def shared_folder(comm: Communicator) -> Iterator[Path]:
    """Yield the same folder on all ranks; after the block they wait for each other before it is removed."""
    created = tempfile.mkdtemp() if comm.rank == 0 else ""
    folder = Path(broadcast_str(comm, created, "folder"))
    yield folder
    comm.barrier()
    if comm.rank == 0:
        shutil.rmtree(folder)
