"""Checks that all ranks run the same code with the same settings and data, and hold the same weights and noise.

It also lists the versions of libraries and devices, which a run records and compares with those of its last launch.
"""

from __future__ import annotations

import hashlib
import json
import platform
import socket
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

import dist_train
from dist_train.cluster.communicator import Communicator, broadcast_value, gather, run_on_all_ranks, signed_digest
from dist_train.cluster.devices import device_type
from dist_train.cluster.inspection import installed_version, loaded_mpi_version
from dist_train.config import Config
from dist_train.config.loading import flat_settings
from dist_train.config.plugins import plugin_files
from dist_train.kernels.operators import has_cpu_kernels, triton_version
from dist_train.optim.averaging import Averaging
from dist_train.optim.flat_weights import FlatWeights, digest
from dist_train.optim.noise import Noise
from dist_train.outcome import DisagreementError, UsageError


def verify_agreement(
    comm: Communicator, weights: FlatWeights, noise: Noise | None, step: int, averaging: Averaging | None = None
) -> None:
    """Compare digests of the clean weights, their average and the noise over all ranks, after update `step`.

    Raises DisagreementError if they differ; the message says what differs and names the ranks that are in the minority.
    """
    mine = [digest(weights.values), noise.digest(step) if noise else 0, averaging.digest() if averaging else 0]
    digests = gather(comm, mine, "agreement")
    for index, what in enumerate(("weights", "noise", "average")):
        outliers = minority([row[index] for row in digests])
        if outliers:
            names = ", ".join(map(str, outliers))
            raise DisagreementError(
                f"after step {step + 1} the {what} of rank{'s' if len(outliers) > 1 else ''} {names} "
                f"differ from those of the others",
                code=f"{what}-differ",
            )


def minority(digests: Sequence[int]) -> list[int]:
    """Return the ranks whose digest is not the most frequent one; in a tie, rank 0's counts as the right one."""
    [(right, _)] = Counter(digests).most_common(1)  # of several as frequent, the first
    return [rank for rank, value in enumerate(digests) if value != right]


_MAX_DIFFERENCES = 4


def check_consistent_across_ranks(comm: Communicator, config: Config) -> None:
    """Raise UsageError on all ranks if their code or settings differ; the message says what differs, on which ranks."""
    if comm.size == 1:
        return
    # The code first: with other code, settings may have another form.
    _compare(comm, "code", code_of(config), "Install the same on all nodes")
    _compare(comm, "settings", settings_listing(config), "Start all ranks with the same configuration")


def check_same_data(comm: Communicator, identity: str, place: str) -> None:
    """Raise UsageError on all ranks if their data sets differ."""
    if comm.size > 1 and not comm.is_joining:
        _compare(comm, "data", {place: identity}, "Put the same files on all nodes")


def setup_digests(config: Config, data: str) -> tuple[int, ...]:
    """Return digests of this process's code, of the settings, and of `data`, which identifies the data set."""
    listings = (code_of(config), settings_listing(config), {config.data.name: data})
    return tuple(signed_digest(json.dumps(listing, sort_keys=True).encode()) for listing in listings)


def code_of(config: Config) -> Mapping[str, str]:
    """Return what `code_listing` does, digests of the plug-ins in `config`, and which kernels there are."""
    plugins = plugin_files(config.model_dump(mode="json"))
    return {**code_listing(), **plugins, **kernels_on(device_type(config.run.device))}


def kernels_on(device_type: str) -> dict[str, str]:
    """Return which of our kernels compute on devices of `device_type`, by name: Triton's version or the CPU's."""
    if device_type == "cuda":
        return {"Triton": triton_version()}
    return {"CPU kernels": "compiled" if has_cpu_kernels() else "none"}


def launch_environment(revision: str, backend: str, devices: str, kernels: Mapping[str, str]) -> dict[str, str]:
    """Return names and versions for `status.json`; `backend`, `devices` and `kernels`: those of the ranks."""
    return {
        "dist_train": revision,
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": installed_version("torchvision") or "not installed",
        "timm": installed_version("timm") or "not installed",
        **kernels,
        "Horovod": installed_version("horovod") or "not installed",
        "MPI": (loaded_mpi_version() or "unknown") if backend == "mpi" else f"not used ({backend})",
        "NumPy": np.__version__,
        "device": devices,
    }


_BITS_DEPEND_ON = ("torch", "torchvision", "timm", "NumPy", "Triton", "CPU kernels")


def changed_versions(before: Mapping[str, str], now: Mapping[str, str]) -> tuple[str, str] | None:
    """Return the versions that may change the bits and differ between two `launch_environment`s; None if none do.

    What either does not name, as that of an older dist_train may not, counts as the same.
    """
    common = [name for name in _BITS_DEPEND_ON if name in before and name in now]
    changed = [name for name in common if before[name] != now[name]]
    then, here = (", ".join(f"{name} {versions[name]}" for name in changed) for versions in (before, now))
    return (then, here) if changed else None


def code_listing(folder: Path = Path(dist_train.__file__).parent) -> dict[str, str]:
    """Return the digest of every source file in `folder`, and the versions of Python and of the libraries."""
    files = {
        str(path.relative_to(folder.parent)): hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        for path in sorted(folder.rglob("*.py"))
        if path.is_file()  # an editor may mark a file with unsaved changes by a link to nowhere, as Emacs does
    }
    libraries = {"torch": torch.__version__, "numpy": np.__version__, "Python": platform.python_version()}
    others = {name: installed_version(name) for name in ("torchvision", "timm")}  # of networks and optimizers
    # a vendor's build may have no metadata
    return files | libraries | {name: version for name, version in others.items() if version}


def settings_listing(config: Config) -> dict[str, str]:
    """Return every setting by its dotted path, as text."""
    return {path: json.dumps(value) for path, value in flat_settings(config.model_dump(mode="json"))}


def _compare(comm: Communicator, what: str, listing: Mapping[str, str], fix: str) -> None:
    content = json.dumps(listing, sort_keys=True).encode()
    outliers = minority([each for (each,) in gather(comm, [signed_digest(content)], f"consistency.{what}")])
    if not outliers:
        return
    # The reporter compares its listing with rank 0's; if rank 0 is in the minority, it is a rank of the majority.
    reporter = outliers[0] if outliers[0] != 0 else next(rank for rank in range(comm.size) if rank not in outliers)
    first = broadcast_value(comm, listing, f"consistency.{what}.listing")

    def report() -> None:
        if comm.rank != reporter:
            return
        names = [name for name in {**first, **listing} if first.get(name) != listing.get(name)]
        differences = [
            f"{name} ({listing.get(name, 'missing')} on rank {comm.rank}, {first.get(name, 'missing')} on rank 0)"
            for name in names
        ]
        more = f" and {len(differences) - _MAX_DIFFERENCES} more" if len(differences) > _MAX_DIFFERENCES else ""
        ranks, are_several = ", ".join(map(str, outliers)), len(outliers) > 1
        raise UsageError(
            f"rank{'s' if are_several else ''} {ranks} of this launch differ{'' if are_several else 's'} from the "
            f"others in {what}, reported by rank {comm.rank} on {socket.gethostname()}: "
            f"{'; '.join(differences[:_MAX_DIFFERENCES])}{more}. {fix}",
            code=f"ranks-differ-in-{what}",
        )

    run_on_all_ranks(comm, report, f"agree with the others on the {what}")
