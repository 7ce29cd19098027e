"""Writes a study that confirms a search: each variant with its best trial's settings, on fresh seeds.

dist-train sweep STUDY --best | python -m benchmarks.confirm_study STUDY --seeds 100 101 -o CONFIRM.yaml
`--variants sb lb` selects variants; contrasts and analyses of other variants are left out.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from dist_train.outcome import UsageError
from dist_train.sweep.study_file import load_study


def confirming(
    study: Path, best: Iterable[str], seeds: Sequence[int], output: Path, chosen: Sequence[str] = ()
) -> dict[str, Any]:
    """Return the content of the study file `output`; `best` are the lines of `dist-train sweep --best`.

    `chosen` are the variants to confirm; empty: all.

    Raises:
        UsageError: a seed was used in the search, or a variant is unknown or has no finished trial.
    """
    searched, written = load_study(study), yaml.safe_load(study.read_text(encoding="utf-8"))
    names = tuple(chosen) or tuple(searched.variants)
    if unknown := [name for name in names if name not in searched.variants]:
        raise UsageError(f"--variants: {study} has no variant {unknown[0]}", code="option-choice")
    trials = {fields["variant"]: fields["settings"] for fields in map(json.loads, best)}
    if used := set(seeds) & set(searched.seeds):
        raise UsageError(f"--seeds: {min(used)} was used in the search; choose fresh seeds", code="option-choice")
    if missing := [name for name in names if name not in trials]:
        raise UsageError(f"{missing[0]} has no finished trial: finish the search first", code="option-choice")
    written.pop("search")
    variants = {
        name: {
            "title": searched.variants[name].title or name,
            "settings": {**searched.settings_of(name), **trials[name]},
        }
        for name in names
    }
    base = os.path.relpath((study.parent / searched.base).resolve(), output.parent.resolve())
    name = f"{searched.name}-confirm"
    return {
        **written,
        "name": name,
        "base": base,
        "seeds": list(seeds),
        "settings": {},
        "variants": variants,
        "analyse": [part for part in written.get("analyse", []) if set(part.get("between", names)) <= set(names)],
        "contrasts": list(_contrasts_of(written.get("contrasts", []), names)),
    }


def _contrasts_of(contrasts: Iterable[dict[str, Any]], names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield the contrasts with a reference in `names`, restricted to variants in `names`."""
    for contrast in contrasts:
        variants = [name for name in contrast["variants"] if name in names]
        if variants and contrast["against"] in names:
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
    except UsageError as error:
        print(error, file=sys.stderr)
        return 2
    given.output.parent.mkdir(parents=True, exist_ok=True)
    given.output.write_text(yaml.safe_dump(study, sort_keys=False), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
