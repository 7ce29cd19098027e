"""The ranks over Horovod, which uses MPI, Gloo or NCCL."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from dist_train.cluster.communicator import Communicator, Counters, Operation, Pending, naming_lost_ranks
from dist_train.cluster.launch import Launch
from dist_train.outcome import UsageError


class HorovodCommunicator(Communicator):
    """The launcher's ranks."""

    def __init__(
        self, launch: Launch, *, timeout: float, device_type: str, timeline: bool, micro_batches: int = 1
    ) -> None:
        set_environment(timeout, device_type, launch.launcher, micro_batches)
        try:
            import horovod.torch as hvd
        except ImportError as error:
            raise UsageError(
                f"Horovod cannot be loaded ({error}): run make setup (see dist-train doctor), or start with dist-train "
                f"launch, torchrun or srun, which need none without comm.engine=horovod",
                code="horovod-missing",
            ) from error
        self._hvd = hvd
        self._counters: Counters | None = None
        if not hvd.is_initialized():  # by an earlier run of this process
            if timeline:
                os.environ.setdefault("HOROVOD_TIMELINE", "DYNAMIC")
            hvd.init()
        if hvd.size() != launch.size:
            seen = hvd.size()
            hvd.shutdown()
            fix = {
                "srun": "set comm.engine=torch, which needs no MPI; or srun --mpi=pmix and a Horovod built for it",
                "mpirun": "Horovod must be built against the MPI of this mpirun: see dist-train doctor",
                "horovodrun": "see dist-train doctor",
            }.get(launch.launcher, "leave comm.engine=horovod out, or start with horovodrun or mpirun")
            raise UsageError(
                f"{launch.launcher} started {launch.size} ranks, but Horovod sees {seen}: {fix}", code="rank-count"
            )
        self.rank = hvd.rank()
        self.size = hvd.size()
        self.local_rank = hvd.local_rank()
        self.local_size = hvd.local_size()
        self.backend = "mpi" if hvd.mpi_enabled() else "gloo"
        self.has_nccl = bool(hvd.nccl_built())

    def allreduce_async(self, tensor: torch.Tensor, name: str) -> Pending:
        return self._start(lambda: self._hvd.allreduce_async_(tensor, name=name, op=self._hvd.Sum))

    def adasum_async(self, tensor: torch.Tensor, name: str) -> Pending:
        return self._start(lambda: self._hvd.allreduce_async_(tensor, name=name, op=self._hvd.Adasum))

    def broadcast(self, tensor: torch.Tensor, name: str, root: int = 0) -> None:
        self._start(lambda: self._hvd.broadcast_async_(tensor, root_rank=root, name=name)).wait()

    def open_counters(self) -> Counters:
        """Return counters that all ranks share, over connections beside Horovod's. Raises UsageError."""
        from dist_train.cluster.torch_engine import open_counters_at_rank_0

        if self._counters is None:
            self._counters = open_counters_at_rank_0(self)
        return self._counters

    def start_timeline(self, path: Path) -> None:
        """Start to write Horovod's timeline to `path`, on rank 0, unless the user has configured another one."""
        if _timeline_is_ours():
            self._hvd.start_timeline(str(path))

    def stop_timeline(self) -> None:
        if _timeline_is_ours():
            self._hvd.stop_timeline()

    def close(self, error: BaseException | None = None) -> None:
        # MPI cannot start again in this process, which may join the ranks again: there Horovod ends with the process.
        if error is not None or self.backend != "mpi":
            self._hvd.shutdown()

    def _start(self, operation: Callable[[], int]) -> Pending:
        with naming_lost_ranks():
            return Operation(partial(self._hvd.synchronize, operation()))


def _timeline_is_ours() -> bool:
    return os.environ.get("HOROVOD_TIMELINE") == "DYNAMIC"


_LONG_UPDATE = 16  # micro-batches of a rank from which on milliseconds are under a hundredth of an update


def set_environment(timeout: float, device_type: str, launcher: str, micro_batches: int = 1) -> None:
    """Set the variables that Horovod and MPI read at their start; the user's values stay, unless they are wrong."""
    os.environ.setdefault("HOROVOD_STALL_CHECK_TIME_SECONDS", str(max(1, round(timeout / 2))))
    os.environ.setdefault("HOROVOD_STALL_SHUTDOWN_TIME_SECONDS", str(max(1, round(timeout))))
    # Gloo cannot name a lost rank: the watchdog, which can, must time out first.
    os.environ.setdefault("HOROVOD_GLOO_TIMEOUT_SECONDS", str(max(60, round(3 * timeout))))
    # Horovod's batched copies into the fusion buffer of a GPU multiply by a double, even if it is 1: integers above
    # 2^53, as in the exact reduction, lose their last bits (BatchedScaledD2DMemcpy in its cuda_kernels.cu).
    os.environ["HOROVOD_BATCH_D2D_MEMCOPIES"] = "0"
    # Milliseconds. In each cycle Horovod's threads exchange requests, on CPUs on the cores that compute, with Gloo for
    # longer than with MPI. Sums wait for the next cycle.
    has_long_cycle = device_type == "cpu" and (launcher == "horovodrun" or micro_batches >= _LONG_UPDATE)
    os.environ.setdefault("HOROVOD_CYCLE_TIME", "5" if has_long_cycle else "1")
    if device_type == "cpu":
        # Otherwise Open MPI busy-waits on the core that computes.
        os.environ.setdefault("OMPI_MCA_mpi_yield_when_idle", "1")
