"""The device that a rank computes on: a GPU if there is one; never silently the CPU where torch cannot use a GPU.

What scheduler and driver say about GPUs is compared with what torch finds; the error explains the difference.
"""

from __future__ import annotations

import os
import platform
import re
import socket
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from dist_train.cluster.communicator import Communicator, RankLostError, gather, run_on_all_ranks, signed_digest
from dist_train.cluster.rendezvous import ending_after
from dist_train.config import Config
from dist_train.config.sections import Device
from dist_train.kernels.operators import why_no_triton
from dist_train.outcome import UsageError

_GPU_COUNTS = (
    "SLURM_GPUS",
    "SLURM_GPUS_ON_NODE",
    "SLURM_GPUS_PER_NODE",
    "SLURM_GPUS_PER_TASK",
    "SLURM_GPUS_PER_SOCKET",
)
_GPU_LISTS = ("SLURM_JOB_GPUS", "SLURM_STEP_GPUS", "CUDA_VISIBLE_DEVICES")
_NONE_VISIBLE = ("", "-1")
_NO_GPUS_IN_SLURM = "NoDevFiles"
_CONNECTING_SHARE = 2.0  # multiple of `comm.timeout` for NCCL to connect the ranks' GPUs
FIRST_SUMS = (1, 1 << 20)
"""Elements of the sums by which GPUs connect: one, and as many as a bucket of gradients has.

NCCL sums them by different algorithms, and takes the memory of each at its first use: here, before training has filled
the GPU.
"""
_USE_CPU = "run.device=cpu trains on the CPU"
_USE_CUDA_TORCH = "install a torch that is built for CUDA (make setup, without DEVICE=cpu)"


@dataclass(frozen=True)
class GpuSigns:
    """The evidence for GPUs on this machine."""

    named: tuple[str, ...] = ()  # variables by which the scheduler or the user assigns GPUs, as NAME=VALUE
    files: tuple[str, ...] = ()  # the driver's device files
    denied: tuple[str, ...] = ()  # those that this process may not open
    driver: str = ""  # version of the loaded driver, empty if none is
    withheld: bool = False  # the scheduler has given this job none of the node's GPUs
    hidden: bool = False  # the user has hidden all of them

    @property
    def present(self) -> bool:
        """Whether there are GPUs that this process is meant to use."""
        return bool(self.named or self.files or self.driver) and not self.withheld

    def __str__(self) -> str:
        driver = (f"NVIDIA driver {self.driver}",) if self.driver else ()
        return ", ".join((*self.named, *self.files, *driver))


@dataclass(frozen=True)
class TorchGpus:
    """Torch's version, its CUDA or ROCm version (empty: a CPU build), how many GPUs it can use, and else why not."""

    version: str
    built_for: str
    count: int
    error: str = ""


@dataclass(frozen=True)
class Obstacle:
    """Why torch cannot use the GPUs, how to fix it, and the error code."""

    reason: str
    fix: str
    code: str


@dataclass(frozen=True)
class Placement:
    """Where a rank computes: its GPU's number on any node (0: a CPU), the GPUs that it sees, and its node's ranks."""

    gpu: int
    visible: int
    ranks: int


def find_gpus(
    environment: Mapping[str, str],
    root: Path = Path("/"),
    may_open: Callable[[Path], bool] = lambda path: os.access(path, os.R_OK | os.W_OK),
) -> GpuSigns:
    """Return what `environment` (CUDA_VISIBLE_DEVICES empty or -1: none) and the driver below `root` say about GPUs."""
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in _NONE_VISIBLE:
        return GpuSigns(hidden=True)
    counted = [name for name in _GPU_COUNTS if re.search(r"[1-9]\d*$", environment.get(name, "").partition("(")[0])]
    listed = [name for name in _GPU_LISTS if environment.get(name, "").strip() not in ("", _NO_GPUS_IN_SLURM)]
    named = tuple(f"{name}={environment[name]}" for name in (*counted, *listed))
    files = sorted(path for path in (root / "dev").glob("nvidia*") if path.name.removeprefix("nvidia").isdecimal())
    denied = [path for path in files if not may_open(path)]
    # Every job sees the node's device files; a job without GPUs may not open them, or is told so by Slurm alone.
    is_kept_out = "SLURM_JOB_ID" in environment and bool(files) and denied == files
    withheld = not named and (is_kept_out or visible == _NO_GPUS_IN_SLURM)
    return GpuSigns(named, _names(files, root), _names(denied, root), _driver_version(root), withheld)


def _names(files: Sequence[Path], root: Path) -> tuple[str, ...]:
    return tuple(f"/{path.relative_to(root)}" for path in files)


def _driver_version(root: Path) -> str:
    try:
        text = (root / "proc/driver/nvidia/version").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    found = re.search(r"\b\d+\.\d+(\.\d+)?\b", text)
    return found[0] if found else "of unknown version"


def torch_gpus() -> TorchGpus:
    """Return what torch finds; if it is built for GPUs and can use none, also torch's reason."""
    built_for = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
    if not (torch.version.cuda or torch.version.hip):
        return TorchGpus(torch.__version__, "", 0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they repeat the error
        if torch.cuda.is_available():
            return TorchGpus(torch.__version__, built_for, torch.cuda.device_count())
        try:
            torch.cuda.init()
        except (RuntimeError, AssertionError) as error:
            return TorchGpus(torch.__version__, built_for, 0, " ".join(str(error).split()))
    return TorchGpus(torch.__version__, built_for, 0)


def obstacle(signs: GpuSigns, found: TorchGpus) -> Obstacle:
    """Return the likeliest reason why torch can use no GPU here."""
    if not found.built_for:
        return Obstacle(f"this torch ({found.version}) is built for CPUs alone", _USE_CUDA_TORCH, code="torch-for-cpus")
    if signs.hidden:
        return Obstacle("CUDA_VISIBLE_DEVICES hides all GPUs", "unset it, or name GPUs in it", code="gpu-hidden")
    if too_old := re.search(r"found version (\d+)", found.error):
        major, minor = divmod(int(too_old[1]) // 10, 100)
        driver = f"NVIDIA driver {signs.driver}".strip()
        return Obstacle(
            f"the {driver} is too old: it is for CUDA {major}.{minor}, and this torch ({found.version}) is built for "
            f"{found.built_for}",
            f"update the driver, or install a torch that is built for CUDA {major}",
            code="gpu-driver-too-old",
        )
    if signs.denied and signs.denied == signs.files:
        return Obstacle(
            f"no permission to open {', '.join(signs.denied)}",
            "ask the scheduler for GPUs (--gpus-per-node), or the administrator for access to the device files",
            code="gpu-denied",
        )
    if signs.driver and not signs.files:
        return Obstacle(
            f"the NVIDIA driver {signs.driver} is loaded, but there is no device file /dev/nvidia0",
            "in a container, pass the GPUs on: docker run --gpus all, apptainer exec --nv",
            code="gpu-without-device-file",
        )
    detail = f": torch says {found.error!r}" if found.error else ""
    if not signs.driver:
        return Obstacle(
            f"no NVIDIA driver is loaded on {socket.gethostname()}{detail}",
            "load the driver, or start on a node that has GPUs",
            code="gpu-without-driver",
        )
    return Obstacle(
        f"the NVIDIA driver {signs.driver} is loaded, but gives no GPU{detail}",
        "see nvidia-smi, dmesg and, for error 802, whether nvidia-fabricmanager runs",
        code="gpu-silent",
    )


def kind_of_device(asked: Device, signs: GpuSigns, found: TorchGpus) -> Literal["cpu", "cuda"]:
    """Return what a rank computes on if `run.device` is `asked`. Raises UsageError."""
    if asked == "cpu" or (asked == "auto" and not found.count and not signs.present):
        return "cpu"
    if found.count:
        return "cuda"
    why = obstacle(signs, found)
    asks = "run.device=cuda asks for a GPU" if asked == "cuda" else f"there are GPUs here ({signs})"
    raise UsageError(f"{asks}, but torch cannot use any: {why.reason}. Either {why.fix}; or {_USE_CPU}", code=why.code)


def device_type(asked: Device = "auto") -> Literal["cpu", "cuda"]:
    """Return what a rank could compute on if `run.device` is `asked`, without raising an error."""
    return "cuda" if asked != "cpu" and torch_gpus().count else "cpu"


def choose_device(asked: Device, *, local_rank: int, local_size: int = 1) -> torch.device:
    """Return the device for `run.device` = `asked`: GPUs round robin by local rank. Raises UsageError.

    `local_size`: how many ranks of this node need to connect theirs.
    """
    if asked == "cpu":
        return torch.device("cpu")
    found = torch_gpus()
    if kind_of_device(asked, find_gpus(os.environ), found) == "cpu":
        return torch.device("cpu")
    slices = os.environ.get("CUDA_VISIBLE_DEVICES", "").count("MIG-")
    if local_size > 1 and slices > 1:
        raise UsageError(
            f"{local_size} ranks on this node would share a GPU: CUDA shows a process one MIG slice, here of {slices}, "
            f"and NCCL does not connect slices of one GPU. Start one rank, or ask for whole GPUs; or {_USE_CPU}",
            code="gpu-shared",
        )
    device = torch.device("cuda", local_rank % found.count)
    try:
        torch.ones(1, device=device)
    except RuntimeError as error:
        # used exclusively by another process, too new for this torch, or broken
        raise UsageError(
            f"{device} cannot be used: {' '.join(str(error).split())}. Choose others by CUDA_VISIBLE_DEVICES, "
            f"or a torch that is built for them; or {_USE_CPU}",
            code="gpu-unusable",
        ) from error
    torch.cuda.set_device(device)
    return device


def assign_devices(comm: Communicator, asked: Device, timeout: float) -> torch.device:
    """Return this rank's device; raise UsageError on all ranks if they mix CPUs and GPUs or share a GPU.

    If GPUs do not connect within a multiple of `timeout`, the process ends.
    """
    choose = partial(choose_device, asked, local_rank=comm.local_rank, local_size=comm.local_size)
    device = run_on_all_ranks(comm, choose, "use its device")
    if comm.size > 1 and not comm.is_joining:
        placements = _gather_placements(comm, device)
        run_on_all_ranks(comm, partial(check_placements, placements, comm.has_nccl), "share out the GPUs")
    comm.use_device(device)
    if comm.size > 1 and device.type == "cuda" and not comm.is_elastic:
        connect(comm, device, timeout * _CONNECTING_SHARE)
    return device


def connect(comm: Communicator, device: torch.device, seconds: float) -> None:
    """Connect the ranks' devices by `FIRST_SUMS`, in which NCCL may hang: the process ends if it takes longer.

    Raises UsageError if NCCL's memory does not fit, RankLostError if NCCL fails otherwise.
    """
    gpus, code = f"the GPUs of the {comm.size} ranks", "ranks-cannot-meet"
    fix = (
        "Start again with NCCL_DEBUG=INFO, which says where; NCCL_P2P_DISABLE=1, NCCL_NVLS_ENABLE=0 and "
        "NCCL_SOCKET_IFNAME avoid the usual reasons"
    )
    late = f"{gpus} have not connected within {seconds:g} s: NCCL hangs. {fix}"
    with ending_after(seconds, f"{late}. Or raise comm.timeout if connecting takes that long [{code}]"):
        try:
            for count in FIRST_SUMS:
                first = torch.zeros(count, dtype=torch.int64, device=device)
                comm.allreduce_async(first, f"connecting.{count}").wait()
                first[0].item()  # waits for the device
        except RankLostError as error:  # so far, mostly of the network or the driver
            why = " ".join(str(error.__cause__).split())
            raise RankLostError(f"{gpus} do not connect: {why}. {fix}", code=code) from error


def check_own_gpu(comm: Communicator, device: torch.device) -> None:
    """Raise UsageError on a rank whose `device` is the GPU of a lower rank. All ranks call it."""
    placements = _gather_placements(comm, device)
    gpus = [placement.gpu for placement in placements]
    first = gpus.index(gpus[comm.rank])
    if gpus[comm.rank] and first != comm.rank:
        raise _shared_gpu(first, comm.rank, placements[comm.rank])


def _gather_placements(comm: Communicator, device: torch.device) -> list[Placement]:
    gpu, visible = (_identity(device), torch.cuda.device_count()) if device.type == "cuda" else (0, 0)
    return [Placement(*row) for row in gather(comm, [gpu, visible, comm.local_size], "devices")]


def check_placements(placements: Sequence[Placement], has_nccl: bool) -> None:
    """Raise UsageError for CPUs beside GPUs, two ranks on one GPU, and GPUs that the engine cannot reduce on."""
    on_cpus = [str(rank) for rank, placement in enumerate(placements) if not placement.gpu]
    if len(on_cpus) == len(placements):
        return
    if on_cpus:
        raise UsageError(
            f"rank {', '.join(on_cpus)} of {len(placements)} has no GPU, the others have: start all on nodes with "
            f"GPUs; or {_USE_CPU}",
            code="gpu-missing",
        )
    owners: dict[int, int] = {}
    for rank, placement in enumerate(placements):
        first = owners.setdefault(placement.gpu, rank)
        if first != rank:
            raise _shared_gpu(first, rank, placement)
    if not has_nccl:
        raise UsageError(
            f"{len(placements)} ranks on GPUs need NCCL, which this Horovod is built without: the first broadcast "
            f"would never end. Set comm.engine=torch, or build Horovod anew (rm -r .venv, then make setup), or start "
            f"one rank; or {_USE_CPU}",
            code="nccl-missing",
        )


def _shared_gpu(first: int, second: int, placement: Placement) -> UsageError:
    return UsageError(
        f"ranks {first} and {second} would share a GPU: their node has {placement.ranks} ranks, and each sees "
        f"{placement.visible} GPU{'s' if placement.visible > 1 else ''}. Start at most one rank for each GPU, with all "
        f"GPUs of the node visible to each (srun --gpu-bind=none); or {_USE_CPU}",
        code="gpu-shared",
    )


def _identity(device: torch.device) -> int:
    """Return a nonzero number that identifies the GPU on any node, however the process numbers its GPUs."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", f"{visible} {device.index}")
    return signed_digest(f"{socket.gethostname()} {uuid}".encode()) or 1


def why_no_gpu(signs: GpuSigns) -> str:
    """Return why a rank with `run.device` = auto computes on the CPU; empty if that needs no explanation."""
    if signs.withheld:
        return "the scheduler has given this job none of the node's GPUs"
    if torch.version.cuda and not signs.present:
        return f"no GPU is visible here, though this torch is built for CUDA {torch.version.cuda}"
    return ""


def device_name(device: torch.device, processors: Path = Path("/proc/cpuinfo")) -> str:
    """Return the name of the GPU, or of the CPU according to `processors`, or else the CPU's architecture."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = processors.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []

    def first(field: str) -> str:
        return next((line.partition(":")[2].strip() for line in lines if line.startswith(field)), "")

    # ARM has a number instead of a name, which tells its processors apart; some architectures have neither
    return first("model name") or f"{platform.machine()} {first('CPU part')}".rstrip()


def describe_device(config: Config, device: torch.device) -> str:
    """Return the device's name; for a GPU, also what kernels it uses; for a CPU, why it is no GPU."""
    remarks = [why_no_gpu(find_gpus(os.environ))]
    if device.type == "cuda":
        reason = f", since comm.reduction is {config.comm.reduction}" if config.comm.is_exact else ""
        why = why_no_triton()
        remarks = [
            f"deterministic kernels alone{reason}" if config.precision.deterministic is True else "",
            f"torch's slower operators instead of our kernels ({why})" if why else "",
        ]
    return "; ".join(filter(None, (device_name(device), *remarks)))
