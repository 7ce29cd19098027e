from __future__ import annotations

import struct
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path

import pytest

from dist_train.cli.main import parse
from dist_train.outcome import UsageError
from dist_train.report.drawing import draw_learning_curve
from dist_train.rundir.metrics_file import to_json
from dist_train.rundir.records import EvaluationRecord, EventRecord, Record, TrainRecord
from tests.raising import raises
from tests.unit import records as plausible


def train(step: int, noise: float = 0.01, loss: float = 1.0, **numbers: float) -> TrainRecord:
    rate = 0.1 * min(1, step / 14)
    return plausible.train(step, loss=loss / step, learning_rate=rate, noise_amplitude=noise, **numbers)


def evaluation(step: int, split: str = "test") -> EvaluationRecord:
    return plausible.evaluation(step, split, loss=1 / step, accuracy=0.6 + step / 1000)


def make_run(directory: Path, records: Sequence[Record], torn: str = "") -> Path:
    directory.mkdir(parents=True)
    plausible.write_records(directory, records, torn)
    return directory


def long_run(directory: Path) -> Path:
    records: list[Record] = []
    for step in range(1, 71):
        records.append(train(step))
        if step % 7 == 0:
            records += [evaluation(step), evaluation(step, "train")]
    return make_run(directory, records)


def svg(output: Path) -> str:
    content = output.read_text()
    ElementTree.fromstring(content)
    return content


def words(output: Path) -> set[str]:
    """Return the texts of an SVG picture, which matplotlib writes as comments."""
    lines = svg(output).splitlines()
    return {line.strip()[4:-3].strip() for line in lines if line.strip().startswith("<!--")}


def test_png_is_large_enough_to_read(tmp_path: Path) -> None:
    output = tmp_path / "curve.png"
    draw_learning_curve([long_run(tmp_path / "lb")], output)
    content = output.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", content[16:24])
    assert width > 1000
    assert height > 1000


def test_svg_has_titles_and_labels(tmp_path: Path) -> None:
    output = tmp_path / "curve.svg"
    draw_learning_curve([long_run(tmp_path / "lb_8192")], output)
    assert words(output) >= {
        "lb_8192",
        "loss",
        "accuracy, %",
        "epoch",
        "train, each batch",
        "train",
        "test",
        "learning rate (peak 0.1)",
        "noise amplitude (peak 0.01)",
        "best test accuracy 67.00 %, epoch 10",
    }


def test_drawing_is_deterministic(tmp_path: Path) -> None:
    run = long_run(tmp_path / "lb")
    outputs = [tmp_path / "a.svg", tmp_path / "b.svg"]
    for output in outputs:
        draw_learning_curve([run], output)
    assert outputs[0].read_bytes() == outputs[1].read_bytes()


def test_several_runs_are_labelled_by_name(tmp_path: Path) -> None:
    output = tmp_path / "curves.svg"
    runs = [long_run(tmp_path / f"run{index}") for index in range(9)]
    runs.append(make_run(tmp_path / "young", [train(1), train(2)]))
    draw_learning_curve(runs, output)
    assert words(output) >= {"10 runs", *(f"run{index}" for index in range(9)), "young (train only)"}


@pytest.mark.parametrize(
    "records",
    [
        [train(1)],
        [train(1), train(2), train(3)],
        [evaluation(7)],
        [plausible.evaluation(0)],
        [train(1, noise=0.0), EventRecord(1, "resumed", 0.0, {})],
        [train(step, loss=float("nan") if step > 2 else 1.0) for step in range(1, 6)],
        [train(step, loss=10.0**-step) for step in range(1, 9)],
    ],
    ids=["one step", "no evaluation", "only an evaluation", "step 0", "no noise", "not finite", "wide range"],
)
def test_run_with_few_records_is_drawn_without_a_warning(records: list[Record], tmp_path: Path) -> None:
    output = tmp_path / "curve.svg"
    draw_learning_curve([make_run(tmp_path / "lb", records)], output)
    assert "loss" in words(output)


def test_picture_of_a_long_run_is_small(tmp_path: Path) -> None:
    output = tmp_path / "curve.svg"
    draw_learning_curve([make_run(tmp_path / "sb", [train(step) for step in range(1, 20_000)])], output)
    assert output.stat().st_size < 400_000


def test_incomplete_last_line_is_ignored(tmp_path: Path) -> None:
    whole, torn = tmp_path / "whole.svg", tmp_path / "torn.svg"
    draw_learning_curve([make_run(tmp_path / "a" / "lb", [train(1), train(2)])], whole)
    line = to_json(train(3))[:50]
    draw_learning_curve([make_run(tmp_path / "b" / "lb", [train(1), train(2)], line)], torn)
    assert torn.read_bytes() == whole.read_bytes()


def test_curves_that_cannot_be_drawn_are_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path / "lb", [train(1)])
    (tmp_path / "empty").mkdir()
    started = make_run(tmp_path / "started", [EventRecord(0, "started", 0.0, {})])
    with raises(UsageError, "output-form"):
        draw_learning_curve([run], tmp_path / "curve.gif")
    with raises(UsageError, "folder-missing"):
        draw_learning_curve([run], tmp_path / "nowhere" / "curve.png")
    (tmp_path / "folder.png").mkdir()
    with raises(UsageError, "output-unwritable"):
        draw_learning_curve([run], tmp_path / "folder.png")
    with raises(UsageError, "no-run-here"):
        draw_learning_curve([run, tmp_path / "empty"], tmp_path / "curve.png")
    with raises(UsageError, "no-run-here"):
        draw_learning_curve([tmp_path / "missing"], tmp_path / "curve.png")
    with raises(UsageError, "records-unreadable"):
        draw_learning_curve([run / "metrics.jsonl"], tmp_path / "curve.png")
    with raises(UsageError, "no-measurement"):
        draw_learning_curve([started], tmp_path / "curve.png")
    assert not (tmp_path / "curve.png").exists()


def run_command(*words: str) -> int:
    arguments = parse(["curve", *words])
    return int(arguments.run(arguments))


def test_command_draws_into_the_run_directory_and_prints_the_path(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = long_run(tmp_path / "lb")
    assert run_command(str(run)) == 0
    assert capsys.readouterr().out == f"{run}/learning_curve.png\n"
    assert (run / "learning_curve.png").stat().st_size > 10_000


def test_command_draws_several_runs_into_one_file(tmp_path: Path) -> None:
    runs = [str(long_run(tmp_path / name)) for name in ("lb", "sb")]
    with raises(UsageError, "output-unset"):
        run_command(*runs)
    assert run_command(*runs, "-o", str(tmp_path / "both.svg")) == 0
    assert {"lb", "sb"} <= words(tmp_path / "both.svg")
