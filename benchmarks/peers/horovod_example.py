"""Training in the style of Horovod's examples: a DataLoader with a loader process, `backward_passes_per_step`, and loss
and accuracy of every batch averaged over the ranks.
"""

from __future__ import annotations

import horovod.torch as hvd
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler
from torchvision import transforms

from benchmarks.peers.work import Clock, Work, images_and_labels, sgd, vgg9, work_from_arguments


class Images(Dataset[tuple[Tensor, int]]):
    """Images as torchvision's data sets hold them: bytes, and a transform for each sample."""

    def __init__(self, samples: int) -> None:
        """Hold `samples` images."""
        images, self._labels = images_and_labels(samples)
        self._images = images.permute(0, 2, 3, 1).contiguous().numpy()
        self._transform = transforms.ToTensor()

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return an image as float32 [3, 32, 32] in [0, 1], and its label."""
        return self._transform(self._images[index]), int(self._labels[index])


class Metric:
    """A value averaged over ranks and batches, as in the examples."""

    def __init__(self, name: str) -> None:
        """Start at 0."""
        self._name = name
        self._sum = torch.tensor(0.0)
        self._count = 0

    def update(self, value: Tensor) -> None:
        """Add the ranks' mean of `value`."""
        self._sum += hvd.allreduce(value.detach().cpu(), name=self._name)
        self._count += 1


def train(work: Work) -> None:
    """Make the updates."""
    data = Images(work.samples)
    sampler: DistributedSampler[tuple[Tensor, int]] = DistributedSampler(data, num_replicas=hvd.size(), rank=hvd.rank())
    share = work.batch // work.ranks
    loader = DataLoader(data, batch_size=share, sampler=sampler, num_workers=1, drop_last=True)
    model = vgg9(work.width)
    optimizer = hvd.DistributedOptimizer(
        sgd(model), named_parameters=model.named_parameters(), backward_passes_per_step=work.passes
    )
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    loss_of_training, accuracy = Metric("train_loss"), Metric("train_accuracy")
    clock = Clock(work)
    epoch = 0
    while True:
        sampler.set_epoch(epoch)
        epoch += 1
        for images, labels in loader:
            optimizer.zero_grad()
            for inputs, targets in zip(images.split(work.micro_batch), labels.split(work.micro_batch), strict=True):
                output = model(inputs)
                accuracy.update((output.argmax(1) == targets).float().mean())
                loss = functional.cross_entropy(output, targets)
                loss_of_training.update(loss)
                loss.div_(work.passes)
                loss.backward()
            optimizer.step()
            if clock.update_ended():
                return clock.report() if hvd.rank() == 0 else None


if __name__ == "__main__":
    asked = work_from_arguments()
    hvd.init()
    train(asked)
