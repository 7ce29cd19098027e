from __future__ import annotations

import errno
import gzip
import io
import pickle
import tarfile
from pathlib import Path
from typing import Literal
from unittest.mock import Mock

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dist_train.data.images import ImageSet, Split
from dist_train.data.published import CIFAR10, CIFAR100, Archive, decode_archive, find_archive
from dist_train.outcome import FaultError, UsageError
from tests.archives import (
    Written,
    cifar10_members,
    cifar100_members,
    packed_members,
    python2_pickle,
    write_members,
)
from tests.raising import raises

FUZZ = settings(deadline=None, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])


def read(root: Path, split: Split = "train", archive: Archive = CIFAR10) -> ImageSet:
    return decode_archive(archive, root, find_archive(archive, root, split), split)


def same(images: ImageSet, written: Written) -> bool:
    return np.array_equal(images.images.numpy(), written.images) and images.labels.tolist() == written.labels.tolist()


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("archive", [CIFAR10, CIFAR100], ids=["10", "100"])
def test_the_standard_archives_are_read_packed_or_unpacked(tmp_path: Path, packed: bool, archive: Archive) -> None:
    members, train, test = cifar10_members() if archive is CIFAR10 else cifar100_members()
    if packed:
        (tmp_path / archive.file).write_bytes(packed_members(archive.folder, members))
    else:
        write_members(tmp_path / archive.folder, members)
    assert same(read(tmp_path, "train", archive), train)
    assert same(read(tmp_path, "test", archive), test)
    assert read(tmp_path, "test", archive).classes == archive.classes


def test_reading_an_archive_writes_nothing(tmp_path: Path) -> None:
    (tmp_path / CIFAR10.file).write_bytes(packed_members(CIFAR10.folder, cifar10_members()[0]))
    read(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [CIFAR10.file]


def test_missing_files_are_named_with_their_place(tmp_path: Path) -> None:
    with raises(UsageError, "data-missing") as raised:
        find_archive(CIFAR10, tmp_path, "train")
    for part in ("cifar-10-python.tar.gz", "cifar-10-batches-py", str(tmp_path)):
        assert part in str(raised.value)


def test_a_missing_batch_is_named(tmp_path: Path) -> None:
    members = cifar10_members()[0]
    del members["data_batch_3"]
    write_members(tmp_path / CIFAR10.folder, members)
    with raises(UsageError, "data-missing"):
        read(tmp_path)
    (tmp_path / CIFAR10.file).write_bytes(packed_members(CIFAR10.folder, members))
    with raises(UsageError, "data-missing"):
        read(tmp_path)


ROWS = np.zeros((2, 3072), dtype=np.uint8)


@pytest.mark.parametrize(
    ("record", "code"),
    [
        ({"data": ROWS, "labels": [0, 10]}, "data-labels"),
        ({"data": ROWS, "labels": [0, -1]}, "data-labels"),
        ({"data": ROWS, "labels": [0]}, "data-counts"),
        ({"data": ROWS, "labels": [0, "1"]}, "data-counts"),
        ({"data": ROWS, "fine_labels": [0, 1]}, "data-counts"),
        ({"labels": [0, 1]}, "data-shape"),
        ({"data": ROWS[:, 1:], "labels": [0, 1]}, "data-shape"),
        ({"data": ROWS[0], "labels": [0, 1]}, "data-shape"),
        ({"data": ROWS.astype(np.int64), "labels": [0, 1]}, "data-shape"),
        ({"data": "text", "labels": [0, 1]}, "data-shape"),
    ],
)
@pytest.mark.parametrize("packed", [True, False])
def test_a_damaged_batch_is_named_with_what_is_wrong_and_the_fix(
    tmp_path: Path, record: dict[str, object], code: str, packed: bool
) -> None:
    members = {"test_batch": python2_pickle(record)}
    if packed:
        (tmp_path / CIFAR10.file).write_bytes(packed_members(CIFAR10.folder, members))
    else:
        write_members(tmp_path / CIFAR10.folder, members)
    with raises(UsageError, code):
        read(tmp_path, "test")


@pytest.mark.parametrize("protocol", [2, 3, 4])
@pytest.mark.parametrize("order", ["C", "F"])
def test_batches_that_python_3_has_written_anew_are_read(
    tmp_path: Path, protocol: int, order: Literal["C", "F"]
) -> None:
    members, _, test = cifar10_members()
    batch = pickle.loads(members["test_batch"], encoding="bytes")
    for record in (batch, {key.decode(): value for key, value in batch.items()}):
        again = {
            name: np.asarray(value, order=order) if name in (b"data", "data") else value
            for name, value in record.items()
        }
        write_members(tmp_path / CIFAR10.folder, {"test_batch": pickle.dumps(again, protocol)})
        assert same(read(tmp_path, "test"), test)


COMMAND = b"U\x0atouch here\x85R"
ARRAY = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
MALICIOUS = {
    "global": b"\x80\x02cos\nsystem\n" + COMMAND + b".",
    "in a list": b"\x80\x02}U\x06labels](K\x01cos\nsystem\n" + COMMAND + b"es.",
    "stack global": b"\x80\x04\x8c\x02os\x8c\x06system\x93" + COMMAND + b".",
    "instance": b"(S'touch here'\nios\nsystem\n.",
    "object": b"\x80\x02(cos\nsystem\nU\x0atouch hereo.",
    "eval": b"\x80\x02cbuiltins\neval\nU\x021+\x85R.",
    "dotted name": b"\x80\x04\x8c\x05numpy\x8c\x0edtype.__init__\x93)R.",
    "numpy's own loader": b"\x80\x02cnumpy\nload\nU\x01x\x85R.",
    "extension": b"\x80\x02\x82\x01.",
    "persistent": b"\x80\x02U\x01xQ.",
    "new object": b"\x80\x02cnumpy\nndarray\n)\x81.",
    "other encoding": b"\x80\x02}U\x01ac_codecs\nencode\nX\x01\x00\x00\x00aX\x04\x00\x00\x00zlib\x86Rs.",
    "after the record": pickle.dumps({"labels": [1]}, 2)[:-1] + b"cos\nsystem\n" + COMMAND + b"0.",
    "memo number": b"\x80\x02}r\xff\xff\xff\xff.",
    "memo number in text": b"}p4294967295\n.",
    "length": b"\x80\x05}\x96\xff\xff\xff\xff\xff\x00\x00\x00abc.",
    "deep key": b"\x80\x02})" + b"\x85" * 3_000_000 + b"K\x01s.",
    "array of objects": b"\x80\x02}U\x04data" + ARRAY + b"(K\x01K\x01\x85cnumpy\ndtype\nU\x02O8K\x00K\x01\x87R"
    b"\x89U\x08abcdefghtbs.",
}


@pytest.mark.parametrize("kind", MALICIOUS)
def test_a_batch_that_holds_more_than_plain_data_is_refused_and_runs_nothing(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_members(tmp_path / CIFAR10.folder, {"test_batch": MALICIOUS[kind]})
    with pytest.raises(UsageError):
        read(tmp_path, "test")
    assert not Path("here").exists()
    if kind == "global":
        pickle.loads(MALICIOUS[kind])
        assert Path("here").exists(), "the pickle would do no harm elsewhere"


def test_a_batch_cannot_change_what_the_next_one_is_read_with(tmp_path: Path) -> None:
    poison = b"}U\x0c__setstate__Ns"
    names = (b"cnumpy\nndarray\n", b"cnumpy\ndtype\n", b"cnumpy.core.multiarray\n_reconstruct\n", b"c_codecs\nencode\n")
    for name in names:
        for state in (poison + b"b", b"N" + poison + b"\x86b"):
            write_members(tmp_path / CIFAR10.folder, {"test_batch": b"\x80\x02" + name + state + b"."})
            with pytest.raises(UsageError):
                read(tmp_path, "test")
    members, _, test = cifar10_members()
    write_members(tmp_path / CIFAR10.folder, members)
    assert same(read(tmp_path, "test"), test)


def test_an_archive_cut_short_is_named(tmp_path: Path) -> None:
    whole = packed_members(CIFAR10.folder, cifar10_members()[0])
    path = tmp_path / CIFAR10.file
    for length in (0, 10, len(whole) // 2, len(whole) - 4):
        path.write_bytes(whole[:length])
        with raises(UsageError, "data-unpackable"):
            read(tmp_path)


def test_a_member_in_another_folder_or_that_is_no_file_is_not_taken(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        link = tarfile.TarInfo(f"{CIFAR10.folder}/test_batch")
        link.type = tarfile.SYMTYPE
        link.linkname = "/etc/passwd"
        archive.addfile(link)
        archive.addfile(tarfile.TarInfo("elsewhere/test_batch"))
    (tmp_path / CIFAR10.file).write_bytes(buffer.getvalue())
    with raises(UsageError, "data-unpackable"):
        read(tmp_path, "test")


def test_a_disk_that_fails_may_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / CIFAR10.file).touch()
    monkeypatch.setattr(gzip, "open", Mock(side_effect=OSError(errno.EIO, "the reason")))
    with raises(FaultError, "data-unreadable") as refused:
        read(tmp_path, "test")
    assert f"{tmp_path / CIFAR10.file}: the reason" in str(refused.value)


@FUZZ
@given(st.binary(max_size=600))
def test_random_bytes_never_give_anything_but_a_usage_error(tmp_path: Path, content: bytes) -> None:
    packed, unpacked = tmp_path / CIFAR10.file, tmp_path / "test_batch"
    unpacked.write_bytes(content)
    with pytest.raises(UsageError):
        decode_archive(CIFAR10, tmp_path, [unpacked], "test")
    for outer in (content, gzip.compress(content)):
        packed.write_bytes(outer)
        with pytest.raises(UsageError):
            decode_archive(CIFAR10, tmp_path, [packed], "test")


MEMBERS, _, TEST = cifar10_members(per_batch=2)
BATCH = MEMBERS["test_batch"]
TAR = gzip.decompress(packed_members(CIFAR10.folder, {"test_batch": BATCH}))


def flipped(content: bytes, bit: int) -> bytes:
    damaged = bytearray(content)
    damaged[bit // 8] ^= 1 << (bit % 8)
    return bytes(damaged)


def headers(content: bytes, length: int) -> st.SearchStrategy[int]:
    """Bits of the first and the last `length` bytes, where the structure lies."""
    bits = 8 * len(content)
    return st.integers(0, 8 * length - 1) | st.integers(bits - 8 * length, bits - 1)


@FUZZ
@given(headers(BATCH, 200))
def test_a_flipped_bit_in_a_batch_is_an_error_or_leaves_a_sound_set(tmp_path: Path, bit: int) -> None:
    path = tmp_path / "test_batch"
    path.write_bytes(flipped(BATCH, bit))
    try:
        images = decode_archive(CIFAR10, tmp_path, [path], "test")
    except UsageError:
        return
    assert images.images.shape == (2, 3, 32, 32)
    assert all(0 <= label < 10 for label in images.labels.tolist())


@FUZZ
@given(st.integers(0, 8 * len(gzip.compress(TAR, 1, mtime=0)) - 1))
def test_a_flipped_bit_in_an_archive_is_an_error_or_changes_nothing(tmp_path: Path, bit: int) -> None:
    path = tmp_path / CIFAR10.file
    path.write_bytes(flipped(gzip.compress(TAR, 1, mtime=0), bit))
    try:
        images = decode_archive(CIFAR10, tmp_path, [path], "test")
    except UsageError:
        return
    assert same(images, TEST)


@FUZZ
@given(st.integers(0, 8 * 1536 - 1))
def test_a_damaged_tar_header_never_gives_another_error(tmp_path: Path, bit: int) -> None:
    path = tmp_path / CIFAR10.file
    path.write_bytes(gzip.compress(flipped(TAR, bit), 1))
    try:
        images = decode_archive(CIFAR10, tmp_path, [path], "test")
    except UsageError:
        return
    assert images.images.shape == (2, 3, 32, 32)
