"""Networks as the scaling model sees them, and what Horovod's authors measured with them."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor, nn
from torchvision.models import inception_v3, resnet101, vgg16

from benchmarks.scaling_model import Compute, Horovod, Job, Layer, Link, Network, weak_efficiency
from benchmarks.subject import settings
from dist_train.models import build_model

_FUSION_BYTES = 64 << 20
"""Horovod's fusion buffer: gradients that are ready in one cycle are sent together, up to so many bytes."""


@dataclass(frozen=True)
class Published:
    """A figure of the Horovod paper: a batch of 64 a GPU, float32, 128 nodes of 4 Pascal GPUs, 25 Gbit/s Ethernet.

    `rate` is images a second of one P100 by TensorFlow's own benchmarks of May 2017 (ResNet-101: by multiply-adds
    between ResNet-50's and ResNet-152's). `over_tcp` follows from what the paper says RDMA gained.
    """

    name: str
    layers: tuple[Layer, ...]
    rate: float
    over_rdma: float
    over_tcp: float


@dataclass(frozen=True)
class Fabric:
    """The paper's machines: what of the wire's 25 Gbit/s RDMA and TCP reach, and the latencies. Assumptions."""

    rdma_share: float = 0.9
    tcp_share: float = 0.6
    wire: float = 25e9 / 8
    within: Link = field(default_factory=lambda: Link(5e-6, 10e9))
    rdma_latency: float = 15e-6
    tcp_latency: float = 30e-6

    def network(self, transport: str) -> Network:
        """Return the network over `transport`, rdma or tcp."""
        if transport == "rdma":
            return Network(self.within, Link(self.rdma_latency, self.rdma_share * self.wire), 4, "ring")
        return Network(self.within, Link(self.tcp_latency, self.tcp_share * self.wire), 4, "ring")


@dataclass(frozen=True)
class Check:
    """A published efficiency beside the model's, without waiting for slow ranks and with it."""

    name: str
    transport: str
    published: float
    network_alone: float
    with_jitter: float


PUBLISHED_RANKS = 512
_PUBLISHED_HOROVOD = Horovod(cycle=5e-3, hop=20e-6)


def layers_of(network: nn.Module, image: tuple[int, int, int]) -> tuple[Layer, ...]:
    """Return the layers of `network` that have weights, in the order in which one `image` goes through them."""
    found: list[Layer] = []

    def note(module: nn.Module, _: object, output: Tensor) -> None:
        weights = sum(parameter.numel() for parameter in module.parameters())
        multiply_adds = 0
        if isinstance(module, nn.Conv2d | nn.Linear):
            multiply_adds = module.weight.numel() * output[0].numel() // output.shape[1]
        if weights:
            found.append(Layer(weights, multiply_adds))

    leaves = [module for module in network.modules() if not list(module.children())]
    hooks = [module.register_forward_hook(note) for module in leaves]
    device = next(network.parameters()).device
    with torch.no_grad():
        network.eval()(torch.zeros(1, *image, device=device))
    for hook in hooks:
        hook.remove()
    return tuple(found)


@cache
def vgg9(width: float = 1.0) -> tuple[Layer, ...]:
    """Return the layers of our VGG9 for 3x32x32 images."""
    return layers_of(build_model(settings(width, 8192)), (3, 32, 32))


@cache
def published() -> tuple[Published, ...]:
    """Return the paper's three networks and figures."""
    with torch.device("meta"):  # no memory, no arithmetic: shapes alone
        inception = layers_of(inception_v3(aux_logits=False, init_weights=False), (3, 299, 299))
        residual = layers_of(resnet101(), (3, 224, 224))
        vgg = layers_of(vgg16(init_weights=False), (3, 224, 224))
    return (
        Published("Inception V3", inception, 142.0, 0.90, 0.87),
        Published("ResNet-101", residual, 129.0, 0.90, 0.87),
        Published("VGG-16", vgg, 154.0, 0.68, 0.52),
    )


def published_job(figure: Published) -> Job:
    """Return a GPU's part of the training that was measured."""
    return Job(figure.layers, 64, 64, weight_bytes=4, bucket=_FUSION_BYTES // 4)


def modelled(figure: Published, fabric: Fabric, transport: str, jitter: float) -> float:
    """Return the efficiency on 512 GPUs by the model."""
    compute = Compute(figure.rate, jitter=jitter)
    network = fabric.network(transport)
    return weak_efficiency(published_job(figure), compute, network, _PUBLISHED_HOROVOD, PUBLISHED_RANKS)


def jitter_of(figure: Published, fabric: Fabric) -> float:
    """Return the jitter with which the model gives the published efficiency of `figure` over RDMA."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if modelled(figure, fabric, "rdma", middle) > figure.over_rdma:
            low = middle
        else:
            high = middle
    return low


def checks(figures: tuple[Published, ...], fabric: Fabric, jitter: float) -> list[Check]:
    """Return all figures, over RDMA and over TCP."""
    return [
        Check(
            figure.name,
            transport,
            figure.over_rdma if transport == "rdma" else figure.over_tcp,
            modelled(figure, fabric, transport, 0.0),
            modelled(figure, fabric, transport, jitter),
        )
        for transport in ("rdma", "tcp")
        for figure in figures
    ]
