"""Broken IDX files, CIFAR batches and archives, and caches of decoded images."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import torch
from hypothesis import strategies as st

from dist_train.data.cache import Source, decoded_once
from dist_train.data.images import ImageSet
from dist_train.data.published import CIFAR10, decode_archive, decode_fashion_mnist
from dist_train.outcome import UsageError
from tests.archives import cifar10_members, idx_bytes, packed_members, random_set, write_members
from tests.torture.kind import Call, Kind, refused
from tests.torture.mutation import mutated


def idx(folder: Path) -> Kind:
    written = random_set(3, (1, 28, 28), 10)
    images, labels = idx_bytes(written.images[:, 0]), idx_bytes(written.labels)
    pairs = st.one_of(
        st.tuples(mutated(images), st.just(labels), st.booleans(), st.just(False)),
        st.tuples(st.just(images), mutated(labels), st.booleans(), st.just(False)),
        st.tuples(mutated(gzip.compress(images, 1)), st.just(labels), st.just(True), st.just(True)),
    )

    def check(drawn: object) -> bool:
        assert isinstance(drawn, tuple)
        first, second, is_packed, is_packed_already = drawn
        files = (folder / f"images{'.gz' if is_packed else ''}", folder / f"labels{'.gz' if is_packed else ''}")
        files[0].write_bytes(gzip.compress(first, 1) if is_packed and not is_packed_already else first)
        files[1].write_bytes(gzip.compress(second, 1) if is_packed else second)
        try:
            found = decode_fashion_mnist(files)
        except UsageError as error:
            return refused(error)
        if is_packed_already:
            # gzip's checksum detects changes.
            assert np.array_equal(found.images.numpy(), written.images), "images differ from the packed ones"
        else:
            assert found.images.numpy().tobytes() == first[16:], "images differ from those in the file"
            assert found.labels.numpy().astype(np.uint8).tobytes() == second[8:], "labels differ from those in the file"
        return True

    return Kind("IDX", pairs, check)


def cifar_batches(folder: Path) -> Kind:
    members, _, test = cifar10_members(per_batch=2)
    archive_folder = folder / CIFAR10.folder
    write_members(archive_folder, members)
    path = archive_folder / "test_batch"
    whole, marker = members["test_batch"], folder / "ran"
    hostile = [
        pickle.dumps({b"data": Call(marker), b"labels": [0]}, protocol=2),
        pickle.dumps(Call(marker), protocol=4),
        b"cos\nsystem\n(S'touch ran'\ntR.",
        b"\x80\x02}U\x04dataK\x01s.",
    ]
    found_files = (path,)

    def check(content: object) -> bool:
        assert isinstance(content, bytes)
        path.write_bytes(content)
        try:
            found = decode_archive(CIFAR10, folder, found_files, "test")
        except UsageError as error:
            return refused(error)
        finally:
            assert not marker.exists(), "code was run from an archive"
        assert found.images.shape[1:] == (3, 32, 32)
        assert len(found.labels) == len(found.images)
        assert all(0 <= label < 10 for label in found.labels.tolist())
        assert found.images.numpy().tobytes() in content, "images differ from those in the file"
        assert test.images.shape[1:] == found.images.shape[1:]
        return True

    return Kind("CIFAR batches", st.one_of(mutated(whole), mutated(whole), st.sampled_from(hostile)), check)


def cifar_archives(folder: Path) -> Kind:
    members, train, _ = cifar10_members(per_batch=1)
    path = folder / CIFAR10.file
    whole = packed_members(CIFAR10.folder, members)

    def check(content: object) -> bool:
        assert isinstance(content, bytes)
        path.write_bytes(content)
        try:
            found = decode_archive(CIFAR10, folder, (path,), "train")
        except UsageError as error:
            return refused(error)
        assert np.array_equal(found.images.numpy(), train.images), "images differ from the packed ones"
        return True

    return Kind("CIFAR archives", mutated(whole), check)


def _entry(folder: Path) -> tuple[Source, ImageSet, dict[str, bytes]]:
    source_file = folder / "source"
    source_file.write_bytes(b"source")
    source = Source("pictures", "train", 1, [source_file], 3)
    written = random_set(4, (1, 5, 5), 3)
    images = ImageSet(torch.from_numpy(written.images), torch.from_numpy(written.labels).long(), 3)
    decoded_once(folder / "cache", source, lambda: images)
    files = {path.name: path.read_bytes() for path in (folder / "cache").iterdir() if path.suffix != ".lock"}
    return source, images, files


def _changed_files(files: dict[str, bytes]) -> st.SearchStrategy[dict[str, bytes]]:
    names = sorted(files)
    changed = st.sampled_from(names).flatmap(
        lambda name: mutated(files[name]).map(lambda content: {**files, name: content})
    )
    missing = st.sampled_from(names).map(lambda name: {other: files[other] for other in names if other != name})
    swapped = st.permutations(names).map(
        lambda order: {name: files[other] for name, other in zip(names, order, strict=True)}
    )
    return st.one_of(changed, changed, missing, swapped)


def cache(folder: Path) -> Kind:
    source, images, files = _entry(folder)

    def check(changed: object) -> bool:
        assert isinstance(changed, dict)
        _replace_files(folder / "cache", changed)
        found = decoded_once(folder / "cache", source, lambda: images)
        assert torch.equal(found.images, images.images), "images differ from the decoded ones"
        assert torch.equal(found.labels, images.labels), "labels differ from the decoded ones"
        assert found.classes == images.classes
        return True

    return Kind("cache files", _changed_files(files), check)


def forged_cache(folder: Path) -> Kind:
    """Cache files of an attacker, whose records match: their contents must have the form of images."""
    source, images, files = _entry(folder)
    marker = folder / "ran"
    buffer = io.BytesIO()
    np.save(buffer, np.array([Call(marker)], dtype=object), allow_pickle=True)
    names = {suffix: next(name for name in files if name.endswith(suffix)) for suffix in _SUFFIXES}
    labels, pixels = files[names[".labels.npy"]], files[names[".images.npy"]]
    pairs = st.one_of(
        st.tuples(mutated(pixels), st.just(labels)),
        st.tuples(st.just(pixels), mutated(labels)),
        st.sampled_from([(labels, pixels), (buffer.getvalue(), labels), (pixels, buffer.getvalue()), (b"", b"")]),
    )

    def check(pair: object) -> bool:
        assert isinstance(pair, tuple)
        first, second = (hashlib.sha256(content).hexdigest() for content in pair)
        record = {"images": first, "labels": second}
        forged = {names[".images.npy"]: pair[0], names[".labels.npy"]: pair[1]}
        _replace_files(folder / "cache", {**forged, names[".json"]: json.dumps(record).encode()})
        found = decoded_once(folder / "cache", source, lambda: images)
        assert not marker.exists(), "code was run from a cache file"
        assert found.images.dtype == torch.uint8
        assert found.images.ndim == 4
        assert found.labels.dtype == torch.int64
        assert found.labels.shape == found.images.shape[:1]
        return True

    return Kind("forged cache files", pairs, check)


_SUFFIXES = (".images.npy", ".labels.npy", ".json")


def _replace_files(folder: Path, files: dict[str, bytes]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
