"""What this machine offers for training and what it lacks, one check per function."""

from __future__ import annotations

import importlib
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Literal

from rich.console import Console, Group
from rich.table import Column, Table
from rich.text import Text

from dist_train.cluster import inspection
from dist_train.cluster.heartbeats import resolve
from dist_train.cluster.launch import command_output, is_installed
from dist_train.cluster.nodes import Survey
from dist_train.config import Config, DataSettings
from dist_train.config.sections import Device, Engine
from dist_train.monitoring.prometheus.http_server import CANNOT_LISTEN, Site, bind
from dist_train.outcome import CodedError
from dist_train.start_up import usable_cores

State = Literal["fine", "note", "fails"]  # usable; training runs without it; training cannot run here

_SET_UP = "run: make setup"
_GIBIBYTE = 1 << 30
_LEAST_DISK = _GIBIBYTE
_LEAST_SHARED_MEMORY = 256 << 20
# only its free space is read
_SHARED_MEMORY = "/dev/shm"  # nosec B108
_MARKS = {"fine": ("ok", "green"), "note": ("note", "yellow"), "fails": ("FAILS", "bold red")}


@dataclass(frozen=True)
class Check:
    """One finding; `fix` is empty where nothing needs one, or `detail` says it."""

    name: str
    state: State
    detail: str
    fix: str = ""


_LIBRARIES = (
    ("torchvision", "torchvision", "ResNets"),
    ("timm", "timm.optim", "LARS and LAMB"),
    ("nvidia-ml-py", "pynvml", "the utilization of GPUs"),
    ("pillow", "PIL.Image", "image folders"),
    ("prometheus-client", "prometheus_client", "metrics"),
    ("scipy", "scipy.sparse.linalg", "dist-train sharpness"),
    ("matplotlib", "matplotlib", "figures of landscapes and learning curves"),
    ("jinja2", "jinja2", "dist-train report"),
    ("uniplot", "uniplot", "dist-train watch"),
)
"""Package, module, and what needs it."""


def examine(config: Config, data_named: bool) -> tuple[Check, ...]:
    """Return every finding for a run of `config`; `data_named`: its settings and data must be usable, too."""
    python = Check("Python", "fine", f"{platform.python_version()} at {sys.executable}")
    torch = check_torch()
    if torch.state == "fails":  # nothing else can be checked without it
        return python, torch
    data = (check_configuration(config), check_data(config.data)) if data_named else check_known_data()
    return (
        python,
        torch,
        check_devices(config.run.device),
        check_horovod(config.run.device, config.comm.engine),
        check_mpi(),
        check_libraries(),
        check_launchers(),
        check_host_name(),
        check_slurm(),
        *data,
        check_metrics_port(config),
        check_shared_memory(),
        check_disk("run directory", config.run_directory),
        check_cache(is_needed=data_named and config.data.name == "parquet"),
    )


def can_train(checks: tuple[Check, ...]) -> bool:
    """Whether nothing fails."""
    return all(check.state != "fails" for check in checks)


def render(checks: tuple[Check, ...], console: Console) -> None:
    """Print the findings, each fix below its line, and the verdict."""
    columns = (Column(no_wrap=True), Column(no_wrap=True), Column(overflow="fold"))
    table = Table(*columns, box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for check in checks:
        mark, style = _MARKS[check.state]
        lines = [Text(check.detail)]
        if check.fix:
            lines.append(Text(f"-> {check.fix}", style=style))
        table.add_row(Text(mark, style=style), Text(check.name, style="bold"), Group(*lines))
    console.print(table)
    failing = sum(check.state == "fails" for check in checks)
    verdict = "training can run here" if not failing else f"training cannot run here: {failing} to fix"
    console.print(Text(verdict, style="bold green" if not failing else "bold red"))


def as_json(checks: tuple[Check, ...]) -> str:
    """Return the findings as one JSON document: `{"can_train": ..., "checks": [...]}`, each with `Check`'s fields."""
    return json.dumps({"can_train": can_train(checks), "checks": [asdict(check) for check in checks]}, indent=2)


def check_torch() -> Check:
    """Check that torch loads, and is new enough for everything."""
    try:
        import torch
    except Exception as error:  # whatever a broken installation raises
        return Check("torch", "fails", f"cannot be loaded: {error}", _SET_UP)
    from dist_train.cluster.devices import torch_gpus

    detail = f"{torch.__version__}, built for {torch_gpus().built_for or 'CPU only'}"
    if torch.version.cuda and not inspection.recovers_on_gpus(torch.__version__):
        detail = f"{detail}: on GPUs a lost rank ends the run, --min-ranks and --restarts are refused"
        return Check("torch", "note", detail, "for these options, torch 2.10 or newer")
    return Check("torch", "fine", detail)


def check_devices(asked: Device) -> Check:
    """Report what a run computes on if run.device is `asked`, and why torch cannot use GPUs that are here."""
    import torch

    from dist_train.cluster import devices
    from dist_train.kernels.operators import why_no_triton

    cores = usable_cores()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / _GIBIBYTE
    processor = f"{cores} CPU cores ({torch.backends.cpu.get_cpu_capability()}), {memory:.0f} GiB of memory"
    signs, found = devices.find_gpus(os.environ), devices.torch_gpus()
    if found.count and asked == "cpu":
        return Check("devices", "fine", f"{processor}; run.device=cpu leaves the GPUs unused")
    if found.count:
        names = ", ".join(torch.cuda.get_device_name(index) for index in range(found.count))
        detail = f"{names}: at most {found.count} ranks on this node; {processor}"
        if missing := why_no_triton():
            fix = "install what is missing (on Debian gcc, libc6-dev, python3-dev), or unset DIST_TRAIN_TRITON"
            return Check("devices", "note", f"{detail}; torch's slower operators replace our kernels: {missing}", fix)
        return Check("devices", "fine", detail)
    if not signs.present and asked != "cuda":
        return Check("devices", "fine", f"{processor}; {devices.why_no_gpu(signs) or 'no GPU'}")
    why = devices.obstacle(signs, found)
    state: State = "note" if asked == "cpu" else "fails"
    there = f"there are GPUs ({signs})" if signs.present else "there is no GPU"
    return Check("devices", state, f"{processor}; {there}: {why.reason}", f"{why.fix}; or run.device=cpu")


def check_horovod(asked: Device, engine: Engine) -> Check:
    """Check that Horovod loads, and that its build suits the ranks' devices if run.device is `asked`."""
    from dist_train.cluster.devices import torch_gpus

    rebuild = "build it for this torch and MPI: rm -r .venv, then make setup"
    try:
        build = inspection.horovod_build()
    except ImportError as error:
        is_needed = engine == "horovod"
        instead = "comm.engine=horovod needs it for several ranks" if is_needed else "ranks talk by torch.distributed"
        detail = f"not installed: {instead}" if not is_installed("horovod") else str(error)
        return Check("Horovod", "note", detail, f"for horovodrun and mpirun, {_SET_UP}")
    listed = ", ".join(name for name, built in build.items() if built)
    detail = f"{inspection.installed_version('horovod')}, built with {listed or 'nothing'}"
    if not (build["MPI"] or build["Gloo"]):
        return Check("Horovod", "note", detail, rebuild)
    if not build["NCCL"] and asked != "cpu" and torch_gpus().built_for:
        how = "set comm.engine=torch for several ranks on GPUs, or rm -r .venv, then make setup"
        return Check("Horovod", "note", f"{detail}: without NCCL it carries one rank on GPUs, no more", how)
    if not (build["MPI"] and build["Gloo"]):
        return Check("Horovod", "note", f"{detail} only", rebuild)
    return Check("Horovod", "fine", detail)


def check_mpi() -> Check:
    """Check that mpi4py loads the MPI library that Horovod uses."""
    try:
        detail = f"{inspection.mpi_library()}, mpi4py {metadata.version('mpi4py')}"
    except ImportError as error:
        return Check("MPI", "note", f"cannot be loaded: {error}", f"for Horovod over MPI, {_SET_UP}")
    try:
        inspection.horovod_build()
    except ImportError:
        return Check("MPI", "fine", detail)
    files = inspection.loaded_mpi_libraries()
    if len(files) > 1:
        listed = " and ".join(sorted(map(str, files)))
        fix = "unset LD_LIBRARY_PATH and MPI4PY_LIBMPI"
        return Check("MPI", "fails", f"Horovod and mpi4py load two: {listed}", fix)
    return Check("MPI", "fine", f"{detail}, {', '.join(map(str, files))}")


def check_libraries() -> Check:
    """Check that the libraries load that only some runs and commands need."""
    found, missing = [], []
    for package, module, needed_by in _LIBRARIES:
        try:
            importlib.import_module(module)
            found.append(f"{package} {metadata.version(package)}")
        except Exception as error:  # whatever a broken installation raises
            missing.append(f"{package}, needed by {needed_by}, cannot be loaded: {error}")
    if missing:
        return Check("libraries", "note", "; ".join((*found, *missing)), _SET_UP)
    return Check("libraries", "fine", ", ".join(found))


def check_launchers() -> Check:
    """Check the programs that start several ranks."""
    found = {name: inspection.launcher(name) for name in ("horovodrun", "mpirun")}
    detail = ", ".join(f"{name}: {path or 'missing'}" for name, path in found.items())
    if all(found.values()):
        return Check("launchers", "fine", detail)
    return Check("launchers", "note", detail, f"dist-train launch and srun need neither; for these two, {_SET_UP}")


def check_host_name() -> Check:
    """Check that this machine's own name resolves, without which ranks of horovodrun crash."""
    name = socket.gethostname()
    try:
        return Check("host name", "fine", f"{name} is {resolve(name)}")
    except OSError:
        detail = f"{name} does not resolve: horovodrun's ranks crash"
        return Check("host name", "note", detail, f"add a line to /etc/hosts: ADDRESS {name}; or use dist-train launch")


def check_slurm() -> Check:
    """Report Slurm's version, and whether it can start MPI programs."""
    if shutil.which("srun") is None:
        return Check("Slurm", "note", "not on this machine; only slurm/ needs it")
    version = command_output("srun", "--version", stderr=subprocess.STDOUT)
    if not version:
        reason = command_output("sh", "-c", "srun --version 2>&1; true").rpartition("\n")[2]
        return Check("Slurm", "note", f"srun fails: {reason or 'no answer'}", "use a node of the cluster for slurm/")
    if "pmix" not in command_output("srun", "--mpi=list", stderr=subprocess.STDOUT):
        fix = "srun starts ranks with --mpi=none and comm.engine=torch, as the batch scripts do; Horovod needs mpirun"
        return Check("Slurm", "note", f"{version}, without PMIx", fix)
    return Check("Slurm", "fine", f"{version}, with PMIx")


def check_nodes(survey: Survey) -> tuple[Check, ...]:
    """Report what each node of a job has, and what is wrong with some of them."""
    checks = [check_slurm()]
    for report in survey.reports:
        addresses = ", ".join(f"{name} {address}" for name, address in report.addresses.items())
        versions = ", ".join(f"{name} {version}" for name, version in report.versions.items() if version)
        detail = f"{addresses or 'no address'}; {report.gpus} GPUs; {versions}"
        checks.append(Check(report.node, "fine", detail))
    for fault in survey.faults:
        checks.append(Check(", ".join(fault.nodes), "fails" if fault.is_fatal else "note", fault.text, fault.fix))
    return tuple(checks)


def check_data(settings: DataSettings) -> Check:
    """Check that the files of a data set exist; nothing is decoded."""
    from dist_train.data.catalog import find_data

    try:
        find_data(settings)
    except CodedError as error:
        if settings.download and settings.data_set.can_download:
            return Check("data", "note", f"{settings.name} is not here; data.download fetches it when the run begins")
        detail, _, fix = str(error).partition(". ")
        return Check("data", "fails", detail, fix)
    return Check("data", "fine", f"{settings.name} is here")


def check_known_data() -> tuple[Check, ...]:
    """Report which data sets are in their default places; synthetic data need none."""
    names = ("fashion-mnist", "cifar10", "cifar100")
    checks = (check_data(DataSettings.model_validate({"name": name})) for name in names)
    return tuple(replace(check, state="note") if check.state == "fails" else check for check in checks)


def check_configuration(config: Config) -> Check:
    """Check what `train` would refuse besides the data set, which `check_data` checks."""
    from dist_train.launching.preflight import refusals_besides_data

    if (refusal := next(refusals_besides_data(config), None)) is not None:
        return Check("configuration", "fails", str(refusal), "dist-train config check lists all problems")
    return Check("configuration", "fine", "nothing in it is refused")


def check_metrics_port(config: Config) -> Check:
    """Check that metrics can be served at their host, and say at which port."""
    settings = config.metrics
    if not settings.enabled:
        return Check("metrics", "fine", "switched off")
    listening = f"{settings.host}:{settings.port}"
    try:
        with bind(settings.host, settings.port, Site(bytes, bool, {}, None, "")) as server:
            port = server.server_port
    except OSError as error:
        return Check("metrics", "note", f"{listening} cannot be served: {error.strerror}", CANNOT_LISTEN)
    free = "is free" if port == settings.port else f"is in use; metrics would be at port {port}"
    return Check("metrics", "fine", f"{listening} {free}" if settings.port else "at any free port")


def check_shared_memory() -> Check:
    """Check the size of the shared memory through which ranks of one machine communicate."""
    try:
        free = shutil.disk_usage(_SHARED_MEMORY).free
    except OSError:
        return Check("shared memory", "note", f"{_SHARED_MEMORY} is missing", "mount a tmpfs there, for MPI and NCCL")
    detail = f"{free / _GIBIBYTE:.2f} GiB free in {_SHARED_MEMORY}"
    if free < _LEAST_SHARED_MEMORY:
        return Check("shared memory", "note", detail, "give the container more: --shm-size=1g")
    return Check("shared memory", "fine", detail)


def check_disk(name: str, directory: Path) -> Check:
    """Check that `directory` can be made or written to, and has enough space for checkpoints."""
    existing = next(folder for folder in (directory, *directory.absolute().parents) if os.path.lexists(folder))
    fix = "choose another place: run.directory=FOLDER or --run-dir DIR"
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        return Check(name, "fails", f"{existing} cannot be written to", fix)
    free = shutil.disk_usage(existing).free
    detail = f"{directory}: {free / _GIBIBYTE:.1f} GiB free"
    if free < _LEAST_DISK:
        return Check(name, "fails", detail, f"free at least {_LEAST_DISK / _GIBIBYTE:.0f} GiB, or {fix}")
    return Check(name, "fine", detail)


def check_cache(*, is_needed: bool) -> Check:
    """Check the folder for decoded data; without it, ranks decode each for itself, unless it `is_needed`."""
    from dist_train.data.cache import decoded_folder

    check = check_disk("cache", decoded_folder())
    if check.state == "fails":
        state: State = "fails" if is_needed else "note"
        return replace(check, state=state, fix="choose another place: DIST_TRAIN_CACHE=FOLDER")
    return check
