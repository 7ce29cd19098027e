"""How a process joins the other ranks."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from dist_train.cluster.communicator import Communicator, MpiCommunicator, SingleProcess
from dist_train.cluster.inspection import check_recovery
from dist_train.cluster.launch import IN_CALLBACK, current_launch, engine_of, is_elastic, is_installed
from dist_train.config.sections import Engine
from dist_train.outcome import ExitCode, UsageError, say_on_stderr
from dist_train.start_up import allow_open_files


def end_process() -> None:
    """End this process at once, with exit code 1."""
    os._exit(ExitCode.FAULT)


_HEAD_START_SECONDS = 2.0  # rank 0 reports for all; the others later, in case it is the one that hangs


def rendezvous_within(
    seconds: float,
    advice: str = "start again, or raise comm.timeout if starting takes that long",
    engine: Engine = "auto",
) -> AbstractContextManager[None]:
    """End this process with a message if the ranks have not all met in the block after `seconds`."""
    launch, cut_off = current_launch(), "cannot be reached"
    store = launch.store if launch.launcher in ("srun", "env://") else None  # the others have chosen or checked theirs
    if store is not None and engine_of(launch.launcher, engine) == "torch":
        cut_off = f"cannot reach the others at {store.host}:{store.port} (MASTER_ADDR, MASTER_PORT)"
    return ending_after(
        seconds,
        f"the {launch.size} ranks have not all met within {seconds:g} s: one has not started, hangs, or {cut_off}; "
        f"{advice} [ranks-cannot-meet]",
    )


@contextmanager
def ending_after(seconds: float, message: str) -> Iterator[None]:
    """End this process with `message` if the block takes longer than `seconds`, on a launch of several ranks."""
    launch = current_launch()

    def give_up() -> None:
        say_on_stderr(f"dist-train: {message}")
        end_process()

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
    if IN_CALLBACK.get() and (is_elastic() or launch.size > 1):
        raise UsageError(
            "a callback is called on rank 0 alone: call evaluate, replay and train on every rank, after training",
            code="in-a-callback",
        )
    allow_open_files()
    if is_elastic():
        from dist_train.cluster.elastic import ElasticCommunicator

        check_recovery(lambda: device_type)
        return ElasticCommunicator(timeout=timeout, device_type=device_type)
    if launch.size == 1 and launch.launcher not in ("horovodrun", "mpirun"):
        return SingleProcess()
    if engine_of(launch.launcher, engine) == "torch":
        from dist_train.cluster.torch_engine import TorchCommunicator

        return TorchCommunicator(launch, timeout=timeout, device_type=device_type)
    from dist_train.cluster.horovod import HorovodCommunicator

    return HorovodCommunicator(
        launch, timeout=timeout, device_type=device_type, timeline=timeline, micro_batches=micro_batches // launch.size
    )


_MEASURING_SECONDS = 300.0  # for the ranks to meet where no comm.timeout is known


def join_to_measure(*, timeout: float, device_type: str, engine: Engine = "auto") -> Communicator:
    """As `join_ranks`, but end this process with a message if the ranks have not all met after five minutes."""
    with rendezvous_within(_MEASURING_SECONDS, advice="start again", engine=engine):
        return join_ranks(timeout=timeout, device_type=device_type, engine=engine)


_POINTS_TIMEOUT = 8 * 3600.0  # seconds; a rank that is done waits for those that still evaluate


def join_points() -> Communicator:
    """Join the launcher's ranks for independent points of work; without a launcher, be the only rank.

    By mpi4py under mpirun, and under srun where it is installed; otherwise by torch.distributed. Raises UsageError.
    """
    launch = current_launch()
    if launch.size == 1:
        return SingleProcess()
    is_srun_without_mpi = launch.launcher == "srun" and launch.store is not None and not is_installed("mpi4py")
    if launch.launcher not in ("mpirun", "srun", "horovodrun") or is_srun_without_mpi:
        return join_to_measure(timeout=_POINTS_TIMEOUT, device_type="cpu", engine="torch")
    if launch.launcher == "horovodrun":
        raise UsageError(
            "points are not distributed by Horovod: start with dist-train launch, mpirun or srun",
            code="launcher-unsupported",
        )
    # Otherwise Open MPI busy-waits on the core that computes.
    os.environ.setdefault("OMPI_MCA_mpi_yield_when_idle", "1")
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise UsageError(
            f"mpi4py cannot be used ({error}): run make setup, or start with dist-train launch", code="mpi4py-missing"
        ) from error
    communicator = MPI.COMM_WORLD
    if communicator.Get_size() != launch.size:
        raise UsageError(
            f"{launch.launcher} started {launch.size} ranks, but MPI sees {communicator.Get_size()}: "
            f"start with the mpirun of mpi4py's MPI, or srun --mpi=pmix; see dist-train doctor",
            code="rank-count",
        )
    return MpiCommunicator(communicator, communicator.Split_type(MPI.COMM_TYPE_SHARED))
