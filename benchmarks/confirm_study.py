"""Writes a study that confirms a search: each variant with its best trial's settings, on fresh seeds.

dist-train sweep STUDY --best | python -m benchmarks.confirm_study STUDY --seeds 100 101 -o CONFIRM.yaml
`--variants sb lb` selects variants; contrasts and analyses of other variants are left out. A combination of a grid
becomes a variant of its own. An analysis of some of the search's seeds is made of as many of the new ones.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from dist_train.config.loading import SHIPPED
from dist_train.outcome import UsageError
from dist_train.sweep.planned_runs import plan_study, settings_from, variants_of
from dist_train.sweep.study_file import Search, load_study, overlaid


def confirming(
    study: Path, best: Iterable[str], seeds: Sequence[int], output: Path, chosen: Sequence[str] = ()
) -> dict[str, Any]:
    """Return the content of the study file `output`; `best` are the lines of `dist-train sweep --best`.

    `chosen` are the variants to confirm; empty: all. Each combination of a grid is a variant of its own.

    Raises:
        UsageError: `study` has no search or is `output`, `best` is not of this search, a seed is given twice or was
            used in the search, or a variant is unknown or has no finished trial.
    """
    searched, written = load_study(study), yaml.safe_load(study.read_text(encoding="utf-8"))
    if searched.search is None:
        raise _refused(f"{study} has no search to confirm")
    if output.resolve() == study.resolve():
        raise _refused(f"-o {output} is the study of the search; choose another file")
    if used := set(seeds) & set(searched.seeds):
        raise _refused(f"--seeds: {min(used)} was used in the search; choose fresh seeds")
    if len(set(seeds)) < len(seeds):
        raise _refused("--seeds: a seed is given twice")
    every = {each.variant: each for each in variants_of(searched)}
    if unknown := set(chosen) - {*every, *searched.variants}:
        raise _refused(f"--variants: {study} has no variant {min(unknown)}")
    kept = {name: each for name, each in every.items() if not chosen or {name, each.family} & set(chosen)}
    trials = dict(_trials(searched.search, best))
    if foreign := trials.keys() - every.keys():
        raise _refused(f"--best is of another study: {study} has no variant {min(foreign)}")
    if missing := [name for name in kept if name not in trials]:
        raise _refused(f"{missing[0]} has no finished trial: finish the search, or leave it out by --variants")
    families: dict[str, list[str]] = {}
    for name, each in kept.items():
        families.setdefault(each.family, []).append(name)
    chosen_settings = {name: overlaid(each.settings, trials[name]) for name, each in kept.items()}
    if output.parent.resolve() != study.parent.resolve():
        folder = study.parent.absolute()
        chosen_settings = {name: dict(settings_from(folder, each)) for name, each in chosen_settings.items()}
    base = searched.base
    if not base.startswith(SHIPPED):
        base = os.path.relpath((study.parent / base).resolve(), output.parent.resolve())
    return {
        **{key: value for key, value in written.items() if key not in ("search", "grid")},
        "name": f"{searched.name}-confirm",
        "base": base,
        "seeds": list(seeds),
        "settings": {},
        "variants": {
            name: {
                **({"title": each.title} if each.has_title else {}),
                # copies, for which YAML needs no anchors
                "settings": copy.deepcopy(chosen_settings[name]),
            }
            for name, each in kept.items()
        },
        "analyse": list(_analyses_of(written.get("analyse", []), families, seeds)),
        "contrasts": list(_contrasts_of(written.get("contrasts", []), families)),
    }


def _refused(wrong: str) -> UsageError:
    return UsageError(wrong, code="option-choice")


def _trials(search: Search, best: Iterable[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield variant and settings of the lines of --best. Raises UsageError if they are not, or of another search."""
    for line in best:
        try:
            fields = json.loads(line)
            variant, settings = fields["variant"], fields["settings"]
            is_judged = search.objective in fields or "objective" not in search.model_fields_set
            is_of_search = is_judged and settings.keys() == search.space.keys()
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise _refused(f"the input is not what `dist-train sweep --best` prints: {line.strip()!r}") from error
        if not is_of_search:
            raise _refused(f"--best is of a search with another objective or space: {line.strip()}")
        yield variant, settings


def _analyses_of(
    analyses: Iterable[dict[str, Any]], families: Mapping[str, Sequence[str]], seeds: Sequence[int]
) -> Iterator[dict[str, Any]]:
    """Yield the analyses, restricted to variants of `families`, and of fewer seeds for as many of `seeds`."""
    for part in analyses:
        fewer = {"seeds": list(seeds[: len(part["seeds"])])} if part.get("seeds") else {}
        if part["kind"] == "interpolate":
            first, second = (families.get(name, ()) for name in part["between"])
            pairs = itertools.combinations(first, 2) if first == second else itertools.product(first, second)
            yield from ({**part, **fewer, "between": list(pair)} for pair in pairs)
        elif not part.get("variants"):
            yield {**part, **fewer}
        elif names := [name for family in part["variants"] for name in families.get(family, ())]:
            yield {**part, **fewer, "variants": names}


def _contrasts_of(
    contrasts: Iterable[dict[str, Any]], families: Mapping[str, Sequence[str]]
) -> Iterator[dict[str, Any]]:
    """Yield the contrasts with a reference in `families`, restricted to other variants in `families`."""
    for contrast in contrasts:
        others = (family for family in contrast["variants"] if family != contrast["against"])
        variants = [name for family in others for name in families.get(family, ())]
        if variants and contrast["against"] in families:
            yield {**contrast, "variants": variants}


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the confirming study."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.confirm_study", description=__doc__.splitlines()[0])
    parser.add_argument("study", type=Path, help="the study of the search")
    parser.add_argument("--seeds", type=int, nargs="+", required=True, help="fresh seeds")
    parser.add_argument("--variants", nargs="+", default=[], metavar="NAME", help="variants to confirm (default: all)")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE")
    given = parser.parse_args(arguments)
    try:
        study = confirming(given.study, sys.stdin, given.seeds, given.output, given.variants)
        given.output.parent.mkdir(parents=True, exist_ok=True)
        given.output.write_text(yaml.safe_dump(study, sort_keys=False), encoding="utf-8")
        plan_study(given.output)
    except UsageError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
