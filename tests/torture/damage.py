"""Damages files of a run, and finds complete checkpoints without the program's own code."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from random import Random


def whole_steps(run: Path) -> list[int]:
    """Return the steps of the checkpoints whose bytes match their record, ascending."""
    return sorted(int(path.stem.removeprefix("step-")) for path in _checkpoints(run) if _is_whole(path))


def _truncate(path: Path, random: Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: random.randrange(len(content))])


def _flip(path: Path, random: Random) -> None:
    content = bytearray(path.read_bytes())
    content[random.randrange(len(content))] ^= 1 << random.randrange(8)
    path.write_bytes(content)


def _empty(path: Path, random: Random) -> None:
    path.write_bytes(b"")


DAMAGES: tuple[Callable[[Path, Random], None], ...] = (_truncate, _flip, _empty)


def damage_checkpoint(run: Path, random: Random) -> bool:
    """Damage the newest complete checkpoint or its record, if an older one is complete; return whether it did."""
    steps = whole_steps(run)
    if len(steps) < 2:
        return False
    newest = _path(run, steps[-1])
    kind = random.choice(("bytes", "bytes", "record", "swapped"))
    if kind == "bytes":
        random.choice(DAMAGES)(newest, random)
    elif kind == "record":
        random.choice((_truncate, _empty))(newest.with_suffix(".json"), random)
    else:
        other = _path(run, random.choice(steps[:-1]))
        newest_bytes, other_bytes = newest.read_bytes(), other.read_bytes()
        newest.write_bytes(other_bytes)
        # Swapping the only two checkpoints would leave none.
        if len(steps) > 2:
            other.write_bytes(newest_bytes)
    return True


def damage_every_checkpoint(run: Path, random: Random) -> bool:
    """Damage all checkpoints; return whether there were any."""
    paths = [_path(run, step) for step in whole_steps(run)]
    for path in paths:
        random.choice(DAMAGES)(path, random)
    return bool(paths)


def damage_cache(folder: Path, random: Random) -> bool:
    """Damage a file of the decoded data; return whether there was one."""
    files = sorted(path for path in folder.rglob("*") if path.suffix in (".npy", ".json"))
    if not files:
        return False
    images = [path for path in files if path.name.endswith(".images.npy")]
    if len(images) > 1 and random.random() < 0.3:
        first, second = random.sample(images, 2)
        first_bytes = first.read_bytes()
        first.write_bytes(second.read_bytes())
        second.write_bytes(first_bytes)
    else:
        random.choice(DAMAGES)(random.choice(files), random)
    return True


def _checkpoints(run: Path) -> list[Path]:
    return sorted((run / "checkpoints").glob("step-*.pt"))


def _path(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}.pt"


def _is_whole(path: Path) -> bool:
    try:
        record = json.loads(path.with_suffix(".json").read_bytes())
        return bool(hashlib.sha256(path.read_bytes()).hexdigest() == record["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        return False
