"""Trials: a run is launched and disturbed until it finishes, and its bits are compared with an undisturbed run."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from threading import Lock
from typing import Literal

from tests.torture.damage import whole_steps
from tests.torture.disk import Disk, can_make_immutable, can_mount
from tests.torture.faults import FAULTS, METRICS_PORT, Fault, Moment
from tests.torture.processes import Launch
from tests.torture.scene import Scene
from tests.torture.shim import Shim, build_shim
from tests.torture.subject import Data, FinalState, Subject, copy_code, final_state, make_subject
from tests.torture.tally import Tally

_MAX_LAUNCHES = 12
_OWN_TRACEBACK = re.compile(r"^(\[\d+\]<\w+>:)?Traceback \(most recent call last\)", re.MULTILINE)


@dataclass(frozen=True)
class Capabilities:
    """Which needs of faults this machine meets."""

    can_mount: bool
    can_make_immutable: bool
    shim: Path | None

    def unmet(self) -> frozenset[str]:
        """Return the needs that it does not meet."""
        met = {"mount": self.can_mount, "immutable": self.can_make_immutable, "shim": self.shim is not None}
        return frozenset(need for need, is_met in met.items() if not is_met)


Engine = Literal["all", "torch", "horovod"]
Groups = Sequence[tuple[int, str]]
_TORCH: Groups = ((2, "torch"), (3, "torch"))
_HOROVOD: Groups = ((2, "gloo"), (2, "mpi"))
GROUPS: Mapping[Engine, Groups] = {
    "all": ((1, "alone"), (1, "alone"), (1, "alone"), *_TORCH, *_HOROVOD),
    "torch": ((1, "alone"), *_TORCH),
    "horovod": ((1, "alone"), *_HOROVOD),
}


class Campaign:
    """Runs trials in `folder`; a launch that takes longer than `patience` seconds counts as hanging."""

    def __init__(
        self,
        folder: Path,
        seed: int,
        epochs: int,
        log: Callable[[str], None],
        patience: float = 60.0,
        engine: Engine = "all",
    ) -> None:
        self.folder = folder
        self.seed = seed
        self.patience = patience
        self.tally = Tally()
        self._log = log
        self._groups = GROUPS[engine]
        self._lock = Lock()
        self._capabilities = Capabilities(can_mount(), _can_make_immutable(folder), build_shim(folder))
        self._subjects: dict[Data, Subject] = {}
        self._undisturbed: dict[Data, FinalState] = {}
        code = copy_code(folder / "code")
        for data in _DATA:
            self._subjects[data] = make_subject(folder / data, code, data, epochs)

    @property
    def unsupported(self) -> list[str]:
        """The kinds of faults that this machine does not allow."""
        return [fault.kind for fault in FAULTS if fault.needs & self._capabilities.unmet()]

    def run(self, faults: int, jobs: int) -> None:
        """Run `jobs` concurrent trials, until `faults` faults have happened."""
        for data, subject in self._subjects.items():
            self._undisturbed[data] = self._train_undisturbed(subject)
        numbers = iter(range(1_000_000))

        def work() -> None:
            while True:
                with self._lock:
                    left = faults - self.tally.hits
                    number = next(numbers)
                if left <= 0:
                    return
                self._trial(number, left)

        with ThreadPoolExecutor(jobs) as pool:
            for done in [pool.submit(work) for _ in range(jobs)]:
                done.result()

    def _train_undisturbed(self, subject: Subject) -> FinalState:
        run = self.folder / subject.data / "whole"
        log = self.folder / f"whole-{subject.data}.log"
        launch = Launch(1, "alone", subject.arguments(run), log, subject.code, subject.environment())
        ended = launch.wait(5 * self.patience)
        launch.kill_all()
        if not ended or launch.code != 0:
            raise RuntimeError(f"the undisturbed run failed: {launch.output[-2000:]}")
        return final_state(run)

    def _trial(self, number: int, limit: int) -> None:
        random = Random(f"{self.seed} {number}")
        folder = self.folder / f"trial-{number}"
        folder.mkdir()
        data: Data = "cached" if random.random() < 0.3 else "synthetic"
        subject = self._subjects[data]
        if data == "cached":
            subject = replace(subject, cache=folder / "cache")
        scene = Scene(
            subject,
            folder,
            Disk(folder / "disk", self._capabilities.can_mount),
            Shim(self._capabilities.shim, folder / "shim.state"),
            random,
            self.patience,
        )
        started = time.monotonic()
        try:
            trial = Trial(scene, self._capabilities.unmet(), limit, self._groups)
            trial.run()
            wrong = trial.differences(self._undisturbed[data])
        finally:
            scene.close()
        with self._lock:
            self.tally.add(trial.hits, [*trial.problems, *wrong], f"trial {number} of seed {self.seed}")
            hits = self.tally.hits
        self._log(
            f"trial {number}: {len(trial.hits)} faults in {scene.launches} launches, "
            f"{time.monotonic() - started:.0f} s; {hits} in all"
            + "".join(f"\n  {p}" for p in [*trial.problems, *wrong])
        )
        if not (trial.problems or wrong):
            shutil.rmtree(folder, ignore_errors=True)


class Trial:
    """The launches of one run."""

    def __init__(self, scene: Scene, unmet: frozenset[str], limit: int, groups: Groups) -> None:
        self.hits: list[str] = []
        self.problems: list[str] = []
        self._scene = scene
        self._unmet = unmet
        self._limit = limit
        self._groups = groups

    def run(self) -> None:
        """Disturb the run in a few launches, then let it finish."""
        disturbed = self._scene.random.randint(3, 5)
        for attempt in range(_MAX_LAUNCHES):
            if self._launch(is_disturbed=attempt < disturbed):
                return
        self.problems.append(f"not finished after {_MAX_LAUNCHES} launches")

    def differences(self, undisturbed: FinalState) -> list[str]:
        """Return the differences from the final state of the undisturbed run."""
        try:
            found = final_state(self._scene.run)
        except Exception as error:
            return [f"wrong: the run's final state cannot be read: {error!r}"]
        wrong = []
        if found.digest != undisturbed.digest:
            wrong.append("wrong: other weights than the undisturbed run's")
        if found.results != undisturbed.results:
            wrong.append("wrong: other records than the undisturbed run's")
        return wrong

    def _launch(self, *, is_disturbed: bool) -> bool:
        """Launch the run once, and disturb it; return whether it has finished."""
        scene, random = self._scene, self._scene.random
        ranks, controller = random.choice(self._groups)
        metrics = random.random() < 0.25
        met = {"cached"} if scene.subject.data == "cached" else set()
        met |= ({"ranks"} if ranks > 1 else set()) | ({"metrics"} if metrics else set())
        if is_disturbed:
            self._inject(self._draw("before", random.choice((0, 1, 1, 2)), met))
        floor = max(whole_steps(scene.run), default=0)
        lines = scene.lines()
        overrides = (
            ["metrics.enabled=true", "metrics.last_scrape_seconds=0", f"metrics.port={METRICS_PORT}"] if metrics else []
        )
        scene.launch = launch = scene.start(ranks, controller, *overrides)
        if is_disturbed:
            if random.random() < 0.25:
                time.sleep(random.uniform(0, 4))
            else:
                _wait_for_training(scene, launch, lines)
            self._inject(self._draw("during", random.choice((1, 2, 3, 4)), met))
            self._inject(self._draw("end", 1, met))
        ended = launch.wait(scene.patience if is_disturbed else 3 * scene.patience)
        if is_disturbed and not ended and launch.training() and scene.lines() > lines:
            # The killed process was not needed: the run continues, as it should.
            ended = launch.wait(scene.patience)
        if not ended:
            self._problem(f"hang: the launch did not end within {scene.patience:g} s", launch)
        elif left := launch.wait_until_gone(scene.patience):
            self._problem(f"orphans: {len(left)} processes are left", launch)
        launch.kill_all()
        for listener in scene.taken_ports:
            listener.close()
        scene.taken_ports.clear()
        self._examine(launch, floor)
        return launch.code == 0 and _is_finished(scene)

    def _draw(self, moment: Moment, count: int, met: set[str]) -> list[Fault]:
        unmet = {"ranks", "cached", "metrics"} - met | set(self._unmet)
        possible = [fault for fault in FAULTS if fault.moment == moment and not fault.needs & unmet]
        return self._scene.random.choices(possible, [fault.weight for fault in possible], k=count) if possible else []

    def _inject(self, faults: list[Fault]) -> None:
        for fault in faults:
            if len(self.hits) >= self._limit and fault.moment != "end":
                continue
            try:
                happened = fault.inject(self._scene)
            except OSError as error:
                # The run interfered, for example by renaming a folder.
                happened = False
                self._scene.report(f"torture: {fault.kind}: {error!r}")
            if happened:
                self.hits.append(fault.kind)

    def _examine(self, launch: Launch, floor: int) -> None:
        scene = self._scene
        output = launch.output
        traceback = _OWN_TRACEBACK.search(output) if launch.controller == "gloo" else "Traceback (most" in output
        own = [m for m in _OWN_TRACEBACK.finditer(output) if launch.controller != "gloo" or m.group(1)]
        if traceback and own:
            self._problem("traceback", launch)
        highest = max(whole_steps(scene.run), default=0)
        if highest < floor:
            self._problem(f"lost: step {floor} was saved, now the last whole checkpoint is {highest}", launch)
        self.problems += scene.problems
        scene.problems.clear()

    def _problem(self, text: str, launch: Launch) -> None:
        self.problems.append(
            f"{text} ({launch.ranks} ranks, {launch.controller}, code {launch.code}; "
            f"after {', '.join(self.hits[-6:]) or 'nothing'}): {launch.output[-1500:]!r}"
        )


_DATA: tuple[Data, ...] = ("synthetic", "cached")


def _wait_for_training(scene: Scene, launch: Launch, lines: int) -> None:
    deadline = time.monotonic() + scene.patience
    while launch.code is None and scene.lines() <= lines and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(scene.random.uniform(0, 0.3))


def _is_finished(scene: Scene) -> bool:
    return bool(whole_steps(scene.run)) and whole_steps(scene.run)[-1] == scene.subject.steps


def _can_make_immutable(folder: Path) -> bool:
    if not can_mount():
        return can_make_immutable(folder)
    disk = Disk(folder / "probe-disk", is_mounted=True)
    try:
        return can_make_immutable(disk.root)
    finally:
        disk.close()
        with suppress(OSError):
            disk.root.rmdir()
