"""Ignite, as in its documentation: a supervised trainer, distributed with `idist`."""

from __future__ import annotations

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events, create_supervised_trainer
from torch import Tensor
from torch.nn import functional
from torch.utils.data import TensorDataset

from benchmarks.peers.work import Clock, Work, images_and_labels, sgd, vgg9, work_from_arguments


def train(local_rank: int, work: Work) -> None:
    """Make the updates."""
    loader = idist.auto_dataloader(
        TensorDataset(*images_and_labels(work.samples)),
        batch_size=work.micro_batch * work.ranks,
        shuffle=True,
        drop_last=True,
    )
    model = idist.auto_model(vgg9(work.width))
    optimizer = idist.auto_optim(sgd(model))

    def prepare(batch: tuple[Tensor, Tensor], device: object, non_blocking: bool) -> tuple[Tensor, Tensor]:
        images, labels = batch
        return images.to(torch.float32).div_(255), labels

    trainer = create_supervised_trainer(
        model,
        optimizer,
        functional.cross_entropy,
        prepare_batch=prepare,
        gradient_accumulation_steps=work.passes,
    )
    clock = Clock(work)

    def record_time(engine: Engine) -> None:
        if clock.update_ended():
            engine.terminate()

    trainer.add_event_handler(Events.ITERATION_COMPLETED(every=work.passes), record_time)
    trainer.run(loader, max_epochs=1_000_000)
    if idist.get_rank() == 0:
        clock.report()


if __name__ == "__main__":
    asked = work_from_arguments()
    processes = {"backend": "gloo", "nproc_per_node": asked.ranks} if asked.ranks > 1 else {}
    with idist.Parallel(**processes) as parallel:
        parallel.run(train, asked)
