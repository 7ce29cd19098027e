"""What a study has measured once its runs have finished, as commands."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from dist_train.study.planned_runs import PlannedRun
from dist_train.study.study_file import Analysis, Interpolation, Sharpness, Study


def analysis_commands(study: Study, runs: Sequence[PlannedRun]) -> Iterator[tuple[str, ...]]:
    """Yield the arguments of `dist-train` for each measurement of `runs`, those that have finished.

    A variant with a grid stands for all its variants; `interpolate` takes those of one variant with those of the other.
    """
    for analysis in study.analyse:
        command = ("sharpness",) if isinstance(analysis, Sharpness) else ("landscape", analysis.kind)
        for subjects in _subjects(study, analysis, runs):
            yield (*command, *(str(run.directory) for run in subjects), *_options(analysis))


def _subjects(study: Study, analysis: Analysis, runs: Sequence[PlannedRun]) -> Iterator[tuple[PlannedRun, ...]]:
    chosen = [run for run in runs if not analysis.seeds or run.seed in analysis.seeds]
    if isinstance(analysis, Interpolation):
        first, second = ([run for run in chosen if run.family == variant] for variant in analysis.between)
        yield from ((one, other) for one in first for other in second if one.seed == other.seed)
    else:
        yield from ((run,) for run in chosen if run.family in (analysis.variants or study.variants))


def _options(analysis: Analysis) -> Iterator[str]:
    for name, value in analysis.options.items():
        if value is False:
            continue
        yield f"--{name}"
        if isinstance(value, list):
            yield from map(str, value)
        elif value is not True:
            yield str(value)
