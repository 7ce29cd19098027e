"""Promise 1: a step uses `global_size` samples on any number of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from dist_train.config import parse_config
from dist_train.data.images import BatchRequest
from dist_train.data.loader import open_splits
from dist_train.data.plan import batch_indices, epoch_order
from dist_train.models import build_model
from tests.launching import (
    final_checkpoint,
    mostly_lengthy,
    records,
    run_here,
    small_settings,
    train_ranks,
    write_config,
)

PLAIN: dict[str, Any] = {
    "run": {"max_steps": 1},
    "model": {"norm": "none"},
    "noise": {"method": "none"},
    "optimizer": {"learning_rate": 0.5, "momentum": 0.0, "nesterov": False},
}


@pytest.mark.ranks
@pytest.mark.parametrize(("ranks", "controller"), mostly_lengthy([(3, "mpi"), (2, "torch"), (1, "alone")]))
def test_gradient_is_the_mean_over_the_global_batch(tmp_path: Path, ranks: int, controller: str) -> None:
    settings = small_settings(**PLAIN)
    config = parse_config(settings, source="test")
    model = build_model(config)
    train = open_splits(config.data, 0, torch.device("cpu")).train
    inputs, labels = train.read(BatchRequest(batch_indices(epoch_order(len(train), 0, 0), 0, 100)))
    loss = functional.cross_entropy(model(inputs), labels)
    loss.backward()

    train_ranks(ranks, controller, write_config(tmp_path, settings), tmp_path / "run")
    [record] = records(tmp_path / "run", "train")
    assert record["loss"] == pytest.approx(loss.item(), rel=1e-6)
    trained = final_checkpoint(tmp_path / "run")["model"]
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        expected = parameter.detach() - 0.5 * parameter.grad
        torch.testing.assert_close(trained[name], expected, rtol=1e-5, atol=1e-6)


def test_fewer_samples_than_a_batch_are_refused(tmp_path: Path) -> None:
    config = write_config(tmp_path, small_settings(batch={"global_size": 821}))
    ended = run_here("train", config, "--run-dir", str(tmp_path / "run"))
    assert ended.code == 2
    assert "[too-few-samples]" in ended.output
    assert "Traceback" not in ended.output
