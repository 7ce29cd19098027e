"""Combinations of settings that are errors, and settings that have no effect in combination with others."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain

from dist_train.config.parts import DataSettings, Section
from dist_train.config.plugins import OPTION_KEYS, is_plugin
from dist_train.config.problems import Problem
from dist_train.config.sections import Config

NOT_MEASURED = "no evaluation measures it: see data.validation_size, evaluation.train_samples, averaging.kind"


def conflicts(config: Config) -> Iterator[Problem]:
    """Yield a problem for every invalid combination of settings."""
    settings = config.model_dump(mode="json")
    for problem in chain(
        _metrics(config),
        _reduction(config),
        _batch(config),
        _batch_schedule(config),
        _reasons_for_even_shares(config) if config.batch.dealing in ("measured", "dynamic") else (),
        _optimizer(config),
        _noise(config),
        _evaluation(config),
        _data(config),
    ):
        section, name = problem.path.split(".")
        yield replace(problem, value=settings[section][name])


def _metrics(config: Config) -> Iterator[Problem]:
    metrics = config.metrics
    if (metrics.certificate_file is None) != (metrics.key_file is None):
        wrong = "TLS needs a certificate and its key; set metrics.certificate_file and metrics.key_file, or neither"
        yield Problem("metrics.certificate_file", wrong, code="tls-half")
    if metrics.token_file is not None and metrics.password_file is not None:
        wrong = "a scrape sends a token or a password, not both; set metrics.token_file or metrics.password_file"
        yield Problem("metrics.token_file", wrong, code="token-and-password")
    if set("@?#") & set(metrics.pushgateway or ""):
        wrong = "a name, password or token in the URL would be saved with the run; name the host alone"
        yield Problem("metrics.pushgateway", wrong, code="secret-in-url")


def _reduction(config: Config) -> Iterator[Problem]:
    if config.precision.compute == "float16" and config.run.device == "cpu":
        wrong = "float16 needs a GPU; use bfloat16, or set run.device to cuda"
        yield Problem("precision.compute", wrong, code="float16-on-cpu", allowed="float32, bfloat16")
    if config.precision.cuda_graphs and config.run.device == "cpu":
        wrong = "CUDA graphs need a GPU; set it to false, or run.device to cuda"
        yield Problem("precision.cuda_graphs", wrong, code="cuda-graphs-on-cpu", allowed="false")
    if config.precision.cuda_graphs and config.precision.compile:
        wrong = "torch.compile may compile a pass again while it is recorded; set precision.compile or this to false"
        yield Problem("precision.cuda_graphs", wrong, code="cuda-graphs-compile", allowed="false")
    if config.precision.cuda_graphs and config.model.norm == "sync":
        wrong = "a graph cannot record how sync norm waits for other ranks; set it to false, or model.norm to ghost"
        yield Problem("precision.cuda_graphs", wrong, code="cuda-graphs-sync", allowed="false")
    if config.comm.compression != "none" and config.comm.is_exact:
        wrong = "an exact reduction cannot be compressed; set comm.reduction to float"
        yield Problem("comm.compression", wrong, code="exact-compression")
    if config.comm.op != "adasum":
        return
    if config.comm.is_exact:
        yield Problem("comm.op", "adasum is not a sum; set comm.reduction to float", code="adasum-exact")
    if config.noise.method != "none":
        wrong = "adasum weighs gradients at one point, which noise moves; set it to average or noise.method to none"
        yield Problem("comm.op", wrong, code="adasum-with-noise")
    if config.model.norm == "sync":
        wrong = "sync norm couples the gradients that adasum combines; set comm.op to average or model.norm to ghost"
        yield Problem("comm.op", wrong, code="sync-adasum")
    if config.batch.schedule:
        wrong = "adasum weighs by shares of one global batch; set comm.op to average, or leave batch.schedule out"
        yield Problem("comm.op", wrong, code="batch-schedule-adasum", allowed="average")


def _batch(config: Config) -> Iterator[Problem]:
    micro, norm = config.batch.micro_size, config.model.norm
    first, *later = sizes = [size for _, size in config.batch.sizes]
    if micro != "auto" and micro > first:
        wrong, allowed = f"a micro-batch is a part of the global batch of {first}", f"auto, or at most {first}"
        yield Problem("batch.micro_size", wrong, code="micro-above-global", allowed=allowed)
    if micro != "auto" and any(micro > size for size in later):
        wrong = f"a micro-batch, here of {micro}, is a part of every global batch"
        yield Problem("batch.schedule", wrong, code="micro-above-global")
    if norm in ("group", "none"):
        return
    if 1 in sizes:
        wrong, allowed = f"one sample is too few for {norm} norm", "at least 2, or model.norm none"
        path = "batch.global_size" if first == 1 else "batch.schedule"
        yield Problem(path, wrong, code="one-sample-batch", allowed=allowed)
    if micro != "auto" and any((size % micro or micro) == 1 for size in sizes if micro <= size and size > 1):
        wrong = f"the last micro-batch would hold one sample, which {norm} norm cannot normalize"
        allowed = "auto, or a size that does not leave one sample"
        yield Problem("batch.micro_size", wrong, code="one-sample-left", allowed=allowed)


def _batch_schedule(config: Config) -> Iterator[Problem]:
    if not config.batch.schedule:
        return
    epochs = [epoch for epoch, _ in config.batch.sizes]
    if epochs != sorted(set(epochs)) or epochs[-1] >= config.run.epochs:
        wrong = f"each batch begins at a later epoch than the one before, and before run.epochs, {config.run.epochs}"
        yield Problem("batch.schedule", wrong, code="batch-schedule-order")
    if config.batch.micro_size == "auto":
        wrong = "auto chooses a size for one global batch only; with batch.schedule set a number"
        yield Problem("batch.micro_size", wrong, code="batch-schedule-micro", allowed="a number")
    if config.batch.dealing == "measured":
        wrong = "speeds are measured for one global batch; set another batch.dealing, or leave batch.schedule out"
        yield Problem("batch.dealing", wrong, code="batch-schedule-dealing", allowed="auto, even or dynamic")
    if config.schedule.keep_updates:
        wrong = "epochs are counted by base_batch or by batch.schedule, not by both"
        yield Problem("schedule.keep_updates", wrong, code="batch-schedule-updates", allowed="false")
    if config.averaging.kind == "lawa" and config.averaging.every_steps is None:
        wrong = "with batch.schedule an epoch has no fixed number of updates; set averaging.every_steps"
        yield Problem("averaging.every_steps", wrong, code="batch-schedule-averaging")


def may_deal_unevenly(config: Config) -> bool:
    """Whether the result does not depend on which rank computes which micro-batch."""
    return config.comm.is_exact and not any(_reasons_for_even_shares(config))


def _reasons_for_even_shares(config: Config) -> Iterator[Problem]:
    if config.model.norm == "sync":
        wrong = "sync norm splits every micro-batch over all ranks; set batch.dealing to even or model.norm to ghost"
        yield Problem("batch.dealing", wrong, code="dealing-sync", allowed="even")
    if config.comm.op == "adasum":
        wrong = "adasum's result depends on which rank computes what; set batch.dealing to even or comm.op to average"
        yield Problem("batch.dealing", wrong, code="dealing-adasum", allowed="even")
    if config.noise.method != "none" and config.noise.sharing == "rank":
        wrong = "each rank has its own noise, so shares must not vary; set it to even or noise.sharing to micro_batch"
        yield Problem("batch.dealing", wrong, code="dealing-rank-noise", allowed="even")


def _optimizer(config: Config) -> Iterator[Problem]:
    optimizer, schedule = config.optimizer, config.schedule
    if optimizer.name == "sgd" and optimizer.nesterov and optimizer.momentum == 0:
        wrong = "Nesterov's rule needs a momentum above 0"
        yield Problem("optimizer.nesterov", wrong, code="nesterov-without-momentum")
    if schedule.decay == "step" and not schedule.milestones:
        wrong = "a step decay needs the epochs at which it steps"
        yield Problem("schedule.milestones", wrong, code="step-without-milestones")
    if schedule.warmup_epochs > config.run.epochs:
        wrong, allowed = "the warm-up is longer than the run", f"at most run.epochs, {config.run.epochs}"
        yield Problem("schedule.warmup_epochs", wrong, code="warmup-too-long", allowed=allowed)
    if config.regularization.label_smoothing and is_plugin(config.loss.name):
        wrong = f"the loss {config.loss.name} decides itself how labels are smoothed; set it to 0"
        yield Problem("regularization.label_smoothing", wrong, code="smoothing-of-loss", allowed="0")


def _noise(config: Config) -> Iterator[Problem]:
    noise, micro, optimizer = config.noise, config.batch.micro_size, config.optimizer
    if noise.method in ("langevin", "sgld") and noise.sharing != "global":
        wrong = f"{noise.method} noise stays in the weights, which all ranks share; set noise.sharing to global"
        yield Problem("noise.sharing", wrong, code="langevin-sharing", allowed="global")
    if _is_sam(config) and noise.sharing != "micro_batch":
        wrong = f"{noise.method} ascends by each micro-batch's own gradient; set noise.sharing to micro_batch"
        yield Problem("noise.sharing", wrong, code="sam-sharing", allowed="micro_batch")
    if _is_sam(config) and noise.scale != "absolute":
        wrong = f"the ascent of {noise.method} has the length noise.amplitude; set noise.scale to absolute"
        yield Problem("noise.scale", wrong, code="sam-scale", allowed="absolute")
    if noise.method == "ivon" and noise.sharing != "global":
        wrong = "ivon takes one sample a step, for all ranks; set noise.sharing to global"
        yield Problem("noise.sharing", wrong, code="ivon-sharing", allowed="global")
    is_plain = optimizer.name == "sgd" and optimizer.momentum == optimizer.weight_decay == 0 and not optimizer.nesterov
    if noise.method == "ivon" and not is_plain:
        plain = "optimizer={name: sgd, momentum: 0, nesterov: false, weight_decay: 0}"
        wrong = f"ivon has its own momentum and weight decay; set {plain}"
        yield Problem("optimizer.name", wrong, code="ivon-optimizer")
    # Micro-batches that take turns at the points of the noise must be equal at all points.
    sizes = [size for _, size in config.batch.sizes]
    is_unequal = micro == "auto" or any(size % (micro * noise.points) for size in sizes)
    if _perturbs(config) and noise.passes == "one" and noise.points > 1 and is_unequal:
        many = f"{noise.points} equal micro-batches"
        wrong = f"with batch.micro_size, batch.global_size must be a multiple of {many}; or set noise.passes to all"
        yield Problem("noise.passes", wrong, code="passes-unequal", allowed="all")
    if _perturbs(config) and noise.passes == "one" and noise.points > 1 and noise.sharing == "rank":
        wrong = "ranks would share a draw's micro-batches, but draw for themselves; set it to micro_batch or global"
        yield Problem("noise.sharing", wrong, code="passes-rank-noise", allowed="global, micro_batch")
    if noise.target_rise is not None and noise.schedule.kind != "constant":
        wrong = "the amplitude follows either a schedule or the measured rise; set noise.schedule to {kind: constant}"
        yield Problem("noise.target_rise", wrong, code="target-rise-schedule", allowed="null")
    if noise.target_rise is not None and noise.amplitude == 0:
        wrong = "the amplitude is multiplied until the rise is reached, and must begin above 0"
        yield Problem("noise.amplitude", wrong, code="target-rise-amplitude", allowed="above 0")
    if config.model.norm == "sync" and _perturbs(config) and noise.sharing == "rank":
        wrong = "sync norm needs the same weights on all ranks; set noise.sharing to global or micro_batch"
        yield Problem("noise.sharing", wrong, code="sync-rank-noise", allowed="global, micro_batch")


def _evaluation(config: Config) -> Iterator[Problem]:
    if config.early_stopping.patience is None:
        return
    if not config.measures(config.stopping_metric):
        yield Problem("early_stopping.metric", NOT_MEASURED, code="metric-not-measured")
    if config.evaluation.every_epochs == 0:
        wrong = "there are no evaluations during the run to wait for; set evaluation.every_epochs"
        yield Problem("early_stopping.patience", wrong, code="stopping-without-evaluations")


def _data(config: Config) -> Iterator[Problem]:
    data = config.data
    if _needs_shape(data) and (data.shape is None or data.classes is None):
        wrong = f"models are built before {data.name} is read; set data.shape and data.classes"
        allowed = "data.shape=[channels,height,width] data.classes=number"
        yield Problem("data.shape", wrong, code="plugin-data-form", allowed=allowed)
    if data.has_own_format and not is_plugin(data.name) and data.root is None:
        yield Problem("data.root", f"{data.name} needs the folder of its files", code="image-folder-unset")
    if data.data_set.is_encoded and data.classes is None:
        yield Problem("data.classes", f"{data.name} needs its number of classes", code="image-folder-unset")


def unused_settings(config: Config) -> dict[str, str]:
    """Return a sentence for each setting, by its path, that was given but has no effect in combination with the others.

    Also for a shape of images that seems to have its channels last, for a shift out of small images, and for a warm-up
    without a rise. Empty if most settings were given, as in a run's `config.yaml`, even of an older version: nobody
    chose each of them.
    """
    sections: dict[str, Section] = {name: getattr(config, name) for name in type(config).model_fields}
    given = sum(len(section.model_fields_set) for section in sections.values())
    if given > sum(len(type(section).model_fields) for section in sections.values()) / 2:
        return {}
    # a plug-in that is given its section may use all of it
    passed = {each.partition(".")[0] for each in _GIVEN_SECTIONS if is_plugin(config.value(each))}
    unused = {
        f"{section}.{name}": f"{section}.{name} has no effect: {why}"
        for section, names, is_unused, why in _unused(config)
        if is_unused and section not in passed
        for name in names.split()
        if name in sections[section].model_fields_set
    }
    return {**_channels_last(config), **_blank_images(config), **_constant_warmup(config), **unused}


def _channels_last(config: Config) -> dict[str, str]:
    """Return a sentence for a shape that seems to be [H, W, C]: arrays of that form would be taken for H channels."""
    found: dict[str, str] = {}
    for name in ("shape", "synthetic_shape"):
        channels, height, width = getattr(config.data, name) or (1, 1, 1)
        if width in (1, 3, 4) and min(channels, height) > 4 and max(channels, height) <= 2 * min(channels, height):
            given, meant = [channels, height, width], [width, channels, height]
            what = f"{given} is {channels} channels of {height} x {width} pixels, not {meant}"
            found[f"data.{name}"] = f"data.{name} holds channels, height and width: {what}"
    return found


def _blank_images(config: Config) -> dict[str, str]:
    """Return a sentence for images of which the shifts of crop-flip, by -4 to 4 pixels, leave nothing at times."""
    if config.data.augment != "crop-flip" or config.data.data_set.is_encoded:
        return {}
    _, *sides = config.data.image_format.shape
    blank = 1.0 - math.prod(min(2 * side - 1, 9) / 9 for side in sides)
    why = f"shifts {sides[0]} x {sides[1]} pixels by up to 4, which leaves {blank:.0%} of the training images blank"
    return {"data.augment": f"data.augment=crop-flip {why}: choose none, or a plug-in"} if blank else {}


def _constant_warmup(config: Config) -> dict[str, str]:
    """Return a sentence for a warm-up that delays the decay, where many expect a rise of the rate from 0."""
    schedule = config.schedule
    if not schedule.warmup_epochs or schedule.scaling != "none" or schedule.decay in ("constant", "step"):
        return {}
    why = "since schedule.scaling is none; for a rise from 0 write a schedule.decay of your own"
    return {"schedule.warmup_epochs": f"schedule.warmup_epochs delays the decay, at a constant rate, {why}"}


_GIVEN_SECTIONS = ("data.name", "noise.method", "optimizer.name")
"""Settings whose plug-ins are called with the settings of their section."""

_ONLY_WITH = (
    ("noise.method", "asam", "offset"),
    ("noise.method", "arwp", "adaptation memory"),
    ("noise.method", "fsgld", "temperature"),
    ("noise.method", "ivon", "sample_size curvature damping betas"),
    ("model.norm", "ghost", "ghost_size"),
    ("model.norm", "group", "channel_groups"),
    ("optimizer.name", "sgd", "nesterov"),
    ("optimizer.name", "lars", "trust"),
    ("schedule.decay", "step", "milestones factor"),
    ("schedule.decay", "exponential", "final_fraction"),
    ("schedule.decay", "poly", "power"),
    ("averaging.kind", "ema", "decay"),
    ("averaging.kind", "lawa", "last"),
    ("data.name", "synthetic", "synthetic_samples synthetic_shape synthetic_classes"),
)
"""Settings with an effect at one value of another only: that other setting, the value, and their names."""


def _unused(config: Config) -> Iterator[tuple[str, str, bool, str]]:
    """Yield a section, names of its settings, whether they have no effect, and why."""
    for setting, value, names in _ONLY_WITH:
        yield setting.partition(".")[0], names, config.value(setting) != value, f"{setting} is not {value}"
    data, model, metrics = config.data, config.model, config.metrics
    noise, optimizer, schedule = config.noise, config.optimizer, config.schedule
    is_encoded, has_betas = data.data_set.is_encoded, optimizer.name not in ("sgd", "lars")
    is_clean, is_ivon, perturbs = noise.method == "none", noise.method == "ivon", _perturbs(config)
    excludes = optimizer.weight_decay > 0 or optimizer.name in ("lars", "lamb")  # these adapt the other weights' rates
    has_no_base = schedule.scaling == "none" and not schedule.keep_updates
    # cosine and poly decay from the end of the warm-up
    has_no_warmup = schedule.scaling == "none" and schedule.decay in ("constant", "step")
    is_never_cut = schedule.decay == "step" and min(schedule.milestones, default=0) >= config.run.epochs
    has_statistics, is_averaged = model.norm not in ("group", "none"), config.averaging.kind != "none"
    recomputes_statistics = config.recomputes_statistics or (is_averaged and has_statistics)
    never_stops, is_listed = config.early_stopping.patience is None, metrics.targets_directory is not None
    always = ("enabled", "every_steps", "loggers")
    exporter_settings = " ".join(name for name in type(metrics).model_fields if name not in always)
    yield from (
        ("noise", "amplitude sharing schedule exclude distribution scale", is_clean, "noise.method is none"),
        ("noise", "distribution", _is_sam(config), "this method draws nothing"),
        ("noise", "draws antithetic mix passes", not perturbs, "this noise.method does not average over draws"),
        ("noise", "target_rise", not perturbs, "this noise.method does not average over draws"),
        ("noise", "passes", perturbs and noise.points == 1, "each micro-batch has a single point"),
        ("noise", "amplitude distribution scale schedule exclude", is_ivon, "ivon has its own way of drawing"),
        ("model", "norm_statistics", not has_statistics, "this norm has no running statistics"),
        ("model", "norm_samples", not recomputes_statistics, "the norm statistics are not recomputed"),
        ("optimizer", "momentum", has_betas, "this optimizer has betas instead"),
        ("optimizer", "betas", not has_betas, "this optimizer has momentum instead"),
        ("optimizer", "epsilon", not has_betas, "this optimizer does not use it"),
        ("optimizer", "exclude", not excludes, "optimizer.weight_decay is 0"),
        ("schedule", "base_batch", has_no_base, "schedule.scaling is none"),
        ("schedule", "warmup_epochs", has_no_warmup, "schedule.scaling is none, so there is no higher rate to rise to"),
        ("schedule", "milestones", is_never_cut, f"the run ends before them, after run.epochs, {config.run.epochs}"),
        ("averaging", "every_steps", not is_averaged, "averaging.kind is none"),
        ("early_stopping", "min_delta metric", never_stops, "early_stopping.patience is not set"),
        ("precision", "tf32", config.run.device == "cpu", "run.device is cpu"),
        ("comm", "compression", config.comm.op == "adasum", "adasum combines float32 gradients"),
        ("data", "root", data.name == "synthetic", "synthetic images are generated"),
        ("data", "download", not data.data_set.can_download, "only CIFAR can be downloaded"),
        ("data", "loader_workers", not is_encoded and not is_plugin(data.augment), "this data set is held in memory"),
        ("data", "image_size", not is_encoded, "the images of this data set have a fixed size"),
        ("data", "classes", not data.has_own_format, "this data set has fixed classes"),
        ("data", "shape", not _needs_shape(data), "data.name is neither numpy nor a plug-in"),
        ("data", "image_column label_column", not data.data_set.has_columns, "this data set has no columns"),
        ("metrics", exporter_settings, not metrics.enabled, "metrics.enabled is false"),
        ("metrics", "advertised_host", metrics.enabled and not is_listed, "metrics.targets_directory is not set"),
    )
    for setting in (*_GIVEN_SECTIONS, "model.name", "data.augment", "noise.scale", "loss.name", "schedule.decay"):
        options = OPTION_KEYS.get(setting, "options")
        yield setting.partition(".")[0], options, not is_plugin(config.value(setting)), f"{setting} is not a plug-in"


def _is_sam(config: Config) -> bool:
    return config.noise.method in ("sam", "asam")


def _perturbs(config: Config) -> bool:
    """Whether the noise method draws the points where gradients are taken."""
    return config.noise.method in ("smoothout", "arwp", "fsgld")


def _needs_shape(data: DataSettings) -> bool:
    return data.has_own_format and not data.data_set.is_encoded
