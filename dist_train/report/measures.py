"""What is measured of a run, one number each: the columns of the tables. A new measure is one new line here."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, median

from dist_train.monitoring import wording
from dist_train.report.results import BasinWidth, Landscape, Sharpness
from dist_train.report.stored_run import StoredRun

_SHARPNESS = "Basin width and sharpness"
_RISE = "Expected rise of the loss under noise"
_COST = "Time and speed"
_LINE_DISTANCES = (0.1, 0.5)


@dataclass(frozen=True)
class Measure:
    """A number of a run: `take` gives it, None where the run does not have it; `factor` and `unit` are for reading."""

    key: str
    title: str
    explanation: str
    take: Callable[[StoredRun], float | None]
    write: Callable[[float], str]
    factor: float = 1.0
    unit: str = ""
    group: str = "Accuracy and loss"
    """The table that it stands in."""
    is_bound: Callable[[StoredRun], bool] = lambda run: False
    """Whether the run's true value is this much or more."""
    is_unresolved: Callable[[StoredRun], bool] = lambda run: False
    """Whether the run's value rests on points too far apart."""

    def text(self, value: float) -> str:
        """Return `value` as people read it."""
        number = self.write(value * self.factor)
        return f"{number} {self.unit}" if self.unit else number

    def told(self, run: StoredRun, value: float) -> str:
        """Return the `value` of `run` as people read it, with what limits it."""
        bound = "\u2265 " if self.is_bound(run) else ""
        return f"{bound}{self.text(value)}{' (unresolved)' if self.is_unresolved(run) else ''}"

    def spread(self, mean: float, deviation: float) -> str:
        """Return `deviation` with as many places as `mean` has."""
        whole, _, places = self.write(mean * self.factor).replace(",", "").partition(".")
        is_plain = whole.lstrip("-").isdecimal() and (places.isdecimal() or not places)
        value = deviation * self.factor
        return f"{value:,.{len(places)}f}" if is_plain else self.write(value)


def measures_of(runs: Sequence[StoredRun]) -> tuple[Measure, ...]:
    """Return the measures that at least one of `runs` has, in the order of the tables."""
    lines = (*_width_measures(runs), *_line_rise_measures(runs))
    candidates = (*_BASIC, *lines, *_sharpness_measures(runs), *_PACE)
    return tuple(measure for measure in candidates if any(measure.take(run) is not None for run in runs))


def sharpness_measures(runs: Sequence[StoredRun]) -> tuple[Measure, ...]:
    """Return the measures of how sharp a minimum is: those of analyses."""
    return (*_sharpness_measures(runs), *_width_measures(runs), *_line_rise_measures(runs))


def final_accuracy(run: StoredRun, split: str = "test") -> float | None:
    """Return the accuracy of the last evaluation of `split`; None where that is not finite."""
    record = run.last(split)
    return record.accuracy if record else None


def commonest_settings(results: Sequence[Landscape | Sharpness]) -> str | None:
    """Return the settings that most `results` were made with: only such are compared."""
    texts = [result.settings for result in results]
    return max(texts, key=texts.count) if texts else None


def directions_of(runs: Sequence[StoredRun], kind: str = "direction") -> dict[str, Landscape]:
    """Return, by name, the landscape of `kind` of each run that has one made with the commonest settings."""
    found = [item for run in runs for item in run.analyses.landscapes if item.kind == kind]
    settings = commonest_settings(found)
    chosen = {}
    for run in runs:
        mine = [item for item in run.analyses.landscapes if item.kind == kind and item.settings == settings]
        if mine:
            chosen[run.name] = max(mine, key=lambda item: item.step or 0)
    return chosen


def sharpness_of(runs: Sequence[StoredRun]) -> dict[str, Sharpness]:
    """Return, by name, the sharpness of each run that has one measured with the commonest settings."""
    settings = commonest_settings([item for run in runs for item in run.analyses.sharpness])
    chosen = {}
    for run in runs:
        mine = [item for item in run.analyses.sharpness if item.settings == settings]
        if mine:
            chosen[run.name] = max(mine, key=lambda item: item.step or 0)
    return chosen


def _best(run: StoredRun) -> float | None:
    return max((record.accuracy for record in run.split("test")), default=None)


def _gap(run: StoredRun) -> float | None:
    train, test = final_accuracy(run, "train"), final_accuracy(run, "test")
    return None if train is None or test is None else train - test


def _loss(split: str) -> Callable[[StoredRun], float | None]:
    def take(run: StoredRun) -> float | None:
        record = run.last(split)
        return record.loss if record else None

    return take


def _seconds(run: StoredRun) -> float | None:
    """Return the time spent in updates; a record stands for all updates since the one before."""
    before, total = 0, 0.0
    for record in run.train:
        if math.isfinite(record.step_seconds):
            total += record.step_seconds * (record.step - before)
        before = record.step
    return total if run.train else None


def _images_per_second(run: StoredRun) -> float | None:
    rates = [record.samples_per_second for record in run.train if math.isfinite(record.samples_per_second)]
    return median(rates) if rates else None


def _width_measures(runs: Sequence[StoredRun]) -> tuple[Measure, ...]:
    chosen = directions_of(runs)
    widths = {name: {width.key: width for width in landscape.widths} for name, landscape in chosen.items()}
    keys = {key: width for found in widths.values() for key, width in found.items()}

    def taking(key: str) -> Callable[[StoredRun], float | None]:
        def take(run: StoredRun) -> float | None:
            width = widths.get(run.name, {}).get(key)
            return width.mean if width else None

        return take

    def with_some(key: str, take: Callable[[BasinWidth], int]) -> Callable[[StoredRun], bool]:
        def has(run: StoredRun) -> bool:
            width = widths.get(run.name, {}).get(key)
            return width is not None and take(width) > 0

        return has

    return tuple(
        Measure(
            f"width-{key}",
            f"basin width, loss under {width.factor} x",
            f"Interval of alpha along random directions where the training loss stays under {width.factor} times "
            "its minimum, and so relative to the loss that was reached. \u2265: it ends beyond the line (censored). "
            "Unresolved: in a direction no point of the line but the minimum lies in it.",
            taking(key),
            three_digits,
            group=_SHARPNESS,
            is_bound=with_some(key, lambda width: width.open_ends),
            is_unresolved=with_some(key, lambda width: width.unresolved),
        )
        for key, width in keys.items()
    )


def _line_rise_measures(runs: Sequence[StoredRun]) -> tuple[Measure, ...]:
    chosen = directions_of(runs)

    def taking(distance: float) -> Callable[[StoredRun], float | None]:
        rises = {name: _line_rise(landscape, distance) for name, landscape in chosen.items()}
        return lambda run: rises.get(run.name)

    return tuple(
        Measure(
            f"line-rise-{distance:g}",
            f"loss rise at \u03b1 = {distance:g}",
            "How much the training loss rises to this distance along the same directions, in absolute numbers; mean "
            "over both sides and the directions.",
            taking(distance),
            three_digits,
            group=_SHARPNESS,
        )
        for distance in _LINE_DISTANCES
    )


def _line_rise(landscape: Landscape, distance: float) -> float | None:
    """Return the mean rise of the training loss to `distance` from the solution; None where a line lacks a point."""
    rises = []
    for line in landscape.lines("train"):
        losses = {round(point.alpha, 9): point.loss for point in line}
        if not {0.0, distance, -distance} <= losses.keys():
            return None
        rises += [losses[distance] - losses[0.0], losses[-distance] - losses[0.0]]
    mean = fmean(rises) if rises else math.nan
    return mean if math.isfinite(mean) else None


def _sharpness_measures(runs: Sequence[StoredRun]) -> tuple[Measure, ...]:
    chosen = sharpness_of(runs)
    names = dict.fromkeys(name for item in chosen.values() for name in item.measures)

    def taking(name: str) -> Callable[[StoredRun], float | None]:
        def take(run: StoredRun) -> float | None:
            return chosen[run.name].measures.get(name) if run.name in chosen else None

        return take

    return tuple(
        Measure(
            f"sharpness-{name}",
            name,
            sharpness_explanation(name),
            taking(name),
            three_digits,
            group=_RISE if name.startswith("expected rise") else _SHARPNESS,
        )
        for name in names
    )


def sharpness_explanation(name: str) -> str:
    """Return what a measure of sharpness means."""
    if name.startswith("Keskar"):
        return "100 (max L - L)/(1 + L), the maximum of the training loss L over a small box around the weights."
    if name.startswith("expected rise"):
        return "Mean rise of the training loss under uniform noise of this amplitude on the weights."
    return "Of the training loss, at the last checkpoint."


def three_digits(value: float) -> str:
    """Return `value` with three digits or more, in plain notation where that is short."""
    if value and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.2e}"
    return f"{value:,.{max(0, 2 - math.floor(math.log10(abs(value))))}f}" if value else "0"


def _two_places(value: float) -> str:
    return f"{value:.2f}"


def _four_places(value: float) -> str:
    return f"{value:.4f}"


FINAL_ACCURACY = Measure("final_test", "final test accuracy", "", final_accuracy, _two_places, 100, "%")
TRAIN_LOSS = Measure("train_loss", "final train loss", "", _loss("train"), _four_places)
_BASIC = (
    FINAL_ACCURACY,
    Measure(
        "best_test",
        "best test accuracy",
        "The highest of all evaluations on the test split.",
        _best,
        _two_places,
        100,
        "%",
    ),
    Measure(
        "final_train",
        "final train accuracy",
        "Clean weights, at the last evaluation of the training split.",
        lambda run: final_accuracy(run, "train"),
        _two_places,
        100,
        "%",
    ),
    Measure("gap", "generalization gap", "Final train minus final test accuracy.", _gap, _two_places, 100, "points"),
    Measure("test_loss", "final test loss", "", _loss("test"), _four_places),
    TRAIN_LOSS,
)
_PACE = (
    Measure(
        "seconds",
        "time in updates",
        "Sum over all updates, without evaluations.",
        _seconds,
        wording.duration,
        group=_COST,
    ),
    Measure("images", "images/s", "Median over the run's records.", _images_per_second, wording.rate, group=_COST),
)
