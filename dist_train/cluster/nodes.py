"""Checks whether the nodes of a Slurm job can work together, before any rank starts. Needs neither torch nor MPI.

One process per node reports what it sees, and connects to the others over the network that the ranks will use.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

from pydantic import TypeAdapter

from dist_train.cluster.heartbeats import interface_addresses, is_loopback, resolve
from dist_train.cluster.inspection import installed_version
from dist_train.cluster.launch import command_output
from dist_train.outcome import UsageError, writing
from dist_train.rundir.atomic import swap_text
from dist_train.rundir.lock import is_locked
from dist_train.start_up import own_command

INTERFACE_VARIABLE = "NETWORK_INTERFACE"  # for the ranks; slurm/prologue.sh passes it to MPI, NCCL and Gloo

_UNSET_FOR_SRUN = frozenset(
    {
        "SLURM_GPUS",
        "SLURM_GPUS_PER_SOCKET",
        "SLURM_GPUS_PER_TASK",
        "SLURM_NTASKS_PER_GPU",
        "SLURM_TRES_PER_TASK",
        "SLURM_TRES_BIND",
        "SLURM_GPU_BIND",
        "SLURM_LABELIO",
    }
)
"""Variables with the job's own requests, which srun would add to these, or by which it would label each line."""
_ANSWER_SECONDS = 30.0  # of a cluster's nodes, and then a second more for each: all load Python from one file system
_CONNECT_SECONDS = 3.0
_LINGER_SECONDS = 1.0  # how long nodes differ in when they learn that the survey is over
_REPORT_SECONDS = 10.0  # to report then: a node may just have begun to connect to others
_COMPARED = ("torch", "dist_train", "horovod")
_NO_GPU = ("", "-1", "NoDevFiles")  # values of CUDA_VISIBLE_DEVICES; the last one is Slurm's
_MOST_PEERS = 16
_CLOCK_SECONDS = 2.0
_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class NodeReport:
    """What one node sees. `addresses`: by interface.

    `reached`: how many of its next peers it reaches; `unreachable`: those that it does not, with reasons.
    """

    node: str
    clock: float
    addresses: Mapping[str, str]
    own_address: str
    versions: Mapping[str, str]
    gpus: int
    directory_fault: str = ""
    has_locks: bool = True  # whether file locks held by other nodes are respected here
    reached: int = 0
    unreachable: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Fault:
    """What is wrong with `nodes`, and how to fix it; `is_fatal`: no run can begin on them."""

    nodes: tuple[str, ...]
    text: str
    fix: str
    is_fatal: bool = True


@dataclass(frozen=True)
class Survey:
    """The reports of a job's nodes. `interface`: one that all can use; only set if another one cannot be used."""

    reports: tuple[NodeReport, ...]
    faults: tuple[Fault, ...]
    interface: str = ""

    @property
    def good(self) -> tuple[str, ...]:
        """The nodes without a fatal fault."""
        bad = {node for fault in self.faults if fault.is_fatal for node in fault.nodes}
        return tuple(report.node for report in self.reports if report.node not in bad)


def survey_nodes(directory: Path, environment: Mapping[str, str] = os.environ) -> Survey:
    """Collect the reports of our job's nodes, which must all see `directory`, and compare them. Raises UsageError."""
    if "SLURM_JOB_NODELIST" not in environment or "SLURM_JOB_ID" not in environment:
        raise UsageError(
            "there is no Slurm allocation here: run it in a batch script, or within salloc", code="no-allocation"
        )
    listed = command_output("scontrol", "show", "hostnames", environment["SLURM_JOB_NODELIST"])
    nodes = listed.split() or [socket.gethostname()]
    with writing(directory, "name a folder that all nodes share", code="run-directory-unwritable"):
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".nodes-", dir=directory, ignore_cleanup_errors=True) as name:
            folder = Path(name)
            swap_text(folder / "nodes", "\n".join(nodes))
            with (folder / "lock").open("w") as lock:
                with suppress(OSError):  # a file system without locks is reported when the run begins
                    fcntl.flock(lock, fcntl.LOCK_EX)
                begun = time.time()
                limit = _ANSWER_SECONDS + len(nodes)
                output, errors = _output(_command(nodes, folder, environment), limit)
                ended = time.time()
    as_report = TypeAdapter(NodeReport)
    by_node: dict[str, NodeReport] = {}
    for line in output.splitlines():
        with suppress(ValueError):  # of a line that srun, or the node's shell, has printed
            report = as_report.validate_json(line)  # of another version it may have other fields, too
            by_node[report.node] = report
    reports = tuple(by_node[node] for node in nodes if node in by_node)
    shared, interface = _shared_addresses(reports)
    requested = environment.get(INTERFACE_VARIABLE, "")
    faults = (
        *_missing(nodes, by_node, errors, limit),
        *_differences(reports, begun, ended, requested),
        *shared,
        *_unreachable(reports, interface, requested),
    )
    return Survey(reports, faults, interface)


def notice_survey_end() -> Callable[[], bool]:
    """Return a function that tells whether the survey is over, from the signal that srun forwards to each node."""
    received: list[int] = []
    signal.signal(signal.SIGUSR2, lambda number, _: received.append(number))
    return lambda: bool(received)


def report_node(folder: Path, is_over: Callable[[], bool], environment: Mapping[str, str] = os.environ) -> NodeReport:
    """Return what this node sees; all nodes run this at once, and exchange their addresses in `folder`.

    It waits for nodes that start later, until `is_over`.
    """
    node = environment.get("SLURMD_NODENAME", "") or socket.gethostname().split(".")[0]
    addresses = interface_addresses()
    own = addresses.get(environment.get(INTERFACE_VARIABLE, ""), "") or _resolve(socket.gethostname())
    visible = environment.get("CUDA_VISIBLE_DEVICES", "")
    report = NodeReport(
        node,
        time.time(),
        {name: address for name, address in addresses.items() if not is_loopback(address)},
        own,
        {"Python": platform.python_version(), **{name: installed_version(name) for name in _COMPARED}},
        len([gpu for gpu in visible.split(",") if gpu not in _NO_GPU]),
    )
    try:
        nodes = (folder / "nodes").read_text().split()
        # None: the file system has no locks, which is reported when the run begins
        has_locks = is_locked(folder / "lock") is not False
        met = _meet(folder, node, nodes, own, environment.get(INTERFACE_VARIABLE, ""), is_over)
    except OSError as error:
        return replace(report, directory_fault=f"{folder.parent}: {error.strerror}")
    unreachable = {peer: fault for peer, fault in met.items() if fault}
    return replace(report, has_locks=has_locks, reached=len(met) - len(unreachable), unreachable=unreachable)


def as_line(report: NodeReport) -> str:
    """Return the report as one line of JSON."""
    return json.dumps(asdict(report))


def _command(nodes: Sequence[str], folder: Path, environment: Mapping[str, str]) -> list[str]:
    gpus = environment.get("SLURM_GPUS_ON_NODE", "0")
    count = len(nodes)
    gpu_options = [f"--gpus-per-node={gpus}"] if gpus.isdecimal() and int(gpus) else []
    return [
        *("srun", "--mpi=none", "--overlap", f"--nodes={count}", f"--ntasks={count}", "--ntasks-per-node=1"),
        *("--export=ALL", "--input=none", "--kill-on-bad-exit=0", "--no-kill", "--cpus-per-task=1", *gpu_options),
        *own_command("doctor", "--node", str(folder)),
    ]


def _output(command: Sequence[str], seconds: float) -> tuple[str, str]:
    """Return the command's standard output and error; after `seconds` it is asked to end by SIGUSR2."""
    none, pipe = subprocess.DEVNULL, subprocess.PIPE
    environment = {name: value for name, value in os.environ.items() if name not in _UNSET_FOR_SRUN}
    try:
        process = subprocess.Popen(command, stdin=none, stdout=pipe, stderr=pipe, errors="replace", env=environment)
    except OSError as error:
        return "", f"{command[0]}: {error.strerror}"
    for patience, stop in (
        (seconds, partial(process.send_signal, signal.SIGUSR2)),
        (_REPORT_SECONDS, process.terminate),
        (_CONNECT_SECONDS, process.kill),
    ):
        try:
            return process.communicate(timeout=patience)
        except subprocess.TimeoutExpired:
            stop()
    return process.communicate()


def _missing(nodes: Sequence[str], by_node: Mapping[str, NodeReport], errors: str, limit: float) -> Iterator[Fault]:
    if missing := tuple(node for node in nodes if node not in by_node):
        # a process that does not answer yet dies of the signal that ends the survey
        told = [line for line in errors.splitlines() if str(signal.strsignal(signal.SIGUSR2)) not in line]
        why = "; ".join(told[:2]) or f"nothing within {limit:g} s"
        fix = "see with: srun --overlap --nodelist=NODE hostname; keep spare nodes by SPARE_NODES"
        yield Fault(missing, f"does not answer ({why})", fix)


def _differences(reports: Sequence[NodeReport], begun: float, ended: float, requested: str) -> Iterator[Fault]:
    """Yield what differs between nodes that must be alike; `requested`: the interface that the user names."""
    for report in reports:
        if report.directory_fault:
            fix = "the run directory must lie on a file system that all nodes share (run.directory)"
            yield Fault((report.node,), report.directory_fault, fix)
        if not report.has_locks:
            fix = "mount it with locks for the whole cluster (flock), or let no two jobs share a run directory"
            yield Fault((report.node,), "locks of other nodes do not count in the run directory", fix, is_fatal=False)
        if requested and requested not in report.addresses:
            fix = f"{INTERFACE_VARIABLE} names one that all nodes have"
            yield Fault((report.node,), f"has no interface {requested} with an address", fix)
        if is_loopback(report.own_address) and report.addresses and not requested:
            text = f"its own name is {report.own_address} to it, where no other node reaches it"
            fix = f"give the name the node's address in /etc/hosts, or set {INTERFACE_VARIABLE}"
            yield Fault((report.node,), text, fix, is_fatal=False)
        late = max(begun - report.clock, report.clock - ended)
        if late > _CLOCK_SECONDS:
            yield Fault((report.node,), f"its clock differs by {late:.0f} s", "set it by NTP or chrony", is_fatal=False)
    compared = {"GPUs": {report.node: str(report.gpus) for report in reports}}
    for name in reports[0].versions if reports else ():
        compared[name] = {report.node: report.versions.get(name, "") for report in reports}
    for what, values in compared.items():
        usual = max(values.values(), key=list(values.values()).count, default="")
        for node, value in values.items():
            if value != usual:
                text = f"{what}: {value or 'none'}, where the others have {usual or 'none'}"
                yield Fault((node,), text, "ask for the same on all nodes, or leave it out: -- --exclude=NODE")


def _shared_addresses(reports: Sequence[NodeReport]) -> tuple[list[Fault], str]:
    """Return a fault for each address that several nodes share, and, if there is any, an interface that all can use."""
    owners: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
    for report in reports:
        for place in report.addresses.items():
            owners[place].append(report.node)
    shared = {place: nodes for place, nodes in owners.items() if len(nodes) > 1}
    if not shared:
        return [], ""
    different = Counter(name for name, _ in owners)  # addresses of each interface
    usable = [name for name, count in different.items() if count == len(reports)]
    # prefer the one that the nodes' names resolve to: Gloo uses it by default
    named = [name for name in usable if all(report.addresses[name] == report.own_address for report in reports)]
    chosen = next(iter((*named, *usable)), "")
    fix = f"set {INTERFACE_VARIABLE}={chosen or 'an interface with an address of its own on each node'}"
    faults = [
        Fault(tuple(nodes), f"{name} has the same address on all of them, {address}", fix, is_fatal=False)
        for (name, address), nodes in shared.items()
    ]
    return faults, chosen


def _unreachable(reports: Sequence[NodeReport], interface: str, requested: str) -> Iterator[Fault]:
    """Yield the nodes that most others do not reach, and those that reach no other."""
    for report in reports:
        complaints = [other.unreachable[report.node] for other in reports if report.node in other.unreachable]
        if complaints and 2 * len(complaints) >= min(len(reports) - 1, _MOST_PEERS):
            setting = f"{INTERFACE_VARIABLE}={interface or 'IFACE'}"
            fix = f"check names and addresses, or set {setting}"
            if requested:
                fix = f"another interface than {requested}: {setting}"
            yield Fault((report.node,), f"the others do not reach it: {complaints[0]}", fix)
        elif report.unreachable and not report.reached:
            text = next(iter(report.unreachable.values()))
            yield Fault((report.node,), f"reaches no other node: {text}", "check its network")


def _meet(
    folder: Path, node: str, nodes: Sequence[str], own: str, interface: str, is_over: Callable[[], bool]
) -> dict[str, str]:
    """Serve our name until all have met, and return for our next peers why they are not reached; empty if they are."""
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    with (
        socket.create_server(("", 0), family=family, dualstack_ipv6=both) as server,
        ThreadPoolExecutor(_MOST_PEERS) as pool,
    ):
        threading.Thread(target=_serve, args=(server, node), daemon=True).start()
        swap_text(folder / f"{node}.at", json.dumps([own, server.getsockname()[1]]))
        index = nodes.index(node) if node in nodes else 0
        awaited = [*nodes[index + 1 :], *nodes[:index]][:_MOST_PEERS]
        # Who never comes does not answer srun, or does not see the folder: reported elsewhere.
        attempts: dict[str, Future[str]] = {}
        while awaited and not is_over():
            names = _names_in(folder)
            for peer in [peer for peer in awaited if f"{peer}.at" in names]:
                attempts[peer] = pool.submit(_reach, folder, peer, interface)
                awaited.remove(peer)
            time.sleep(_POLL_SECONDS if awaited else 0.0)
        met = {peer: attempt.result() for peer, attempt in attempts.items()}
        swap_text(folder / f"{node}.done", "")
        while not {f"{other}.done" for other in nodes} <= _names_in(folder):
            if is_over():
                time.sleep(_LINGER_SECONDS)  # others may still be connecting to us
                break
            time.sleep(_POLL_SECONDS)
    return met


def _names_in(folder: Path) -> set[str]:
    """Return the names in `folder`, also those that other nodes have just made."""
    os.utime(folder)  # otherwise NFS clients may show what they read up to half a minute ago
    return set(os.listdir(folder))


def _serve(server: socket.socket, node: str) -> None:
    with suppress(OSError):  # closed
        while True:
            connection, _ = server.accept()
            with suppress(OSError), connection:
                connection.sendall(node.encode())


def _reach(folder: Path, peer: str, interface: str) -> str:
    """Return why `peer` is not reached; empty if it answers with its name."""
    advertised, port = json.loads((folder / f"{peer}.at").read_text())
    address = advertised if interface else _resolve(peer) or advertised
    if not address:
        return f"the name {peer} has no address"
    try:
        with socket.create_connection((address, port), _CONNECT_SECONDS) as connection:
            name = connection.recv(256).decode(errors="replace")
    except OSError as error:
        return f"{address}: {error.strerror or error}"
    return "" if name == peer else f"{address} is {name or 'nobody'}"


def _resolve(name: str) -> str:
    try:
        return resolve(name)
    except OSError:
        return ""
