"""Rows of a GPU step's operators and of the bytes that it reads and writes, against plain PyTorch.

They are counted on emulated tensors (`benchmarks/emulation.py`), so no GPU is needed and nothing is timed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from benchmarks.emulation import Job, emulate
from benchmarks.timing import Ratio, ratio_of
from dist_train.config import load_config
from dist_train.outcome import FaultError

CONFIG = Path(__file__).parent.parent / "configs" / "lb_8192.yaml"
RANKS = 8
_BYTES, _OPERATORS = 1.1, 2.5
_GB = 1e9


def rows() -> Iterator[Ratio]:
    """Yield rank 0's step of `CONFIG` on 8 GPUs over plain PyTorch's, with all samples in one pass and in several.

    What the host launches is one operator at a time or, with CUDA graphs, most passes at once.
    """
    config = load_config(CONFIG)
    samples = config.batch.global_size // RANKS
    assert config.batch.micro_size != "auto", "the same bits on any number of GPUs"
    sections = config.model_dump(mode="json")
    sections["data"] = {"name": "synthetic", "synthetic_samples": config.batch.global_size}
    one_pass = {**sections, "batch": {**sections["batch"], "micro_size": samples}}
    graphs = {**sections, "precision": {**sections["precision"], "cuda_graphs": True}}
    ours, plain = Job(sections, RANKS), Job(sections, RANKS, plain=samples)
    jobs = [ours, plain, replace(plain, plain=config.batch.micro_size), Job(one_pass, RANKS), Job(graphs, RANKS)]
    found = emulate(jobs)
    if wrong := [each.error or ", ".join(each.mixed) for each in found if each.error or each.mixed]:
        raise FaultError(f"the emulated step is not whole: {'; '.join(wrong)}", code="emulation-failed")
    step, whole, passes, step_in_one, graphed = found
    micro = config.batch.micro_size
    for mine, ours_in, theirs, theirs_in, most, unit in (
        # The cost of small passes, which give the same bits on more GPUs, is stated without a bar.
        (step, f"{micro} a pass", whole, samples, None, "operators"),
        (graphed, f"{micro} a pass, CUDA graphs", whole, samples, _OPERATORS, "launches"),
        (step, f"{micro} a pass", passes, micro, _OPERATORS, "operators"),
        (step_in_one, f"{samples} a pass", whole, samples, _OPERATORS, "operators"),
    ):
        title = f"{CONFIG.stem} on {RANKS} GPUs, {samples:,} samples a rank"
        names = f"dist-train, {ours_in}", f"plain PyTorch, {theirs_in} a pass"
        amounts = [(mine.bytes / _GB, theirs.bytes / _GB)]
        yield ratio_of(f"{title}: bytes", *names, amounts, _BYTES, unit="GB")
        counts = [(float(mine.operators), float(theirs.operators))]
        yield ratio_of(f"{title}: {unit}", *names, counts, most, unit=unit)
