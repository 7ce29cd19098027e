"""The numbers in docs/results.md, docs/results_fashion.md and results/fashion.html are those of the runs."""

from __future__ import annotations

import math
import re
import subprocess
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean, stdev

import pytest

from dist_train.config.loading import flat_settings
from dist_train.report.measures import (
    FINAL_ACCURACY,
    GAP,
    TRAIN_LOSS,
    Measure,
    commonest_settings,
    measures_of,
    paired_difference,
    sharpness_measures,
)
from dist_train.report.page import render, tables_in_markdown
from dist_train.report.sharpness_charts import eigenvalues_of, rank_correlation
from dist_train.report.stored_run import StoredRun, Subject, read_subject
from dist_train.report.tables import effect_tables, run_cells
from dist_train.report.variants import panels_of
from dist_train.sweep.study_file import Uniform, load_study
from dist_train.watch.figure import three_digits
from tests.longer.report_page import cells

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "results"
ARCHIVE = RESULTS / "fashion.tar.gz"
OMITTED = "Time and speed"
"""Not in the documentation, since other work ran on the same cores."""
SHARPNESS, WIDTH = "Basin width and sharpness", "basin width, loss under 2 x"
WITH_LOSS = "Rank correlation with final train loss"
SIX = range(100, 106)  # seeds
_WIDTH_AT = "basin width at a rise of "
_GIVEN: tuple[tuple[Measure, ...], ...] = ((), (TRAIN_LOSS,))
Pairs = list[tuple[float, float]]
CORRELATION = re.compile(r"\u2212?[0-9.]+ \(\u2212?[0-9.]+ to [0-9.]+; n = \d+")
"""With its interval; one whose ends are both negative is found as a difference."""
DIFFERENCE = re.compile(r"([+\u2212]\S+)(?: points)? \(([+\u2212]\S+ to [+\u2212][^ ;)]+)\)")


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Unpack the study like docs/results_fashion.md, and return its folder."""
    runs = tmp_path_factory.mktemp("runs")
    subprocess.run(["tar", "-C", str(runs), "-xzf", str(ARCHIVE)], check=True)
    return runs / "fashion"


@pytest.fixture(scope="module")
def subject(study: Path) -> Subject:
    return read_subject(study)


@pytest.fixture(scope="module")
def text() -> str:
    """Return docs/results_fashion.md with its lines joined."""
    return " ".join((ROOT / "docs/results_fashion.md").read_text().split())


def run_of(subject: Subject, name: str) -> StoredRun:
    return next(run for run in subject.runs if run.name == name)


def test_documented_tables_are_those_of_the_runs(subject: Subject) -> None:
    documented = set((ROOT / "docs/results_fashion.md").read_text().splitlines())
    for section in tables_in_markdown(subject).split("## ")[1:]:
        title, *lines = section.splitlines()
        if title == OMITTED:
            continue
        missing = [
            line for line in lines if line.startswith("| ") and line not in documented and set(line) - set("| -")
        ]
        assert not missing, title


def test_every_difference_in_the_text_is_in_the_tables(subject: Subject, text: str) -> None:
    tables = tables_in_markdown(subject).replace("*", "")
    found = DIFFERENCE.findall(text)
    assert len(found) > 25
    unknown = [(mean, ends) for mean, ends in found if f" {mean} ({ends};" not in tables]
    assert not unknown


def test_clear_differences_of_the_summary_have_intervals_without_zero(subject: Subject) -> None:
    tables = tables_in_markdown(subject)
    lines = (ROOT / "docs/results_fashion.md").read_text().split("| | clear | not clear |")[1].partition("\n\n")[0]
    for line in lines.splitlines()[2:]:
        _, _, clear, unclear, _ = line.split("|")
        assert all(f" **{mean}** ({ends};" in tables for mean, ends in DIFFERENCE.findall(clear))
        assert all(f" {mean} ({ends};" in tables for mean, ends in DIFFERENCE.findall(unclear))


def test_rows_of_single_runs_have_their_numbers(subject: Subject, text: str) -> None:
    keys = ("final_test", "final_train", "test_loss", "line-rise-0.1", "sharpness-Hessian trace")
    by_key = {measure.key: measure for measure in measures_of(subject.runs)}
    for name in ("lb-seed-0", "lb-cosine-seed-0", "lb-micro-seed-0", "lb-sam-seed-0"):
        numbers = [cell.text for cell in run_cells(run_of(subject, name), [by_key[key] for key in keys])]
        assert f"| {' | '.join(numbers)} |" in text


def test_documented_correlations_of_widths_are_those_of_the_runs(study: Path, text: str) -> None:
    table = cells(study)
    widths = {table[WITH_LOSS, f"basin width, loss under {factor} x", "all runs"].split()[0] for factor in (2, 10)}
    assert widths == {"0.97"}
    assert "over the 30 runs their rank correlation with the training loss is 0.97 at both factors" in text
    for quoted, rows, among in (
        (
            "(rank correlation {} and {} over all runs)",
            ("expected rise at 0.1", "loss rise at \u03b1 = 0.5"),
            "all runs",
        ),
        ("do not over all runs ({} and {})", ("loss rise at \u03b1 = 0.1", "Hessian trace"), "all runs"),
        ("but do within LB ({} and {})", ("loss rise at \u03b1 = 0.1", "Hessian trace"), "LB"),
    ):
        assert quoted.format(*(table[WITH_LOSS, row, among].split()[0] for row in rows)) in text


def test_documented_parabola_width_follows_from_the_lines(subject: Subject, text: str) -> None:
    widths = []
    for seed in (0, 1, 2):
        [landscape] = [
            item for item in run_of(subject, f"sb-seed-{seed}").analyses.landscapes if item.kind == "direction"
        ]
        for line in landscape.lines("train"):
            loss = {round(point.alpha, 9): point.loss for point in line}
            slope, bend = (loss[0.1] - loss[-0.1]) / 0.2, (loss[0.1] + loss[-0.1] - 2 * loss[0.0]) / 0.02
            widths.append(math.sqrt(slope**2 + 4 * bend * loss[0.0]) / bend)
    assert f"a parabola through the same three points gives {fmean(widths):.3f}" in text


def test_documented_counts_and_shares_are_those_of_the_runs(study: Path, subject: Subject, text: str) -> None:
    panels = panels_of(subject.runs)
    effects = [
        cell
        for table in effect_tables(panels)
        for _, rows in table.groups
        for row in rows
        for cell in row.cells
        if cell
    ]
    assert f"Of the {sum(bool(effect.ends) for effect in effects)} intervals" in text
    rises = next(measure for measure in measures_of(subject.runs) if measure.title == "expected rise at 0.0001")
    means = [found.mean for panel in panels for variant in panel.variants if (found := variant.summary(rises))]
    assert (sum(mean < 0 for mean in means), len(means)) == (5, 12)
    assert "negative in five of the twelve rows" in text
    loss = {variant.label: variant.summary(TRAIN_LOSS) for variant in panels[1].variants}
    in_proportion = "noise in proportion to the filters"
    base, scaled = loss["base line"], loss[in_proportion]
    assert base is not None
    assert scaled is not None
    assert f"{scaled.mean:.4f} against {base.mean:.4f}" in text
    widths = [cells(study)[SHARPNESS, f"LB, {row}", WIDTH].split()[0] for row in (in_proportion, "base line")]
    assert f"{widths[0]} against {widths[1]}" in text
    factor = float(widths[0]) / float(widths[1])
    assert f"makes it {math.sqrt(scaled.mean / base.mean):.2f} times as wide, not {factor:.2f} times" in text
    shares = [run_of(subject, f"lb-seed-{seed}").split("train")[-1].accuracy for seed in (0, 1, 2)]
    assert f"({', '.join(f'{100 * share:.2f}' for share in shares)} by seed)" in text
    accuracies = [record.accuracy for record in run_of(subject, "lb-noise-amplitude-0.001-seed-2").split("train")]
    assert f"fell back to {100 * min(accuracies):.1f} % of the training data at epoch 12" in text


def test_page_has_the_numbers_of_the_archive(subject: Subject) -> None:
    def values(page: str) -> list[str]:
        return re.findall(r'<data value="([^"]+)"', page)

    assert values((RESULTS / "fashion.html").read_text()) == values(render(subject))


def test_stored_results_are_small(study: Path) -> None:
    kept = [path for path in RESULTS.rglob("*") if path.is_file()]
    assert len(kept) < 10
    assert max(path.stat().st_size for path in kept) < 2 << 20
    assert not [path for path in study.rglob("*") if path.suffix in {".pt", ".lock", ".log"}]


@pytest.fixture(scope="module")
def rivals(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    """Unpack the study of rivals like docs/results.md, and read it."""
    runs = tmp_path_factory.mktemp("runs")
    subprocess.run(["tar", "-C", str(runs), "-xJf", str(RESULTS / "rivals.tar.xz")], check=True)
    return read_subject(runs / "rivals")


@pytest.fixture(scope="module")
def later_rivals(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    """Unpack the trials and the rivals that were run later like docs/results.md, and read the latter."""
    runs = tmp_path_factory.mktemp("later")
    subprocess.run(["tar", "-C", str(runs), "-xJf", str(RESULTS / "rivals-tune.tar.xz")], check=True)
    return read_subject(runs / "rivals-rest")


@pytest.fixture(scope="module")
def measured_rivals(later_rivals: Subject) -> Subject:
    """Read the later rivals' further runs, whose sharpness was measured."""
    return read_subject(later_rivals.directory.parent / "rivals-sharpness")


def test_page_of_rivals_has_the_numbers_of_its_tables(
    rivals: Subject, later_rivals: Subject, measured_rivals: Subject
) -> None:
    page = (ROOT / "docs/results.md").read_text().partition("## With 2,048 images")[2]
    pilot = pairs_of(rivals, "lb-smoothout", "lb-smoothout-pilot", range(100, 110))
    correlations = [*correlations_without_some(rivals), *correlations_of_later_methods(measured_rivals)]
    differences = [
        [after - before for before, after in pairs_of(each, "lb", "lb-smoothout", range(100, 110))]
        for each in (rivals, later_rivals)
    ]
    computed = [" {} ({};".format(*in_words(pilot)), *correlations, correlation_in_words(*differences)]
    tables = "\n ".join([*map(tables_in_markdown, (rivals, later_rivals, measured_rivals)), *computed])
    detail = page.partition("## The tables")[2]
    missing = [line for line in detail.splitlines() if line.startswith("| ") and line not in tables.splitlines()]
    assert not missing
    found = DIFFERENCE.findall(re.sub(r"; n = \d+\)", ")", " ".join(page.partition("## The tables")[0].split())))
    assert len(found) > 100
    assert not [(mean, ends) for mean, ends in found if f" {mean} ({ends};" not in tables.replace("*", "")]
    summary = page.partition("## Limits")[0]
    others = re.findall(r"[0-9.]+ ± [0-9.]+", summary) + CORRELATION.findall(" ".join(summary.split()))
    assert len(others) == 70
    assert not [
        words for words in (*others, *computed[1:]) if words not in tables or words not in " ".join(page.split())
    ]


def test_the_table_of_three_sizes_is_that_of_the_runs(rivals: Subject, batch_8192: dict[str, Subject]) -> None:
    sizes = rivals, batch_8192["rivals-16384-rivals"], batch_8192["rivals-50000-rivals"]
    answer = (ROOT / "docs/results.md").read_text().partition("## With 2,048 images")[0]
    rows = [line.strip("| ").split(" | ") for line in answer.splitlines() if line.startswith("| ")][1:]
    assert {row[0]: row[1:] for row in rows} == {
        title: [cell_of_size(size, variant) for size in sizes] for title, variant in IN_THREE_SIZES.items()
    }
    text = " ".join(line for line in answer.splitlines() if not line.startswith("| "))
    strong = [batch_8192[f"rivals-{images}-strong"] for images in (16384, 50000)]
    tables = "".join(map(tables_in_markdown, strong)).replace("*", "")
    found = DIFFERENCE.findall(re.sub(r"; n = \d+\)", ")", text))
    assert len(found) == 3
    assert not [(mean, ends) for mean, ends in found if f" {mean} ({ends};" not in tables]


IN_THREE_SIZES = {
    "SB": "sb",
    "LB": "lb",
    "LB, SmoothOut": "lb-smoothout",
    "LB, SmoothOut by its rise": "lb-rise",
    "LB, SmoothOut that decays": "lb-decay",
    "LB, m-RWP": "lb-m-rwp",
    "LB, ghost norm": "lb-ghost",
    "LB, label smoothing": "lb-smoothing",
}


def cell_of_size(subject: Subject, variant: str) -> str:
    """Return the accuracy of SB, or another variant's difference from it, bold if it differs from LB when corrected."""
    if variant == "lb-smoothout" and subject.directory.name == "rivals":
        variant = "lb-smoothout-pilot"
    pairs = pairs_of(subject, "sb", variant, range(100, 110))
    if variant == "sb":
        accuracies = [accuracy for accuracy, _ in pairs]
        return f"{fmean(accuracies):.2f} ± {stdev(accuracies):.2f}"
    words = "{} ({})".format(*in_words(pairs))
    from_lb = paired_difference(pairs_of(subject, "lb", variant, range(100, 110)), confidence=1 - 0.05 / 6)
    is_shown = from_lb is not None and (from_lb.low > 0 or from_lb.high < 0)
    return f"**{words}**" if is_shown else words


def correlations_without_some(rivals: Subject) -> list[str]:
    """Return the rank correlations over variants' means without IVON or label smoothing: with the gap, given the loss.

    And without IVON those with test accuracy.
    """
    titles = (f"{_WIDTH_AT}0.5", "Hessian trace", "largest Hessian eigenvalue")
    without = {each: [run for run in rivals.runs if each not in run.name] for each in ("ivon", "smoothing")}
    of_gap = [correlation_of_means(runs, title, GAP, TRAIN_LOSS) for runs in without.values() for title in titles]
    accuracy = [correlation_of_means(without["ivon"], title, FINAL_ACCURACY) for title in (f"{_WIDTH_AT}0.05", *titles)]
    return [*of_gap, *accuracy]


def correlations_of_later_methods(measured_rivals: Subject) -> list[str]:
    """Return the rank correlations that the plan names for the later methods' sharpness, over the variants' means."""
    titles, runs = (f"{_WIDTH_AT}0.5", "Hessian trace"), measured_rivals.runs
    of_gap = [correlation_of_means(runs, title, GAP, TRAIN_LOSS) for title in titles]
    of_accuracy = [correlation_of_means(runs, title, FINAL_ACCURACY, *given) for title in titles for given in _GIVEN]
    return [*of_gap, *of_accuracy]


def correlation_of_means(runs: Sequence[StoredRun], sharpness: str, *others: Measure) -> str:
    """Return the rank correlation of the measure with that title and another, given a third, over variants' means."""
    measures = [next(each for each in sharpness_measures(runs) if each.title == sharpness), *others]
    groups: dict[str, list[list[float]]] = {}
    for run in runs:
        values = [value for measure in measures if (value := measure.take(run)) is not None]
        if len(values) == len(measures):
            groups.setdefault(run.name.partition("-seed-")[0], []).append(values)
    means = [list(map(fmean, zip(*rows, strict=True))) for rows in groups.values()]
    return correlation_in_words(*zip(*means, strict=True))


def correlation_in_words(*columns: Sequence[float]) -> str:
    """Return the rank correlation of the first two columns, given the third if there is one, as pages have it."""
    found = rank_correlation(*columns)
    assert found is not None
    words = f"{found.rho:.2f} ({found.low:.2f} to {found.high:.2f}; n = {len(columns[0])})"
    return words.replace("-", "\u2212")


def pairs_of(subject: Subject, against: str, variant: str, seeds: Sequence[int], split: str = "test") -> Pairs:
    """Return the final accuracies on `split`, in percent, of both variants, for each seed."""
    runs = {run.name: run for run in subject.runs}

    def accuracy(name: str) -> float:
        record = runs[name].last(split)
        assert record is not None
        return 100 * record.accuracy

    return [(accuracy(f"{against}-seed-{seed}"), accuracy(f"{variant}-seed-{seed}")) for seed in seeds]


def test_each_variant_ran_with_the_settings_chosen_by_the_search(
    rivals: Subject, later_rivals: Subject, measured_rivals: Subject
) -> None:
    chosen_by = {"rivals_confirm": rivals, "rivals_rest": later_rivals, "rivals_sharpness": measured_rivals}
    for name, subject in chosen_by.items():
        study = load_study(ROOT / f"studies/{name}.yaml")
        assert len(subject.runs) == len(study.variants) * len(study.seeds)
        for run in subject.runs:
            variant = run.name.partition("-seed-")[0]
            chosen = dict(flat_settings(study.settings_of(variant)))
            assert {path: run.settings[path] for path in chosen} == chosen


def test_documented_extent_of_low_loss_follows_from_the_lines(rivals: Subject) -> None:
    losses: dict[float, list[float]] = {}
    for seed in (100, 101, 102):
        [line] = run_of(rivals, f"sb-seed-{seed}").analyses.of_kind("interpolate")
        for point in line.lines("train")[0]:
            losses.setdefault(round(point.alpha, 9), []).append(point.loss)
    means = [(alpha, fmean(values)) for alpha, values in sorted(losses.items())]
    leaves_sb, enters_lb, leaves_lb = (
        alpha + (0.1 - loss) / (later - loss) * (beyond - alpha)
        for (alpha, loss), (beyond, later) in pairwise(means)
        if (loss < 0.1) != (later < 0.1)
    )
    text = " ".join((ROOT / "docs/results.md").read_text().split())
    assert f"from \u2212{-means[0][0]:.1f}, where the line begins, to {leaves_sb:.2f} around SB" in text
    assert f"only from {enters_lb:.2f} to {leaves_lb:.2f} around LB" in text


def test_documented_sharpness_along_training_is_that_of_the_runs(later_rivals: Subject) -> None:
    subject = read_subject(later_rivals.directory.parent / "rivals-course")
    text = " ".join((ROOT / "docs/results.md").read_text().split())

    def at(variant: str, step: int) -> tuple[str, str, str]:
        """Return both seeds' largest eigenvalues, and the limit of stability of SGD with Nesterov momentum of 0.9."""
        runs = [run_of(subject, f"{variant}-seed-{seed}") for seed in (100, 101)]
        settings = commonest_settings(runs[0].analyses.sharpness)
        first, second = (f"{dict(eigenvalues_of(run, settings))[step]:.2f}" for run in runs)
        [rate] = [record.learning_rate for record in runs[0].train if record.step == step]
        return first, second, three_digits(3.8 / 2.8 / rate)

    for quoted, variant, step in (
        ("{} and {} (seeds 100 and 101) where SGD with this momentum is stable up to {}", "lb", 30),
        ("after 60 passes {} and {} where it is stable up to {}", "lb", 60),
        ("({} and {} of {}, after 6 passes)", "sb", 384),
        ("from 60 passes on ({} and {})", "lb-smoothout-pilot", 60),
    ):
        assert quoted.format(*at(variant, step)) in text


def assert_page_has_numbers_of(page: str, *subjects: Subject, at_least: int, elsewhere: Sequence[str] = ()) -> None:
    """Check the page against its tables, but for what is tested `elsewhere`: correlations, and ends of differences."""
    summary, _, detail = (ROOT / "docs" / page).read_text().partition("## The tables")
    tables = "\n".join(map(tables_in_markdown, subjects))
    assert not [line for line in detail.splitlines() if line.startswith("| ") and line not in tables.splitlines()]
    differences = DIFFERENCE.findall(re.sub(r"; n = \d+\)", ")", " ".join(summary.split())))
    assert len(differences) >= at_least
    in_tables = [each for each in differences if each[1] not in elsewhere]
    assert not [(mean, ends) for mean, ends in in_tables if f" {mean} ({ends};" not in tables.replace("*", "")]
    found = [*re.findall(r"[0-9.]+ ± [0-9.]+", summary), *CORRELATION.findall(" ".join(summary.split()))]
    assert not [words for words in found if words not in tables and words not in elsewhere]


@pytest.fixture(scope="module")
def batch_8192(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Subject]:
    """Unpack the studies of batch 8192 like docs/results_16384.md, and read them by their folders' names."""
    folder = tmp_path_factory.mktemp("batch_8192")
    for name in ("rivals-16384", "rivals-16384-strong"):
        subprocess.run(["tar", "-C", str(folder), "-xJf", str(RESULTS / f"{name}.tar.xz")], check=True)
    return {each.name: read_subject(each) for each in folder.iterdir()}


def test_page_of_batch_8192_has_the_numbers_of_its_tables(batch_8192: dict[str, Subject]) -> None:
    studies = {
        "rivals-16384": "rivals_16384_confirm",
        "rivals-16384-strong": "rivals_16384_strong",
        "rivals-16384-rivals": "rivals_16384_rivals",
        "rivals-16384-rates": "rivals_16384_rates",
        "rivals-50000": "rivals_50000",
        "rivals-50000-strong": "rivals_50000_strong",
        "rivals-50000-rivals": "rivals_50000_rivals",
    }
    for folder, name in studies.items():
        study = load_study(ROOT / f"studies/{name}.yaml")
        assert len(batch_8192[folder].runs) == sum(len(each.seeds or study.seeds) for each in study.variants.values())
    subjects = [batch_8192[folder] for folder in studies]
    elsewhere = [ends for _, ends in differences_across_studies(batch_8192)]
    elsewhere += [words.removesuffix(")") for words in correlations_without_150_updates(batch_8192)]
    assert_page_has_numbers_of("results_16384.md", *subjects, at_least=85, elsewhere=elsewhere)


def differences_across_studies(batch_8192: dict[str, Subject]) -> list[tuple[str, str]]:
    return [
        *differences_on_one_processor(batch_8192),
        *differences_from_former_rates(batch_8192),
        *differences_in_validation(batch_8192["rivals-16384-strong"]),
        in_words(pairs_of(batch_8192["rivals-16384-strong"], "sb", "lb-smoothout-1200", range(106, 110))),
        *looks_before_the_last(batch_8192["rivals-50000-rivals"]),
    ]


def looks_before_the_last(rivals: Subject) -> list[tuple[str, str]]:
    """Return how far label smoothing was from LB with three, five and eight seeds, and from SmoothOut with five."""
    return [
        in_words(pairs_of(rivals, against, "lb-smoothing", range(100, 100 + seeds)))
        for against, seeds in (("lb", 3), ("lb", 5), ("lb", 8), ("lb-smoothout", 5))
    ]


def differences_in_validation(strong: Subject) -> list[tuple[str, str]]:
    """Return how far strong noise is from SB with 16 and with 64 passes on the validation images."""
    noisy = "lb-smoothout-1200"
    return [
        in_words(pairs_of(strong, against, noisy, seeds, "validation"))
        for against, seeds in (("sb", range(100, 110)), ("sb-64", SIX))
    ]


def differences_on_one_processor(batch_8192: dict[str, Subject]) -> list[tuple[str, str]]:
    """Return what the processor changes of SB, SmoothOut's difference from SB beside it, and its gain from 300 on."""
    before, now = (accuracies(batch_8192[folder]) for folder in ("rivals-16384", "rivals-16384-strong"))
    beside = {seed: before if seed < 104 else now for seed in SIX}
    return [
        in_words([(before[f"sb-seed-{seed}"], now[f"sb-seed-{seed}"]) for seed in SIX]),
        in_words([(beside[seed][f"sb-seed-{seed}"], before[f"lb-smoothout-600-seed-{seed}"]) for seed in SIX]),
        in_words(pairs_of(batch_8192["rivals-16384"], "lb-smoothout-300", "lb-smoothout-600", range(100, 104))),
    ]


def differences_from_former_rates(batch_8192: dict[str, Subject]) -> list[tuple[str, str]]:
    """Return what higher rates bring LB, SmoothOut's difference from that LB, and what they bring SmoothOut."""
    before, now = (accuracies(batch_8192[folder]) for folder in ("rivals-16384", "rivals-16384-rates"))
    assert all(before[f"sb-seed-{seed}"] == now[f"sb-seed-{seed}"] for seed in SIX)
    plain, noisy = "lb-300-seed-{}", "lb-smoothout-300-seed-{}"
    return [
        in_words([(one[name.format(seed)], other[against.format(seed)]) for seed in SIX])
        for one, name, other, against in (
            (before, plain, now, plain),
            (now, plain, before, noisy),
            (before, noisy, now, noisy),
        )
    ]


def accuracies(subject: Subject) -> dict[str, float]:
    """Return the final test accuracy of each run, in percent."""
    return {run.name: 100 * (FINAL_ACCURACY.take(run) or math.nan) for run in subject.runs}


def in_words(pairs: Sequence[tuple[float, float]]) -> tuple[str, str]:
    """Return the mean paired difference and the ends of its interval as pages have them."""
    interval = paired_difference(pairs)
    assert interval is not None
    ends = (interval.difference, interval.low, interval.high)
    mean, low, high = (f"{each:+.2f}".replace("-", "\u2212") for each in ends)
    return mean, f"{low} to {high}"


def test_documented_differences_across_studies(batch_8192: dict[str, Subject]) -> None:
    text = " ".join((ROOT / "docs/results_16384.md").read_text().split())
    assert all(f"{mean} points ({ends})" in text for mean, ends in differences_across_studies(batch_8192))


def test_the_higher_rates_confirmed_at_batch_8192_are_the_best_of_their_search(batch_8192: dict[str, Subject]) -> None:
    trials = {run.name.partition("-seed-")[0]: run for run in batch_8192["rivals-16384-rates-tune"].runs}
    assert len(trials) == 11
    diverged = trials.pop("lb-300-learning_rate-3.2")
    assert not diverged.split("validation")
    found = {name: f"{100 * run.split('validation')[-1].accuracy:.2f}" for name, run in trials.items()}
    study = load_study(ROOT / "studies/rivals_16384_rates.yaml")
    for variant, family in (("lb-300", "lb-"), ("lb-smoothout-300", "lb-smoothout-")):
        of_family = [name for name in found if name.startswith(family) and (family != "lb-" or "smooth" not in name)]
        best = trials[max(of_family, key=found.__getitem__)].settings
        chosen = dict(flat_settings(study.settings_of(variant)))
        assert {path: best[path] for path in chosen if path != "metrics.every_steps"} == {
            path: value for path, value in chosen.items() if path != "metrics.every_steps"
        }
    text = " ".join((ROOT / "docs/results_16384.md").read_text().split())
    plain, warmed = "{}-300-learning_rate-{}", "{}-warmup-300-learning_rate-{}"
    for quoted, names in (
        (
            "was {} % with 0.4, {} % with 0.8 and {} % with 1.6, while 3.2 diverged",
            [plain.format("lb", rate) for rate in (0.4, 0.8, 1.6)],
        ),
        (
            "it was {} % with 0.8, {} % with 1.6 and {} % with 3.2",
            [warmed.format("lb", rate) for rate in (0.1, 0.2, 0.4)],
        ),
        ("was {} % with 0.2 and {} % with 0.4", [plain.format("lb-smoothout", rate) for rate in (0.2, 0.4)]),
        ("warm-up {} % with 0.8 and {} % with 1.6", [warmed.format("lb-smoothout", rate) for rate in (0.1, 0.2)]),
    ):
        assert quoted.format(*(found[name] for name in names)) in text
    runs = batch_8192["rivals-16384-rates"]
    for name in ("lb-smoothout-300-seed-101", "lb-300-seed-103"):
        assert f"({100 * run_of(runs, name).split('train')[-1].accuracy:.2f} %" in text


def test_the_strength_confirmed_at_batch_8192_is_the_best_of_its_search(batch_8192: dict[str, Subject]) -> None:
    trials = [run for run in batch_8192["rivals-16384-updates-tune"].runs if run.settings]
    found = {run.settings["noise.amplitude"]: 100 * run.split("validation")[-1].accuracy for run in trials}
    assert max(found, key=lambda strength: found[strength]) == 0.3
    plan = " ".join((ROOT / "docs/study_plan.md").read_text().split())
    assert f"0.2 and 0.5 are done, {found[0.2]:.2f} and {found[0.5]:.2f} %" in plan
    assert f"with strength 0.3 the trial there has {found[0.3]:.2f} %" in plan
    page = " ".join((ROOT / "docs/results_16384.md").read_text().split())
    words = f"{found[0.2]:.2f} % with strength 0.2, {found[0.3]:.2f} % with 0.3 and {found[0.5]:.2f} % with 0.5"
    assert words in page
    accuracy = {
        run.name: 100 * (FINAL_ACCURACY.take(run) or math.nan) for run in batch_8192["rivals-16384-strong"].runs
    }
    first, second, both, more_passes = (
        paired_difference(
            [(accuracy[f"{against}-seed-{seed}"], accuracy[f"lb-smoothout-1200-seed-{seed}"]) for seed in seeds],
            confidence=confidence,
        )
        for against, seeds, confidence in (
            ("sb", range(100, 106), 0.95),
            ("sb", range(100, 110), 1 - 0.05 / 2),
            ("sb", range(100, 110), 1 - 0.05 / 2 / 4),
            ("sb-64", range(100, 106), 0.95),
        )
    )
    assert first
    assert second
    assert both
    assert more_passes
    assert f"With six seeds the lower end of its difference from SB was \u2212{-first.low:.4f}" in page
    assert f"{second.low:+.3f} when corrected for having looked twice, and \u2212{-both.low:.2f} for both" in page
    assert f"The lower end is \u2212{-more_passes.low:.4f} before it is rounded" in page


def test_the_rates_confirmed_for_the_rivals_are_the_best_of_their_search(batch_8192: dict[str, Subject]) -> None:
    found: dict[str, dict[float, float]] = {}
    for run in batch_8192["rivals-16384-rivals-tune"].runs:
        of_variant = found.setdefault(run.name.partition("-learning_rate")[0], {})
        rate = run.settings["optimizer.learning_rate"]
        assert isinstance(rate, float)
        of_variant[rate] = 100 * run.split("validation")[-1].accuracy
    study = load_study(ROOT / "studies/rivals_16384_rivals.yaml")
    plan = " ".join((ROOT / "docs/study_plan.md").read_text().split())
    assert len(found) == 4
    for name, accuracies in found.items():
        assert max(accuracies, key=accuracies.__getitem__) == study.settings_of(name)["optimizer.learning_rate"]
        assert f"{accuracies[0.2]:.2f} and {accuracies[0.4]:.2f}" in plan


def test_runs_repeated_on_another_day_are_bit_identical(batch_8192: dict[str, Subject]) -> None:
    before, again = batch_8192["rivals-16384"], batch_8192["rivals-16384-rivals"]
    for seed in (104, 105):
        for name, now in (("sb", "sb"), ("lb-300", "lb"), ("lb-smoothout-300", "lb-smoothout")):
            first, second = run_of(before, f"{name}-seed-{seed}"), run_of(again, f"{now}-seed-{seed}")
            for split in ("train", "validation", "test"):
                one, other = first.split(split)[-1], second.split(split)[-1]
                assert (one.loss, one.accuracy) == (other.loss, other.accuracy)


def correlations_without_150_updates(batch_8192: dict[str, Subject]) -> list[str]:
    """Return the rank correlations of width and trace with the gap, given the loss, of the runs that fit best."""
    runs = batch_8192["rivals-16384"].runs
    fitted = [run for run in runs if re.match(r"sb-|lb-.*00-seed", run.name)]
    found = []
    for title in ("basin width at a rise of 0.5", "Hessian trace"):
        [sharpness] = [each for each in sharpness_measures(runs) if each.title == title]
        rows = [[measure.take(run) for measure in (sharpness, GAP, TRAIN_LOSS)] for run in fitted]
        values = [[value for value in row if value is not None] for row in rows]
        found.append(correlation_in_words(*zip(*(row for row in values if len(row) == 3), strict=True)))
    return found


def test_documented_correlations_without_the_runs_of_150_updates(batch_8192: dict[str, Subject]) -> None:
    text = " ".join((ROOT / "docs/results_16384.md").read_text().split())
    assert all(words in text for words in correlations_without_150_updates(batch_8192))


def test_page_of_updates_enough_has_the_numbers_of_its_runs(tmp_path: Path) -> None:
    subprocess.run(["tar", "-C", str(tmp_path), "-xJf", str(RESULTS / "rivals-updates.tar.xz")], check=True)
    subject = read_subject(tmp_path / "rivals-updates")
    study = load_study(ROOT / "studies/rivals_updates.yaml")
    done = [run for run in subject.runs if run.settings]
    assert len(done) == 30
    for run in done:
        chosen = dict(flat_settings(study.settings_of(run.name.partition("-seed-")[0])))
        assert {path: run.settings[path] for path in chosen} == chosen
    mean, ends = in_words(pairs_of(subject, "sb", "lb-smoothout-600", range(100, 110), "validation"))
    assert f"{mean} points ({ends})" in " ".join((ROOT / "docs/results_updates.md").read_text().split())
    assert_page_has_numbers_of("results_updates.md", subject, at_least=16, elsewhere=[ends])
    trials = read_subject(tmp_path / "rivals-updates-tune").runs
    found = {run.name.removesuffix("-seed-0"): run.split("validation")[-1].accuracy for run in trials}
    plan = " ".join((ROOT / "docs/study_plan.md").read_text().split())
    names = [f"so-0{strength}-600" for strength in range(3, 8)]
    by_strength = [f"{100 * found[name]:.2f}" for name in names]
    fitted = {run.name.removesuffix("-seed-0"): f"{100 * run.split('train')[-1].accuracy:.2f}" for run in trials}
    page = (ROOT / "docs/results_updates.md").read_text()
    assert f"| validation accuracy, % | {' | '.join(by_strength)} |" in page
    assert f"| train accuracy, % | {' | '.join(fitted[name] for name in names)} |" in page
    assert f"strength 0.3, 0.4, 0.5, 0.6 and 0.7 ({', '.join(by_strength)} %)" in plan
    assert max(found[name] for name in found if not name.startswith("sb")) == found["so-05-600"]


def test_readme_has_the_numbers_of_the_pages() -> None:
    pages = ("results.md", "results_updates.md", "results_16384.md")
    detail = "".join((ROOT / "docs" / page).read_text().partition("## The tables")[2] for page in pages)
    found = re.findall(r"([+\u2212][\d.]+)\*{0,2} \((\S+ to \S+), n = (\d+)\)", (ROOT / "README.md").read_text())
    assert len(found) == 11
    for mean, ends, count in found:
        assert re.search(rf"{re.escape(f'{mean} ({ends};')}[^|]*n = {count}\b", detail.replace("*", "")), mean


def test_best_rates_and_strengths_near_the_ends_of_their_ranges_are_reported() -> None:
    tuned, study, later = (load_study(ROOT / f"studies/rivals_{name}.yaml") for name in ("tune", "confirm", "rest"))
    assert tuned.search is not None
    near = {}
    for name in tuned.variants:
        chosen = (study if name in study.variants else later).settings_of(name)
        has_strength = chosen["noise.method"] not in ("none", "ivon")
        for path in ("optimizer.learning_rate", *(["noise.amplitude"] if has_strength else [])):
            space = tuned.search.space[path]
            assert isinstance(space, Uniform)
            place = math.log(chosen[path] / space.low) / math.log(space.high / space.low)
            if not 0.1 < place < 0.9:
                near[name, path] = f"{chosen[path]:.2f}"
    names = ("lb-smoothing", "lb-sgld", "lb-lawa")
    smoothing, sgld, lawa = (near.pop((name, "optimizer.learning_rate")) for name in names)
    assert not near
    text = " ".join((ROOT / "docs/results.md").read_text().split())
    assert f"label smoothing ({smoothing}), SGLD ({sgld}) and LAWA ({lawa}) lie within a tenth" in text


def test_best_rates_that_are_the_highest_of_their_trials_are_reported(later_rivals: Subject) -> None:
    trials: dict[str, list[tuple[float, float]]] = {}
    for run in read_subject(later_rivals.directory.parent / "rivals-tune").runs:
        rate = run.settings["optimizer.learning_rate"]
        assert isinstance(rate, float)
        trials.setdefault(run.name.partition("-trial-")[0], []).append((run.split("validation")[-1].accuracy, rate))
    highest = {name: rate for name, of in trials.items() if (rate := max(of)[1]) == max(each for _, each in of)}
    names = ("lb", "lb-late", "lb-asam", "lb-ivon")
    of_lb, of_late, of_asam, of_ivon = (highest.pop(name) for name in names)
    assert sorted(highest) == ["lb-sgld", "lb-smoothing"]
    text = " ".join((ROOT / "docs/results.md").read_text().split())
    assert f"of LB ({of_lb:.2f}), late SmoothOut ({of_late:.2f}), ASAM ({of_asam:.2f}), IVON ({of_ivon:.2f})," in text
    assert f"by chance not above {of_ivon:.3f}" in text
    by_rate = [accuracy for accuracy, _ in sorted(trials["lb-ivon"], key=lambda trial: trial[1])]
    assert by_rate == sorted(by_rate)
    assert f"from {100 * by_rate[0]:.0f} to {100 * by_rate[-1]:.0f} %" in text
