from __future__ import annotations

import errno
import io
import json
import os
import re
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
from rich.console import Console

from dist_train.cli.main import parse
from dist_train.cluster import devices, inspection
from dist_train.config import Config
from dist_train.config.sections import Device, Engine
from dist_train.kernels import operators
from dist_train.launching import doctor
from dist_train.outcome import ExitCode
from tests.archives import write_fashion_mnist
from tests.programs import write_programs
from tests.unit.image_folders import write_folder


def settings(**sections: dict[str, object]) -> Config:
    return Config.model_validate(sections)


def run_doctor(*arguments: str) -> int:
    parsed = parse(["doctor", *arguments])
    return int(parsed.run(parsed))


def test_a_machine_that_is_set_up_can_train(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_doctor() == ExitCode.FINISHED
    printed = capsys.readouterr().out
    assert "training can run here" in printed
    for name in ("Python", "torch", "devices", "Horovod", "MPI", "libraries", "launchers", "Slurm", "metrics", "cache"):
        assert name in printed


def test_without_torch_nothing_else_is_checked() -> None:
    """In a process of its own: here, torch has long been imported."""
    program = "import sys; sys.modules['torch'] = None; from dist_train.cli.main import main; sys.exit(main())"
    done = subprocess.run([sys.executable, "-c", program, "doctor", "--json"], capture_output=True, text=True)
    assert done.returncode == ExitCode.FAULT, done.stderr
    assert [(check["name"], check["state"]) for check in json.loads(done.stdout)["checks"]] == [
        ("Python", "fine"),
        ("torch", "fails"),
    ]


def test_a_torch_that_fails_in_any_way_is_a_finding(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ValueError('libcublas.so not found in the system path')")
    command = [sys.executable, "-m", "dist_train", "doctor", "--json"]
    variables = {**os.environ, "PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[2]}"}
    done = subprocess.run(command, env=variables, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == ExitCode.FAULT, done.stderr
    assert json.loads(done.stdout)["checks"][1]["state"] == "fails"


def test_slurm_that_does_not_work_is_told_with_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "srun").write_text(
        "#!/bin/sh\necho 'srun: error: first' >&2\necho 'srun: fatal: no source' >&2\nexit 1\n"
    )
    (tmp_path / "srun").chmod(0o700)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    check = doctor.check_slurm()
    assert (check.state, check.detail) == ("note", "srun fails: srun: fatal: no source")


def test_where_srun_has_no_pmix_the_ranks_of_torch_need_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_programs(tmp_path, srun="echo slurm 24.11.5")
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    check = doctor.check_slurm()
    assert (check.state, check.detail) == ("note", "slurm 24.11.5, without PMIx")
    assert "comm.engine=torch" in check.fix


def test_data_that_the_configuration_names_must_be_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(f"data: {{name: cifar10, root: {tmp_path}}}\n")
    assert run_doctor(str(file), f"run.directory={tmp_path}") == ExitCode.FAULT
    printed = " ".join(capsys.readouterr().out.split())
    assert "FAILS data CIFAR-10: found neither" in printed
    assert "data.download=true" in printed
    assert "training cannot run here: 1 to fix" in printed


@pytest.mark.parametrize(("folder", "named"), [("nowhere", "data.root"), ("images", "data.classes")])
def test_data_that_do_not_fit_the_settings_fail_and_the_setting_alone_is_named(
    folder: str, named: str, tmp_path: Path
) -> None:
    write_folder(tmp_path / "images")
    data = {"name": "imagefolder", "classes": 2, "root": str(tmp_path / folder)}
    check = doctor.check_data(settings(data=data).data)
    assert check.state == "fails"
    assert set(re.findall(r"data\.\w+", check.detail + check.fix)) == {named}


@pytest.mark.parametrize("sections", [{"batch": {"global_size": 8192}}, {"run": {"init_from": "/no/weights.pth"}}])
def test_settings_that_train_refuses_fail(sections: dict[str, dict[str, object]]) -> None:
    usable: dict[str, dict[str, object]] = {"data": {"name": "synthetic"}, "batch": {"global_size": 100}}
    assert doctor.check_configuration(settings(**usable)).state == "fine"
    check = doctor.check_configuration(settings(**{**usable, **sections}))
    assert (check.state, bool(check.fix)) == ("fails", True)


def test_json_is_one_document(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_doctor("--json") == ExitCode.FINISHED
    found = json.loads(capsys.readouterr().out)
    assert found["can_train"] is True
    assert {"name", "state", "detail", "fix"} == set(found["checks"][0])
    documented = (Path(__file__).parents[2] / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert all(f"`{field}`" in documented for field in (*found, *found["checks"][0]))


def test_data_in_the_named_folder_are_found(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write_fashion_mnist(tmp_path, split)
    check = doctor.check_data(settings(data={"name": "fashion-mnist", "root": str(tmp_path)}).data)
    assert check.state == "fine"


def test_data_that_the_run_will_fetch_are_no_fault(tmp_path: Path) -> None:
    check = doctor.check_data(settings(data={"name": "cifar100", "root": str(tmp_path), "download": True}).data)
    assert check.state == "note"


def test_missing_data_are_no_fault_where_no_configuration_names_them() -> None:
    checks = doctor.check_known_data()
    assert len(checks) == 3
    assert doctor.can_train(checks)
    assert all(check.fix for check in checks if check.state == "note")


@pytest.mark.parametrize(("is_needed", "state"), [(False, "note"), (True, "fails")])
def test_cache_that_cannot_be_written_fails_where_it_is_needed(
    is_needed: bool, state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("DIST_TRAIN_CACHE", str(tmp_path / "file" / "cache"))
    check = doctor.check_cache(is_needed=is_needed)
    assert (check.state, "DIST_TRAIN_CACHE" in check.fix) == (state, True)


def test_port_that_replaces_one_in_use_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        check = doctor.check_metrics_port(settings(metrics={"port": port}))
    assert check.state == "fine"
    assert int(check.detail.rpartition(" ")[2]) > port


def test_address_of_another_machine_is_told_with_a_fix() -> None:
    check = doctor.check_metrics_port(settings(metrics={"host": "192.0.2.1"}))
    assert check.state == "note"
    assert "metrics.host" in check.fix


def test_a_free_port_is_fine() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    assert doctor.check_metrics_port(settings(metrics={"port": port})).state == "fine"


def test_a_run_directory_below_a_file_fails(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    check = doctor.check_disk("run directory", tmp_path / "file" / "runs")
    assert check.state == "fails"
    assert "--run-dir" in check.fix


@pytest.mark.parametrize("target", ["purged", "link"])
def test_a_run_directory_below_a_link_that_leads_nowhere_fails(tmp_path: Path, target: str) -> None:
    (tmp_path / "link").symlink_to(tmp_path / target)
    check = doctor.check_disk("run directory", tmp_path / "link" / "runs")
    assert (check.state, str(tmp_path / "link") in check.detail) == ("fails", True)


def test_a_run_directory_in_a_folder_that_may_not_be_entered_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    private = tmp_path / "private"
    private.mkdir()

    def stat(path: str | os.PathLike[str], **options: bool) -> os.stat_result:
        if private in Path(path).parents:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return genuine(path, **options)

    genuine = os.stat
    monkeypatch.setattr(os, "stat", stat)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != private)
    check = doctor.check_disk("run directory", private / "runs")
    assert (check.state, str(private) in check.detail) == ("fails", True)


def test_a_disk_without_room_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.check_disk("run directory", tmp_path / "not" / "yet").state == "fine"
    monkeypatch.setattr(doctor, "_LEAST_DISK", 1 << 60)
    check = doctor.check_disk("run directory", tmp_path / "not" / "yet")
    assert check.state == "fails"
    assert "free at least" in check.fix


def test_every_finding_that_is_not_fine_reads_with_its_fix_below_it() -> None:
    checks = (
        doctor.Check("one", "fine", "works"),
        doctor.Check("two", "fails", "is broken", "mend it"),
    )
    page = io.StringIO()
    doctor.render(checks, Console(file=page, width=80))
    lines = [line.rstrip() for line in page.getvalue().splitlines()]
    assert lines[0].split() == ["ok", "one", "works"]
    assert lines[1].split() == ["FAILS", "two", "is", "broken"]
    assert lines[2].strip() == "-> mend it"
    assert not doctor.can_train(checks)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, and torch can use it")
def test_gpus_that_torch_cannot_use_fail_unless_the_run_is_for_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    check = doctor.check_devices("auto")
    assert check.state == "fails"
    assert "CUDA_VISIBLE_DEVICES=0,1" in check.detail
    assert "run.device=cpu" in check.fix
    assert doctor.check_devices("cpu").state == "note"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, and torch can use it")
def test_a_machine_without_gpus_is_fine_unless_the_run_asks_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert doctor.check_devices("auto").state == "fine"
    assert doctor.check_devices("cpu").state == "fine"
    check = doctor.check_devices("cuda")
    assert check.state == "fails"
    assert "run.device=cpu" in check.fix


@pytest.mark.parametrize(
    ("version", "cuda", "state"),
    [
        ("2.4.0+cu121", "12.1", "note"),
        ("2.9.1+cu128", "12.8", "note"),
        ("2.10.0a0+git1", "13.0", "fine"),
        ("2.13.0+cu130", "13.0", "fine"),
        ("3.0.0+cu140", "14.0", "fine"),
        ("2.9.1+cpu", None, "fine"),
    ],
)
def test_a_torch_with_which_runs_on_gpus_do_not_outlive_a_rank_is_noted(
    version: str, cuda: str | None, state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    check = doctor.check_torch()
    assert (check.state, bool(check.fix)) == (state, state == "note")


def test_a_torch_for_amd_s_gpus_is_not_called_one_for_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", "7.2")
    assert "built for ROCm 7.2" in doctor.check_torch().detail


@pytest.mark.parametrize(("why", "state"), [("", "fine"), ("no compiler", "note")])
def test_gpus_without_our_kernels_are_noted(why: str, state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "torch_gpus", lambda: devices.TorchGpus("2.15.0", "CUDA 13.2", 1))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "card")
    monkeypatch.setattr(operators, "why_no_triton", lambda: why)
    check = doctor.check_devices("auto")
    assert (check.state, bool(check.fix)) == (state, bool(why))
    assert why in check.detail
    check = doctor.check_devices("cpu")
    assert check.state == "fine"
    assert "at most 1 rank" not in check.detail, "as many as there are cores"


@pytest.mark.parametrize(
    ("asked", "gpus", "nccl", "state"),
    [
        ("auto", 2, False, "note"),
        ("auto", 1, False, "note"),
        # a login node
        ("auto", 0, False, "note"),
        ("cpu", 2, False, "fine"),
        ("auto", 2, True, "fine"),
    ],
)
def test_a_horovod_without_nccl_beside_a_torch_for_gpus_is_noted(
    asked: Device, gpus: int, nccl: bool, state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inspection, "horovod_build", lambda: {"MPI": True, "Gloo": True, "NCCL": nccl})
    monkeypatch.setattr(devices, "torch_gpus", lambda: devices.TorchGpus("2.15.0", "CUDA 13.2", gpus))
    check = doctor.check_horovod(asked, "auto")
    assert check.state == state
    assert bool(check.fix) is (state != "fine")


def test_a_horovod_that_does_not_load_is_noted_with_a_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "horovod.torch", None)
    check = doctor.check_horovod("auto", "auto")
    assert check.state == "note"
    assert "make setup" in check.fix


@pytest.mark.parametrize(("engine", "named"), [("auto", "torch.distributed"), ("horovod", "comm.engine=horovod")])
def test_a_horovod_that_is_missing_is_said_to_be_needed_where_it_is_asked_for(
    engine: Engine, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "horovod.torch", None)
    monkeypatch.setattr(doctor, "is_installed", lambda module: False)
    check = doctor.check_horovod("auto", engine)
    assert check.state == "note"
    assert named in check.detail


def test_the_libraries_of_analyses_reports_and_models_are_listed_with_their_versions() -> None:
    check = doctor.check_libraries()
    assert check.state == "fine"
    for package in (
        "torchvision",
        "timm",
        "nvidia-ml-py",
        "pillow",
        "prometheus-client",
        "scipy",
        "matplotlib",
        "jinja2",
        "uniplot",
    ):
        assert f"{package} {metadata.version(package)}" in check.detail


def test_a_library_that_does_not_load_is_named_with_what_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.sparse.linalg", None)
    check = doctor.check_libraries()
    assert check.state == "note"
    assert "scipy, needed by dist-train sharpness, cannot be loaded" in check.detail
    assert f"matplotlib {metadata.version('matplotlib')}" in check.detail
    assert "make setup" in check.fix


def test_libraries_that_fail_in_any_way_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # as torchvision fails beside a torch that it was not built for
    for name in ("torchvision", "horovod"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
        for loaded in [module for module in sys.modules if module.partition(".")[0] == name]:
            monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.syspath_prepend(tmp_path)
    assert "torchvision, needed by ResNets, cannot be loaded" in doctor.check_libraries().detail
    assert doctor.check_horovod("auto", "auto").state == "note"


def test_a_host_name_that_does_not_resolve_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("localhost", "::1"):  # gethostbyname knows no IPv6
        monkeypatch.setattr(socket, "gethostname", lambda name=name: name)
        assert doctor.check_host_name().state == "fine"
    monkeypatch.setattr(socket, "gethostname", lambda: "nowhere.invalid")
    check = doctor.check_host_name()
    assert check.state == "note"
    assert "/etc/hosts" in check.fix


def test_horovod_and_mpi4py_load_one_mpi() -> None:
    build = inspection.horovod_build()
    assert build["MPI"]
    assert build["Gloo"]
    assert "MPI" in inspection.mpi_library()
    assert len(inspection.loaded_mpi_libraries()) == 1


def test_the_launcher_is_the_one_that_the_set_up_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    program = tmp_path / "elsewhere" / "mpirun"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    (tmp_path / "setup.env").write_text(f"mpi=system\nmpirun={program}\n")
    assert inspection.launcher("mpirun") == program


def test_several_ranks_need_no_launcher_of_mpi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    check = doctor.check_launchers()
    assert (check.state, check.detail) == ("note", "horovodrun: missing, mpirun: missing")
    assert "dist-train launch" in check.fix
