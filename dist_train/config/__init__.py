"""The settings: their defaults and checks. `load_config(path, overrides)` returns a frozen `Config`."""

from dist_train.config.loading import dump_config, load_config, parse_config
from dist_train.config.parts import (
    DATA_SETS,
    AveragingSettings,
    DataSet,
    DataSettings,
    ImageFormat,
    NoiseSchedule,
    NoiseSettings,
    RegularizationSettings,
)
from dist_train.config.problems import ConfigError
from dist_train.config.resuming import differences, differing_lengths
from dist_train.config.sections import (
    Config,
    ModelSettings,
    OptimizerSettings,
    PrecisionSettings,
    ScheduleSettings,
)

__all__ = [
    "DATA_SETS",
    "AveragingSettings",
    "Config",
    "ConfigError",
    "DataSet",
    "DataSettings",
    "ImageFormat",
    "ModelSettings",
    "NoiseSchedule",
    "NoiseSettings",
    "OptimizerSettings",
    "PrecisionSettings",
    "RegularizationSettings",
    "ScheduleSettings",
    "differences",
    "differing_lengths",
    "dump_config",
    "load_config",
    "parse_config",
]
