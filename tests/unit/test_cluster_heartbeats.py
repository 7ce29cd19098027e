"""Who counts as lost: silence, sleep of the watcher, goodbyes."""

from __future__ import annotations

from collections import Counter

from hypothesis import example, given, settings
from hypothesis import strategies as st

from dist_train.cluster.heartbeats import (
    TOKEN_BYTES,
    Datagram,
    HeartbeatMonitor,
    Kind,
    deadline_message,
    decode,
    encode,
    interval_of,
    loss_message,
    name_ranks,
    resolve,
)

TIMEOUT, BEAT = 60.0, 5.0
EIGHTH = 8  # of a second: sums of such times are exact as floats, also where one equals a timeout
PLACES = {rank: f"node{rank // 2}, process {4240 + rank}" for rank in range(40)}


def monitor_of(*ranks: int) -> HeartbeatMonitor:
    made = HeartbeatMonitor(timeout=TIMEOUT, beat=BEAT, now=0.0)
    for rank in ranks:
        made.hear(rank, 0.0)
    return made


@settings(deadline=None, max_examples=50)
@given(
    silence=st.integers(1, int(TIMEOUT) * EIGHTH - 1).map(lambda time: time / EIGHTH),
    pace=st.integers(2, int(BEAT) * EIGHTH).map(lambda time: time / EIGHTH),
)
@example(silence=TIMEOUT - 1 / EIGHTH, pace=0.25)
def test_nobody_is_named_who_was_heard_within_the_timeout(silence: float, pace: float) -> None:
    watched = monitor_of(1)
    for now in (number * pace for number in range(600)):
        watched.hear(1, now - now % silence)
        assert watched.silent(now) == []


@settings(deadline=None, max_examples=50)
@given(
    last=st.integers(0, 100 * EIGHTH).map(lambda time: time / EIGHTH),
    pace=st.integers(2, int(BEAT) * EIGHTH).map(lambda time: time / EIGHTH),
)
def test_a_silent_rank_is_named_within_the_timeout_and_a_beat(last: float, pace: float) -> None:
    watched, now = monitor_of(1, 2), 0.0
    while True:
        now += pace
        watched.hear(2, now)
        if now <= last:
            watched.hear(1, now)
        if silent := watched.silent(now):
            break
        assert now < last + TIMEOUT + BEAT
    assert silent == [1]
    assert now >= last - pace + TIMEOUT


@settings(deadline=None, max_examples=50)
@given(sleep=st.integers(int(2.1 * BEAT * EIGHTH), 10**7).map(lambda time: time / EIGHTH))
def test_a_watcher_that_slept_gives_everybody_the_whole_timeout_anew(sleep: float) -> None:
    watched = monitor_of(1)
    watched.fail(2, 0.0)
    woken = sleep
    looks = [woken + BEAT * number for number in range(int(TIMEOUT / BEAT))]
    assert [watched.silent(now) for now in looks] == [[]] * len(looks)
    assert watched.past_deadline(looks[-1]) is None
    assert watched.silent(woken + TIMEOUT) == [1]
    assert watched.past_deadline(woken + TIMEOUT) == 2


def test_all_ranks_of_a_dead_node_are_named_together() -> None:
    watched = monitor_of(1, 2, 3)
    for now in range(5, 60, 5):
        watched.hear(3, now)
        if now == 5:
            watched.hear(2, now)
        assert watched.silent(now) == []
    assert watched.silent(60.0) == [1, 2]


def test_who_has_left_is_not_missed_and_late_words_do_not_bring_it_back() -> None:
    watched = monitor_of(1, 2)
    watched.leave(1)
    watched.hear(1, 1.0)
    assert watched.present == [2]
    watched.leave(2)
    for now in range(0, 200, 5):
        assert watched.silent(now) == []
        assert watched.past_deadline(now) is None


def test_after_an_error_of_one_the_others_have_the_timeout_to_end() -> None:
    watched = monitor_of(1, 2)
    watched.fail(2, 10.0)
    watched.fail(1, 30.0)
    assert watched.past_deadline(69.9) is None
    assert watched.past_deadline(70.0) == 2


def test_a_roll_call_finds_those_who_have_said_nothing_since() -> None:
    watched = monitor_of(1, 2, 3)
    watched.hear(2, 5.0)
    watched.leave(3)
    assert watched.unheard_since(4.0) == [1]


def test_messages_name_ranks_node_and_process_and_the_fix() -> None:
    fix = "the run ends; start the same command again to resume from the last checkpoint"
    assert loss_message([3], PLACES, 60.0) == f"rank 3 (node1, process 4243) has not answered for 60 s; {fix}"
    assert loss_message([2, 3], PLACES, 4.5) == (
        f"ranks 2 (node1, process 4242), 3 (node1, process 4243) have not answered for 4.5 s; {fix}"
    )
    assert deadline_message(1, PLACES, 60.0) == (
        f"rank 1 (node0, process 4241) has failed, and the others have not ended within 60 s; {fix}"
    )
    assert name_ranks(list(range(40)), PLACES).endswith("7 (node3, process 4247) and 32 more")


def test_beats_of_ranks_that_begin_together_do_not_keep_arriving_together() -> None:
    ranks, window = 1024, 0.1  # seconds between rank 0's receptions
    intervals = [interval_of(rank, ranks, BEAT) for rank in range(ranks)]
    assert all(0.75 * BEAT < interval <= BEAT for interval in intervals)
    arrivals = Counter(int(beat * interval / window) for interval in intervals for beat in range(5, 1000))
    assert max(arrivals.values()) < 98  # what a buffer of Linux's default size may hold


TOKEN = b"0123456789abcdef" * (TOKEN_BYTES // 16)


@settings(deadline=None, max_examples=50)
@given(kind=st.sampled_from(Kind), text=st.text(max_size=40), bit=st.integers(0))
def test_a_datagram_of_which_a_bit_was_changed_on_the_way_is_none_of_ours(kind: Kind, text: str, bit: int) -> None:
    sent = encode(TOKEN, Datagram(kind, 3, text=text))
    changed = bytearray(sent)
    changed[bit // 8 % len(sent)] ^= 1 << bit % 8
    assert decode(TOKEN, bytes(changed)) is None
    assert decode(TOKEN, sent) is not None


def test_who_hears_a_datagram_cannot_make_another_from_it() -> None:
    heard = encode(TOKEN, Datagram(Kind.BEAT, 1, text="node1 4242"))
    assert TOKEN[:16] not in heard
    assert decode(TOKEN, heard[:16] + encode(TOKEN, Datagram(Kind.LOST, 0, text="end"))[16:]) is None


def test_names_without_ipv4_have_their_ipv6_address() -> None:
    assert [resolve(name) for name in ("localhost", "127.0.0.2", "fd00::2")] == ["127.0.0.1", "127.0.0.2", "fd00::2"]
