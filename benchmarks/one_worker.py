"""Rows that need one worker: against the bare loop, noise on against off, the checkpoint's stall."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.bare_loop import bare_loop
from benchmarks.peers.noisy import AMPLITUDE, add_noise
from benchmarks.peers.work import vgg9
from benchmarks.subject import QUIET, open_trainer, settings
from benchmarks.timing import Ratio, compare, ratio_of, timed
from dist_train.cluster.alone import Alone
from dist_train.config import NoiseSettings
from dist_train.data.catalog import load_images
from dist_train.optim.flat_weights import FlatWeights
from dist_train.optim.noise import build_noise
from dist_train.training.allocator import keep_freed_memory
from dist_train.training.checkpoint_writer import CheckpointWriter, Written

WATCHED: Mapping[str, Mapping[str, Any]] = {
    "metrics": {"enabled": True, "port": 0},
    "evaluation": {"every_epochs": 0},
    "checkpoint": {"every_epochs": 0, "every_steps": 20},
}
"""Metrics at every step, logs, agreement checks as by default, a background checkpoint every 20 steps."""


def throughput_rows(width: float, pairs: int) -> Iterator[Ratio]:
    """Yield our step time over the bare loop's, quiet and watched, in float32 and in bfloat16 channels-last."""
    for precision in ({"compute": "float32"}, {"compute": "bfloat16", "channels_last": True}):
        words = " ".join(name if flag is True else str(flag) for name, flag in precision.items())
        for name, extra, bar in (("quiet", QUIET, 1 / 0.97), ("watched", WATCHED, 1 / 0.95)):
            config = settings(width, 128, precision={"threads": 1, **precision}, **extra)
            data = load_images(config.data, "train", 0)
            dtype = torch.bfloat16 if precision["compute"] == "bfloat16" else torch.float32
            theirs = bare_loop(
                data.images,
                data.labels,
                width=width,
                batch=128,
                channels_last=config.precision.channels_last,
                precision=dtype,
            )
            with tempfile.TemporaryDirectory() as folder:
                trainer = open_trainer(config, Alone(), Path(folder) / "run")
                yield compare(
                    f"train, {name}, width {width:g}, batch 128, {words}",
                    ("dist-train", trainer.advance),
                    ("bare PyTorch loop", theirs),
                    pairs=pairs,
                    bar=bar,
                )
                trainer.close()


def noise_row(sharing: str, pairs: int) -> Ratio:
    """Return the step time with SmoothOut over that without, VGG9 width 1, batch 128."""
    noise = {"method": "smoothout", "amplitude": 1e-4, "sharing": sharing}
    with tempfile.TemporaryDirectory() as folder:
        noisy = open_trainer(settings(1.0, 128, noise=noise, **QUIET), Alone(), Path(folder) / "noisy")
        plain = open_trainer(settings(1.0, 128, **QUIET), Alone(), Path(folder) / "plain")
        return compare(
            f"noise on/off, width 1, batch 128, sharing {sharing}",
            ("SmoothOut", noisy.advance),
            ("no noise", plain.advance),
            pairs=pairs,
            bar=1.03,
        )


def perturbation_row(pairs: int) -> Ratio:
    """Return the time of perturbing and restoring VGG9 width 1 over that of the reference's way, tensor by tensor."""
    theirs = vgg9(1.0)
    weights = FlatWeights(vgg9(1.0))
    described = NoiseSettings(method="smoothout", amplitude=AMPLITUDE)
    noise = build_noise(described, weights, seed=1, total_steps=1, rank=0)

    def perturb() -> None:
        with noise.perturbed(0) as perturbed:
            perturbed.visit(0, lambda: None)

    torch.set_num_threads(1)
    keep_freed_memory()
    return compare(
        "perturb and restore, width 1",
        ("SmoothOut", perturb),
        ("a draw, an addition, a subtraction a tensor", lambda: add_noise(theirs)()),
        pairs=pairs,
        bar=0.5,
    )


def checkpoint_row(pairs: int) -> Ratio:
    """Return how long a background checkpoint stops the step over a blocking torch.save of the same state."""
    with tempfile.TemporaryDirectory() as folder:
        config = settings(1.0, 128, **QUIET)
        trainer = open_trainer(config, Alone(), Path(folder) / "run")
        trainer.advance()
        writer = CheckpointWriter(Path(folder), config.checkpoint, lambda: None)
        path = Path(folder) / "blocking.pt"
        seconds = []
        for _ in range(pairs + 1):
            stall = timed(lambda: writer.submit(trainer.contents(), None))
            writer.wait()
            [written] = writer.results()
            assert isinstance(written, Written)
            seconds.append((stall, timed(lambda: torch.save(trainer.contents().to_dict(), path))))
        return ratio_of(
            "checkpoint of VGG9 width 1: stall", "in the background", "blocking torch.save", seconds[1:], 0.1
        )
