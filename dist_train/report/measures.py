"""The measures of a run, one number each, and their means and intervals. A Measure here is a column of the tables."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median, mode, stdev
from typing import Literal, TypeVar

from scipy import special

from dist_train.analysis.landscape_files import Landscape
from dist_train.monitoring import wording
from dist_train.report.stored_run import Sharpness, StoredRun
from dist_train.watch.figure import Point, three_digits

Sign = Literal["", "\u2265", "\u2264"]


@dataclass(frozen=True)
class Summary:
    """Mean of `count` values; `deviation` is their sample standard deviation, None for a single value.

    `censored` of the values are lower bounds: the mean is then a lower bound too, and the deviation is unknown.
    """

    mean: float
    deviation: float | None
    count: int
    censored: int = 0


@dataclass(frozen=True)
class Interval:
    """The mean difference of `count` pairs with its confidence interval.

    In `censored` pairs a value is a lower bound. The difference is then a bound without an interval (its ends are NaN):
    `sign` says in which direction; it is empty for an exact difference, None if nothing is known.
    """

    difference: float
    low: float
    high: float
    count: int
    censored: int = 0
    sign: Sign | None = ""


def summary(values: Sequence[float], censored: int = 0) -> Summary | None:
    """Return the summary of the finite `values`, of which `censored` are lower bounds; None if there are none."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return None
    deviation = stdev(finite) if len(finite) > 1 and not censored else None
    return Summary(fmean(finite), deviation, len(finite), censored)


def mean_points(values: Iterable[tuple[float, Sequence[float]]], words: Callable[[Summary], str]) -> tuple[Point, ...]:
    """Return the mean of the values at each x, with a band of one standard deviation and the text `words` gives."""
    points = []
    for x, measured in values:
        if found := summary(measured):
            spread = found.deviation
            band = None if spread is None else (found.mean - spread, found.mean + spread)
            points.append(Point(x, found.mean, words(found), band))
    return tuple(points)


def spread(write: Callable[[float], str], mean: float, deviation: float) -> str:
    """Return `deviation` as text, with as many decimal places as `write` gives `mean`."""
    whole, _, places = write(mean).replace(",", "").partition(".")
    is_plain = whole.lstrip("-").isdecimal() and (places.isdecimal() or not places)
    return f"{deviation:,.{len(places)}f}" if is_plain else write(deviation)


def paired_difference(
    pairs: Sequence[tuple[float, float]], bounds: Sequence[tuple[bool, bool]] = (), confidence: float = 0.95
) -> Interval | None:
    """Return the mean of second minus first with Student's interval at `confidence`; None for fewer than two pairs.

    `bounds` says for each pair which of its values are lower bounds. Differences that are equal, and not 0, say nothing
    about their spread: the interval's ends are NaN.
    """
    # The same number may be computed as two that differ by rounding, such as a gap between two accuracies.
    rounding = 1e-12 * max((abs(value) for pair in pairs for value in pair), default=0.0)
    differences = [0.0 if abs(after - before) <= rounding else after - before for before, after in pairs]
    if len(differences) < 2:
        return None
    mean, count = fmean(differences), len(differences)
    if any(map(any, bounds)):
        # A larger second value raises the mean, a larger first one lowers it; either may widen the interval freely.
        at_most, at_least = (any(side) for side in zip(*bounds, strict=True))
        sign: Sign | None = None if at_most and at_least else "\u2265" if at_least else "\u2264"
        return Interval(mean, math.nan, math.nan, count, sum(map(any, bounds)), sign)
    if max(differences) - min(differences) <= rounding < abs(mean):
        return Interval(mean, math.nan, math.nan, count)
    half = float(special.stdtrit(count - 1, (1 + confidence) / 2)) * stdev(differences) / math.sqrt(count)
    return Interval(mean, mean - half, mean + half, count)


SHARPNESS = "Basin width and sharpness"
_RISE = "Expected rise of the loss under noise"
_COST = "Time and speed"
_LINE_DISTANCES = (0.1, 0.5)
_Result = TypeVar("_Result", Landscape, Sharpness)


@dataclass(frozen=True)
class Measure:
    """A number of a run. `take` returns it, or None if the run has none; it is shown times `factor`, in `unit`."""

    key: str
    title: str
    explanation: str
    take: Callable[[StoredRun], float | None]
    write: Callable[[float], str] = three_digits
    factor: float = 1.0
    unit: str = ""
    group: str = "Accuracy and loss"  # the table that shows it
    is_bound: Callable[[StoredRun], bool] = lambda run: False  # whether the run's value is a lower bound
    is_unresolved: Callable[[StoredRun], bool] = lambda run: False
    """Whether the run's value comes from points too far apart."""
    is_guess: Callable[[StoredRun], bool] = lambda run: False
    """Whether the run diverged, so that its value is the accuracy of guessing."""

    @property
    def heading(self) -> str:
        """Return the title with the unit."""
        return f"{self.title}, {self.unit}" if self.unit else self.title

    def described(self, run: StoredRun, value: float) -> str:
        """Return the `value` of `run` as text, with its unit and qualification."""
        bound, limit = "\u2265 " if self.is_bound(run) else "", f" ({note})" if (note := self.note(run)) else ""
        return f"{bound}{self.write(value * self.factor)}{f' {self.unit}' if self.unit else ''}{limit}"

    def note(self, run: StoredRun) -> str:
        """Return the qualification of the value of `run`, other than being a bound."""
        return "diverged: as if guessing" if self.is_guess(run) else "unresolved" if self.is_unresolved(run) else ""


def measures_of(runs: Sequence[StoredRun]) -> tuple[Measure, ...]:
    """Return the measures that at least one of `runs` has, in the order of the tables."""
    candidates = (*_BASIC, *_line_measures(runs), *_sharpness_measures(runs), *_PACE)
    return tuple(measure for measure in candidates if any(measure.take(run) is not None for run in runs))


def sharpness_measures(runs: Sequence[StoredRun]) -> tuple[Measure, ...]:
    """Return the measures of sharpness that `runs` have from their analyses."""
    return (*_sharpness_measures(runs), *_line_measures(runs))


def commonest_settings(results: Sequence[Landscape] | Sequence[Sharpness]) -> str | None:
    """Return the most common settings of `results`; only results with these settings are compared."""
    return mode(result.shared_settings for result in results) if results else None


def directions_of(runs: Sequence[StoredRun]) -> dict[str, Landscape]:
    """Return each run's `direction` landscape at its last checkpoint with the commonest settings, by run name."""
    return _comparable({run.name: _at_the_end(run, run.analyses.of_kind("direction")) for run in runs})


def sharpness_of(runs: Sequence[StoredRun]) -> dict[str, dict[str, Sharpness]]:
    """Return by measure and run name the sharpness at the last checkpoint with the measure's commonest settings."""
    last = {run.name: _at_the_end(run, run.analyses.sharpness) for run in runs}
    titles = dict.fromkeys(title for found in last.values() for item in found for title in item.measures)
    return {
        title: _comparable({name: [item for item in found if title in item.measures] for name, found in last.items()})
        for title in titles
    }


def sharpness_left_out(runs: Sequence[StoredRun]) -> int:
    """Return how many sharpness results of `runs` are left out: of other settings, or an earlier checkpoint."""
    chosen = [pair for by_run in sharpness_of(runs).values() for pair in by_run.items()]
    used = {(name, item.step, item.shared_settings) for name, item in chosen}
    # One without any is of a noise scale that its samples cannot show.
    return sum(bool(item.measures) for run in runs for item in run.analyses.sharpness) - len(used)


def sharpness_settings(runs: Sequence[StoredRun]) -> tuple[str, ...]:
    """Return the settings of the sharpness that counts, as text; several if its measures differ in them."""
    used = dict.fromkeys(item.shared_settings for by_run in sharpness_of(runs).values() for item in by_run.values())
    return tuple(
        "; ".join(f"{name.replace('_', ' ')}: {json.dumps(value)}" for name, value in json.loads(each).items())
        for each in used
    )


def mixes_statistics(runs: Sequence[StoredRun]) -> bool:
    """Whether the norms' statistics in evaluations are running averages in some of `runs`, recomputed in others."""
    return len({_statistics(run.settings) for run in runs} - {""}) > 1


def _statistics(settings: Mapping[str, object]) -> str:
    """Return where the norm statistics of evaluations come from; empty if there are none, or that is unknown."""
    kind, has_noise = str(settings.get("model.norm_statistics", "auto")), settings.get("noise.method") != "none"
    if settings.get("model.norm") in (None, "group", "none"):
        return ""
    return kind if kind != "auto" else "recomputed" if has_noise else "running"


def _at_the_end(run: StoredRun, results: Sequence[_Result]) -> list[_Result]:
    """Return those of `results` that belong to the run's last checkpoint, as far as is known."""
    return [item for item in results if run.analyses.last_step in (None, item.step)]


def _comparable(results: Mapping[str, Sequence[_Result]]) -> dict[str, _Result]:
    settings = commonest_settings([item for found in results.values() for item in found])
    comparable = {name: [item for item in found if item.shared_settings == settings] for name, found in results.items()}
    return {name: max(found, key=lambda item: item.step) for name, found in comparable.items() if found}


def _last(name: str, split: str) -> Callable[[StoredRun], float | None]:
    return lambda run: getattr(None if run.is_diverged else run.last(split), name, None)


def _judged(name: str) -> Callable[[StoredRun], float | None]:
    """Return a function for the last value on the test split, of the weights by which the run is judged."""
    return lambda run: _last(name, f"test{run.judged}")(run)


def _gap(run: StoredRun) -> float | None:
    train, test = (_last("accuracy", split)(run) for split in ("train", "test"))
    return None if train is None or test is None else train - test


def _seconds(run: StoredRun) -> float | None:
    """Return the seconds spent in the run's updates; a record stands for all updates since the previous record."""
    if run.is_diverged:
        return None
    # A run that began from another one's checkpoint has recorded nothing before this event.
    first = next((event for event in run.events if event.event not in ("corrupt_checkpoint", "requeued")), None)
    is_later = first is not None and first.event == "resumed" and (not run.train or run.train[0].step > first.step)
    before = first.step if first is not None and is_later else 0
    total = 0.0
    for record in run.train:
        if math.isfinite(record.step_seconds):
            total += record.step_seconds * (record.step - before)
        before = record.step
    return total if run.train else None


def _images_per_second(run: StoredRun) -> float | None:
    rates = [record.samples_per_second for record in run.train if math.isfinite(record.samples_per_second)]
    return median(rates) if rates else None


def _value_by_name(values: Mapping[str, float]) -> Callable[[StoredRun], float | None]:
    return lambda run: values.get(run.name)


def _is_named(names: Collection[str]) -> Callable[[StoredRun], bool]:
    return lambda run: run.name in names


def _line_measures(runs: Sequence[StoredRun]) -> Iterator[Measure]:
    """Yield basin widths along directions, and rises of the loss along them."""
    chosen = directions_of(runs)
    for key in dict.fromkeys(key for item in chosen.values() for key in item.widths_by_key):
        widths = {name: width for name, item in chosen.items() if (width := item.widths_by_key.get(key))}
        yield Measure(
            f"width-{'.'.join(key)}",
            f"basin width, loss under {key[1]} x",
            f"Interval of alpha along random directions where the training loss stays under {key[1]} times "
            "its minimum, so it is relative to the loss that the run reached. \u2265: it ends beyond the line "
            "(censored). Unresolved: in some direction it contains no point of the line but the minimum.",
            _value_by_name({name: width.mean for name, width in widths.items()}),
            group=SHARPNESS,
            is_bound=_is_named({name for name, width in widths.items() if width.open}),
            is_unresolved=_is_named({name for name, width in widths.items() if chosen[name].unresolved(width)}),
        )
    for distance in _LINE_DISTANCES:
        rises = {name: rise for name, item in chosen.items() if (rise := _line_rise(item, distance)) is not None}
        yield Measure(
            f"line-rise-{distance:g}",
            f"loss rise at \u03b1 = {distance:g}",
            "Absolute rise of the training loss at this distance along the same directions; mean over both sides and "
            "the directions. Runs in which it is not finite are left out.",
            _value_by_name(rises),
            group=SHARPNESS,
        )


def _line_rise(landscape: Landscape, distance: float) -> float | None:
    """Return the mean rise of the training loss at `distance` from the solution; None if a line lacks the points."""
    rises = []
    for line in landscape.lines("train"):
        losses = {round(point.alpha, 9): point.loss for point in line}
        if not {0.0, distance, -distance} <= losses.keys():
            return None
        rises += [losses[distance] - losses[0.0], losses[-distance] - losses[0.0]]
    mean = fmean(rises) if rises else math.nan
    return mean if math.isfinite(mean) else None


_EXPLANATIONS = {
    "Keskar": "100 (max L - L)/(1 + L), the maximum of the training loss L over a small box around the weights. "
    "Runs in which it is not finite, the sharpest, are left out.",
    "expected rise": "Mean rise of the training loss under uniform noise of this amplitude on the weights. "
    "Runs in which it is not finite, the sharpest, are left out.",
    "basin width": "Interval around the weights, along random filter-normalized directions, where the training loss "
    "rises by at most this absolute amount. \u2265: in some direction it ends beyond the reach (censored).",
    "largest Hessian eigenvalue": "Of the training loss, at the last checkpoint. Runs in which not all of those "
    "requested converged are left out.",
    "gradient noise scale": "tr(Sigma) / |G|^2 in samples (McCandlish et al.): larger batches gain little. Runs whose "
    "scale is larger than their samples can show have none, so a mean leaves out the largest.",
}
"""Meanings of measures of sharpness, by how their titles begin."""


def _sharpness_measures(runs: Sequence[StoredRun]) -> Iterator[Measure]:
    for title, records in sharpness_of(runs).items():
        explained = (text for start, text in _EXPLANATIONS.items() if title.startswith(start))
        explanation = next(explained, "Of the training loss, at the last checkpoint.")
        values = {name: item.measures[title] for name, item in records.items()}
        group = _RISE if title.startswith("expected rise") else SHARPNESS
        bounds = _is_named({name for name, item in records.items() if title in item.bounds})
        yield Measure(f"sharpness-{title}", title, explanation, _value_by_name(values), group=group, is_bound=bounds)


def _accuracy(
    key: str, title: str, explanation: str, take: Callable[[StoredRun], float | None], unit: str = "%"
) -> Measure:
    return Measure(key, title, explanation, take, "{:.2f}".format, 100, unit)


def _or_guess(accuracy: Measure, is_measured: Callable[[StoredRun], bool] = lambda run: True) -> Measure:
    """Return `accuracy` with, for a diverged run that measures it, the accuracy of guessing."""

    def take(run: StoredRun) -> float | None:
        if not run.is_diverged:
            return accuracy.take(run)
        return run.guessing if is_measured(run) else None

    return replace(accuracy, take=take, is_guess=lambda run: run.is_diverged)


_FOUR, _CLEAN = "{:.4f}".format, "Clean weights, at the last evaluation of the training split."
_AVERAGED = "Of the averaged weights, where the run averages them."
FINAL_ACCURACY = _or_guess(_accuracy("final_test", "final test accuracy", "", _last("accuracy", "test")))
JUDGED_ACCURACY = _or_guess(_accuracy("judged_test", "final test accuracy", _AVERAGED, _judged("accuracy"), "points"))
JUDGED_LOSS = Measure("judged_loss", "final test loss", _AVERAGED, _judged("loss"), _FOUR)
GAP = _accuracy("gap", "generalization gap", "Final train minus final test accuracy.", _gap, "points")
TRAIN_LOSS = Measure("train_loss", "final train loss", "", _last("loss", "train"), _FOUR)
_BASIC = (
    FINAL_ACCURACY,
    _accuracy(
        "best_test",
        "best test accuracy",
        "The highest of all evaluations on the test split.",
        lambda run: max((record.accuracy for record in run.split("test")), default=None),
    ),
    _or_guess(
        _accuracy("final_validation", "final validation accuracy", "", _last("accuracy", "validation")),
        lambda run: run.settings.get("data.validation_size") is not None,
    ),
    _or_guess(
        _accuracy("final_averaged", "final test accuracy, averaged weights", "", _last("accuracy", "test-averaged")),
        lambda run: run.settings.get("averaging.kind", "none") != "none",
    ),
    _accuracy("final_train", "final train accuracy", _CLEAN, _last("accuracy", "train")),
    GAP,
    Measure("test_loss", "final test loss", "", _last("loss", "test"), _FOUR),
    TRAIN_LOSS,
)
_UPDATES = "Sum over all updates, without evaluations."
_PACE = (
    Measure("seconds", "time in updates", _UPDATES, _seconds, wording.duration, group=_COST),
    Measure("images", "images/s", "Median over the run's records.", _images_per_second, wording.rate, group=_COST),
)
