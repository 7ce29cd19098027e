"""Averages and mixed samples in a whole run: the same bits on any number of ranks, and the raw run undisturbed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from dist_train.checkpoint.files import find_checkpoint, read_checkpoint
from dist_train.checkpoint.state import Weights, stored_state
from dist_train.cluster.communicator import Communicator, SingleProcess
from dist_train.data.loader import open_splits
from dist_train.models import build_model
from dist_train.models.norms import running_statistics
from dist_train.optim.averaging import mean_of
from dist_train.outcome import UsageError
from dist_train.training.evaluation import recompute_statistics, statistics_samples
from tests.raising import raises
from tests.unit.simulated_ranks import results
from tests.unit.small_trainers import build_trainer, small_config, state_bits
from tests.unit.test_training_trainer import Notebook


def run(
    folder: Path, comm: Communicator, sections: dict[str, Any]
) -> tuple[dict[str, bytes], list[tuple[object, ...]]]:
    notebook = Notebook()
    trainer = build_trainer(small_config(**sections), folder, comm, observers=[notebook] if comm.rank == 0 else [])
    trainer.run()
    trainer.close()
    return state_bits(trainer.network), notebook.measured()


MIXED = {"mixup": 0.5, "cutmix": 1.0, "label_smoothing": 0.1}


@pytest.mark.parametrize(
    "sections",
    [
        {"averaging": {"kind": "ema", "decay": 0.7}, "regularization": MIXED},
        {
            "averaging": {"kind": "lawa", "every_steps": 2, "last": 2},
            "model": {"norm": "none"},
            "regularization": MIXED,
        },
        {"averaging": {"kind": "lawa"}, "noise": {"method": "sam", "sharing": "micro_batch"}, "regularization": MIXED},
        {"averaging": {"kind": "ema"}, "noise": {"method": "none"}, "data": {"validation_size": 20}},
    ],
    ids=["ema", "without norms", "sam", "validation"],
)
def test_promise_3_with_averages_and_mixing(tmp_path: Path, sections: dict[str, Any]) -> None:
    [(state, measured)] = results(1, lambda comm: run(tmp_path / "one", comm, sections))
    ended = results(3, lambda comm: run(tmp_path / "three", comm, sections))
    assert all(each == state for each, _ in ended)
    assert ended[0][1] == measured
    one, three = (read_checkpoint(find_checkpoint(tmp_path / name)) for name in ("one", "three"))
    first, second = stored_state(one, "averaged"), stored_state(three, "averaged")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    with raises(UsageError, "no-such-choice"):
        stored_state(one, cast(Weights, "mean"))


def test_with_sync_norm_the_partner_is_the_same_on_any_number_of_ranks(tmp_path: Path) -> None:
    sections = {
        "model": {"norm": "sync"},
        "regularization": MIXED,
        "run": {"max_steps": 1},
        "noise": {"method": "none"},
    }
    sections["batch"] = {"global_size": 26, "micro_size": 13}
    losses = []
    for ranks in (1, 2):
        folder = tmp_path / str(ranks)
        ended = results(ranks, lambda comm, folder=folder: run(folder, comm, sections))  # type: ignore[misc]
        losses.append(ended[0][1][0][1])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_an_average_leaves_the_run_itself_as_it_is(tmp_path: Path) -> None:
    plain = run(tmp_path / "plain", SingleProcess(), {})
    averaged = run(tmp_path / "averaged", SingleProcess(), {"averaging": {"kind": "lawa", "every_steps": 1}})
    assert averaged[0] == plain[0]
    assert [entry for entry in averaged[1] if not str(entry[1]).endswith("-averaged")] == plain[1]


def test_an_average_is_of_the_weights_after_each_update_that_is_due(tmp_path: Path) -> None:
    averaging = {"kind": "lawa", "every_steps": 2, "last": 2}
    trainer = build_trainer(small_config(averaging=averaging), tmp_path, SingleProcess())
    after: list[Tensor] = []
    for _ in range(5):
        trainer.advance()
        after.append(trainer.training_step.weights.values.clone())
    assert torch.equal(trainer.training_step.averaging.value(5), mean_of([after[1], after[3]]))


@pytest.mark.parametrize("kind", ["ema", "lawa"])
def test_promise_5_a_resumed_run_goes_on_with_its_averages(tmp_path: Path, kind: str) -> None:
    config = small_config(averaging={"kind": kind})
    trainer = build_trainer(config, tmp_path, SingleProcess())
    for _ in range(3):
        trainer.advance()
    contents = replace(trainer.contents(), average=trainer._averaged.contents(3))
    resumed = build_trainer(config, tmp_path, SingleProcess(), contents=contents)
    before, after = (each.training_step.averaging.kept for each in (trainer, resumed))
    assert torch.equal(before, after)
    assert before.any()


def test_averaged_weights_have_norm_statistics_of_their_own(tmp_path: Path) -> None:
    config = small_config(averaging={"kind": "ema", "decay": 0.5}, noise={"method": "none"})
    run(tmp_path, SingleProcess(), {"averaging": {"kind": "ema", "decay": 0.5}, "noise": {"method": "none"}})
    contents = read_checkpoint(find_checkpoint(tmp_path))
    model = build_model(config)
    model.load_state_dict(stored_state(contents, "averaged"))
    stored = {name: value.clone() for name, value in running_statistics(model).items()}
    splits = open_splits(config.data, 0, torch.device("cpu"), channels_last=True)
    trainer = build_trainer(config, tmp_path / "other", SingleProcess())
    indices = statistics_samples(len(splits.train), config.model.norm_samples, 6, 0)
    recompute_statistics(
        model, splits.train, indices, micro_size=6, compute=trainer.training_step.compute, comm=SingleProcess()
    )
    for name, value in running_statistics(model).items():
        assert torch.equal(value, stored[name]), name
        assert not torch.equal(value, contents.model[name]), name


@pytest.mark.parametrize(("decay", "is_told"), [(0.999, True), (0.5, True), (0.3, False)])
def test_a_run_too_short_for_its_moving_average_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, decay: float, is_told: bool
) -> None:
    averaging = {"kind": "ema", "decay": decay}  # of six updates: 0.5^5 is 3 %
    build_trainer(small_config(averaging=averaging, run={"max_steps": 1}), tmp_path, SingleProcess())
    assert ("averaging.decay" in caplog.text) == is_told
