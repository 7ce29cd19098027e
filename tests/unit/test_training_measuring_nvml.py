"""What NVML says of a GPU, asked through pynvml of a library in NVML's place: no machine of these tests has a GPU."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest

from dist_train.rundir.records import RankMeasurement
from dist_train.training.measuring import GpuReader

ROOT = Path(__file__).parents[2]
Answer = tuple[list[dict[str, float]], list[str]]
ASK = """
import json, logging, sys
from dist_train.training.measuring import GpuReader
logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(message)s")
for uuid in sys.argv[1:]:
    reader = GpuReader(uuid)
    print(json.dumps([reader.read(), reader.read()]))
    print("next", file=sys.stderr)
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not shutil.which("gcc"):
        pytest.skip("needs gcc")
    folder = tmp_path_factory.mktemp("nvml")
    source, made = Path(__file__).with_name("fake_nvml.c"), folder / "libnvidia-ml.so.1"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", str(made), str(source)], check=True)
    return folder


@pytest.fixture(scope="module")
def answers(library: Path) -> Mapping[str, Answer]:
    """What a process that finds NVML reads of a GPU and of one that is not there."""
    gpus = ("GPU-1", "GPU-2")
    return dict(zip(gpus, ask(library, *gpus), strict=True))


def ask(folder: Path, *uuids: str) -> list[Answer]:
    """Return for each GPU what is read twice in a process that finds NVML in `folder`, and the lines of its log."""
    libraries = ":".join([str(folder), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])])
    environment = {**os.environ, "LD_LIBRARY_PATH": libraries}
    command = [sys.executable, "-c", ASK, *uuids]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    logs = [log.splitlines() for log in done.stderr.split("next\n")]
    return list(zip(map(json.loads, done.stdout.splitlines()), logs[:-1], strict=True))


def test_memory_power_clocks_throttling_and_errors_are_read_and_what_is_not_supported_is_asked_for_once(
    answers: Mapping[str, Answer],
) -> None:
    (first, second), log = answers["GPU-1"]
    assert first == {
        "device_utilization": 0.42,
        "device_used_bytes": 74_000,
        "device_power_watts": 687.5,
        "device_core_clock_hertz": 1.98e9,
        "device_memory_clock_hertz": 2.619e9,
        "device_throttle_reasons": 0x44,
        "device_corrected_errors": 1,
    }
    # the library counts its calls: the second was the only one that it refused
    assert second == {**first, "device_corrected_errors": 3}
    assert len(log) == 1
    assert "uncorrected_errors" in log[0]
    assert set(first) < set(RankMeasurement._fields)


def test_without_the_gpu_nothing_is_known(answers: Mapping[str, Answer]) -> None:
    readings, log = answers["GPU-2"]
    assert readings == [{}, {}]
    assert len(log) == 1


def test_without_nvml_nothing_is_known(tmp_path: Path) -> None:
    [(readings, log)] = ask(tmp_path, "GPU-2")
    assert readings == [{}, {}]
    assert len(log) == 1


def test_a_pynvml_without_one_of_the_functions_costs_that_number_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a later one may be, which no longer has the older name of a function."""
    power = {"nvmlDeviceGetPowerUsage": lambda gpu: 5000}
    library = SimpleNamespace(nvmlInit=lambda: None, nvmlDeviceGetHandleByUUID=str, **power)
    monkeypatch.setitem(sys.modules, "pynvml", library)
    assert GpuReader("GPU-1").read() == {"device_power_watts": 5.0}
