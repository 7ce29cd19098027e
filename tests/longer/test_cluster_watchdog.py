"""The watchdog over real sockets, on ranks that are threads."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_train.cluster import watchdog
from dist_train.cluster.communicator import Communicator, RankLostError, SingleProcess
from dist_train.cluster.heartbeats import (
    BEATS_IN_TIMEOUT,
    TOKEN_BYTES,
    Datagram,
    Kind,
    decode,
    encode,
    open_datagrams,
    own_addresses,
    reachable_from,
)
from dist_train.cluster.watchdog import Watchdog, start_watchdog
from dist_train.outcome import StoppedError
from tests.unit.simulated_ranks import SimulatedRanks, on_ranks, results
from tests.waiting import PATIENCE, wait_for

TIMEOUT = 3.0  # with less, a healthy rank that a busy machine delays could count as lost
TOKEN = b"t" * TOKEN_BYTES


class _Rank(Communicator):
    """One of two ranks, without any operation."""

    def __init__(self, rank: int) -> None:
        self.rank, self.size = rank, 2


@dataclass
class Member:
    """A rank's watchdog, its messages, and whether it ended the rank."""

    rank: int
    watchdog: Watchdog
    messages: list[str] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)

    def fall_silent(self) -> None:
        """Send and receive nothing any more, like a stopped process."""
        self.watchdog._send = lambda *_: None  # type: ignore[method-assign]  # the fault under test
        self.watchdog._receive = lambda: time.sleep(0.05)  # type: ignore[method-assign]


def start_member(comm: SimulatedRanks) -> Member:
    messages: list[str] = []
    ended = threading.Event()
    watchdog = start_watchdog(comm, timeout=TIMEOUT, on_loss=messages.append, end=ended.set)
    assert watchdog is not None
    return Member(comm.rank, watchdog, messages, ended)


def run_members(act: Callable[[list[Member]], None], size: int = 3) -> list[Member]:
    members = results(size, start_member)
    try:
        act(members)
    finally:
        for member in members:
            member.watchdog.close()
    return members


def wait_for_end(members: list[Member]) -> None:
    for member in members:
        assert member.ended.wait(PATIENCE), member.rank


def test_silent_rank_ends_the_others_with_rank_0_s_message(capsys: pytest.CaptureFixture[str]) -> None:
    def act(members: list[Member]) -> None:
        members[2].fall_silent()
        started = time.monotonic()
        wait_for_end(members[:2])
        assert time.monotonic() - started > TIMEOUT * 0.7

    members = run_members(act)
    expected = (
        f"rank 2 ({socket.gethostname()}, process {os.getpid()}) has not answered for {TIMEOUT:g} s; the run ends"
    )
    assert members[0].messages == members[1].messages
    assert members[0].messages[0].startswith(expected)
    assert capsys.readouterr().err.count("dist-train: rank 2 (") == 1


def test_all_ranks_report_a_silent_rank_0() -> None:
    def act(members: list[Member]) -> None:
        members[0].fall_silent()
        wait_for_end(members[1:])

    members = run_members(act)
    assert all(member.messages[0].startswith("rank 0 (") for member in members[1:])


@pytest.mark.parametrize("error", [None, StoppedError("asked to stop")])
def test_rank_that_has_left_is_not_reported(error: Exception | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "_FAREWELL_SECONDS", 2 * TIMEOUT)

    def act(members: list[Member]) -> None:
        begun = time.monotonic()
        members[0].watchdog.close(error)
        members[2].watchdog.close(error)
        assert time.monotonic() - begun < 2 * TIMEOUT, "the others have acknowledged it"
        time.sleep(TIMEOUT + 1)

    assert [member.messages for member in run_members(act)] == [[], [], []]


def test_failed_rank_ends_the_hanging_others() -> None:
    def act(members: list[Member]) -> None:
        with pytest.raises(OSError, match="disk"), members[1].watchdog:
            raise OSError("disk")
        wait_for_end([members[0], members[2]])

    members = run_members(act)
    assert members[2].messages[0].startswith("rank 1 (")


def test_rank_that_leaves_reports_no_loss_any_more() -> None:
    def act(members: list[Member]) -> None:
        dog = members[1].watchdog
        leaving = threading.Thread(target=dog.close)

        def lose_while_leaving(now: float) -> str:
            leaving.start()
            wait_for(lambda: dog._parting)
            return "rank 0 is lost"

        dog._loss = lose_while_leaving  # type: ignore[method-assign]  # the fault under test
        wait_for(lambda: leaving.ident)
        leaving.join()

    assert [member.messages for member in run_members(act, size=2)] == [[], []]


def test_hanging_report_of_a_loss_does_not_keep_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "_REPORT_SECONDS", 0.2)
    hung, ended = threading.Event(), threading.Event()

    def hang(_: str) -> None:
        hung.wait(PATIENCE)

    def start_hanging(comm: SimulatedRanks) -> Watchdog:
        dog = start_watchdog(comm, timeout=TIMEOUT, on_loss=hang, end=ended.set)
        assert dog is not None
        return dog

    dogs = results(2, start_hanging)
    Member(1, dogs[1]).fall_silent()
    assert ended.wait(PATIENCE)
    hung.set()
    for dog in dogs:
        dog.close()


@pytest.mark.parametrize("prober", [0, 1])
def test_probe_names_a_rank_that_does_not_answer_at_once(prober: int) -> None:
    def act(members: list[Member]) -> None:
        assert members[prober].watchdog.absent(PATIENCE) == ""
        missing = 2 if prober == 0 else 0
        members[missing].fall_silent()
        time.sleep(0.6)
        assert members[prober].watchdog.absent(1.5).startswith(f"rank {missing} (")

    run_members(act)


@pytest.mark.parametrize("prober", [0, 1])
def test_a_rank_whose_probe_is_lost_on_the_way_is_not_absent(prober: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "_LONGEST_BEAT", 2 * PATIENCE)  # no regular beat makes up for the lost probe

    def start(comm: SimulatedRanks) -> Watchdog:
        dog = start_watchdog(comm, timeout=2 * PATIENCE * BEATS_IN_TIMEOUT)
        assert dog is not None
        return dog

    dogs = results(3, start)
    time.sleep(1.0)  # the last beat of the search; were it later, it would be lost in the probe's place
    send, sent = dogs[prober]._send, list[Datagram]()

    def lose_the_first(datagram: Datagram, address: tuple[str, int]) -> None:
        sent.append(datagram)
        if len(sent) > 2 - prober:  # rank 0 calls two
            send(datagram, address)

    dogs[prober]._send = lose_the_first  # type: ignore[method-assign]  # the fault under test
    absent = dogs[prober].absent(PATIENCE)
    for dog in dogs:
        dog.close()
    assert absent == ""
    assert len(sent) > 2 - prober


@pytest.mark.parametrize("prober", [0, 1])
def test_what_a_rank_has_sent_before_it_died_is_no_answer_to_a_probe(
    prober: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watchdog, "_RECEIVE_PAUSE_SECONDS", 2 * PATIENCE)  # what arrives stays where it has arrived

    def act(members: list[Member]) -> None:
        asks, dies = members[prober].watchdog, members[1 - prober]
        time.sleep(0.5)  # the pause begins once they have met
        last = Datagram(Kind.BEAT if prober == 0 else Kind.ANSWER, dies.rank, text="node 1")
        dies.watchdog._send(last, asks.datagrams.getsockname()[:2])
        dies.fall_silent()
        assert asks.absent(1.5).startswith(f"rank {dies.rank} (")

    run_members(act, size=2)


def test_foreign_datagrams_are_ignored() -> None:
    with closing(open_datagrams()) as stranger:
        datagrams = open_datagrams()
        first = Watchdog(_Rank(0), TOKEN, (), datagrams, TIMEOUT, lambda _: pytest.fail("lost"), print)
        target = (reachable_from(stranger, "127.0.0.1"), datagrams.getsockname()[1])
        for data in (b"", b"x" * 1500, encode(b"o" * TOKEN_BYTES, Datagram(Kind.BEAT, 1)), TOKEN + b"\xff" * 7):
            stranger.sendto(data, target)
        for rank in (0, 2, 2**31):
            stranger.sendto(encode(TOKEN, Datagram(Kind.BEAT, rank, text="node 1")), target)
        stranger.sendto(encode(TOKEN, Datagram(Kind.BEAT, 1, text="node 1")), target)
        assert wait_for(lambda: first._monitor.present, "a heartbeat") == [1]  # datagrams arrive in their order
        first.close()


def test_unreachable_ranks_are_named_and_not_monitored(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(watchdog, "own_addresses", lambda: ["192.0.2.77"])
    members = run_members(lambda members: time.sleep(TIMEOUT + 1), size=2)
    assert "rank 0 and rank 1" in caplog.text
    assert [member.messages for member in members] == [[], []]


def test_single_rank_is_not_watched() -> None:
    assert start_watchdog(SingleProcess(), timeout=TIMEOUT, on_loss=print) is None


def test_ranks_that_are_lost_at_the_start_leave_no_watchdog_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RankLostError("the group is broken")

    monkeypatch.setattr(watchdog, "gather_int", fail)
    raised = on_ranks(2, start_member)
    assert [type(error) for error in raised] == [RankLostError, RankLostError]
    assert "watchdog" not in {thread.name for thread in threading.enumerate()}


def test_idle_watchdog_uses_little_processor_time() -> None:
    def act(members: list[Member]) -> None:
        used = time.process_time()
        time.sleep(2.0)
        assert time.process_time() - used < 0.3

    run_members(act)


@settings(deadline=None, max_examples=50)
@given(
    st.builds(
        Datagram, st.sampled_from(Kind), st.integers(0, 2**32 - 1), st.integers(0, 2**16 - 1), st.text(max_size=300)
    ),
    st.binary(min_size=TOKEN_BYTES, max_size=TOKEN_BYTES),
)
def test_datagrams_decode_only_with_their_token(datagram: Datagram, other: bytes) -> None:
    data = encode(TOKEN, datagram)
    assert decode(TOKEN, data) == datagram
    assert decode(other, data) is None or other == TOKEN


@settings(deadline=None, max_examples=50)
@given(st.binary(max_size=60), st.booleans())
def test_decoding_never_raises(data: bytes, has_token: bool) -> None:
    decode(TOKEN, TOKEN * has_token + data)


def test_rank_0_is_reachable_at_each_of_its_addresses() -> None:
    addresses = own_addresses()
    assert addresses[-1] in ("127.0.0.1", "::1", "127.0.1.1"), json.dumps(addresses)
    for address in addresses:
        with closing(open_datagrams()) as here, closing(open_datagrams()) as there:
            if ":" in address and there.family == socket.AF_INET:
                continue
            here.setblocking(True)
            here.settimeout(PATIENCE)
            there.sendto(b"found", (reachable_from(there, address), here.getsockname()[1]))
            assert here.recv(10) == b"found"


def test_addresses_are_tried_until_one_answers() -> None:
    first = open_datagrams()
    port = first.getsockname()[1]
    second = open_datagrams()
    paths = [(reachable_from(second, address), port) for address in ("192.0.2.77", "fd00::77", "127.0.0.1")]
    lost: list[str] = []
    watches = [
        Watchdog(_Rank(0), TOKEN, (), first, TIMEOUT, lost.append, print),
        Watchdog(_Rank(1), TOKEN, paths, second, TIMEOUT, lost.append, print),
    ]
    assert watches[1].await_answer(PATIENCE)
    assert watches[1]._path == 2
    watches[1]._path = 0  # as if the one in use led nowhere any more
    wait_for(lambda: watches[1]._path == 2)
    for each in watches:
        each.close()
    assert lost == []
