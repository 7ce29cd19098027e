"""The ranks over Horovod, which carries them by MPI, Gloo or NCCL."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from dist_train.cluster.communicator import Communicator, Pending, naming_lost_ranks
from dist_train.cluster.launch import Launch
from dist_train.outcome import UsageError


class HorovodCommunicator(Communicator):
    """The group that the launcher started. Horovod lives as long as this object is open."""

    def __init__(self, launch: Launch, *, timeout: float, device_type: str, timeline: bool) -> None:
        """Join the group; `timeout` is in seconds.

        Raises:
            UsageError: Horovod is missing, or sees another number of ranks than were launched.
        """
        set_environment(timeout, device_type, launch.launcher)
        if timeline:
            os.environ.setdefault("HOROVOD_TIMELINE", "DYNAMIC")
        try:
            import horovod.torch as hvd
            from horovod.common.exceptions import HorovodInternalError
        except ImportError as error:
            raise UsageError(
                f"Horovod cannot be loaded ({error}): run make setup, or see dist-train doctor", code="horovod-missing"
            ) from error
        self._hvd = hvd
        self._rank_lost = HorovodInternalError
        hvd.init()
        if hvd.size() != launch.size:
            seen = hvd.size()
            hvd.shutdown()
            fix = {
                "srun": "start with srun --mpi=pmix, and build Horovod against that MPI",
                "mpirun": "Horovod must be built against the MPI of this mpirun: see dist-train doctor",
            }.get(launch.launcher, "see dist-train doctor")
            raise UsageError(
                f"{launch.launcher} started {launch.size} ranks, but Horovod sees {seen}: {fix}", code="rank-count"
            )
        self.rank = hvd.rank()
        self.size = hvd.size()
        self.local_rank = hvd.local_rank()
        self.local_size = hvd.local_size()
        self.controller = "mpi" if hvd.mpi_enabled() else "gloo"
        self.has_nccl = bool(hvd.nccl_built())

    def allreduce_async(self, tensor: torch.Tensor, name: str) -> Pending:
        """Start to replace the contiguous `tensor` by its sum over all ranks."""
        return self._start(lambda: self._hvd.allreduce_async_(tensor, name=name, op=self._hvd.Sum))

    def adasum_async(self, tensor: torch.Tensor, name: str) -> Pending:
        """Start to replace `tensor` by its Adasum over all ranks."""
        return self._start(lambda: self._hvd.allreduce_async_(tensor, name=name, op=self._hvd.Adasum))

    def broadcast(self, tensor: torch.Tensor, name: str, root: int = 0) -> None:
        """Replace `tensor` by that of rank `root`."""
        self._start(lambda: self._hvd.broadcast_async_(tensor, root_rank=root, name=name)).wait()

    def start_timeline(self, path: Path) -> None:
        """Start to write Horovod's timeline to `path`, on rank 0; one that the user has asked for continues instead."""
        if _timeline_is_ours():
            self._hvd.start_timeline(str(path))

    def stop_timeline(self) -> None:
        """Stop writing it."""
        if _timeline_is_ours():
            self._hvd.stop_timeline()

    def close(self, error: BaseException | None = None) -> None:
        """Leave the group."""
        self._hvd.shutdown()

    def _start(self, operation: Callable[[], int]) -> Pending:
        with naming_lost_ranks(self._rank_lost):
            return _Operation(partial(self._hvd.synchronize, operation()), self._rank_lost)


class _Operation(Pending):
    def __init__(self, synchronize: Callable[[], object], rank_lost: type[Exception]) -> None:
        self._synchronize = synchronize
        self._rank_lost = rank_lost

    def wait(self) -> None:
        with naming_lost_ranks(self._rank_lost):
            self._synchronize()


def _timeline_is_ours() -> bool:
    return os.environ.get("HOROVOD_TIMELINE") == "DYNAMIC"


def set_environment(timeout: float, device_type: str, launcher: str) -> None:
    """Set what Horovod and MPI read when they start; what the user has set stays, where it is not wrong."""
    seconds = str(max(1, round(timeout)))
    os.environ.setdefault("HOROVOD_STALL_CHECK_TIME_SECONDS", str(max(1, round(timeout / 2))))
    os.environ.setdefault("HOROVOD_STALL_SHUTDOWN_TIME_SECONDS", seconds)
    # Gloo does not know who is lost: the watchdog, which does, must come first.
    os.environ.setdefault("HOROVOD_GLOO_TIMEOUT_SECONDS", str(max(60, round(3 * timeout))))
    # Batched, Horovod's copies into the fusion buffer of a GPU multiply by a double, also by 1: integers above 2^53,
    # as in the exact reduction, lose their last bits (BatchedScaledD2DMemcpy of its cuda_kernels.cu).
    os.environ["HOROVOD_BATCH_D2D_MEMCOPIES"] = "0"
    # Milliseconds. On CPUs, Gloo's threads take the cores that compute, the more often the shorter it is.
    os.environ.setdefault("HOROVOD_CYCLE_TIME", "5" if device_type == "cpu" and launcher == "horovodrun" else "1")
    if device_type == "cpu":
        # Open MPI polls without pause while it waits, and so takes the core that computes.
        os.environ.setdefault("OMPI_MCA_mpi_yield_when_idle", "1")
