"""Jobs get the requested resources or are refused at once: GPUs of each node, and random options of sbatch."""

from __future__ import annotations

import re
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from dist_train.outcome import ExitCode
from tests.cluster.cluster import ROOT, Cluster

pytestmark = [pytest.mark.ranks, pytest.mark.services]
LAYOUT = "layout"
_LINE = re.compile(r"(\S+) (\d+) (\S*)")


def layout_recording_variables(folder: Path) -> dict[str, str]:
    """Return the variables of jobs whose ranks only write their node, rank and GPUs to the file `LAYOUT`."""
    python = folder / "python"
    python.write_text(
        f"""#!/bin/bash
if [[ ${{3:-}} == train ]]; then
    echo "$(uname -n) ${{OMPI_COMM_WORLD_RANK:-$SLURM_PROCID}} ${{CUDA_VISIBLE_DEVICES:-}}" >>{folder / LAYOUT}
    exit 0
fi
exec {sys.executable} "$@"
"""
    )
    python.chmod(0o755)
    mpirun = Path(sys.executable).with_name("mpirun")
    if mpirun.exists():
        (folder / "mpirun").symlink_to(mpirun)
    variables = {"CONFIG": str(ROOT / "configs/smoke.yaml"), "OVERRIDES": "run.device=cpu", "PYTHONPATH": str(ROOT)}
    # Without a status the job fails, which these tests ignore.
    return {**variables, "DIST_TRAIN_PYTHON": str(python), "MAX_REQUEUES": "0", "PREFLIGHT": "0"}


def layout(folder: Path) -> list[tuple[str, int, tuple[str, ...]]]:
    """Return node, rank and GPUs of the ranks that ran."""
    text = (folder / LAYOUT).read_text() if (folder / LAYOUT).exists() else ""
    return sorted((node, int(rank), tuple(filter(None, gpus.split(",")))) for node, rank, gpus in _LINE.findall(text))


@pytest.mark.lengthy
@pytest.mark.parametrize("launcher", ["srun", "mpirun"])
def test_each_rank_has_the_gpus_of_its_own_node(launcher: str, cluster: Cluster, tmp_path: Path) -> None:
    # Another job has the first GPU of the batch host, so that GPU numbers differ between the nodes.
    wrap = ("--nodelist=node1", "--gpus-per-node=1", "--output=/dev/null", "--wrap=sleep 1000")
    other = cluster.run("sbatch", "--parsable", *wrap, folder=tmp_path).stdout.strip()
    try:
        options = ("--nodes=2", "--ntasks=4", "--ntasks-per-node=2", "--gpus-per-node=2", "--cpus-per-task=1")
        job = cluster.sbatch(tmp_path, "sb_128.sh", *options, LAUNCHER=launcher, **layout_recording_variables(tmp_path))
        ended = cluster.wait(job)
    finally:
        cluster.run("scancel", other, folder=tmp_path)
    found = layout(tmp_path)
    assert [(node, rank) for node, rank, _ in found] == [("node1", 0), ("node1", 1), ("node2", 2), ("node2", 3)], (
        ended.output
    )
    gpus = {node: visible for node, _, visible in found}
    assert all(visible == gpus[node] and len(visible) == 2 for node, _, visible in found)
    assert gpus["node1"] != gpus["node2"]


def test_batch_scripts_start_with_the_resources_that_they_request_themselves(cluster: Cluster, tmp_path: Path) -> None:
    alone, task, one = tmp_path / "sb_128", tmp_path / "sweep", tmp_path / "lb_8192"
    for folder in (alone, task, one):
        folder.mkdir()
    study = {**layout_recording_variables(task), "STUDY": str(ROOT / "studies/smoke.yaml")}
    jobs = [
        cluster.sbatch(alone, "sb_128.sh", **layout_recording_variables(alone)),
        cluster.sbatch(task, "sweep.sh", "--array=1", "--gpus-per-node=4", **study),
        cluster.sbatch(one, "lb_8192.sh", "--nodes=1", "--gres=gpu", **layout_recording_variables(one)),
    ]
    ended = [cluster.wait(job) for job in jobs]
    counts = [[(rank, len(gpus)) for _, rank, gpus in layout(folder)] for folder in (alone, task, one)]
    assert counts == [[(0, 1)], [(rank, 4) for rank in range(4)], [(0, 1)]], "".join(job.output for job in ended)


@dataclass(frozen=True)
class Request:
    """Options of sbatch; the ranks in total and the GPUs per node that they request (None: not requested)."""

    script: str
    options: tuple[str, ...]
    nodes: int
    tasks: int | None
    gpus: int | None


@st.composite
def requests(draw: st.DrawFn) -> Request:
    nodes = draw(st.integers(1, 2))
    script = draw(st.sampled_from(["lb_8192.sh", "sb_128.sh"]))
    options = [f"--nodes={nodes}"]
    gpus: int | None = None
    kind = draw(st.sampled_from(["none", "--gpus-per-node", "--gres", "--gpus", "--gpus-per-task", "--ntasks-per-gpu"]))
    count = draw(st.integers(1, 3))
    tasks: int | None = None
    if kind == "none":
        if script == "sb_128.sh":
            options.append("--gpus-per-node=0")
        gpus = None if script == "lb_8192.sh" else 0
    elif kind == "--gres":
        options += [f"--gres=gpu:{count}", *(["--gpus-per-node=0"] if script == "sb_128.sh" else [])]
        gpus = count
    elif kind == "--gpus-per-node":
        options.append(f"--gpus-per-node={count}")
        gpus = count
    else:
        options.append(f"{kind}={count}")
    if draw(st.booleans()) or kind in ("--gpus-per-task",):
        tasks = draw(st.integers(1, 6))
        options.append(f"--ntasks={tasks}")
    if draw(st.booleans()):
        options.append(f"--cpus-per-task={draw(st.integers(1, 2))}")
    return Request(script, tuple(options), nodes, tasks, gpus)


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="layouts-") as name:
        yield Path(name)


@pytest.mark.lengthy
def test_random_requests_get_their_resources_or_are_refused(cluster: Cluster, folder: Path) -> None:
    counted: dict[str, int] = {"refused by sbatch": 0, "refused by the job": 0, "ran": 0}

    # Each job takes seconds: failing examples are not shrunk.
    @settings(max_examples=40, suppress_health_check=list(HealthCheck), phases=[Phase.generate])
    @given(requests())
    def submit(request: Request) -> None:
        job_folder = folder / str(time.time_ns())
        job_folder.mkdir()
        program = str(ROOT / "slurm" / request.script)
        command = ("sbatch", "--parsable", "--output=log", *request.options, program)
        submitted = cluster.run(*command, folder=job_folder, **layout_recording_variables(job_folder))
        if submitted.returncode:
            counted["refused by sbatch"] += 1
            return
        ended = cluster.wait(int(submitted.stdout))
        context = f"{request}\n{ended.output}"
        assert ended.restarts == 0, context
        found = layout(job_folder)
        if not found:
            counted["refused by the job"] += 1
            assert (ended.state, ended.code) == ("FAILED", ExitCode.USAGE), context
            assert ": error: " in ended.output, context
            return
        counted["ran"] += 1
        counts = {node: [rank for name, rank, _ in found if name == node] for node, _, _ in found}
        if request.gpus:
            assert {len(ranks) for ranks in counts.values()} == {request.gpus}, context
        # The scripts themselves request one task per node.
        if request.tasks and request.gpus is not None and request.tasks != len(counts):
            assert len(found) == request.tasks, context
        for node, _, visible in found:
            assert not visible or len(visible) >= len(counts[node]), context
        assert len(found) == len({rank for _, rank, _ in found}), context

    submit()
    print(counted)
