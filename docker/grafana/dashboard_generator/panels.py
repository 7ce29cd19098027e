"""Small helpers around Grafana's builders: one function for each look that the dashboards have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from grafana_foundation_sdk.builders import bargauge, common, dashboard, prometheus, stat, statetimeline, timeseries
from grafana_foundation_sdk.builders import text as text_builder
from grafana_foundation_sdk.cog import builder as cog
from grafana_foundation_sdk.cog import variants
from grafana_foundation_sdk.models import common as common_model
from grafana_foundation_sdk.models import dashboard as model
from grafana_foundation_sdk.models import prometheus as prometheus_model
from grafana_foundation_sdk.models.text import TextMode

from dashboard_generator.links import runbook_link

SOURCE = model.DataSourceRef(type_val="prometheus", uid="${datasource}")
GREEN, YELLOW, RED, BLUE, GREY = "green", "yellow", "red", "blue", "text"
OF_RUN = 'run=~"$run", run_id=~"$run_id"'
"""The matchers of a selector by which a dashboard's runs are chosen."""
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Query:
    """One PromQL expression, and the words for its series: `{{label}}` stands for the label's value."""

    expression: str
    legend: str


@dataclass(frozen=True)
class PanelSpec:
    """What a panel shows and where. `width` is of 24 columns, `height` in rows; `alert` names what it helps with."""

    title: str
    description: str
    unit: str
    width: int = 8
    height: int = 8
    alert: str | None = None


def targets(queries: Sequence[Query]) -> list[cog.Builder[variants.Dataquery]]:
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
    """Return thresholds: `first` is the colour below all `steps`, each a value and the colour from there on."""
    colours = [model.Threshold(value=None, color=first)]
    colours += [model.Threshold(value=value, color=colour) for value, colour in steps]
    return dashboard.ThresholdsConfig().mode(model.ThresholdsMode.ABSOLUTE).steps(colours)


def _links(look: PanelSpec) -> list[cog.Builder[model.DashboardLink]]:
    return [] if look.alert is None else [runbook_link(look.alert)]


def curves(look: PanelSpec, *queries: Query) -> timeseries.Panel:
    """Return lines over time, with their last, least and greatest values in the legend."""
    legend = (
        common.VizLegendOptions()
        .display_mode(common_model.LegendDisplayMode.TABLE)
        .placement(common_model.LegendPlacement.BOTTOM)
        .show_legend(True)
        .calcs(["lastNotNull", "min", "max"])
    )
    tooltip = (
        common.VizTooltipOptions().mode(common_model.TooltipDisplayMode.MULTI).sort(common_model.SortOrder.DESCENDING)
    )
    return (
        timeseries.Panel()
        .title(look.title)
        .description(look.description)
        .unit(look.unit)
        .span(look.width)
        .height(look.height)
        .datasource(SOURCE)
        .targets(targets(queries))
        .links(_links(look))
        .legend(legend)
        .tooltip(tooltip)
        .line_width(1)
        .fill_opacity(0)
        .show_points(common_model.VisibilityMode.NEVER)
        .span_nulls(False)
        .thresholds(thresholds(GREEN))
        .thresholds_style(common.GraphThresholdsStyleConfig().mode(common_model.GraphThresholdsStyleMode.OFF))
        .color_scheme(dashboard.FieldColor().mode(model.FieldColorModeId.PALETTE_CLASSIC))
    )


def limited(panel: timeseries.Panel, first: str, *steps: tuple[float, str]) -> timeseries.Panel:
    """Return `panel` with dashed lines where an alert, or its first sign, would be."""
    style = common.GraphThresholdsStyleConfig().mode(common_model.GraphThresholdsStyleMode.DASHED)
    return panel.thresholds(thresholds(first, *steps)).thresholds_style(style)


def logarithmic(panel: timeseries.Panel) -> timeseries.Panel:
    """Return `panel` with a logarithmic axis."""
    return panel.scale_distribution(common.ScaleDistributionConfig().type(common_model.ScaleDistribution.LOG).log(10))


def stacked(look: PanelSpec, *queries: Query) -> timeseries.Panel:
    """Return filled areas on top of each other."""
    stacking = common.StackingConfig().mode(common_model.StackingMode.NORMAL).group("A")
    return curves(look, *queries).fill_opacity(40).line_width(0).stacking(stacking).min(0)


def number(look: PanelSpec, query: Query, first: str = BLUE, *steps: tuple[float, str]) -> stat.Panel:
    """Return the latest value in large type, coloured by thresholds."""
    return (
        stat.Panel()
        .title(look.title)
        .description(look.description)
        .unit(look.unit)
        .span(look.width)
        .height(look.height)
        .datasource(SOURCE)
        .targets(targets([query]))
        .links(_links(look))
        .reduce_options(_last())
        .color_mode(common_model.BigValueColorMode.VALUE)
        .graph_mode(common_model.BigValueGraphMode.NONE)
        .text_mode(common_model.BigValueTextMode.AUTO)
        .no_value("-")
        .thresholds(thresholds(first, *steps))
    )


def bars(look: PanelSpec, query: Query) -> bargauge.Panel:
    """Return one horizontal bar for each series, by its latest value."""
    return (
        bargauge.Panel()
        .title(look.title)
        .description(look.description)
        .unit(look.unit)
        .min(0)
        .span(look.width)
        .height(look.height)
        .datasource(SOURCE)
        .targets(targets([query]))
        .links(_links(look))
        .reduce_options(_last())
        .orientation(common_model.VizOrientation.HORIZONTAL)
        .display_mode(common_model.BarGaugeDisplayMode.BASIC)
        .thresholds(thresholds(BLUE))
    )


def states(look: PanelSpec, query: Query, words: Sequence[tuple[int, str, str]]) -> statetimeline.Panel:
    """Return a band for each series whose colours say what its value means: (value, word, colour)."""
    meanings = {
        str(value): model.ValueMappingResult(text=word, color=colour, index=index)
        for index, (value, word, colour) in enumerate(words)
    }
    return (
        statetimeline.Panel()
        .title(look.title)
        .description(look.description)
        .unit(look.unit)
        .span(look.width)
        .height(look.height)
        .datasource(SOURCE)
        .targets(targets([query]))
        .links(_links(look))
        .mappings([model.ValueMap(options=meanings)])
        .show_value(common_model.VisibilityMode.AUTO)
        .merge_values(True)
        .row_height(0.8)
        .thresholds(thresholds(GREY))
        .legend(
            common.VizLegendOptions()
            .display_mode(common_model.LegendDisplayMode.LIST)
            .placement(common_model.LegendPlacement.BOTTOM)
            .show_legend(False)
            .calcs([])
        )
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
