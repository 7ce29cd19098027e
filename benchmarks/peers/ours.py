"""dist-train itself: nothing but updates, without noise."""

from __future__ import annotations

import tempfile
from pathlib import Path

from benchmarks.peers.work import Clock, Work, work_from_arguments
from benchmarks.subject import QUIET, open_trainer, settings
from dist_train.cluster.joining import join_workers
from dist_train.cluster.workers import Workers, share_text


def train(work: Work, workers: Workers) -> None:
    """Make the updates."""
    config = settings(
        work.width,
        work.batch,
        data={"synthetic_samples": work.samples},
        batch={"global_size": work.batch, "micro_size": work.micro_batch},
        model={"name": "vgg9", "width": work.width, "norm": "ghost", "ghost_size": work.micro_batch},
        **QUIET,
    )
    folder = Path(share_text(workers, tempfile.mkdtemp(), "folder"))
    trainer = open_trainer(config, workers, folder / "run")
    clock = Clock(work)
    trainer.advance()
    while not clock.update_ended():
        trainer.advance()
    workers.barrier()
    if workers.rank == 0:
        clock.report()


if __name__ == "__main__":
    asked = work_from_arguments()
    joined = join_workers(timeout=600.0, device_type="cpu")
    train(asked, joined)
    joined.close()
