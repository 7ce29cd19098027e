"""The tables of `docs/scaling.md`: measurements and fits, published figures, forecasts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.scaling_fit import Fits, Residual
from benchmarks.scaling_forecast import KNOB_RANKS, WIRES, Forecast, Knob, Reduction
from benchmarks.scaling_measure import Measurements
from benchmarks.scaling_model import RunSeconds
from benchmarks.scaling_subjects import Check, Fabric

_ENGINES = {"mpi": "Horovod over MPI", "gloo": "Horovod over Gloo", "torch": "torch.distributed"}


@dataclass(frozen=True)
class Table:
    """A table with a caption; `key` names its markers in the page."""

    key: str
    caption: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def forecast_table(rows: Iterable[Forecast]) -> Table:
    """Return the updates of VGG9."""
    head = ("GPUs", "micro-batch", "update, ms", "images/s", "efficiency", "exposed, ms", "hidden, ms", "idle")
    return Table(
        "vgg9", "VGG9, batch 8192, `comm.reduction: exact`.", head, tuple(_forecast_cells(row) for row in rows)
    )


def _forecast_cells(row: Forecast) -> tuple[str, ...]:
    return (
        f"{row.ranks:,}",
        str(row.micro_size),
        f"{row.milliseconds:.1f}",
        f"{row.images_per_second:,.0f}",
        f"{100 * row.efficiency:.0f} %",
        f"{row.exposed:.2f}",
        f"{row.hidden:.2f}",
        str(row.idle),
    )


def knobs_table(knobs: Iterable[Knob]) -> Table:
    """Return the effect of settings, with a column for each number of GPUs."""
    rows = tuple((knob.setting, *(f"{factor:.2f}" for factor in knob.factors)) for knob in knobs)
    caption = "The time of an update of VGG9 as a factor, with no GPU idle unless stated."
    return Table("settings", caption, ("setting", *(f"{ranks:,}" for ranks in KNOB_RANKS)), rows)


def reductions_table(groups: Mapping[float, Sequence[tuple[Reduction, Reduction]]]) -> Table:
    """Return the reductions of ResNet-50 for each rate of a GPU, with one network card per node and with eight."""
    factors = ("exact", "exact32", "exact16")
    head = ("images/s a GPU", "GPUs", "micro-batch", "float: ms", "efficiency", *factors)
    fast = ("8 cards, float: ms", "8 cards, exact")
    rows = []
    for rate, pairs in groups.items():
        for slow, other in pairs:
            update, faster = slow.floating, other.floating
            ranks, micro_size, milliseconds, _, efficiency, *_ = _forecast_cells(update)
            rows.append(
                (
                    f"{rate:,.0f}",
                    *(ranks, micro_size, milliseconds, efficiency),
                    *(f"{slow.factors[name]:.2f}" for name in factors),
                    f"{faster.milliseconds:.1f}",
                    f"{other.factors['exact']:.2f}",
                )
            )
    caption = (
        "ResNet-50, batch 8192: an update with float gradients, and the others' time over it; "
        "first with 100 Gbit/s a node, then with eight cards of 400 Gbit/s."
    )
    return Table("resnet50", caption, (*head, *fast), tuple(rows))


def wires_table(groups: Mapping[str, Sequence[Reduction]]) -> Table:
    """Return every way to sum gradients for each model."""
    names = tuple(name for name in WIRES if name != "float32")
    rows = []
    for model, reductions in groups.items():
        for row in reductions:
            ranks, micro_size, milliseconds = _forecast_cells(row.floating)[:3]
            rows.append((model, ranks, micro_size, milliseconds, *(f"{row.factors[name]:.2f}" for name in names)))
    head = ("model", "GPUs", "micro-batch", "float32: ms", *names)
    caption = "An update of batch 8192 with float32 sums, and the others' time over it, no GPU idle."
    return Table("wires", caption, head, tuple(rows))


def runs_table(runs: Iterable[tuple[str, int, RunSeconds]]) -> Table:
    """Return the parts of the time of whole runs, by title and number of GPUs."""
    head = ("run", "GPUs", "whole, min", "training", "evaluation", "start-up", "conversion")
    rows = []
    for title, ranks, seconds in runs:
        parts = (seconds.training, seconds.evaluation, seconds.start, seconds.conversion)
        shares = (f"{100 * part / seconds.total:.1f} %" for part in parts)
        rows.append((title, f"{ranks:,}", f"{seconds.total / 60:,.1f}", *shares))
    return Table("runs", "Of the time of a run, with no GPU idle in training.", head, tuple(rows))


def starts_table(measurements: Measurements, fits: Fits) -> Table:
    """Return the times of start-up and of sums of one number, for each engine."""
    head = ("over", "ranks", "all connected, s", "model", "launcher ended, s", "a tiny sum, ms", "with a new name, ms")
    tiny = {(row.controller, row.ranks, row.kind): row.seconds for row in measurements.allreduces if row.length == 1}
    rows = []
    for start in measurements.startups:
        sums = (1000 * tiny[start.controller, start.ranks, kind] for kind in ("known", "new"))
        slow = max(1.0, start.ranks / measurements.cores)
        fitted = fits.starts[start.controller]
        rows.append(
            (
                _ENGINES[start.controller],
                str(start.ranks),
                f"{start.met:.1f}",
                f"{fitted.alone * slow + fitted.join * (start.ranks - 1):.1f}",
                f"{start.whole:.1f}",
                *(f"{each:.2f}" for each in sums),
            )
        )
    caption = (
        f"Start-up and tiny sums: {measurements.machine}, {measurements.date}; "
        f"other programs had {100 * measurements.others:.0f} % of the cores' time."
    )
    return Table("starts", caption, head, tuple(rows))


def sums_table(measurements: Measurements, fits: Fits) -> Table:
    """Return measured and modelled sums, a row for each engine and size."""
    links = "; ".join(
        f"{_ENGINES[controller]} {1e6 * machine.coordination.hop:.0f} us a hop, {machine.link.bandwidth / 1e9:.2g} GB/s"
        for controller, machine in fits.machines.items()
    )
    residuals = [row for controller in fits.machines for row in fits.sums[controller]]
    return _beside("sums", f"Sums, ms. Fitted: {links}.", residuals)


def steps_table(fits: Fits) -> Table:
    """Return measured and modelled updates, a row for each engine and subject."""
    paces = "; ".join(
        f"width {width:g} {1 / pace.sample:,.0f} images/s a core, {1000 * pace.fixed:.0f} ms an update"
        for width, pace in fits.paces.items()
    )
    return _beside("steps", f"Updates, ms. Fitted: {paces}.", fits.steps)


def _beside(key: str, caption: str, residuals: Sequence[Residual]) -> Table:
    """Return measured and modelled milliseconds, a row for each subject, columns by ranks."""
    counts = sorted({row.ranks for row in residuals})
    columns = [(count, next(row.is_fitted for row in residuals if row.ranks == count)) for count in counts]
    head = ["over, what"]
    for count, is_fitted in columns:
        head += [f"{count}: ms", "model" if is_fitted else "predicted"]
    rows = []
    for what in dict.fromkeys(row.what for row in residuals):
        of = {row.ranks: row for row in residuals if row.what == what}
        cells = [
            (_milliseconds(of[count].measured), _milliseconds(of[count].modelled)) if count in of else ("", "")
            for count in counts
        ]
        rows.append((what, *(cell for pair in cells for cell in pair)))
    return Table(key, caption, tuple(head), tuple(rows))


def _milliseconds(seconds: float) -> str:
    value = 1000 * seconds
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def published_table(found: Iterable[Check], fabric: Fabric) -> Table:
    """Return published and modelled efficiencies, and the parameter fitted to each."""
    head = ("network", "over", "published", "model, network alone", "model, with jitter", "fitted to this row")
    named = {
        "jitter": f"jitter: {100 * fabric.jitter:.1f} %",
        "TCP's share": f"TCP's share: {100 * fabric.tcp_share:.0f} %",
    }
    rows = tuple(
        (
            check.name,
            check.over,
            f"{100 * check.published:.3g} %",
            f"{100 * check.network_alone:.1f} %",
            f"{100 * check.with_jitter:.1f} %",
            named.get(check.fitted, "nothing: predicted"),
        )
        for check in found
    )
    return Table("published", "Efficiency over one GPU, as published and by the model.", head, rows)
