"""`dist-train`, but for one rank with other code, settings or data than the rest: WHAT RANK ARGUMENTS..."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path

import dist_train

_ROOT = Path(dist_train.__file__).parents[1]


def main() -> None:
    """Become `dist-train` with the arguments, changed where this is the odd rank."""
    what, odd, *arguments = sys.argv[1:]
    rank = os.environ.get("HOROVOD_RANK", os.environ.get("OMPI_COMM_WORLD_RANK"))
    program = [sys.executable, "-m", "dist_train"]
    if rank != odd:
        os.execv(program[0], [*program, *arguments])
    if what == "settings":
        os.execv(program[0], [*program, *arguments, "optimizer.momentum=0.123"])
    folder = Path(tempfile.mkdtemp(dir=os.environ["TORTURE_FOLDER"]))
    if what == "data":
        # As another node would have it: the same path, another file behind it.
        data = Path(os.environ["TORTURE_DATA"])
        other = os.environ["TORTURE_OTHER_DATA"]
        os.execvp(
            "unshare",
            ["unshare", "--mount", "sh", "-c", f'mount --bind {other} {data} && exec "$@"', "sh", *program, *arguments],
        )
    assert what == "code"
    shutil.copytree(_ROOT / "dist_train", folder / "dist_train", ignore=shutil.ignore_patterns("__pycache__"))
    changed = folder / "dist_train" / "optim" / "noise.py"
    changed.write_text(changed.read_text() + "\n# changed\n")
    os.chdir(folder)
    os.execv(program[0], [*program, *arguments])


if __name__ == "__main__":
    main()
