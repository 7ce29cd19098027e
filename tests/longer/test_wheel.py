"""The wheel contains what an installed program needs, and nothing else."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.metadata import Distribution
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parents[2]
SHIPPED = ("configs", "studies", "launch", "slurm")


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return the source distribution, and the wheel built from it."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for path in ROOT.iterdir():
        # Ignore what was created in the checkout: environments, runs, data.
        if path.name in {"tests", "benchmarks", "docs", "docker", "dist_train", *SHIPPED}:
            shutil.copytree(path, source / path.name, ignore=shutil.ignore_patterns("__pycache__"))
        elif path.is_file():
            shutil.copy(path, source)
    build = "from setuptools import build_meta; build_meta.build_sdist('dist')"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    [sdist] = (source / "dist").iterdir()
    pip("wheel", "--no-build-isolation", "--wheel-dir", str(folder / "wheels"), str(sdist))
    [wheel] = (folder / "wheels").iterdir()
    return sdist, wheel


@pytest.fixture(scope="module")
def wheel(distributions: tuple[Path, Path]) -> Path:
    return distributions[1]


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("installed")
    pip("install", "--target", str(target), str(wheel))
    return target


def pip(*words: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *words, "--no-deps", "--no-index"]
    subprocess.run(command, check=True, capture_output=True)


def run(installed: Path, *words: str) -> str:
    """Return the output of the installed program, run in its folder."""
    command = [sys.executable, "-m", "dist_train", *words]
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    return subprocess.run(command, cwd=installed, env=environment, check=True, capture_output=True, text=True).stdout


def test_wheel_contains_only_the_package_and_shipped_files(wheel: Path) -> None:
    package = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "dist_train").rglob("*")
        if path.is_file() and path.suffix != ".c" and "__pycache__" not in path.parts
    }
    shipped = {
        f"dist_train/share/{path.relative_to(ROOT)}" for folder in SHIPPED for path in (ROOT / folder).iterdir()
    } - {"dist_train/share/launch/demo.sh"}
    names = set(ZipFile(wheel).namelist())
    assert "dist_train/kernels/_cpu.abi3.so" in names  # an optional extension that does not compile fails no build
    assert "dist_train/py.typed" in names  # without it, type checkers of other projects ignore our types
    assert {name for name in names if ".dist-info/" not in name} == package | shipped


@pytest.mark.parametrize("config", sorted(path.name for path in (ROOT / "configs").glob("*.yaml")))
def test_shipped_configuration_is_found_by_name(installed: Path, config: str) -> None:
    assert run(installed, "config", "show", f"dist_train:configs/{config}")


def test_shipped_study_finds_its_base(installed: Path) -> None:
    assert run(installed, "sweep", "dist_train:studies/smoke.yaml", "--list")


def test_shipped_scripts_are_executable(installed: Path) -> None:
    script = Path(run(installed, "config", "path", "dist_train:launch/local.sh").strip())
    assert script == installed / "dist_train/share/launch/local.sh"
    assert "usage" in subprocess.run([script, "--help"], check=True, capture_output=True, text=True).stdout


def test_submitted_script_sources_the_installed_prologue(installed: Path) -> None:
    share = installed / "dist_train/share"
    script = run(installed, "submit", "dist_train:configs/demo.yaml", "--dry-run")
    assert f"\nroot={share}\n" in script
    assert f"train {share}/configs/demo.yaml " in script
    assert (share / "slurm/prologue.sh").is_file()


def test_metadata_passes_the_check_of_package_indexes(distributions: tuple[Path, Path]) -> None:
    pytest.importorskip("twine", reason="needs twine, which make setup installs")
    command = [sys.executable, "-m", "twine", "check", "--strict", *map(str, distributions)]
    checked = subprocess.run(command, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


def test_nothing_of_a_former_build_is_packed(distributions: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.unpack_archive(distributions[0], tmp_path, filter="data")
    [source] = tmp_path.iterdir()
    package = source / "built/dist_train"
    gone = [package / "gone.py", package / "share/studies/gone.yaml"]
    for file in gone:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    (source / "configs/lost.yaml").symlink_to("nowhere")
    command = [sys.executable, "setup.py", "--quiet", "build_py", "--build-lib", "built"]
    built = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    assert not any(file.exists() for file in gone)
    assert (package / "share/studies/smoke.yaml").is_file()


FREE_THREADED = """
import runpy, sys, sysconfig
sysconfig.get_config_vars()["Py_GIL_DISABLED"] = 1
sys.argv = ["setup.py", "--quiet", "bdist_wheel"]
runpy.run_path("setup.py")
"""


def test_the_wheel_of_a_free_threaded_python_lacks_the_compiled_kernels(
    distributions: tuple[Path, Path], tmp_path: Path
) -> None:
    shutil.unpack_archive(distributions[0], tmp_path, filter="data")
    [source] = tmp_path.iterdir()
    built = subprocess.run([sys.executable, "-c", FREE_THREADED], cwd=source, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    [wheel] = (source / "dist").iterdir()
    assert wheel.name.endswith("-py3-none-any.whl")


@pytest.mark.lengthy
def test_without_a_compiler_the_wheel_lacks_only_the_compiled_kernels(
    distributions: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sdist, wheel = distributions
    monkeypatch.setenv("CC", "false")
    pip("wheel", "--no-build-isolation", "--wheel-dir", str(tmp_path), str(sdist))
    [without] = tmp_path.iterdir()
    lacking = set(ZipFile(wheel).namelist()) - set(ZipFile(without).namelist())
    assert lacking == {"dist_train/kernels/_cpu.abi3.so"}


IMPORT_ALL = """
import importlib, pkgutil
import dist_train
for module in pkgutil.walk_packages(dist_train.__path__, "dist_train."):
    try:
        importlib.import_module(module.name)
    except ModuleNotFoundError as error:
        assert error.name == "triton", module.name
import numpy
print(numpy.__version__)
"""


@pytest.mark.lengthy
@pytest.mark.skipif(sys.version_info >= (3, 12), reason="the oldest releases have wheels for Python 3.11 alone")
def test_all_modules_load_with_the_oldest_releases_that_the_metadata_accept(installed: Path, tmp_path: Path) -> None:
    [metadata] = installed.glob("*.dist-info")
    required = [line for line in Distribution.at(metadata).requires or () if "extra ==" not in line]
    # torch is large, and the other two need the torch of their time
    oldest = [line.replace(">=", "==") for line in required if not line.startswith(("torch", "timm"))]
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--only-binary", ":all:", "--target", str(tmp_path)]
    subprocess.run([*command, *oldest], check=True, capture_output=True)
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{installed}"}
    command = [sys.executable, "-c", IMPORT_ALL]
    loaded = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert loaded.returncode == 0, loaded.stderr
    assert f"numpy=={loaded.stdout.strip()}".startswith(next(line for line in oldest if line.startswith("numpy")))


@pytest.mark.lengthy
def test_two_ranks_train_without_compiler_and_mpi(wheel: Path, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    programs = tmp_path / "venv/bin"
    variables = {**os.environ, "PATH": str(programs)}
    variables.pop("PYTHONPATH", None)
    subprocess.run([str(programs / "pip"), "install", "--quiet", str(wheel)], env=variables, check=True)
    words = (
        "train",
        "dist_train:configs/demo.yaml",
        "data.name=synthetic",
        "data.synthetic_samples=8192",
        "run.max_steps=2",
        "metrics.enabled=false",
    )
    command = [str(programs / "dist-train"), "launch", "-np", "2", *words, "--run-dir", str(tmp_path / "run")]
    ended = subprocess.run(command, env=variables, capture_output=True, text=True, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert "2 ranks (torch-gloo)" in ended.stdout
