"""The page of a report: its numbers are those of the runs, and it names what is missing."""

from __future__ import annotations

import json
import re
import shutil
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from statistics import fmean

import pytest

from dist_train.cli.main import parse
from dist_train.outcome import UsageError
from dist_train.report.page import render, write_report
from dist_train.report.stored_run import read_subject
from dist_train.watch.run_table import as_json, read_runs
from tests.longer.report_page import Page, evaluations, rendered, runs_of
from tests.raising import raises
from tests.unit.report_study import make_run, make_study, treatments, write_status


def test_every_run_has_the_numbers_of_its_records(study: Path, page: Page) -> None:
    for run in runs_of(study):
        test, train = evaluations(run, "test"), evaluations(run, "train")
        best = max(record["accuracy"] for record in test)
        for measure, value, text in (
            ("final_test", test[-1]["accuracy"], f"{test[-1]['accuracy'] * 100:.2f}"),
            ("best_test", best, f"{best * 100:.2f}"),
            ("final_train", train[-1]["accuracy"], f"{train[-1]['accuracy'] * 100:.2f}"),
            ("gap", train[-1]["accuracy"] - test[-1]["accuracy"], None),
            ("test_loss", test[-1]["loss"], f"{test[-1]['loss']:.4f}"),
            ("train_loss", train[-1]["loss"], f"{train[-1]['loss']:.4f}"),
        ):
            shown = page.of(measure, run=run.name)
            assert shown[0] == value
            assert text is None or shown[1] == text


def test_time_and_speed_follow_from_the_records(study: Path, page: Page) -> None:
    run = next(runs_of(study))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    train = [line for line in lines if line["kind"] == "train"]
    assert page.of("seconds", run=run.name)[0] == pytest.approx(sum(line["step_seconds"] for line in train))
    rates = sorted(line["samples_per_second"] for line in train)
    middle = (rates[len(rates) // 2 - 1] + rates[len(rates) // 2]) / 2
    assert page.of("images", run=run.name)[0] == pytest.approx(middle)


def test_record_of_several_updates_counts_for_all_of_them(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", treatments()[0], 0, treatments()[0].settings)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    train = [line for line in lines if json.loads(line)["kind"] == "train"]
    sparse = train[9::10]
    kept = [line for line in lines if line not in train or line in sparse]
    (run / "metrics.jsonl").write_text("\n".join(kept) + "\n")
    seconds = rendered(run).of("seconds", run="run")[0]
    assert seconds == pytest.approx(10 * sum(json.loads(line)["step_seconds"] for line in sparse))


def test_variant_has_the_mean_over_its_seeds(study: Path, page: Page) -> None:
    for treatment in treatments():
        values = [evaluations(study / f"{treatment.name}-seed-{seed}", "test")[-1]["accuracy"] for seed in (0, 1, 2)]
        assert page.of("final_test", variant=treatment.name)[0] == pytest.approx(fmean(values), abs=1e-15)


def test_curve_shows_the_means_of_the_evaluations(study: Path, page: Page) -> None:
    runs = [study / f"lb-noise-amplitude-0.01-seed-{seed}" for seed in (0, 1, 2)]
    by_epoch = zip(*(evaluations(run, "test") for run in runs), strict=True)
    means = [(records[0]["epoch"], fmean(record["accuracy"] for record in records)) for records in by_epoch]
    expected = [(epoch, f"{mean * 100:.2f} ±") for epoch, mean in means]
    curves = [
        [(point[3], point[2][: point[2].index("±") + 1]) for point in points]
        for label, points in page.series
        if label == "noise, amplitude 0.01" and points and "±" in points[0][2]
    ]
    assert expected in curves


def test_runs_have_the_numbers_of_their_analyses(study: Path, page: Page) -> None:
    for run in runs_of(study):
        [landscape] = run.glob("analysis/direction-*/settings.json")
        widths = json.loads(landscape.read_text())["widths"]["A"]
        [sharpness] = run.glob("analysis/sharpness-*.json")
        measures = json.loads(sharpness.read_text())
        assert page.of("width-A.2", run=run.name)[0] == widths["2"]["mean"]
        assert page.of("width-A.10", run=run.name)[0] == widths["10"]["mean"]
        assert page.of("sharpness-Hessian trace", run=run.name)[0] == measures["hessian"]["trace"]
        largest = max(measures["hessian"]["eigenvalues"])
        assert page.of("sharpness-largest Hessian eigenvalue", run=run.name)[0] == largest
        assert page.of("sharpness-Keskar, full space", run=run.name)[0] == measures["keskar"]["full"]
        assert page.of("sharpness-expected rise at 0.01", run=run.name)[0] == measures["expected_rise"][0]["mean"]


def test_page_has_the_figures_of_the_paper(page: Page) -> None:
    assert "Figure 2. Learning curves" in page.text
    assert "Figure 3. The loss around the solutions" in page.text
    for panel in ("a SB, baseline", "b SB, noise, amplitude 0.01", "c LB, baseline", "d LB, noise, amplitude 0.01"):
        assert panel in page.text
    assert {"train loss", "train accuracy", "test loss", "test accuracy"} <= {label for label, _ in page.series}
    assert re.search(r"all runs: \u03c1 = \u2212?[01]\.\d\d \(\S+ to \S+; n = 24\)", page.text)


def test_figures_are_numbered_consecutively(study: Path, page: Page, tmp_path: Path) -> None:
    assert re.findall(r"Figure (\d)\.", page.text) == ["1", "2", "3", "4", "5", "6"]
    [lb] = [treatment for treatment in treatments() if treatment.name == "lb"]
    alone = make_run(tmp_path / "lb", lb, 0, lb.settings)
    assert re.findall(r"Figure (\d)\.", rendered(alone).text) == ["1", "2"]
    shutil.rmtree(alone / "analysis")
    assert re.findall(r"Figure (\d)\.", rendered(alone).text) == ["1"]


def test_variant_without_a_title_is_named_by_its_changes(tmp_path: Path) -> None:
    study = make_study(tmp_path / "study", seeds=(0,))
    plan = json.loads((study / "runs.json").read_text())
    for run in plan:
        run["title"] = run["variant"].replace("-amplitude", ", amplitude")
    (study / "runs.json").write_text(json.dumps(plan))
    assert "uniform 0.01" in rendered(study).text
    assert "noise, amplitude" not in rendered(study).text


@pytest.mark.parametrize("form", ["svg", "pdf"])
def test_each_figure_is_saved_as_a_file(
    study: Path, tmp_path: Path, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = parse(["report", str(study), "--figures", str(tmp_path / "paper"), "--format", form])
    assert arguments.run(arguments) == 0
    paths = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert sorted(path.name for path in paths) == sorted(path.name for path in (tmp_path / "paper").iterdir())
    names = ["1-glance", "2-curves", "3-landscapes", "4-between", "5-planes-1", "6-sharpness"]
    assert [path.stem for path in paths] == [f"figure-{name}" for name in names]
    for path in paths:
        content = path.read_bytes()
        if path.suffix == ".svg":
            ElementTree.fromstring(content)
        else:
            assert content.startswith(b"%PDF")
            assert b"/Type /Page\n" in content or b"/Type /Page " in content
    if form == "svg":
        words = paths[1].read_text()
        assert all(f"<!-- {text} -->" in words for text in ("LB, batch 8,192", "baseline", "noise, amplitude 0.01"))
        assert "checkbox" not in words


def test_unknown_file_format_is_refused(study: Path, tmp_path: Path) -> None:
    for name in ("report.pdf", "report.png", "report"):
        with raises(UsageError, "report-form"):
            write_report(study, tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_page_shows_lines_between_solutions_and_planes(page: Page) -> None:
    assert "SB, baseline (0) to LB, baseline (1)" in page.text
    assert "3 lines" in page.text
    assert "lb-seed-0, step 80" in page.text
    assert [address for address in page.addresses if address.startswith("data:image/svg+xml;base64,")]


def test_changes_of_a_variant_are_shown(page: Page) -> None:
    assert "noise, amplitude 0.03 noise.method=smoothout (none) noise.amplitude=0.03" in page.text
    assert "batch.global_size=8192 (128)" in page.text


def test_missing_failed_and_broken_runs_are_named_but_not_counted(tmp_path: Path) -> None:
    study = make_study(tmp_path / "study")
    shutil.rmtree(study / "lb-seed-2")
    write_status(study / "lb-seed-1", "failed", 40, "the loss is not finite at step 40")
    (study / "sb-seed-0" / "metrics.jsonl").unlink()
    page = rendered(study)
    assert "21 of 24 runs finished" in page.text
    assert "lb-seed-2 missing : it has not started: its folder is missing" in page.text
    assert "lb-seed-1 failed : the loss is not finite at step 40" in page.text
    assert "sb-seed-0 broken : it has no metrics.jsonl" in page.text
    only = evaluations(study / "lb-seed-0", "test")[-1]["accuracy"]
    assert page.of("final_test", variant="lb")[0] == only
    assert "1 of 3" in page.text


def test_study_without_started_runs_has_a_page(tmp_path: Path) -> None:
    study = make_study(tmp_path / "study")
    for run in list(runs_of(study)):
        shutil.rmtree(run)
    page = rendered(study)
    assert "0 of 24 runs finished" in page.text
    assert "LB, batch 8,192" in page.text


def test_variant_without_runs_has_the_batch_of_the_base_configuration(
    tmp_path: Path,
) -> None:
    study = make_study(tmp_path / "study")
    plan = json.loads((study / "runs.json").read_text())
    for run in plan:
        run["overrides"] = [override for override in run["overrides"] if override != "batch.global_size=8192"]
    (study / "runs.json").write_text(json.dumps(plan))
    (study / "base.yaml").write_text("batch:\n  global_size: 8192\n")
    for run_folder in list(runs_of(study)):
        shutil.rmtree(run_folder)
    page = rendered(study)
    assert "LB, batch 8,192" in page.text
    assert "unknown" not in page.text


def test_unfinished_run_represents_its_variant_until_one_finishes(tmp_path: Path) -> None:
    study = make_study(tmp_path / "study", seeds=(0,))
    write_status(study / "lb-seed-0", "stopped", 40, "asked by SIGTERM")
    page = rendered(study)
    assert "baseline not finished" in page.text
    assert page.of("final_test", variant="lb")[0] == evaluations(study / "lb-seed-0", "test")[-1]["accuracy"]


def test_analyses_of_unknown_checkpoints_are_not_shown(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", treatments()[0], 0, treatments()[0].settings)
    assert "sharpness-Hessian trace" in {has.get("data-measure") for has, _ in rendered(run).numbers}
    [sidecar] = (run / "checkpoints").glob("*.json")
    sidecar.write_text(json.dumps({"sha256": "0" * 64}))
    page = rendered(run)
    assert "sharpness-Hessian trace" not in {has.get("data-measure") for has, _ in page.numbers}
    assert "it was computed from a checkpoint that this run does not have" in page.text
    assert "it was computed from checkpoints that this run does not have" in page.text


def test_damaged_analysis_is_named(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", treatments()[0], 0, treatments()[0].settings)
    [points] = run.glob("analysis/*/points.csv")
    points.write_text("direction,alpha,beta,split,loss,accuracy\n0,torn\n")
    [sharpness] = run.glob("analysis/sharpness-*.json")
    sharpness.write_text("{torn")
    text = rendered(run).text
    assert f"{points.parent} holds a damaged landscape" in text
    assert f"{sharpness} is damaged" in text


def test_landscapes_with_other_settings_are_not_mixed(tmp_path: Path) -> None:
    study = make_study(tmp_path / "study")
    [settings] = (study / "sb-seed-0").glob("analysis/direction-*/settings.json")
    fields = json.loads(settings.read_text())
    fields["settings"]["statistics"] = "interpolated"
    settings.write_text(json.dumps(fields))
    page = rendered(study)
    assert "1 results made with other settings or at earlier steps are not drawn" in page.text
    assert "width-A.2" not in {has.get("data-measure") for has, _ in page.numbers if has.get("data-run") == "sb-seed-0"}


def test_single_run_has_a_page(tmp_path: Path) -> None:
    run = make_run(tmp_path / "lb", treatments()[6], 0, treatments()[6].settings)
    page = rendered(run)
    assert page.of("final_test", run="lb")[0] == evaluations(run, "test")[-1]["accuracy"]
    for words in ("Learning curves and rates", "step-00000080.pt", "noise", "amplitude", "node1", "finished"):
        assert words in page.text
    assert {"train, each batch", "train", "test", "learning rate", "speed"} <= {label for label, _ in page.series}


def test_run_without_records_has_a_page(tmp_path: Path) -> None:
    run = tmp_path / "new"
    run.mkdir()
    write_status(run, "starting", 0)
    assert "Nothing has been measured yet." in rendered(run).text


def test_runs_of_a_folder_are_grouped_by_their_settings(tmp_path: Path) -> None:
    for treatment in (treatments()[4], treatments()[6]):
        for seed in (0, 1):
            name = f"{treatment.name}-{seed}"
            settings = {**treatment.settings, "run.name": name, "run.seed": seed}
            make_run(tmp_path / name, treatment, seed, settings)
    page = rendered(tmp_path)
    values = [evaluations(tmp_path / f"lb-{seed}", "test")[-1]["accuracy"] for seed in (0, 1)]
    assert page.of("final_test", variant="lb-0")[0] == pytest.approx(fmean(values))
    assert "batch 8,192: 2 variants" in page.text


def test_folder_of_studies_has_the_runs_of_each(tmp_path: Path) -> None:
    make_study(tmp_path / "first", seeds=(0,))
    make_study(tmp_path / "second", seeds=(0,))
    subject = read_subject(tmp_path)
    assert len(subject.runs) == 16
    assert {run.name for run in subject.runs} >= {"first/sb-seed-0", "second/sb-seed-0"}
    render(subject)


def test_page_makes_no_requests(study: Path, page: Page) -> None:
    assert all(address.startswith("data:") for address in page.addresses)
    content = render(read_subject(study))
    assert "default-src 'none'" in page.policy
    for outside in ("http://", "https://", "@import", "url(http", "//cdn"):
        assert outside not in content


def test_texts_of_runs_are_escaped(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", treatments()[0], 0, treatments()[0].settings)
    write_status(run, "failed", 3, "<script>alert(1)</script>")
    content = render(read_subject(run))
    assert "<script>alert" not in content
    assert "&lt;script&gt;alert(1)" in content


def test_colors_repeat_with_dashed_lines(tmp_path: Path) -> None:
    for number in range(12):
        settings = {"batch.global_size": 8192, "noise.method": "smoothout", "noise.amplitude": (number + 1) / 1000}
        make_run(tmp_path / f"run-{number}", treatments()[4], number, {**treatments()[4].settings, **settings})
    assert ".s10{--c:var(--c5);--dash" in render(read_subject(tmp_path))


@pytest.mark.parametrize("content", ["{torn", '[{"seed": 1}]'])
def test_damaged_plan_is_an_error(tmp_path: Path, content: str) -> None:
    study = make_study(tmp_path / "study", seeds=(0,))
    (study / "runs.json").write_text(content)
    with raises(UsageError, "plan-damaged"):
        read_subject(study)
    make_run(tmp_path / "run", treatments()[0], 0, treatments()[0].settings)
    assert {run.name: run.state for run in read_subject(tmp_path).runs} == {"run": "finished", "study": "broken"}


def test_list_of_runs_as_json_is_no_study(tmp_path: Path) -> None:
    make_run(tmp_path / "run", treatments()[0], 0, treatments()[0].settings)
    (tmp_path / "runs.json").write_text(as_json(read_runs(tmp_path), {}))
    subject = read_subject(tmp_path)
    assert (subject.kind, [run.name for run in subject.runs]) == ("folder", ["run"])


def test_folder_without_runs_is_an_error(tmp_path: Path) -> None:
    with raises(UsageError, "no-run-here"):
        write_report(tmp_path, tmp_path / "report.html")
    with raises(UsageError, "folder-missing"):
        write_report(tmp_path / "nowhere", tmp_path / "report.html")


def test_unwritable_page_is_an_error(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", treatments()[0], 0, treatments()[0].settings)
    with raises(UsageError, "output-unwritable"):
        write_report(run, tmp_path / "nowhere" / "report.html")


def test_command_writes_into_the_folder_and_prints_the_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run", treatments()[0], 0, treatments()[0].settings)
    arguments = parse(["report", str(run)])
    assert arguments.run(arguments) == 0
    assert capsys.readouterr().out.strip() == str(run / "report.html")
    assert (run / "report.html").read_text().startswith("<!doctype html>")
    write_report(run, tmp_path / "REPORT.HTML")
    assert (tmp_path / "REPORT.HTML").read_text().startswith("<!doctype html>")


def test_width_beyond_the_line_is_a_lower_bound(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", treatments()[0], 0, treatments()[0].settings)
    assert "\u2265" not in rendered(run).text
    [settings] = run.glob("analysis/*/settings.json")
    fields = json.loads(settings.read_text())
    fields["widths"]["A"]["10"]["open"] = 1
    settings.write_text(json.dumps(fields))
    page = rendered(run)
    assert f"\u2265 {page.of('width-A.10', run='run')[1]}" in page.text
    assert f"\u2265 {page.of('width-A.2', run='run')[1]}" not in page.text
