"""Tries a plug-in's model or loss before training; refuses it, or warns, if training would not be reproducible."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from itertools import chain
from traceback import walk_tb
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from dist_train.config import Config
from dist_train.config.plugins import call_plugin, failing_clearly, is_plugin
from dist_train.models.norms import (
    check_norms,
    collect_statistics,
    norm_factory,
    norm_modules,
    restoring_buffers,
    restoring_parameters,
)
from dist_train.outcome import PluginResultError, UsageError
from dist_train.reproducible import generator, key, seed_generators, seeded_generators

_TRIAL_SAMPLES = 2
_MAX_NAMES = 3  # of buffers or parameters in a message
_NEAR = 1e-3  # to 1, for a sum of probabilities, also in 16 bits
_NOTICEABLE = 0.01  # difference of logits in relation to the largest: beyond rounding, also in 16 bits
_logger = logging.getLogger("dist_train.models")


def check_outputs(model: nn.Module, config: Config) -> None:
    """Try a plug-in's `model` on blank images, in training and in evaluation mode; initialize its lazy layers.

    Raises UsageError if it does not return logits, or cannot be trained reproducibly.
    """
    name, images = config.model.name, config.data.image_format
    if isinstance(model, torch.jit.ScriptModule):
        raise PluginResultError(f"{name} returned a module of TorchScript: return the module that it was made from")
    _check_buffers(model, name)
    blank = _blank(config)
    with failing_clearly(name), _noting_layer(model):
        if any(map(is_lazy, chain(model.parameters(), model.buffers()))):
            model.eval()  # where new running statistics stay as they begin
            with torch.no_grad():
                model(blank)
        model.train()  # not chained: the model's own method `train` may return nothing
        with torch.enable_grad(), restoring_buffers(model), restoring_parameters(model):
            outputs = {" in training": model(blank)}
        model.eval()
        # Last, since a model that stores activations of a graph cannot be copied.
        with torch.no_grad():
            outputs[""] = model(blank)
        model.train()
    if blank._version:
        raise PluginResultError(
            f"{name} changes its input in place, though an update may use it several times: write for example "
            f"x = x - mean, not x.sub_(mean)"
        )
    for mode, logits in outputs.items():
        is_tensor = isinstance(logits, Tensor)
        if not is_tensor or logits.shape != (_TRIAL_SAMPLES, images.classes) or not logits.is_floating_point():
            form = f"{logits.dtype} of {list(logits.shape)}" if is_tensor else type(logits).__name__
            fix = "" if is_tensor else ": return them alone; for torchvision's set model.options={aux_logits: false}"
            raise PluginResultError(
                f"{name} gives {form}, not real logits of [2, {images.classes}], for 2 images{mode}{fix}"
            )
    _check_registered(model, name, outputs[" in training"])
    _check_trainable(model, name)
    if not outputs[" in training"].requires_grad:
        raise PluginResultError(f"the logits of {name} depend on no parameter that is trained")


def check_training(model: nn.Module, config: Config) -> tuple[str, ...]:
    """Try training a plug-in's `model`, which is left as it was; warn if results would depend on the ranks.

    Also warn of parameters that get no gradient, softmax before the loss, and pretrained weights that are replaced.
    Returns the names of the buffers and frozen parameters that a pass in training changes.

    Raises UsageError if a gradient is sparse or arrives in parts, if passes change trained weights, if what checkpoints
    hold depends on the number of images, or if norms whose statistics are to be recomputed are not used in evaluations.
    """
    name = config.model.name
    if not is_plugin(name):
        return ()
    images = _blank(config)
    seed = key(config.run.seed, "model")
    with seeded_generators(seed), failing_clearly(name):
        more = _blank(config, 2 * _TRIAL_SAMPLES)
        # Not blank, on which dropout leaves no trace; a model that converts pixels to 0 ... 255 gets 0 and 1.
        more.uniform_(0.0, 1 / 255, generator=generator(config.run.seed, "trial images"))
        shapes = {path: value.shape for path, value in model.state_dict().items()}
        with restoring_buffers(model) as buffers_changed, restoring_parameters(model) as parameters_changed:
            model.train()
            logits = model(more)
            _check_shapes(model, name, shapes)
            unreached = _check_gradients(model, name, logits)
        with restoring_buffers(model), restoring_parameters(model):
            seed_generators(seed)
            is_repeatable = torch.allclose(model(more), logits, rtol=0.0, atol=0.0, equal_nan=True)
        with restoring_buffers(model), restoring_parameters(model) as changed_in_evaluation, torch.no_grad():
            model.eval()
            evaluated = model(more)
            _check_shapes(model, name, shapes)
            alone = _single(model, name, config.data.image_format.classes, more[:1])
        for norm in norm_modules(model):
            norm.seen.clear()
        if config.recomputes_statistics or config.averaging.kind != "none":  # an average has statistics of its own
            collect_statistics(model)
            with torch.no_grad():
                model(images)
            check_norms(model, name, " of an evaluation", samples=_TRIAL_SAMPLES)
        model.train()
    every_change = parameters_changed + changed_in_evaluation
    if trained := [path for path in every_change if model.get_parameter(path).requires_grad]:
        raise PluginResultError(
            f"{name} changes its parameter {trained[0]} in a forward pass, by max_norm or .data: ranks would differ, "
            f"and averages and noise miss it; compute with a changed copy, such as functional.normalize(weight)"
        )
    modes = [mode for mode, given in (("", logits), (" in evaluations", evaluated)) if _are_probabilities(given)]
    for mode in modes[:1]:
        _logger.warning("%s seems to end in softmax%s: leave it out, since cross entropy contains it", name, mode)
    if not torch.allclose(alone, evaluated[:1], atol=_NOTICEABLE * float(evaluated.abs().max()), equal_nan=True):
        _logger.warning(
            "in evaluations the logits of %s depend on the other images of a batch, and so on evaluation.batch_size: "
            "use norms with running statistics, and no draws",
            name,
        )
    if unreached:
        _logger.warning(
            f"in a trial pass of {name} {len(unreached)} of its parameters ({', '.join(unreached[:_MAX_NAMES])}) get "
            f"no gradient: use them in the forward pass, or freeze them by requires_grad_(False)"
        )
    if replaced := _replaced(model, config):
        _logger.warning(
            f"{name} builds {len(replaced)} of its parameters ({', '.join(replaced[:_MAX_NAMES])}) alike for any seed, "
            f"as pretrained ones are, but a run replaces their values by its own initial weights: to begin with yours, "
            f"save the model's state_dict(), and set run.init_from to the file"
        )
    if not is_repeatable:
        _logger.warning(
            f"a pass of {name} in training, repeated from the same seed, gives other logits: it draws from a generator "
            f"of its own, or keeps something outside of its buffers, so that results depend on the number of ranks, "
            f"and those of a resumed run differ; draw from the global generators, which are seeded for each micro-batch"
        )
    if buffers_changed or parameters_changed:
        kind = "frozen parameters" if parameters_changed else "buffers"
        names = parameters_changed or buffers_changed
        _logger.warning(
            f"{name} changes {kind} in training ({', '.join(names[:_MAX_NAMES])}), on each rank by its own samples; "
            f"in each update all take rank 0's: results depend on the number of ranks, and model.norm_statistics "
            f"does not apply to them; build batch norms by norm(channels)"
        )
    return (*buffers_changed, *parameters_changed)


def check_loss(loss: Callable[[Tensor, Tensor], Tensor], config: Config, device: torch.device) -> None:
    """Try a plug-in's `loss` on random logits; warn if results would depend on how samples are divided, or on a state.

    Raises UsageError if it does not return each sample's loss, differentiably, or has parameters to train.
    """
    name, seed = config.loss.name, key(config.run.seed, "loss")
    if not callable(loss):
        raise PluginResultError(f"{name} returned {type(loss).__name__}, not a function of logits and labels")
    if isinstance(loss, nn.Module) and any(parameter.requires_grad for parameter in loss.parameters()):
        raise PluginResultError(f"{name} has parameters, which would not be trained: make them a part of the model")
    classes, samples = config.data.image_format.classes, 2 * _TRIAL_SAMPLES
    drawn = torch.randn(samples, classes, generator=generator(config.run.seed, "trial logits"))
    logits, labels = drawn.to(device).requires_grad_(), torch.arange(samples, device=device) % classes

    def tried(count: int) -> Tensor:
        with seeded_generators(seed), failing_clearly(name):
            return sample_losses(name, loss, logits[:count], labels[:count])

    losses = tried(samples)
    if not losses.requires_grad:
        raise PluginResultError(f"the losses of {name} do not depend on the logits differentiably")
    losses = losses.detach()
    noticeable = _NOTICEABLE * float(losses.abs().max())
    if not losses.isfinite().all():
        raise PluginResultError(f"{name} gives losses that are not finite for random logits: {losses.tolist()}")
    if not torch.equal(losses, tried(samples)):
        _logger.warning(f"{name} gives other losses when called again: it has a state, which no checkpoint holds")
    elif not torch.allclose(losses[:_TRIAL_SAMPLES], tried(_TRIAL_SAMPLES), atol=noticeable):
        _logger.warning(
            f"a sample's loss by {name} depends on the other samples: results depend on batch.micro_size, and with "
            f"sync norm on the number of ranks"
        )


def sample_losses(name: str, loss: Callable[[Tensor, Tensor], Tensor], logits: Tensor, labels: Tensor) -> Tensor:
    """Return the samples' losses [n], float32, by the plug-in `name`. Raises PluginResultError for anything else."""
    losses = loss(logits, labels)
    if not isinstance(losses, Tensor) or losses.shape != labels.shape or not losses.is_floating_point():
        given = f"{losses.dtype} of {list(losses.shape)}" if isinstance(losses, Tensor) else type(losses).__name__
        fix = "; torch's losses do with reduction='none'" if isinstance(losses, Tensor) and not losses.dim() else ""
        raise PluginResultError(f"{name} gives {given}: return each sample's loss, here [{len(labels)}]{fix}")
    return losses.float()


def _replaced(model: nn.Module, config: Config) -> list[str]:
    """Return the trained parameters whose values, other than 0, no seed determines, but which `model` has lost."""
    settings, builds = config.model, list[dict[str, tuple[float, float]]]()
    if config.run.init_from is not None:
        return []
    with suppress(UsageError):  # of code that can be called only once
        for purpose in ("one seed", "another seed"):
            with seeded_generators(key(config.run.seed, purpose)):
                arguments = config.data.image_format, settings.width, norm_factory(settings)
                builds.append(_sums(call_plugin(settings.name, settings.options, nn.Module, *arguments)))
    if len(builds) < 2:
        return []
    alike = dict(builds[0].items() & builds[1].items())
    return [path for path, sums in _sums(model).items() if alike.get(path, sums) not in (sums, (0.0, 0.0))]


def _sums(model: nn.Module) -> dict[str, tuple[float, float]]:
    """Return the sums of each trained parameter's values and absolute values, by path, to compare builds of a model.

    Keeping the parameters themselves would take a model's memory for each build.
    """
    with torch.no_grad():
        return {
            path: (float(value.double().sum()), float(value.double().abs().sum()))
            for path, value in model.named_parameters()
            if value.requires_grad and not is_lazy(value)
        }


def _blank(config: Config, samples: int = _TRIAL_SAMPLES) -> Tensor:
    """Return blank images in the layout that training uses, in which Tensor.view, for example, may fail."""
    layout = torch.channels_last if config.precision.channels_last else torch.contiguous_format
    return torch.zeros(samples, *config.data.image_format.shape).to(memory_format=layout)


@contextmanager
def _noting_layer(model: nn.Module) -> Iterator[None]:
    """Add to an error what `model` was given and which layer failed: a layer of torch's is no line of the plug-in."""
    try:
        yield
    except Exception as error:
        error.add_note("(given two images of zeros)")
        names = {layer: name for name, layer in model.named_modules() if name}
        callers = [frame.f_locals.get("self") for frame, _ in walk_tb(error.__traceback__)]
        layers = [each for each in callers if isinstance(each, nn.Module) and each in names]
        for layer in layers[-1:]:
            error.add_note(f"(in its layer {names[layer]}, {type(layer).__name__})")
        raise


def _are_probabilities(logits: Tensor) -> bool:
    return bool((logits >= 0).all()) and bool((logits.float().sum(1) - 1).abs().max() < _NEAR)


def _single(model: nn.Module, name: str, classes: int, image: Tensor) -> Tensor:
    """Return the logits of one `image`: an evaluation's last batch may be one. Raises UsageError for other shapes."""
    try:
        logits: Tensor = model(image)
    except Exception as error:
        error.add_note("(given a single image)")
        raise
    if logits.shape != (1, classes):
        raise PluginResultError(
            f"{name} gives logits of {list(logits.shape)}, not [1, {classes}], for a single image: write x.flatten(1) "
            f"instead of x.squeeze()"
        )
    return logits


def _check_shapes(model: nn.Module, name: str, before: Mapping[str, torch.Size]) -> None:
    """Raise UsageError if a pass over more images has changed shapes in the state dict, which checkpoints hold."""
    for path, value in model.state_dict().items():
        if value.shape != before.get(path, value.shape):
            raise PluginResultError(
                f"the shape of the buffer {path} of {name} depends on the number of images, so no checkpoint would fit "
                f"the model: register it with persistent=False, or make it a plain attribute"
            )


def _check_gradients(model: nn.Module, name: str, logits: Tensor) -> list[str]:
    """Return the trained parameters that the backward pass from `logits` does not reach.

    Raises UsageError if it completes a gradient more than once, or makes it sparse.
    """
    arrived: set[str] = set()

    def note(path: str, parameter: nn.Parameter) -> None:
        assert parameter.grad is not None
        problem = "arrives in parts: call checkpoint(..., use_reentrant=False)" if path in arrived else ""
        if parameter.grad.layout != torch.strided:
            problem = "is sparse: set sparse=False"
        if problem:
            raise PluginResultError(f"the gradient of {path} of {name} {problem}")
        arrived.add(path)
        parameter.grad = None

    trained = [(path, parameter) for path, parameter in model.named_parameters() if parameter.requires_grad]
    hooks = [parameter.register_post_accumulate_grad_hook(partial(note, path)) for path, parameter in trained]
    try:
        torch.autograd.backward(logits.sum())
    finally:
        for hook in hooks:
            hook.remove()
    return [path for path, _ in trained if path not in arrived]


def _check_registered(model: nn.Module, name: str, logits: Tensor) -> None:
    """Raise UsageError if `logits` depend on a trained parameter that a plug-in's `model` does not know."""
    known, seen, nodes = set(map(id, model.parameters())), set[Any](), [logits.grad_fn]
    while nodes:
        if (node := nodes.pop()) is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, nn.Parameter) and id(leaf) not in known:
            raise PluginResultError(
                f"{name} computes with a parameter of {list(leaf.shape)} that is not registered in it, and would be "
                f"neither trained nor saved: keep layers in nn.ModuleList or nn.ModuleDict, not in a list or dict"
            )
        nodes += [each for each, _ in node.next_functions]


def _check_trainable(model: nn.Module, name: str) -> None:
    """Raise UsageError if a plug-in's `model`, after a forward pass in training, cannot be trained reproducibly."""
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise PluginResultError(f"{name} has no parameter to train")
    for path, parameter in model.named_parameters():
        if not parameter.numel() or (parameter.requires_grad and parameter.dtype != torch.float32):
            raise PluginResultError(
                f"the parameter {path} of {name} is {str(parameter.dtype).removeprefix('torch.')} of "
                f"{list(parameter.shape)}: what is trained is float32, and nothing is empty"
            )
    with failing_clearly(name):
        saved = model.state_dict().keys()
    if missing := [path for path, _ in model.named_parameters(remove_duplicate=False) if path not in saved]:
        raise PluginResultError(
            f"the state dict of {name} has no {missing[0]}, so a checkpoint could not restore it: remove the hook, or "
            f"the method state_dict, that leaves it out"
        )
    for path, module in model.named_modules():
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise PluginResultError(
                f"{name} has a state outside its tensors ({path or 'itself'}, {type(module).__name__}, has "
                f"get_extra_state): ranks and checkpoints share parameters and buffers; register it as a buffer"
            )
    check_norms(model, name, "", samples=_TRIAL_SAMPLES)


def _check_buffers(model: nn.Module, name: str) -> None:
    """Raise UsageError if a buffer of a plug-in's `model` cannot be overwritten, as by a checkpoint."""
    for path, buffer in model.named_buffers():
        form = ""
        if buffer.layout != torch.strided:
            form = "sparse: register its .to_dense()"
        elif not is_lazy(buffer) and any(n > 1 > step for n, step in zip(buffer.shape, buffer.stride(), strict=True)):
            form = "expanded, one value for many elements: register its .contiguous()"
        if form:
            raise PluginResultError(f"the buffer {path} of {name} is {form}")
