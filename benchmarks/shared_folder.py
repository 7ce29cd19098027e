"""A temporary folder that all workers of a node use, removed once they are done."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dist_train.cluster.workers import Workers, broadcast_str


@contextmanager
def shared_folder(workers: Workers) -> Iterator[Path]:
    """Yield the folder, the same for all `workers`; after the block they wait for each other."""
    made = tempfile.mkdtemp() if workers.rank == 0 else ""
    folder = Path(broadcast_str(workers, made, "folder"))
    yield folder
    workers.barrier()
    if workers.rank == 0:
        shutil.rmtree(folder)
