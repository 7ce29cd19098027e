from __future__ import annotations

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_train.rundir.metrics_file import from_json, to_json
from dist_train.rundir.records import EvaluationRecord, EventRecord, Record, TrainRecord, better
from tests.unit.records import evaluation

numbers = st.floats(allow_nan=False, allow_infinity=False)
steps = st.integers(0, 10**9)
details = st.dictionaries(
    st.text(max_size=8).filter(lambda name: name not in {"kind", "step", "event", "time"}),
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | numbers | st.text(max_size=8),
    max_size=3,
)
records: st.SearchStrategy[Record] = st.one_of(
    st.builds(TrainRecord, steps, *[numbers] * 9),
    st.builds(EvaluationRecord, steps, numbers, st.text(max_size=8), numbers, numbers, steps, numbers),
    st.builds(EventRecord, steps, st.text(max_size=8), numbers, details),
)


def train(loss: float = 1.5) -> TrainRecord:
    return TrainRecord(3, 0.5, loss, 0.25, 0.1, 0.01, 2.0, 0.5, 16384.0, 1_700_000_000.5)


def test_a_train_record_has_the_fields_of_the_contract_in_its_order() -> None:
    assert to_json(train()) == (
        '{"kind": "train", "step": 3, "epoch": 0.5, "loss": 1.5, "accuracy": 0.25, "learning_rate": 0.1, '
        '"noise_amplitude": 0.01, "gradient_norm": 2.0, "step_seconds": 0.5, "samples_per_second": 16384.0, '
        '"time": 1700000000.5}'
    )


def test_an_evaluation_record_has_the_fields_of_the_contract_in_its_order() -> None:
    assert to_json(EvaluationRecord(3, 0.5, "test", 1.5, 0.25, 10_000, 7.5)) == (
        '{"kind": "eval", "step": 3, "epoch": 0.5, "split": "test", "loss": 1.5, "accuracy": 0.25, '
        '"samples": 10000, "time": 7.5}'
    )


def test_the_details_of_an_event_stand_beside_its_name() -> None:
    line = to_json(EventRecord(3, "resumed", 7.5, {"file": "a\nb.pt", "ranks": 2}))
    assert line == '{"kind": "event", "step": 3, "event": "resumed", "file": "a\\nb.pt", "ranks": 2, "time": 7.5}'


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_leaves_valid_json(loss: float) -> None:
    line = to_json(train(loss))

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    assert json.loads(line, parse_constant=refuse)["loss"] is None
    back = from_json(line)
    assert isinstance(back, TrainRecord)
    assert math.isnan(back.loss)


@settings(deadline=None, max_examples=100)
@given(records)
def test_every_record_reads_back_as_it_was_from_one_line(record: Record) -> None:
    line = to_json(record)
    assert "\n" not in line
    assert from_json(line) == record


@settings(deadline=None, max_examples=100)
@given(records, st.data())
def test_a_torn_line_is_no_record(record: Record, data: st.DataObject) -> None:
    line = to_json(record).encode()
    assert from_json(line[: data.draw(st.integers(0, len(line) - 1))]) is None


@pytest.mark.parametrize(
    "line",
    [
        "",
        "7",
        "[]",
        "null",
        '{"kind": "train"}',
        '{"kind": "other", "step": 1}',
        '{"kind": [], "step": 1}',
        '{"kind": "event", "step": true, "event": "x", "time": 1}',
    ],
)
def test_a_line_of_another_form_is_no_record(line: str) -> None:
    assert from_json(line) is None


@pytest.mark.parametrize(
    ("best", "record", "now"),
    [
        (None, evaluation(1, accuracy=0.0), 0.0),
        (0.5, evaluation(1, accuracy=0.6), 0.6),
        (0.5, evaluation(1, accuracy=0.4), 0.5),
        (0.5, evaluation(1, "train", accuracy=0.6), 0.5),
        (None, evaluation(1, accuracy=0.6, loss=math.nan), None),
        (0.5, evaluation(1, accuracy=math.nan), 0.5),
    ],
)
def test_the_best_accuracy_is_of_test_evaluations_that_are_finite(
    best: float | None, record: EvaluationRecord, now: float | None
) -> None:
    assert better(best, record) == now
