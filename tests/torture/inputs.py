"""All kinds of fuzzed inputs."""

from __future__ import annotations

from pathlib import Path

from tests.torture import checkpoint_inputs, data_inputs, text_inputs
from tests.torture.kind import Kind

_MAKERS = (
    text_inputs.configurations,
    text_inputs.overrides,
    text_inputs.studies,
    checkpoint_inputs.checkpoints,
    checkpoint_inputs.forged_checkpoints,
    data_inputs.idx,
    data_inputs.cifar_batches,
    data_inputs.cifar_archives,
    data_inputs.cache,
    data_inputs.forged_cache,
)


def kinds(folder: Path) -> list[Kind]:
    """Return all kinds, with their files in `folder`."""
    made = []
    for make in _MAKERS:
        own = folder / make.__name__
        own.mkdir()
        made.append(make(own))
    return made
