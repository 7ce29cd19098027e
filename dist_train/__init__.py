"""Data-parallel training at very large batch sizes, smoothed by synchronized weight noise.

For notebooks and scripts: `load_config` and `train`; `load_run` to read a run's results; `evaluate`, `export`,
`replay`, `learning_rate_range`; `register` for plug-ins, `Observer` for your own callbacks. Everything is imported
lazily, at its first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dist_train.api import Run, evaluate, export, load_run
    from dist_train.config import Config, load_config
    from dist_train.config.plugins import register
    from dist_train.diagnostics import learning_rate_range, replay
    from dist_train.launching.run import train
    from dist_train.rundir.records import Observer

__all__ = [
    "Config",
    "Observer",
    "Run",
    "evaluate",
    "export",
    "learning_rate_range",
    "load_config",
    "load_run",
    "register",
    "replay",
    "train",
]
__version__ = "0.1.0"

_MODULES = {
    "Config": "config",
    "Observer": "rundir.records",
    "learning_rate_range": "diagnostics",
    "load_config": "config",
    "register": "config.plugins",
    "replay": "diagnostics",
    "train": "launching.run",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    return getattr(import_module(f"dist_train.{_MODULES.get(name, 'api')}"), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
