"""Which runs a report puts together, and which it leaves out: by their settings, and by how they ended."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import yaml

from dist_train.config.loading import parse_yaml, write_override
from dist_train.outcome import UsageError
from dist_train.report.figures import landscape_figure, lines_between, run_landscapes
from dist_train.report.measures import JUDGED_ACCURACY, JUDGED_LOSS, Measure, measures_of, sharpness_left_out
from dist_train.report.page import render, tables_in_markdown
from dist_train.report.sharpness_charts import sharpness_scatters
from dist_train.report.stored_run import Subject, read_run, read_subject
from dist_train.report.tables import contrast_tables, effect_tables, run_cells, variant_cell
from dist_train.report.variants import changes_between, duplicates_of, panels_of, shown
from dist_train.rundir.metrics_file import to_json
from dist_train.rundir.records import EvaluationRecord, EventRecord, TrainRecord
from dist_train.watch.figure import Chart
from tests.raising import raises
from tests.unit.foreign_files import without_root
from tests.unit.records import evaluation, write_records
from tests.unit.report_study import make_run, make_study, treatments, write_status


def measures(subject: Subject) -> dict[str, Measure]:
    return {measure.key: measure for measure in measures_of(subject.runs)}


def test_runs_whose_rates_differ_in_the_seventh_digit_are_two_variants(tmp_path: Path) -> None:
    treatment = treatments()[0]
    for name, rate in (("first", 0.1234567), ("second", 0.1234568)):
        settings = {**treatment.settings, "run.name": name, "optimizer.learning_rate": rate}
        make_run(tmp_path / name, treatment, 0, settings)
    [panel] = panels_of(read_subject(tmp_path).runs)
    assert [len(variant.counted) for variant in panel.variants] == [1, 1]


@pytest.mark.parametrize(
    "value",
    [None, True, 0.1, 1e-05, 1_000_000.0, 0.1234567, 0.1234568, 3, [0.9, 0.99999], "text", "", "true", "1e-3", "a: b"],
)
def test_shown_settings_are_overrides_of_the_same_value(value: object) -> None:
    assert parse_yaml(f"key: {shown(value)}") == {"key": value}


@pytest.mark.parametrize(
    ("path", "values", "counts"),
    [
        ("comm.engine", ("auto", "torch"), [2]),
        ("evaluation.batch_size", (500, 250), [2]),
        ("evaluation.train_samples", (100, 0), [1, 1]),
    ],
)
def test_settings_that_cannot_change_a_result_do_not_make_a_variant(
    tmp_path: Path, path: str, values: tuple[object, object], counts: list[int]
) -> None:
    treatment = treatments()[0]
    for seed, value in enumerate(values):
        make_run(tmp_path / str(seed), treatment, seed, {**treatment.settings, "run.seed": seed, path: value})
    [panel] = panels_of(read_subject(tmp_path).runs)
    assert [len(variant.counted) for variant in panel.variants] == counts


@pytest.mark.parametrize(("smoothing", "counts"), [(0.0, [2]), (0.1, [1, 1])])
def test_run_of_an_older_version_has_the_defaults_of_settings_that_it_lacks(
    tmp_path: Path, smoothing: float, counts: list[int]
) -> None:
    treatment = treatments()[0]
    for seed in (0, 1):
        settings = {**treatment.settings, "run.seed": seed, "regularization.label_smoothing": smoothing * seed}
        make_run(tmp_path / str(seed), treatment, seed, settings)
    config = tmp_path / "0" / "config.yaml"
    config.write_text(
        yaml.safe_dump(
            {name: each for name, each in yaml.safe_load(config.read_text()).items() if name != "regularization"}
        )
    )
    [panel] = panels_of(read_subject(tmp_path).runs)
    assert [len(variant.counted) for variant in panel.variants] == counts
    changes = [(change.path, change.base, change.value) for change in panel.variants[-1].changes]
    assert changes == ([("regularization.label_smoothing", 0.0, smoothing)] if smoothing else [])


@pytest.mark.parametrize("seeds", [(0, 0), (0, 1)])
def test_runs_of_other_plugin_code_are_two_variants(tmp_path: Path, seeds: tuple[int, int]) -> None:
    treatment = treatments()[0]
    for name, seed, digest in zip(("first", "second"), seeds, ("a" * 64, "b" * 64), strict=True):
        run = make_run(tmp_path / name, treatment, seed, {**treatment.settings, "run.seed": seed})
        write_status(run, "finished", 200, environment={"torch": name, "plug-in mine/net.py": digest})
    [panel] = panels_of(read_subject(tmp_path).runs)
    assert [len(variant.counted) for variant in panel.variants] == [1, 1]
    [change] = panel.variants[1].changes
    assert (change.path, change.value) == ("plug-in mine/net.py", "b" * 64)
    assert panel.variants[1].label == f"plug-in mine/net.py {'b' * 8}"


def test_planned_runs_whose_settings_are_lost_repeat_no_other(tmp_path: Path) -> None:
    study = make_study(tmp_path / "study", seeds=(0,))
    for config in study.glob("*/config.yaml"):
        config.unlink()
    runs = read_subject(study).runs
    assert ({run.seed for run in runs}, [run.name for run in runs if run.settings]) == ({0}, [])
    assert duplicates_of(runs) == {}


@pytest.mark.parametrize(
    ("settings", "codes", "counts"),
    [
        # one process trains several plug-ins of a folder, and has imported them all for the later ones
        ({"model.name": "/me/net.py:Net"}, ({"net": "a"}, {"net": "a", "other": "c"}), [2]),
        ({"model.name": "/me/net.py:Net"}, ({"net": "a"}, {"net": "b", "other": "c"}), [1, 1]),
        ({"metrics.loggers": [{"name": "/me/log.py:Log"}]}, ({"log": "a"}, {"log": "b"}), [2]),
        ({"metrics.loggers": [{"name": "me.log:Log"}]}, ({"log": "a"}, {"log": "b"}), [2]),
        ({"metrics.loggers": [{"name": "/me/log.py:Log"}]}, ({"help": "a"}, {"help": "b"}), [1, 1]),
        (
            {"metrics.loggers": [{"name": "/me/log.py:Log"}], "data.augment": ["/me/log.py:darker"]},
            ({"log": "a"}, {"log": "b"}),
            [1, 1],
        ),
        (
            {"metrics.loggers": [{"name": "/me/log.py:Log"}], "plugins": ["/me/log.py"]},
            ({"log": "a"}, {"log": "b"}),
            [1, 1],
        ),
    ],
)
@pytest.mark.parametrize("seeds", [(0, 0), (0, 1)])
def test_only_code_that_both_runs_have_and_that_can_change_a_result_tells_them_apart(
    tmp_path: Path,
    settings: Mapping[str, object],
    codes: tuple[Mapping[str, str], Mapping[str, str]],
    counts: list[int],
    seeds: tuple[int, int],
) -> None:
    treatment = treatments()[0]
    for name, seed, code in zip(("first", "second"), seeds, codes, strict=True):
        run = make_run(tmp_path / name, treatment, seed, {**treatment.settings, "run.seed": seed})
        nested = yaml.safe_load((run / "config.yaml").read_text())
        for path, value in settings.items():
            *sections, key = path.split(".")
            (nested[sections[0]] if sections else nested)[key] = value
        (run / "config.yaml").write_text(yaml.safe_dump(nested))
        environment = {f"plug-in me/{file}.py": digest * 16 for file, digest in code.items()}
        write_status(run, "finished", 200, environment=environment)
    [panel] = panels_of(read_subject(tmp_path).runs)
    is_one = counts == [2]
    assert [len(variant.runs) for variant in panel.variants] == counts
    assert [len(variant.repeated) for variant in panel.variants] == ([int(seeds == (0, 0))] if is_one else [0, 0])


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_runs_of_other_code_are_not_joined_by_a_run_that_lacks_it(tmp_path: Path, order: tuple[int, ...]) -> None:
    codes = {"net": "a"}, {"net": "a", "help": "b"}, {"net": "a", "help": "c"}
    treatment = treatments()[0]
    for place, number in enumerate(order):
        run = make_run(tmp_path / f"run-{place}", treatment, number, {**treatment.settings, "run.seed": number})
        environment = {f"plug-in me/{file}.py": digest * 16 for file, digest in codes[number].items()}
        write_status(run, "finished", 200, environment=environment)
    [panel] = panels_of(read_subject(tmp_path).runs)
    seeds = [{run.seed for run in variant.runs} for variant in panel.variants]
    assert len(seeds) == 2
    assert not any({1, 2} <= each for each in seeds)


@pytest.mark.parametrize(("name", "is_own"), [("imagefolder", True), ("cifar10", False)])
def test_runs_of_own_data_in_two_folders_are_two_variants_that_are_not_paired(
    tmp_path: Path, name: str, is_own: bool
) -> None:
    treatment = treatments()[0]
    for seed in (0, 1):
        for root in ("/cats", "/dogs"):
            data = {"data.name": name, "data.root": root, **({"data.classes": 5} if is_own else {})}
            settings = {**treatment.settings, **data, "run.seed": seed}
            make_run(tmp_path / f"{root[1:]}-{seed}", treatment, seed, settings)
    subject = read_subject(tmp_path)
    [panel] = panels_of(subject.runs)
    assert [(len(each.counted), len(each.repeated)) for each in panel.variants] == [(2, 0)] * 2 if is_own else [(2, 2)]
    if is_own:
        base, other = panel.variants
        assert other.label == "root dogs"
        assert other.pairs(base, measures(subject)["final_test"]) == []
    assert ("of 2 data sets" in tables_in_markdown(subject)) is is_own


@pytest.mark.parametrize("seeds", [(0, 0), (0, 1)])
def test_own_data_under_another_spelling_or_at_another_place_are_the_same(
    tmp_path: Path, seeds: tuple[int, int]
) -> None:
    treatment = treatments()[0]
    for root, seed in zip(("photos/", "/scratch/photos"), seeds, strict=True):
        data = {"data.name": "imagefolder", "data.classes": 5, "data.root": root}
        make_run(tmp_path / root.strip("/"), treatment, seed, {**treatment.settings, **data, "run.seed": seed})
    subject = read_subject(tmp_path)
    [[variant]] = [panel.variants for panel in panels_of(subject.runs)]
    assert (len(variant.runs), len(variant.repeated)) == (2, int(seeds == (0, 0)))
    assert "data sets" not in tables_in_markdown(subject)


def test_runs_of_a_study_whose_jobs_copied_the_data_elsewhere_are_paired(tmp_path: Path) -> None:
    study = make_study(tmp_path / "study", seeds=(0, 1))
    for at, config in enumerate(study.glob("*/config.yaml")):
        settings = yaml.safe_load(config.read_text())
        settings["data"] |= {"name": "imagefolder", "classes": 5, "root": f"/scratch/job-{at}"}
        config.write_text(yaml.safe_dump(settings))
    (study / "base.yaml").write_text(yaml.safe_dump({"data": {"name": "imagefolder", "classes": 5, "root": "/data"}}))
    base, other, *_ = panels_of(read_subject(study).runs)[0].variants
    assert len(other.pairs(base, measures(read_subject(study))["final_test"])) == 2


def test_a_baseline_differs_from_that_of_the_smallest_batch_and_the_others_from_their_own(tmp_path: Path) -> None:
    small, large = panels_of(read_subject(make_study(tmp_path / "study", seeds=(0,))).runs)
    assert small.base is not None
    assert large.base is not None
    assert small.base.changes == ()
    found = {change.path: (change.base, change.value) for change in large.base.changes}
    assert found == {"batch.global_size": (128, 8192), "run.epochs": (20, 40)}
    others = [variant for panel in (small, large) for variant in panel.variants if not variant.is_base]
    assert {change.path for variant in others for change in variant.changes} == {"noise.method", "noise.amplitude"}


def test_planned_data_whose_folder_has_a_space_in_its_name_are_those_of_the_base(tmp_path: Path) -> None:
    study = make_study(tmp_path / "study", seeds=(0, 1))
    data = {"name": "imagefolder", "classes": 5, "root": "/data/my photos"}
    for config in study.glob("*/config.yaml"):
        config.write_text(yaml.safe_dump({**yaml.safe_load(config.read_text()), "data": data}))
    (study / "base.yaml").write_text(yaml.safe_dump({"data": data}))
    plan = json.loads((study / "runs.json").read_text())
    for entry in plan[::2]:
        entry["overrides"].append(write_override("data.root", data["root"]))
    (study / "runs.json").write_text(json.dumps(plan))
    assert {run.data for run in read_subject(study).runs} == {"imagefolder in my photos"}


@pytest.mark.parametrize("has_ended", [True, False])
def test_range_test_in_a_folder_of_runs_is_named_and_does_not_count(tmp_path: Path, has_ended: bool) -> None:
    treatment = treatments()[0]
    # One of an older version has the configuration's name, and is known once it has ended.
    for name, own in (("demo", "demo"), ("a-range", "demo" if has_ended else "demo-lr-range")):
        make_run(tmp_path / name, treatment, 0, {**treatment.settings, "run.name": own})
    if has_ended:
        (tmp_path / "a-range" / "lr_range.json").write_text("{}")
    subject = read_subject(tmp_path)
    assert ([run.name for run in subject.runs], subject.range_tests) == (["demo"], ("a-range",))
    for text in (render(subject), tables_in_markdown(subject)):
        assert "which do not count: a-range." in text
    assert read_subject(tmp_path / "a-range").kind == "run"
    shutil.rmtree(tmp_path / "demo")
    with raises(UsageError, "no-run-here") as refused:
        read_subject(tmp_path)
    assert "(a-range)" in str(refused.value)


def test_what_cannot_be_read_is_listed_and_hides_no_other_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    treatment = treatments()[0]
    for seed, name in enumerate(("closed", "no-analysis", "unsearchable", "whole")):
        make_run(tmp_path / "runs" / name, treatment, seed, {**treatment.settings, "run.seed": seed})
    monkeypatch.chdir(tmp_path)
    tmp_path.chmod(0o755)
    for path, mode in (("closed", 0), ("no-analysis/analysis", 0), ("unsearchable", 0o444)):
        Path("runs", path).chmod(mode)
    with without_root():
        runs = {run.name: run for run in read_subject(Path("runs")).runs}
    assert {name: run.state for name, run in runs.items()} == {
        "closed": "broken",
        "no-analysis": "finished",
        "unsearchable": "broken",
        "whole": "finished",
    }
    assert len(runs["no-analysis"].analyses.problems) == 1
    assert runs["whole"].analyses.sharpness
    assert not runs["whole"].analyses.problems
    for path in ("closed", "no-analysis/analysis", "unsearchable"):
        Path("runs", path).chmod(0o700)


def test_a_folder_that_cannot_be_read_is_no_run_where_there_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tmp_path.chmod(0o755)
    for path, mode in (("disk", 0o755), ("disk/lost+found", 0)):
        Path(path).mkdir()
        Path(path).chmod(mode)
    with without_root(), raises(UsageError, "no-run-here") as refused:
        read_subject(Path("disk"))
    assert "lost+found" in str(refused.value)


def test_a_plan_that_cannot_be_read_needs_no_new_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    study = make_study(Path("study"), seeds=(0,))
    tmp_path.chmod(0o755)
    study.chmod(0o755)
    (study / "runs.json").chmod(0)
    with without_root(), raises(UsageError, "plan-damaged") as refused:
        read_subject(study)
    assert "sweep" not in str(refused.value)
    (study / "runs.json").chmod(0o600)
    for damaged in ("{torn", '[{"name": "sb-seed-0", "overrides": ["run.seed"]}]'):
        (study / "runs.json").write_text(damaged)
        with raises(UsageError, "plan-damaged") as refused:
            read_subject(study)
        assert "sweep" in str(refused.value)


def test_diverged_run_counts_as_guessing_and_has_no_other_number(tmp_path: Path) -> None:
    study = make_study(tmp_path / "study")
    write_status(study / "sb-seed-0", "failed", 100, "the loss is not finite", exit_code=3)
    subject = read_subject(study)
    base = panels_of(subject.runs)[0].variants[0]
    notes = {key: variant_cell(base, measure).note for key, measure in measures(subject).items()}
    assert notes.pop("final_test") == "n = 3, 1 as if guessing"
    assert set(notes.values()) == {"n = 2, 1 diverged"}
    write_status(study / "sb-seed-1", "stopped", 100, "asked to")
    subject = read_subject(study)
    counting = "diverged: counts with the accuracy of guessing"
    assert f"- sb-seed-0: failed, the loss is not finite; {counting}\n- sb-seed-1: stopped, asked to\n" in (
        tables_in_markdown(subject)
    )
    assert render(subject).count(counting) == 1
    for seed in (1, 2):
        write_status(study / f"sb-seed-{seed}", "failed", 100, "the loss is not finite", exit_code=3)
    subject = read_subject(study)
    base = panels_of(subject.runs)[0].variants[0]
    known = {key for key, measure in measures(subject).items() if variant_cell(base, measure).text}
    assert known == {"final_test"}, "none of them has finished"


def test_texts_of_several_lines_stay_in_their_lines_of_the_tables(tmp_path: Path) -> None:
    treatment = treatments()[0]
    for number, name in enumerate(("base", "other", "failed")):
        run = make_run(tmp_path / name, treatment, number, {**treatment.settings, "run.seed": number})
        if name == "other":
            settings = yaml.safe_load((run / "config.yaml").read_text())
            settings["model"]["options"] = {"text": "two\nlines"}
            (run / "config.yaml").write_text(yaml.safe_dump(settings))
    write_status(run, "failed", 100, "out of memory:\n  256 MiB")
    tables = tables_in_markdown(read_subject(tmp_path))
    assert "- failed: failed, out of memory: 256 MiB\n" in tables
    assert '| batch 128, text "two\\nlines" | 1 |' in tables


def test_a_run_in_two_studies_is_one_point_of_a_correlation_or_lost_once(tmp_path: Path) -> None:
    make_study(tmp_path / "first", seeds=(0, 1))
    write_status(tmp_path / "first" / "lb-seed-0", "failed", 40, "the loss is not finite", exit_code=3)
    shutil.copytree(tmp_path / "first", tmp_path / "second")
    [scatter, *_] = sharpness_scatters(panels_of(read_subject(tmp_path).runs))
    notes = {found.among: found.note for found in scatter.correlations}
    assert (notes["all runs"], notes["SB"], notes["LB"]) == ("n = 15, 1 diverged", "n = 8", "n = 7, 1 diverged")


def test_a_run_that_began_from_another_one_s_checkpoint_did_not_take_the_time_before(tmp_path: Path) -> None:
    treatment = treatments()[0]
    run = make_run(tmp_path / "run", treatment, 0, treatment.settings)
    whole = read_run(run, "run")
    measured: tuple[TrainRecord | EvaluationRecord, ...] = (*whole.train, *whole.evaluations)
    later = [record for record in measured if record.step > 150]
    resumed = EventRecord(150, "resumed", 0.0, {})
    seconds = next(measure for measure in measures_of([whole]) if measure.key == "seconds")
    own = sum(record.step_seconds for record in whole.train[150:])
    write_records(run, [EventRecord(150, "corrupt_checkpoint", 0.0, {}), resumed, *later])
    assert seconds.take(read_run(run, "run")) == pytest.approx(own)
    write_records(run, [*whole.train[:150], resumed, *later])  # killed before its first checkpoint's event was written
    assert seconds.take(read_run(run, "run")) == pytest.approx(seconds.take(whole))


def test_the_noise_in_the_row_of_the_paper_is_noise(tmp_path: Path) -> None:
    large, _, noisy, _ = treatments()[4:]
    for name, treatment, changes in (
        ("base", large, {}),
        ("noisy", noisy, {}),
        ("best", replace(large, accuracy=0.95), {"optimizer.learning_rate": 0.3}),
    ):
        make_run(tmp_path / name, treatment, 0, {**treatment.settings, **changes})
    rows = landscape_figure(panels_of(read_subject(tmp_path).runs)).rows
    first, others = ([chart for chart in row if isinstance(chart, Chart)] for row in rows)
    assert [(chart.letter, chart.title.partition(", ")[2]) for chart in first] == [
        ("a", "baseline"),
        ("b", "uniform 0.01"),
    ]
    assert [chart.title.partition(", ")[2] for chart in others] == ["learning rate 0.3"]


def test_of_a_diverged_duplicate_it_is_not_said_that_it_counts(tmp_path: Path) -> None:
    treatment = treatments()[0]
    for name in ("first", "second"):
        make_run(tmp_path / name, treatment, 0, treatment.settings)
        write_status(tmp_path / name, "failed", 100, "the loss is not finite", exit_code=3)
    subject = read_subject(tmp_path)
    for text in (render(subject), tables_in_markdown(subject)):
        assert text.count("diverged: counts with the accuracy of guessing") == 1
    assert "- second: failed, the loss is not finite\n" in tables_in_markdown(subject)


def test_values_of_an_earlier_evaluation_are_not_final(tmp_path: Path) -> None:
    treatment = treatments()[0]
    run = make_run(tmp_path / "run", treatment, 0, treatment.settings)
    with (run / "metrics.jsonl").open("a") as metrics:
        # of a longer run, resumed with evaluation.train_samples=0
        metrics.write(to_json(evaluation(treatment.epochs * treatment.steps_per_epoch + 10)) + "\n")
    final = {key: measure.take(read_run(run, "run")) for key, measure in measures(read_subject(tmp_path)).items()}
    assert {"gap", "final_train", "train_loss"}.isdisjoint(final)
    assert final["final_test"] == 0.5


@pytest.mark.parametrize(
    ("settings", "guessing"),
    [
        ({"data.name": "cifar100"}, 0.01),
        ({"data.name": "synthetic", "data.synthetic_classes": 4}, 0.25),
        ({"data.name": "imagefolder", "data.classes": 5, "data.root": "/data"}, 0.2),
    ],
)
def test_guessing_depends_on_the_number_of_classes(
    settings: dict[str, object], guessing: float, tmp_path: Path
) -> None:
    treatment = treatments()[0]
    make_run(tmp_path / "run", treatment, 0, {**treatment.settings, **settings})
    [run] = read_subject(tmp_path).runs
    assert run.guessing == guessing


def test_run_that_began_with_other_settings_than_its_study_has_now_does_not_count(tmp_path: Path) -> None:
    study = make_study(tmp_path / "study")
    plan = json.loads((study / "runs.json").read_text())
    for entry in plan:
        if entry["variant"] == "lb-noise-amplitude-0.01" and entry["seed"] < 2:
            entry["overrides"] = [text.replace("=0.01", "=0.02") for text in entry["overrides"]]
        # what a resume may change, and what a run decides itself
        entry["overrides"] += ["evaluation.every_epochs=5", "batch.micro_size=auto", "data.root=~/data"]
    (study / "runs.json").write_text(json.dumps(plan))
    (study / "base.yaml").write_text(yaml.safe_dump({"noise": {"schedule": {"kind": "cosine"}}}))
    subject = read_subject(study)
    assert {run.note for run in subject.runs if not run.is_finished} == {
        "it was started with other settings than the study has now (noise.schedule.kind: constant, not cosine)",
        "it was started with other settings than the study has now "
        "(noise.amplitude: 0.01, not 0.02; noise.schedule.kind: constant, not cosine)",
    }
    (study / "base.yaml").unlink()
    subject = read_subject(study)
    [changed] = [each for each in panels_of(subject.runs)[1].variants if each.name == "lb-noise-amplitude-0.01"]
    assert variant_cell(changed, measures(subject)["final_test"]).note == "n = 1, 2 with other settings"
    listed = tables_in_markdown(subject).partition("## Unfinished or unusable runs\n\n")[2].partition("\n\n")[0]
    assert [line.rpartition(" ")[2] for line in listed.splitlines()] == ["0.02)"] * 2


FORMER = yaml.safe_load(Path(__file__).with_name("former_run").joinpath("config.yaml").read_text())


@pytest.mark.parametrize(
    ("path", "had", "has", "is_changed"),
    [
        ("model.name", "/a/nets.py:small", "nets.py:large", True),
        ("model.name", "/a/nets.py:small", "/b/nets.py:small", False),
        ("model.name", "/a/nets.py:small", "/a/other.py:small", True),
        ("model.name", "torchvision:resnet18", "torchvision:resnet34", True),
        ("model.name", "torchvision:resnet18", "timm:resnet18", True),
        ("model.name", "/a/nets.py:small", "short", False),
        ("model.name", "/a/nets.py:small", "vgg9", True),
        ("run.init_from", "/home/me/first.pt", "~/first.pt", False),
        ("run.init_from", "/home/me/first.pt", "~/second.pt", True),
        ("run.init_from", "torchvision:first", "torchvision:second", True),
        ("run.init_from", "runs/first", "./runs/first/", False),
        ("noise.sharing", "rank", FORMER["noise"]["sharing"], False),
        ("noise.sharing", "rank", "global", True),
        ("model.options", {"depth": 3}, {"depth": 4}, True),
        ("model.options", {}, {"depth": 4}, True),
        ("data.augment_options", {"reach": 3}, {}, True),
        ("noise.options", {"reach": {"x": 3}}, {"reach": {"y": 3}}, True),
        ("model.options", {"depth": 3}, {"depth": 3}, False),
    ],
)
def test_run_of_another_plugin_or_its_options_does_not_count(
    path: str, had: object, has: object, is_changed: bool, tmp_path: Path
) -> None:
    study = make_study(tmp_path / "study", seeds=(0,))
    section, _, name = path.partition(".")
    for config in study.glob("*/config.yaml"):
        settings = yaml.safe_load(config.read_text())
        settings[section][name] = had
        config.write_text(yaml.safe_dump(settings))
    (study / "base.yaml").write_text(yaml.safe_dump({section: {name: has}}))
    assert {run.has_other_settings for run in read_subject(study).runs} == {is_changed}


@pytest.mark.parametrize(
    ("override", "is_changed"),
    [("run.max_steps=16", True), ("early_stopping.patience=2", True), ("evaluation.every_epochs=2", False)],
)
def test_run_of_another_length_does_not_count(override: str, is_changed: bool, tmp_path: Path) -> None:
    study = make_study(tmp_path / "study", seeds=(0,))
    plan = json.loads((study / "runs.json").read_text())
    for entry in plan:
        entry["overrides"].append(override)
    (study / "runs.json").write_text(json.dumps(plan))
    assert {run.has_other_settings for run in read_subject(study).runs} == {is_changed}


@pytest.mark.parametrize(("statistics", "count"), [("checkpoint", 3), ("batch", 2)])
def test_sharpness_with_each_pass_s_statistics_is_compared_at_one_size_of_passes(
    tmp_path: Path, statistics: str, count: int
) -> None:
    study = make_study(tmp_path / "study")
    for path in study.glob("*/analysis/sharpness-*.json"):
        fields = json.loads(path.read_text())
        fields["settings"] |= {"statistics": statistics, "batch_size": 64 if "sb-seed-0" in str(path) else 256}
        path.write_text(json.dumps(fields))
    subject = read_subject(study)
    base = panels_of(subject.runs)[0].variants[0]
    assert variant_cell(base, measures(subject)["sharpness-Hessian trace"]).note == f"n = {count}"


def test_records_by_passes_of_another_size_are_of_one_measurement(tmp_path: Path) -> None:
    study = make_study(tmp_path / "study", seeds=(0, 1))
    scale = {"value": 5.0, "standard_error": 1.0, "variance": 5.0, "squared_gradient": 1.0, "batches": 9}
    for path in study.glob("*/analysis/sharpness-*.json"):
        fields = json.loads(path.read_text())
        fields["settings"] |= {"batch_size": 32}
        more = {**fields, "hessian": None, "noise_scale": scale}
        # the names are digests, so either record may come first
        path.with_name(f"sharpness-{'0' if 'seed-0' in str(path) else 'z'}.json").write_text(json.dumps(more))
        fields["settings"] |= {"batch_size": 256}
        path.write_text(json.dumps(fields))
    subject = read_subject(study)
    found = measures(subject)
    for title in ("Hessian trace", "gradient noise scale"):
        assert all(found[f"sharpness-{title}"].take(run) is not None for run in subject.runs)
    assert all(len(run.analyses.sharpness) == 1 for run in subject.runs)


def test_a_noise_scale_beyond_the_samples_is_not_replaced_by_one_of_larger_passes(tmp_path: Path) -> None:
    study = make_study(tmp_path / "study", seeds=(0,))
    [path] = (study / "sb-seed-0").glob("analysis/sharpness-*.json")
    known = {"value": 5.0, "standard_error": 1.0, "variance": 5.0, "squared_gradient": 1.0, "batches": 4}
    for size, scale in ((256, known), (32, {**known, "value": None, "standard_error": None, "squared_gradient": -1.0})):
        fields = json.loads(path.read_text())
        fields["settings"] |= {"batch_size": size}
        path.with_name(f"sharpness-{size}.json").write_text(json.dumps({**fields, "noise_scale": scale}))
    path.unlink()
    [found] = read_run(study / "sb-seed-0", "run").analyses.sharpness
    assert "Hessian trace" in found.measures
    assert "gradient noise scale" not in found.measures


def test_differences_of_percentages_are_in_points(tmp_path: Path) -> None:
    tables = effect_tables(panels_of(read_subject(make_study(tmp_path / "study")).runs))
    headings = [measure.heading for measure in tables[0].measures]
    assert headings[:3] == ["final test accuracy, points", "final train accuracy, points", "generalization gap, points"]


def test_negative_numbers_have_the_minus_of_differences(tmp_path: Path) -> None:
    subject = read_subject(make_study(tmp_path / "study"))
    base = panels_of(subject.runs)[0].variants[0]
    negative = replace(measures(subject)["gap"], take=lambda run: -0.0035)
    assert [cell.text for cell in (variant_cell(base, negative), *run_cells(base.runs[0], [negative]))] == [
        "\u22120.35"
    ] * 2


@pytest.mark.parametrize("has_begun", [True, False])
def test_noise_is_no_baseline_where_the_planned_one_has_no_numbers(tmp_path: Path, has_begun: bool) -> None:
    study = make_study(tmp_path / "study")
    (study / "base.yaml").write_text(yaml.safe_dump({"noise": {"method": "none"}, "optimizer": {"momentum": 0.9}}))
    for config in study.glob("lb-seed-*/config.yaml"):
        if has_begun:  # with other settings
            config.write_text(config.read_text().replace("momentum: 0.9", "momentum: 0.5"))
        else:
            shutil.rmtree(config.parent)
    subject = read_subject(study)
    small, large = panels_of(subject.runs)
    assert (small.base and small.base.name, large.base and large.base.name) == ("sb", "lb")
    assert {variant.label for variant in large.variants[1:]} >= {"noise, amplitude 0.01"}
    assert not any(change for variant in large.variants for change in variant.changes)
    assert {panel.short for table in effect_tables((small, large)) for panel, _ in table.groups} == {"SB"}
    assert {panel.short for table in contrast_tables((small, large), ()) for panel, _ in table.groups} == {"SB"}
    assert render(subject)


@pytest.mark.parametrize(("loss", "judged"), [(0.25, 0.75), (math.nan, None)])
def test_the_judged_weights_are_the_averaged_ones_even_if_not_finite(
    tmp_path: Path, loss: float, judged: float | None
) -> None:
    treatment = treatments()[0]
    run = make_run(tmp_path / "run", treatment, 0, treatment.settings)
    last = [evaluation(1000, accuracy=0.5), evaluation(1000, "test-averaged", accuracy=0.75, loss=loss)]
    with (run / "metrics.jsonl").open("a") as metrics:
        metrics.writelines(to_json(record) + "\n" for record in last)
    stored = read_run(run, "run")
    assert (JUDGED_ACCURACY.take(stored), JUDGED_LOSS.take(stored)) == (judged, judged and loss)


def test_equal_differences_have_no_interval_and_are_not_clear(tmp_path: Path) -> None:
    study = make_study(tmp_path / "study", seeds=(0, 1))
    for seed, accuracy in enumerate((0.8, 0.7)):
        for name, better in (("sb", 0.0), ("sb-noise-amplitude-0.01", 0.01), ("sb-noise-amplitude-0.03", 0.0)):
            with (study / f"{name}-seed-{seed}" / "metrics.jsonl").open("a") as metrics:
                metrics.write(to_json(evaluation(1000, accuracy=accuracy + better)) + "\n")
    [table, *_] = contrast_tables(panels_of(read_subject(study).runs), ())
    found = {row.variant.name: row.cells[0] for _, rows in table.groups for row in rows}
    equal, none = (found[f"sb-noise-amplitude-{amplitude}"] for amplitude in ("0.01", "0.03"))
    assert equal is not None
    assert (equal.text, equal.ends, equal.corrected_ends, equal.is_clear) == ("+1.00", "", "", False)
    assert "no interval" in equal.note
    assert none is not None
    assert (none.text, none.ends, none.is_clear) == ("0.00", "0.00 to 0.00", False)


@pytest.mark.parametrize(("sign", "ends"), [(1, "+0.26 to +2.74"), (-1, "\u22122.74 to \u22120.26")])
def test_a_difference_is_clear_by_the_interval_that_is_corrected_for_all_comparisons(
    tmp_path: Path, sign: int, ends: str
) -> None:
    study = make_study(tmp_path / "study")
    name = "sb-noise-amplitude-0.01"
    for seed, better in enumerate((0.01, 0.015, 0.02)):
        for run, accuracy in (("sb", 0.5), (name, 0.5 + sign * better)):
            with (study / f"{run}-seed-{seed}" / "metrics.jsonl").open("a") as metrics:
                metrics.write(to_json(evaluation(1000, accuracy=accuracy)) + "\n")
    panels = panels_of(read_subject(study).runs)
    for tables, is_clear in ((effect_tables(panels), True), (contrast_tables(panels, ()), False)):
        [cell] = [row.cells[0] for _, rows in tables[0].groups for row in rows if row.variant.name == name]
        assert cell is not None
        assert (cell.ends, cell.is_clear) == (ends, is_clear)


def test_contrast_counts_each_variant_once_and_not_its_reference(tmp_path: Path) -> None:
    study = make_study(tmp_path / "study")
    names = ["sb", "lb-noise-amplitude-0.01"]
    described = {
        "variants": {treatment.name: {} for treatment in treatments()},
        "contrasts": [{"variants": [*names, names[0], "lb"], "against": "lb"}],
    }
    (study / "study.yaml").write_text(yaml.safe_dump(described))
    subject = read_subject(study)
    [(_, rows)] = contrast_tables(panels_of(subject.runs), subject.contrasts)[0].groups
    assert [row.variant.name for row in rows] == names


@pytest.mark.parametrize("text", ["title: T\ncontrasts: [{variants: [sb]}]", "title: [", "- title"])
def test_report_says_that_an_invalid_study_file_has_taken_title_and_contrasts(tmp_path: Path, text: str) -> None:
    study = make_study(tmp_path / "study", seeds=(0,))
    assert read_subject(study).fault == ""
    (study / "study.yaml").write_text(text)
    subject = read_subject(study)
    assert (subject.title, subject.contrasts) == ("study", ())
    for report in (tables_in_markdown(subject), unescape(render(subject))):
        assert f"{study / 'study.yaml'} is invalid (" in report
        assert "the study's title and contrasts are missing" in report


@pytest.mark.parametrize(
    ("settings", "is_mixed"),
    [
        ({}, True),  # auto: recomputed with noise, else running averages
        ({"norm_statistics": "recomputed"}, False),
        ({"norm": "group"}, False),
    ],
)
def test_report_says_that_runs_have_different_norm_statistics(
    tmp_path: Path, settings: Mapping[str, object], is_mixed: bool
) -> None:
    study = make_study(tmp_path / "study", seeds=(0,))
    (study / "runs.json").unlink()
    for path in study.glob("*/config.yaml"):
        config = yaml.safe_load(path.read_text())
        path.write_text(yaml.safe_dump({**config, "model": {**config["model"], **settings}}))
    subject = read_subject(study)
    for report in (tables_in_markdown(subject), unescape(render(subject))):
        assert ("Set model.norm_statistics." in report) == is_mixed


def test_report_says_that_runs_of_a_variant_have_chosen_other_micro_batches(tmp_path: Path) -> None:
    study = make_study(tmp_path / "study", seeds=(0, 1))
    notice = "Runs of LB, baseline have micro-batches of 128 and 64 samples"
    for seed, size in enumerate((64, 128)):
        assert notice not in tables_in_markdown(read_subject(study))
        path = study / f"lb-seed-{seed}" / "config.yaml"
        path.write_text(path.read_text().replace("micro_size: auto", f"micro_size: {size}"))
        other = study / f"sb-seed-{seed}" / "config.yaml"
        other.write_text(other.read_text().replace("micro_size: auto", "micro_size: 32"))
    for report in (tables_in_markdown(read_subject(study)), render(read_subject(study))):
        assert notice in report
        assert report.count("have micro-batches of") == 1


def test_report_says_that_the_code_of_a_study_s_runs_was_edited(tmp_path: Path) -> None:
    study = make_study(tmp_path / "study", seeds=(0, 1))
    for name, digest in (("sb-seed-0", "a"), ("sb-seed-1", "a"), ("lb-seed-0", "b")):
        environment = {"plug-in mine/net.py": digest * 64, f"plug-in mine/{name}.py": digest * 64}
        write_status(study / name, "finished", 200, environment=environment)
        subject = read_subject(study)
        for report in (tables_in_markdown(subject), unescape(render(subject))):
            assert ("The code of plug-in mine/net.py was edited" in report) == (digest == "b")


def test_report_says_that_lengthened_runs_are_beside_others(tmp_path: Path) -> None:
    study = make_study(tmp_path / "study", seeds=(0,))
    for number, run in enumerate(path for path in sorted(study.iterdir()) if path.is_dir()):
        subject = read_subject(study)
        assert ("Runs that were lengthened (" in tables_in_markdown(subject)) == (number > 0)
        if number < 2:
            assert ("Runs that were lengthened (" in render(subject)) == (number > 0)
        with (run / "metrics.jsonl").open("a") as metrics:
            metrics.write(to_json(EventRecord(1, "lengthened", 0.0, {"before": 1, "now": 2})) + "\n")
    assert "Runs that were lengthened (" not in tables_in_markdown(read_subject(study))


def record(study: Path, **fields: Mapping[str, object]) -> None:
    """Add to the plan of `study` the fields of each variant, given by the variants' names."""
    plan = json.loads((study / "runs.json").read_text())
    recorded = [{**run, **{name: by_variant[run["variant"]] for name, by_variant in fields.items()}} for run in plan]
    (study / "runs.json").write_text(json.dumps(recorded))


def test_members_of_a_grid_belong_to_the_recorded_variant_not_to_one_with_a_longer_name(tmp_path: Path) -> None:
    study = make_study(tmp_path / "study")
    noisy = "lb-noise-amplitude-0.01"
    names = [treatment.name for treatment in treatments()]
    # A variant is called lb-noise-amplitude; the strength 0.01 is of the grid of lb-noise.
    record(study, family={name: "lb-noise" if name == noisy else name for name in names})
    contrasts = [{"variants": [variant], "against": "lb"} for variant in ("lb-noise", "lb-noise-amplitude")]
    described = {"variants": {name: {} for name in ("lb", "lb-noise", "lb-noise-amplitude")}, "contrasts": contrasts}
    (study / "study.yaml").write_text(yaml.safe_dump(described))
    assert [found.variants for found in read_subject(study).contrasts] == [(noisy,), ()]


def test_title_that_is_the_variant_s_name_is_a_title_and_that_of_the_panel_is_not_repeated(tmp_path: Path) -> None:
    study = make_study(tmp_path / "study")
    titles = {treatment.name: treatment.name.replace("-", " ") for treatment in treatments()} | {"sb": "SB"}
    record(study, title=titles, has_title=dict.fromkeys(titles, True))
    labels = {
        variant.name: variant.label for panel in panels_of(read_subject(study).runs) for variant in panel.variants
    }
    assert labels == titles | {"sb": "baseline"}


def test_a_run_of_unknown_batch_does_not_take_the_contrasts_with_the_largest_one(tmp_path: Path) -> None:
    folder = make_study(tmp_path / "folder", seeds=(0, 1))
    (folder / "runs.json").unlink()
    (folder / "lb-noise-amplitude-0.03-seed-1" / "config.yaml").write_text("torn: [")
    panels = panels_of(read_subject(folder).runs)
    assert [panel.short for panel in panels] == ["SB", "LB", "batch unknown"]
    titles = [table.title for table in contrast_tables(panels, ())]
    assert titles == [f"All variants: difference from {short}, baseline" for short in ("SB", "LB")]


def test_contrast_without_two_finished_pairs_keeps_its_heading(tmp_path: Path) -> None:
    study = make_study(tmp_path / "study", seeds=(0, 1))
    contrasts = [{"title": "H1", "variants": ["sb", "lb-noise-amplitude-0.01"], "against": "lb"}]
    described = {"variants": {treatment.name: {} for treatment in treatments()}, "contrasts": contrasts}
    (study / "study.yaml").write_text(yaml.safe_dump(described))
    plan = [run for run in json.loads((study / "runs.json").read_text()) if run["name"] != "sb-seed-1"]
    (study / "runs.json").write_text(json.dumps(plan))
    [first, *_] = contrast_tables(panels_of(read_subject(study).runs), read_subject(study).contrasts)
    assert [row.variant.name for _, rows in first.groups for row in rows] == ["lb-noise-amplitude-0.01"]
    assert "SB, baseline" in first.note
    write_status(study / "lb-seed-1", "stopped", 40)
    subject = read_subject(study)
    [first, *_] = contrast_tables(panels_of(subject.runs), subject.contrasts)
    assert (first.measures, first.title) == ((), "H1: difference from LB, baseline")
    for text in (tables_in_markdown(subject), render(subject)):
        assert first.title in text
        assert first.note in text


def test_line_ends_at_the_run_of_its_own_study(tmp_path: Path) -> None:
    for name in ("first", "second"):
        plan = make_study(tmp_path / name, seeds=(0,)) / "runs.json"
        plan.write_text(plan.read_text().replace("LB, baseline", f"LB, {name}"))
    lines = lines_between(panels_of(read_subject(tmp_path).runs))
    assert [line.title.rpartition(" to ")[2] for line in lines] == ["LB, first (1)", "LB, second (1)"]


def test_sharpness_of_an_earlier_checkpoint_is_not_that_of_the_run(tmp_path: Path) -> None:
    study = make_study(tmp_path / "study")
    run = study / "sb-seed-0"
    [path] = run.glob("analysis/sharpness-*.json")
    fields = json.loads(path.read_text())
    fields["checkpoint"] |= {"step": 100, "sha256": "0" * 64}
    path.write_text(json.dumps(fields))
    (run / "checkpoints" / "step-00000100.json").write_text(json.dumps(fields["checkpoint"]))
    subject = read_subject(study)
    base = panels_of(subject.runs)[0].variants[0]
    assert variant_cell(base, measures(subject)["sharpness-Hessian trace"]).note == "n = 2"


def copy_line(run: Path, name: str, steps: tuple[int, int], **settings: Any) -> Path:
    """Copy the line from `run` with the checkpoints' steps and settings changed."""
    folder = run / "analysis" / f"interpolate-{name}"
    shutil.copytree(run / "analysis" / "interpolate-0123456789abcdef", folder)
    fields = json.loads((folder / "settings.json").read_text())
    for checkpoint, step in zip(fields["checkpoints"], steps, strict=True):
        checkpoint["step"] = step
    fields["settings"] |= settings
    (folder / "settings.json").write_text(json.dumps(fields))
    return folder


@pytest.mark.parametrize("steps", [(100, 80), (200, 40)])
def test_lines_between_earlier_checkpoints_are_not_averaged_with_the_others(
    tmp_path: Path, steps: tuple[int, int]
) -> None:
    study = make_study(tmp_path / "study", seeds=(0, 1))
    copy_line(study / "sb-seed-0", "earlier", steps)
    [chart] = lines_between(panels_of(read_subject(study).runs))
    assert chart.note.startswith("2 lines, 1 left out")


def test_of_a_line_between_two_runs_of_one_variant_one_direction_counts(tmp_path: Path) -> None:
    study = make_study(tmp_path / "study", seeds=(0, 1))
    for seed in (0, 1):
        folder = study / f"sb-seed-{seed}" / "analysis" / "interpolate-0123456789abcdef"
        fields = json.loads((folder / "settings.json").read_text())
        path = fields["checkpoints"][1]["path"].replace(f"lb-seed-{seed}", f"sb-seed-{1 - seed}")
        fields["checkpoints"][1] |= {"path": path, "step": 200}
        (folder / "settings.json").write_text(json.dumps(fields))
    [chart] = lines_between(panels_of(read_subject(study).runs))
    assert chart.title == "SB, baseline (0) to SB, baseline (1)"
    assert chart.note.startswith("1 left out")


def test_a_namesake_in_another_folder_is_not_the_run_of_the_line(tmp_path: Path) -> None:
    study = make_study(tmp_path / "study", seeds=(0,))
    path = study / "sb-seed-0" / "analysis" / "interpolate-0123456789abcdef" / "settings.json"
    path.write_text(path.read_text().replace(str(study / "lb-seed-0"), str(tmp_path / "elsewhere" / "lb-seed-0")))
    [chart] = lines_between(panels_of(read_subject(study).runs))
    assert chart.title == "SB, baseline (0) to lb-seed-0 step 80 (1)"


def test_lines_of_a_run_are_told_apart(tmp_path: Path) -> None:
    run = make_study(tmp_path / "study", seeds=(0,)) / "sb-seed-0"
    copy_line(run, "fine", (200, 80), points=201)
    copy_line(run, "earlier", (100, 80))
    copy_line(run, "other", (200, 80), exclude="norm")
    notes = {chart.title: chart.note for chart in run_landscapes(read_subject(run).runs[0])}
    assert notes["Along random directions, step 200"].startswith("norm statistics recomputed; width ")
    assert sorted(notes) == [
        "Along random directions, step 200",
        "From sb-seed-0 step 100 (0) to lb-seed-0 step 80 (1)",
        "From sb-seed-0 step 200 (0) to lb-seed-0 step 80 (1), points 201, exclude -",
        "From sb-seed-0 step 200 (0) to lb-seed-0 step 80 (1), points 41, exclude -",
        "From sb-seed-0 step 200 (0) to lb-seed-0 step 80 (1), points 41, exclude norm",
    ]


def test_each_measure_of_sharpness_has_its_own_commonest_settings(tmp_path: Path) -> None:
    study = make_study(tmp_path / "study", seeds=(0, 1))
    scale = {"value": 5.0, "standard_error": 1.0, "variance": 5.0, "squared_gradient": 1.0, "batches": 9}
    for path in study.glob("*/analysis/sharpness-*.json"):
        fields = json.loads(path.read_text())
        for name in ("few", "fewer"):
            fields["settings"]["samples"] = {"few": 100, "fewer": 50}[name]
            more = {**fields, "hessian": None, "keskar": None, "expected_rise": None, "noise_scale": scale}
            path.with_name(f"sharpness-{name}.json").write_text(json.dumps(more))
    subject = read_subject(study)
    found = measures(subject)
    for title in ("Hessian trace", "gradient noise scale"):
        assert all(found[f"sharpness-{title}"].take(run) is not None for run in subject.runs)
    assert sharpness_left_out(subject.runs) == len(subject.runs)
    page = render(subject)
    assert [page.count(f"samples: {number};") for number in (2000, 100, 50)] == [1, 1, 0]
    run = study / "sb-seed-0"
    assert "Sharpness results left out because of other settings or an earlier step: 1." in render(read_subject(run))


def variants_of(folder: Path, *changes: Mapping[str, object]) -> list[str]:
    """Return the labels of variants with these changes, after the baseline's."""
    treatment = treatments()[0]
    for number, settings in enumerate(({}, *changes)):
        for seed in (0, 1):
            name = f"{number}-{seed}"
            make_run(folder / name, treatment, seed, {**treatment.settings, **settings, "run.seed": seed})
    [panel] = panels_of(read_subject(folder).runs)
    return [variant.label for variant in panel.variants[1:]]


def test_settings_of_one_name_in_several_sections_are_told_apart(tmp_path: Path) -> None:
    cosine = {"schedule.decay": "cosine"}
    mean = {"averaging.kind": "ema", "averaging.decay": 0.5, "optimizer.learning_rate": 0.3}
    labels = variants_of(tmp_path, cosine, mean, {"optimizer.name": "adamw"})
    assert labels == ["schedule decay cosine", "learning rate 0.3, ema, averaging decay 0.5", "adamw"]


def test_settings_that_a_variant_does_not_have_are_no_overrides_to_null() -> None:
    base = {"model.name": "mine", "model.options.depth": 3, "model.options.kind": "wide", "model.options.unset": None}
    changes = [(change.path, change.value) for change in changes_between(base, {"model.name": "cnn"})]
    assert changes == [("model.name", "cnn"), ("model.options.depth", "-"), ("model.options.kind", "-")]
    noise = {"noise.method": "smoothout", "noise.amplitude": 0.1}
    changes = [(change.path, change.value) for change in changes_between(noise, {"noise.method": "none"})]
    assert changes == [("noise.method", "none"), ("noise.amplitude", "-")]
    # of a plug-in of one of them the setting that names it tells
    for before, after in ((base, {**base, "plug-in me/net.py": "a"}), ({**base, "plug-in me/net.py": "a"}, base)):
        assert not changes_between(before, after)


def test_runs_on_different_data_are_not_paired(tmp_path: Path) -> None:
    variants_of(tmp_path, {"data.name": "cifar10"}, {"optimizer.learning_rate": 0.3})
    subject = read_subject(tmp_path)
    panels = panels_of(subject.runs)
    for table in (*effect_tables(panels), *contrast_tables(panels, ())):
        assert {row.variant.name for _, rows in table.groups for row in rows} == {"2-0"}
    assert "2 data sets (cifar10, fashion-mnist)" in tables_in_markdown(subject)
    assert "2 data sets (cifar10, fashion-mnist)" in render(subject)


def test_a_link_to_a_run_elsewhere_is_a_run_of_the_folder(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", treatments()[0], 0, treatments()[0].settings)
    folder = tmp_path / "folder"
    make_run(folder / "here", treatments()[0], 1, treatments()[0].settings)
    (folder / "link").symlink_to(run)
    (folder / "again").symlink_to(folder / "here")
    (folder / "circle").symlink_to(folder)
    assert sorted(run.name for run in read_subject(folder).runs) == ["here", "link"]


def test_a_line_that_names_one_checkpoint_is_unusable(tmp_path: Path) -> None:
    run = make_study(tmp_path / "study", seeds=(0,)) / "sb-seed-0"
    path = run / "analysis" / "interpolate-0123456789abcdef" / "settings.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps({**fields, "checkpoints": fields["checkpoints"][:1]}))
    [found] = read_subject(run).runs
    assert not found.analyses.of_kind("interpolate")
    assert len(found.analyses.problems) == 1


def test_a_noise_scale_beyond_its_samples_does_not_count_as_of_other_settings(tmp_path: Path) -> None:
    run = make_study(tmp_path / "study", seeds=(0,)) / "sb-seed-0"
    [path] = run.glob("analysis/sharpness-*.json")
    beyond = {"value": None, "standard_error": None, "variance": 5.0, "squared_gradient": -1.0, "batches": 4}
    fields = {**json.loads(path.read_text()), "keskar": None, "expected_rise": None, "hessian": None}
    path.with_name("sharpness-scale.json").write_text(
        json.dumps({**fields, "settings": {"samples": 100}, "noise_scale": beyond})
    )
    assert sharpness_left_out([read_run(run, "run")]) == 0
