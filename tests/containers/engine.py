"""buildah and podman with their own storage, and stand-ins for images of a registry.

There is no daemon: buildah builds in a chroot, podman runs by runc on the machine's own network.
"""

from __future__ import annotations

import os
import re
import resource
import shutil
import ssl
import subprocess
import sys
import sysconfig
import tarfile
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

ROOT = Path(__file__).parents[2]
PYTHON_IMAGE = "docker.io/library/python:3.11-slim-trixie"
_PROGRAMS = ("buildah", "podman", "runc", "mmdebstrap", "tar")
_GLIBC = re.compile(r"lib(c|m|pthread|dl|rt|resolv|util)\.so")


def missing_requirement() -> str:
    """Return why no image can be built here, or an empty string."""
    missing = [name for name in _PROGRAMS if not shutil.which(name)]
    if missing:
        return f"these programs are missing: {' '.join(missing)} (docker/debian_packages.sh installs them)"
    if os.geteuid() != 0:
        return "only root can build images here"
    if sys.base_prefix == "/usr":
        return "the stand-in for python:3.11-slim needs a Python with its own prefix, not the system's"
    if shutil.disk_usage("/tmp").free < 12 * 2**30:
        return "images need 12 GiB below /tmp"
    return ""


class Engine:
    """Images and containers below one folder; `close` removes them all."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "tmp").mkdir(parents=True)
        (folder / "storage.conf").write_text(
            f'[storage]\ndriver = "overlay"\ngraphroot = "{folder}/storage"\nrunroot = "{folder}/run"\n'
        )
        (folder / "containers.conf").write_text(
            '[containers]\nnetns = "host"\n'
            '[engine]\ncgroup_manager = "cgroupfs"\nevents_logger = "file"\nruntime = "runc"\n'
        )
        self.environment = {
            **os.environ,
            "CONTAINERS_STORAGE_CONF": str(folder / "storage.conf"),
            "CONTAINERS_CONF": str(folder / "containers.conf"),
            "TMPDIR": str(folder / "tmp"),
            "PODMAN_IGNORE_CGROUPSV1_WARNING": "1",
        }

    def call(
        self,
        *command: str | Path,
        timeout: float = 120,
        check: bool = True,
        variables: Mapping[str, str] = MappingProxyType({}),
    ) -> subprocess.CompletedProcess[str]:
        """Run a program with this engine's settings; with `check` it must succeed."""
        result = subprocess.run(
            [str(word) for word in command],
            cwd=ROOT,
            env={**self.environment, **variables},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        assert not check or result.returncode == 0, f"{command}\n{result.stdout[-6000:]}\n{result.stderr[-6000:]}"
        return result

    def make_python_image(self) -> None:
        """Import a Debian with this machine's own Python, under the name of the official image."""
        python = self.folder / "python.tar"
        _pack_python(python)
        system = self.folder / "system.tar"
        self.call(
            "mmdebstrap",
            "--quiet",
            "--variant=apt",
            "--include=ca-certificates,passwd,busybox",
            f"--customize-hook=tar-in {python} /usr/local",
            '--customize-hook=chroot "$1" ldconfig',
            '--customize-hook=chroot "$1" python3 -c "import ssl, sqlite3, ctypes, lzma"',
            "trixie",
            system,
            timeout=240,
        )
        self.call("podman", "import", "--quiet", system, PYTHON_IMAGE)
        system.unlink()
        python.unlink()

    def build(
        self, tag: str, file: Path, context: Path = ROOT, timeout: float = 1500, pip_without: Collection[str] = ()
    ) -> None:
        """Build the image `tag`; pip has the machine's own settings except `pip_without`."""
        self.call(
            "buildah",
            "bud",
            "--isolation=chroot",
            "--pull=never",
            "--format=docker",
            f"--ulimit=nofile={resource.getrlimit(resource.RLIMIT_NOFILE)[1]}",
            f"--ulimit=nproc={resource.getrlimit(resource.RLIMIT_NPROC)[1]}",
            *(f"--volume={source}:{target}" for source, target in self._build_mounts(pip_without).items()),
            f"--file={file}",
            f"--tag={tag}",
            context,
            timeout=timeout,
        )

    def run(
        self, image: str, *words: str | Path, options: Iterable[str] = (), timeout: float = 120, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Run a container to its end and remove it."""
        return self.call(
            "podman", "run", "--rm", "--network=host", *options, image, *words, timeout=timeout, check=check
        )

    def _build_mounts(self, pip_without: Collection[str]) -> dict[str, str]:
        settings = {"disable-pip-version-check": "true"}
        mounts = {}
        certificates = ssl.get_default_verify_paths().cafile
        if certificates:
            # Not at the system's own path, where the package ca-certificates writes.
            mounts[certificates] = "/run/machine/ca.crt:ro"
            settings["cert"] = "/run/machine/ca.crt"
        pip = {name: value for name, value in _pip_settings().items() if name not in pip_without}
        for name in ("find-links", "constraint"):
            if name in pip and Path(pip[name]).exists():
                mounts[pip[name]] = f"/run/machine/{name}:ro"
                settings[name] = f"/run/machine/{name}"
        for name in ("index-url", "extra-index-url", "trusted-host"):
            if name in pip:
                settings[name] = pip[name]
        file = self.folder / "pip.conf"
        file.write_text("[global]\n" + "".join(f"{name} = {value}\n" for name, value in settings.items()))
        mounts[str(file)] = "/etc/pip.conf:ro"
        cache = Path(os.environ.get("DIST_TRAIN_CACHE") or Path.home() / ".cache" / "dist_train")
        cache.mkdir(parents=True, exist_ok=True)
        mounts[str(cache)] = "/root/.cache/dist_train"
        return mounts

    def close(self) -> None:
        """Remove every container, image and file."""
        self.call("podman", "rm", "--all", "--force", "--time=1", check=False)
        for _ in range(10):
            if self.call("podman", "rmi", "--all", "--force", check=False).returncode == 0:
                break
            time.sleep(1)
        self.call("buildah", "rm", "--all", check=False)
        for line in Path("/proc/self/mounts").read_text().splitlines():
            mount = line.split()[1]
            if mount.startswith(f"{self.folder}/"):
                subprocess.run(["umount", "--lazy", mount], check=False)
        shutil.rmtree(self.folder)


def _pip_settings() -> Mapping[str, str]:
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    ).stdout
    return dict(re.findall(r"^(?:global|:env:)\.([a-z-]+)='(.*)'$", listed, flags=re.MULTILINE))


def _pack_python(target: Path) -> None:
    """Write this Python without installed packages, with the libraries that it loads, to the archive `target`."""
    prefix = Path(sys.base_prefix)
    version = f"python{sysconfig.get_python_version()}"
    packages = prefix / "lib" / version / "site-packages"
    tests = prefix / "lib" / version / "test"

    def keep(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
        path = prefix / entry.name
        left_out = (
            packages in path.parents or tests in path.parents or path.name == "__pycache__" or path.suffix == ".a"
        )
        return None if left_out else entry

    with tarfile.open(target, "w") as archive:
        for name in ("bin/python3", f"bin/{version}", "include", "lib"):
            archive.add((prefix / name).resolve() if name == "bin/python3" else prefix / name, name, filter=keep)
        for library in _libraries(sorted((prefix / "lib" / version / "lib-dynload").glob("*.so"))):
            if prefix not in library.parents:
                archive.add(library.resolve(), f"lib/{library.name}")


def _libraries(modules: Sequence[Path]) -> set[Path]:
    wanted = [module for module in modules if not module.name.startswith("_tkinter")]
    listed = subprocess.run(["ldd", *wanted], capture_output=True, text=True, check=True).stdout
    return {Path(found) for found in re.findall(r"=> (/\S+)", listed) if not _GLIBC.match(Path(found).name)}
