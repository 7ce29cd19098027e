"""The settings: their defaults and checks. `load_config(path, overrides)` returns a frozen `Config`."""

from dist_train.config.loading import dump_config as dump_config
from dist_train.config.loading import load_config as load_config
from dist_train.config.loading import parse_config as parse_config
from dist_train.config.parts import DATA_SETS as DATA_SETS
from dist_train.config.parts import AveragingSettings as AveragingSettings
from dist_train.config.parts import DataSet as DataSet
from dist_train.config.parts import DataSettings as DataSettings
from dist_train.config.parts import ImageFormat as ImageFormat
from dist_train.config.parts import NoiseSchedule as NoiseSchedule
from dist_train.config.parts import NoiseSettings as NoiseSettings
from dist_train.config.parts import RegularizationSettings as RegularizationSettings
from dist_train.config.problems import ConfigError as ConfigError
from dist_train.config.resuming import differences as differences
from dist_train.config.resuming import differing_lengths as differing_lengths
from dist_train.config.sections import Config as Config
from dist_train.config.sections import ModelSettings as ModelSettings
from dist_train.config.sections import OptimizerSettings as OptimizerSettings
from dist_train.config.sections import PrecisionSettings as PrecisionSettings
from dist_train.config.sections import ScheduleSettings as ScheduleSettings
