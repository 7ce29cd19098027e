"""A batch script for one run, and how its global batch is shared out."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dist_train.config import Config
from dist_train.config.loading import shipped_folder
from dist_train.data.plan import BatchPlan
from dist_train.outcome import UsageError

_GPUS = re.compile(r"--(?:gpus-per-node|gres)=(?:gpu:)?(?:[A-Za-z][\w.-]*:)?(\d+)")


@dataclass(frozen=True)
class Submission:
    """What is to run and what is asked of Slurm; paths are absolute, `nodes` is a number or a range (1-2)."""

    root: Path
    config_file: Path
    overrides: tuple[str, ...]
    run_directory: Path
    name: str
    nodes: str = "1"
    ranks_per_node: int | None = None
    time: str | None = None
    partition: str | None = None
    options: tuple[str, ...] = ()

    @property
    def log(self) -> Path:
        """Where the job writes to; Slurm puts its id for %j."""
        return self.run_directory / "slurm-%j.log"

    @property
    def ranks(self) -> int | None:
        """The most ranks there can be; None where it is the nodes' GPUs that decide."""
        each = self.ranks_per_node or _gpus(self.options)
        return None if each is None else each * int(self.nodes.split("-")[-1])


def project_root() -> Path:
    """Return the folder of the launch and batch scripts.

    Raises:
        UsageError: they have been removed.
    """
    root = shipped_folder()
    if not (root / "slurm" / "prologue.sh").is_file():
        raise UsageError(
            f"there are no batch scripts at {root / 'slurm'}: install dist_train again", code="scripts-missing"
        )
    return root


def write_script(submission: Submission) -> str:
    """Return the text of the batch script."""
    requests = [
        f"--job-name={submission.name}",
        f"--nodes={submission.nodes}",
        *_resources(submission),
        *([f"--time={submission.time}"] if submission.time else []),
        *([f"--partition={submission.partition}"] if submission.partition else []),
        "--requeue",
        "--signal=B:USR1@120",
        "--open-mode=append",
        f"--output={submission.log}",
        *submission.options,
    ]
    run = ["train", str(submission.config_file), *submission.overrides, "--run-dir", str(submission.run_directory)]
    ranks = submission.ranks_per_node
    return "\n".join(
        (
            "#!/usr/bin/env bash",
            *(f"#SBATCH {_quoted(request)}" for request in requests),
            "set -euo pipefail",
            f"root={shlex.quote(str(submission.root))}",
            *([f"export RANKS_PER_NODE={ranks}"] if ranks else []),
            '. "$root/slurm/prologue.sh"',
            f"run_in_job {shlex.join(run)}",
            "",
        )
    )


def describe_batch(config: Config, ranks: int | None) -> tuple[str, ...]:
    """Return, in lines, how the global batch is cut and dealt out.

    Raises:
        UsageError: so many ranks cannot share it.
    """
    size, micro_size = config.batch.global_size, config.batch.micro_size
    if micro_size == "auto":
        who = "ranks" if ranks is None else f"{ranks:,} ranks"
        return (
            f"global batch {size:,} = {who} x micro-batches of a rank x samples of a micro-batch",
            "micro-batch    decided on the node when the run begins, then kept: the largest that fits its memory, at "
            "most a rank's even share",
            *((_dealt(0, None),) if ranks is None else ()),
        )
    plan = BatchPlan(size, micro_size)
    count = len(plan.micro_batches)
    if config.model.norm == "sync" and ranks:
        plan.slices(0, ranks)
    last = plan.micro_batches[-1].size
    shorter = "" if last == micro_size else f", the last of {last:,}"
    return (f"global batch {size:,} = {count:,} micro-batches of {micro_size:,}{shorter}", _dealt(count, ranks))


def _dealt(count: int, ranks: int | None) -> str:
    if ranks is None:
        return "dealt out to one rank for each GPU of the nodes (without GPUs: one a node)"
    fewest, most = count // ranks, -(-count // ranks)
    each = f"{most:,}" if fewest == most else f"{fewest:,} or {most:,}"
    idle = f"; {ranks - count:,} ranks have nothing to do" if ranks > count else ""
    return f"{ranks:,} ranks x {each} micro-batches a step{idle}"


def _resources(submission: Submission) -> list[str]:
    """Return whole nodes, unless the user's options say what part of them."""
    each = submission.ranks_per_node
    if _gpus(submission.options) is not None:
        return [f"--ntasks-per-node={each or _gpus(submission.options)}"]
    if any(option.startswith(("--ntasks", "-n", "--exclusive", "--gpus", "-G")) for option in submission.options):
        return []
    # A job with whole nodes has all of their GPUs: their number and names need not be given.
    return ["--exclusive", "--mem=0"]


def _gpus(options: Sequence[str]) -> int | None:
    matches = (_GPUS.fullmatch(option) for option in options)
    return next((int(match[1]) for match in matches if match and int(match[1])), None)


def _quoted(option: str) -> str:
    return option if re.fullmatch(r"[\w@%+=:,./-]+", option) else '"' + option.replace('"', '\\"') + '"'
