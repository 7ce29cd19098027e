"""Combinations of settings that are errors, and settings that have no effect in combination with others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from dist_train.config.parts import ENCODED, Section
from dist_train.config.plugins import is_plugin
from dist_train.config.problems import Problem
from dist_train.config.sections import Config, MetricsSettings


@dataclass(frozen=True)
class _Rule:
    """The setting at `path` is wrong if `broken` returns true; `wrong` and `allowed` may contain {section.name}."""

    path: str
    broken: Callable[[Config], bool]
    wrong: str
    allowed: str = ""
    code: str = field(kw_only=True)


def conflicts(config: Config) -> Iterator[Problem]:
    """Yield a problem for every invalid combination of settings."""
    sections = {section: getattr(config, section) for section in type(config).model_fields}
    for rule in _RULES:
        if rule.broken(config):
            section, name = rule.path.split(".")
            value = getattr(sections[section], name)
            if isinstance(value, tuple):
                value = [each.model_dump() if isinstance(each, Section) else each for each in value]
            wrong, allowed = rule.wrong.format_map(sections), rule.allowed.format_map(sections)
            yield Problem(rule.path, wrong, code=rule.code, value=value, allowed=allowed)


def _normalizes_over_samples(config: Config) -> bool:
    return config.model.norm in ("batch", "ghost", "sync")


def _batches(config: Config) -> list[int]:
    """Return every global batch size of the run."""
    return [size for _, size in config.batch.sizes]


def _has_micro_batch_of_one(config: Config) -> bool:
    micro = config.batch.micro_size
    if micro == "auto":
        return False
    last_sizes = [batch % micro or micro for batch in _batches(config) if micro <= batch and batch > 1]
    return _normalizes_over_samples(config) and 1 in last_sizes


def _is_sam(config: Config) -> bool:
    return config.noise.method in ("sam", "asam")


def _perturbs(config: Config) -> bool:
    """Whether the noise method draws the points where gradients are taken."""
    return config.noise.method in ("smoothout", "arwp", "fsgld")


def _is_plain_sgd(config: Config) -> bool:
    optimizer = config.optimizer
    return optimizer.name == "sgd" and optimizer.momentum == optimizer.weight_decay == 0 and not optimizer.nesterov


def _has_unequal_passes(config: Config) -> bool:
    """Whether micro-batches that take turns at the points of the noise cannot be equal at all points."""
    if not _perturbs(config) or config.noise.passes == "all":
        return False
    micro = config.batch.micro_size
    return micro == "auto" or any(batch % (micro * config.noise.points) for batch in _batches(config))


def _is_scheduled(config: Config) -> bool:
    return bool(config.batch.schedule)


def _has_bad_batch_schedule(config: Config) -> bool:
    epochs = [epoch for epoch, _ in config.batch.sizes]
    return epochs != sorted(set(epochs)) or epochs[-1] >= config.run.epochs


_RULES = (
    _Rule(
        "precision.compute",
        lambda c: c.precision.compute == "float16" and c.run.device == "cpu",
        "float16 needs a GPU; use bfloat16, or set run.device to cuda",
        "float32, bfloat16",
        code="float16-on-cpu",
    ),
    _Rule(
        "precision.cuda_graphs",
        lambda c: c.precision.cuda_graphs and c.run.device == "cpu",
        "CUDA graphs need a GPU; set it to false, or run.device to cuda",
        "false",
        code="cuda-graphs-on-cpu",
    ),
    _Rule(
        "precision.cuda_graphs",
        lambda c: c.precision.cuda_graphs and c.precision.compile,
        "torch.compile may compile a pass again while it is recorded; set precision.compile or this to false",
        "false",
        code="cuda-graphs-compile",
    ),
    _Rule(
        "precision.cuda_graphs",
        lambda c: c.precision.cuda_graphs and c.model.norm == "sync",
        "sync norm waits for the other ranks within each pass, which a graph cannot record; "
        "set it to false, or model.norm to ghost",
        "false",
        code="cuda-graphs-sync",
    ),
    _Rule(
        "metrics.certificate_file",
        lambda c: (c.metrics.certificate_file is None) != (c.metrics.key_file is None),
        "TLS needs a certificate and its key; set metrics.certificate_file and metrics.key_file, or neither",
        code="tls-half",
    ),
    _Rule(
        "metrics.token_file",
        lambda c: c.metrics.token_file is not None and c.metrics.password_file is not None,
        "a scrape sends a token or a password, not both; set metrics.token_file or metrics.password_file",
        code="token-and-password",
    ),
    _Rule(
        "metrics.pushgateway",
        lambda c: bool(set("@?#") & set(c.metrics.pushgateway or "")),
        "a name, password or token in the URL would be saved with the run; name the host alone",
        code="secret-in-url",
    ),
    _Rule(
        "comm.compression",
        lambda c: c.comm.compression != "none" and c.comm.reduction != "float",
        "an exact reduction cannot be compressed; set comm.reduction to float",
        code="exact-compression",
    ),
    _Rule(
        "comm.op",
        lambda c: c.comm.op == "adasum" and c.comm.reduction != "float",
        "adasum is not a sum; set comm.reduction to float",
        code="adasum-exact",
    ),
    _Rule(
        "comm.op",
        lambda c: c.comm.op == "adasum" and c.noise.method != "none",
        "adasum weighs each rank's gradient at its own point, but noise moves that point; "
        "set comm.op to average or noise.method to none",
        code="adasum-with-noise",
    ),
    _Rule(
        "batch.micro_size",
        lambda c: c.batch.micro_size != "auto" and c.batch.micro_size > c.batch.global_size,
        "a micro-batch is a part of the global batch of {batch.global_size}",
        "auto, or at most {batch.global_size}",
        code="micro-above-global",
    ),
    _Rule(
        "batch.schedule",
        lambda c: c.batch.micro_size != "auto" and any(c.batch.micro_size > size for size in _batches(c)[1:]),
        "a micro-batch, here of {batch.micro_size}, is a part of every global batch",
        code="micro-above-global",
    ),
    _Rule(
        "batch.schedule",
        _has_bad_batch_schedule,
        "each batch begins at a later epoch than the one before it, and before the run's end at {run.epochs}",
        code="batch-schedule-order",
    ),
    _Rule(
        "batch.micro_size",
        lambda c: _is_scheduled(c) and c.batch.micro_size == "auto",
        "auto chooses a size for one global batch only; with batch.schedule set a number",
        "a number",
        code="batch-schedule-micro",
    ),
    _Rule(
        "batch.dealing",
        lambda c: _is_scheduled(c) and c.batch.dealing == "measured",
        "speeds are measured for one global batch; set batch.dealing to even, or leave batch.schedule out",
        "even",
        code="batch-schedule-dealing",
    ),
    _Rule(
        "comm.op",
        lambda c: _is_scheduled(c) and c.comm.op == "adasum",
        "adasum weighs by a rank's share of one global batch; set comm.op to average, or leave batch.schedule out",
        "average",
        code="batch-schedule-adasum",
    ),
    _Rule(
        "schedule.keep_updates",
        lambda c: _is_scheduled(c) and c.schedule.keep_updates,
        "epochs are counted by base_batch or by batch.schedule, not by both",
        "false",
        code="batch-schedule-updates",
    ),
    _Rule(
        "averaging.every_steps",
        lambda c: _is_scheduled(c) and c.averaging.kind == "lawa" and c.averaging.every_steps is None,
        "with batch.schedule an epoch has no fixed number of updates; set averaging.every_steps",
        code="batch-schedule-averaging",
    ),
    _Rule(
        "batch.global_size",
        lambda c: 1 in _batches(c) and _normalizes_over_samples(c),
        "one sample is too few for {model.norm} norm",
        "at least 2, or model.norm none",
        code="one-sample-batch",
    ),
    _Rule(
        "batch.micro_size",
        _has_micro_batch_of_one,
        "the last micro-batch would hold one sample, which {model.norm} norm cannot normalize",
        "auto, or a size that does not leave one sample",
        code="one-sample-left",
    ),
    _Rule(
        "batch.dealing",
        lambda c: c.batch.dealing == "measured" and c.model.norm == "sync",
        "with sync norm every rank computes a part of every micro-batch, so none can compute more of them; "
        "set batch.dealing to even or model.norm to ghost",
        "even",
        code="dealing-sync",
    ),
    _Rule(
        "batch.dealing",
        lambda c: c.batch.dealing == "measured" and c.comm.op == "adasum",
        "adasum combines the ranks' own gradients, which would depend on which rank computes what; "
        "set batch.dealing to even or comm.op to average",
        "even",
        code="dealing-adasum",
    ),
    _Rule(
        "batch.dealing",
        lambda c: c.batch.dealing == "measured" and c.noise.method != "none" and c.noise.sharing == "rank",
        "with noise.sharing rank a gradient depends on the rank that computes it, which would change with its speed; "
        "set batch.dealing to even or noise.sharing to micro_batch",
        "even",
        code="dealing-rank-noise",
    ),
    _Rule(
        "optimizer.nesterov",
        lambda c: c.optimizer.name == "sgd" and c.optimizer.nesterov and c.optimizer.momentum == 0,
        "Nesterov's rule needs a momentum above 0",
        code="nesterov-without-momentum",
    ),
    _Rule(
        "schedule.milestones",
        lambda c: c.schedule.decay == "step" and not c.schedule.milestones,
        "a step decay needs the epochs at which it steps",
        code="step-without-milestones",
    ),
    _Rule(
        "schedule.warmup_epochs",
        lambda c: c.schedule.warmup_epochs > c.run.epochs,
        "the warm-up is longer than the run",
        "at most run.epochs, {run.epochs}",
        code="warmup-too-long",
    ),
    _Rule(
        "noise.sharing",
        lambda c: c.noise.method in ("langevin", "sgld") and c.noise.sharing != "global",
        "{noise.method} noise stays in the weights, which all ranks share; set noise.sharing to global",
        "global",
        code="langevin-sharing",
    ),
    _Rule(
        "noise.sharing",
        lambda c: _is_sam(c) and c.noise.sharing != "micro_batch",
        "{noise.method} ascends by each micro-batch's own gradient; set noise.sharing to micro_batch",
        "micro_batch",
        code="sam-sharing",
    ),
    _Rule(
        "noise.scale",
        lambda c: _is_sam(c) and c.noise.scale != "absolute",
        "the ascent of {noise.method} has the length noise.amplitude; set noise.scale to absolute",
        "absolute",
        code="sam-scale",
    ),
    _Rule(
        "noise.sharing",
        lambda c: c.noise.method == "ivon" and c.noise.sharing != "global",
        "ivon takes one sample a step, for all ranks; set noise.sharing to global",
        "global",
        code="ivon-sharing",
    ),
    _Rule(
        "optimizer.name",
        lambda c: c.noise.method == "ivon" and not _is_plain_sgd(c),
        "ivon has its own momentum and weight decay; "
        "set optimizer={{name: sgd, momentum: 0, nesterov: false, weight_decay: 0}}",
        code="ivon-optimizer",
    ),
    _Rule(
        "noise.passes",
        _has_unequal_passes,
        "equal micro-batches take turns at {noise.points} points; choose batch.micro_size so that batch.global_size is "
        "a multiple of {noise.points} micro-batches, or set noise.passes to all",
        "all",
        code="passes-unequal",
    ),
    _Rule(
        "noise.sharing",
        lambda c: c.model.norm == "sync" and _perturbs(c) and c.noise.sharing == "rank",
        "sync norm takes its statistics over all ranks, which must then hold the same weights; "
        "set noise.sharing to global or micro_batch",
        "global, micro_batch",
        code="sync-rank-noise",
    ),
    _Rule(
        "comm.op",
        lambda c: c.model.norm == "sync" and c.comm.op == "adasum",
        "adasum combines gradients that ranks compute independently, but sync norm couples them; "
        "set comm.op to average or model.norm to ghost",
        code="sync-adasum",
    ),
    _Rule(
        "early_stopping.metric",
        lambda c: c.early_stopping.patience is not None and not c.measures(c.stopping_metric),
        "no evaluation measures it: validation needs data.validation_size, train needs evaluation.train_samples, "
        "-averaged needs averaging.kind",
        code="metric-not-measured",
    ),
    _Rule(
        "early_stopping.patience",
        lambda c: c.early_stopping.patience is not None and c.evaluation.every_epochs == 0,
        "there are no evaluations during the run to wait for; set evaluation.every_epochs",
        code="stopping-without-evaluations",
    ),
    _Rule(
        "data.shape",
        lambda c: _has_own_shape(c) and (c.data.shape is None or c.data.classes is None),
        "models are built before {data.name} is read; set data.shape and data.classes",
        "data.shape=[channels,height,width] data.classes=number",
        code="plugin-data-form",
    ),
    _Rule(
        "data.root",
        lambda c: c.data.name in (*ENCODED, "numpy") and c.data.root is None,
        "{data.name} needs the folder of its files",
        code="image-folder-unset",
    ),
    _Rule(
        "data.classes",
        lambda c: c.data.name in ENCODED and c.data.classes is None,
        "{data.name} needs its number of classes",
        code="image-folder-unset",
    ),
)


def unused_settings(config: Config) -> list[str]:
    """Return one sentence for each setting that was given but has no effect in combination with the others."""
    sections = {name: getattr(config, name) for name in type(config).model_fields}
    given = {f"{section}.{name}" for section, settings in sections.items() for name in settings.model_fields_set}
    return [f"{path} has no effect: {why}" for path, is_unused, why in _UNUSED if path in given and is_unused(config)]


def _no_noise(config: Config) -> bool:
    return config.noise.method == "none"


def _is_built_in(section: str, name: str) -> Callable[[Config], bool]:
    return lambda config: not is_plugin(getattr(getattr(config, section), name))


def _not_encoded(config: Config) -> bool:
    return config.data.name not in ENCODED


def _has_own_shape(config: Config) -> bool:
    return config.data.name == "numpy" or is_plugin(config.data.name)


def _is_held_in_memory(config: Config) -> bool:
    return _not_encoded(config) and not is_plugin(config.data.name) and not is_plugin(config.data.augment)


def _has_no_betas(config: Config) -> bool:
    return config.optimizer.name in ("sgd", "lars")


def _has_no_warmup(config: Config) -> bool:
    # cosine and poly decay from the end of the warm-up
    return config.schedule.scaling == "none" and config.schedule.decay in ("constant", "step")


def _is_not(method: str) -> Callable[[Config], bool]:
    return lambda config: config.noise.method != method


_OF_ONE_METHOD = {
    "asam": ("offset",),
    "arwp": ("adaptation", "memory"),
    "fsgld": ("temperature",),
    "ivon": ("sample_size", "curvature", "damping", "betas"),
}


_UNUSED: tuple[tuple[str, Callable[[Config], bool], str], ...] = (
    ("noise.amplitude", _no_noise, "noise.method is none"),
    ("noise.sharing", _no_noise, "noise.method is none"),
    ("noise.schedule", _no_noise, "noise.method is none"),
    ("noise.exclude", _no_noise, "noise.method is none"),
    ("noise.distribution", _no_noise, "noise.method is none"),
    ("noise.distribution", _is_sam, "this method draws nothing"),
    *(
        (f"noise.{name}", lambda c: not _perturbs(c), "this noise.method does not average over draws")
        for name in ("draws", "antithetic", "mix", "passes")
    ),
    *(
        (f"noise.{name}", lambda c: c.noise.method == "ivon", "ivon has its own way of drawing")
        for name in ("amplitude", "distribution", "scale", "schedule", "exclude")
    ),
    *(
        (f"noise.{name}", _is_not(method), f"noise.method is not {method}")
        for method, names in _OF_ONE_METHOD.items()
        for name in names
    ),
    ("noise.scale", _no_noise, "noise.method is none"),
    ("model.ghost_size", lambda c: c.model.norm != "ghost", "model.norm is not ghost"),
    ("model.channel_groups", lambda c: c.model.norm != "group", "model.norm is not group"),
    ("model.norm_statistics", lambda c: c.model.norm in ("group", "none"), "this norm has no running statistics"),
    ("model.norm_samples", lambda c: not c.recomputes_statistics, "the norm statistics are not recomputed"),
    ("optimizer.momentum", lambda c: c.optimizer.name not in ("sgd", "lars"), "this optimizer has betas instead"),
    ("optimizer.nesterov", lambda c: c.optimizer.name != "sgd", "optimizer.name is not sgd"),
    ("optimizer.betas", _has_no_betas, "this optimizer has momentum instead"),
    ("optimizer.epsilon", _has_no_betas, "this optimizer does not use it"),
    ("optimizer.trust", lambda c: c.optimizer.name != "lars", "optimizer.name is not lars"),
    (
        "schedule.base_batch",
        lambda c: c.schedule.scaling == "none" and not c.schedule.keep_updates,
        "schedule.scaling is none",
    ),
    ("schedule.warmup_epochs", _has_no_warmup, "schedule.scaling is none, so there is no higher rate to rise to"),
    ("schedule.milestones", lambda c: c.schedule.decay != "step", "schedule.decay is not step"),
    ("schedule.factor", lambda c: c.schedule.decay != "step", "schedule.decay is not step"),
    ("schedule.final_fraction", lambda c: c.schedule.decay != "exponential", "schedule.decay is not exponential"),
    ("averaging.decay", lambda c: c.averaging.kind != "ema", "averaging.kind is not ema"),
    ("averaging.last", lambda c: c.averaging.kind != "lawa", "averaging.kind is not lawa"),
    ("averaging.every_steps", lambda c: c.averaging.kind == "none", "averaging.kind is none"),
    ("early_stopping.min_delta", lambda c: c.early_stopping.patience is None, "early_stopping.patience is not set"),
    ("early_stopping.metric", lambda c: c.early_stopping.patience is None, "early_stopping.patience is not set"),
    ("schedule.power", lambda c: c.schedule.decay != "poly", "schedule.decay is not poly"),
    ("precision.tf32", lambda c: c.run.device == "cpu", "run.device is cpu"),
    ("data.download", lambda c: not c.data.name.startswith("cifar"), "only CIFAR can be downloaded"),
    ("data.loader_workers", _is_held_in_memory, "this data set is held in memory"),
    ("data.image_size", _not_encoded, "the images of this data set have a fixed size"),
    ("data.classes", lambda c: _not_encoded(c) and not _has_own_shape(c), "this data set has fixed classes"),
    ("data.shape", lambda c: not _has_own_shape(c), "data.name is neither numpy nor a plug-in"),
    *(
        (f"data.{column}", lambda c: c.data.name not in (*ENCODED[1:], "numpy"), "this data set has no columns")
        for column in ("image_column", "label_column")
    ),
    *(
        (f"{section}.{options}", _is_built_in(section, name), f"{section}.{name} is not a plug-in")
        for section, options, name in (
            ("model", "options", "name"),
            ("data", "options", "name"),
            ("data", "augment_options", "augment"),
            ("noise", "options", "method"),
            ("noise", "scale_options", "scale"),
            ("optimizer", "options", "name"),
            ("schedule", "options", "decay"),
        )
    ),
    *(
        (f"data.synthetic_{name}", lambda c: c.data.name != "synthetic", "data.name is not synthetic")
        for name in ("samples", "shape", "classes")
    ),
    *(
        (f"metrics.{name}", lambda c: not c.metrics.enabled, "metrics.enabled is false")
        for name in MetricsSettings.model_fields
        if name not in ("enabled", "every_steps", "tensorboard", "loggers")
    ),
    (
        "metrics.advertised_host",
        lambda c: c.metrics.enabled and c.metrics.targets_directory is None,
        "metrics.targets_directory is not set",
    ),
)
