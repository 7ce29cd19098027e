"""Contrasts, losses and partial correlations of a report, recomputed from the runs' files."""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest
import yaml
from scipy import stats

from dist_train.report.sharpness_charts import partial_spearman, rank_correlation
from dist_train.report.stored_run import read_run, read_subject
from dist_train.report.tables import accuracy_at
from dist_train.report.variants import panels_of
from tests.longer.report_page import cells, evaluations, rendered, runs_of
from tests.longer.test_report_counting import NOISY, ROW, TRACE, sharpness_file, trace
from tests.unit.report_study import make_run, make_study, treatments, write_status

SEEDS = (0, 1, 2, 3)
AGAINST_SB = "All variants: difference from SB, baseline"
AGAINST_LB = "All variants: difference from LB, baseline"
ACCURACY = "final test accuracy, points"
EQUAL_LOSS = "test accuracy at equal training loss, points"


def final(study: Path, variant: str, split: str = "test", name: str = "accuracy") -> np.ndarray:
    return np.array([evaluations(study / f"{variant}-seed-{seed}", split)[-1][name] for seed in SEEDS])


def numbers(cell: str) -> list[float]:
    return [float(word) for word in re.findall(r"[+-]?\d+\.\d+", cell.replace("\u2212", "-"))]


def diverge(run: Path) -> None:
    write_status(run, "failed", 40, "the loss is not finite at step 40", exit_code=3)


@pytest.mark.parametrize(("title", "reference"), [(AGAINST_SB, "sb"), (AGAINST_LB, "lb")])
def test_every_variant_is_compared_with_both_baselines(tmp_path: Path, title: str, reference: str) -> None:
    study = make_study(tmp_path / "study", SEEDS)
    table = cells(study)
    found = {row: cell for (name, row, column), cell in table.items() if (name, column) == (title, ACCURACY)}
    assert len(found) == 7
    for label, variant in ((ROW, NOISY), ("SB, noise, amplitude 0.03", "sb-noise-amplitude-0.03")):
        test = stats.ttest_rel(final(study, variant), final(study, reference))
        expected = [np.mean(final(study, variant) - final(study, reference))]
        for confidence in (0.95, 1 - 0.05 / 7):
            expected += test.confidence_interval(confidence)
        assert numbers(found[label]) == pytest.approx([value * 100 for value in expected], abs=0.005)
        assert found[label].endswith("; n = 4)")
    values = [
        float(has["value"])
        for has, _ in rendered(study).numbers
        if (has.get("data-contrast"), has.get("data-table"), has.get("data-variant")) == ("judged_test", title, NOISY)
    ]
    assert values == pytest.approx([np.mean(final(study, NOISY) - final(study, reference))], abs=1e-15)


def test_named_contrasts_are_corrected_for_their_number(tmp_path: Path) -> None:
    study = make_study(tmp_path / "study", SEEDS)
    others = [treatment.name for treatment in treatments() if treatment.name.startswith("lb-")]
    contrasts = [
        {"title": "H1", "variants": ["sb"], "against": "lb"},
        {"title": "H4", "variants": ["lb-noise"], "against": "sb"},
        {"title": "unknown", "variants": ["sb"], "against": "none"},
    ]
    variants: dict[str, object] = {name: {} for name in ("sb", "sb-noise", "lb", "lb-noise")}
    (study / "study.yaml").write_text(yaml.safe_dump({"name": "a", "variants": variants, "contrasts": contrasts}))
    table = cells(study)
    one = table["H1: difference from LB, baseline", "SB, baseline", ACCURACY]
    interval = stats.ttest_rel(final(study, "sb"), final(study, "lb")).confidence_interval(0.95)
    assert numbers(one)[1:] == pytest.approx([value * 100 for value in interval], abs=0.005)
    assert "corrected" not in one
    assert len({row for title, row, _ in table if title.startswith("H4")}) == len(others) == 3
    corrected = stats.ttest_rel(final(study, NOISY), final(study, "sb")).confidence_interval(1 - 0.05 / 3)
    cell = table["H4: difference from SB, baseline", ROW, ACCURACY]
    assert numbers(cell)[3:] == pytest.approx([value * 100 for value in corrected], abs=0.005)
    assert not [title for title, *_ in table if title.startswith("unknown")]
    of_sb, of_lb = (np.array([trace(study / f"{variant}-seed-{seed}") for seed in SEEDS]) for variant in ("sb", "lb"))
    expected = [np.mean(of_sb - of_lb), *stats.ttest_rel(of_sb, of_lb).confidence_interval(0.95)]
    cell = table["H1, sharpness: difference from LB, baseline", "SB, baseline", TRACE]
    found = re.findall(r"[+-][\d.]+", cell.replace("\u2212", "-").replace(",", ""))
    assert [float(number) for number in found] == pytest.approx(expected, rel=5e-3)


def test_variant_with_averaging_is_judged_by_its_averaged_weights(tmp_path: Path) -> None:
    study = make_study(tmp_path / "study", SEEDS)
    for seed in SEEDS:
        records = study / f"{NOISY}-seed-{seed}" / "metrics.jsonl"
        last = json.loads(records.read_text().splitlines()[-2])
        assert (last["kind"], last["split"]) == ("eval", "test")
        averaged = {**last, "split": "test-averaged", "accuracy": 0.95 + seed / 1000, "loss": 0.2}
        records.write_text(records.read_text() + json.dumps(averaged) + "\n")
    mean = fmean((0.95 + seed / 1000) - value for seed, value in zip(SEEDS, final(study, "sb"), strict=True))
    assert numbers(cells(study)[AGAINST_SB, ROW, ACCURACY])[0] == pytest.approx(mean * 100, abs=0.005)


def test_diverged_run_counts_as_guessing_and_is_mentioned_in_every_cell(tmp_path: Path) -> None:
    study = make_study(tmp_path / "study", SEEDS)
    diverge(study / f"{NOISY}-seed-1")
    write_status(study / f"{NOISY}-seed-2", "stopped", 40)
    table, title = cells(study), "Accuracy and loss"
    values = [0.1 if seed == 1 else final(study, NOISY)[seed] for seed in (0, 1, 3)]
    accuracy = table[title, ROW, "final test accuracy, %"]
    assert numbers(accuracy) == pytest.approx([100 * np.mean(values), 100 * np.std(values, ddof=1)], abs=0.005)
    assert accuracy.endswith("(n = 3, 1 as if guessing, 1 unfinished)")
    for column in ("final train loss", "final train accuracy, %", "generalization gap, points"):
        assert table[title, ROW, column].endswith("(n = 2, 1 diverged, 1 unfinished)")
    assert table["Basin width and sharpness", ROW, TRACE].endswith("(n = 2, 1 diverged, 1 unfinished)")
    assert table["Time and speed", ROW, "time in updates"].endswith("(n = 2, 1 diverged, 1 unfinished)")
    differences = [value - final(study, "sb")[seed] for value, seed in zip(values, (0, 1, 3), strict=True)]
    contrast = table[AGAINST_SB, ROW, ACCURACY]
    assert numbers(contrast)[0] == pytest.approx(100 * np.mean(differences), abs=0.005)
    assert contrast.endswith("n = 3, 1 as if guessing, 1 unfinished)")
    effect = table["Differences from the baseline: basin width and sharpness", ROW, TRACE]
    assert effect.endswith("n = 2, 1 diverged, 1 unfinished)")
    correlation = table["Rank correlation with generalization gap", TRACE, "LB"]
    assert correlation.endswith("n = 14, 1 diverged, 1 unfinished)")
    text = rendered(study).text
    assert "10.00 diverged: as if guessing" in text
    assert "(not finished)" not in "".join(row for _, row, _ in table)


def test_variant_with_diverged_runs_only_is_finished_and_guesses(tmp_path: Path) -> None:
    study = make_study(tmp_path / "study", (0, 1))
    for seed in (0, 1):
        diverge(study / f"{NOISY}-seed-{seed}")
    table = cells(study)
    assert table["Accuracy and loss", ROW, "final test accuracy, %"] == "10.00 \u00b1 0.00 (n = 2, 2 as if guessing)"
    assert table["Accuracy and loss", ROW, "final train loss"] == "\u2013"


def test_partial_rank_correlation_is_that_of_the_rank_residuals() -> None:
    draw = np.random.default_rng(5)
    given = draw.normal(size=40)
    first, second = (given + draw.normal(size=40) for _ in range(2))
    ranks = [stats.rankdata(values) for values in (first, second, given)]
    design = np.stack([np.ones(40), ranks[2]], axis=1)
    left = [values - design @ np.linalg.lstsq(design, values, rcond=None)[0] for values in ranks[:2]]
    rho = np.corrcoef(*left)[0, 1]
    found = rank_correlation(first.tolist(), second.tolist(), given.tolist())
    assert found is not None
    assert found.rho == pytest.approx(rho, abs=1e-12)
    half = 1.959964 * np.sqrt((1 + rho**2 / 2) / 36)
    assert (found.low, found.high) == pytest.approx(np.tanh([np.arctanh(rho) - half, np.arctanh(rho) + half]), 1e-6)
    # where the third variable explains the first completely
    assert partial_spearman(given.tolist(), second.tolist(), given.tolist()) is None


def test_three_runs_have_no_partial_rank_correlation() -> None:
    columns = [1.0, 2.0, 3.0, 4.0], [1.0, 3.0, 2.0, 4.0], [2.0, 1.0, 3.0, 4.0]
    for count, is_defined in ((3, False), (4, True)):
        first, second, given = (values[:count] for values in columns)
        assert rank_correlation(first, second) is not None
        assert (rank_correlation(first, second, given) is not None) == is_defined


def test_confidence_interval_of_a_rank_correlation_has_its_coverage() -> None:
    draw, truth, covered = np.random.default_rng(7), 0.6, 0
    spearman = 6 / np.pi * np.arcsin(truth / 2)  # of a bivariate normal distribution
    for _ in range(400):
        first, second = draw.multivariate_normal([0, 0], [[1, truth], [truth, 1]], size=30).T
        found = rank_correlation(first.tolist(), second.tolist())
        assert found is not None
        covered += found.low <= spearman <= found.high
    assert 0.92 <= covered / 400 <= 0.98


def test_flatness_is_correlated_with_the_gap_given_the_training_loss(tmp_path: Path) -> None:
    study = make_study(tmp_path / "study", SEEDS)
    sharpness_file(study / f"{NOISY}-seed-1").unlink()
    table = cells(study)
    runs = [run for run in runs_of(study) if run.name != f"{NOISY}-seed-1"]
    traces = [trace(run) for run in runs]
    last = [[evaluations(run, split)[-1] for run in runs] for split in ("train", "test")]
    gaps = [train["accuracy"] - test["accuracy"] for train, test in zip(*last, strict=True)]
    losses = [train["loss"] for train in last[0]]
    r = {
        pair: stats.spearmanr(*pairs).statistic
        for pair, pairs in {"tg": (traces, gaps), "tl": (traces, losses), "gl": (gaps, losses)}.items()
    }
    partial = (r["tg"] - r["tl"] * r["gl"]) / np.sqrt((1 - r["tl"] ** 2) * (1 - r["gl"] ** 2))
    for title, rho, freedom in (
        ("Rank correlation with generalization gap", r["tg"], 28),
        ("Rank correlation with generalization gap, given final train loss", partial, 27),
    ):
        half = 1.959964 * np.sqrt((1 + rho**2 / 2) / freedom)
        expected = [rho, *np.tanh([np.arctanh(rho) - half, np.arctanh(rho) + half])]
        assert numbers(table[title, TRACE, "all runs"]) == pytest.approx(expected, abs=0.005)
        assert table[title, TRACE, "all runs"].endswith("n = 31)")
        assert table[title, TRACE, "variants' means"].endswith("n = 8)")
        assert table[title, TRACE, "LB"].endswith("n = 15)")
    groups: dict[str, list[int]] = {}
    for at, run in enumerate(runs):
        groups.setdefault(run.name.rpartition("-seed-")[0], []).append(at)
    means = [[np.mean([values[at] for at in ats]) for ats in groups.values()] for values in (traces, gaps)]
    cell = table["Rank correlation with generalization gap", TRACE, "variants' means"]
    assert numbers(cell)[0] == pytest.approx(stats.spearmanr(*means).statistic, abs=0.005)


def test_variants_are_compared_at_equal_training_loss(tmp_path: Path) -> None:
    study = make_study(tmp_path / "study", SEEDS)
    curves = {
        (variant, seed): [
            (train["loss"], test["accuracy"])
            for train, test in zip(
                *(evaluations(study / f"{variant}-seed-{seed}", split) for split in ("train", "test")), strict=True
            )
        ]
        for variant in ("sb", NOISY)
        for seed in SEEDS
    }
    level = max(min(loss for loss, _ in curve) for curve in curves.values())
    differences = []
    for seed in SEEDS:
        accuracies_at_level = []
        for variant in (NOISY, "sb"):
            losses, accuracies = np.array(curves[variant, seed]).T
            end = int(np.argmax(losses <= level))
            part = slice(end, end - 2 if end > 1 else None, -1)
            accuracies_at_level.append(np.interp(np.log(level), np.log(losses[part]), accuracies[part]))
        differences.append(accuracies_at_level[0] - accuracies_at_level[1])
    cell = cells(study)[AGAINST_SB, ROW, EQUAL_LOSS]
    interval = stats.ttest_1samp(differences, 0).confidence_interval(0.95)
    assert numbers(cell)[:3] == pytest.approx([100 * each for each in (np.mean(differences), *interval)], abs=0.005)
    assert f"at loss {level:.4f}"[:14] in cell
    assert cell.endswith("n = 4)")


def test_missing_evaluations_along_training_are_reported(tmp_path: Path) -> None:
    study = make_study(tmp_path / "study", (0, 1))
    for run in runs_of(study):
        lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
        kept = [line for line in lines[:-3] if json.loads(line)["kind"] != "eval"]
        (run / "metrics.jsonl").write_text("".join([*kept, *lines[-3:]]))
    table, text = cells(study), rendered(study).text
    assert (AGAINST_SB, ROW, ACCURACY) in table
    assert (AGAINST_SB, ROW, EQUAL_LOSS) not in table
    assert "nothing can be compared at equal training loss" in text


def test_accuracy_at_a_loss_is_that_of_the_averaged_weights(tmp_path: Path) -> None:
    directory = make_run(tmp_path / "run", treatments()[0], 0, treatments()[0].settings)
    records = (directory / "metrics.jsonl").read_text().splitlines()
    evaluations = [record for record in map(json.loads, records) if record.get("split") in ("train", "test")]
    averaged = [
        json.dumps({**record, "split": f"{record['split']}-averaged", "accuracy": record["accuracy"] / 2})
        for record in evaluations
    ]
    (directory / "metrics.jsonl").write_text("\n".join([*records, *averaged]) + "\n")
    run = read_run(directory, "run")
    level = run.split("train-averaged")[0].loss
    assert accuracy_at(run, level) == run.split("test-averaged")[0].accuracy == run.split("test")[0].accuracy / 2


def test_accuracy_at_a_loss_outside_the_run_is_none(tmp_path: Path) -> None:
    directory = make_run(tmp_path / "run", treatments()[0], 0, treatments()[0].settings)
    run = read_run(directory, "run")
    losses = [record.loss for record in run.split("train")]
    assert accuracy_at(run, losses[0] * 1.01) is None
    assert accuracy_at(run, losses[0]) == run.split("test")[0].accuracy
    assert accuracy_at(run, min(losses) * 0.99) is None


@pytest.mark.parametrize(
    ("settings", "label"),
    [
        ({"noise.draws": 2, "noise.antithetic": True}, "uniform 0.1, draws 2, antithetic"),
        ({"noise.mix": 0.5, "noise.distribution": "normal"}, "normal 0.1, mix 0.5"),
        ({"noise.schedule": {"kind": "late", "start": 0.75}}, "uniform 0.1, late 0.75"),
        (
            {"noise.schedule": {"kind": "rise", "rise": 3.0}, "noise.scale": "filter"},
            "uniform 0.1, filter scale, rise 3",
        ),
        ({"noise.method": "sgld", "noise.distribution": "normal"}, "sgld 0.1, normal"),
        ({"noise.method": "asam", "noise.sharing": "micro_batch", "noise.offset": 0.1}, "ASAM 0.1, offset 0.1"),
        ({"noise.method": "fsgld", "noise.temperature": 0.001}, "fsgld 0.1, temperature 0.001"),
        (
            {
                "noise.method": "ivon",
                "noise.sample_size": 2048.0,
                "optimizer.momentum": 0.0,
                "optimizer.nesterov": False,
            },
            "ivon, sample size 2048, momentum 0, nesterov false",
        ),
        (
            {"batch.schedule": [{"epoch": 9, "global_size": 9000}], "batch.micro_size": 128},
            "uniform 0.1, batch schedule [epoch 9 global_size 9000]",
        ),
    ],
)
def test_label_and_changes_name_the_settings_of_a_noise(
    tmp_path: Path, settings: dict[str, object], label: str
) -> None:
    base = treatments()[4]
    make_run(tmp_path / "base", base, 0, base.settings)
    noise = {"noise.method": "smoothout", "noise.amplitude": 0.1, **settings}
    make_run(tmp_path / "noisy", base, 0, {**base.settings, **noise})
    [panel] = panels_of(read_subject(tmp_path).runs)
    [variant] = [each for each in panel.variants if not each.is_base]
    assert variant.label == label
    changes = {change.path: change.value for change in variant.changes}
    for path, value in settings.items():
        inner = {f"{path}.{name}": each for name, each in value.items()} if isinstance(value, dict) else {path: value}
        assert inner.items() <= changes.items()


@pytest.mark.parametrize("statistics", ["batch", "checkpoint"])
def test_sharpness_along_training_is_drawn_with_the_stability_limit_of_its_loss(
    tmp_path: Path, statistics: str
) -> None:
    study = make_study(tmp_path / "study", (0, 1))
    assert "Sharpness along training" not in rendered(study).text
    for record in study.glob("*/analysis/sharpness-*.json"):
        fields = json.loads(record.read_text())
        record.write_text(json.dumps({**fields, "settings": {**fields["settings"], "statistics": statistics}}))
    measured: dict[int, list[float]] = {20: [], 80: []}
    for seed in (0, 1):
        run = study / f"lb-seed-{seed}"
        last = json.loads(sharpness_file(run).read_text())
        measured[80].append(last["hessian"]["eigenvalues"][0])
        early = {**last["checkpoint"], "sha256": f"{seed}" * 64, "step": 20}
        (run / "checkpoints" / "step-00000020.json").write_text(json.dumps(early))
        measured[20].append(3.0 + seed)
        values = {**last, "checkpoint": early, "hessian": {**last["hessian"], "eigenvalues": [3.0 + seed, 1.0]}}
        (run / "analysis" / "sharpness-early.json").write_text(json.dumps(values))
    page = rendered(study)
    assert "Sharpness along training" in page.text
    frame = {label: points for label, points in page.series if label.startswith("baseline")}
    # two updates per epoch
    assert [point[3] for point in frame["baseline"]] == [10.0, 40.0]
    assert frame["baseline"][0][2] == f"{fmean(measured[20]):.2f} (n = 2)"
    # the table still shows the last checkpoint
    assert page.of("sharpness-largest Hessian eigenvalue", run="lb-seed-0")[0] == measured[80][0]
    assert ("baseline, limit of stability" in frame) == (statistics == "batch")
    if statistics != "batch":
        return
    rates = [record.learning_rate for record in read_run(study / "lb-seed-0", "lb").train]
    texts = [point[2] for point in frame["baseline, limit of stability"]]
    limit = 3.8 / 2.8  # Nesterov momentum of 0.9
    assert texts[0] == f"1.36 / rate = {limit / rates[0]:.2f}"
    assert len(texts) == sum(rate > 0 for rate in rates)
