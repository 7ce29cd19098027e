"""Images in files of other programs: the same samples as of the image folder that they are made from; mistakes."""

from __future__ import annotations

import errno
import io
import logging
import os
import resource
import shutil
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pyarrow
import pytest
import torch
from pyarrow import parquet

from dist_train.config import DataSettings, parse_config
from dist_train.data import columns
from dist_train.data.catalog import find_data
from dist_train.data.encoded import packed_listing
from dist_train.data.images import BatchRequest
from dist_train.data.loader import Samples, Splits, open_splits, training_labels
from dist_train.outcome import FaultError, UsageError
from tests.raising import raises, raises_problems
from tests.unit.image_folders import write_folder
from tests.unit.image_sets import write_arrays, write_index, write_parquet, write_saved, write_shards

CPU = torch.device("cpu")
SIZE = 8
SEED = 5
WRITERS: dict[str, Callable[[Path, Path, int], Path]] = {
    "parquet": write_parquet,
    "webdataset": write_shards,
    "huggingface": write_saved,
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("folder"))


@pytest.fixture(scope="module")
def folders(root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sources")
    return {name: write(folder / name, root, 3) for name, write in WRITERS.items()}


def data(name: str, root: Path, **others: object) -> DataSettings:
    values = {"name": name, "root": root, "classes": 3, "image_size": SIZE, **others}
    return DataSettings.model_validate(values)


def read(splits: Splits, epoch: int | None) -> Iterator[torch.Tensor]:
    for samples in filter(None, (splits.train, splits.test, splits.validation)):
        yield from samples.read(BatchRequest(torch.arange(len(samples)), epoch))


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize(
    "others", [{}, {"augment": "crop-flip", "normalize": True}, {"train_size": 9, "validation_size": 6}]
)
def test_samples_are_those_of_the_image_folder(
    name: str, others: dict[str, Any], root: Path, folders: dict[str, Path]
) -> None:
    expected = open_splits(data("imagefolder", root, **others), SEED, CPU)
    find_data(data(name, folders[name], **others))
    for _ in ("index made", "index kept"):
        found = open_splits(data(name, folders[name], **others), SEED, CPU)
        for mine, theirs in zip(read(found, 1), read(expected, 1), strict=True):
            assert torch.equal(mine, theirs)
    assert torch.equal(training_labels(data(name, folders[name], **others), SEED), list(read(expected, 1))[1])
    assert found.identity
    assert found.identity != open_splits(data(name, folders[name], **others), SEED + 1, CPU).identity


def test_parts_of_files_come_from_loader_processes_too(root: Path, folders: dict[str, Path]) -> None:
    expected = open_splits(data("imagefolder", root, augment="crop-flip"), SEED, CPU)
    found = open_splits(data("webdataset", folders["webdataset"], augment="crop-flip", loader_workers=1), SEED, CPU)
    try:
        assert all(map(torch.equal, read(found, 2), read(expected, 2)))
    finally:
        found.close()


@pytest.mark.parametrize("form", ["last", "first", "npz"])
def test_arrays_are_images_as_they_are(form: str, root: Path, tmp_path: Path) -> None:
    folder = write_arrays(tmp_path / "arrays", root, 3, SIZE, SEED)
    for name in ("train", "validation"):
        images, labels = (folder / f"{name}_{each}.npy" for each in ("images", "labels"))
        if form == "first":
            np.save(images, np.ascontiguousarray(np.load(images).transpose(0, 3, 1, 2)))
        if form == "last":
            (folder / name).mkdir()
            shutil.copy(images, folder / name / "images.npy")  # without labels it is no split
        if form == "npz":
            np.savez(folder / f"{name}.npz", images=np.load(images), labels=np.load(labels))
            images.unlink()
    settings = data("numpy", folder, shape=(3, SIZE, SIZE))
    find_data(settings)
    found, expected = open_splits(settings, SEED, CPU), open_splits(data("imagefolder", root), SEED, CPU)
    assert all(map(torch.equal, read(found, None), read(expected, None)))
    assert found.identity


def test_shards_that_webdataset_writes_are_read(tmp_path: Path) -> None:
    import webdataset

    random = np.random.default_rng(0)
    for name in ("train", "val"):
        (tmp_path / f"._imagenet-{name}-000.tar").write_bytes(b"of a Mac")
        with webdataset.TarWriter(str(tmp_path / f"imagenet-{name}-000.tar")) as shard:
            for number in range(6):
                pixels = random.integers(0, 255, (20, 20, 3), dtype=np.uint8)
                shard.write({"__key__": f"{number:04}", "json": {"size": 20}, "cls": number % 3, "png": pixels})
    splits = open_splits(data("webdataset", tmp_path), SEED, CPU)
    assert sorted(splits.train.read(BatchRequest(torch.arange(6)))[1].tolist()) == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("suffix", ["png", "PNG"])
def test_an_index_beside_a_shard_is_used(suffix: str, root: Path, tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "shards", root, 3, suffix=suffix)
    expected = open_splits(data("webdataset", folder), SEED, CPU)
    indexes = [write_index(shard) for shard in folder.rglob("*.tar")]
    with_index = open_splits(data("webdataset", folder), SEED, CPU)
    assert all(map(torch.equal, read(with_index, None), read(expected, None)))
    for index in indexes:
        lines = [line.split() for line in index.read_text().splitlines()[1:]]
        without_names = [" ".join(word for place, word in enumerate(words) if place % 4 < 3) for words in lines]
        index.write_text("\n".join([f"v1.1 {len(lines)}", *without_names]))
    with_index = open_splits(data("webdataset", folder), SEED, CPU)
    assert all(map(torch.equal, read(with_index, None), read(expected, None)))


def test_an_index_of_another_shard_is_refused(root: Path, tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "shards", root, 3)
    first, second = sorted(folder.glob("train/*.tar"))
    index = write_index(first)
    text = index.read_text()
    index.replace(second.with_suffix(".idx"))
    heads = (text.replace("v1.2 12", head) for head in ("v9 12", "v1.2 11", "v1.2 many"))
    places = (text.replace("png 512 ", f"png {offset} ") for offset in (0, -(10**22), 10**22))
    for wrong in (text, *heads, *places, "", "v1.2 0\n", text[:300]):
        second.with_suffix(".idx").write_text(wrong)
        with raises(UsageError, "data-index"):
            open_splits(data("webdataset", folder), SEED, CPU)


def append(shard: Path, *members: tuple[tarfile.TarInfo, bytes]) -> None:
    with tarfile.open(shard, "a") as archive:
        for member, content in members:
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def test_an_index_of_a_shard_that_has_grown_is_refused(root: Path, tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "shards", root, 3)
    shard = min(folder.glob("train/*.tar"))
    index = write_index(shard)
    append(shard, (tarfile.TarInfo("added.png"), b"image"), (tarfile.TarInfo("added.cls"), b"1"))
    with raises(UsageError, "data-index"):
        open_splits(data("webdataset", folder), SEED, CPU)
    index.unlink()
    assert len(training_labels(data("webdataset", folder), SEED)) == 25


def test_a_shard_that_has_changed_is_indexed_anew_though_its_size_is_the_same(root: Path, tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "shards", root, 3)
    settings = data("webdataset", folder)
    assert training_labels(settings, SEED).any()
    for shard in folder.rglob("*.tar"):
        changed, content = shard.stat().st_mtime_ns + 10**9, bytearray(shard.read_bytes())
        with tarfile.open(shard) as archive:
            for label in (member for member in archive if member.name.endswith(".cls")):
                content[label.offset_data : label.offset_data + label.size] = b"0" * label.size
        shard.write_bytes(content)
        os.utime(shard, ns=(changed, changed))
    assert not training_labels(settings, SEED).any()


def test_hidden_members_and_those_without_a_suffix_are_no_samples(root: Path, tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "shards", root, 3)
    expected = training_labels(data("webdataset", folder), SEED)
    shard = min(folder.glob("train/*.tar"))
    write_index(shard)
    link = tarfile.TarInfo("README")
    link.type, link.linkname = tarfile.SYMTYPE, "NOTES"
    names = ("._0001.png", "./.DS_Store", "some.folder/._0002.cls", "NOTES")
    append(shard, *((tarfile.TarInfo(name), b"other") for name in names), (link, b""))
    for _ in ("by the index beside it", "by its headers"):
        assert torch.equal(training_labels(data("webdataset", folder), SEED), expected)
        shard.with_suffix(".idx").unlink(missing_ok=True)


def test_columns_of_shards_are_suffixes_in_any_case_with_or_without_the_dot(root: Path, tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "shards", root, 3, suffix="PNG")
    found = training_labels(data("webdataset", folder, image_column=".PNG", label_column="CLS"), SEED)
    assert torch.equal(found, training_labels(data("webdataset", folder), SEED))


def test_members_of_a_sample_that_do_not_follow_each_other_are_refused_with_the_fix(tmp_path: Path) -> None:
    names = ("1.png", "2.png", "1.cls", "2.cls")
    for split in ("train", "val"):
        append(tmp_path / f"{split}-0.tar", *((tarfile.TarInfo(name), b"1") for name in names))
    with raises(UsageError, "column-missing") as refused:
        open_splits(data("webdataset", tmp_path), SEED, CPU)
    assert "tar --sort=name" in str(refused.value)


@pytest.mark.parametrize("kind", ["same names", "symbolic link", "hard link"])
def test_a_shard_of_which_samples_would_be_lost_is_refused(kind: str, root: Path, tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "shards", root, 3)
    image, label = tarfile.TarInfo("added.png"), tarfile.TarInfo("added.cls")
    members = [(image, b"image"), (label, b"1")]
    if kind == "same names":
        members = [(image, b"image"), (tarfile.TarInfo("added.PNG"), b"image"), (label, b"1"), (label, b"1")]
    else:
        image.type, image.linkname = tarfile.SYMTYPE if kind == "symbolic link" else tarfile.LNKTYPE, "other.png"
        members[0] = image, b""
    append(min(folder.glob("train/*.tar")), *members)
    with raises(UsageError, "data-format"):
        open_splits(data("webdataset", folder), SEED, CPU)


@pytest.mark.parametrize("damage", ["a bit of a header", "cut between members", "cut in a header", "two in one file"])
def test_a_damaged_shard_is_not_taken_for_a_shorter_one(damage: str, root: Path, tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "shards", root, 3)
    shard = min(folder.glob("train/*.tar"))
    with tarfile.open(shard) as archive:
        place = archive.getmembers()[4].offset
    content = bytearray(shard.read_bytes())
    if damage == "a bit of a header":
        content[place + 150] ^= 1
    cuts = {"cut between members": content[:place], "cut in a header": content[: place + 300]}
    shard.write_bytes({**cuts, "two in one file": content + content}.get(damage, content))
    with raises(UsageError, "data-format"):
        open_splits(data("webdataset", folder), SEED, CPU)


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("label", ["99999999999999999999", "one", "1"])
def test_a_label_is_a_whole_number(label: str, form: int, root: Path, tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "shards", root, 3)
    with tarfile.open(min(folder.glob("train/*.tar")), "a", format=form) as archive:
        for suffix, content in (("png", b"image"), ("cls", label.encode())):
            member = tarfile.TarInfo(f"{'long/' * 30}added.{suffix}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    if label == "1":
        assert len(training_labels(data("webdataset", folder), SEED)) == 25
    else:
        with raises(UsageError, "data-labels"):
            open_splits(data("webdataset", folder), SEED, CPU)


@pytest.mark.parametrize("name", WRITERS)
def test_a_missing_column_is_refused_and_those_there_are_named(name: str, folders: dict[str, Path]) -> None:
    for column in ("image_column", "label_column"):
        with raises(UsageError, "column-missing") as refused:
            open_splits(data(name, folders[name], **{column: "picture"}), SEED, CPU)
        assert f"data.{column}" in str(refused.value)
        assert f"data.{column}=" not in str(refused.value)  # the value is what is missing
        assert ("png" if name == "webdataset" else "image") in str(refused.value)


@pytest.mark.parametrize("name", WRITERS)
def test_labels_from_beyond_the_classes_are_refused(name: str, folders: dict[str, Path]) -> None:
    with raises(UsageError, "data-labels"):
        open_splits(data(name, folders[name], classes=2), SEED, CPU)


@pytest.mark.parametrize("name", [*WRITERS, "numpy"])
def test_missing_files_are_refused_before_training(name: str, tmp_path: Path) -> None:
    for root in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UsageError) as refused:
            find_data(data(name, root, shape=(3, SIZE, SIZE)))
        assert refused.value.code in ("data-missing", "image-folder-unreadable")
    with raises_problems(("data.root", "image-folder-unset"), ("data.classes", "image-folder-unset")):
        parse_config({"data": {"name": "parquet"}}, source="test")
    with raises_problems(("data.shape", "plugin-data-form")):
        parse_config({"data": {"name": "numpy", "root": str(tmp_path)}}, source="test")


def test_a_file_that_is_named_as_both_splits_is_refused(root: Path, tmp_path: Path) -> None:
    for path in write_parquet(tmp_path / "speed", root, 3).glob("*.parquet"):
        path.rename(path.with_name(f"speed-test-{path.name.replace('validation', 'val')}"))
    find_data(data("parquet", tmp_path / "speed"))  # names with val are the test split
    for path in (tmp_path / "speed").glob("*-val-*"):
        path.rename(path.with_name(path.name.replace("-val-", "-")))
    with raises(UsageError, "data-format"):
        find_data(data("parquet", tmp_path / "speed"))


@pytest.mark.parametrize("name", ["parquet", "huggingface"])
def test_a_missing_library_is_named_with_what_to_install(
    name: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with raises(UsageError, "pyarrow-missing") as refused:
        find_data(data(name, folders[name]))
    assert "pip install 'dist_train[arrow]'" in str(refused.value)


@pytest.mark.parametrize("name", WRITERS)
def test_a_broken_image_is_named_by_its_file_and_place(name: str, root: Path, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "folder")
    broken = folder / "train" / "bee" / "0003.png"  # sample 11 of the train split in class order
    broken.write_bytes(b"no image")
    found = open_splits(data(name, WRITERS[name](tmp_path / name, folder, 3)), SEED, CPU)
    with raises(FaultError, "image-unreadable") as fault:
        list(read(found, None))
    assert "sample 11" in str(fault.value)
    assert str(tmp_path / name) in str(fault.value)


def test_a_shard_that_is_cut_off_after_it_was_indexed_is_named(root: Path, tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "shards", root, 3)
    found = open_splits(data("webdataset", folder), SEED, CPU)
    shard = min(folder.glob("train/*.tar"))
    with shard.open("r+b") as file:
        file.truncate(2000)
    with raises(FaultError, "image-unreadable") as fault:
        list(read(found, None))
    assert str(shard) in str(fault.value)


@pytest.mark.parametrize(
    ("change", "code", "named"),
    [
        ({"image": [1, 2]}, "data-format", "data.image_column"),
        ({"label": ["a", "b"]}, "data-labels", "data.label_column"),
        ({"image": [b"x", None]}, "column-missing", "row 1"),
        ({"label": [0, None]}, "column-missing", "row 1"),
        ({"label": [0, -1]}, "data-labels", "label -1"),
        ({"label": pyarrow.array([0, 2**64 - 1], pyarrow.uint64())}, "data-labels", f"{2**64 - 1}"),
    ],
)
def test_columns_of_other_types_and_empty_fields_are_refused(
    change: dict[str, Any], code: str, named: str, tmp_path: Path
) -> None:
    for split in ("train", "test"):
        table = pyarrow.table({"image": [b"x", b"y"], "label": [0, 1], **change})
        parquet.write_table(table, tmp_path / f"{split}.parquet")
    with raises(UsageError, code) as refused:
        open_splits(data("parquet", tmp_path), SEED, CPU)
    assert named in str(refused.value)


def test_a_row_without_a_label_is_named_by_its_place_in_the_whole_file(tmp_path: Path) -> None:
    labels = [None if row == 280 else 0 for row in range(300)]
    for split in ("train", "test"):
        parquet.write_table(pyarrow.table({"image": [b"x"] * 300, "label": labels}), tmp_path / f"{split}.parquet")
    with raises(UsageError, "column-missing") as refused:
        open_splits(data("parquet", tmp_path), SEED, CPU)
    assert str(refused.value).startswith("row 280 of ")


def test_an_arrow_file_whose_images_are_not_in_place_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders["huggingface"], tmp_path / "copy")
    for path in folder.glob("*/*.arrow"):
        with pyarrow.ipc.open_stream(path.read_bytes()) as stream:
            table = stream.read_all()
        options = pyarrow.ipc.IpcWriteOptions(compression="zstd")
        with pyarrow.ipc.new_stream(path, table.schema, options=options) as compressed:
            compressed.write_table(table)
    with raises(UsageError, "data-format") as refused:
        open_splits(data("huggingface", folder), SEED, CPU)
    assert "is compressed" in str(refused.value)


def test_a_parquet_file_whose_name_is_not_utf_8_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders["parquet"], tmp_path / "copy")
    min(folder.glob("train*.parquet")).rename(folder / os.fsdecode(b"train-\xe4.parquet"))
    with raises(UsageError, "data-format"):
        find_data(data("parquet", folder))


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    for split in ("train", "test"):
        columns = [pyarrow.array(each) for each in ([b"x"], [0], [1])]
        parquet.write_table(pyarrow.table(columns, ["image", "label", "label"]), tmp_path / f"{split}.parquet")
    with raises(UsageError, "column-missing"):
        find_data(data("parquet", tmp_path))


@pytest.mark.parametrize(
    ("number", "fix"),
    [(errno.ENOSPC, "as much space again"), (errno.EDQUOT, "as much space again"), (errno.ENOSYS, "on a local disk")],
)
def test_a_cache_that_cannot_be_used_has_advice_for_the_reason(
    number: int, fix: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(columns, "cached_index", Mock(side_effect=OSError(number, "the reason")))
    with raises(UsageError, "cache-unwritable") as refused:
        training_labels(data("parquet", folders["parquet"]), SEED)
    assert "(the reason)" in str(refused.value)
    assert ("as much space again" in str(refused.value), fix in str(refused.value)) == (number != errno.ENOSYS, True)


def test_a_parquet_file_that_is_gone_is_no_fault_of_the_cache(tmp_path: Path) -> None:
    with raises(UsageError, "data-unreadable") as refused:
        packed_listing(data("parquet", tmp_path), "train", SEED, lambda *_: [tmp_path / "gone"], columns.parquet_index)
    assert str(tmp_path / "gone") in str(refused.value)


@pytest.mark.parametrize(
    ("name", "module", "function"),
    [("parquet", parquet, "ParquetFile"), ("huggingface", pyarrow, "memory_map"), ("huggingface", Path, "read_bytes")],
)
def test_a_disk_that_fails_may_come_back(
    name: str, module: object, function: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, function, Mock(side_effect=OSError(errno.EIO, "the reason")))
    with raises(FaultError, "data-unreadable") as refused:
        training_labels(data(name, folders[name]), SEED)
    assert str(folders[name]) in str(refused.value)


def test_shards_need_no_cache_and_one_warning_says_that_it_cannot_be_used(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    settings = data("webdataset", folders["webdataset"])
    expected = training_labels(settings, SEED)
    (tmp_path / "file").touch()
    monkeypatch.setenv("DIST_TRAIN_CACHE", str(tmp_path / "file"))
    assert torch.equal(training_labels(settings, SEED), expected)
    assert len(list(folders["webdataset"].glob("train/*.tar"))) > 1
    assert [record.levelname for record in caplog.records if record.levelname != "INFO"] == ["WARNING"]


def test_there_may_be_more_shards_than_a_process_may_open_files(
    folders: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shards = shutil.copytree(folders["webdataset"], tmp_path / "shards")
    first = min(shards.glob("train/*.tar"))
    for number in range(40):
        shutil.copy(first, first.with_name(f"copy-{number:02d}.tar"))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    is_open = set(map(int, os.listdir("/proc/self/fd")))
    resource.setrlimit(resource.RLIMIT_NOFILE, ([each for each in range(4096) if each not in is_open][20], hard))
    try:
        for _ in ("indexes made", "indexes kept"):
            splits = open_splits(data("webdataset", shards), SEED, CPU)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(splits.train) > 40
    assert not [each for each in caplog.records if each.levelno >= logging.WARNING]


def test_a_parquet_file_without_rows_among_others_is_read(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders["parquet"], tmp_path / "copy")
    expected = training_labels(data("parquet", folder), SEED)
    last = max(folder.glob("train*.parquet"))
    parquet.write_table(parquet.read_table(last).slice(0, 0), last.with_name("train-99999.parquet"))
    assert torch.equal(training_labels(data("parquet", folder), SEED), expected)


@pytest.mark.parametrize("name", WRITERS)
def test_files_of_another_format_are_refused(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders[name], tmp_path / "copy")
    suffix = {"parquet": "parquet", "webdataset": "tar", "huggingface": "arrow"}[name]
    max(folder.rglob(f"*train*/*.{suffix}" if name != "parquet" else "train*.parquet")).write_bytes(b"something" * 300)
    with raises(UsageError, "data-format"):
        open_splits(data(name, folder), SEED, CPU)


def test_a_damaged_page_of_parquet_is_no_fault_of_the_cache(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders["parquet"], tmp_path / "copy")
    path = min(folder.glob("train*.parquet"))
    content = path.read_bytes()
    path.write_bytes(content[:4] + bytes(255 - each for each in content[4:44]) + content[44:])
    with raises(UsageError, "data-format"):
        open_splits(data("parquet", folder), SEED, CPU)


def test_an_archive_that_lacks_bytes_is_called_damaged(tmp_path: Path) -> None:
    path = tmp_path / "train.npz"
    np.savez(path, images=np.zeros((50, SIZE, SIZE, 3), np.uint8), labels=np.zeros(50, np.int64))
    content = path.read_bytes()
    path.write_bytes(content[:200] + content[1200:])
    with raises(UsageError, "data-format"):
        open_splits(data("numpy", tmp_path, shape=(3, SIZE, SIZE)), SEED, CPU)


@pytest.mark.parametrize("suffix", ["npy", "npz"])
def test_a_small_part_of_unmapped_images_is_kept_without_the_rest(suffix: str, root: Path, tmp_path: Path) -> None:
    folder = write_arrays(tmp_path / "arrays", root, 3, SIZE, SEED)
    for name in ("train", "validation") if suffix == "npz" else ():
        images, labels = (folder / f"{name}_{each}.npy" for each in ("images", "labels"))
        np.savez(folder / f"{name}.npz", images=np.load(images), labels=np.load(labels))
        images.unlink()
    settings = data("numpy", folder, shape=(3, SIZE, SIZE))
    found = open_splits(settings.model_copy(update={"train_size": 3}), SEED, CPU)
    assert isinstance(found.train, Samples)
    assert len(found.train) == 3
    assert len(found.train._images) == (len(open_splits(settings, SEED, CPU).train) if suffix == "npy" else 3)


@pytest.mark.parametrize("name", ["train_images", "train_labels"])
def test_an_archive_that_is_named_as_an_array_is_refused(name: str, root: Path, tmp_path: Path) -> None:
    folder = write_arrays(tmp_path / "arrays", root, 3, SIZE, SEED)
    np.savez(folder / "archive.npz", np.load(folder / f"{name}.npy"))
    (folder / "archive.npz").replace(folder / f"{name}.npy")
    with raises(UsageError, "data-format"):
        open_splits(data("numpy", folder, shape=(3, SIZE, SIZE)), SEED, CPU)


@pytest.mark.parametrize("suffix", ["npy", "npz"])
def test_damaged_arrays_are_refused(suffix: str, root: Path, tmp_path: Path) -> None:
    folder = write_arrays(tmp_path / "arrays", root, 3, SIZE, SEED)
    images = path = folder / "train_images.npy"
    if suffix == "npz":
        path = folder / "train.npz"
        np.savez_compressed(path, images=np.load(images), labels=np.load(folder / "train_labels.npy"))
    content = path.read_bytes()
    damage = content.replace(b"}", b"(") if suffix == "npy" else content[:300] + b"\xff" * 100 + content[400:]
    path.write_bytes(damage)
    with raises(UsageError, "data-format"):
        open_splits(data("numpy", folder, shape=(3, SIZE, SIZE)), SEED, CPU)


@pytest.mark.parametrize(
    ("arrays", "code"),
    [
        ({"images": np.zeros((4, 8, 8, 3), np.float32)}, "data-shape"),
        ({"images": np.zeros((4, 9, 9, 3), np.uint8)}, "data-shape"),
        ({"labels": np.zeros(3, np.int64)}, "data-counts"),
        ({"labels": np.zeros(4)}, "data-counts"),
        ({"labels": np.array([0, 1, 2, 3])}, "data-labels"),
        ({"labels": np.array([None, 1, 2, 3], dtype=object)}, "data-format"),
    ],
)
def test_arrays_of_another_form_are_refused(arrays: dict[str, Any], code: str, tmp_path: Path) -> None:
    whole = {"images": np.zeros((4, 8, 8, 3), np.uint8), "labels": np.array([0, 1, 2, 0]), **arrays}
    for split in ("train", "test"):
        np.savez(tmp_path / f"{split}.npz", **whole)
    with raises(UsageError, code) as refused:
        open_splits(data("numpy", tmp_path, shape=(3, 8, 8)), SEED, CPU)
    assert ("set data.shape" in str(refused.value)) == (whole["images"].shape != (4, 8, 8, 3))
    with raises(UsageError, "column-missing"):
        open_splits(data("numpy", tmp_path, shape=(3, 8, 8), image_column="pictures"), SEED, CPU)


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_split_without_images_is_refused(split: str, root: Path, tmp_path: Path) -> None:
    folder = write_arrays(tmp_path / "arrays", root, 3, SIZE, SEED)
    name = "validation" if split == "test" else split
    np.save(folder / f"{name}_images.npy", np.zeros((0, SIZE, SIZE, 3), np.uint8))
    np.save(folder / f"{name}_labels.npy", np.zeros(0, np.int64))
    with raises(UsageError, "data-counts") as refused:
        open_splits(data("numpy", folder, shape=(3, SIZE, SIZE)), SEED, CPU)
    assert f"no {split} images in {folder}" in str(refused.value)


def test_a_damaged_entry_of_the_cache_is_made_again(root: Path, folders: dict[str, Path], cache: Path) -> None:
    settings = data("parquet", folders["parquet"])
    expected = list(read(open_splits(settings, SEED, CPU), None))
    for path in cache.rglob("*.npy"):
        content = bytearray(path.read_bytes())
        content[-8] ^= 1  # of the last label
        path.write_bytes(content)
    assert all(map(torch.equal, read(open_splits(settings, SEED, CPU), None), expected))
    for path in cache.rglob("*.bin"):
        os.truncate(path, path.stat().st_size - 1)
    assert all(map(torch.equal, read(open_splits(settings, SEED, CPU), None), expected))
    for path in cache.rglob("*.npy"):
        path.write_bytes(b"damaged")
    for path in cache.rglob("*.json"):
        path.write_bytes(b"\xff")
    for path in cache.rglob("*.bin"):
        path.write_bytes(path.read_bytes()[:100])
    assert all(map(torch.equal, read(open_splits(settings, SEED, CPU), None), expected))
    for path in cache.rglob("*.bin"):
        path.unlink()
    assert all(map(torch.equal, read(open_splits(settings, SEED, CPU), None), expected))
