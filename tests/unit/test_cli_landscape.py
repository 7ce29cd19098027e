"""`dist-train landscape`: what it prints, and how it ends."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dist_train.analysis.landscape_points import axis
from dist_train.cli.main import main, parse

pytestmark = pytest.mark.usefixtures("threads_as_before")


def test_it_prints_widths_and_the_folder(trained_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["landscape", "direction", str(trained_run), "--points", "3", "--range", "-0.5", "0.5", "--samples", "20"]
    assert main(words) == 0
    *widths, folder = capsys.readouterr().out.splitlines()
    assert len(widths) == 2
    assert all(line.startswith("direction 0, basin of A: loss under ") for line in widths)
    assert Path(folder).parent == trained_run / "analysis"
    picture = (Path(folder) / "figure.svg").read_bytes()
    assert main([*words, "--scale", "log"]) == 0
    assert (Path(folder) / "figure.svg").read_bytes() != picture, "the result is drawn again"
    told = capsys.readouterr()
    assert told.out.splitlines() == [*widths, folder]
    assert "this result existed already" in told.err
    (Path(folder) / "figure.svg").unlink()
    (Path(folder) / "figure.svg").mkdir()
    assert main(words) == 2
    (Path(folder) / "figure.svg").rmdir()
    assert "[output-unwritable]" in capsys.readouterr().err


def test_directions_have_points_at_the_distances_of_the_report_by_default() -> None:
    arguments = parse(["landscape", "direction", "runs/sb"])
    start, stop = arguments.range
    assert {-0.5, -0.1, 0.0, 0.1, 0.5} <= set(axis(start, stop, arguments.points))


def test_points_whose_loss_is_not_finite_are_told(
    trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["landscape", "direction", str(trained_run), "--points", "3", "--range", "0", "1e38"]
    words += ["--samples", "20", "--output", str(tmp_path), "--normalization", "none"]
    for _ in range(2):
        assert main(words) == 0
        told = capsys.readouterr()
        assert "the loss is not finite in 4 rows of points.csv" in told.err
    settings = json.loads((Path(told.out.splitlines()[-1]) / "settings.json").read_text())
    assert settings["not_finite"] == 4


def test_between_two_checkpoints_and_into_another_folder(
    trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = trained_run / "checkpoints" / "step-00000003.pt"
    words = ["landscape", "interpolate", str(first), str(trained_run), "--points", "5"]
    assert main([*words, "--output", str(tmp_path / "there"), "--samples", "all", "precision.channels_last=true"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in told[:-1]] == [f"basin of {basin}" for basin in "BBA"]
    assert "none" in told[2], "the loss falls from the early checkpoint to the last one"
    assert Path(told[-1]).parent == tmp_path / "there"


@pytest.mark.parametrize("start", ["-1e-05", "-1.5E-3", "-.5", "-2"])
def test_range_may_begin_with_any_negative_number(start: str) -> None:
    assert parse(["landscape", "direction", "RUN", "--range", start, "1e-3"]).range == [float(start), 0.001]


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["direction", "nowhere"], "target-missing"),
        (["interpolate", "RUN", "RUN"], "same-checkpoint"),
        (["direction", "RUN", "--points", "1"], "option-range"),
        (["direction", "RUN", "--points", "4"], "option-range"),
        (["direction", "RUN", "--range", "0.5", "1"], "option-range"),
        (["direction", "RUN", "--samples", "0"], "option-range"),
        (["direction", "RUN", "--statistics", "interpolated", "--statistics-samples", "9"], "option-alone"),
        (["direction", "RUN", "--exclude", "nothing"], "no-such-weight"),
        (["direction", "RUN", "model.width=2"], "settings-changed"),
        (["direction", "RUN", "--precision", "float32", "precision.compute=bfloat16"], "option-alone"),
        (["plane", "RUN", "--trajectory"], "too-few-checkpoints"),
        (["plane", "RUN", "--trajectory", "--range", "-1", "2"], "option-alone"),
        (["plane", "RUN", "--trajectory", "--seed", "1"], "option-alone"),
    ],
)
def test_bad_input_ends_with_2_and_the_fix(
    trained_run: Path, words: list[str], code: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["landscape", *(str(trained_run) if word == "RUN" else word for word in words)]) == 2
    told = capsys.readouterr()
    assert f"[{code}]" in told.err
    assert told.out == ""


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["sideways"],
        ["interpolate", "RUN"],
        ["direction", "RUN", "--samples", "some"],
        ["direction", "RUN", "--threads", "0"],
        ["plane", "R", "-x"],
    ],
)
def test_bad_usage_ends_with_2(words: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["landscape", *words])
    assert ended.value.code == 2
