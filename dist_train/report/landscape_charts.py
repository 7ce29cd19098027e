"""Loss and accuracy along lines through the solutions: figure 3, and lines between two solutions."""

from __future__ import annotations

import base64
import json
import math
import string
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from dist_train.report.chart import Axis, Chart, Point, Series, height_axis, percent_tick, plain, span_axis
from dist_train.report.measures import commonest_settings, directions_of, final_accuracy, three_digits
from dist_train.report.numbers import summary
from dist_train.report.results import Landscape, LandscapePoint
from dist_train.report.stored_run import StoredRun
from dist_train.report.tables import limits
from dist_train.report.variants import Panel, Variant

_LETTERS = string.ascii_lowercase * 4


@dataclass(frozen=True)
class Picture:
    """A figure that an analysis has drawn; `address` holds all of it."""

    title: str
    address: str


@dataclass(frozen=True)
class LandscapeFigure:
    """Figure 3: panels as in the paper, the other variants' panels, and what the drawing rests on."""

    panels: tuple[Chart, ...] = ()
    others: tuple[Chart, ...] = ()
    between: tuple[Chart, ...] = ()
    settings: tuple[tuple[str, str], ...] = ()
    left_out: int = 0
    """Results along directions that were made with other settings or at an earlier step, which are not drawn."""


@dataclass(frozen=True)
class _Drawn:
    variant: Variant
    panel: Panel
    landscapes: tuple[Landscape, ...]

    @property
    def title(self) -> str:
        """Return the words over its panel: SB, uniform 0.01."""
        return f"{self.panel.short}, {self.variant.label}"


def landscape_figure(panels: Sequence[Panel]) -> LandscapeFigure:
    """Return figure 3 of `panels`: base line and one noise variant of each, then the other variants."""
    runs = [run for panel in panels for variant in panel.variants for run in variant.counted]
    chosen = directions_of(runs)
    drawn = list(_drawn(panels, chosen))
    first = _as_in_the_paper(drawn)
    rest = [item for item in drawn if item not in first]
    axes = _axes(item for group in drawn for item in group.landscapes)
    along = [item for run in runs for item in run.analyses.landscapes if item.kind == "direction"]
    return LandscapeFigure(
        panels=tuple(
            _chart(f"landscape-{index}", item, _letter(item, panels), *axes) for index, item in enumerate(first)
        ),
        others=tuple(_chart(f"landscape-other-{index}", item, "", *axes) for index, item in enumerate(rest)),
        between=_between(panels),
        settings=tuple(_settings(next(iter(chosen.values()), None))),
        left_out=len(along) - len(chosen),
    )


def run_landscapes(run: StoredRun) -> tuple[Chart, ...]:
    """Return a chart for every line that was walked from a checkpoint of `run`."""
    lines = [item for item in run.analyses.landscapes if item.kind != "plane"]
    return tuple(_single(f"run-landscape-{index}", [item], _title(item)) for index, item in enumerate(lines))


def _title(landscape: Landscape) -> str:
    if landscape.kind == "interpolate":
        return f"From {landscape.runs[0]} (0) to {landscape.runs[-1]} (1)"
    return "Along random directions" + (f", step {landscape.step:,}" if landscape.step is not None else "")


def plane_pictures(runs: Sequence[StoredRun]) -> tuple[Picture, ...]:
    """Return the figures of planes, as they were drawn, for a page that may fetch nothing."""
    pictures = []
    for run in runs:
        for item in run.analyses.landscapes:
            path = item.folder / "figure.svg"
            if item.kind == "plane" and path.is_file():
                content = base64.b64encode(path.read_bytes()).decode()
                step = f", step {item.step:,}" if item.step is not None else ""
                pictures.append(Picture(f"{run.name}{step}", f"data:image/svg+xml;base64,{content}"))
    return tuple(pictures)


def _drawn(panels: Sequence[Panel], chosen: Mapping[str, Landscape]) -> Iterator[_Drawn]:
    for panel in panels:
        for variant in panel.variants:
            found = tuple(chosen[run.name] for run in variant.counted if run.name in chosen)
            if found:
                yield _Drawn(variant, panel, found)


def _as_in_the_paper(drawn: Sequence[_Drawn]) -> list[_Drawn]:
    """Return base line and one noise variant by panel: among those of all panels the best one of the largest batch."""
    by_panel: dict[str, list[_Drawn]] = {}
    for item in drawn:
        by_panel.setdefault(item.panel.title, []).append(item)
    noisy = [[item for item in group if not item.variant.is_base] for group in by_panel.values()]
    labels = [{item.variant.label for item in group} for group in noisy if group]
    common = set.intersection(*labels) if labels else set()
    candidates = [item for group in noisy for item in group if item.variant.label in common or not common]
    if not candidates:
        return [item for item in drawn if item.variant.is_base]
    largest = max(item.panel.batch or 0 for item in candidates)
    best = max((item for item in candidates if (item.panel.batch or 0) == largest), key=_test_accuracy)
    return [item for item in drawn if item.variant.is_base or item.variant.label == best.variant.label]


def _letter(item: _Drawn, panels: Sequence[Panel]) -> str:
    """Return the panel's letter, as in the paper: a and b for SB without and with noise, c and d for LB."""
    return _LETTERS[2 * panels.index(item.panel) + (0 if item.variant.is_base else 1)]


def _test_accuracy(item: _Drawn) -> float:
    found = summary([value for run in item.variant.counted if (value := final_accuracy(run)) is not None])
    return found.mean if found else 0.0


def _axes(landscapes: Iterable[Landscape]) -> tuple[Axis, Axis, Axis]:
    """Return axes for all panels together: only so can their widths be compared."""
    points = [point for landscape in landscapes for point in landscape.points]
    return (
        span_axis("distance along the direction, \u03b1", [point.alpha for point in points], plain),
        height_axis("loss", [point.loss for point in points], plain),
        _accuracy_axis(points),
    )


def _accuracy_axis(points: Sequence[LandscapePoint]) -> Axis:
    finite = [point.accuracy for point in points if math.isfinite(point.accuracy)]
    return Axis("accuracy, %", 0.0 if min(finite, default=0.0) < 0.5 else 0.5, 1.02, percent_tick)


def _chart(key: str, drawn: _Drawn, letter: str, x: Axis, left: Axis, right: Axis) -> Chart:
    curves = len([line for item in drawn.landscapes for line in item.lines("train")])
    runs = len(drawn.landscapes)
    note = f"{curves} direction{'s' if curves != 1 else ''}, {runs} run{'s' if runs != 1 else ''}"
    widths = _widths(drawn.landscapes)
    return Chart(
        key=key,
        title=drawn.title,
        description=f"Loss (left) and accuracy (right), train and test, around the solution of {drawn.title}; {note}.",
        x=x,
        left=left,
        right=right,
        series=_series(drawn.landscapes),
        letter=letter,
        note=f"{note}{'; ' if widths else ''}{widths}",
        upright=0.0,
    )


def _single(key: str, landscapes: Sequence[Landscape], title: str) -> Chart:
    x, left, right = _axes(landscapes)
    is_line = landscapes[0].kind == "interpolate"
    lines = f"{len(landscapes)} lines; " if len(landscapes) > 1 else ""
    return Chart(
        key=key,
        title=title,
        description=f"Loss (left) and accuracy (right), train and test. {title}.",
        x=Axis("\u03b1", x.low, x.high, plain) if is_line else x,
        left=left,
        right=right,
        series=_series(landscapes),
        note=f"{lines}{_widths(landscapes)}",
        upright=0.0,
    )


def _between(panels: Sequence[Panel]) -> tuple[Chart, ...]:
    """Return a chart for every pair of variants with lines between their runs, the mean over these."""
    names = {
        run.directory.name: f"{panel.short}, {variant.label}"
        for panel in panels
        for variant in panel.variants
        for run in variant.runs
    }
    pairs: dict[str, list[Landscape]] = {}
    for panel in panels:
        for variant in panel.variants:
            for run in variant.counted:
                for item in run.analyses.landscapes:
                    if item.kind == "interpolate":
                        other = names.get(item.runs[-1], item.runs[-1])
                        pairs.setdefault(f"{panel.short}, {variant.label} (0) to {other} (1)", []).append(item)
    return tuple(
        _single(f"between-{index}", _alike(found), title) for index, (title, found) in enumerate(pairs.items())
    )


def _alike(landscapes: Sequence[Landscape]) -> list[Landscape]:
    """Return those that can be compared: the ones with the commonest settings."""
    settings = commonest_settings(landscapes)
    return [item for item in landscapes if item.settings == settings]


def _series(landscapes: Sequence[Landscape]) -> tuple[Series, ...]:
    series = []
    for split in ("train", "test"):
        lines = [line for item in landscapes for line in item.lines(split)]
        for name, axis, take in _TAKEN:
            points = _mean_line(lines, take, name)
            if points:
                series.append(
                    Series(
                        f"{split} {name}",
                        f"{name} {split}",
                        points,
                        "dashed" if split == "test" else "line",
                        "right" if axis == "right" else "left",
                    )
                )
    return tuple(series)


_TAKEN: tuple[tuple[str, str, Callable[[LandscapePoint], float]], ...] = (
    ("loss", "left", lambda point: point.loss),
    ("accuracy", "right", lambda point: point.accuracy),
)


def _mean_line(
    lines: Sequence[Sequence[LandscapePoint]], take: Callable[[LandscapePoint], float], name: str
) -> tuple[Point, ...]:
    values: dict[float, list[float]] = {}
    for line in lines:
        for point in line:
            values.setdefault(point.alpha, []).append(take(point))
    points = []
    for alpha, taken in sorted(values.items()):
        found = summary(taken)
        if found is None:
            continue
        spread = found.deviation
        text = f"{found.mean * 100:.2f} %" if name == "accuracy" else three_digits(found.mean)
        if found.count < len(lines):
            text += f" (on {found.count} of {len(lines)} lines)"
        points.append(
            Point(
                alpha,
                found.mean,
                text,
                None if spread is None else found.mean - spread,
                None if spread is None else found.mean + spread,
            )
        )
    return tuple(points)


def _widths(landscapes: Sequence[Landscape]) -> str:
    widths = [width for item in landscapes for width in item.widths]
    basins = {width.basin for width in widths}
    told = []
    for key, first in {width.key: width for width in widths}.items():
        chosen = [width for width in widths if width.key == key]
        found = summary([width.mean for width in chosen], sum(width.open_ends > 0 for width in chosen))
        if found:
            mean = three_digits(found.mean)
            places = len(mean.partition(".")[2])
            spread = f" ± {found.deviation:.{places}f}" if found.deviation is not None else ""
            least = "\u2265 " if found.censored else ""
            where = f" of {first.basin}" if len(basins) > 1 else ""
            note = limits(found.count, found.censored, sum(width.unresolved > 0 for width in chosen))
            told.append(f"{least}{mean}{spread}{where} (loss under {first.factor} x; {note})")
    return "width " + "; ".join(told) if told else ""


def _settings(landscape: Landscape | None) -> Iterator[tuple[str, str]]:
    settings = json.loads(landscape.settings) if landscape else None
    for name, value in settings.items() if isinstance(settings, dict) else ():
        yield name.replace("_", " "), json.dumps(value).strip('"')
