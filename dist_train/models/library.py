"""Models of torchvision and timm by name, `torchvision:resnet50` or `timm:resnet50`, with the run's kind of norm."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from dist_train.config import ImageFormat
from dist_train.models.norms import NormFactory
from dist_train.outcome import UsageError

Builder = Callable[..., nn.Module]


def torchvision_model(name: str) -> Builder:
    """Return what builds torchvision's model `name`, `options` being its keywords. Raises UsageError."""
    from torchvision import models

    _check_known(name, models.list_models(module=models), "torchvision")

    def build(images: ImageFormat, width: float, norm: NormFactory, options: dict[str, Any]) -> nn.Module:
        if images.shape[0] != 3:
            raise UsageError(
                f"torchvision's models take 3 channels, not {images.shape[0]}: use timm:{name}", code="library-model"
            )
        _refuse_weights(f"torchvision:{name}", options, "weights", "weights_backbone")
        return _made(f"torchvision:{name}", models.get_model(name, num_classes=images.classes, **options), width, norm)

    return build


def timm_model(name: str) -> Builder:
    """Return what builds timm's model `name`, `options` being keywords of `timm.create_model`. Raises UsageError."""
    import timm

    _check_known(name, timm.list_models(), "timm")

    def build(images: ImageFormat, width: float, norm: NormFactory, options: dict[str, Any]) -> nn.Module:
        _refuse_weights(f"timm:{name}", options, "pretrained", "checkpoint_path")
        given: Mapping[str, Any] = {"in_chans": images.shape[0], "num_classes": images.classes, **options}
        return _made(f"timm:{name}", timm.create_model(name, **given), width, norm)

    return build


def _check_known(name: str, known: Collection[str], library: str) -> None:
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {library}:{close[0]}?" if close else ""
        raise UsageError(f"{library} has no model {name}{hint}", code="plugin-missing")


def _refuse_weights(name: str, options: Mapping[str, Any], *loading: str) -> None:
    """Refuse the options that load weights: the run's initial ones would silently replace them."""
    if given := [option for option in loading if options.get(option)]:
        raise UsageError(
            f"{name}: model.options.{given[0]} would be overwritten by the weights of the seed; name weights by "
            f"run.init_from: a file, or torchvision:NAME",
            code="library-model",
        )


def _made(name: str, model: nn.Module, width: float, norm: NormFactory) -> nn.Module:
    """Return `model` with each of its batch norms replaced by one of `norm`."""
    if width != 1.0:
        raise UsageError(
            f"{name} has the width that its own options give it: set model.width to 1", code="library-model"
        )
    for place, module in list(model.named_modules()):
        if _draws(module):
            raise UsageError(
                f"{name} draws at random in {place}, which would depend on how samples are dealt out: "
                f"switch that off by model.options, as in dropout: 0",
                code="library-model",
            )
        if isinstance(module, _BatchNorm):
            parent, _, last = place.rpartition(".")
            setattr(model.get_submodule(parent), last, norm(module.num_features))
    return model


def _draws(module: nn.Module) -> bool:
    """Whether `module` draws while it trains: dropout, or a block that is left out at random."""
    if isinstance(module, _DropoutNd):
        return module.p > 0
    if type(module).__name__ not in ("StochasticDepth", "DropPath", "DropBlock2d"):
        return False
    return float(getattr(module, "p", None) or getattr(module, "drop_prob", 0.0) or 0.0) > 0
