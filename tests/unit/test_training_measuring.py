"""What each rank measures of a step, and how all of it comes to rank 0."""

from __future__ import annotations

import math
import shutil
import time
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from dist_train.checkpoint.files import newest_whole
from dist_train.cluster.communicator import Communicator, SingleProcess
from dist_train.launching.assembly import assemble
from dist_train.launching.preflight import ResumePoint
from dist_train.launching.run import train
from dist_train.launching.session import Session
from dist_train.models import build_model
from dist_train.monitoring.observers import Observers
from dist_train.optim.flat_weights import FlatWeights
from dist_train.outcome import DivergedError, StoppedError
from dist_train.rundir.paths import RunDirectory
from dist_train.rundir.records import Measurement, Observer, Record
from dist_train.training.measuring import Measuring, StepTimes, UsageReader, WeightNorms
from dist_train.training.stopping import StopRequests
from dist_train.training.trainer import Trainer
from tests.unit.simulated_ranks import SimulatedRanks, on_ranks, results
from tests.unit.small_trainers import build_trainer, small_config, state_bits

ON = {"enabled": True}


class Sheet(Observer):
    """An observer that keeps measurements, and the weights as they were when each step was done."""

    def __init__(self) -> None:
        self.measurements: list[Measurement] = []
        self.records: list[Record] = []
        self.weights: dict[int, torch.Tensor] = {}
        self.trainer: Trainer | None = None

    def record(self, record: Record) -> None:
        self.records.append(record)

    def measurement(self, measurement: Measurement) -> None:
        self.measurements.append(measurement)

    def progress(self, step: int) -> None:
        assert self.trainer is not None
        self.weights[step] = self.trainer.training_step.weights.values.clone()

    @property
    def steps(self) -> list[int]:
        return [measurement.step for measurement in self.measurements]


def prepare(folder: Path, comm: Communicator, *, going_on: bool = False, **sections: Any) -> tuple[Sheet, Trainer]:
    sheet = Sheet()
    contents = newest_whole(folder / "checkpoints", {}) if going_on else None
    trainer = build_trainer(small_config(**sections), folder, comm, observers=[sheet], contents=contents)
    sheet.trainer = trainer
    return sheet, trainer


def run(folder: Path, comm: Communicator, **options: Any) -> tuple[Sheet, Trainer]:
    sheet, trainer = prepare(folder, comm, **options)
    trainer.run()
    return sheet, trainer


@pytest.mark.parametrize("size", [2, 3])
def test_rank_0_has_every_rank_s_row_and_each_other_its_own(tmp_path: Path, size: int) -> None:
    sheets = [sheet for sheet, _ in results(size, lambda comm: run(tmp_path, comm, metrics=ON))]
    for sheet in sheets:
        assert sheet.steps == [1, 2, 3, 4, 5, 6]
    for rank, sheet in enumerate(sheets[1:], start=1):
        for own, all_ in zip(sheet.measurements, sheets[0].measurements, strict=True):
            assert len(all_.ranks) == size
            assert own.ranks[0].busy_seconds == all_.ranks[rank].busy_seconds
            assert own.ranks[0].wait_seconds == all_.ranks[rank].wait_seconds
            assert math.isnan(own.weight_norm)
    for measurement in (m for sheet in sheets for m in sheet.measurements):
        mine = measurement.ranks[0]
        assert mine.busy_seconds + mine.wait_seconds == pytest.approx(measurement.step_seconds)
        assert mine.wait_seconds == pytest.approx(measurement.parts.allreduce_wait)
        assert mine.resident_bytes > 10e6
        assert math.isnan(mine.device_bytes)
        assert math.isnan(mine.device_utilization)


def test_one_sum_a_measured_step_carries_all_of_it_and_none_where_metrics_are_off(tmp_path: Path) -> None:
    def names(comm: SimulatedRanks, **metrics: Any) -> list[str]:
        trainer = run(tmp_path / str(metrics), comm, metrics=metrics)[1]
        assert (trainer.measuring is not None) is any(metrics.get(k) for k in ("enabled", "loggers"))
        return comm.names

    logged = {"enabled": False, "loggers": [{"name": "tensorboard"}]}
    for count, metrics in ((0, {"enabled": False}), (6, ON), (6, logged)):
        for each in results(2, lambda comm, metrics=metrics: names(comm, **metrics)):  # type: ignore[misc]
            assert each.count("measurements") == count


def test_steps_are_measured_at_the_pace_of_the_records_and_at_the_end(tmp_path: Path) -> None:
    sheets = results(2, lambda comm: run(tmp_path, comm, metrics={**ON, "every_steps": 4})[0])
    assert [sheet.steps for sheet in sheets] == [[4, 6], [4, 6]]


def test_measuring_changes_no_bit_of_the_run(tmp_path: Path) -> None:
    _, measured = run(tmp_path / "on", SingleProcess(), metrics=ON)
    _, plain = run(tmp_path / "off", SingleProcess())
    assert state_bits(measured.network) == state_bits(plain.network)


def assert_norms(sheet: Sheet, initial: torch.Tensor) -> None:
    for measurement in sheet.measurements:
        values = sheet.weights[measurement.step].double()
        assert measurement.weight_norm == pytest.approx(float(values.norm()), rel=1e-5)
        assert measurement.distance == pytest.approx(float((values - initial.double()).norm()), rel=1e-5)
        assert measurement.distance > 0


def test_norm_and_distance_are_of_the_clean_weights_after_the_step_and_from_the_initial_ones_also_after_a_resume(
    tmp_path: Path,
) -> None:
    noise = {"amplitude": 0.5}
    first, trainer = run(tmp_path, SingleProcess(), metrics=ON, noise=noise, run={"max_steps": 3})
    second, _ = run(tmp_path, SingleProcess(), going_on=True, metrics=ON, noise=noise)
    assert (first.steps, second.steps) == ([1, 2, 3], [4, 5, 6])
    initial = FlatWeights(build_model(trainer.config)).values
    assert_norms(first, initial)
    assert_norms(second, initial)


class Distances(Observer):
    """The distances from the initial weights that a launch measured."""

    def __init__(self) -> None:
        self.measured: list[float] = []

    def measurement(self, measurement: Measurement) -> None:
        self.measured.append(measurement.distance)


def test_observers_of_one_s_own_are_given_measurements_also_without_the_exporter(tmp_path: Path) -> None:
    train(small_config(metrics={"every_steps": 2}), tmp_path / "alone", [seen := Distances()])
    assert len(seen.measured) == 3


def test_all_ranks_measure_if_rank_0_alone_has_observers_of_its_own(tmp_path: Path) -> None:
    config, directory = small_config(), RunDirectory(tmp_path)
    directory.create()

    def measured(comm: SimulatedRanks) -> int:
        observers = [Distances()] if comm.rank == 0 else []
        session = Session(directory, comm, Observers(observers), more_observers=observers)
        trainer = assemble(ResumePoint(config), session, StopRequests())
        trainer.run()
        return comm.names.count("measurements")

    assert results(2, measured) == [6, 6]


def test_a_run_that_begins_with_another_s_weights_measures_the_distance_from_these_while_their_file_is_there(
    tmp_path: Path,
) -> None:
    train(small_config(run={"epochs": 1}), tmp_path / "other")

    def distances(max_steps: int) -> list[float]:
        run = {"init_from": str(tmp_path / "other"), "max_steps": max_steps}
        unmoved = small_config(run=run, optimizer={"learning_rate": 0.0}, metrics={"enabled": True, "port": 0})
        train(unmoved, tmp_path / "run", [seen := Distances()])
        return seen.measured

    assert distances(2) == [0.0, 0.0]
    assert distances(4) == [0.0, 0.0]
    shutil.rmtree(tmp_path / "other")
    assert [math.isnan(distance) for distance in distances(6)] == [True, True]


def test_a_source_that_has_trained_on_is_not_what_the_run_began_with(tmp_path: Path) -> None:
    train(small_config(run={"max_steps": 2}), tmp_path / "other")
    run = {"init_from": str(tmp_path / "other")}
    train(small_config(run={**run, "max_steps": 2}), tmp_path / "run", [Distances()])
    train(small_config(run={"max_steps": 4}), tmp_path / "other")
    train(small_config(run={**run, "max_steps": 4}), tmp_path / "run", [seen := Distances()])
    assert all(math.isnan(distance) for distance in seen.measured)


def test_a_resumed_run_builds_its_network_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(small_config(run={"max_steps": 2}), tmp_path, [Distances()])
    monkeypatch.setattr("dist_train.launching.assembly.build_model", build := Mock(side_effect=build_model))
    train(small_config(run={"max_steps": 4}), tmp_path, [seen := Distances()])
    assert build.call_count == 1
    assert all(distance > 0 for distance in seen.measured)


def test_norms_are_taken_when_they_are_asked_for_over_any_number_of_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dist_train.training.measuring._CHUNK", 7)
    values, initial = torch.arange(20.0), torch.ones(20)
    norms = WeightNorms(values, initial)
    expected = float(values.norm()), float((values - initial).norm())
    norms.start()
    values.zero_()
    assert norms.result() == pytest.approx(expected)


def test_a_checkpoint_s_stall_counts_to_the_next_measured_step_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sheet, trainer = prepare(
        tmp_path, SingleProcess(), metrics={**ON, "every_steps": 2}, checkpoint={"every_epochs": 1}
    )
    assert trainer.saving.writer is not None
    submit = trainer.saving.writer.submit

    def slowly(*arguments: Any) -> None:
        time.sleep(0.5)
        submit(*arguments)

    monkeypatch.setattr(trainer.saving.writer, "submit", slowly)
    trainer.run()
    stalls = {measurement.step: measurement.parts.checkpoint_stall for measurement in sheet.measurements}
    assert stalls[4] >= 0.5, "saved after step 3"
    assert stalls[2] < 0.5
    assert stalls[6] < 0.5, "the stall after the last step comes too late to be told"


def test_the_last_measurement_is_handed_out_also_when_the_run_is_stopped(tmp_path: Path) -> None:
    def stopped(comm: SimulatedRanks) -> list[int]:
        sheet, trainer = prepare(tmp_path, comm, metrics=ON)
        trainer.stop.request("SIGTERM")
        with pytest.raises(StoppedError):
            trainer.run()
        return sheet.steps

    assert results(2, stopped) == [[1], [1]]


def test_a_run_that_fails_drops_the_measurement_under_way(tmp_path: Path) -> None:
    sheets: list[Sheet] = []

    def diverge(comm: SimulatedRanks) -> None:
        sheet, trainer = prepare(tmp_path, comm, metrics=ON)
        sheets.append(sheet)
        trainer.advance()
        trainer.training_step.weights.values.fill_(math.nan)
        trainer.run()

    assert all(isinstance(error, DivergedError) for error in on_ranks(2, diverge))
    assert [sheet.steps for sheet in sheets] == [[], []]


def test_only_rank_0_hands_out_records(tmp_path: Path) -> None:
    sheets = [sheet for sheet, _ in results(2, lambda comm: run(tmp_path, comm, metrics=ON))]
    assert sheets[0].records
    assert not sheets[1].records


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch says of the memory of GPU 1."""
    monkeypatch.setattr("torch.cuda.memory_reserved", lambda device: 1000 + device.index)
    monkeypatch.setattr("torch.cuda.max_memory_reserved", lambda device: 2000 + device.index)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: Mock(total_memory=3000 + device.index))


@pytest.mark.usefixtures("gpu")
def test_a_gpu_s_usage_is_what_torch_holds_of_it_and_a_share_read_every_other_second(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ask = Mock(return_value={"device_utilization": 0.42})
    usage = UsageReader(torch.device("cuda", 1), ask)
    read = [usage.read() for _ in range(5)][-1]
    assert (read["device_bytes"], read["device_peak_bytes"], read["device_total_bytes"]) == (1001, 2001, 3001)
    assert read["device_utilization"] == 0.42
    assert ask.call_count == 1
    monkeypatch.setattr("dist_train.training.measuring._USAGE_SECONDS", 0.0)
    usage.read()
    assert ask.call_count == 2


@pytest.mark.usefixtures("gpu")
def test_what_nvml_knows_of_it_is_part_of_what_the_rank_measures() -> None:
    usage = UsageReader(torch.device("cuda", 1), lambda: {"device_power_watts": 700.0})
    measuring = Measuring(SingleProcess(), usage)
    measuring.start(1, 0.5, StepTimes([]))
    measured = measuring.result()
    assert measured is not None
    assert measured.ranks[0].device_power_watts == 700.0
    assert math.isnan(measured.ranks[0].device_core_clock_hertz)
    assert math.isnan(measured.ranks[0].device_utilization)


def test_without_the_kernel_s_account_the_resident_memory_is_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dist_train.training.measuring._STATM", tmp_path / "missing")
    assert math.isnan(UsageReader(torch.device("cpu")).read()["resident_bytes"])
