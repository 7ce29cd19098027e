"""Lightning with its DDP strategy, as in its documentation: LightningModule, Trainer, `accumulate_grad_batches`."""

from __future__ import annotations

import logging
import warnings

import lightning
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.peers.work import Clock, Work, images_and_labels, sgd, vgg9, work_from_arguments


class Classifier(lightning.LightningModule):  # type: ignore[misc]  # not installed where types are checked
    """VGG9 and its training step."""

    def __init__(self, work: Work) -> None:
        """Hold the network."""
        super().__init__()
        self.model: nn.Module = vgg9(work.width)

    def training_step(self, batch: tuple[Tensor, Tensor], number: int) -> Tensor:
        """Return the loss of a micro-batch."""
        images, labels = batch
        return functional.cross_entropy(self.model(images.to(torch.float32).div_(255)), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer."""
        return sgd(self.model)


class Timing(lightning.Callback):  # type: ignore[misc]  # not installed where types are checked
    """Takes the time after every update, and stops after the last."""

    def __init__(self, work: Work) -> None:
        """Time `work`."""
        self.clock = Clock(work)
        self._passes = work.passes

    def on_train_batch_end(self, trainer: lightning.Trainer, *unused: object) -> None:
        """Take the time after the last micro-batch of an update."""
        if (trainer.fit_loop.total_batch_idx + 1) % self._passes == 0 and self.clock.update_ended():
            trainer.should_stop = True


def train(work: Work) -> None:
    """Make the updates."""
    loader = DataLoader(
        TensorDataset(*images_and_labels(work.samples)), batch_size=work.micro_batch, shuffle=True, drop_last=True
    )
    timing = Timing(work)
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=work.ranks,
        strategy="ddp" if work.ranks > 1 else "auto",
        accumulate_grad_batches=work.passes,
        max_epochs=-1,
        callbacks=[timing],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Classifier(work), loader)
    if trainer.is_global_zero:
        timing.clock.report()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    train(work_from_arguments())
