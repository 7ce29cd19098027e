"""Rows of one rank: our step against the bare loop, and the stall of a checkpoint."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.bare_loop import bare_loop
from benchmarks.subject import QUIET, open_trainer, settings
from benchmarks.timing import Ratio, compare, ratio_of, timed
from dist_train.checkpoint.writer import CheckpointWriter, Written
from dist_train.cluster.communicator import SingleProcess
from dist_train.cluster.devices import device_type
from dist_train.data.catalog import load_data
from dist_train.data.images import ImageSet

MONITORED: Mapping[str, Mapping[str, Any]] = {
    "metrics": {"enabled": True, "port": 0},
    "evaluation": {"every_epochs": 0},
    "checkpoint": {"every_epochs": 0, "every_steps": 20},
}
"""Metrics at every step, logs and agreement checks as by default, a background checkpoint every 20 steps."""


def throughput_rows(width: float, pairs: int) -> Iterator[Ratio]:
    """Yield our step time over the bare loop's, quiet and with monitoring, in two precisions, both channels-last."""
    device = torch.device(device_type())
    for compute, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        for name, extra, bar in (("quiet", QUIET, 1 / 0.97), ("watched", MONITORED, 1 / 0.95)):
            config = settings(width, 128, precision={"threads": 1, "compute": compute}, **extra)
            data = load_data(config.data, "train", 0)
            assert isinstance(data, ImageSet)
            theirs = bare_loop(
                data.images.to(device),
                data.labels.to(device),
                width=width,
                batch=128,
                channels_last=config.precision.channels_last,
                precision=dtype,
            )
            with tempfile.TemporaryDirectory() as folder:
                trainer = open_trainer(config, SingleProcess(), Path(folder) / "run")
                yield compare(
                    f"train, {name}, width {width:g}, batch 128, {compute} channels_last",
                    ("dist-train", trainer.advance),
                    ("bare PyTorch loop", theirs),
                    pairs=pairs,
                    bar=bar,
                    images=128,
                )
                trainer.close()


def checkpoint_row(pairs: int) -> Ratio:
    """Return the stall of a background checkpoint over a blocking torch.save of the same state."""
    with tempfile.TemporaryDirectory() as folder:
        config = settings(1.0, 128, **QUIET)
        trainer = open_trainer(config, SingleProcess(), Path(folder) / "run")
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
