"""The faults, each a function that does it: at rest, while the run is at work, or as its end."""

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

Moment = Literal["rest", "work", "end"]
Need = Literal["mount", "forbid", "shim", "two", "cached", "metrics", "cached two mount"]


@dataclass(frozen=True)
class Fault:
    """A kind of fault: when it comes, how often, and what it needs. `do` says whether there was anything to hit."""

    kind: str
    moment: Moment
    do: Callable[[Scene], bool]
    weight: float = 1.0
    needs: frozenset[str] = frozenset()


def _kill_all(scene: Scene) -> bool:
    if scene.at_work.code is not None:
        return False
    scene.at_work.kill_all()
    return True


def _kill_one(scene: Scene) -> bool:
    members = scene.at_work.members()
    if scene.at_work.code is not None or not members:
        return False
    return send(scene.random.choice(members), signal.SIGKILL)


def _kill_rank(scene: Scene) -> bool:
    training = scene.at_work.training()
    return bool(training) and send(scene.random.choice(training), signal.SIGKILL)


def _ask_to_stop(scene: Scene) -> bool:
    training = scene.at_work.training()
    return bool(training) and send(scene.random.choice(training), scene.random.choice(_STOPPING))


def _hang(scene: Scene) -> bool:
    """Stop a rank for ever: the others must notice, and end the run."""
    training = scene.at_work.training()
    return len(training) > 1 and send(scene.random.choice(training), signal.SIGSTOP)


def _stop_and_continue(scene: Scene) -> bool:
    members = scene.at_work.members()
    if scene.at_work.code is not None or not members:
        return False
    stopped = scene.random.sample(members, scene.random.randint(1, len(members)))
    for pid in stopped:
        send(pid, signal.SIGSTOP)
    _pass_time(scene, 0.1, 0.7)
    for pid in stopped:
        send(pid, signal.SIGCONT)
    return True


def _fill_disk(scene: Scene) -> bool:
    with scene.disk.full():
        _pass_time(scene, 0.1, 0.6)
    return True


def _forbid_changes(scene: Scene) -> bool:
    if not scene.run.is_dir():
        return False
    with scene.disk.read_only(scene.run):
        _pass_time(scene, 0.1, 0.6)
    return True


def _take_away(scene: Scene) -> bool:
    if not scene.run.is_dir():
        return False
    with vanished(scene.run):
        _pass_time(scene, 0.1, 0.6)
    return True


def _slow_down_disk(scene: Scene) -> bool:
    scene.shim.set_disk(scene.random.randint(50, 400))
    _pass_time(scene, 0.3, 0.8)
    scene.shim.set_disk(0)
    return True


def _set_clock(scene: Scene) -> bool:
    scene.shim.set_clock(scene.random.choice((-1, 1)) * scene.random.choice((2, 3600, 86400, 10 * 365 * 86400)))
    return True


def _start_second(scene: Scene) -> bool:
    first = scene.at_work
    if not _holds_lock(scene):
        return False
    before = whole_steps(scene.run)
    second = scene.start(1, "alone")
    if not second.wait(scene.patience):
        scene.complain(f"hang: the second job was not refused within {scene.patience:g} s")
        second.kill_all()
    elif second.code != 2 or "is in use by process" not in second.output or "Traceback" in second.output:
        if not first.training():
            # It had ended meanwhile, and the second resumed its run, as it should.
            return False
        scene.complain(f"second job: code {second.code}, it said: {second.output[-500:]}")
    if before and not whole_steps(scene.run):
        scene.complain("lost: the second job cost checkpoints")
    return True


def _holds_lock(scene: Scene) -> bool:
    try:
        holder = json.loads((scene.run / "run.lock").read_text())["pid"]
    except (OSError, ValueError):
        return False
    return holder in scene.at_work.training()


def _steal_port(scene: Scene) -> bool:
    thief = socket.socket()
    thief.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        thief.bind(("127.0.0.1", METRICS_PORT + scene.random.randrange(3)))
        thief.listen()
    except OSError:
        thief.close()
        return False
    scene.stolen.append(thief)
    return True


def _damage_checkpoint(scene: Scene) -> bool:
    return damage_checkpoint(scene.run, scene.random)


def _damage_cache(scene: Scene) -> bool:
    return damage_cache(scene.subject.cache, scene.random)


def _damage_all(scene: Scene) -> bool:
    """Damage every checkpoint: the run must refuse to begin anew unasked."""
    if not damage_every_checkpoint(scene.run, scene.random):
        return False
    refused = scene.start(1, "alone")
    if not refused.wait(scene.patience):
        scene.complain("hang: a run without a whole checkpoint does not end")
        refused.kill_all()
    elif refused.code != 2 or "[no-whole-checkpoint]" not in refused.output or "Traceback" in refused.output:
        scene.complain(f"every checkpoint damaged: code {refused.code}, it said: {refused.output[-500:]}")
    scene.clear_run()
    return True


def _odd(what: str) -> Callable[[Scene], bool]:
    def start_odd_rank(scene: Scene) -> bool:
        before = whole_steps(scene.run)
        odd = str(scene.random.randrange(2))
        launch = scene.start(2, "gloo", program=("-m", "tests.torture.odd_rank", what, odd))
        if not launch.wait(scene.patience):
            scene.complain(f"hang: a rank of other {what} was not refused within {scene.patience:g} s")
        elif launch.code == 0 or f"[ranks-differ-in-{what}]" not in launch.output:
            scene.complain(f"other {what}: code {launch.code}, it said: {launch.output[-800:]}")
        elif before != whole_steps(scene.run):
            scene.complain(f"lost: a launch with other {what} cost checkpoints")
        launch.kill_all()
        return True

    return start_odd_rank


def _pass_time(scene: Scene, least: float, most: float) -> None:
    time.sleep(scene.random.uniform(least, most))


_STOPPING = (signal.SIGTERM, signal.SIGUSR2)
METRICS_PORT = 19810

FAULTS: tuple[Fault, ...] = (
    Fault("SIGKILL of every process", "end", _kill_all, 4),
    Fault("SIGKILL of one process", "end", _kill_one, 4),
    Fault("SIGKILL of a rank", "end", _kill_rank, 2, frozenset({"two"})),
    Fault("SIGTERM or SIGUSR2", "end", _ask_to_stop, 2),
    Fault("SIGSTOP for ever", "end", _hang, 1, frozenset({"two"})),
    Fault("SIGSTOP, then SIGCONT", "work", _stop_and_continue, 3),
    Fault("full disk", "work", _fill_disk, 3, frozenset({"mount"})),
    Fault("read-only run directory", "work", _forbid_changes, 3, frozenset({"forbid"})),
    Fault("vanished run directory", "work", _take_away, 3),
    Fault("slow disk", "work", _slow_down_disk, 2, frozenset({"shim"})),
    Fault("clock jump", "work", _set_clock, 2, frozenset({"shim"})),
    Fault("second job", "work", _start_second, 1),
    Fault("port theft", "rest", _steal_port, 1, frozenset({"metrics"})),
    Fault("damaged checkpoint", "rest", _damage_checkpoint, 4),
    Fault("every checkpoint damaged", "rest", _damage_all, 0.3),
    Fault("damaged cache", "rest", _damage_cache, 3, frozenset({"cached"})),
    Fault("a rank of other code", "rest", _odd("code"), 0.3),
    Fault("a rank of other settings", "rest", _odd("settings"), 0.3),
    Fault("a rank of other data", "rest", _odd("data"), 0.5, frozenset({"cached", "mount"})),
)
