"""Settings that have no effect beside others."""

from __future__ import annotations

from collections.abc import Callable

from dist_train.config.sections import Config


def unused_settings(config: Config) -> list[str]:
    """Return one sentence for each setting that was given and has no effect beside the others."""
    return [
        f"{path} has no effect: {reason}"
        for path, condition, reason in _IDLE
        if _was_given(config, path) and condition(config)
    ]


def _was_given(config: Config, path: str) -> bool:
    section, name = path.split(".")
    return name in getattr(config, section).model_fields_set


def _no_noise(config: Config) -> bool:
    return config.noise.method == "none"


def _no_draw(config: Config) -> bool:
    return config.noise.method == "sam"


def _not_synthetic(config: Config) -> bool:
    return config.data.name != "synthetic"


def _not_a_folder(config: Config) -> bool:
    return config.data.name != "imagefolder"


def _no_moments(config: Config) -> bool:
    return config.optimizer.name in ("sgd", "lars")


def _no_momentum(config: Config) -> bool:
    return config.optimizer.name not in ("sgd", "lars")


def _no_way_up(config: Config) -> bool:
    # cosine and poly begin to fall at the end of the warm-up
    return config.schedule.scaling == "none" and config.schedule.decay in ("constant", "step")


def _no_exporter(config: Config) -> bool:
    return not config.metrics.enabled


_IDLE: tuple[tuple[str, Callable[[Config], bool], str], ...] = (
    ("noise.amplitude", _no_noise, "noise.method is none"),
    ("noise.sharing", _no_noise, "noise.method is none"),
    ("noise.schedule", _no_noise, "noise.method is none"),
    ("noise.exclude", _no_noise, "noise.method is none"),
    ("noise.distribution", _no_noise, "noise.method is none"),
    ("noise.distribution", _no_draw, "sam draws nothing"),
    ("noise.scale", _no_noise, "noise.method is none"),
    ("model.ghost_size", lambda c: c.model.norm != "ghost", "model.norm is not ghost"),
    ("model.channel_groups", lambda c: c.model.norm != "group", "model.norm is not group"),
    ("model.norm_statistics", lambda c: c.model.norm in ("group", "none"), "such a norm has no running statistics"),
    ("model.norm_samples", lambda c: not c.recomputes_statistics, "the norm statistics are not recomputed"),
    ("optimizer.momentum", _no_momentum, "this optimizer has betas instead"),
    ("optimizer.nesterov", lambda c: c.optimizer.name != "sgd", "optimizer.name is not sgd"),
    ("optimizer.betas", _no_moments, "this optimizer has momentum instead"),
    ("optimizer.epsilon", _no_moments, "this optimizer does not use it"),
    ("optimizer.trust", lambda c: c.optimizer.name != "lars", "optimizer.name is not lars"),
    (
        "schedule.base_batch",
        lambda c: c.schedule.scaling == "none" and not c.schedule.keep_updates,
        "schedule.scaling is none",
    ),
    ("schedule.warmup_epochs", _no_way_up, "schedule.scaling is none, so the rate has no way to rise"),
    ("schedule.milestones", lambda c: c.schedule.decay != "step", "schedule.decay is not step"),
    ("schedule.factor", lambda c: c.schedule.decay != "step", "schedule.decay is not step"),
    ("schedule.power", lambda c: c.schedule.decay != "poly", "schedule.decay is not poly"),
    ("precision.tf32", lambda c: c.run.device == "cpu", "run.device is cpu"),
    ("data.download", lambda c: not c.data.name.startswith("cifar"), "only CIFAR can be downloaded"),
    ("data.loader_workers", _not_a_folder, "this data set is held in memory"),
    ("data.image_size", _not_a_folder, "data.name is not imagefolder"),
    ("data.classes", _not_a_folder, "data.name is not imagefolder"),
    ("data.synthetic_samples", _not_synthetic, "data.name is not synthetic"),
    ("data.synthetic_shape", _not_synthetic, "data.name is not synthetic"),
    ("data.synthetic_classes", _not_synthetic, "data.name is not synthetic"),
    *(
        (f"metrics.{name}", _no_exporter, "metrics.enabled is false")
        for name in (
            "host",
            "port",
            "ranks",
            "token_file",
            "password_file",
            "certificate_file",
            "key_file",
            "targets_directory",
            "advertised_host",
            "pushgateway",
            "last_scrape_seconds",
        )
    ),
    (
        "metrics.advertised_host",
        lambda c: c.metrics.enabled and c.metrics.targets_directory is None,
        "metrics.targets_directory is not set",
    ),
)
