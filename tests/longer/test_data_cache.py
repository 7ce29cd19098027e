from __future__ import annotations

import json
import logging
import os
import pwd
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from dist_train.data import cache
from dist_train.data.cache import Source, cache_folder, decoded_once
from dist_train.data.images import ImageSet
from dist_train.outcome import UsageError
from dist_train.rundir.atomic import exclusive
from dist_train.rundir.lock import is_locked
from tests.raising import raises
from tests.waiting import PATIENCE, wait_for

LOGGER = "dist_train.data"


def image_set() -> ImageSet:
    pixels = torch.arange(40 * 3 * 8 * 8) % 251
    return ImageSet(pixels.to(torch.uint8).view(40, 3, 8, 8), torch.arange(40) % 10, 10)


class Decoder:
    """A decoder that counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> ImageSet:
        self.calls += 1
        return image_set()


@pytest.fixture
def source(tmp_path: Path) -> Source:
    path = tmp_path / "source"
    path.write_bytes(b"packed images")
    return Source("pictures", "train", 1, [path], 10)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "decoded"


def entry_files(folder: Path) -> list[str]:
    return sorted(path.name.split(".", 1)[1] for path in folder.iterdir())


def mapped_files() -> Iterator[tuple[int, int, str]]:
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, *_, name = line.split(maxsplit=5)
        start, stop = (int(address, 16) for address in addresses.split("-"))
        yield start, stop, name


def test_data_set_is_decoded_once_and_then_mapped(folder: Path, source: Source) -> None:
    decode = Decoder()
    sets = [decoded_once(folder, source, decode) for _ in range(3)]
    assert decode.calls == 1
    assert entry_files(folder) == ["images.npy", "json", "labels.npy", "lock"]
    for images in sets:
        assert torch.equal(images.images, image_set().images)
        assert torch.equal(images.labels, image_set().labels)
        assert images.classes == 10
        address = images.images.data_ptr()
        mapping = next(name for start, stop, name in mapped_files() if start <= address < stop)
        assert mapping.endswith("images.npy")


def test_write_to_mapped_images_does_not_reach_the_cache(folder: Path, source: Source) -> None:
    decode = Decoder()
    decoded_once(folder, source, decode).images.zero_()
    assert torch.equal(decoded_once(folder, source, decode).images, image_set().images)
    assert decode.calls == 1


def test_other_source_bytes_splits_or_readers_have_their_own_entry(folder: Path, source: Source) -> None:
    decode = Decoder()
    decoded_once(folder, source, decode)
    decoded_once(folder, Source("pictures", "test", 1, source.files, 10), decode)
    decoded_once(folder, Source("pictures", "train", 2, source.files, 10), decode)
    source.files[0].write_bytes(b"packed imageS")
    decoded_once(folder, source, decode)
    assert decode.calls == 4


def test_copy_of_the_source_shares_the_entry(folder: Path, source: Source, tmp_path: Path) -> None:
    decode = Decoder()
    decoded_once(folder, source, decode)
    copy = tmp_path / "copy"
    copy.write_bytes(source.files[0].read_bytes())
    decoded_once(folder, Source("pictures", "train", 1, [copy], 10), decode)
    assert decode.calls == 1


def test_unreadable_source_is_a_usage_error(folder: Path, tmp_path: Path) -> None:
    with raises(UsageError, "data-unreadable"):
        decoded_once(folder, Source("pictures", "train", 1, [tmp_path], 10), Decoder())


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def change_digest(path: Path) -> None:
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "images": "0" * 64}))


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("images.npy", flip_bit),
        ("images.npy", cut),
        ("images.npy", Path.unlink),
        ("labels.npy", flip_bit),
        ("labels.npy", Path.unlink),
        ("json", cut),
        ("json", change_digest),
        ("json", lambda path: path.write_text("[]")),
        ("json", lambda path: path.write_text('{"classes": 10}')),
        ("json", lambda path: path.write_bytes(b"\xff")),
    ],
)
def test_damaged_entry_is_replaced_with_a_warning(
    folder: Path, source: Source, name: str, damage: object, caplog: pytest.LogCaptureFixture
) -> None:
    decode = Decoder()
    decoded_once(folder, source, decode)
    assert callable(damage)
    damage(next(folder.glob(f"*.{name}")))
    with caplog.at_level(logging.WARNING, LOGGER):
        images = decoded_once(folder, source, decode)
    assert decode.calls == 2
    assert torch.equal(images.images, image_set().images)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    caplog.clear()
    decoded_once(folder, source, decode)
    assert decode.calls == 2
    assert not caplog.records


def test_entry_without_a_record_is_ignored(folder: Path, source: Source) -> None:
    decode = Decoder()
    decoded_once(folder, source, decode)
    next(folder.glob("*.json")).unlink()
    decoded_once(folder, source, decode)
    assert decode.calls == 2


def test_unusable_folder_disables_only_the_cache(
    tmp_path: Path, source: Source, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    decode = Decoder()
    images = decoded_once(tmp_path / "file" / "decoded", source, decode)
    assert decode.calls == 1
    assert torch.equal(images.images, image_set().images)
    (message,) = [record.getMessage() for record in caplog.records]
    assert "DIST_TRAIN_CACHE" in message


def test_error_in_the_data_is_raised(folder: Path, source: Source) -> None:
    def damaged() -> ImageSet:
        raise UsageError("the file is damaged", code="data-format")

    with raises(UsageError, "data-format"):
        decoded_once(folder, source, damaged)
    assert entry_files(folder) == ["lock"]


RANK = """
import hashlib, logging, resource, sys, time
from pathlib import Path
import torch
from dist_train.data.cache import Source, decoded_once
from dist_train.data.images import ImageSet

folder, source, journal, mode = sys.argv[1:]
logging.basicConfig(format="%(message)s")

def decode():
    with open(journal, "a") as file:
        file.write("decoded\\n")
    time.sleep(600 if mode == "hang" else 0.3)
    pixels = torch.arange(40 * 3 * 8 * 8) % 251
    return ImageSet(pixels.to(torch.uint8).view(40, 3, 8, 8), torch.arange(40) % 10, 10)

if mode == "full disk":
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
images = decoded_once(Path(folder), Source("pictures", "train", 1, [Path(source)], 10), decode)
print(hashlib.sha256(images.images.numpy().tobytes() + images.labels.numpy().tobytes()).hexdigest())
"""


def start(
    folder: Path, source: Source, journal: Path, mode: str = "plain", within: Sequence[str] = ()
) -> subprocess.Popen[str]:
    command = [
        *within,
        sys.executable,
        "-W",
        "error",
        "-c",
        RANK,
        str(folder),
        str(source.files[0]),
        str(journal),
        mode,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)


def test_a_user_without_a_home_folder_has_a_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(user: int) -> pwd.struct_passwd:
        raise KeyError(user)

    for name in ("DIST_TRAIN_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert cache_folder() == tmp_path / f"dist_train-{os.getuid()}"


def test_one_of_several_processes_decodes_and_the_others_map(folder: Path, source: Source, tmp_path: Path) -> None:
    ranks = [start(folder, source, tmp_path / "journal") for _ in range(3)]
    outputs = [rank.communicate(timeout=PATIENCE) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * 3, outputs
    assert len({output for output, _ in outputs}) == 1
    assert (tmp_path / "journal").read_text() == "decoded\n"
    assert entry_files(folder) == ["images.npy", "json", "labels.npy", "lock"]


def test_who_waited_for_an_entry_verifies_it_without_the_lock_as_others_do_at_once(
    folder: Path, source: Source, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    decode, locked, map_array = Decoder(), list[bool | None](), cache._map_array
    decoded_once(folder, source, decode)
    lock, record = (folder / f"{source.key()}.{end}" for end in ("lock", "json"))
    content = record.read_bytes()
    record.unlink()

    def note(path: Path, sha256: str) -> object:
        locked.append(is_locked(lock))
        return map_array(path, sha256)

    monkeypatch.setattr(cache, "_map_array", note)
    waiting = threading.Thread(target=decoded_once, args=(folder, source, decode))
    with caplog.at_level(logging.INFO), exclusive(lock):
        waiting.start()
        wait_for(lambda: str(lock) in caplog.text, "the other waits for the lock")
        record.write_bytes(content)
    waiting.join(PATIENCE)
    assert decode.calls == 1
    assert locked == [False, False]


def test_process_killed_while_decoding_does_not_block_others(folder: Path, source: Source, tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    rank = start(folder, source, journal, "hang")
    wait_for(journal.exists, "the rank decodes")
    abandoned = folder / f".{source.key()}.images.npy.x1y2.part"
    abandoned.write_bytes(b"half")
    os.utime(abandoned, (0, 0))
    written = folder / f".{source.key()}.images.npy.z3.part"  # by another node, where locks hold within a node only
    written.write_bytes(b"half")
    rank.send_signal(signal.SIGKILL)
    rank.communicate(timeout=PATIENCE)
    decode = Decoder()
    assert torch.equal(decoded_once(folder, source, decode).images, image_set().images)
    assert decode.calls == 1
    assert not abandoned.exists()
    assert written.exists()


def test_full_disk_disables_only_the_cache(folder: Path, source: Source, tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    full = start(folder, source, journal, "full disk")
    output, errors = full.communicate(timeout=PATIENCE)
    assert full.returncode == 0, errors
    assert "DIST_TRAIN_CACHE" in errors
    assert "Traceback" not in errors
    assert journal.read_text() == "decoded\n"
    assert not list(folder.glob("*.json"))
    assert not list(folder.glob(".*.part"))
    later = start(folder, source, journal)
    assert later.communicate(timeout=PATIENCE)[0] == output
    assert list(folder.glob("*.json"))


READ_ONLY = 'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0" && exec "$@"'


def test_a_filled_cache_on_a_read_only_file_system_is_used(folder: Path, source: Source, tmp_path: Path) -> None:
    within = ("unshare", "--map-root-user", "--mount", "bash", "-c", READ_ONLY, str(folder))
    folder.mkdir(parents=True)
    if subprocess.run([*within, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this machine does not let us mount a folder read-only")
    journal = tmp_path / "journal"
    expected, _ = start(folder, source, journal).communicate(timeout=PATIENCE)
    reader = start(folder, source, journal, within=within)
    output, errors = reader.communicate(timeout=PATIENCE)
    assert reader.returncode == 0, errors
    assert (output, errors) == (expected, "")
    assert journal.read_text() == "decoded\n"
