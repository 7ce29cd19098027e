"""Networks for the scaling model, and published measurements of them by Horovod's authors and NVIDIA."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cache

import torch
from scipy.optimize import brentq
from torch import Tensor, nn
from torchvision.models import inception_v3, resnet50, resnet101, vgg16

from benchmarks.scaling_model import Compute, Coordination, Job, Layer, Link, Network, weak_efficiency
from benchmarks.subject import settings
from dist_train.models import build_model

_FUSION_BYTES = 64 << 20
"""Horovod's fusion buffer: gradients that are ready in one cycle are sent together, up to this size."""


@dataclass(frozen=True)
class Published:
    """Results of the Horovod paper: batch 64 per GPU, float32, 128 nodes of 4 Pascal GPUs, 25 Gbit/s Ethernet.

    `rate` is the images per second of one P100 in TensorFlow's benchmarks of May 2017 (ResNet-101: interpolated by
    multiply-adds between ResNet-50 and ResNet-152). `over_tcp` follows from the paper's gain by RDMA.
    """

    name: str
    layers: tuple[Layer, ...]
    rate: float
    over_rdma: float
    over_tcp: float


@dataclass(frozen=True)
class Fabric:
    """The paper's machines: the shares of 25 Gbit/s that RDMA and TCP reach, latencies, jitter of a rank's time.

    All are assumed except `tcp_share` and `jitter`, which `calibrated` fits.
    """

    rdma_share: float = 0.9
    tcp_share: float = 0.6
    wire: float = 25e9 / 8
    within: Link = field(default_factory=lambda: Link(5e-6, 10e9))
    rdma_latency: float = 15e-6
    tcp_latency: float = 30e-6
    jitter: float = 0.0

    def network(self, transport: str) -> Network:
        """Return the network over `transport`, rdma or tcp."""
        if transport == "rdma":
            return Network(self.within, Link(self.rdma_latency, self.rdma_share * self.wire), 4, "ring")
        return Network(self.within, Link(self.tcp_latency, self.tcp_share * self.wire), 4, "ring")


@dataclass(frozen=True)
class Check:
    """A published efficiency and the model's, without and with waiting for slow ranks.

    `fitted` names the parameter fitted to this figure; if empty, the figure is predicted.
    """

    name: str
    over: str
    published: float
    network_alone: float
    with_jitter: float
    fitted: str = ""


PUBLISHED_RANKS = 512
A100_TF32, A100_MIXED = 938.0, 2470.0
"""Images/s of ResNet-50 training on one A100 80GB, batch 256: NVIDIA DeepLearningExamples, PyTorch 21.03."""
RESNET50_RATES = (A100_TF32, A100_MIXED, 5000.0)
"""The last is about twice the A100's, for an H100: assumed, without a source."""
NVLINK = Link(5e-6, 150e9)
"""A GPU's link to its neighbours in a node, for an allreduce; assumed."""
_PUBLISHED_COORDINATION = Coordination(cycle=5e-3, hop=20e-6)


def layers_of(network: nn.Module, image: tuple[int, int, int]) -> tuple[Layer, ...]:
    """Return the layers of `network` that have weights, in the order of a forward pass of one `image`."""
    found: list[Layer] = []

    def record_layer(module: nn.Module, _: object, output: Tensor) -> None:
        weights = sum(parameter.numel() for parameter in module.parameters())
        filters = sum(len(parameter) if parameter.dim() > 1 else 1 for parameter in module.parameters())
        multiply_adds = 0
        if isinstance(module, nn.Conv2d | nn.Linear):
            multiply_adds = module.weight.numel() * output[0].numel() // output.shape[1]
        if weights:
            found.append(Layer(weights, multiply_adds, filters))

    leaves = [module for module in network.modules() if not list(module.children())]
    hooks = [module.register_forward_hook(record_layer) for module in leaves]
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
def resnet50_layers() -> tuple[Layer, ...]:
    """Return the layers of torchvision's ResNet-50 for 3x224x224 images."""
    with torch.device("meta"):  # shapes only, without memory or arithmetic
        return layers_of(resnet50(), (3, 224, 224))


@cache
def published() -> tuple[Published, ...]:
    """Return the paper's three networks and results."""
    with torch.device("meta"):
        inception = layers_of(inception_v3(aux_logits=False, init_weights=False), (3, 299, 299))
        residual = layers_of(resnet101(), (3, 224, 224))
        vgg = layers_of(vgg16(init_weights=False), (3, 224, 224))
    return (
        Published("Inception V3", inception, 142.0, 0.90, 0.87),
        Published("ResNet-101", residual, 129.0, 0.90, 0.87),
        Published("VGG-16", vgg, 154.0, 0.68, 0.52),
    )


def published_job(figure: Published) -> Job:
    """Return the per-GPU job of the measured training."""
    return Job(figure.layers, 64, 64, weight_bytes=4, bucket=_FUSION_BYTES // 4)


def modelled(figure: Published, fabric: Fabric, transport: str) -> float:
    """Return the efficiency on 512 GPUs by the model."""
    compute = Compute(figure.rate, jitter=fabric.jitter)
    network = fabric.network(transport)
    return weak_efficiency(published_job(figure), compute, network, _PUBLISHED_COORDINATION, PUBLISHED_RANKS)


def calibrated(figures: tuple[Published, ...], fabric: Fabric) -> Fabric:
    """Return `fabric` with two parameters fitted.

    The jitter is fitted to the first figure over RDMA, then TCP's share of the bandwidth to the last figure over TCP.
    """

    def over_rdma(jitter: float) -> float:
        return modelled(figures[0], replace(fabric, jitter=jitter), "rdma") - figures[0].over_rdma

    jittered = replace(fabric, jitter=float(brentq(over_rdma, 0.0, 1.0)))

    def over_tcp(share: float) -> float:
        return modelled(figures[-1], replace(jittered, tcp_share=share), "tcp") - figures[-1].over_tcp

    return replace(jittered, tcp_share=float(brentq(over_tcp, 0.05, 1.0)))


def checks(figures: tuple[Published, ...], fabric: Fabric) -> list[Check]:
    """Return all figures over RDMA and TCP, with the model of the `calibrated` fabric, and NVIDIA's."""
    found = [
        Check(
            f"{figure.name}, {PUBLISHED_RANKS} GPUs",
            "RDMA" if transport == "rdma" else "TCP",
            figure.over_rdma if transport == "rdma" else figure.over_tcp,
            modelled(figure, replace(fabric, jitter=0.0), transport),
            modelled(figure, fabric, transport),
            {("rdma", figures[0]): "jitter", ("tcp", figures[-1]): "TCP's share"}.get((transport, figure), ""),
        )
        for transport in ("rdma", "tcp")
        for figure in figures
    ]
    return [*found, *(_in_one_node(*row, fabric.jitter) for row in _ONE_NODE)]


_ONE_NODE = (("TF32", A100_TF32, 7248.0), ("mixed precision", A100_MIXED, 16621.0))
"""ResNet-50 on the 8 GPUs of a DGX A100: precision, images/s of one and of eight (NVIDIA). Gradients are float32."""


def _in_one_node(precision: str, rate: float, eight: float, jitter: float) -> Check:
    job = Job(resnet50_layers(), 256, 256, weight_bytes=4, bucket=(25 << 20) // 4)
    network = Network(NVLINK, NVLINK, 8, "ring")
    alone, jittered = (
        weak_efficiency(job, Compute(rate, jitter=each), network, Coordination(0.0, 0.0), 8) for each in (0.0, jitter)
    )
    return Check(f"ResNet-50, {precision}, 8 GPUs", "NVLink", eight / (8 * rate), alone, jittered)
