"""What tests of several folders share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def trained_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a tiny run that has finished; a module's tests share it."""
    # here, since tests of scripts and containers do without torch
    from dist_train.cluster.alone import Alone
    from tests.unit.small_trainers import build_trainer, small_config

    folder = tmp_path_factory.mktemp("trained") / "run"
    build_trainer(small_config(), folder, Alone()).run()
    return folder


@pytest.fixture
def threads_as_before() -> Iterator[None]:
    """Afterwards torch has its threads again: a run sets as many as its settings say."""
    import torch

    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
