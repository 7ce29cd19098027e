"""Rows of gradient reductions on two ranks; every rank runs this module, rank 0 prints the row as JSON.

`horovodrun -np 2 --gloo python -m benchmarks.two_ranks REDUCTION GLOBAL_SIZE PAIRS`
"""

from __future__ import annotations

import sys

from benchmarks.ranks import rows_of_two_ranks, shared_folder, tell_rows
from benchmarks.subject import QUIET, open_trainer, settings
from benchmarks.timing import Ratio, compare
from dist_train.cluster.communicator import Communicator

_BARS = {("exact", 8192): 1.03, ("exact32", 128): 1.02}


def reduction_row(comm: Communicator, which: str, global_size: int, pairs: int) -> Ratio:
    """Return the step time with the reduction `which` over that with float, for VGG9 of width 1."""
    name = "reduction" if which == "exact" else f"reduction {which}"
    with shared_folder(comm) as folder:
        sides = {
            reduction: open_trainer(
                settings(1.0, global_size, **{**QUIET, "comm": {"verify_every": 0, "reduction": reduction}}),
                comm,
                folder / reduction,
            )
            for reduction in (which, "float")
        }
        return compare(
            f"{name}, width 1, batch {global_size}, {comm.size} ranks over {comm.backend}",
            (which, sides[which].advance),
            ("float", sides["float"].advance),
            pairs=pairs,
            bar=_BARS.get((which, global_size)),
            # exact32's first update has no grids yet and sums in 64 bits.
            warm_up=2 if which == "exact32" else 1,
            images=global_size,
        )


def launch(controller: str, reduction: str, global_size: int, pairs: int) -> Ratio:
    """Run this module on two ranks and return its row."""
    [row] = rows_of_two_ranks(controller, "benchmarks.two_ranks", reduction, global_size, pairs)
    return row


if __name__ == "__main__":
    tell_rows(lambda comm: [reduction_row(comm, sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))])
