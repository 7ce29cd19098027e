"""How a process joins the other ranks."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Literal

from dist_train.cluster.communicator import Alone, Communicator
from dist_train.cluster.launch import current_launch, is_elastic
from dist_train.config.sections import Engine
from dist_train.outcome import ExitCode


def end_process() -> None:
    """End this process at once, with exit code 1."""
    os._exit(ExitCode.FAULT)


_HEAD_START_SECONDS = 2.0  # rank 0 reports for all; the others later, in case it is the one that hangs


@contextmanager
def meeting_within(seconds: float, end: Callable[[], None] = end_process) -> Iterator[None]:
    """End this process with a message if the ranks have not all met in the block after `seconds`."""
    launch = current_launch()

    def give_up() -> None:
        print(
            f"dist-train: the {launch.size} ranks have not all met within {seconds:g} s: one has not started, hangs, "
            f"or cannot be reached; start again, or raise comm.timeout if starting takes that long "
            f"[ranks-cannot-meet]",
            file=sys.stderr,
            flush=True,
        )
        end()

    if launch.size == 1:
        yield
        return
    timer = threading.Timer(seconds if launch.rank == 0 else seconds + _HEAD_START_SECONDS, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def join_ranks(
    *, timeout: float, device_type: str, engine: Engine = "auto", timeline: bool = False, micro_batches: int = 1
) -> Communicator:
    """Join the launcher's ranks; without a launcher, run as a single rank.

    `timeout` is in seconds. `timeline`: whether a timeline may be written later, which Horovod must know at its start.
    `micro_batches`: those of a global batch; where updates are long, Horovod's cycle is too. Raises UsageError if the
    ranks cannot meet as requested.
    """
    launch = current_launch()
    if is_elastic():
        from dist_train.cluster.elastic import ElasticCommunicator

        return ElasticCommunicator(timeout=timeout, device_type=device_type)
    if launch.size == 1 and launch.launcher not in ("horovodrun", "mpirun"):
        return Alone()
    if engine_of(launch.launcher, engine, is_installed("horovod")) == "torch":
        from dist_train.cluster.torch_engine import TorchCommunicator

        return TorchCommunicator(launch, timeout=timeout, device_type=device_type)
    from dist_train.cluster.horovod import HorovodCommunicator

    return HorovodCommunicator(
        launch, timeout=timeout, device_type=device_type, timeline=timeline, micro_batches=micro_batches // launch.size
    )


def engine_of(launcher: str, asked: Engine, has_horovod: bool) -> Literal["horovod", "torch"]:
    """Return the engine under `launcher` if comm.engine is `asked`."""
    if asked != "auto":
        return asked
    if launcher in ("horovodrun", "mpirun"):
        return "horovod"
    return "horovod" if launcher == "srun" and has_horovod else "torch"


def is_installed(module: str) -> bool:
    """Whether `module` can be found, without loading it."""
    return find_spec(module) is not None
