"""Who takes part in an elastic launch: the decisions, and the coordinator and its ranks over real connections."""

from __future__ import annotations

import errno
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from dist_train.cluster.communicator import Generation, RankLostError
from dist_train.cluster.elastic_launch import (
    LocalProcesses,
    _admitting_others,
    _ElasticRanks,
    entry_of,
)
from dist_train.cluster.launch import TOKEN_VARIABLE
from dist_train.cluster.member import Member, Pulse
from dist_train.cluster.membership import (
    Elasticity,
    Membership,
    Message,
    Peer,
    connect,
    decide,
    mark_ready,
    note_training,
    remove,
    request_stop,
    set_may_grow,
)
from dist_train.cluster.membership_server import Entry, JoinedNode, MembershipServer, RemoteCoordinator
from dist_train.cluster.messages import MessageServer, proof_of
from dist_train.outcome import ExitCode, FaultError, UsageError
from dist_train.rundir.paths import RunDirectory
from dist_train.rundir.status import LAUNCH_VARIABLE, StatusFile, read_status
from tests.ipv6 import needs_ipv6
from tests.raising import raises
from tests.waiting import wait_for

Event = tuple[Any, ...]
"""A function of `membership.py`, and its arguments after the state."""


def after(state: Membership, *events: Event) -> Membership:
    return reduce(lambda before, event: decide(before, *event)[0], events, state)


def said(state: Membership, event: Event) -> dict[int, Message]:
    return {message.to: message for message in decide(state, *event)[1]}


def limits(size: int, fewest: int = 1, most: int | None = None, timeout: float = 5.0) -> Elasticity:
    return Elasticity(size, fewest, most or size, 0, timeout)


def met(size: int, fewest: int = 1) -> Membership:
    """Return ranks 0, 1, ... with the ids 10, 11, ..., which train."""
    arrivals: list[Event] = []
    for slot in range(size):
        arrivals += [(connect, Peer(10 + slot, slot)), (mark_ready, 10 + slot, 0, "", ("host", 1000 + slot))]
    return after(
        Membership(limits(size, fewest)), *arrivals, *((note_training, 10 + slot, True) for slot in range(size))
    )


def test_the_first_generation_begins_when_all_are_there_in_the_order_of_their_slots() -> None:
    state = after(Membership(limits(2)), (connect, Peer(7, 1)), (connect, Peer(8, 0)), (mark_ready, 7, 0))
    told = said(state, (mark_ready, 8, 0, "", ("host", 99)))
    assert {to: message.fields["rank"] for to, message in told.items()} == {7: 1, 8: 0}
    assert told[7].fields["store"] == ("host", 99)
    assert told[7].fields["joined"] == []


def test_a_death_stops_the_others_and_the_next_generation_keeps_their_order() -> None:
    state = met(4)
    told = said(state, (remove, 11, "died"))
    assert {to: message.kind for to, message in told.items()} == {10: "break", 12: "break", 13: "break"}
    state = after(state, (remove, 11, "died"), (mark_ready, 13, 1, "gradient.0"), (mark_ready, 12, 1))
    told = said(state, (mark_ready, 10, 1))
    assert {to: message.fields["rank"] for to, message in told.items()} == {10: 0, 12: 1, 13: 2}
    assert told[10].fields["lost"] == ["rank 1 (, process 0) died"]


@pytest.mark.parametrize("first", [(remove, 11, "died"), (mark_ready, 11, 1, "gradient.0")])
def test_the_others_are_told_of_a_break_once_however_many_report_it(first: Event) -> None:
    state = met(4)
    assert said(state, first).keys() == {10, 12, 13}
    assert said(after(state, first), (mark_ready, 12, 1, "gradient.1")) == {}


def test_who_joins_is_let_in_after_an_update_behind_the_others() -> None:
    state = after(met(2), (remove, 10, "died"), (mark_ready, 11, 1), (connect, Peer(20, 0)))
    told = said(state, (mark_ready, 20, 0))
    assert {to: message.kind for to, message in told.items()} == {11: "meet"}
    state = after(state, (mark_ready, 20, 0))
    told = said(state, (mark_ready, 11, 2))
    assert {to: message.fields["rank"] for to, message in told.items()} == {11: 0, 20: 1}
    assert told[11].fields["joined"] == ["rank 1 (, process 0)"]


def test_too_few_ranks_wait_for_others_and_end_when_none_can_come() -> None:
    state = after(met(2, fewest=2), (remove, 10, "died"), (mark_ready, 11, 1))
    assert state.is_forming
    assert said(state, (set_may_grow, False))[11].kind == "end"
    assert said(after(state, (connect, Peer(20, 0))), (mark_ready, 20, 0))[11].kind == "members"


def test_the_ranks_that_are_left_begin_at_once_when_all_are_to_stop() -> None:
    state = after(met(2, fewest=2), (remove, 10, "died"), (mark_ready, 11, 1))
    assert said(state, (request_stop,))[11].kind == "members"
    state = after(met(2, fewest=2), (request_stop,), (remove, 10, "died"), (set_may_grow, False))
    assert said(state, (mark_ready, 11, 1))[11].kind == "members"


def test_the_ranks_that_are_left_of_a_run_that_is_over_finish_it() -> None:
    state = after(met(3, fewest=3), (remove, 12, "died"), (remove, 11), (set_may_grow, False))
    assert said(state, (mark_ready, 10, 1, "barrier: reset"))[10].kind == "members"


def test_nobody_is_let_in_once_a_rank_has_finished() -> None:
    state = after(met(2), (connect, Peer(20, 2)), (remove, 10))
    assert said(state, (mark_ready, 20, 0))[20].kind == "end"
    assert not decide(state, remove, 11)[1]


def test_no_process_joins_once_a_rank_has_finished_even_after_a_loss() -> None:
    state = after(met(3), (connect, Peer(20, 3)), (mark_ready, 20, 0), (remove, 10), (remove, 11, "died"))
    told = said(state, (mark_ready, 12, 1))
    assert {to: message.fields["size"] for to, message in told.items()} == {12: 1}


def test_no_more_than_max_ranks_join_and_the_others_keep_waiting() -> None:
    state = after(met(2), (remove, 10, "died"), (mark_ready, 11, 1))
    state = after(
        state, *(event for each in (20, 21) for event in ((connect, Peer(each, each)), (mark_ready, each, 0)))
    )
    told = said(state, (mark_ready, 11, 2))
    assert {to: message.fields["rank"] for to, message in told.items()} == {11: 0, 20: 1}
    state = after(state, (mark_ready, 11, 2))
    assert {peer.id: (peer.rank, peer.is_ready) for peer in state.joiners} == {21: (None, True)}


def test_a_report_about_a_past_generation_stops_nobody() -> None:
    state = after(met(3), (remove, 11, "died"), (mark_ready, 10, 1), (mark_ready, 12, 1))
    assert decide(state, mark_ready, 12, 1, "gradient.0") == (state, ())


def broken(state: Membership, generation: int, *ids: int) -> Membership:
    """Let the group of that generation break, as its ranks `ids` report."""
    return after(state, *((mark_ready, each, generation, "meeting: no route to host") for each in ids))


def test_ranks_that_cannot_connect_though_nobody_is_lost_end_the_run() -> None:
    state = met(2)
    for generation in (1, 2, 3):
        state = broken(state, generation, 10, 11)
    assert not state.has_ended
    assert not after(state, (remove, 11, "died")).has_ended
    told = said(broken(state, 4, 10), (mark_ready, 11, 4))
    assert {to: message.kind for to, message in told.items()} == {10: "end", 11: "end"}
    assert "no route to host" in told[10].fields["why"]
    state = broken(after(state, (note_training, 10, True)), 4, 10, 11)  # after an update
    assert state.generation == 5


def test_a_process_that_joins_but_cannot_connect_is_sent_away() -> None:
    state = after(met(2, fewest=2), (remove, 11, "died"), (mark_ready, 10, 1))
    state = after(state, (connect, Peer(20, 1)), (mark_ready, 20, 0))
    state = broken(state, 2, 20, 10)
    assert [peer.id for peer in state.members] == [10, 20]
    state = broken(state, 3, 20)
    told = said(state, (mark_ready, 10, 3))
    assert {to: message.kind for to, message in told.items()} == {20: "end"}, "the rank that is left waits for another"
    state = after(state, (mark_ready, 10, 3), (connect, Peer(21, 1)))
    assert {to: message.kind for to, message in said(state, (mark_ready, 21, 0)).items()} == {
        10: "members",
        21: "members",
    }
    assert said(state, (set_may_grow, False))[10].kind == "end"


def test_a_loss_before_anybody_trains_ends_the_launch() -> None:
    state = after(Membership(limits(2)), (connect, Peer(7, 0)), (connect, Peer(8, 1)))
    assert said(state, (remove, 7, "died"))[8].kind == "end"


def test_the_end_of_all_that_held_the_state_ends_those_who_join() -> None:
    state = after(met(1), (connect, Peer(20, 0)), (mark_ready, 20, 0))
    assert said(state, (remove, 10, "died"))[20].kind == "end"


@contextmanager
def serving(size: int, timeout: float, most: int | None = None, host: str = "127.0.0.1") -> Iterator[MembershipServer]:
    server = MembershipServer(limits(size, most=most, timeout=timeout), host)
    is_over = threading.Event()

    def serve() -> None:
        while not is_over.is_set():
            server.poll(0.01)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield server
    finally:
        is_over.set()
        thread.join()
        server.close()


def variables_of(server: MembershipServer, slot: int, token: str | None = None) -> dict[str, str]:
    entry = Entry(*server.address, server.token if token is None else token)
    return {**entry.variables, "RANK": str(slot)}


def member(server: MembershipServer, slot: int, ended: list[int] | None = None) -> Member:
    return Member(server.timeout, variables_of(server, slot), lambda: (ended if ended is not None else []).append(slot))


def meet(members: Sequence[Member], why: str = "") -> list[Generation]:
    made: dict[int, Generation] = {}

    def wait(number: int) -> None:
        made[number] = members[number].await_generation(1000 + number, why)

    threads = [threading.Thread(target=wait, args=(number,)) for number in range(len(members))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [made[number] for number in range(len(members))]


def begin_training(server: MembershipServer, members: Sequence[Member]) -> None:
    """Report that `members` train, and wait until the server has heard all of them."""
    for each in members:
        each.report_state(works=True)
    wait_for(lambda: sum(peer.has_state for peer in server.state.peers) == len(members))


def test_ranks_meet_lose_one_and_meet_again() -> None:
    with serving(3, 5.0) as server:
        members = [member(server, slot) for slot in range(3)]
        first = meet(members)
        assert [each.rank for each in first] == [0, 1, 2]
        assert {each.most_ranks for each in members} == {3}
        begin_training(server, members)
        members[1].leave("failed: out of memory")
        left = [members[0], members[2]]
        wait_for(lambda: all(each.interruption for each in left))
        second = meet(left)
        assert [(each.rank, each.size, each.generation) for each in second] == [(0, 2, 2), (1, 2, 2)]
        assert "failed: out of memory" in second[0].lost[0]
        assert not left[0].interruption
        for each in left:
            each.leave("")


def test_who_is_silent_is_expelled_and_ends_when_it_wakes(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[int] = []
    with serving(2, 0.5) as server:
        members = [member(server, slot, ended) for slot in range(2)]
        meet(members)
        begin_training(server, members)
        monkeypatch.setattr(members[1]._connection, "send", lambda fields: None)  # as a process that SIGSTOP holds
        wait_for(lambda: members[0].interruption)
        assert "has not answered" in members[0].interruption
        wait_for(lambda: ended)
        assert [slot for slot, _ in server.expelled] == [1]
        for each in members:
            each.leave("")


def test_who_beats_but_does_not_move_on_is_expelled() -> None:
    ended: list[int] = []
    with serving(2, 0.5) as server:
        members = [member(server, slot, ended) for slot in range(2)]
        meet(members)
        begin_training(server, members)
        members[0].pulse.move()
        members[0].pulse.rest()
        members[1].pulse.move()
        wait_for(lambda: members[0].interruption)
        assert "has not moved on" in members[0].interruption
        wait_for(lambda: ended == [1])
        assert [slot for slot, _ in server.expelled] == [1]
        for each in members:
            each.leave("")


def test_a_large_launch_hears_each_rank_rarely_where_its_timeout_is_long(monkeypatch: pytest.MonkeyPatch) -> None:
    beats: list[object] = []
    with serving(1, 60.0) as server:
        rank = member(server, 0)
        monkeypatch.setattr(rank._connection, "send", beats.append)
        time.sleep(2.5)
        assert len(beats) <= 1
        rank.leave("")


def test_what_launchers_know_is_made_anew_only_when_it_changes() -> None:
    with closing(MembershipServer(limits(2))) as server:
        before = server.view
        assert server.view is before
        server.note_code(ExitCode.DIVERGED)
        assert server.view.code == ExitCode.DIVERGED
        server.ask_to_stop()
        assert server.view.stop_requested


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def hangs_after(pulse: Pulse, clock: Clock, seconds: float, look: float = 0.5) -> bool:
    """Ask as often as the thread that beats does."""
    hangs = False
    for _ in range(round(seconds / look)):
        clock.now += look
        hangs = pulse.hangs()
    return hangs


def test_a_thread_hangs_where_it_must_move_on_and_does_not(clock: Clock) -> None:
    pulse = Pulse(5.0, 0.5, clock)
    assert not hangs_after(pulse, clock, 60.0)
    for begin in (pulse.move, pulse.move_within):
        begin()
        assert not hangs_after(pulse, clock, 2.0)
    pulse.rest()
    pulse.move_within()
    assert not hangs_after(pulse, clock, 60.0)
    pulse.move()
    assert not hangs_after(pulse, clock, 4.5)
    assert hangs_after(pulse, clock, 0.5)


def test_a_slow_thread_and_one_that_slept_with_the_process_do_not_hang(clock: Clock) -> None:
    pulse = Pulse(5.0, 0.5, clock)
    pulse.move()
    clock.now += 60.0
    assert not pulse.hangs()
    pulse.move()
    assert hangs_after(pulse, clock, 5.0)
    slow = Pulse(5.0, 0.5, clock)
    slow.move()
    assert not hangs_after(slow, clock, 3.0)
    slow.move()
    assert not hangs_after(slow, clock, 60.0)


def test_who_beats_but_does_not_stop_is_expelled() -> None:
    ended: list[int] = []
    with serving(2, 0.5) as server:
        members = [member(server, slot, ended) for slot in range(2)]
        meet(members)
        begin_training(server, members)
        (alone,) = meet(members[:1], "gradient.0: a rank does not come")
        assert (alone.rank, alone.size) == (0, 1)
        assert "has not stopped" in alone.lost[0]
        assert "does not come" in alone.report
        wait_for(lambda: ended)
        for each in members:
            each.leave("")


def wait_for_a_poll(server: MembershipServer, peer_id: int) -> None:
    """Wait until the server has looked for ranks to expel since now; the peer's heartbeats make it poll."""
    for _ in range(2):
        before = server._server.heard[peer_id]
        wait_for(lambda: server._server.heard[peer_id] > before)  # noqa: B023


def test_who_is_busy_when_others_join_is_not_expelled_as_if_the_group_were_broken() -> None:
    with serving(2, 5.0, most=3) as server:
        members = [member(server, slot) for slot in range(2)]
        meet(members)
        begin_training(server, members)
        busy = server.state.members[0].id
        joiner = member(server, 1)
        members += [joiner]
        for each, generation in ((joiner, 0), (members[1], 1)):
            store = ["host", 1]
            each._connection.send({"kind": "ready", "generation": generation, "store": store, "why": ""})
        wait_for(lambda: busy in server._stopping_since)
        server._stopping_since[busy] -= 62.0
        wait_for_a_poll(server, busy)
        assert not server.expelled
        members[1].leave("failed: out of memory")
        wait_for(lambda: members[0].interruption)
        wait_for_a_poll(server, busy)
        assert not server.expelled, "its time begins with the break"
        server._stopping_since[busy] -= 6.0
        wait_for(lambda: [slot for slot, _ in server.expelled] == [0])
        for each in members:
            each.leave("")


def test_who_does_not_know_the_token_is_not_heard() -> None:
    with serving(1, 5.0) as server, pytest.raises(RankLostError, match="closed the connection"):
        Member(5.0, variables_of(server, 0, token="guess"))


def test_a_stranger_cannot_end_the_launch() -> None:
    with serving(1, 5.0) as server:
        with socket.create_connection(server.address) as stranger:
            stranger.sendall(b"[" * 100_000 + b"\n")
            while stranger.recv(1000):
                pass
        own = member(server, 0)
        assert [generation.size for generation in meet([own])] == [1]
        own.leave("")


def joining(server: MembershipServer, count: int, token: str | None = None) -> RemoteCoordinator:
    return RemoteCoordinator(Entry(*server.address, server.token if token is None else token), count)


@needs_ipv6
def test_launchers_and_ranks_join_over_ipv6(tmp_path: Path) -> None:
    with training_alone(most=2, host="::1") as server, _admitting_others(server, tmp_path, "launch"):
        entry = entry_of(str(tmp_path / "join-launch.json"))
        assert entry.host == "::1"
        with RemoteCoordinator(entry, 1) as coordinator:
            assert slots_of(coordinator) == [1]


def test_a_disk_that_fails_is_no_mistake_of_the_user_who_lets_others_join(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "mkdir", Mock(side_effect=OSError(errno.ESTALE, "Stale file handle")))
    server = Mock(address=("node1", 1), token="")
    with raises(FaultError, "disk-failed"), _admitting_others(server, tmp_path, "launch"):
        pass


def slots_of(coordinator: RemoteCoordinator) -> Sequence[int]:
    slots: Sequence[int] = coordinator.await_start()["slots"]
    return slots


@contextmanager
def training_alone(most: int, host: str = "127.0.0.1") -> Iterator[MembershipServer]:
    with serving(1, 5.0, most, host) as server:
        alone = member(server, 0)
        meet([alone])
        begin_training(server, [alone])
        yield server
        alone.leave("")


def test_another_node_gets_slots_of_its_own_as_long_as_there_is_room() -> None:
    with training_alone(most=4) as server, joining(server, 1) as other:
        with joining(server, 2) as one:
            assert [*slots_of(one), *slots_of(other)] == [2, 3, 1]
            with joining(server, 1) as refused, pytest.raises(UsageError, match="at most 4") as error:
                refused.await_start()
            assert error.value.code == "join-refused"
        wait_for(lambda: server.expected == 2)
        with joining(server, 2) as again:
            assert slots_of(again) == [2, 3]


def test_a_node_that_is_not_needed_to_begin_waits_until_ranks_train() -> None:
    with serving(1, 5.0, most=2) as server, joining(server, 1) as node:
        node.poll(0.1)
        alone = member(server, 0)
        meet([alone])
        assert not server.view.has_state
        alone.report_state(works=True)
        assert slots_of(node) == [1]
        alone.leave("")


def test_of_nodes_that_come_at_once_only_those_start_with_which_the_run_begins() -> None:
    server = MembershipServer(limits(4, most=6), here=2)
    launchers = [socket.create_connection(server.address) for _ in range(2)]
    while len(server._server.heard) < 2:
        server.poll(1.0)
    for number, launcher in enumerate(launchers, start=1):
        proof = proof_of("peer", server.token, json.loads(launcher.recv(1000))["text"])
        hello = {"kind": "hello", "proof": proof, "challenge": "", "node": f"node{number}", "process": 1, "ranks": 2}
        launcher.sendall(json.dumps(hello).encode() + b"\n")
    server.poll(1.0)
    server.poll(0.0)
    assert len(server._nodes) == 2
    assert server.expected == 4
    server.close()
    for launcher in launchers:
        launcher.close()


def test_a_node_that_is_asked_to_stop_asks_all() -> None:
    with training_alone(most=2) as server, joining(server, 1) as node:
        node.ask_to_stop()
        wait_for(lambda: server.view.stop_requested)


def test_a_node_whose_launcher_is_gone_has_no_ranks_left() -> None:
    ended: list[int] = []
    with training_alone(most=2) as server:
        with joining(server, 1) as node:
            joined = member(server, slots_of(node)[0], ended)
        wait_for(lambda: ended == [1])
        joined.leave("")


def test_a_node_that_is_lost_before_training_ends_the_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    launcher, *ranks = 1, 2, 3
    with closing(MembershipServer(limits(3), here=1)) as server:
        server._nodes[launcher] = JoinedNode("node2", 7, 2, slots=(1, 2), processes=2)
        for slot, peer_id in enumerate((4, *ranks)):
            server._apply(connect, Peer(peer_id, slot))
        heard = {launcher: -99.0, **dict.fromkeys(ranks, -99.0), 4: 0.0}
        monkeypatch.setattr(MessageServer, "heard", heard)
        server._suspensions.was_suspended(0.0)
        server._expel_silent(0.0)
        assert server.state.has_ended
        assert not server.expelled, "of those processes this launcher can kill none"


def test_launcher_without_ranks_records_why_those_of_other_nodes_are_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(LAUNCH_VARIABLE, "abc")
    file = RunDirectory(tmp_path).status
    StatusFile(file, 1).change("running")
    with closing(MembershipServer(limits(1), here=0)) as server:
        server.state = replace(server.state, has_ended=True, lost=("rank 0 (node1, process 7) died",))
        local = LocalProcesses((), (), "abc", Entry(*server.address, server.token), 1)
        _ElasticRanks(local, set(), server, 0).wait_and_record(tmp_path, "abc")
    status = read_status(file)
    assert status is not None
    assert "rank 0 (node1, process 7) died" in status.reason


def test_the_exit_code_is_not_that_of_a_rank_without_which_the_run_continued() -> None:
    with closing(MembershipServer(limits(2))) as server:
        server.state = met(2)
        server.note_code(ExitCode.USAGE)  # of a process that could not join
        assert server.first_failure() == ExitCode.USAGE
        server._apply(remove, 10, "failed: a damaged file")
        server.note_code(ExitCode.USAGE)
        server._apply(mark_ready, 11, 1, why="gradient.0: reset")
        server._apply(remove, 11, "died")
        server.note_code(-9)
        server.note_code(ExitCode.USAGE)
        assert server.first_failure() == ExitCode.FAULT


def test_the_exit_code_is_that_of_the_rank_whose_loss_left_too_few() -> None:
    with closing(MembershipServer(limits(2, fewest=2))) as server:
        server.state = met(2, fewest=2)
        server._apply(remove, 10, "failed: a damaged file")
        server.note_code(ExitCode.USAGE)
        server._apply(mark_ready, 11, 1, why="gradient.0: reset")
        server._apply(set_may_grow, False)
        server.note_code(ExitCode.FAULT)
        assert server.first_failure() == ExitCode.USAGE


@pytest.mark.parametrize("admits_all", [False, True])
def test_a_launcher_runs_nothing_for_a_coordinator_that_does_not_know_the_token(
    admits_all: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if admits_all:
        monkeypatch.setattr(MessageServer, "_knows_token", lambda *_: True)
    with serving(1, 5.0) as server, pytest.raises(UsageError) as refused:
        joining(server, 1, token="another")
    assert refused.value.code == "join-token"


def joined_rank(entry: Entry) -> Member:
    return Member(5.0, {**entry.variables, "RANK": "0"}, lambda: None)


@pytest.mark.parametrize("version", [{}, {"version": "9.9"}], ids=["unnamed", "another"])
@pytest.mark.parametrize("join", [lambda entry: RemoteCoordinator(entry, 1), joined_rank], ids=["launcher", "rank"])
def test_nobody_joins_a_launcher_of_another_version_whose_messages_may_differ(
    join: Callable[[Entry], object], version: dict[str, str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other, ThreadPoolExecutor() as pool:
        host, port = other.getsockname()
        attempt = pool.submit(join, Entry(host, port, "token"))
        connection, _ = other.accept()
        connection.sendall(b'{"kind": "challenge", "text": ""}\n')
        hello = json.loads(connection.recv(1 << 16))
        known = {"kind": "known", "proof": proof_of("coordinator", "token", hello["challenge"]), **version}
        connection.sendall(json.dumps(known).encode() + b'\n{"kind": "welcome"}\n')
        with raises(UsageError, "join-version"):
            attempt.result()
        connection.close()


def test_a_launcher_is_not_deceived_by_what_another_one_proves() -> None:
    def hello_of(launcher: socket.socket, challenge: str) -> dict[str, Any]:
        launcher.sendall(json.dumps({"kind": "challenge", "text": challenge}).encode() + b"\n")
        fields: dict[str, Any] = json.loads(launcher.recv(1 << 16))
        return fields

    with socket.create_server(("127.0.0.1", 0)) as impostor, ThreadPoolExecutor() as pool:
        host, port = impostor.getsockname()
        joins = [pool.submit(RemoteCoordinator, Entry(host, port, "token"), 1) for _ in range(2)]
        (deceived, _), (other, _) = impostor.accept(), impostor.accept()
        asked = hello_of(deceived, "")["challenge"]
        proof = hello_of(other, f"coordinator {asked}")["proof"]
        deceived.sendall(2 * (json.dumps({"kind": "known", "proof": proof, "timeout": 5}).encode() + b"\n"))
        other.close()
        refusals = [join.exception() for join in joins]
        deceived.close()
    assert [getattr(refusal, "code", None) for refusal in refusals] == ["join-token", "join-token"]


def test_a_rank_obeys_no_coordinator_that_does_not_know_the_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MessageServer, "_knows_token", lambda *_: True)
    with serving(1, 5.0) as server, pytest.raises(RankLostError):
        Member(server.timeout, variables_of(server, 0, token="another"), lambda: None)


def test_nobody_runs_what_a_readable_file_names(tmp_path: Path) -> None:
    file = tmp_path / "join-1.json"
    file.write_text('{"address": "10.0.0.1:99", "token": "secret"}')
    file.chmod(0o644)
    with pytest.raises(UsageError) as refused:
        entry_of(str(file))
    assert refused.value.code == "join-token"
    file.chmod(0o600)
    assert entry_of(str(file)) == Entry("10.0.0.1", 99, "secret")
    assert entry_of("node1:99", {TOKEN_VARIABLE: "secret"}) == Entry("node1", 99, "secret")
    assert entry_of("[fd00::2]:99", {TOKEN_VARIABLE: "secret"}) == Entry("fd00::2", 99, "secret")
