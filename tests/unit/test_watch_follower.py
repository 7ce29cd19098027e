"""A file that another process writes: every whole line once, whatever happens to the file."""

from __future__ import annotations

import os
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_train.watch.run import Follower, News


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "metrics.jsonl"


def append(path: Path, content: bytes) -> None:
    with path.open("ab") as file:
        file.write(content)


def test_a_file_that_is_not_there_yet_has_no_news(path: Path) -> None:
    follower = Follower(path)
    assert follower.look() == News()
    path.write_bytes(b"1\n2\n")
    assert follower.look() == News((b"1", b"2"))
    assert follower.look() == News()


def test_a_torn_line_waits_until_it_is_whole(path: Path) -> None:
    follower = Follower(path)
    path.write_bytes(b"1\n2")
    assert follower.look() == News((b"1",))
    append(path, b"2\n")
    assert follower.look() == News((b"22",))


@pytest.mark.parametrize("content", [b"1\n", b"1\n3\n", b"5\n6\n7\n", b""])
def test_a_file_cut_back_or_written_anew_is_read_anew(path: Path, content: bytes) -> None:
    path.write_bytes(b"1\n2\n")
    follower = Follower(path)
    follower.look()
    path.write_bytes(content)
    assert follower.look() == News(tuple(content.split()), rewound=True)


def test_another_file_in_its_place_is_read_anew(path: Path, tmp_path: Path) -> None:
    path.write_bytes(b"1\n2\n")
    follower = Follower(path)
    follower.look()
    other = tmp_path / "other"
    other.write_bytes(b"1\n2\n3\n")
    os.replace(other, path)
    assert follower.look() == News((b"1", b"2", b"3"), rewound=True)


def test_a_file_that_vanishes_makes_all_void_once(path: Path) -> None:
    path.write_bytes(b"1\n")
    follower = Follower(path)
    follower.look()
    path.unlink()
    assert follower.look() == News(rewound=True)
    assert follower.look() == News()


def test_a_long_file_is_read_in_parts_of_whole_lines_that_need_little_memory(path: Path) -> None:
    lines = [b"%07d %s" % (number, b"." * 991) for number in range(50_000)]
    path.write_bytes(b"\n".join(lines) + b"\n")
    follower = Follower(path)
    tracemalloc.start()
    try:
        parts = [len(part.lines) for part in iter(follower.look, News())]
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert sum(parts) == 50_000
    assert most < 20e6
    again = Follower(path)
    assert [line for part in iter(again.look, News()) for line in part.lines] == lines


@settings(deadline=None, max_examples=50)
@given(pieces=st.lists(st.binary(max_size=400).map(lambda piece: piece.replace(b"\r", b"\n")), max_size=12))
def test_however_lines_arrive_each_is_read_once(pieces: list[bytes], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("followed") / "file"
    follower = Follower(path)
    seen: list[bytes] = []
    for piece in pieces:
        append(path, piece)
        news = follower.look()
        assert not news.rewound
        seen.extend(news.lines)
    assert seen == b"".join(pieces).split(b"\n")[:-1]
