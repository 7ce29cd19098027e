from __future__ import annotations

import gzip
import struct
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dist_train.data import published
from dist_train.data.images import ImageSet, Split
from dist_train.data.published import decode_fashion_mnist, find_fashion_mnist
from dist_train.outcome import UsageError
from tests.archives import idx_bytes, random_set, write_fashion_mnist
from tests.raising import raises

FUZZ = settings(deadline=None, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])


def read(root: Path, split: Split = "train") -> ImageSet:
    return decode_fashion_mnist(find_fashion_mnist(root, split))


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("split", ["train", "test"])
def test_idx_files_are_read_plain_or_packed(tmp_path: Path, packed: bool, split: Literal["train", "test"]) -> None:
    written = write_fashion_mnist(tmp_path, split, packed=packed)
    images = read(tmp_path, split)
    assert np.array_equal(images.images.numpy(), written.images)
    assert images.labels.tolist() == written.labels.tolist()
    assert images.shape == (1, 28, 28)


def test_without_a_root_the_cache_folder_is_searched_after_debians(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(published, "DEBIAN_FOLDER", tmp_path / "absent")
    monkeypatch.setenv("DIST_TRAIN_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "cache" / "datasets" / "fashion-mnist"
    folder.mkdir(parents=True)
    write_fashion_mnist(folder)
    assert find_fashion_mnist(None, "train")[0].parent == folder


def test_a_missing_file_is_named_with_the_places_and_the_commands(tmp_path: Path) -> None:
    write_fashion_mnist(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte.gz").unlink()
    with raises(UsageError, "data-missing"):
        find_fashion_mnist(tmp_path, "train")


def test_no_files_at_all_names_both_and_the_usual_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(published, "DEBIAN_FOLDER", tmp_path / "debian")
    monkeypatch.setenv("DIST_TRAIN_CACHE", str(tmp_path))
    with raises(UsageError, "data-missing") as refused:
        find_fashion_mnist(None, "test")
    named = ("t10k-images-idx3", "t10k-labels-idx1", f"{tmp_path}/debian", f"{tmp_path}/datasets")
    assert all(name in str(refused.value) for name in named)


def header(count: int, height: int = 28, width: int = 28, magic: int = 0x803) -> bytes:
    return struct.pack(">4I", magic, count, height, width)


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"", "data-length"),
        (header(1)[:9], "data-length"),
        (header(1, magic=0x801) + bytes(784), "data-format"),
        (header(2) + bytes(784), "data-length"),
        (header(1) + bytes(785), "data-length"),
        (header(2**32 - 1, 2**32 - 1, 2**32 - 1), "data-length"),
        (header(1, 32, 32) + bytes(1024), "data-shape"),
        (header(0), "data-shape"),
    ],
)
@pytest.mark.parametrize("packed", [True, False])
def test_a_damaged_file_is_named_and_what_is_wrong_has_a_code(
    tmp_path: Path, content: bytes, code: str, packed: bool
) -> None:
    write_fashion_mnist(tmp_path, packed=packed)
    path = find_fashion_mnist(tmp_path, "train")[0]
    path.write_bytes(gzip.compress(content) if packed else content)
    with raises(UsageError, code) as refused:
        read(tmp_path)
    assert str(path) in str(refused.value)


def test_a_packed_file_cut_short_is_named(tmp_path: Path) -> None:
    write_fashion_mnist(tmp_path)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-100])
    with raises(UsageError, "data-unpackable"):
        read(tmp_path)


def test_a_label_out_of_range_is_named(tmp_path: Path) -> None:
    write_fashion_mnist(tmp_path, packed=False, count=3)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx_bytes(np.array([0, 10, 2], dtype=np.uint8)))
    with raises(UsageError, "data-labels"):
        read(tmp_path)


def test_counts_that_differ_are_named(tmp_path: Path) -> None:
    write_fashion_mnist(tmp_path, packed=False, count=3)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx_bytes(np.zeros(4, dtype=np.uint8)))
    with raises(UsageError, "data-counts"):
        read(tmp_path)


def test_a_folder_in_place_of_a_file_counts_as_missing(tmp_path: Path) -> None:
    write_fashion_mnist(tmp_path)
    (tmp_path / "train-images-idx3-ubyte.gz").unlink()
    (tmp_path / "train-images-idx3-ubyte.gz").mkdir()
    with raises(UsageError, "data-missing"):
        read(tmp_path)


@FUZZ
@given(st.binary(max_size=2000), st.binary(max_size=300), st.booleans())
def test_random_bytes_never_give_anything_but_a_usage_error(
    tmp_path: Path, images: bytes, labels: bytes, packed: bool
) -> None:
    end = ".gz" if packed else ""
    files = tmp_path / f"train-images-idx3-ubyte{end}", tmp_path / f"train-labels-idx1-ubyte{end}"
    for path, content in zip(files, (images, labels), strict=True):
        path.write_bytes(content)
    with pytest.raises(UsageError):
        decode_fashion_mnist(files)


@FUZZ
@given(data=st.data(), packed=st.booleans())
def test_a_flipped_bit_is_an_error_or_leaves_a_sound_set(tmp_path: Path, data: st.DataObject, packed: bool) -> None:
    written = random_set(12, (1, 28, 28), 10)
    contents = [idx_bytes(written.images[:, 0]), idx_bytes(written.labels)]
    if packed:
        contents = [gzip.compress(content, 1) for content in contents]
    which = data.draw(st.integers(0, 1))
    bit = data.draw(st.integers(0, min(len(contents[which]), 200) * 8 - 1))
    damaged = bytearray(contents[which])
    damaged[bit // 8] ^= 1 << (bit % 8)
    contents[which] = bytes(damaged)
    end = ".gz" if packed else ""
    files = tmp_path / f"images{end}", tmp_path / f"labels{end}"
    for path, content in zip(files, contents, strict=True):
        path.write_bytes(content)
    try:
        images = decode_fashion_mnist(files)
    except UsageError:
        return
    assert images.images.shape == (12, 1, 28, 28)
    assert 0 <= int(images.labels.min()) <= int(images.labels.max()) < 10
    if packed:  # gzip's checksum covers every byte of the content
        assert np.array_equal(images.images.numpy(), written.images)
        assert images.labels.tolist() == written.labels.tolist()


@pytest.mark.parametrize(("split", "count"), [("train", 60000), ("test", 10000)])
def test_the_real_files_hold_what_is_published(split: Split, count: int) -> None:
    try:
        files = find_fashion_mnist(None, split)
    except UsageError:
        pytest.skip("Fashion-MNIST is not installed: apt-get install dataset-fashion-mnist")
    images = decode_fashion_mnist(files)
    assert images.images.shape == (count, 1, 28, 28)
    assert torch.bincount(images.labels).tolist() == [count // 10] * 10
