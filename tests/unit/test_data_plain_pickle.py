from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_train.data import plain_pickle
from dist_train.data.plain_pickle import PlainPickleError, load_record
from tests.archives import python2_pickle

ROWS = np.arange(24, dtype=np.uint8).reshape(4, 6)


def test_the_test_archives_are_pickles_as_python_2_wrote_them() -> None:
    record = pickle.loads(python2_pickle({"data": ROWS, "labels": [0, 300], "name": "a"}), encoding="bytes")
    assert np.array_equal(record[b"data"], ROWS)
    assert record[b"labels"] == [0, 300]
    assert record[b"name"] == b"a"


def test_python_2_pickles_are_read() -> None:
    record = load_record(python2_pickle({"data": ROWS, "labels": [0, 300], "name": "a" * 400}))
    assert np.array_equal(record["data"], ROWS)  # type: ignore[arg-type]
    assert record["labels"] == [0, 300]
    assert record["name"] == b"a" * 400


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("array", [ROWS, ROWS.T, ROWS.astype(">i4"), ROWS[0].astype(np.int64)], ids=str)
def test_python_3_pickles_are_read(protocol: int, array: np.ndarray[tuple[int, ...], np.dtype[np.int64]]) -> None:
    numbers = [np.int64(3), np.uint8(250), -7]
    record = load_record(pickle.dumps({b"data": array, "labels": numbers, "more": None}, protocol))
    read = record["data"]
    assert isinstance(read, np.ndarray)
    assert np.array_equal(read, array)
    assert read.dtype == array.dtype
    assert record["labels"] == [3, 250, -7]


class Command:
    """Runs a command when it is unpickled the ordinary way."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.marker}",)


def malicious(marker: Path) -> dict[str, bytes]:
    command = f"touch {marker}".encode()
    return {
        "reduce, protocol 2": pickle.dumps({"labels": Command(marker)}, 2),
        "reduce, protocol 4": pickle.dumps({"labels": [1, Command(marker)]}, 4),
        "global": b"\x80\x02cos\nsystem\nU" + bytes([len(command)]) + command + b"\x85R.",
        "instance": b"(S'" + command + b"'\nios\nsystem\n.",
        "object": b"\x80\x02(cos\nsystem\nU" + bytes([len(command)]) + command + b"o.",
        "eval": b"\x80\x02cbuiltins\neval\nU\x021+\x85R.",
        "dotted name": b"\x80\x04\x8c\x05numpy\x8c\x0edtype.__init__\x93)R.",
        "numpy's own loader": b"\x80\x02cnumpy\nload\nU\x01x\x85R.",
        "object array": pickle.dumps({"data": np.array([Command(marker)], dtype=object)}, 2),
        "extension": b"\x80\x02\x82\x01.",
        "persistent": b"\x80\x02U\x01xQ.",
        "new object": b"\x80\x02cnumpy\nndarray\n)\x81.",
        "after the record": pickle.dumps({"labels": [1]}, 2)[:-1]
        + b"cos\nsystem\nU"
        + bytes([len(command)])
        + command
        + b"\x85R0.",
    }


@pytest.mark.parametrize("kind", malicious(Path("x")))
def test_a_malicious_pickle_is_refused_and_not_executed(kind: str, tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    with pytest.raises(PlainPickleError):
        load_record(malicious(marker)[kind])
    assert not marker.exists()


def test_the_malicious_pickles_would_do_harm_elsewhere(tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    pickle.loads(malicious(marker)["reduce, protocol 2"])
    assert marker.exists()


def test_a_pickle_cannot_change_what_the_next_one_is_read_with() -> None:
    poison = b"\x80\x02}(U\x01ac_codecs\nencode\nN}X\x06\x00\x00\x00poisonU\x01xs\x86bu."
    load_record(poison)
    assert not any(hasattr(function, "poison") for function in plain_pickle._ADMITTED.values())


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "no sound pickle"),
        (pickle.dumps([1, 2], 2), "a list, not a dictionary"),
        (pickle.dumps({1: 2}, 2), "a int where a name belongs"),
        (pickle.dumps({"data": np.zeros(3)}, 2), "an array of 'f8', not of integers"),
        (b"\x80\x02}r\xff\xff\xff\xff.", "memo number 4294967295"),
        (b"\x80\x02}T\xff\xff\xff\x7fabc.", "no sound pickle"),
        (b"\x80\x05}\x96\xff\xff\xff\xff\xff\x00\x00\x00abc.", "no sound pickle"),
    ],
)
def test_a_damaged_pickle_is_refused_with_the_reason(content: bytes, reason: str) -> None:
    with pytest.raises(PlainPickleError, match=reason):
        load_record(content)


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_damaged_bytes_never_give_another_error(data: st.DataObject) -> None:
    content = bytearray(python2_pickle({"data": ROWS, "labels": [1, 2, 3, 4], "filenames": ["a", "b"]}))
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place : place + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=3))
    try:
        load_record(bytes(content))
    except PlainPickleError:
        return


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=300))
def test_random_bytes_never_give_another_error(content: bytes) -> None:
    try:
        load_record(content)
    except PlainPickleError:
        return
