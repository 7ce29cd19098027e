"""Helpers around Grafana's builders: one function for each style of panel."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

from grafana_foundation_sdk.builders import (
    bargauge,
    common,
    dashboard,
    prometheus,
    stat,
    statetimeline,
    timeseries,
    xychart,
)
from grafana_foundation_sdk.builders import text as text_builder
from grafana_foundation_sdk.cog import builder as cog
from grafana_foundation_sdk.models import common as common_model
from grafana_foundation_sdk.models import dashboard as model
from grafana_foundation_sdk.models import prometheus as prometheus_model
from grafana_foundation_sdk.models import xychart as xychart_model
from grafana_foundation_sdk.models.text import TextMode

from dashboard_generator.links import runbook_link

SOURCE = model.DataSourceRef(type_val="prometheus", uid="${datasource}")
GREEN, YELLOW, RED, BLUE, GREY = "green", "yellow", "red", "blue", "text"
OF_RUN = 'run="$run", run_id="$run_id"'
"""The label matchers that select the run of a dashboard, whose name Grafana does not escape as it does several."""
OF_RUNS = 'run=~"$run", run_id=~"$run_id"'
"""The label matchers that select a dashboard's runs."""
Panels: TypeAlias = Iterator[cog.Builder[model.Panel]]
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Query:
    """A PromQL expression, and the legend of its series: `{{label}}` stands for the label's value."""

    expression: str
    legend: str


@dataclass(frozen=True)
class PanelSpec:
    """A panel's texts and size: `width` of 24 columns, `height` in rows. `alert` is the alert that it helps with."""

    title: str
    description: str
    unit: str
    width: int = 8
    height: int = 8
    alert: str | None = None


def _queries(queries: Sequence[Query]) -> list[prometheus.Dataquery]:
    """Return the range queries of a panel, named A, B, ..."""
    return [
        prometheus.Dataquery()
        .expr(query.expression)
        .legend_format(query.legend)
        .range()
        .editor_mode(prometheus_model.QueryEditorMode.CODE)
        .ref_id(letter)
        for letter, query in zip(_LETTERS, queries, strict=False)
    ]


def thresholds(first: str, *steps: tuple[float, str]) -> dashboard.ThresholdsConfig:
    """Return thresholds: `first` is the colour below all `steps`, each a value and the colour from it on."""
    colours = [model.Threshold(value=None, color=first)]
    colours += [model.Threshold(value=value, color=colour) for value, colour in steps]
    return dashboard.ThresholdsConfig().mode(model.ThresholdsMode.ABSOLUTE).steps(colours)


_Panel = TypeVar("_Panel", timeseries.Panel, xychart.Panel, stat.Panel, bargauge.Panel, statetimeline.Panel)


def _framed(panel: _Panel, spec: PanelSpec, queries: Sequence[Query]) -> _Panel:
    """Return `panel` with the texts and size of `spec`, and with `queries`."""
    return (
        panel.title(spec.title)
        .description(spec.description)
        .unit(spec.unit)
        .span(spec.width)
        .height(spec.height)
        .datasource(SOURCE)
        .targets([*_queries(queries)])
        .links([] if spec.alert is None else [runbook_link(spec.alert)])
    )


def _legend(mode: common_model.LegendDisplayMode, *calculations: str) -> common.VizLegendOptions:
    return (
        common.VizLegendOptions()
        .display_mode(mode)
        .placement(common_model.LegendPlacement.BOTTOM)
        .show_legend(True)
        .calcs(list(calculations))
    )


def curves(spec: PanelSpec, *queries: Query) -> timeseries.Panel:
    """Return lines over time, with last value, minimum and maximum in the legend."""
    tooltip = (
        common.VizTooltipOptions().mode(common_model.TooltipDisplayMode.MULTI).sort(common_model.SortOrder.DESCENDING)
    )
    return (
        _framed(timeseries.Panel(), spec, queries)
        .legend(_legend(common_model.LegendDisplayMode.TABLE, "lastNotNull", "min", "max"))
        .tooltip(tooltip)
        .line_width(1)
        .fill_opacity(0)
        .show_points(common_model.VisibilityMode.NEVER)
        .span_nulls(False)
        .thresholds(thresholds(GREEN))
        .thresholds_style(common.GraphThresholdsStyleConfig().mode(common_model.GraphThresholdsStyleMode.OFF))
        .color_scheme(dashboard.FieldColor().mode(model.FieldColorModeId.PALETTE_CLASSIC))
    )


def from_zero(spec: PanelSpec, *queries: Query) -> timeseries.Panel:
    """Return `curves` on an axis that begins at 0."""
    return curves(spec, *queries).min(0)


def curves_over(x: str, label: str, spec: PanelSpec, query: Query, names: Sequence[str]) -> xychart.Panel:
    """Return lines of `query` over the expression `x`, which has the same series, instead of over time.

    `label` is the x axis's label. The lines are named by those labels in `names` that the series have.
    """
    queries = [Query(x, label), query]
    column = "Value #A"  # Grafana's name for the first query's values in a table
    x_matcher = xychart.MatcherConfig().id("byName").options(column)
    x_options = {"unit": "short", "custom.axisLabel": label, "custom.scaleDistribution": {"type": "linear"}}
    by_series = {"fields": list(names), "naming": {"asLabels": False}}
    return (
        _framed(xychart.Panel(), spec, queries)
        .targets([target.format(prometheus_model.PromQueryFormat.TABLE) for target in _queries(queries)])
        # One table of both queries, then one for each series.
        .with_transformation(model.DataTransformerConfig("merge", options={}))
        .with_transformation(model.DataTransformerConfig("partitionByValues", options=by_series))
        .mapping(xychart_model.SeriesMapping.AUTO)
        .series([xychart.XYSeriesConfig().x(xychart.XychartXYSeriesConfigX().matcher(x_matcher))])
        .override_by_name(column, [model.DynamicConfigValue(name, value) for name, value in x_options.items()])
        .show(xychart_model.XYShowMode.LINES)
        .line_width(1)
        .legend(_legend(common_model.LegendDisplayMode.LIST))
        .thresholds(thresholds(GREEN))
        .color_scheme(dashboard.FieldColor().mode(model.FieldColorModeId.PALETTE_CLASSIC))
    )


def limited(panel: timeseries.Panel, first: str, *steps: tuple[float, str]) -> timeseries.Panel:
    """Return `panel` with dashed lines at thresholds, such as those of alerts."""
    style = common.GraphThresholdsStyleConfig().mode(common_model.GraphThresholdsStyleMode.DASHED)
    return panel.thresholds(thresholds(first, *steps)).thresholds_style(style)


_Lines = TypeVar("_Lines", timeseries.Panel, xychart.Panel)


def logarithmic(panel: _Lines) -> _Lines:
    """Return `panel` with a logarithmic axis."""
    return panel.scale_distribution(common.ScaleDistributionConfig().type(common_model.ScaleDistribution.LOG).log(10))


def stacked(spec: PanelSpec, *queries: Query) -> timeseries.Panel:
    """Return filled areas on top of each other."""
    stacking = common.StackingConfig().mode(common_model.StackingMode.NORMAL).group("A")
    return from_zero(spec, *queries).fill_opacity(40).line_width(0).stacking(stacking)


def number(spec: PanelSpec, query: Query, first: str = BLUE, *steps: tuple[float, str]) -> stat.Panel:
    """Return the latest value in large type, coloured by thresholds."""
    return (
        _framed(stat.Panel(), spec, [query])
        .reduce_options(_last())
        .color_mode(common_model.BigValueColorMode.VALUE)
        .graph_mode(common_model.BigValueGraphMode.NONE)
        .text_mode(common_model.BigValueTextMode.AUTO)
        .no_value("-")
        .thresholds(thresholds(first, *steps))
    )


def bars(spec: PanelSpec, query: Query) -> bargauge.Panel:
    """Return one horizontal bar for each series, by its latest value."""
    return (
        _framed(bargauge.Panel(), spec, [query])
        .min(0)
        .reduce_options(_last())
        .orientation(common_model.VizOrientation.HORIZONTAL)
        .display_mode(common_model.BarGaugeDisplayMode.BASIC)
        .thresholds(thresholds(BLUE))
    )


def states(spec: PanelSpec, query: Query, words: Sequence[tuple[int, str, str]]) -> statetimeline.Panel:
    """Return a state timeline; `words` map each value to a text and a colour: (value, word, colour)."""
    meanings = {
        str(value): model.ValueMappingResult(text=word, color=colour, index=index)
        for index, (value, word, colour) in enumerate(words)
    }
    return (
        _framed(statetimeline.Panel(), spec, [query])
        .mappings([model.ValueMap(options=meanings)])
        .show_value(common_model.VisibilityMode.AUTO)
        .merge_values(True)
        .row_height(0.8)
        .thresholds(thresholds(GREY))
        .legend(_legend(common_model.LegendDisplayMode.LIST).show_legend(False))
    )


def words(title: str, markdown: str, width: int, height: int) -> text_builder.Panel:
    """Return a panel of text."""
    return (
        text_builder.Panel()
        .title(title)
        .description(title)
        .mode(TextMode.MARKDOWN)
        .content(markdown)
        .span(width)
        .height(height)
    )


def _last() -> common.ReduceDataOptions:
    return common.ReduceDataOptions().calcs(["lastNotNull"]).values(False)
