"""`dist-train sharpness`: from a run's checkpoint to a record and a table."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_train.analysis.landscape import make_landscape
from dist_train.analysis.landscape_files import LandscapeSettings, Statistics
from dist_train.analysis.sharpness import measure_sharpness
from dist_train.analysis.sharpness_record import SharpnessSettings, read_record
from dist_train.analysis.subset_loss import choose_samples, cut
from dist_train.checkpoint.files import read_checkpoint, remove_checkpoint, write_checkpoint
from dist_train.cli.main import main
from dist_train.cluster.communicator import SingleProcess
from dist_train.outcome import ExitCode, UsageError
from dist_train.training.evaluation import evaluate_stored
from tests.raising import raises
from tests.unit.image_folders import write_folder
from tests.unit.small_trainers import build_trainer, small_config

pytestmark = pytest.mark.usefixtures("threads_as_before")

OPTIONS = [
    *("--samples", "50", "--batch-size", "20", "--amplitudes", "0.01,0.1", "--draws", "2"),
    *("--keskar-iterations", "2", "--keskar-dimensions", "3", "--hessian-eigenvalues", "1", "--hessian-probes", "2"),
    *("--hessian-tolerance", "0.1"),
]
QUICK = SharpnessSettings(samples=50, batch_size=20, amplitudes=(0.01,), draws=2, keskar_iterations=1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    build_trainer(small_config(), folder, SingleProcess()).run()
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    for name in ("step-00000006.pt", "step-00000006.json"):
        (folder / name).write_bytes((trained / "checkpoints" / name).read_bytes())
    return folder.parent


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_bytes()) for path in sorted((run / "analysis").iterdir())]


def test_command_writes_a_record_and_prints_a_table(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = run / "checkpoints" / "step-00000006.pt"
    before = checkpoint.read_bytes()
    assert main(["sharpness", str(run), *OPTIONS]) == 0
    assert checkpoint.read_bytes() == before
    [record] = records(run)
    digest = hashlib.sha256(before).hexdigest()
    assert record["checkpoint"] == {"path": str(checkpoint), "sha256": digest, "step": 6}
    assert len(record["data"]["sha256"]) == 64
    assert record["data"]["samples"] == record["settings"]["samples"] == 50
    assert record["settings"]["amplitudes"] == [0.01, 0.1]
    assert record["keskar"]["full"] > record["keskar"]["subspace"] > 0
    assert [rise["amplitude"] for rise in record["expected_rise"]] == [0.01, 0.1]
    assert {"mean", "standard_error", "draws"} < set(record["expected_rise"][0])
    assert len(record["hessian"]["eigenvalues"]) == 1
    assert {"trace", "trace_standard_error"} < set(record["hessian"])
    assert set(record["seconds"]) == {"keskar", "rise", "hessian"}
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1] == str(next((run / "analysis").iterdir()))
    assert f"Keskar, full space, epsilon 0.001   {record['keskar']['full']:.4g}"[:30] in "\n".join(printed)
    assert sum("expected rise" in line for line in printed) == 2


def test_widths_and_noise_scale_are_measured(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ("--only", "width,noise-scale", "--batch-size", "10", "--width-rises", "0.05,1e9", "--width-directions", "2")
    assert main(["sharpness", str(run), *OPTIONS, *more]) == 0
    [record] = records(run)
    near, far = record["widths"]
    assert (near["rise"], near["directions"], far["censored"]) == (0.05, 2, 2)
    assert record["noise_scale"]["batches"] == 5
    printed = capsys.readouterr().out
    assert f"basin width, rise 0.05         {near['mean']:.4g} ± {near['standard_error']:.2g}\n" in printed
    assert f"basin width, rise 1e+09        {far['mean']:.4g}, at least: 2 of 2 end beyond the reach\n" in printed
    assert "gradient noise scale" in printed
    record["noise_scale"]["value"] = None
    next((run / "analysis").iterdir()).write_text(json.dumps(record))
    assert main(["sharpness", str(run), *OPTIONS, *more]) == 0
    assert "gradient noise scale, samples  unknown: more than these samples can show" in capsys.readouterr().out
    record["noise_scale"].update(variance=None, squared_gradient=None)
    next((run / "analysis").iterdir()).write_text(json.dumps(record))
    assert main(["sharpness", str(run), *OPTIONS, *more]) == 0
    assert "gradient noise scale, samples  not finite" in capsys.readouterr().out


@pytest.mark.parametrize(("batch_size", "ends_with"), [(25, 0), (26, 2), (49, 2)])
def test_noise_scale_needs_passes_of_at_most_half_of_the_images(run: Path, batch_size: int, ends_with: int) -> None:
    more = ("--only", "noise-scale", "--batch-size", str(batch_size))
    assert main(["sharpness", str(run), *OPTIONS, *more]) == ends_with


def test_only_missing_measures_are_added_to_a_record(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sharpness", str(run), *OPTIONS, "--only", "rise"]) == 0
    [first] = records(run)
    assert first["keskar"] is first["hessian"] is None
    assert "Keskar" not in capsys.readouterr().out
    assert main(["sharpness", str(run), *OPTIONS, "--only", "keskar,rise"]) == 0
    assert re.findall(r"^(\w+): ", capsys.readouterr().err, re.MULTILINE) == ["keskar"]
    [second] = records(run)
    assert second["expected_rise"] == first["expected_rise"]
    assert second["keskar"] is not None
    assert main(["sharpness", str(run), *OPTIONS, "--only", "keskar"]) == 0
    assert records(run) == [second]


def test_measures_of_two_commands_at_once_are_both_kept(run: Path) -> None:
    def begin_another(progress: str) -> None:
        measure_sharpness(run, QUICK, ["rise"])

    record, path = measure_sharpness(run, QUICK, ["keskar"], report=begin_another)
    assert record == read_record(path)
    assert record.has("keskar")
    assert record.has("rise")
    assert set(record.seconds) == {"keskar", "rise"}


def test_other_settings_or_checkpoints_have_their_own_record(run: Path, trained: Path) -> None:
    changes: tuple[dict[str, object], ...] = (
        {},
        {"seed": 1},
        {"samples": 40},
        {"statistics": "batch"},
    )
    found = [measure_sharpness(run, QUICK.model_copy(update=change), ["rise"])[0] for change in changes]
    assert len(list((run / "analysis").iterdir())) == len(changes)
    means = [record.expected_rise[0].mean for record in found if record.expected_rise]
    assert len(set(means)) == len(changes)
    assert found[0].data != found[1].data
    for name in ("step-00000003.pt", "step-00000003.json"):
        (run / "checkpoints" / name).write_bytes((trained / "checkpoints" / name).read_bytes())
    record, path = measure_sharpness(run / "checkpoints" / "step-00000003.pt", QUICK, ["rise"])
    assert record.checkpoint.step == 3
    assert len(list((run / "analysis").glob("sharpness-*.json"))) == len(changes) + 1
    assert read_record(path) == record


def test_infinite_loss_exits_with_3(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    contents = read_checkpoint(run / "checkpoints" / "step-00000006.pt")
    contents.model["classifier.bias"][0] = torch.inf
    remove_checkpoint(run / "checkpoints" / "step-00000006.pt")
    write_checkpoint(run / "checkpoints", contents, lambda: None)
    assert main(["sharpness", str(run), *OPTIONS]) == ExitCode.DIVERGED
    assert "[loss-not-finite]" in capsys.readouterr().err


def test_statistics_are_recomputed_like_in_the_run(run: Path, tmp_path: Path) -> None:
    recomputed = QUICK.model_copy(update={"statistics": "recomputed"})
    with_noise = [measure_sharpness(run, settings, ["rise"])[0].loss for settings in (QUICK, recomputed)]
    assert with_noise[0] == with_noise[1], "a run with noise stores recomputed statistics"
    build_trainer(small_config(noise={"method": "none"}), tmp_path / "base", SingleProcess()).run()
    base = [measure_sharpness(tmp_path / "base", settings, ["rise"])[0].loss for settings in (QUICK, recomputed)]
    assert base[0] != base[1]


def test_loss_over_all_training_images_agrees_with_evaluate(run: Path) -> None:
    settings = QUICK.model_copy(update={"samples": 100})
    record, _ = measure_sharpness(run, settings, ["rise"])
    evaluated = evaluate_stored(run, "train", [])
    assert record.loss == pytest.approx(evaluated["loss"], rel=1e-6)
    assert record.accuracy == evaluated["accuracy"]


def test_run_on_an_image_folder_is_measured(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "images")
    data = {"name": "imagefolder", "root": str(root), "image_size": 8, "classes": 3}
    config = small_config(data=data, batch={"global_size": 12, "micro_size": 6})
    build_trainer(config, tmp_path / "run", SingleProcess()).run()
    record, _ = measure_sharpness(tmp_path / "run", QUICK.model_copy(update={"samples": 24}), ["rise"])
    evaluated = evaluate_stored(tmp_path / "run", "train", [])
    assert record.loss == pytest.approx(evaluated["loss"], rel=1e-6)


def test_dimensions_of_the_subspace_matter_to_keskar_s_measure_alone(run: Path) -> None:
    settings = QUICK.model_copy(update={"keskar_dimensions": 10**6})
    assert measure_sharpness(run, settings, ["rise"])[0].has("rise")
    with raises(UsageError, "option-range"):
        measure_sharpness(run, settings, ["rise", "keskar"])


def test_folder_that_cannot_be_written_is_refused_before_the_measures(run: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    reported: list[str] = []
    with raises(UsageError, "output-unwritable"):
        measure_sharpness(run, QUICK, ["rise"], folder=tmp_path / "file", report=reported.append)
    assert not reported


def test_measures_are_deterministic(run: Path) -> None:
    first, path = measure_sharpness(run, QUICK, ["rise", "keskar"])
    second, copy = measure_sharpness(run, QUICK, ["rise", "keskar"], folder=run / "elsewhere")
    assert copy == run / "elsewhere" / path.name
    assert (second.keskar, second.expected_rise, second.data) == (first.keskar, first.expected_rise, first.data)


def test_dropout_is_off_with_each_pass_s_statistics(tmp_path: Path) -> None:
    config = small_config(run={"epochs": 1}, model={"name": "tests.unit.drawing_model:drawing", "width": 1.0})
    build_trainer(config, tmp_path, SingleProcess()).run()
    settings = QUICK.model_copy(update={"statistics": "batch"})
    first, second = (measure_sharpness(tmp_path, settings, ["rise"], folder=tmp_path / name)[0] for name in "ab")
    assert (first.loss, first.accuracy, first.expected_rise) == (second.loss, second.accuracy, second.expected_rise)


NET = """from torch import nn
def net(images, width, norm):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, images.classes))
"""


def test_norms_of_torch_that_keep_their_statistics_are_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "net.py").write_text(NET)
    config = small_config(run={"epochs": 1}, model={"name": f"{tmp_path / 'net.py'}:net", "width": 1.0})
    build_trainer(config, tmp_path / "run", SingleProcess()).run()

    def is_warned(measure: Callable[[], object]) -> bool:
        caplog.clear()
        measure()
        return "statistics of torch's own norms (2)" in caplog.text

    losses = {}
    for statistics in ("checkpoint", "recomputed", "batch"):
        settings = QUICK.model_copy(update={"statistics": statistics})
        measure = partial(measure_sharpness, tmp_path / "run", settings, ["rise"])
        assert is_warned(measure) == (statistics != "checkpoint")
        losses[statistics] = measure_sharpness(tmp_path / "run", settings, ["rise"])[0].loss
    assert len(set(losses.values())) == 1
    line = LandscapeSettings("direction", -1.0, 1.0, 3, samples=20, test_samples=20)
    kinds: tuple[Statistics, ...] = ("recomputed", "interpolated")
    for kind in kinds:
        chosen = replace(line, statistics=kind)
        draw = partial(make_landscape, [tmp_path / "run"], chosen, SingleProcess(), lambda done, total: None)
        assert is_warned(draw) == (kind == "recomputed")


@pytest.mark.parametrize(
    ("options", "code"),
    [
        (["--only", "keskar,flatness"], "option-choice"),
        (["--only", ","], "option-choice"),
        (["--samples", "101"], "option-range"),
        (["--samples", "1"], "option-range"),
        (["--draws", "1", "--keskar-epsilon", "0"], "option-range"),
        (["--amplitudes", "0.1,-1"], "option-range"),
        (["--samples", "50", "--keskar-dimensions", "5000"], "option-range"),
        (["--samples", "50", "--exclude", "nothing.*"], "no-such-weight"),
        (["--samples", "50", "model.width=1"], "settings-changed"),
        (["--samples", "50", "precision.compute=bfloat16"], "option-alone"),
        (["--samples", "50", "precision.tf32=true"], "option-alone"),
    ],
)
def test_invalid_options_are_refused(
    run: Path, capsys: pytest.CaptureFixture[str], options: list[str], code: str
) -> None:
    assert main(["sharpness", str(run), *options]) == 2
    assert f"[{code}]" in capsys.readouterr().err
    assert not (run / "analysis").exists()


def test_all_images_are_measured_if_there_are_fewer_than_the_default(run: Path) -> None:
    record, path = measure_sharpness(run, SharpnessSettings(draws=2, amplitudes=(0.01,)), ["rise"])
    assert record.data.samples == record.settings.samples == 100
    stated = SharpnessSettings(samples=100, draws=2, amplitudes=(0.01,))
    assert measure_sharpness(run, stated, ["rise"]) == (record, path), "it is the same measurement"


def test_missing_runs_and_damaged_records(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sharpness", str(tmp_path / "nowhere")]) == 2
    assert "[target-missing]" in capsys.readouterr().err
    _, path = measure_sharpness(run, QUICK, ["rise"])
    path.write_text("{}")
    with raises(UsageError, "record-damaged"):
        measure_sharpness(run, QUICK, ["rise"])


def test_option_that_is_no_number_is_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["sharpness", str(run), "--amplitudes", "small"])
    assert ended.value.code == 2


def test_several_ranks_are_refused(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "0")
    with raises(UsageError, "one-process-only"):
        measure_sharpness(run, QUICK)


def test_help_shows_settings_and_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["sharpness", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for name, field in SharpnessSettings.model_fields.items():
        assert f"--{name.replace('_', '-')} " in text
        value = field.default
        shown = (
            ",".join(f"{part:g}" if isinstance(part, float) else part for part in value)
            if isinstance(value, tuple)
            else value
        )
        stated = f"(default: {shown:g})" if isinstance(shown, int | float) else f"(default: {shown})"
        assert stated in text or f"{shown}: the stored ones, fixed (default)" in text, name


def test_samples_of_equal_classes_are_equally_many_shuffled_and_depend_on_the_seed() -> None:
    labels = torch.arange(200) // 20
    settings = SharpnessSettings(samples=50)
    chosen = choose_samples(labels, 10, settings)
    assert torch.bincount(labels[chosen]).tolist() == [5] * 10
    assert len(set(labels[chosen[:20]].tolist())) > 4
    assert torch.equal(chosen, choose_samples(labels, 10, settings))
    assert not torch.equal(chosen, choose_samples(labels, 10, settings.model_copy(update={"seed": 1})))


def test_samples_are_in_the_proportions_of_the_classes() -> None:
    labels = (torch.arange(200) >= 180).long()
    chosen = choose_samples(labels, 2, SharpnessSettings(samples=50))
    assert torch.bincount(labels[chosen]).tolist() == [45, 5]
    assert torch.equal(choose_samples(labels, 2, SharpnessSettings(samples=200)).sort().values, torch.arange(200))


@pytest.mark.parametrize(("samples", "sizes"), [(50, [20, 30]), (60, [20, 20, 20]), (19, [19]), (21, [21])])
def test_remaining_samples_join_the_last_batch(samples: int, sizes: list[int]) -> None:
    parts = cut(torch.arange(samples), 20)
    assert [len(part) for part in parts] == sizes
    assert torch.equal(torch.cat(parts), torch.arange(samples))
