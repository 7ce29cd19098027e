"""dist-train itself: only updates, without noise."""

from __future__ import annotations

from benchmarks.peers.work import Clock, Work, work_from_arguments
from benchmarks.ranks import shared_folder
from benchmarks.subject import QUIET, open_trainer, settings
from dist_train.cluster.communicator import Communicator
from dist_train.cluster.rendezvous import join_ranks


def train(work: Work, comm: Communicator) -> None:
    """Make the updates."""
    config = settings(
        work.width,
        work.batch,
        data={"synthetic_samples": work.samples},
        batch={"global_size": work.batch, "micro_size": work.micro_batch},
        model={"name": "vgg9", "width": work.width, "norm": "ghost", "ghost_size": work.micro_batch},
        **QUIET,
    )
    clock = Clock(work)
    with shared_folder(comm) as folder:
        trainer = open_trainer(config, comm, folder / "run")
        trainer.advance()
        while not clock.update_ended():
            trainer.advance()
    if comm.rank == 0:
        clock.report()


if __name__ == "__main__":
    asked = work_from_arguments()
    joined = join_ranks(timeout=600.0, device_type="cpu", micro_batches=asked.batch // asked.micro_batch)
    train(asked, joined)
    joined.close()
