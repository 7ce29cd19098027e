"""The set-up scripts: what they refuse, and what they do not repeat."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from tests.torture.disk import can_mount
from tests.waiting import PATIENCE

ROOT = Path(__file__).parents[2]
FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
TOOLS = (
    "bash",
    "env",
    "cat",
    "cut",
    "dirname",
    "id",
    "ls",
    "mkdir",
    "mktemp",
    "rm",
    "sed",
    "grep",
    "head",
    "sha256sum",
)


def run(*command: str | Path, environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        list(map(str, command)),
        env=dict(environment),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
        stdin=subprocess.DEVNULL,
    )


def environment(**changes: str) -> dict[str, str]:
    return {**os.environ, **changes}


def bare_path(folder: Path, *programs: str) -> str:
    """Return a PATH with only a few basic programs and `programs`."""
    folder.mkdir()
    for name in (*TOOLS, *programs):
        found = shutil.which(name)
        assert found, name
        (folder / name).symlink_to(found)
    return str(folder)


WITHOUT_HEADERS = 'echo "mpicxx: Open MPI 5.0.7"; case $1 in --showme*) ;; *) exit 1 ;; esac'


def write_scripts(folder: Path, **programs: str) -> None:
    """Write shell scripts with these texts into `folder`."""
    folder.mkdir(exist_ok=True)
    for name, text in programs.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A copy of the files that the set-up reads, without `.venv`."""
    copy = tmp_path / "clone"
    shutil.copytree(ROOT / "docker", copy / "docker")
    for name in ("pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, copy / name)
    return copy


UNREACHABLE = {"PIP_INDEX_URL": "http://127.0.0.1:9/", "PIP_RETRIES": "0", "PIP_CONFIG_FILE": os.devnull}


def clean_environment(**changes: str) -> dict[str, str]:
    """Return this environment with changes, without the machine's settings of pip and of the set-up."""
    dropped = ("PIP_FIND_LINKS", "PIP_CONSTRAINT", "DEVICE", "DIST_TRAIN_NVCC", "CUDA_HOME", "DIST_TRAIN_MPI")
    return {name: value for name, value in environment(**changes).items() if name not in dropped or name in changes}


@pytest.fixture(autouse=True)
def _own_temporary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))


def short_error(result: subprocess.CompletedProcess[str]) -> str:
    """Return the message of a failed set-up, which must fit on one screen."""
    assert result.returncode == 1, result.stderr
    text = result.stderr[result.stderr.index("error: ") :]
    assert len(text.splitlines()) <= 24
    assert "Traceback" not in text
    return text


@pytest.fixture
def cuda_python(tmp_path: Path) -> Path:
    """A Python with a fake torch for CUDA 13.2, which has only what the scripts read."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    (packages,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    tools = next(path for path in sys.path if path.endswith("site-packages"))
    (packages / "tools.pth").write_text(f"{tools}\n")
    for name, text in {
        "torch/__init__.py": "from . import version\n__version__ = version.__version__",
        "torch/version.py": "__version__ = '2.15.0+cu132'\ncuda = '13.2'",
        "torch/include/torch/all.h": "#if __cplusplus < 202002L\n#error C++20 is required\n#endif",
        "nvidia/nccl/include/nccl.h": "#define NCCL_MAJOR 2\n#define NCCL_MINOR 30\n#define NCCL_PATCH 7",
        "nvidia/nccl/lib/libnccl.so.2": "",
    }.items():
        (packages / name).parent.mkdir(parents=True, exist_ok=True)
        (packages / name).write_text(f"{text}\n")
    return tmp_path / "venv" / "bin" / "python"


def build_horovod(python: Path, cache: Path, **changes: str) -> subprocess.CompletedProcess[str]:
    tools = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    variables = (
        clean_environment(PATH=tools, DIST_TRAIN_CACHE=str(cache), DIST_TRAIN_NVCC="wheel", **UNREACHABLE) | changes
    )
    return run(ROOT / "docker/horovod_wheel.sh", python, environment=variables)


@pytest.fixture(scope="module")
def record() -> dict[str, str]:
    """The record of this checkout's set-up; skips where another Python runs the tests: set-up would replace `.venv`."""
    if Path(sys.prefix).resolve() != (ROOT / ".venv").resolve():
        pytest.skip("these tests are not run by the .venv of this checkout")
    lines = (ROOT / ".venv" / "setup.env").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines)


@pytest.mark.parametrize("script", ["environment", "horovod_wheel", "fashion_mnist", "debian_packages"])
def test_help_is_the_header_of_the_script_and_changes_nothing(clone: Path, tmp_path: Path, script: str) -> None:
    path = clone / f"docker/{script}.sh"
    result = run(path, "--help", environment={"PATH": bare_path(tmp_path / "bin"), "HOME": str(tmp_path)})
    assert result.returncode == 0, result.stderr
    assert path.read_text().splitlines()[1] == f"# {result.stdout.splitlines()[0]}"
    assert not (clone / ".venv").exists()


def test_set_up_takes_no_arguments(clone: Path) -> None:
    result = run(clone / "docker/environment.sh", "PYTHON=python3.12", environment=environment())
    assert result.returncode == 1
    assert result.stderr.startswith("error: it takes no arguments")
    assert not (clone / ".venv").exists()


def test_missing_compiler_is_one_message_with_the_fix(clone: Path, tmp_path: Path) -> None:
    result = run(
        clone / "docker/environment.sh",
        environment={"PATH": bare_path(tmp_path / "bin"), "HOME": str(tmp_path)},
    )
    assert result.returncode == 1
    assert result.stderr.startswith("error: g++ is missing")
    assert "apt-get install g++" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not (clone / ".venv").exists()


def test_a_blank_in_the_path_is_one_message_before_anything_is_installed(clone: Path) -> None:
    folder = clone.rename(clone.with_name("my clone"))
    result = run(folder / "docker/environment.sh", environment=clean_environment(PYTHON=sys.executable, **UNREACHABLE))
    assert (result.returncode, len(result.stderr.splitlines())) == (1, 1)
    assert str(folder) in result.stderr
    assert not (folder / ".venv").exists()


def test_missing_python_is_one_message_with_the_fix(clone: Path) -> None:
    result = run(clone / "docker/environment.sh", environment=environment(PYTHON="/no/python3"))
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("error: /no/python3 is missing or older than 3.11")
    assert not (clone / ".venv").exists()


def test_unknown_choice_of_mpi_is_refused(clone: Path) -> None:
    result = run(clone / "docker/environment.sh", environment=environment(DIST_TRAIN_MPI="mpich"))
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == "error: DIST_TRAIN_MPI is 'mpich'; it must be system or wheel"
    assert not (clone / ".venv").exists()


@pytest.mark.parametrize("choice", [{"DIST_TRAIN_MPI": "mpich"}, {"DIST_TRAIN_NVCC": "nvc"}, {"PYTHON": "/no/python3"}])
def test_mistaken_choice_leaves_what_stands(clone: Path, choice: Mapping[str, str]) -> None:
    standing = clone / ".venv" / "lib"
    standing.mkdir(parents=True)
    result = run(clone / "docker/environment.sh", environment=environment(**choice))
    assert result.returncode == 1
    assert standing.is_dir()


def test_requested_mpi_without_headers_is_refused(clone: Path, tmp_path: Path) -> None:
    # Debian's openmpi-bin has the compiler's wrapper, and libopenmpi-dev the header.
    write_scripts(tmp_path / "bin", mpicxx=WITHOUT_HEADERS, mpirun="")
    changed = environment(PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}", DIST_TRAIN_MPI="system")
    result = run(clone / "docker/environment.sh", environment=changed)
    assert result.returncode == 1
    assert "the PATH has no mpicxx that builds a program" in result.stderr.splitlines()[-1]
    assert "libopenmpi-dev" in result.stderr
    assert not (clone / ".venv").exists()


def test_mpi_without_headers_is_replaced_by_the_wheel(clone: Path, tmp_path: Path) -> None:
    write_scripts(tmp_path / "bin", mpicxx=WITHOUT_HEADERS, mpirun="")
    # This Python creates no environment; the choice is made and printed before.
    write_scripts(tmp_path / "bin", python3='[ "$1" = -c ]')
    changed = environment(PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}", PYTHON="python3")
    changed.pop("DIST_TRAIN_MPI", None)
    result = run(clone / "docker/environment.sh", environment=changed)
    assert "and wheel MPI" in result.stderr


def test_horovod_is_not_built_with_an_mpi_without_headers(tmp_path: Path) -> None:
    write_scripts(tmp_path / "bin", mpicxx=WITHOUT_HEADERS)
    (tmp_path / "bin/python3").symlink_to(sys.executable)
    result = run(
        ROOT / "docker/horovod_wheel.sh",
        tmp_path / "bin/python3",
        environment=environment(DIST_TRAIN_CACHE=str(tmp_path / "cache")),
    )
    assert result.returncode == 1
    assert "libopenmpi-dev" in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.usefixtures("record")
def test_second_set_up_is_a_no_op() -> None:
    run(ROOT / "docker/environment.sh", environment=environment())
    result = run(ROOT / "docker/environment.sh", environment=environment())
    assert result.returncode == 0
    assert result.stderr == "set-up: .venv is up to date\n"


def test_later_installed_mpi_does_not_change_the_choice(tmp_path: Path, record: Mapping[str, str]) -> None:
    script = "echo 'mpi: Open MPI 4.0.0'"
    write_scripts(tmp_path / "bin", mpicxx=script, mpirun=script)
    changed = environment(PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    result = run(ROOT / "docker/environment.sh", environment=changed)
    assert result.stderr == "set-up: .venv is up to date\n"
    assert record["mpi"] in ("wheel", "system")
    assert Path(record["mpirun"]).is_file()


def test_horovod_is_not_built_twice(tmp_path: Path, record: Mapping[str, str]) -> None:
    wheel = Path(record["wheel"])
    cached = tmp_path / "wheels" / wheel.parent.name
    cached.mkdir(parents=True)
    (cached / wheel.name).write_bytes(b"")
    result = run(
        ROOT / "docker/horovod_wheel.sh",
        sys.executable,
        environment=environment(DIST_TRAIN_CACHE=str(tmp_path)),
    )
    assert result.stdout == f"{cached / wheel.name}\n"
    assert result.stderr == ""


def test_horovod_is_not_built_without_torch(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True)
    tools = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    result = run(
        ROOT / "docker/horovod_wheel.sh",
        tmp_path / "venv/bin/python",
        environment=environment(PATH=tools, DIST_TRAIN_CACHE=str(tmp_path / "cache")),
    )
    assert result.returncode == 1
    assert "error: torch is not installed" in result.stderr
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("available", "groups", "limits", "jobs"),
    [
        (256, "0::/\n", {}, 64),
        (5, "0::/\n", {}, 2),
        (1, "0::/\n", {}, 1),
        (256, "0::/user.slice/user-7.slice/session-1.scope\n", {"user.slice/user-7.slice/memory.max": 8}, 4),
        (256, "0::/user.slice\n", {"memory.max": None, "user.slice/memory.max": None}, 64),
        (256, "3:cpu,memory:/user/7\n1:cpu:/\n0::/\n", {"memory/user/7/memory.limit_in_bytes": 16}, 8),
        (256, "0::/\n", {"memory.max": 6}, 3),  # a container's
        (256, "4:memory:/docker/7\n", {"memory/memory.limit_in_bytes": 6}, 3),
        (5, None, {}, 2),  # of a kernel without cgroups
    ],
)
def test_compilers_run_on_all_cores_as_far_as_memory_allows(
    available: int, groups: str | None, limits: Mapping[str, int | None], jobs: int, tmp_path: Path
) -> None:
    files = {"proc/meminfo": f"MemTotal: 9 kB\nMemAvailable:  {available * 10**6} kB\n"}
    if groups is not None:
        files["proc/self/cgroup"] = groups
    for name, gigabytes in limits.items():
        files[f"sys/fs/cgroup/{name}"] = "max\n" if gigabytes is None else f"{gigabytes * 10**9}\n"
    for name, text in files.items():
        (tmp_path / "top" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "top" / name).write_text(text)
    write_scripts(tmp_path / "bin", nproc="echo 64")
    script = (".", ROOT / "docker/common.sh", "&&", "build_jobs", tmp_path / "top")
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    command = ("bash", "-euo", "pipefail", "-c", " ".join(map(str, script)))
    ended = run(*command, environment=environment(PATH=path))
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, f"{jobs}\n", "")


def test_unreachable_index_is_a_short_error(clone: Path) -> None:
    (clone.parent / "my tools").mkdir()
    python = clone.parent / "my tools" / "python3"
    python.symlink_to(os.path.realpath(sys.executable))
    # settings with which pip would refuse to install into .venv
    of_user = {"PIP_USER": "1", "PIP_TARGET": str(clone), "PIP_PREFIX": str(clone)}
    variables = clean_environment(PYTHON=str(python), **UNREACHABLE, **of_user)
    text = short_error(run(clone / "docker/environment.sh", environment=variables))
    assert "package index cannot be reached" in text
    assert Path(text.splitlines()[-1].removeprefix("the whole log: ")).is_file()


@pytest.mark.skipif(not can_mount(), reason="this machine does not let us mount a small disk")
def test_full_disk_is_a_short_error(clone: Path) -> None:
    disk = clone.parent / "disk"
    disk.mkdir()
    script = 'mount -t tmpfs -o size=4m none "$0" && cp -r "$1"/* "$0" && exec "$0/docker/environment.sh"'
    command = ("unshare", "--mount", "bash", "-c", script, disk, clone)
    assert "disk is full" in short_error(run(*command, environment=clean_environment(PYTHON=sys.executable)))


def test_a_full_disk_is_named_although_there_is_no_home_folder() -> None:
    script = '. "$0"; ending="No space left on device"; false || give_up "pip failed"'
    command = ("bash", "-euo", "pipefail", "-c", script, ROOT / "docker/common.sh")
    assert "disk is full" in short_error(run(*command, environment=environment(HOME="/nowhere")))


def test_missing_nvcc_is_an_error_instead_of_a_cpu_build(cuda_python: Path, tmp_path: Path) -> None:
    text = short_error(build_horovod(cuda_python, tmp_path / "cache"))
    assert text.startswith("error: nvcc for CUDA 13.2 cannot be fetched")
    assert "toolkit" in text
    assert "DEVICE=cpu make setup" in text
    assert not list(tmp_path.glob("cache/wheels/*"))


def test_missing_nvcc_for_cuda_12_is_an_error_with_the_fix(cuda_python: Path, tmp_path: Path) -> None:
    (version,) = (tmp_path / "venv").glob("lib/python*/site-packages/torch/version.py")
    version.write_text("__version__ = '2.8.0+cu128'\ncuda = '12.8'\n")
    text = short_error(build_horovod(cuda_python, tmp_path / "cache"))
    assert "CUDA 12.8 toolkit" in text
    assert "DEVICE=cpu make setup" in text


def test_missing_nccl_is_an_error_instead_of_a_cpu_build(cuda_python: Path, tmp_path: Path) -> None:
    (nccl,) = (tmp_path / "venv").glob("lib/python*/site-packages/nvidia")
    shutil.rmtree(nccl)
    if any(Path(prefix, "include/nccl.h").exists() for prefix in ("/usr", "/usr/local/cuda")):
        pytest.skip("this machine has NCCL")
    text = short_error(build_horovod(cuda_python, tmp_path / "cache"))
    assert text.startswith("error: NCCL is missing")
    assert "DEVICE=cpu make setup" in text


@pytest.mark.parametrize("script", ["echo cmake version 3.10.2", "echo broken; exit 1"])
def test_horovod_is_not_built_with_a_cmake_that_cannot(script: str, cuda_python: Path, tmp_path: Path) -> None:
    write_scripts(cuda_python.parent, cmake=script)
    assert "cmake>=3.18" in short_error(build_horovod(cuda_python, tmp_path / "cache"))


def test_device_variable_chooses_the_build(cuda_python: Path, tmp_path: Path) -> None:
    for_cpus = build_horovod(cuda_python, tmp_path / "cache", DEVICE="cpu")
    assert "could not fetch Horovod's source" in short_error(for_cpus)
    assert "NCCL" not in for_cpus.stderr
    assert "nvcc" in short_error(build_horovod(cuda_python, tmp_path / "cache", DEVICE="cuda"))
    assert "must be cpu or cuda" in short_error(build_horovod(cuda_python, tmp_path / "cache", DEVICE="cuda:0"))


def test_modules_for_another_mpi_do_not_change_what_horovod_is_built_against(cuda_python: Path, tmp_path: Path) -> None:
    source = tmp_path / "horovod-0.28.1"
    for name in (
        "CMakeLists.txt",
        "horovod/torch/CMakeLists.txt",
        "cmake/Modules/FindPytorch.cmake",
        "third_party/flatbuffers/include/flatbuffers/stl_emulation.h",
    ):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text("set(CMAKE_CXX_STANDARD_REQUIRED ON)\n")
    python = f"""
        case "$*" in
            *"pip download"*) tar -czf "$9/$(basename "{source}").tar.gz" -C "{tmp_path}" "$(basename "{source}")" ;;
            *"pip wheel"*) env -0 >"{tmp_path}/built-with"; exit 1 ;;
            *) exec "{cuda_python}" "$@" ;;
        esac
    """
    write_scripts(tmp_path / "programs", python=python)
    intel = {"I_MPI_ROOT": "/intel", "MPI_HOME": "/intel", "CPATH": "/intel/include", "CPLUS_INCLUDE_PATH": "/own"}
    result = build_horovod(
        tmp_path / "programs/python", tmp_path / "cache", DEVICE="cpu", HOROVOD_GPU_OPERATIONS="NCCL", **intel
    )
    assert "Horovod did not build" in short_error(result)
    used = dict(line.split("=", 1) for line in (tmp_path / "built-with").read_text().split("\0") if line)
    compiler = shutil.which("mpicxx", path=used["PATH"])
    assert compiler is not None
    assert used["MPI_HOME"] == str(Path(compiler).parents[1])
    assert used["CPLUS_INCLUDE_PATH"] == "/own:/intel/include"
    assert not {"CPATH", "HOROVOD_GPU_OPERATIONS"} & used.keys()


def test_torch_for_cpus_is_refused_for_a_gpu_build(tmp_path: Path) -> None:
    if torch.version.cuda is not None:
        pytest.skip("torch has CUDA")
    result = build_horovod(Path(sys.executable), tmp_path / "cache", DEVICE="cuda")
    assert "built for CPUs" in short_error(result)


def test_cached_fashion_mnist_is_not_downloaded(tmp_path: Path) -> None:
    folder = tmp_path / "datasets" / "fashion-mnist"
    folder.mkdir(parents=True)
    for name in FILES:
        (folder / f"{name}.gz").write_bytes(b"x")
    result = run(
        ROOT / "docker/fashion_mnist.sh",
        environment={
            "PATH": bare_path(tmp_path / "bin"),
            "DIST_TRAIN_CACHE": str(tmp_path),
            "HOME": "/nowhere",
        },
    )
    assert result.returncode == 0
    assert result.stdout.strip() in (str(folder), "/usr/share/datasets/fashion-mnist")


def test_unavailable_fashion_mnist_is_one_message_with_the_fix(clone: Path, tmp_path: Path) -> None:
    # This machine may have the Debian package, so that the copy of the script looks elsewhere.
    script = clone / "docker/fashion_mnist.sh"
    script.write_text(script.read_text().replace("=/usr/share/datasets", "=/nowhere"))
    result = run(
        script,
        environment={
            "PATH": bare_path(tmp_path / "bin"),
            "DIST_TRAIN_CACHE": str(tmp_path),
            "HOME": "/nowhere",
        },
    )
    assert result.returncode == 1
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("error: Fashion-MNIST is not on this machine")
    assert "apt-get install dataset-fashion-mnist" in result.stderr


def test_a_user_without_a_name_is_told_what_to_do(clone: Path, tmp_path: Path) -> None:
    script = clone / "docker/fashion_mnist.sh"
    script.write_text(script.read_text().replace("=/usr/share/datasets", "=/nowhere"))
    write_scripts(tmp_path / "bin", **{"id": "echo 12345; exit 1", "apt-get": "exit 100", "dpkg": ""})
    variables = environment(PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}", DIST_TRAIN_CACHE=str(tmp_path))
    assert "apt could not fetch" in short_error(run(script, environment=variables))


def test_without_home_the_cache_is_in_the_user_s_own_folder() -> None:
    command = ("bash", "-euc", '. "$0"; echo "$cache"', ROOT / "docker/common.sh")
    result = run(*command, environment={"PATH": os.environ["PATH"]})
    assert Path(result.stdout.strip()) == Path(pwd.getpwuid(os.getuid()).pw_dir, ".cache/dist_train")


def test_incomplete_fashion_mnist_is_not_downloaded_over(clone: Path, tmp_path: Path) -> None:
    script = clone / "docker/fashion_mnist.sh"
    script.write_text(script.read_text().replace("=/usr/share/datasets", "=/nowhere"))
    kept = tmp_path / "datasets" / "fashion-mnist" / f"{FILES[0]}.gz"
    kept.parent.mkdir(parents=True)
    kept.write_bytes(b"x")
    result = run(script, environment=environment(DIST_TRAIN_CACHE=str(tmp_path)))
    assert result.returncode == 1
    assert f"{kept.parent} holds only a part of Fashion-MNIST" in result.stderr
    assert kept.is_file()


@pytest.mark.parametrize(("gpus", "settings", "ranks"), [(0, "", 2), (1, "", 1), (1, "run.device=cpu", 2), (8, "", 2)])
def test_the_demo_starts_no_more_ranks_than_there_are_gpus(
    tmp_path: Path, gpus: int, settings: str, ranks: int
) -> None:
    launch, python = tmp_path / "launch", tmp_path / ".venv" / "bin"
    write_scripts(launch, **{"local.sh": f'echo "$@" >{tmp_path}/started; exit 9'})
    shutil.copy(ROOT / "launch/demo.sh", launch)
    write_scripts(tmp_path / "docker", **{"environment.sh": "", "fashion_mnist.sh": "echo images"})
    python.mkdir(parents=True)
    write_scripts(python, python=f'PYTHONPATH={tmp_path} exec {sys.executable} "$@"')
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/__init__.py").write_text(
        f"from types import SimpleNamespace as _Of\n__version__ = '2.15.0'\nversion = _Of(cuda='13.2')\n"
        f"cuda = _Of(device_count=lambda: {gpus}, is_available=lambda: {gpus} > 0)\n"
    )
    assert run(launch / "demo.sh", *settings.split(), environment=environment()).returncode == 9
    words = ["-np", str(ranks), "train", "configs/demo.yaml", "data.root=images", *settings.split()]
    assert (tmp_path / "started").read_text().split() == words


def test_missing_debian_packages_are_named_with_the_tests_that_need_them(tmp_path: Path) -> None:
    path = bare_path(tmp_path / "bin")
    result = run(ROOT / "docker/debian_packages.sh", environment={"PATH": path, "HOME": str(tmp_path)})
    assert result.returncode == 0
    assert "these tests are left out" in result.stderr
    assert "dataset-fashion-mnist - the tests on real images" in result.stderr


@pytest.mark.skipif(not can_mount(), reason="this machine does not let us hide /usr/sbin, where a policy is written")
def test_a_package_that_the_release_lacks_keeps_no_other_from_being_installed(tmp_path: Path) -> None:
    installed = tmp_path / "installed"
    installed.mkdir()
    path = bare_path(tmp_path / "bin", "chmod", "tail", "touch")
    stand_ins = {
        "apt-cache": "test $2 != chromium",
        "apt-get": """
            case "$*" in *chromium*) exit 100 ;; update) exit 0 ;; esac
            cd "${0%/*}/../installed" && shift 5 && touch "$@"
        """,
        "dpkg-query": 'test ! -e "${0%/*}/../installed/$4" || printf installed',
    }
    write_scripts(tmp_path / "bin", **stand_ins)
    command = ("unshare", "--mount", "bash", "-c", 'mount -t tmpfs tmpfs /usr/sbin && PATH=$1 exec "$2"', "bash")
    result = run(*command, path, ROOT / "docker/debian_packages.sh", environment=environment())
    assert result.returncode == 0, result.stderr
    assert {"openssl", "podman-compose"} <= {file.name for file in installed.iterdir()}
    left_out = result.stderr.partition("these tests are left out:\n")[2]
    assert left_out == "  chromium - the pictures of the dashboards (tests/services)\n"


def test_no_version_or_build_of_torch_is_pinned() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    assert "+cpu" not in text
    # This package's versions name its flavours.
    assert "==" not in text.replace("grafana-foundation-sdk==", "")
