"""Launches of the real program for tests: alone, by dist-train launch, torchrun, horovodrun with Gloo, or mpirun."""

from __future__ import annotations

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
import yaml

from dist_train.cli.main import main
from tests.waiting import PATIENCE, lines_of, wait_for, wait_for_lines

_BIN = Path(sys.executable).parent


@dataclass(frozen=True)
class LaunchResult:
    """The exit code of a launch and what it printed."""

    code: int
    output: str


_DIST_TRAIN = ("-m", "dist_train")


def command(ranks: int, controller: str, *arguments: str, program: Sequence[str] = _DIST_TRAIN) -> list[str]:
    """Return the command line that runs `dist-train ARGUMENTS`, or another program, on so many ranks."""
    program = [sys.executable, *program, *arguments]
    match controller:
        case "alone":
            assert ranks == 1
            return program
        case "torch":
            assert tuple(program[1:3]) == _DIST_TRAIN, "dist-train launch starts commands of ours"
            return [sys.executable, *_DIST_TRAIN, "launch", "-np", str(ranks), *arguments]
        case "torchrun":
            return [str(_BIN / "torchrun"), "--standalone", "--nproc-per-node", str(ranks), "--no-python", *program]
        case "gloo":
            launcher = [str(_BIN / "horovodrun"), "-np", str(ranks), "--gloo", "--network-interface", "lo"]
        case "mpi":
            launcher = ["mpirun", "-np", str(ranks), "--bind-to", "none", "--oversubscribe"]
        case _:
            raise AssertionError(controller)
    return [*launcher, *program]


def environment(**extra: str) -> dict[str, str]:
    """Return this process's environment for a launch: our programs first in the path, no variables of Open MPI."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("OMPI_", "PMIX_"))}
    return {
        **inherited,
        "PATH": f"{_BIN}:{inherited['PATH']}",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        # Ranks that are killed leave files of 16 MiB behind.
        "OMPI_MCA_btl_sm_backing_directory": tempfile.gettempdir(),
        **extra,
    }


def launch(
    ranks: int,
    controller: str,
    *arguments: str,
    timeout: float = PATIENCE,
    extra: Mapping[str, str] | None = None,
    program: Sequence[str] = _DIST_TRAIN,
) -> LaunchResult:
    """Run `dist-train ARGUMENTS` on so many ranks and wait for its end; no process is left behind."""
    [ended] = wait_for_ends(start(ranks, controller, *arguments, extra=extra, program=program), timeout=timeout)
    return ended


def wait_for_ends(*processes: subprocess.Popen[str], timeout: float = PATIENCE) -> list[LaunchResult]:
    """Wait for the ends of `processes`; none of them, or of their descendants, is left behind."""
    try:
        outputs = [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            kill(process)
    return [LaunchResult(process.returncode, output) for process, output in zip(processes, outputs, strict=True)]


def train_ranks(
    ranks: int,
    controller: str,
    config: str,
    run: Path,
    *overrides: str,
    extra: Mapping[str, str] | None = None,
    program: Sequence[str] = _DIST_TRAIN,
) -> LaunchResult:
    """Train on so many ranks; fail unless the launch ends with exit code 0."""
    arguments = ("train", config, *overrides, "--run-dir", str(run))
    ended = launch(ranks, controller, *arguments, extra=extra, program=program)
    assert ended.code == 0, ended.output
    return ended


def run_here(*arguments: str) -> LaunchResult:
    """Run `dist-train ARGUMENTS` on one rank in this process, which saves starting another."""
    variables, threads = dict(os.environ), torch.get_num_threads()
    output = io.StringIO()
    try:
        with redirect_stdout(output), redirect_stderr(output):
            code = main(list(arguments))
    finally:
        torch.set_num_threads(threads)
        os.environ.clear()
        os.environ.update(variables)
    return LaunchResult(code, output.getvalue())


def train_alone(config: str, run: Path, *overrides: str) -> LaunchResult:
    """Train on one rank in this process; fail unless that ends with exit code 0."""
    ended = run_here("train", config, *overrides, "--run-dir", str(run))
    assert ended.code == 0, ended.output
    return ended


def start(
    ranks: int,
    controller: str,
    *arguments: str,
    extra: Mapping[str, str] | None = None,
    program: Sequence[str] = _DIST_TRAIN,
) -> subprocess.Popen[str]:
    """Start `dist-train ARGUMENTS` in its own session."""
    return subprocess.Popen(
        command(ranks, controller, *arguments, program=program),
        env=environment(**(extra or {})),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def kill(process: subprocess.Popen[Any]) -> None:
    """Send SIGKILL to `process` and all its descendants, and wait for it."""
    for pid in [process.pid, *descendants(process.pid)] if process.poll() is None else []:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait()
    if process.stdout is not None:
        process.stdout.close()


def kill_while_training(process: subprocess.Popen[str], run: Path, random: Random) -> None:
    """Kill a launch that trains in `run`, at a random moment after a checkpoint and up to 20 more recorded lines."""
    try:
        wait_for(lambda: list((run / "checkpoints").glob("*.json")), "a checkpoint")
        # Not before it trains, or all kills would fall into imports.
        wait_for_lines(run / "metrics.jsonl", lines_of(run / "metrics.jsonl") + random.randint(1, 20))
        time.sleep(random.uniform(0.0, 0.02))
        assert process.poll() is None, "the run ended before it could be killed; make it longer"
    finally:
        kill(process)


def process_of_rank(launcher: int, rank: int) -> int:
    """Return the process of `rank` among the descendants of `launcher`."""
    variables = {f"{name}={rank}".encode() for name in ("HOROVOD_RANK", "OMPI_COMM_WORLD_RANK", "RANK")}
    for pid in descendants(launcher):
        try:
            environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        words = [each for each in arguments[1:4] if each != b"-P"]
        if variables & set(environment) and words[:2] == [b"-m", b"dist_train"]:
            return pid
    raise AssertionError(f"no rank {rank}")


def descendants(pid: int) -> list[int]:
    """Return the processes below `pid`."""
    found: list[int] = []
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            for child in map(int, children.read_text().split()):
                found += [child, *descendants(child)]
        except FileNotFoundError:
            continue
    return found


def small_settings(**sections: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings of a run that takes a second: 8 steps per epoch, ghost norm, noise, one thread."""
    settings: dict[str, dict[str, Any]] = {
        "run": {"name": "small", "epochs": 4},
        "data": {"name": "synthetic", "synthetic_samples": 820, "synthetic_shape": [1, 12, 12]},
        "model": {"width": 0.0625, "ghost_size": 8, "norm_samples": 100},
        "batch": {"global_size": 100, "micro_size": 16},
        "noise": {"method": "smoothout", "amplitude": 0.02},
        "optimizer": {"learning_rate": 0.05},
        "precision": {"threads": 1},
        "evaluation": {"batch_size": 50, "train_samples": 120},
        "metrics": {"enabled": False},
    }
    for name, values in sections.items():
        settings[name] = {**settings.get(name, {}), **values}
    return settings


def write_config(folder: Path, settings: Mapping[str, Any]) -> str:
    """Write `settings` into `folder` and return the file's path."""
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(dict(settings)))
    return str(path)


def final_checkpoint(run: Path) -> dict[str, Any]:
    """Return the contents of the last checkpoint of `run`."""
    last = max((run / "checkpoints").glob("step-*.pt"))
    contents: dict[str, Any] = torch.load(last, weights_only=True)
    return contents


def weights_digest(run: Path) -> str:
    """Return the SHA-256 of all tensors of the last checkpoint's model, in order."""
    return digest_of(final_checkpoint(run)["model"])


def digest_of(state: Mapping[str, torch.Tensor]) -> str:
    """Return the SHA-256 of all tensors of `state`, in order."""
    digest = hashlib.sha256()
    for name, tensor in state.items():
        digest.update(name.encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def records(run: Path, kind: str) -> list[dict[str, Any]]:
    """Return the records of `kind` in the run's `metrics.jsonl`."""
    lines = (run / "metrics.jsonl").read_text().split("\n")[:-1]  # of a run at work, the last line may be half there
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def events(run: Path, name: str) -> list[dict[str, Any]]:
    """Return the run's events of this name."""
    return [event for event in records(run, "event") if event["event"] == name]


_MEASURED_TIMES = {"time", "step_seconds", "samples_per_second"}


def results(run: Path, kinds: Sequence[str] = ("train", "eval")) -> list[dict[str, Any]]:
    """Return what a run recorded without measured times: equal for bit-identical runs."""
    return [
        {name: value for name, value in record.items() if name not in _MEASURED_TIMES}
        for kind in kinds
        for record in records(run, kind)
    ]


def assert_same_run(run: Path, expected: Path, kinds: Sequence[str] = ("train", "eval")) -> None:
    """Check that two runs ended with the same weights and recorded the same."""
    assert weights_digest(run) == weights_digest(expected)
    assert results(run, kinds) == results(expected, kinds)


def status(run: Path) -> dict[str, Any]:
    """Return the run's status; empty where there is none yet."""
    try:
        fields: dict[str, Any] = json.loads((run / "status.json").read_text())
    except (OSError, ValueError):
        return {}
    return fields


def mostly_lengthy(values: Iterable[Any], keep: int = 1) -> list[Any]:
    """Return `values` for `parametrize`; all but the first `keep` are marked as lengthy."""
    cases = list(values)
    rest = (value if isinstance(value, tuple) else (value,) for value in cases[keep:])
    return [*cases[:keep], *(pytest.param(*value, marks=pytest.mark.lengthy) for value in rest)]
