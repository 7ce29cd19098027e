"""Evaluation of what a run has saved."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
import yaml

from dist_train.checkpoint.files import Contents, find_checkpoint, read_checkpoint
from dist_train.cluster.communicator import run_on_all_ranks
from dist_train.cluster.devices import device_type, share_out_devices
from dist_train.cluster.joining import join_ranks
from dist_train.config import Config, differences, dump_config, parse_config
from dist_train.config.loading import with_overrides
from dist_train.config.resuming import with_threads
from dist_train.data.images import Split
from dist_train.data.loader import open_splits
from dist_train.models import build_model
from dist_train.outcome import UsageError
from dist_train.rundir.atomic import finite
from dist_train.training.compute import set_up_compute, share_of_threads
from dist_train.training.evaluation import evaluate

_HARMLESS = frozenset(
    {"run.device", *(f"precision.{name}" for name in ("compute", "channels_last", "compile", "threads", "tf32"))}
)


def evaluate_stored(target: Path, split: Split, overrides: Sequence[str]) -> dict[str, object]:
    """Return step, loss (None where it is not finite) and accuracy of a stored model on the whole of `split`.

    The same on all ranks. The norm statistics are those of the checkpoint: they belong to its clean weights.
    """
    with ExitStack() as stack:
        comm = join_ranks(timeout=60.0, device_type=device_type())
        stack.callback(comm.close)
        path = find_checkpoint(target)
        contents = run_on_all_ranks(comm, lambda: read_checkpoint(path), "read the checkpoint")
        config = stored_config(contents, overrides)
        if config.precision.threads == "auto":
            config = with_threads(config, share_of_threads(comm.local_size))
        compute = set_up_compute(config.precision, share_out_devices(comm, config.run.device))
        layout = torch.channels_last if config.precision.channels_last else torch.contiguous_format
        open_data = partial(open_splits, config.data, config.run.seed, compute.device, layout)
        splits = run_on_all_ranks(comm, open_data, "load the data")
        stack.callback(splits.close)
        model = build_model(config)
        model.load_state_dict(contents.model)
        model.to(compute.device)
        samples = splits.train if split == "train" else splits.test
        batch_size = config.evaluation.batch_size
        result = evaluate(model, samples, len(samples), batch_size=batch_size, compute=compute, comm=comm)
        comm.barrier()
    return {
        "checkpoint": str(path),
        "step": contents.step,
        "epoch": contents.epoch,
        "split": split,
        "loss": finite(result.loss),
        "accuracy": result.accuracy,
        "samples": result.samples,
    }


def stored_config(contents: Contents, overrides: Sequence[str]) -> Config:
    """Return the configuration in a checkpoint, with `section.key=value` overrides, for whichever device is here.

    Raises:
        UsageError: an override would change the model or its data.
    """
    stored = parse_config(dict(contents.config), source="the checkpoint")
    settings = yaml.safe_load(dump_config(stored))
    settings["run"]["device"] = "auto"
    config = parse_config(with_overrides(settings, overrides), source="the checkpoint")
    changed = [difference for difference in differences(stored, config) if difference.path not in _HARMLESS]
    if changed:
        raise UsageError(
            "an evaluation takes only settings that leave the model and its data what they are, not "
            + ", ".join(difference.path for difference in changed),
            code="settings-changed",
        )
    return config
