"""Runs grouped into variants (equal settings, different seeds), and variants into panels (equal global batch)."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TypeAlias

import yaml

from dist_train.config import Config
from dist_train.config.loading import flat_settings, parse_yaml
from dist_train.config.resuming import may_change
from dist_train.report.measures import Measure, Summary, summary
from dist_train.report.stored_run import PLUGIN, StoredRun
from dist_train.rundir.records import EvaluationRecord, TrainRecord

_MATTERS = ("data.root", "evaluation.every_epochs", "evaluation.train_samples", "early_stopping", "run.max_steps")
"""Settings that a resume may change although they can change a run's results."""

DEFAULTS: Mapping[str, object] = dict(flat_settings(Config().model_dump(mode="json")))
_USUAL_NOISE = {path: value for path, value in DEFAULTS.items() if path.startswith("noise.")}
"""The noise's default settings. Settings that only another kind of schedule has are not among them."""

ABSENT = "-"
"""Shown as the value of a setting that there is not; null is a value."""
_MOST_WORDS = 8
_SECTIONS = Counter(path.rpartition(".")[2] for path in DEFAULTS)
"""In how many sections each setting's own name occurs."""


@dataclass(frozen=True)
class Change:
    """A setting that differs from the baseline's."""

    path: str
    base: object
    value: object


@dataclass(frozen=True)
class Variant:
    """Runs that differ only in their seeds. `label` says how it differs from the baseline; it decides the `colour`.

    `title` is the label after the short name of its panel.
    """

    name: str
    label: str
    title: str
    runs: tuple[StoredRun, ...]
    changes: tuple[Change, ...] = ()
    colour: int = 0
    is_base: bool = False
    repeated: Mapping[str, str] = field(default_factory=dict)
    """Maps the name of each duplicate among `runs` to the name of the run that counts."""

    @property
    def counted(self) -> tuple[StoredRun, ...]:
        """Return the runs that count, each seed once: the finished ones, or if there are none, the started ones."""
        finished = tuple(run for run in self.distinct if run.is_finished)
        return finished or tuple(run for run in self.distinct if run.evaluations or run.train)

    @property
    def has_noise(self) -> bool:
        """Whether it trains with noise, as far as is known."""
        return not _is_without_noise(_settings(self.runs))

    @property
    def is_provisional(self) -> bool:
        """Whether its numbers come from unfinished runs."""
        return any(not (run.is_finished or run.is_diverged) for run in self.counted)

    @property
    def distinct(self) -> tuple[StoredRun, ...]:
        """Return the planned runs, each seed once."""
        return tuple(run for run in self.runs if run.name not in self.repeated)

    def has_data_of(self, other: Variant) -> bool:
        """Whether both are of one data set, as far as is known."""
        return len({run.data for run in (*self.runs, *other.runs)} - {""}) < 2

    def lacking(self, measure: Measure, base: Variant | None = None) -> list[list[StoredRun]]:
        """Return for each run, or with `base` for each pair of runs with equal seeds, those that lack `measure`."""
        groups = [[run] for run in self.distinct]
        if base is not None:
            groups = [[first, run] for first in base.distinct for run in self.distinct if first.seed == run.seed]
        have = {run.name for each in (self, base) if each is not None for run, _ in each.measured(measure)}
        return [[run for run in runs if run.name not in have] for runs in groups]

    def summary(self, measure: Measure) -> Summary | None:
        """Return the mean and the spread of `measure` over the counted runs that have it."""
        found = self.measured(measure)
        return summary([value for _, value in found], sum(measure.is_bound(run) for run, _ in found))

    def pairs(self, base: Variant, measure: Measure) -> list[tuple[tuple[StoredRun, float], tuple[StoredRun, float]]]:
        """Return pairs, of `base` and this variant, of runs with equal seeds and their values, if both have one.

        There are none between different data sets.
        """
        if not self.has_data_of(base):
            return []
        before = {run.seed: (run, value) for run, value in base.measured(measure) if run.seed is not None}
        return [(before[run.seed], (run, value)) for run, value in self.measured(measure) if run.seed in before]

    def measured(self, measure: Measure) -> list[tuple[StoredRun, float]]:
        """Return the counted runs that have a finite value of `measure`, and the diverged ones, if they guess."""
        counted = {run.name: run for run in self.counted if not run.is_diverged}
        counted |= {run.name: run for run in self.distinct if measure.is_guess(run)}
        found = ((run, measure.take(run)) for run in counted.values())
        return [(run, value) for run, value in found if value is not None and math.isfinite(value)]


@dataclass(frozen=True)
class Panel:
    """The variants of one global batch size; the first is the baseline, if there is one."""

    title: str
    short: str
    batch: int | None
    variants: tuple[Variant, ...]

    @property
    def base(self) -> Variant | None:
        """Return the variant that the others are compared with."""
        return next((variant for variant in self.variants if variant.is_base), None)


def counted_runs(panels: Sequence[Panel]) -> list[StoredRun]:
    """Return the counted runs of all variants of `panels`."""
    return [run for panel in panels for variant in panel.variants for run in variant.counted]


def panels_of(runs: Sequence[StoredRun]) -> tuple[Panel, ...]:
    """Return the runs in panels by global batch size, ascending; two panels are called SB and LB.

    Equal labels have equal colours in all panels; baselines have the first colour. A baseline's changes are relative
    to the first panel's baseline.
    """
    groups = _groups(runs)
    sizes = {name: next((run.batch for run in group if run.batch is not None), None) for name, group in groups.items()}
    batches = sorted(set(sizes.values()), key=lambda size: (size is None, size or 0))
    shorts = {size: "batch unknown" if size is None else f"batch {size:,}" for size in batches}
    if len(known := [size for size in batches if size is not None]) == 2:
        shorts |= dict(zip(known, ("SB", "LB"), strict=True))
    colours: dict[str, int] = {}
    first: Mapping[str, object] | None = None
    panels: list[Panel] = []
    for batch in batches:
        members = {name: group for name, group in groups.items() if sizes[name] == batch}
        base = _choose_base(members)
        base_settings = None if base is None else _settings(members[base])
        if not panels:
            first = base_settings
        variants = []
        for name, label in _labels(members, base, shorts[batch]).items():
            settings = _settings(members[name])
            reference = first if name == base else base_settings
            changes = changes_between(reference, settings) if reference and settings else ()
            colour = 0 if name == base else colours.setdefault(label, len(colours) + 1)
            runs, repeated = tuple(members[name]), duplicates_of(members[name])
            full = f"{shorts[batch]}, {label}"
            variants.append(Variant(name, label, full, runs, changes, colour, name == base, repeated))
        title = short = shorts[batch]
        if short in ("SB", "LB"):
            title = f"{short}, batch {batch:,}"
        panels.append(Panel(title, short, batch, tuple(variants)))
    return tuple(panels)


def duplicates_of(runs: Sequence[StoredRun]) -> dict[str, str]:
    """Map each run that repeats another's settings and seed to the name of the run that counts.

    That is the finished one, otherwise the one with more steps, then with more analyses, then the first by name.
    """
    best: dict[tuple[tuple[tuple[str, str], ...], int], _Alike] = {}
    repeated = {}
    for run in sorted(runs, key=_preference):
        if run.seed is not None and run.settings:
            kept = _of_one_code(run, best.setdefault((_effective_settings(run), run.seed), []))
            if kept is not run:
                repeated[run.name] = kept.name
    return repeated


def _preference(run: StoredRun) -> tuple[bool, int, int, str]:
    records: tuple[TrainRecord | EvaluationRecord, ...] = (*run.train, *run.evaluations)
    steps = max((record.step for record in records), default=0)
    analyses = len(run.analyses.landscapes) + len(run.analyses.sharpness)
    return not run.is_finished, -steps, -analyses, run.name


def _effective_settings(run: StoredRun) -> tuple[tuple[str, str], ...]:
    """Return the settings that decide the results of `run`, without the seed; floats with all their digits."""
    return tuple(
        sorted(
            (path, repr(value))
            for path, value in _settings_of(run).items()
            if not (path.startswith(PLUGIN) or _has_no_effect(path))
        )
    )


_Alike: TypeAlias = list[tuple[StoredRun, dict[str, str]]]


def _of_one_code(run: StoredRun, alike: _Alike) -> StoredRun:
    """Return the first run of a group in `alike` none of whose runs has another plug-in's file than `run`, or `run`.

    `alike` has the digests that each group's runs have recorded. A file that only one of them has may have been
    imported in that process for something else.
    """
    for first, known in alike:
        if all(run.plugins.get(name, digest) == digest for name, digest in known.items()):
            known.update(run.plugins)
            return first
    alike.append((run, dict(run.plugins)))
    return run


def _settings_of(run: StoredRun) -> Mapping[str, object]:
    """Return the settings of `run`, with the code of its plug-ins, and data.root's name only if the data are one's own.

    Settings that its version did not have yet are at their defaults, as if it were resumed.
    """
    if not run.settings:
        return {}
    newer = {path: value for path, value in DEFAULTS.items() if path not in run.settings}
    return {**run.settings, **newer, "data.root": run.data_root, **run.plugins}


def _has_no_effect(path: str) -> bool:
    """Whether the setting does not distinguish variants: it does not change a run's results, or it is the seed."""
    return path in ("run.seed", "precision.threads") or (may_change(path) and not path.startswith(_MATTERS))


def changes_between(base: Mapping[str, object], settings: Mapping[str, object]) -> tuple[Change, ...]:
    """Return the settings that differ and can change a run's results; settings of a noise that is off do not count."""
    before, after = _without_unused_noise(base), _without_unused_noise(settings)
    changes = []
    for path in dict.fromkeys((*after, *before)):
        old = before.get(path)
        new = after.get(path, None if old is None else ABSENT)
        # If noise is added, mention only its amplitude and what is not the default.
        is_usual = path.startswith("noise.") and path not in before and new == _USUAL_NOISE.get(path)
        # That only one of them has a plug-in is seen from the setting that names it.
        is_implied = path.startswith(PLUGIN) and not (path in before and path in after)
        if old != new and not (_has_no_effect(path) or is_implied) and (not is_usual or path == "noise.amplitude"):
            changes.append(Change(path, old, new))
    return tuple(changes)


def _without_unused_noise(settings: Mapping[str, object]) -> dict[str, object]:
    """Return `settings`, without the other noise settings if there is no noise."""
    kept = "noise." if not _is_without_noise(settings) else "noise.method"
    return {path: value for path, value in settings.items() if not path.startswith("noise.") or path.startswith(kept)}


def shown(value: object) -> str:
    """Return the value of a setting in short YAML; numbers have the digits that distinguish them."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, Mapping):
        return " ".join(f"{name} {shown(inner)}" for name, inner in value.items())
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(shown, value)) + "]"
    if isinstance(value, str) and value != ABSENT:
        with suppress(yaml.YAMLError):
            if parse_yaml(value) == value:
                return value
        return json.dumps(value, ensure_ascii=False)
    return short if isinstance(value, float) and float(short := f"{value:g}") == value else str(value)


def _groups(runs: Sequence[StoredRun]) -> dict[str, list[StoredRun]]:
    """Return the runs by variant: the study's variant if it names one, otherwise by equal settings."""
    groups: dict[str, list[StoredRun]] = {}
    firsts: dict[tuple[tuple[str, str], ...], _Alike] = {}
    for run in runs:
        name = run.name
        if run.planned and run.planned.variant:
            name = name.removesuffix(run.planned.name) + run.planned.variant
        elif run.settings:
            name = _of_one_code(run, firsts.setdefault(_effective_settings(run), [])).name
        groups.setdefault(name, []).append(run)
    return groups


def _settings(runs: Sequence[StoredRun]) -> Mapping[str, object]:
    return next((_settings_of(run) for run in runs if run.settings), {})


def _choose_base(members: Mapping[str, Sequence[StoredRun]]) -> str | None:
    """Return the first variant without noise, by its plan if no run has started, otherwise the first that has.

    That is never a trial of a search: its settings are as accidental as the others'.
    """

    def is_quiet(name: str) -> bool:
        if settings := _settings(members[name]):
            return _is_without_noise(settings)
        return any(run.planned and run.planned.resolved.get("noise.method") == "none" for run in members[name])

    candidates = [
        name for name, runs in members.items() if all(not run.planned or run.planned.trial is None for run in runs)
    ]
    started = (name for name in candidates if _settings(members[name]))
    return next(filter(is_quiet, candidates), next(started, None))


def _is_without_noise(settings: Mapping[str, object]) -> bool:
    return settings.get("noise.method") in (None, "none")


def _labels(members: Mapping[str, Sequence[StoredRun]], base: str | None, short: str) -> dict[str, str]:
    """Return the labels of the variants by name, the baseline first: the study's title, or what the variant changes.

    `short` is the panel's name, which is removed from titles.
    """
    labels = {}
    for name in sorted(members, key=lambda name: name != base):
        planned = next((run.planned for run in members[name] if run.planned), None)
        settings = _settings(members[name])
        words: list[str] = []
        # The panel's name stands before each label.
        if planned is not None and planned.is_titled and planned.title != short:
            words = [planned.title.removeprefix(f"{short}, ")]
        elif name == base and _is_without_noise(settings):
            words = ["baseline"]
        elif name != base and base is not None and settings and (reference := _settings(members[base])):
            changes = changes_between(reference, settings)
            words = [*_noise_in_words(settings, changes), *_others_in_words(changes)]
        fallback = planned.title if planned is not None and planned.title not in ("", short) else name
        labels[name] = ", ".join(words) if 0 < len(words) <= _MOST_WORDS else fallback
    every = list(labels.values())
    return {name: label if every.count(label) == 1 else f"{label} ({name})" for name, label in labels.items()}


def _others_in_words(changes: Sequence[Change]) -> Iterator[str]:
    for change in changes:
        if not change.path.startswith(("noise.", "model.norm_statistics", "batch.micro_size")):
            if change.path.startswith(PLUGIN):
                yield f"{change.path} {str(change.value)[:8]}"
                continue
            leaf = change.path.rpartition(".")[2]
            is_name = leaf in ("name", "kind") and change.value not in (None, "none", ABSENT)
            name = change.path if _SECTIONS[leaf] > 1 or leaf == "schedule" else leaf
            words = [] if is_name else [name.replace(".", " ").replace("_", " ")]
            yield " ".join([*words, shown(change.value)])


def _noise_in_words(settings: Mapping[str, object], changes: Sequence[Change]) -> Iterator[str]:
    """Yield what distinguishes this noise; defaults are left out."""
    if not any(change.path.startswith("noise.") for change in changes):
        return
    if _is_without_noise(settings):
        yield "no noise"
        return
    method = str(settings["noise.method"])
    kind = {"smoothout": settings.get("noise.distribution", "noise"), "sam": "SAM", "asam": "ASAM"}.get(method, method)
    # IVON determines the size of its noise itself.
    yield str(kind) if method == "ivon" else f"{kind} {shown(settings.get('noise.amplitude'))}"
    omitted = {"noise.method", "noise.amplitude", "noise.exclude"}
    omitted |= {"noise.distribution"} if method == "smoothout" else set()
    # SAM and ASAM have no choice of these.
    omitted |= {"noise.scale", "noise.sharing"} if method in ("sam", "asam") else set()
    schedule = [shown(value) for path, value in settings.items() if path.startswith("noise.schedule.")]
    for path, value in settings.items():
        if not path.startswith("noise.") or path in omitted or value == _USUAL_NOISE.get(path):
            continue
        if path == "noise.schedule.kind":
            yield " ".join(schedule).replace("_", "-")
        elif path in ("noise.distribution", "noise.scale", "noise.sharing"):
            yield str(value).replace("_", "-") + (" scale" if path == "noise.scale" else "")
        elif path == "noise.antithetic":
            yield "antithetic"
        elif not path.startswith("noise.schedule."):
            yield f"{path.removeprefix('noise.').replace('_', ' ')} {shown(value)}"
