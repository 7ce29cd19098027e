"""Rows that need two workers; every worker runs this module, worker 0 prints the rows as JSON.

`horovodrun -np 2 --gloo python -m benchmarks.two_workers GLOBAL_SIZE PAIRS`
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from benchmarks.subject import QUIET, open_trainer, settings
from benchmarks.timing import Ratio, compare
from dist_train.cluster.joining import join_workers
from dist_train.cluster.workers import Workers, share_text

_MARK = "ratio: "


def reduction_row(workers: Workers, global_size: int, pairs: int) -> Ratio:
    """Return the step time of the exact reduction over the float one, VGG9 width 1."""
    folder = Path(share_text(workers, tempfile.mkdtemp(), "folder"))
    sides = {
        reduction: open_trainer(
            settings(1.0, global_size, **{**QUIET, "comm": {"verify_every": 0, "reduction": reduction}}),
            workers,
            folder / reduction,
        )
        for reduction in ("exact", "float")
    }
    return compare(
        f"reduction, width 1, batch {global_size}, {workers.size} workers over {workers.controller}",
        ("exact", sides["exact"].advance),
        ("float", sides["float"].advance),
        pairs=pairs,
        bar=1.03 if global_size == 8192 else None,
        warm_up=1,
    )


def launch(controller: str, global_size: int, pairs: int) -> Ratio:
    """Run this module on two workers and return its row."""
    bin_folder = Path(sys.executable).parent
    launcher = {
        "gloo": [str(bin_folder / "horovodrun"), "-np", "2", "--gloo", "--network-interface", "lo"],
        "mpi": ["mpirun", "-np", "2", "--bind-to", "none", "--oversubscribe"],
    }[controller]
    program = [sys.executable, "-m", "benchmarks.two_workers", str(global_size), str(pairs)]
    environment = dict(os.environ)
    if os.geteuid() == 0:
        environment |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    ended = subprocess.run(
        [*launcher, *program], env=environment, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True, check=True
    )
    output = ended.stdout
    [line] = [line for line in output.splitlines() if _MARK in line]
    return Ratio(**json.loads(line.split(_MARK, 1)[1]))


def main() -> None:
    """Measure on every worker, print on the first."""
    global_size, pairs = map(int, sys.argv[1:])
    workers = join_workers(timeout=600.0, device_type="cpu")
    row = reduction_row(workers, global_size, pairs)
    workers.barrier()
    if workers.rank == 0:
        print(_MARK + json.dumps(asdict(row)), flush=True)
    workers.close()


if __name__ == "__main__":
    main()
