"""`dist-train`, except that one rank has other code, settings or data: DIFFERENCE RANK ARGUMENTS..."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path

import dist_train

_ROOT = Path(dist_train.__file__).parents[1]


def main() -> None:
    """Replace this process by `dist-train ARGUMENTS`, with the difference if this is the rank."""
    difference, differing_rank, *arguments = sys.argv[1:]
    rank = os.environ.get("HOROVOD_RANK", os.environ.get("OMPI_COMM_WORLD_RANK"))
    program = [sys.executable, "-m", "dist_train"]
    if rank != differing_rank:
        os.execv(program[0], [*program, *arguments])
    if difference == "settings":
        os.execv(program[0], [*program, *arguments, "optimizer.momentum=0.123"])
    folder = Path(tempfile.mkdtemp(dir=os.environ["TORTURE_FOLDER"]))
    if difference == "data":
        # As on another node: the same path, but another file.
        data = Path(os.environ["TORTURE_DATA"])
        other = os.environ["TORTURE_OTHER_DATA"]
        os.execvp(
            "unshare",
            ["unshare", "--mount", "sh", "-c", f'mount --bind {other} {data} && exec "$@"', "sh", *program, *arguments],
        )
    assert difference == "code"
    shutil.copytree(_ROOT / "dist_train", folder / "dist_train", ignore=shutil.ignore_patterns("__pycache__"))
    changed = folder / "dist_train" / "optim" / "noise.py"
    changed.write_text(changed.read_text() + "\n# changed\n")
    os.chdir(folder)
    os.execv(program[0], [*program, *arguments])


if __name__ == "__main__":
    main()
