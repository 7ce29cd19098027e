from __future__ import annotations

import dataclasses
import functools
import hashlib
import http.server
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from dist_train.data.cache import fetch
from dist_train.data.published import CIFAR10, download_archive
from dist_train.outcome import UsageError
from tests.archives import cifar10_members, write_members
from tests.raising import raises

CONTENT = b"an archive" * 300_000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@dataclasses.dataclass
class Site:
    address: str
    requests: list[str]


class Handler(http.server.BaseHTTPRequestHandler):
    def __init__(self, requests: list[str], *arguments: object) -> None:
        self.requests = requests
        super().__init__(*arguments)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        self.requests.append(self.path)
        if self.path == "/absent":
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        self.wfile.write(CONTENT[: len(CONTENT) // 2] if self.path == "/cut" else CONTENT)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    requests: list[str] = []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, requests)) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield Site(f"http://127.0.0.1:{server.server_port}", requests)
        server.shutdown()
        thread.join()


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if not path.name.endswith(".lock")]


def test_an_archive_with_the_published_digest_is_kept(site: Site, tmp_path: Path) -> None:
    path = tmp_path / "new" / "archive.tar.gz"
    fetch(f"{site.address}/archive", path, SHA256)
    assert path.read_bytes() == CONTENT
    assert leftovers(path.parent) == ["archive.tar.gz"]


def test_an_archive_can_be_read_by_those_whom_the_umask_admits(site: Site, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        fetch(f"{site.address}/archive", tmp_path / "archive.tar.gz", SHA256)
    finally:
        os.umask(before)
    assert (tmp_path / "archive.tar.gz").stat().st_mode & 0o777 == 0o640


def test_what_a_killed_download_has_left_is_deleted(site: Site, tmp_path: Path) -> None:
    left = tmp_path / ".archive.tar.gz.x1y2.part"
    left.write_bytes(CONTENT[:1000])
    os.utime(left, (0, 0))
    fetch(f"{site.address}/archive", tmp_path / "archive.tar.gz", SHA256)
    assert leftovers(tmp_path) == ["archive.tar.gz"]


def test_an_archive_in_a_folder_that_cannot_be_written_is_used(site: Site, tmp_path: Path) -> None:
    path = tmp_path / "archive.tar.gz"
    path.write_bytes(CONTENT)
    (tmp_path / f".{path.name}.lock").mkdir()  # root could write to a folder without permission
    fetch(f"{site.address}/archive", path, SHA256)
    assert site.requests == []


def test_another_digest_is_refused_and_nothing_kept(site: Site, tmp_path: Path) -> None:
    with raises(UsageError, "download-digest"):
        fetch(f"{site.address}/archive", tmp_path / "archive.tar.gz", "0" * 64)
    assert leftovers(tmp_path) == []


def test_a_download_cut_short_is_refused_and_nothing_kept(site: Site, tmp_path: Path) -> None:
    with raises(UsageError, "download-digest"):
        fetch(f"{site.address}/cut", tmp_path / "archive.tar.gz", SHA256)
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("reachable", [True, False])
def test_without_a_network_the_message_says_what_to_put_where(site: Site, tmp_path: Path, reachable: bool) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        unused = f"http://127.0.0.1:{free.getsockname()[1]}"
        address = site.address if reachable else unused
        with raises(UsageError, "download-failed"):
            fetch(f"{address}/absent", tmp_path / "archive.tar.gz", SHA256)
    assert leftovers(tmp_path) == []


def test_a_folder_that_cannot_be_written_is_named(site: Site, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with raises(UsageError, "download-unwritable"):
        fetch(f"{site.address}/archive", tmp_path / "file" / "archive.tar.gz", SHA256)


def test_of_several_that_want_an_archive_one_downloads_it(site: Site, tmp_path: Path) -> None:
    path = tmp_path / "archive.tar.gz"
    threads = [threading.Thread(target=fetch, args=(f"{site.address}/archive", path, SHA256)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_bytes() == CONTENT
    assert site.requests == ["/archive"]


def test_cifar_is_downloaded_only_where_something_is_missing(site: Site, tmp_path: Path) -> None:
    archive = dataclasses.replace(CIFAR10, url=f"{site.address}/archive", sha256=SHA256)
    unpacked = tmp_path / "unpacked" / archive.folder
    write_members(unpacked, cifar10_members()[0])
    download_archive(archive, unpacked.parent)
    assert site.requests == []
    for _ in range(2):
        download_archive(archive, tmp_path)
    assert site.requests == ["/archive"]
    assert (tmp_path / archive.file).read_bytes() == CONTENT
    (unpacked / "data_batch_2").unlink()
    download_archive(archive, unpacked.parent)
    assert (unpacked.parent / archive.file).read_bytes() == CONTENT
