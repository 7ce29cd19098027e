"""The device, the threads, the precision."""

from __future__ import annotations

import gc
import math
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from itertools import product
from operator import attrgetter
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo import config as dynamo_settings
from torch.fx import GraphModule

from dist_train import start_up
from dist_train.api import export, load_run
from dist_train.cluster import devices
from dist_train.cluster.communicator import Communicator, GroupBrokenError, SingleProcess
from dist_train.cluster.devices import TorchGpus, choose_device
from dist_train.config import PrecisionSettings
from dist_train.kernels import operators
from dist_train.launching.assembly import _set_up_device, _with_micro_size
from dist_train.launching.run import train
from dist_train.models import build_loss
from dist_train.optim.flat_weights import FlatWeights
from dist_train.outcome import UsageError
from dist_train.training import compute as compute_module
from dist_train.training.compute import (
    Compute,
    compiled,
    is_out_of_memory,
    restoring_torch,
    runs_in_memory,
    set_up_compute,
    share_of_threads,
)
from dist_train.training.evaluation import evaluate_stored
from dist_train.training.trainer import Trainer
from tests.raising import raises
from tests.unit.simulated_ranks import results
from tests.unit.small_trainers import small_config, state_of

pytestmark = pytest.mark.usefixtures("threads_as_before")

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("variable", "local_size", "threads"),
    [("3", 1, 3), ("4,2", 8, 4), ("", 1, 6), ("0", 2, 3), ("many", 4, 1), ("-2", 3, 2), ("", 99, 1)],
)
def test_threads_are_what_is_asked_for_else_an_even_share_of_the_cores(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variable: str, local_size: int, threads: int
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", variable)
    monkeypatch.setattr(start_up, "_CGROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)))
    assert results(local_size, share_of_threads) == [threads] * local_size


def test_ranks_that_are_bound_to_cores_of_their_own_do_not_share_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    here = threading.local()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(start_up, "_CGROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: here.cores)

    def bound(comm: Communicator) -> int:
        here.cores = set(range(6)) if comm.rank < 2 else {6, 7, 8, 9}
        return share_of_threads(comm)

    assert results(3, bound) == [3, 3, 4]


def test_settings_choose_threads_and_precision() -> None:
    compute = set_up_compute(PrecisionSettings(threads=1, compute="bfloat16"), CPU)
    assert torch.get_num_threads() == 1
    weights = torch.ones(2, 2, device=compute.device)
    with compute.autocast():
        assert (weights @ weights).dtype == torch.bfloat16
    with set_up_compute(PrecisionSettings(threads=1), CPU).autocast():
        assert (weights @ weights).dtype == torch.float32


@pytest.mark.parametrize(
    ("compute", "instructions", "warnings"),
    [("bfloat16", "AVX2", 1), ("bfloat16", "AVX512", 0), ("bfloat16", "SVE256", 0), ("float32", "AVX2", 0)],
)
def test_bfloat16_on_a_processor_that_emulates_it_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, compute: str, instructions: str, warnings: int
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: instructions)
    set_up_compute(PrecisionSettings.model_validate({"threads": 1, "compute": compute}), CPU)
    assert [record.levelname for record in caplog.records] == ["WARNING"] * warnings


@pytest.mark.parametrize(
    ("settings", "code"), [({"compute": "float16"}, "float16-on-cpu"), ({"cuda_graphs": True}, "cuda-graphs-on-cpu")]
)
def test_what_needs_a_gpu_is_refused_on_a_cpu_with_the_fix(settings: dict[str, Any], code: str) -> None:
    with raises(UsageError, code):
        set_up_compute(PrecisionSettings(threads=1, **settings), CPU)


@pytest.mark.parametrize(
    ("compute", "capability", "hip", "triton", "refused"),
    [
        ("bfloat16", (7, 5), None, True, True),
        ("bfloat16", (7, 5), None, False, False),
        ("bfloat16", (8, 0), None, True, False),
        ("bfloat16", (12, 0), None, True, False),
        ("bfloat16", (7, 5), "6.2", True, False),
        ("float16", (7, 0), None, True, False),
    ],
)
def test_bfloat16_is_refused_on_a_gpu_that_lacks_it_where_our_kernels_need_it(
    monkeypatch: pytest.MonkeyPatch,
    compute: str,
    capability: tuple[int, int],
    hip: str | None,
    triton: bool,
    refused: bool,
) -> None:
    monkeypatch.setattr(operators, "has_triton", lambda: triton)
    monkeypatch.setattr(compute_module, "_check_triton", Mock())
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", {torch.device("cuda", 1): capability}.__getitem__)
    settings = PrecisionSettings.model_validate({"threads": 1, "compute": compute})
    with raises(UsageError, "bfloat16-on-old-gpu") if refused else nullcontext():
        set_up_compute(settings, torch.device("cuda", 1))


def test_triton_that_builds_no_kernel_is_one_message_with_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    settings, device = PrecisionSettings(threads=1), torch.device("cuda", 0)
    monkeypatch.setattr(operators, "has_triton", lambda: False)
    assert set_up_compute(settings, device).device == device
    monkeypatch.setattr(operators, "has_triton", lambda: True)
    monkeypatch.setattr(torch, "empty", Mock(side_effect=OSError(28, "No space left on device")))
    with raises(UsageError, "triton-unusable") as caught:
        set_up_compute(settings, device)
    assert "No space left on device" in str(caught.value)
    assert "DIST_TRAIN_TRITON=off" in str(caught.value)


@pytest.fixture
def _kernels_as_before() -> Iterator[None]:
    with restoring_torch():
        yield


@pytest.mark.usefixtures("_kernels_as_before")
def test_deterministic_sets_all_that_torch_offers() -> None:
    torch.backends.cudnn.benchmark = True
    set_up_compute(PrecisionSettings(threads=1, deterministic=True), CPU)
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert torch.backends.cudnn.deterministic
    assert not torch.backends.cudnn.benchmark
    assert torch.utils.deterministic.fill_uninitialized_memory is False  # type: ignore[attr-defined]  # set at run time


@pytest.mark.usefixtures("_kernels_as_before")
@pytest.mark.parametrize(
    ("reduction", "norm", "deterministic", "given", "algorithms"),
    [
        ("float", "ghost", True, {}, "^NVLS,NVLSTree"),
        ("float", "ghost", True, {"NCCL_ALGO": "NVLS"}, "NVLS"),
        ("float", "ghost", "auto", {}, None),
        ("exact", "ghost", True, {}, None),
        ("exact", "sync", "auto", {}, "^NVLS,NVLSTree"),  # the norms' sums are of floats
        ("exact", "sync", False, {}, None),
    ],
)
def test_only_where_floats_are_summed_deterministically_nccl_leaves_out_nvlink_s_switches(
    reduction: str,
    norm: str,
    deterministic: object,
    given: dict[str, str],
    algorithms: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "environ", {**given})
    precision, model = {"deterministic": deterministic}, {"norm": norm}
    config = small_config(run={"device": "cpu"}, comm={"reduction": reduction}, precision=precision, model=model)
    _set_up_device(config, SingleProcess())
    assert os.environ.get("NCCL_ALGO") == algorithms


@pytest.mark.usefixtures("_kernels_as_before")
@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("workspace", ["", ":16:8", ":0:0"])
def test_matrix_products_of_a_later_run_can_be_deterministic_with_the_same_bits(
    monkeypatch: pytest.MonkeyPatch, workspace: str, deterministic: bool
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", workspace)
    set_up_compute(PrecisionSettings(threads=1, deterministic=deterministic), CPU)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


def test_a_process_that_has_multiplied_on_a_gpu_before_is_told_to_start_anew() -> None:
    # As torch says it. It remembers what the variable was at the first product.
    error = RuntimeError(
        "Deterministic behavior was enabled with either `torch.use_deterministic_algorithms(True)` or "
        "`at::Context::setDeterministicAlgorithms(true)`, but this operation is not deterministic because it uses "
        "CuBLAS and you have CUDA >= 10.2. To enable deterministic behavior in this case, you must set an environment "
        "variable before running your PyTorch application: CUBLAS_WORKSPACE_CONFIG=:4096:8 or "
        "CUBLAS_WORKSPACE_CONFIG=:16:8. For more information, go to https://docs.nvidia.com/cuda/cublas/index.html"
    )
    with raises(UsageError, "kernel-not-deterministic") as caught:
        runs_in_memory(Mock(side_effect=error))
    assert "CUBLAS_WORKSPACE_CONFIG=:4096:8" in str(caught.value)


@pytest.mark.usefixtures("_kernels_as_before")
def test_kernels_are_deterministic_only_where_the_settings_say_so() -> None:
    torch.use_deterministic_algorithms(mode=True)
    torch.backends.cudnn.deterministic = True
    set_up_compute(PrecisionSettings(threads=1), CPU)
    assert not torch.are_deterministic_algorithms_enabled()
    assert not torch.backends.cudnn.deterministic


def settings_of_torch() -> tuple[object, ...]:
    cudnn = torch.backends.cudnn
    of_gradients = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    of_new_tensors = torch.get_default_dtype(), torch.get_default_device()
    of_passes = torch.is_autocast_enabled("cpu"), torch.is_autocast_cache_enabled()
    of_kernels = torch.get_deterministic_debug_mode(), cudnn.deterministic, cudnn.benchmark
    precision = cudnn.allow_tf32, torch.get_float32_matmul_precision()
    return torch.get_num_threads(), of_gradients, of_new_tensors, of_passes, of_kernels, precision


@pytest.fixture
def _callers_own() -> Iterator[None]:
    """What a caller may have set that a run must neither depend on nor change."""
    with restoring_torch(), torch.inference_mode(), torch.device("meta"), torch.autocast("cpu"):
        torch.set_num_threads(2)
        torch.set_default_dtype(torch.float64)
        torch.use_deterministic_algorithms(mode=True, warn_only=True)
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("medium")
        yield


@pytest.mark.usefixtures("_callers_own")
def test_training_and_evaluating_neither_depend_on_the_caller_s_torch_nor_change_it(tmp_path: Path) -> None:
    before = settings_of_torch()
    assert train(small_config(), tmp_path / "run").state == "finished"
    found = evaluate_stored(tmp_path / "run", "test", [])
    assert settings_of_torch() == before
    with restoring_torch():
        assert train(small_config(), tmp_path / "other").state == "finished"
        assert evaluate_stored(tmp_path / "other", "test", [])["loss"] == found["loss"]


@pytest.mark.parametrize("fails", [False, True])
def test_the_caller_s_gpu_is_current_again_after_a_run_and_hides_no_error_of_it(
    monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    current = [1]

    def set_device(device: torch.device | int) -> None:
        if fails and device == 1:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        current[0] = device if isinstance(device, int) else device.index

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    monkeypatch.setattr(devices, "torch_gpus", lambda: TorchGpus(torch.__version__, "CUDA 13.0", 4))
    monkeypatch.setattr(torch, "ones", Mock())

    @restoring_torch()
    def run() -> None:
        assert choose_device("cuda", local_rank=3) == torch.device("cuda", 3)
        assert current == [3]
        raise UsageError("no more memory", code="out-of-memory")

    with raises(UsageError, "out-of-memory"):
        run()
    assert current == [3 if fails else 1]


@pytest.mark.usefixtures("_callers_own")
def test_the_model_of_a_run_does_not_depend_on_the_caller_s_torch(tmp_path: Path) -> None:
    before = settings_of_torch()
    assert train(small_config(data={"normalize": True}), tmp_path / "run").state == "finished"
    run = load_run(tmp_path / "run")
    for tensor in run.model().state_dict().values():
        assert (tensor.dtype, tensor.device, tensor.is_inference()) == (torch.float32, CPU, False)
    assert export(tmp_path / "run", "safetensors", tmp_path / "model.safetensors").difference == 0.0
    found = run.normalization()
    assert {(images.device, images.dtype, labels.device) for images, labels in run.batches()} == {
        (CPU, torch.float32, CPU)
    }
    assert settings_of_torch() == before
    with restoring_torch():
        assert found == run.normalization()


def test_products_are_of_float32_whatever_the_caller_chose() -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(256, 256, generator=generator) for _ in range(2))
    with restoring_torch():
        torch.set_float32_matmul_precision("medium")  # bfloat16, on CPUs that have it
        set_up_compute(PrecisionSettings(threads=1), CPU)
        assert (left @ right - left.double() @ right.double()).abs().max() < 1e-3
        assert torch.get_float32_matmul_precision() == "highest"


def trainers() -> list[Trainer]:
    return [each for each in gc.get_objects() if type(each) is Trainer]


def test_the_memory_of_a_run_is_free_for_the_next_one(tmp_path: Path) -> None:
    before, exempt = trainers(), gc.get_freeze_count()
    assert train(small_config(), tmp_path).state == "finished"
    assert gc.get_freeze_count() <= exempt  # less if something that was imported has been freed meanwhile
    gc.collect()
    assert [id(each) for each in trainers()] == [id(each) for each in before]


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_casts_of_weights_are_not_kept_within_the_caller_s_autocast(depth: int) -> None:
    layer, inputs = nn.Linear(2, 2, bias=False), torch.ones(1, 2)
    with ExitStack() as stack:
        for _ in range(depth):
            stack.enter_context(torch.autocast("cpu"))
        with restoring_torch():
            assert (inputs @ inputs.T).dtype == torch.float32
            for value in (1.0, 2.0):
                nn.init.constant_(layer.weight, value)
                with Compute(CPU, torch.bfloat16).autocast():
                    assert layer(inputs).tolist() == [[2 * value] * 2]
        assert torch.is_autocast_enabled("cpu") == (depth > 0)
        assert torch.autocast_increment_nesting() == depth + 1
        assert torch.autocast_decrement_nesting() == depth


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="needs torch 2.9")
@pytest.mark.usefixtures("_kernels_as_before")
@pytest.mark.parametrize("tf32", [True, False])
@pytest.mark.parametrize(
    ("place", "precision"),
    [
        ("backends", "tf32"),
        ("backends", "bf16"),
        ("backends.cudnn", "tf32"),
        ("backends.cudnn.conv", "ieee"),
        ("backends.cuda.matmul", "tf32"),
        ("backends.mkldnn.conv", "bf16"),
    ],
)
def test_precisions_set_by_the_newer_name_count_again_after_a_run_and_not_in_it(
    place: str, precision: str, tf32: bool
) -> None:
    owner: Any = attrgetter(place)(torch)
    owner.fp32_precision = precision
    before = precisions()
    with restoring_torch():
        set_up_compute(PrecisionSettings(threads=1, tf32=tf32), CPU)
        of_run = "tf32" if tf32 else "none"
        assert precisions() == {
            ("generic", "all"): "none",
            ("cuda", "all"): "none",
            ("cuda", "matmul"): "tf32" if tf32 else "ieee",
            ("cuda", "conv"): of_run,
            ("cuda", "rnn"): of_run,
            ("mkldnn", "all"): "none",
            ("mkldnn", "matmul"): "ieee",
            ("mkldnn", "conv"): "none",
            ("mkldnn", "rnn"): "none",
        }
        # torch.compile reads these, and fails where they contradict the newer ones.
        assert torch.backends.cudnn.allow_tf32 is torch.backends.cuda.matmul.allow_tf32 is tf32
        assert torch.get_float32_matmul_precision() == ("high" if tf32 else "highest")
    assert precisions() == before


def precisions() -> dict[tuple[str, str], str]:
    """What torch's operators look up."""
    kinds = [("generic", "all"), *product(("cuda", "mkldnn"), ("all", "matmul", "conv", "rnn"))]
    return {kind: torch._C._get_fp32_precision_getter(*kind) for kind in kinds}


class Putting(nn.Module):
    """A network that needs an operator without a deterministic kernel."""

    def __init__(self, images: Any, width: float, norm: object) -> None:
        super().__init__()
        self.layer = nn.Linear(math.prod(images.shape), images.classes)

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.layer(inputs.flatten(1))
        return logits + torch.zeros(1).put_(torch.tensor([0]), torch.ones(1))


def test_deterministic_of_one_run_does_not_reach_the_next(tmp_path: Path) -> None:
    model = {"name": f"{__name__}:Putting", "norm": "none"}
    for name, deterministic in (("first", False), ("second", True), ("third", False)):
        config = small_config(model=model, precision={"deterministic": deterministic})
        with raises(UsageError, "kernel-not-deterministic") if deterministic else nullcontext():
            assert train(config, tmp_path / name).state == "finished"


@pytest.mark.usefixtures("_kernels_as_before")
@pytest.mark.parametrize("tf32", [True, False])
def test_tf32_is_what_the_settings_say_for_convolutions_and_products(tf32: bool) -> None:
    set_up_compute(PrecisionSettings(threads=1, tf32=tf32), CPU)
    assert torch.backends.cudnn.allow_tf32 is tf32
    assert torch.backends.cuda.matmul.allow_tf32 is tf32
    assert torch.get_float32_matmul_precision() == ("high" if tf32 else "highest")
    assert PrecisionSettings().tf32 is False


@pytest.mark.parametrize(
    ("error", "out_of_memory"),
    [
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"), True),
        (RuntimeError("Triton Error [CUDA]: out of memory"), True),
        (RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"), False),
        (RuntimeError("Unable to find a valid cuDNN algorithm to run convolution"), True),
        (RuntimeError("FIND was unable to find an engine to execute this computation"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`"), False),
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (GroupBrokenError("rank 1 (node, process 7) failed: DefaultCPUAllocator: can't allocate memory"), False),
        (RuntimeError("shapes cannot be multiplied"), False),
        (ValueError("x"), False),
    ],
)
def test_a_lack_of_memory_is_told_from_other_errors(error: Exception, out_of_memory: bool) -> None:
    assert is_out_of_memory(error) is out_of_memory


@dataclass
class Compiler:
    """A backend of torch.compile that runs what it is given, and notes the sizes of the batches it is given it for."""

    sizes: list[int | str] = field(default_factory=list)

    def __call__(self, graph: GraphModule, inputs: Sequence[Tensor]) -> GraphModule:
        # Others are parameters, and a size that is to remain open.
        batches = [each for each in inputs if isinstance(each, Tensor) and not isinstance(each, nn.Parameter)]
        self.sizes += [size if isinstance(size, int) else "any" for size in (each.shape[0] for each in batches)]
        return graph


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[Compiler]:
    """The backend in place of torch's own, which takes long."""
    compiler, compile_by = Compiler(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda network, **how: compile_by(network, backend=compiler, **how))
    torch.compiler.reset()
    # torch.compile's default
    with dynamo_settings.patch(recompile_limit=8):
        yield compiler


def test_each_size_of_a_batch_has_compiled_kernels_of_its_own(compiler: Compiler) -> None:
    model = compiled(nn.Conv2d(1, 1, 1), sizes=2)
    for size in (64, 50, 64, 14):
        model(torch.zeros(size, 1, 2, 2)).sum().backward()
    assert compiler.sizes == [64, 50, 14]


@pytest.mark.parametrize("deterministic", [True, False])
def test_compiled_kernels_are_not_chosen_by_their_time_if_they_must_be_deterministic(
    deterministic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: deterministic)
    compile_by = Mock()
    monkeypatch.setattr(torch, "compile", compile_by)
    compiled(nn.Conv2d(1, 1, 1), sizes=1)
    options = compile_by.call_args.kwargs["options"]
    assert (options is not None) == deterministic
    assert not deterministic or not (options["dynamic_scale_rblock"] or options["shape_padding"])


def test_all_sizes_of_a_long_batch_schedule_are_compiled(compiler: Compiler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dist_train.training.compute._GRAPHS_OF_A_SIZE", 1)
    sizes = range(2, 14)
    model = compiled(nn.Conv2d(1, 1, 1), sizes=len(sizes))
    for size in sizes:
        model(torch.zeros(size, 1, 2, 2))
    assert compiler.sizes == list(sizes)


def test_sizes_that_were_tried_leave_no_compiled_kernels(compiler: Compiler) -> None:
    config = small_config(batch={"global_size": 16, "micro_size": "auto"}, precision={"compile": True})
    network = nn.Sequential(nn.Conv2d(1, 1, 1), nn.Flatten(), nn.Linear(64, 10))
    state = state_of(network, FlatWeights(network), torch.optim.SGD(network.parameters()))
    model, loss, compute = compiled(network, sizes=2), build_loss(config, CPU), Compute(CPU, torch.float32)
    assert _with_micro_size(config, SingleProcess(), model, loss, state, compute) != config
    model(torch.zeros(16, 1, 8, 8))
    assert compiler.sizes == [2, 4, 8, 16, 16]


def test_sizes_that_were_tried_leave_no_trace_in_buffers() -> None:
    config = small_config(batch={"global_size": 16, "micro_size": "auto"})
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(64, 10))
    state = state_of(model, FlatWeights(model), torch.optim.SGD(model.parameters()))
    loss, compute = build_loss(config, CPU), Compute(CPU, torch.float32)
    assert _with_micro_size(config, SingleProcess(), model, loss, state, compute) != config
    buffers = dict(model.named_buffers())
    assert [buffers[f"1.{name}"].item() for name in ("running_var", "num_batches_tracked")] == [1, 0]
