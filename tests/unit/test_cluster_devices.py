"""Where a rank computes: what speaks for GPUs, why torch cannot use them, and who may share which."""

from __future__ import annotations

import platform
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from dist_train.cluster import devices, rendezvous
from dist_train.cluster.communicator import Communicator, Operation, Pending, RankLostError, naming_lost_ranks
from dist_train.cluster.devices import (
    GpuSigns,
    Placement,
    TorchGpus,
    assign_devices,
    check_own_gpu,
    check_placements,
    choose_device,
    connect,
    describe_device,
    device_name,
    device_type,
    find_gpus,
    kind_of_device,
    obstacle,
    torch_gpus,
    why_no_gpu,
)
from dist_train.cluster.elastic import _naming_breaks
from dist_train.cluster.launch import Launch
from dist_train.config import Config
from dist_train.config.resuming import with_device
from dist_train.config.sections import Device
from dist_train.outcome import CodedError, FaultError, PeerFailedError, UsageError
from dist_train.training.reduction import _BUCKET
from tests.raising import raises
from tests.unit.simulated_ranks import SimulatedRanks, results
from tests.waiting import PATIENCE

CPU_BUILD = TorchGpus("2.13.0+cpu", "", 0)
NO_DRIVER = TorchGpus("2.15.0+cu132", "CUDA 13.2", 0, "Found no NVIDIA driver on your system. Please check")
TOO_OLD = TorchGpus(
    "2.15.0+cu132", "CUDA 13.2", 0, "The NVIDIA driver on your system is too old (found version 11040). Please"
)
TWO_GPUS = TorchGpus("2.15.0+cu132", "CUDA 13.2", 2)
NOTHING = GpuSigns()
HIDDEN = GpuSigns(hidden=True)


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """The root of a machine with a driver and two GPUs."""
    (tmp_path / "dev").mkdir()
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm", "null"):
        (tmp_path / "dev" / name).touch()
    driver = tmp_path / "proc/driver/nvidia/version"
    driver.parent.mkdir(parents=True)
    driver.write_text(
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  470.57.02  Tue Jul 13 16:14:05 UTC 2021\n"
        "GCC version:  gcc version 12.2.0 (Debian 12.2.0-14)\n"
    )
    return tmp_path


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        ({}, ()),
        ({"SLURM_GPUS_ON_NODE": "4"}, ("SLURM_GPUS_ON_NODE=4",)),
        ({"SLURM_GPUS_PER_NODE": "a100:2"}, ("SLURM_GPUS_PER_NODE=a100:2",)),
        ({"SLURM_GPUS_PER_NODE": "0", "SLURM_GPUS_ON_NODE": "a100:0", "SLURM_GPUS": ""}, ()),
        # these are numbers of GPUs, of which the first is 0
        ({"SLURM_JOB_GPUS": "0"}, ("SLURM_JOB_GPUS=0",)),
        ({"SLURM_STEP_GPUS": "2,3"}, ("SLURM_STEP_GPUS=2,3",)),
        ({"CUDA_VISIBLE_DEVICES": "0"}, ("CUDA_VISIBLE_DEVICES=0",)),
        ({"CUDA_VISIBLE_DEVICES": "GPU-1a2b"}, ("CUDA_VISIBLE_DEVICES=GPU-1a2b",)),
        ({"CUDA_VISIBLE_DEVICES": "NoDevFiles"}, ()),
        ({"CUDA_VISIBLE_DEVICES": "NoDevFiles", "SLURM_JOB_GPUS": "1"}, ("SLURM_JOB_GPUS=1",)),
        ({"CUDA_VISIBLE_DEVICES": "", "SLURM_GPUS_ON_NODE": "4"}, ()),
        ({"CUDA_VISIBLE_DEVICES": "-1", "SLURM_GPUS_ON_NODE": "4"}, ()),
    ],
)
def test_variables_name_gpus(environment: Mapping[str, str], named: Sequence[str], tmp_path: Path) -> None:
    signs = find_gpus(environment, tmp_path)
    assert signs.named == named
    assert signs.present is bool(named)


def test_the_driver_s_files_speak_for_gpus_unless_the_user_wants_none(machine: Path) -> None:
    signs = find_gpus({}, machine)
    assert signs == GpuSigns((), ("/dev/nvidia0", "/dev/nvidia1"), (), "470.57.02")
    assert signs.present
    assert find_gpus({"CUDA_VISIBLE_DEVICES": ""}, machine) == HIDDEN


def test_a_job_without_gpus_on_a_node_that_has_some_computes_on_the_cpu(machine: Path) -> None:
    job = {"SLURM_JOB_ID": "7"}
    signs = find_gpus(job, machine, lambda path: False)
    assert not signs.present
    assert "has given this job none" in why_no_gpu(signs)
    assert kind_of_device("auto", signs, NO_DRIVER) == "cpu"
    told = find_gpus({**job, "CUDA_VISIBLE_DEVICES": "NoDevFiles"}, machine, lambda path: True)
    assert kind_of_device("auto", told, NO_DRIVER) == "cpu"
    # outside of a job nobody has said that there are none; nor does a job whose GPUs may be opened
    for environment, may_open in (({}, False), (job, True), ({**job, "SLURM_JOB_GPUS": "0"}, False)):
        answer: Callable[[Path], bool] = partial(_answer, may_open)
        assert find_gpus(environment, machine, answer).present


def _answer(answer: bool, path: Path) -> bool:
    return answer


@pytest.mark.parametrize(
    ("asked", "signs", "found", "kind"),
    [
        ("auto", NOTHING, CPU_BUILD, "cpu"),
        ("auto", NOTHING, NO_DRIVER, "cpu"),
        ("auto", HIDDEN, NO_DRIVER, "cpu"),
        ("auto", NOTHING, TWO_GPUS, "cuda"),
        ("cuda", NOTHING, TWO_GPUS, "cuda"),
        ("cpu", NOTHING, TWO_GPUS, "cpu"),
        ("cpu", GpuSigns(("SLURM_JOB_GPUS=0",)), CPU_BUILD, "cpu"),
    ],
)
def test_what_is_there_is_taken(asked: Device, signs: GpuSigns, found: TorchGpus, kind: str) -> None:
    assert kind_of_device(asked, signs, found) == kind


@pytest.mark.parametrize(
    ("signs", "found", "code"),
    [
        (GpuSigns(("SLURM_GPUS_ON_NODE=4",)), CPU_BUILD, "torch-for-cpus"),
        (GpuSigns(files=("/dev/nvidia0",), driver="470.57.02"), TOO_OLD, "gpu-driver-too-old"),
        (GpuSigns(files=("/dev/nvidia0",), denied=("/dev/nvidia0",), driver="580"), NO_DRIVER, "gpu-denied"),
        (GpuSigns(driver="580.65.06"), NO_DRIVER, "gpu-without-device-file"),
        (GpuSigns(("CUDA_VISIBLE_DEVICES=0",)), NO_DRIVER, "gpu-without-driver"),
        (GpuSigns(files=("/dev/nvidia0",), driver="580"), NO_DRIVER, "gpu-silent"),
    ],
)
def test_gpus_that_torch_cannot_use_are_refused_with_the_reason(signs: GpuSigns, found: TorchGpus, code: str) -> None:
    for asked in ("auto", "cuda"):
        with raises(UsageError, code):
            kind_of_device(asked, signs, found)
    assert obstacle(signs, found).fix


def test_gpus_that_nvidia_smi_lists_but_cuda_cannot_use_have_no_fabric_manager() -> None:
    found = TorchGpus("2.15.0+cu132", "CUDA 13.2", 0, "Error 802: system not yet initialized")
    why = obstacle(GpuSigns(files=("/dev/nvidia0",), driver="580"), found)
    assert "Error 802" in why.reason
    assert "nvidia-fabricmanager" in why.fix


@pytest.mark.parametrize(("signs", "code"), [(NOTHING, "gpu-without-driver"), (HIDDEN, "gpu-hidden")])
def test_a_gpu_that_is_asked_for_must_be_there(signs: GpuSigns, code: str) -> None:
    with raises(UsageError, code):
        kind_of_device("cuda", signs, NO_DRIVER)


def test_the_cpu_is_taken_where_it_is_asked_for() -> None:
    assert choose_device("cpu", local_rank=3) == torch.device("cpu")
    assert device_type("cpu") == "cpu"
    assert torch_gpus().version == torch.__version__


def test_each_rank_has_a_gpu_of_its_own() -> None:
    check_placements([Placement(11, 2, 2), Placement(12, 2, 2)], True)
    # a scheduler may show each rank its own GPU alone; two nodes have others
    check_placements([Placement(number, 1, 2) for number in (11, 12, 13, 14)], True)
    check_placements([Placement(0, 0, 2), Placement(0, 0, 2)], False)


@pytest.mark.parametrize(
    ("placements", "code"),
    [
        ([Placement(11, 2, 3), Placement(12, 2, 3), Placement(11, 2, 3)], "gpu-shared"),
        ([Placement(11, 1, 2), Placement(11, 1, 2)], "gpu-shared"),
        ([Placement(11, 1, 1), Placement(0, 0, 1)], "gpu-missing"),
    ],
)
def test_ranks_that_would_share_a_gpu_or_have_none_are_refused(placements: Sequence[Placement], code: str) -> None:
    with raises(UsageError, code):
        check_placements(placements, True)


def test_several_ranks_on_gpus_need_nccl() -> None:
    with raises(UsageError, "nccl-missing"):
        check_placements([Placement(11, 2, 2), Placement(12, 2, 2)], False)


def test_ranks_agree_on_their_devices_and_are_refused_together(monkeypatch: pytest.MonkeyPatch) -> None:
    assert results(3, lambda each: assign_devices(each, "cpu", 60.0).type) == ["cpu"] * 3
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    if torch_gpus().count:
        pytest.skip("torch was using a GPU before the variable hid it")
    errors: list[type[Exception]] = []

    def refused(each: object) -> None:
        try:
            assign_devices(each, "cuda", 60.0)  # type: ignore[arg-type]  # `results` gives its own ranks
        except UsageError as error:
            errors.append(type(error))

    results(3, refused)
    assert sorted(error.__name__ for error in errors) == ["PeerFailedError", "PeerFailedError", "UsageError"]
    assert PeerFailedError in errors


def test_ranks_on_mig_slices_of_a_node_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "torch_gpus", lambda: TorchGpus("2.15.0+cu132", "CUDA 13.2", 1))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-4f2c,MIG-9a31")
    with raises(UsageError, "gpu-shared"):
        results(2, lambda each: assign_devices(each, "cuda", 60.0))


def test_devices_connect_by_a_small_sum_and_one_of_a_bucket_of_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    allreduce = SimulatedRanks.allreduce_async

    def note(self: SimulatedRanks, tensor: torch.Tensor, name: str) -> Pending:
        sizes.extend([tensor.numel()] * (self.rank == 0))
        return allreduce(self, tensor, name)

    monkeypatch.setattr(SimulatedRanks, "allreduce_async", note)
    results(3, lambda each: connect(each, torch.device("cpu"), 30.0))
    assert sizes == [1, _BUCKET]


@pytest.mark.parametrize(
    ("text", "kind", "code"),
    [
        ("NCCL error: unhandled cuda error\nFailed to CUDA calloc async 608 bytes", UsageError, "out-of-memory"),
        ("NCCL error: unhandled cuda error\nCuda failure 2 'out of memory'", UsageError, "out-of-memory"),
        ("CUDA error: uncorrectable ECC error encountered\nCUDA kernel errors might be", FaultError, "gpu-failed"),
        ("NCCL error: remote process exited or there was a network error", RankLostError, "rank-lost"),
    ],
)
def test_a_gpu_that_fails_or_is_too_full_for_nccl_is_no_lost_rank(text: str, kind: type[CodedError], code: str) -> None:
    for naming in (naming_lost_ranks(), _naming_breaks("gradient.0")):
        with raises(kind, code), naming:
            raise RuntimeError(text)


def test_a_process_whose_gpu_does_not_connect_ends(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ended = threading.Event()

    class Hanging(Communicator):
        size = 8

        def allreduce_async(self, tensor: torch.Tensor, name: str) -> Pending:
            assert ended.wait(PATIENCE)
            return Pending()

    monkeypatch.setattr(rendezvous, "current_launch", lambda: Launch("torchrun", 8, 3))
    monkeypatch.setattr(rendezvous, "_HEAD_START_SECONDS", 0.0)
    monkeypatch.setattr(rendezvous, "end_process", ended.set)
    connect(Hanging(), torch.device("cpu"), 0.05)
    assert "the 8 ranks have not connected" in capsys.readouterr().err


def test_gpus_that_nccl_does_not_connect_are_no_lost_rank() -> None:
    class Refusing(Communicator):
        size = 8

        def allreduce_async(self, tensor: torch.Tensor, name: str) -> Pending:
            return Operation(Mock(side_effect=RuntimeError("NCCL error\nLast error:\nibv_create_qp failed")), name)

    with raises(RankLostError, "ranks-cannot-meet") as caught:
        connect(Refusing(), torch.device("cpu"), 30.0)
    assert "8 ranks do not connect: NCCL error Last error: ibv_create_qp failed. Start again" in str(caught.value)


def test_who_joins_with_another_rank_s_gpu_is_refused_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dist_train.cluster.devices._identity", lambda device: device.index + 11)

    def join(each: SimulatedRanks) -> str:
        try:
            check_own_gpu(each, torch.device("cuda", each.rank % 2))
        except UsageError as error:
            return error.code
        return ""

    assert results(3, join) == ["", "", "gpu-shared"]
    results(3, lambda each: check_own_gpu(each, torch.device("cpu")))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "card 1; deterministic kernels alone, since comm.reduction is exact"),
        ({"comm": {"reduction": "float"}}, "card 1"),
        ({"precision": {"deterministic": True}, "comm": {"reduction": "float"}}, "card 1; deterministic kernels alone"),
    ],
)
def test_a_run_on_gpus_says_how_it_keeps_to_the_same_bits(
    settings: dict[str, object], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"card {device.index}")
    monkeypatch.setattr(devices, "why_no_triton", lambda: "")
    config = with_device(Config.model_validate(settings), "cuda")
    assert describe_device(config, torch.device("cuda", 1)) == words
    monkeypatch.setattr(devices, "why_no_triton", lambda: "no compiler")
    assert describe_device(config, torch.device("cuda", 1)).endswith("instead of our kernels (no compiler)")


def test_a_run_on_the_cpu_says_why_where_torch_is_built_for_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    assert "built for CUDA 13.2" in why_no_gpu(NOTHING)
    assert why_no_gpu(GpuSigns(("SLURM_JOB_GPUS=0",))) == ""
    monkeypatch.setattr(torch.version, "cuda", None)
    assert why_no_gpu(NOTHING) == ""


def test_a_processor_has_its_name_or_else_its_architecture(tmp_path: Path) -> None:
    (tmp_path / "x86").write_text("processor\t: 0\nmodel name\t: Abacus 9000: fast\n\nmodel name\t: another\n")
    (tmp_path / "variant").write_text("processor\t: 0\nBogoMIPS\t: 50.00\n")
    (tmp_path / "graviton").write_text("processor\t: 0\nCPU implementer\t: 0x41\nCPU part\t: 0xd4f\n")
    assert device_name(torch.device("cpu"), tmp_path / "x86") == "Abacus 9000: fast"
    assert device_name(torch.device("cpu"), tmp_path / "graviton") == f"{platform.machine()} 0xd4f"
    assert device_name(torch.device("cpu"), tmp_path / "variant") == platform.machine()
    assert device_name(torch.device("cpu"), tmp_path / "missing") == platform.machine()


def test_a_gpu_has_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"card {device.index}")
    assert device_name(torch.device("cuda", 1)) == "card 1"
