"""`make gpu`: a page about a GPU in nine minutes: promises, host waits, memory, speed, a profile.

Each part runs in its own process. If one fails or exceeds its time, that is recorded, and the next one starts.
"""

from __future__ import annotations

import argparse
import itertools
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.groups import Device, groups_on
from benchmarks.launched_run import records_of, weights_digest
from benchmarks.launching import (
    NotMeasuredError,
    children_of,
    environment,
    finish,
    measure,
    module,
    on_ranks,
    run,
    tell,
)
from benchmarks.machine import this_machine
from benchmarks.subject import QUIET, open_trainer, settings
from benchmarks.timing import compare, timed
from dist_train.checkpoint.files import list_checkpoints
from dist_train.checkpoint.state import Progress
from dist_train.cluster.communicator import SingleProcess
from dist_train.cluster.devices import find_gpus
from dist_train.cluster.elastic import DeviceGroup, abortable_nccl
from dist_train.config import NoiseSettings, dump_config
from dist_train.kernels import operators
from dist_train.models import build_model
from dist_train.models.norms import GroupedBatchNorm, fuse_relus
from dist_train.optim.flat_weights import FlatWeights
from dist_train.optim.noise import build_noise
from dist_train.optim.noise_draws import NoiseDraws
from dist_train.outcome import ExitCode
from dist_train.rundir.records import EventRecord
from dist_train.training.compute import free_device_memory
from dist_train.training.reduction import set_up_reduction

_NOISE = {"method": "smoothout", "amplitude": 1e-3}
_PAIRS = 5


@dataclass(frozen=True)
class Finding:
    """The result of a part, in Markdown, and whether it is as promised."""

    text: str
    holds: bool = True


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page. Exit codes: 0 every part holds, 1 a part does not, 2 there is no GPU."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda", help="cpu: to try the parts without a GPU")
    parser.add_argument("--page", type=Path, default=Path("runs/gpu.md"), metavar="FILE", help="file of the page")
    parser.add_argument("--only", action="append", metavar="PART", help=f"{', '.join(PARTS)}, or a group of benchmarks")
    parser.add_argument("--seconds", type=float, default=520, help="time limit of all parts together")
    parser.add_argument("--part-seconds", type=float, default=100, help="time limit of one part")
    parser.add_argument("--tell", metavar="PART", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    device: Device = arguments.device
    if device == "cuda" and not torch.cuda.is_available():
        print("gpu: torch sees no GPU here; see dist-train doctor", file=sys.stderr)
        return ExitCode.USAGE
    known = (*PARTS, *groups_on(device))
    if unknown := set(arguments.only or ()) - set(known):
        print(f"gpu: no part is called {', '.join(sorted(unknown))}: {', '.join(known)}", file=sys.stderr)
        return ExitCode.USAGE
    if arguments.tell:
        with tempfile.TemporaryDirectory() as folder:
            found = PARTS[arguments.tell](device, Path(folder))
        tell([found.text, found.holds])
        return 0
    return _write_page(arguments.page, device, arguments.only or known, arguments)


def _write_page(page: Path, device: Device, parts: Sequence[str], limits: argparse.Namespace) -> int:
    page.parent.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + limits.seconds
    driver = find_gpus(os.environ).driver or "none"
    lines = [f"# {this_machine().in_words()}", "", f"NVIDIA driver {driver}, CUDA of torch {torch.version.cuda}.", ""]
    failed = 0
    for name in parts:
        print(f"{name} ...", file=sys.stderr)
        started = time.monotonic()
        found = _run_part(name, device, min(limits.part_seconds, end - started))
        failed += not found.holds
        lines += [f"## {name}: {'holds' if found.holds else 'FAILED'}", "", found.text, ""]
        lines += [f"{time.monotonic() - started:.0f} s.", ""]
        # Written after every part, so that nothing is lost if a later part fails.
        page.write_text("\n".join(lines), encoding="utf-8")
    print(page)
    return 1 if failed else 0


def _run_part(name: str, device: Device, seconds: float) -> Finding:
    """Run the part or group of rows `name` for at most `seconds`; a failure is a finding, too."""
    if seconds <= 0:
        return Finding("No time was left for it.", holds=False)
    if name not in PARTS:
        return _rows(name, device, seconds)
    try:
        text, holds = measure(_limited(seconds, module("benchmarks.gpu", "--device", device, "--tell", name)))
    except NotMeasuredError as error:
        return Finding(f"```\n{error}\n```", holds=False)
    return Finding(text, holds)


def _limited(seconds: float, command: Sequence[str]) -> list[str]:
    """Return `command` with a timeout after `seconds`, which also ends its children."""
    return ["timeout", "--kill-after=5", f"{seconds:.0f}", *command]


def _rows(group: str, device: Device, seconds: float) -> Finding:
    command = module("benchmarks", "--device", device, "--only", group, "--pairs", _PAIRS)
    ended = run(_limited(seconds, command))
    said = ended.stdout or f"Exit code {ended.returncode}.\n{ended.stderr[-2000:]}"
    # Exit code 1 with a table: a bar is missed, as it shows. The bars are those of CPUs, where a step computes; on a
    # GPU a small step waits for the host.
    return Finding(f"```\n{said.rstrip()}\n```", bool(ended.stdout) and ended.returncode in (0, 1))


def same_bits(device: Device, folder: Path) -> Finding:
    """Train twice, once killed and resumed, as the only rank of a Horovod job, and on two: are the weights equal?"""
    # Five runs and six starts, within the time of a part also where the host needs 30 ms for an update.
    config = _write_config(device, folder, updates=200)

    def command(name: str, controller: str = "alone", ranks: int = 1) -> list[str]:
        return on_ranks(controller, ranks, module("dist_train", "train", config, "--run-dir", folder / name))

    _kill_at_checkpoint(command("killed"), folder / "killed", lambda process: process)
    runs = [("first", "alone", 1), ("second", "alone", 1), ("killed", "alone", 1), ("horovodrun", "gloo", 1)]
    if has_two := device == "cpu" or torch.cuda.device_count() > 1:
        runs.append(("two ranks", "torch", 2))
    digests = {}
    for name, controller, ranks in runs:
        finish(command(name, controller, ranks))
        digests[name] = weights_digest(folder / name)
    lines = ["| run | weights |", "|---|---|", *(f"| {name} | {digest} |" for name, digest in digests.items())]
    if not has_two:
        lines += ["", "NOT CHECKED: two ranks. They need two GPUs."]
    return Finding("\n".join(lines), len(set(digests.values())) == 1)


def _write_config(device: Device, folder: Path, updates: int) -> Path:
    """Write the configuration of a short run with checkpoints, on a CPU of 32 updates, and return its path."""
    updates, every = (updates, 50) if device == "cuda" else (32, 1)
    sections = {**QUIET, "checkpoint": {"every_epochs": 0, "every_steps": every}, "batch": {"micro_size": 64}}
    sections["run"] = {"device": device, "max_steps": updates}
    config = folder / "config.yaml"
    config.write_text(dump_config(settings(0.25, 256, noise=_NOISE, **sections)))
    return config


def recovery(device: Device, folder: Path) -> Finding:
    """Abort NCCL's group and create another; kill one of two ranks: does the run continue with the same bits?"""
    lines = []
    if device == "cuda":
        lines = ["NCCL's group of one rank, made, used and aborted:", *_aborts(torch.device("cuda", 0)), ""]
        if torch.cuda.device_count() < 2:
            return Finding("\n".join([*lines, "NOT CHECKED: a lost rank. Two ranks need two GPUs."]))
    # Enough for the lost rank to come back.
    config = _write_config(device, folder, updates=1000)
    train = ["train", str(config), "--run-dir"]
    finish(module("dist_train", *train, folder / "alone"))
    options = ["launch", "-np", 2, "--min-ranks", 1, "--restarts", 1]
    launch = module("dist_train", *options, *train, folder / "elastic")
    code = _kill_at_checkpoint(launch, folder / "elastic", lambda launcher: max(children_of(launcher)))
    digests = {name: weights_digest(folder / name) for name in ("alone", "elastic")}
    events = [
        f"{each.event}: {each.details['seconds']} s"
        for each in records_of(folder / "elastic")
        if isinstance(each, EventRecord) and each.event in ("rank_lost", "rank_joined")
    ]
    lines += ["| run | weights |", "|---|---|", *(f"| {name} | {digest} |" for name, digest in digests.items())]
    lines += ["", f"Exit code {code}; {'; '.join(events)}."]
    holds = code == 0 and len(set(digests.values())) == 1 and any(each.startswith("rank_lost") for each in events)
    return Finding("\n".join(lines), holds)


def _aborts(device: torch.device) -> Iterator[str]:
    """Create a group, sum over it and abort it, twice; yield the times. Raises RuntimeError if an abort hangs."""
    for _ in range(2):
        started = time.perf_counter()
        group = DeviceGroup(lambda: abortable_nccl(dist.HashStore(), 0, 1, 60.0))
        group.connect(device)
        connected = time.perf_counter()
        group.abort()
        if not group.await_end(30):
            raise RuntimeError("the abort has not ended within 30 s")
        torch.cuda.synchronize(device)
        yield f"- made in {connected - started:.2f} s, aborted in {time.perf_counter() - connected:.2f} s"


def _kill_at_checkpoint(command: Sequence[str], run: Path, choose: Callable[[int], int]) -> int:
    """Start `command` and return its exit code. As soon as `run` has a checkpoint, kill the process whose id `choose`
    returns, given the command's process id.
    """
    process = subprocess.Popen(
        command, env=environment({}), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while process.poll() is None and not list_checkpoints(run / "checkpoints"):
        time.sleep(0.01)
    if process.poll() is not None:
        raise NotMeasuredError(f"exit code {process.returncode} before it could be killed: {' '.join(command)}")
    os.kill(choose(process.pid), signal.SIGKILL)
    return process.wait()


def same_draws(device: Device, folder: Path) -> Finding:
    """Draw each kind of noise on the device and on the CPU: are they bit-identical?"""
    lines, holds = ["| noise | draws |", "|---|---|"], True
    for distribution, scale in itertools.product(("uniform", "normal"), ("absolute", "weight", "filter")):
        noise = NoiseSettings.model_validate({"distribution": distribution, "scale": scale})
        drawn = []
        for place in (torch.device(device), torch.device("cpu")):
            weights = FlatWeights(build_model(settings(1.0, 128)).to(place))
            drawn.append(NoiseDraws(noise, weights, seed=1).draw(weights.values, 0.01, 3).cpu())
        same = torch.equal(*drawn)
        holds = holds and same
        lines.append(f"| {distribution}, {scale} | {'equal' if same else 'DIFFERENT'} |")
    return Finding("\n".join(lines), holds)


def same_sums(device: Device, folder: Path) -> Finding:
    """Sum the gradients of two micro-batches on the device and on the CPU: are they bit-identical?"""
    lines, holds = ["| sums | |", "|---|---|"], True
    for name, exponent in (("exact", 24), ("exact32", 24), ("exact16", 11)):
        summed = []
        for place in (torch.device(device), torch.device("cpu")):
            weights = FlatWeights(build_model(settings(1.0, 128)).to(place))
            progress = Progress(grid_exponents=[exponent] * len(weights.segments))
            config = settings(1.0, 256, comm={"reduction": name})
            noise = build_noise(config.noise, weights, seed=0, total_steps=1, rank=0)
            reduction = set_up_reduction(config, weights, noise, SingleProcess(), progress)
            reduction.start()
            for seed in range(2):
                drawn = torch.randn(len(weights.values), generator=torch.Generator().manual_seed(seed)).to(place)
                with reduction.micro_batch():
                    for parameter, gradient in zip(weights.parameters, weights.views_of(drawn), strict=True):
                        parameter.grad = gradient
            reduction.send()
            reduction.finish()
            summed.append(weights.gradients.cpu())
            holds = holds and not reduction.accumulator.out_of_range
        same = torch.equal(*summed)
        holds = holds and same
        lines.append(f"| {name} | {'equal' if same else 'DIFFERENT'} |")
    return Finding("\n".join(lines), holds)


def norms(device: Device, folder: Path) -> Finding:
    """Normalize groups of 128, followed by a ReLU, with our kernels and torch's: errors against float64, and speed."""
    lines = ["| activations | kernels | errors of outputs, gradients | both passes |", "|---|---|---|---|"]
    holds = True
    whose = ("Triton's", "torch's") if device == "cuda" and operators.has_triton() else ("torch's",)
    for shape in ((1024, 64, 32, 32), (1024, 256, 8, 8)) if device == "cuda" else ((256, 32, 8, 8),):
        inputs, upstream = torch.randn(2, *shape, device=device).unbind()
        inputs, upstream = (each.contiguous(memory_format=torch.channels_last) for each in (inputs, upstream))
        reference = _GroupByGroup(shape[1], device=device, dtype=torch.float64)
        # Near 0 rounding decides whether the ReLU is active: leave these values out.
        upstream[reference(inputs.double()).abs() < 1e-4] = 0.0
        expected = _both_passes(nn.Sequential(reference, nn.ReLU()), inputs.double(), upstream.double())
        for name in whose:
            model = nn.Sequential(GroupedBatchNorm(shape[1], _GROUP), nn.ReLU(inplace=True)).to(device)
            fuse_relus(model)
            both_passes = partial(_both_passes, model, inputs, upstream)
            with patch.object(operators, "has_triton", return_value=name == "Triton's"):
                found = both_passes()
                seconds = min(timed(both_passes) for _ in range(_PAIRS))
            errors = [float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True)]
            holds = holds and max(errors) < 1e-5
            written = ", ".join(f"{error:.1e}" for error in errors)
            lines.append(f"| {list(shape)} | {name} | {written} | {seconds * 1e3:.3f} ms |")
    return Finding("\n".join(lines), holds)


_GROUP = 128


class _GroupByGroup(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return torch.cat([super(_GroupByGroup, self).forward(group) for group in input.split(_GROUP)])


def _both_passes(model: nn.Module, inputs: Tensor, upstream: Tensor) -> list[Tensor]:
    """Return the outputs, and the gradients of inputs and parameters."""
    leaf = inputs.detach().requires_grad_()
    outputs = model(leaf)
    return [outputs.detach(), *torch.autograd.grad(outputs, (leaf, *model.parameters()), upstream)]


def graphs(device: Device, folder: Path) -> Finding:
    """Make the same updates with CUDA graphs and without: are the weights bit-identical? How long does each take?"""
    if device == "cpu":
        return Finding("NOT CHECKED: CUDA graphs need a GPU.")
    lines, holds = ["| update of 8 passes | weights | with graphs | without | ratio |", "|---|---|---|---|---|"], True
    for reduction, compute in (("exact", "float32"), ("exact32", "float32"), ("exact", "bfloat16")):
        sections = {**QUIET, "run": {"device": device}, "comm": {**QUIET["comm"], "reduction": reduction}}
        trainers = [
            open_trainer(
                settings(
                    1.0, 1024, noise=_NOISE, precision={"compute": compute, "cuda_graphs": has_graphs}, **sections
                ),
                SingleProcess(),
                folder / f"{reduction} {compute} {has_graphs}",
            )
            for has_graphs in (True, False)
        ]
        sides = (("graphs", trainers[0].advance), ("without", trainers[1].advance))
        ratio = compare("update", *sides, pairs=2 * _PAIRS, bar=None, warm_up=3)
        same = torch.equal(*(trainer.training_step.weights.values for trainer in trainers))
        holds = holds and same
        seconds = f"{ratio.amount_ours * 1e3:.2f} ms | {ratio.amount_theirs * 1e3:.2f} ms | {ratio.median:.3f}"
        lines.append(f"| {reduction}, {compute} | {'equal' if same else 'DIFFERENT'} | {seconds} |")
        for trainer in trainers:
            trainer.close()
        del trainers, trainer, sides
        free_device_memory()  # trainers are in reference cycles
    return Finding("\n".join(lines), holds)


def no_waits(device: Device, folder: Path) -> Finding:
    """Run the tests of a step under torch's sync debug mode; on a CPU only those that need no GPU."""
    variables = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {"DIST_TRAIN_TEST_GPU": "1"}
    ended = run(module("pytest", "-q", "-p", "no:cacheprovider", "tests/unit/test_training_device.py"), variables)
    return Finding(f"```\n{ended.stdout[-3000:].rstrip()}\n```", ended.returncode == 0)


def peak_memory(device: Device, folder: Path) -> Finding:
    """Return the peak memory of updates of VGG9 of width 1, in small and in large passes."""
    lines = ["| samples in a pass | peak |", "|---|---|"]
    for size in (128, 1024) if device == "cuda" else (16, 32):
        if device == "cuda":
            free_device_memory()  # the trainer before is in reference cycles
            torch.cuda.reset_peak_memory_stats()
        for _ in _updates(device, folder / str(size), 1.0, size):
            pass
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        peak = torch.cuda.max_memory_allocated() if device == "cuda" else used
        lines.append(f"| {size} | {peak / 1e6:,.0f} MB |")
    return Finding("\n".join(lines))


def step_profile(device: Device, folder: Path) -> Finding:
    """Return a profile of an update of VGG9 of width 1 with noise."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    updates = _updates(device, folder / "run", 1.0, 1024 if device == "cuda" else 16)
    next(updates)
    with profile(activities=activities) as profiled:
        for _ in updates:
            pass
        if device == "cuda":
            torch.cuda.synchronize()
    by = f"self_{device}_time_total"
    table = profiled.key_averages().table(sort_by=by, row_limit=20, max_name_column_width=50)
    return Finding(f"```\n{table}\n```")


def _updates(device: Device, folder: Path, width: float, size: int) -> Iterator[None]:
    """Make three updates of `size` samples in one pass; yield after each."""
    sections = {**QUIET, "run": {"device": device}, "batch": {"micro_size": size}, "data": {"synthetic_samples": 4096}}
    trainer = open_trainer(settings(width, size, noise=_NOISE, **sections), SingleProcess(), folder)
    try:
        for _ in range(3):
            trainer.advance()
            yield
    finally:
        trainer.close()


PARTS: Mapping[str, Callable[[Device, Path], Finding]] = MappingProxyType(
    {
        "same-bits": same_bits,
        "recovery": recovery,
        "same-draws": same_draws,
        "same-sums": same_sums,
        "norms": norms,
        "graphs": graphs,
        "no-waits": no_waits,
        "peak-memory": peak_memory,
        "profile": step_profile,
    }
)


if __name__ == "__main__":
    raise SystemExit(main())
