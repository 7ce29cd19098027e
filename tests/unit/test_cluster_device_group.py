"""A group of GPUs that a rank is lost of: it is aborted, nobody waits for ever, and nothing of it is used."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch._subclasses import FakeTensorMode

from dist_train.cluster.communicator import GroupBrokenError
from dist_train.cluster.devices import FIRST_SUMS
from dist_train.cluster.elastic import DeviceGroup, ElasticCommunicator, _Work
from tests.waiting import PATIENCE, wait_for

CPU = torch.device("cpu")


@dataclass
class Work:
    """An operation that completes when it is told to, or its group is aborted."""

    group: Group
    completed: bool = False
    size: int = 0
    waited: int = 0
    error: str = ""

    def is_completed(self) -> bool:
        return self.completed or self.group.aborted > 0

    def wait(self) -> None:
        self.waited += 1
        if self.error:
            raise RuntimeError(self.error)


@dataclass
class Group:
    """What torch's group is to a `DeviceGroup`. `peers_come`: whether its first sum completes."""

    peers_come: bool = True
    aborted: int = 0
    works: list[Work] = field(default_factory=list)

    def allreduce(self, tensors: list[torch.Tensor]) -> Work:
        self.works.append(Work(self, completed=self.peers_come, size=sum(map(torch.numel, tensors))))
        return self.works[-1]

    def abort(self) -> None:
        self.aborted += 1


class Comm:
    """Of a generation that is over once it has an `interruption`."""

    interruption = ""

    def check(self) -> None:
        if self.interruption:
            raise GroupBrokenError(self.interruption)


def in_thread(action: Callable[[], object]) -> tuple[threading.Thread, list[BaseException]]:
    errors: list[BaseException] = []

    def run() -> None:
        try:
            action()
        except RuntimeError as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, errors


def work_in(group: DeviceGroup, comm: Comm, patience: float = 60.0) -> tuple[Work, _Work]:
    work = group.start(lambda made: made.allreduce([]))
    return work, _Work(comm, work, "gradient.0", time.monotonic() + patience, group)  # type: ignore[arg-type]


def test_it_connects_by_first_sums_and_is_aborted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Group()
    freed: list[int] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: freed.append(len(made.works)))
    group = DeviceGroup(lambda: made)
    group.connect(CPU)
    assert [(work.size, work.waited) for work in made.works] == [(size, 1) for size in FIRST_SUMS]
    assert freed == [0]
    group.abort()
    group.abort()
    assert group.await_end(PATIENCE)
    assert made.aborted == 1
    with pytest.raises(RuntimeError, match="aborted"):
        group.start(lambda made: made.allreduce([]))


def test_what_was_never_made_has_ended() -> None:
    group = DeviceGroup(Group)
    group.abort()
    assert group.await_end(0)


def test_an_abort_ends_what_connects() -> None:
    made = Group(peers_come=False)
    group = DeviceGroup(lambda: made)
    thread, errors = in_thread(lambda: group.connect(CPU))
    wait_for(lambda: made.works)
    group.abort()
    thread.join(PATIENCE)
    assert "while it connected" in str(errors[0])
    assert made.works[0].waited == 0


def test_what_is_made_after_the_abort_is_aborted_too() -> None:
    made, may_be_made = Group(), threading.Event()

    def make() -> Group:
        may_be_made.wait(PATIENCE)
        return made

    group = DeviceGroup(make)
    thread, errors = in_thread(lambda: group.connect(CPU))
    group.abort()
    may_be_made.set()
    thread.join(PATIENCE)
    assert "while it was made" in str(errors[0])
    assert made.aborted == 1


def test_an_abort_that_hangs_is_not_waited_for() -> None:
    released = threading.Event()

    class Hanging(Group):
        def abort(self) -> None:
            released.wait(PATIENCE)

    group = DeviceGroup(Hanging)
    group.connect(CPU)
    group.abort()
    assert not group.await_end(0.05)
    released.set()
    assert group.await_end(PATIENCE)


def test_a_wait_asks_whether_a_sum_is_done_before_a_stream_waits_for_it() -> None:
    group, comm = DeviceGroup(Group), Comm()
    group.connect(CPU)
    work, pending = work_in(group, comm)
    work.completed = False
    thread, errors = in_thread(pending.wait)
    time.sleep(0.05)
    assert (work.waited, thread.is_alive()) == (0, True)
    work.completed = True
    thread.join(PATIENCE)
    assert (work.waited, errors) == (1, [])


def test_a_wait_ends_when_the_generation_does() -> None:
    group, comm = DeviceGroup(Group), Comm()
    group.connect(CPU)
    work, pending = work_in(group, comm)
    work.completed = False
    thread, errors = in_thread(pending.wait)
    comm.interruption = "rank 1 died"
    thread.join(PATIENCE)
    assert isinstance(errors[0], GroupBrokenError)
    assert work.waited == 0


def test_what_an_abort_has_completed_is_not_used() -> None:
    group = DeviceGroup(Group)
    group.connect(CPU)
    work, pending = work_in(group, Comm())
    work.completed = False
    group.abort()
    assert group.await_end(PATIENCE)
    with pytest.raises(GroupBrokenError, match="aborted"):
        pending.wait()
    assert work.waited == 0


def test_a_group_that_takes_long_to_disappear_is_aborted_before() -> None:
    may_disappear, disappeared = threading.Event(), threading.Event()

    class Lingering(Group):
        def allreduce(self, tensors: list[torch.Tensor]) -> Work:
            return Work(Group(), completed=True)  # no cycle that keeps this group

        def __del__(self) -> None:
            may_disappear.wait(2 * PATIENCE)
            disappeared.set()

    group = DeviceGroup(Lingering)
    group.connect(CPU)
    group.abort()
    assert group.await_end(PATIENCE)
    may_disappear.set()
    assert disappeared.wait(PATIENCE)


def test_errors_and_silence_break_the_group() -> None:
    group = DeviceGroup(Group)
    group.connect(CPU)
    work, pending = work_in(group, Comm())
    work.error = "remote error"
    with pytest.raises(GroupBrokenError, match="remote error"):
        pending.wait()
    work, pending = work_in(group, Comm(), patience=0.0)
    work.completed = False
    with pytest.raises(GroupBrokenError, match="does not come"):
        pending.wait()


def test_tensors_of_gpus_are_summed_by_nccl_and_those_of_the_host_by_gloo() -> None:
    comm = object.__new__(ElasticCommunicator)
    with FakeTensorMode():
        assert comm._is_on_device(torch.empty(1, device="cuda"))
        assert not comm._is_on_device(torch.empty(1))
