"""What the ranks of a benchmark have in common: how they are joined, a folder, rows that rank 0 prints."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from benchmarks.launching import measure, module, on_ranks, tell
from benchmarks.timing import Ratio
from dist_train.cluster.communicator import Communicator, broadcast_str
from dist_train.cluster.rendezvous import join_ranks


@contextmanager
def shared_folder(comm: Communicator) -> Iterator[Path]:
    """Yield the same folder on all ranks; after the block they wait for each other before it is removed."""
    created = tempfile.mkdtemp() if comm.rank == 0 else ""
    folder = Path(broadcast_str(comm, created, "folder"))
    yield folder
    comm.barrier()
    if comm.rank == 0:
        shutil.rmtree(folder)


def tell_measured(measure_on: Callable[[Communicator], object], device: str = "cpu") -> None:
    """Join the other ranks, measure on every rank, and print the result of rank 0."""
    comm = join_ranks(timeout=600.0, device_type=device)
    measured = measure_on(comm)
    if comm.rank == 0:
        tell(measured)
    comm.close()


def tell_rows(rows_on: Callable[[Communicator], Iterable[Ratio]]) -> None:
    """Measure rows on every rank, and print those of rank 0, for `rows_of_two_ranks`."""
    tell_measured(lambda comm: [asdict(row) for row in rows_on(comm)])


def rows_of_two_ranks(controller: str, name: str, *arguments: object) -> Iterator[Ratio]:
    """Run the module `name` on two ranks over `controller`, and yield its rows."""
    yield from (Ratio(**row) for row in measure(on_ranks(controller, 2, module(name, *arguments))))
