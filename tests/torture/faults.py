"""The faults: functions that inject them before a launch, during it, or to end it."""

from __future__ import annotations

import json
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from tests.torture.damage import damage_cache, damage_checkpoint, damage_every_checkpoint, whole_steps
from tests.torture.disk import vanished
from tests.torture.processes import send
from tests.torture.scene import Scene

Moment = Literal["before", "during", "end"]


@dataclass(frozen=True)
class Fault:
    """A kind of fault, with its moment, weight and needs; `inject` returns whether the fault happened."""

    kind: str
    moment: Moment
    inject: Callable[[Scene], bool]
    weight: float = 1.0
    needs: frozenset[str] = frozenset()


def _kill_all(scene: Scene) -> bool:
    if scene.running.code is not None:
        return False
    scene.running.kill_all()
    return True


def _kill_one(scene: Scene) -> bool:
    members = scene.running.members()
    if scene.running.code is not None or not members:
        return False
    return send(scene.random.choice(members), signal.SIGKILL)


def _kill_rank(scene: Scene) -> bool:
    training = scene.running.training()
    return bool(training) and send(scene.random.choice(training), signal.SIGKILL)


def _ask_to_stop(scene: Scene) -> bool:
    training = scene.running.training()
    return bool(training) and send(scene.random.choice(training), scene.random.choice(_STOP_SIGNALS))


def _hang(scene: Scene) -> bool:
    """Stop a rank for ever: the others must notice and end the run."""
    training = scene.running.training()
    return len(training) > 1 and send(scene.random.choice(training), signal.SIGSTOP)


def _stop_and_continue(scene: Scene) -> bool:
    members = scene.running.members()
    if scene.running.code is not None or not members:
        return False
    stopped = scene.random.sample(members, scene.random.randint(1, len(members)))
    for pid in stopped:
        send(pid, signal.SIGSTOP)
    _sleep(scene, 0.1, 0.7)
    for pid in stopped:
        send(pid, signal.SIGCONT)
    return True


def _fill_disk(scene: Scene) -> bool:
    with scene.disk.full():
        _sleep(scene, 0.1, 0.6)
    return True


def _make_immutable(scene: Scene) -> bool:
    if not scene.run.is_dir():
        return False
    with scene.disk.read_only(scene.run):
        _sleep(scene, 0.1, 0.6)
    return True


def _rename_run(scene: Scene) -> bool:
    if not scene.run.is_dir():
        return False
    with vanished(scene.run):
        _sleep(scene, 0.1, 0.6)
    return True


def _slow_down_disk(scene: Scene) -> bool:
    scene.shim.set_disk(scene.random.randint(50, 400))
    _sleep(scene, 0.3, 0.8)
    scene.shim.set_disk(0)
    return True


def _set_clock(scene: Scene) -> bool:
    scene.shim.set_clock(scene.random.choice((-1, 1)) * scene.random.choice((2, 3600, 86400, 10 * 365 * 86400)))
    return True


def _start_second(scene: Scene) -> bool:
    first = scene.running
    if not _holds_lock(scene):
        return False
    before = whole_steps(scene.run)
    second = scene.start(1, "alone")
    if not second.wait(scene.patience):
        scene.report(f"hang: the second job was not refused within {scene.patience:g} s")
        second.kill_all()
    elif second.code != 2 or "is in use by process" not in second.output or "Traceback" in second.output:
        if not first.training() or "all steps are done" in second.output:
            # The first had ended its run, if not its processes, and the second resumed it, as it should.
            return False
        scene.report(f"second job: code {second.code}, output: {second.output[-500:]}")
    if before and not whole_steps(scene.run):
        scene.report("lost: checkpoints, after the second job")
    return True


def _holds_lock(scene: Scene) -> bool:
    try:
        holder = json.loads((scene.run / "run.lock").read_text())["pid"]
    except (OSError, ValueError):
        return False
    return holder in scene.running.training()


def _take_port(scene: Scene) -> bool:
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(("127.0.0.1", METRICS_PORT + scene.random.randrange(3)))
        listener.listen()
    except OSError:
        listener.close()
        return False
    scene.taken_ports.append(listener)
    return True


def _damage_checkpoint(scene: Scene) -> bool:
    return damage_checkpoint(scene.run, scene.random)


def _damage_cache(scene: Scene) -> bool:
    return damage_cache(scene.subject.cache, scene.random)


def _damage_all(scene: Scene) -> bool:
    """Damage every checkpoint: the run must refuse to start from the beginning."""
    if not damage_every_checkpoint(scene.run, scene.random):
        return False
    refused = scene.start(1, "alone")
    if not refused.wait(scene.patience):
        scene.report("hang: a run without a complete checkpoint does not end")
        refused.kill_all()
    elif refused.code != 2 or "[no-whole-checkpoint]" not in refused.output or "Traceback" in refused.output:
        scene.report(f"every checkpoint damaged: code {refused.code}, output: {refused.output[-500:]}")
    scene.clear_run()
    return True


def _differing_rank(difference: str) -> Callable[[Scene], bool]:
    def start_differing_rank(scene: Scene) -> bool:
        before = whole_steps(scene.run)
        rank = str(scene.random.randrange(2))
        launch = scene.start(2, "gloo", program=("-m", "tests.torture.odd_rank", difference, rank))
        if not launch.wait(scene.patience):
            scene.report(f"hang: a rank of other {difference} was not refused within {scene.patience:g} s")
        elif launch.code == 0 or f"[ranks-differ-in-{difference}]" not in launch.output:
            scene.report(f"other {difference}: code {launch.code}, output: {launch.output[-800:]}")
        elif before != whole_steps(scene.run):
            scene.report(f"lost: checkpoints, after a launch with other {difference}")
        launch.kill_all()
        return True

    return start_differing_rank


def _sleep(scene: Scene, least: float, most: float) -> None:
    time.sleep(scene.random.uniform(least, most))


_STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR2)
METRICS_PORT = 19810

FAULTS: tuple[Fault, ...] = (
    Fault("SIGKILL of every process", "end", _kill_all, 4),
    Fault("SIGKILL of one process", "end", _kill_one, 4),
    Fault("SIGKILL of a rank", "end", _kill_rank, 2, frozenset({"ranks"})),
    Fault("SIGTERM or SIGUSR2", "end", _ask_to_stop, 2),
    Fault("SIGSTOP for ever", "end", _hang, 1, frozenset({"ranks"})),
    Fault("SIGSTOP, then SIGCONT", "during", _stop_and_continue, 3),
    Fault("full disk", "during", _fill_disk, 3, frozenset({"mount"})),
    Fault("read-only run directory", "during", _make_immutable, 3, frozenset({"immutable"})),
    Fault("vanished run directory", "during", _rename_run, 3),
    Fault("slow disk", "during", _slow_down_disk, 2, frozenset({"shim"})),
    Fault("clock jump", "during", _set_clock, 2, frozenset({"shim"})),
    Fault("second job", "during", _start_second, 1),
    Fault("port theft", "before", _take_port, 1, frozenset({"metrics"})),
    Fault("damaged checkpoint", "before", _damage_checkpoint, 4),
    Fault("every checkpoint damaged", "before", _damage_all, 0.3),
    Fault("damaged cache", "before", _damage_cache, 3, frozenset({"cached"})),
    Fault("a rank of other code", "before", _differing_rank("code"), 0.3),
    Fault("a rank of other settings", "before", _differing_rank("settings"), 0.3),
    Fault("a rank of other data", "before", _differing_rank("data"), 0.5, frozenset({"cached", "mount"})),
)
