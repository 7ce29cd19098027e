from __future__ import annotations

import base64
import gzip
import http.client
import select
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from dist_train.config.sections import MetricsSettings
from dist_train.monitoring.prometheus.http_server import (
    Server,
    Site,
    access_warnings,
    bind,
    check_access,
    read_credentials,
    tls_context,
)
from dist_train.monitoring.prometheus.messages import plan_of
from dist_train.outcome import UsageError
from tests.waiting import PATIENCE, wait_for


def well() -> bool:
    return True


@contextmanager
def serving(health: Callable[[], bool] = well, **settings: Any) -> Iterator[Server]:
    plan = plan_of(MetricsSettings(**settings))
    site = Site(lambda: b"dist_train_step 1\n", health, read_credentials(plan), tls_context(plan), "1f")
    with bind(plan.host, 0, site) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def ask(
    server: Server, path: str = "/metrics", method: str = "GET", headers: Mapping[str, str] | None = None
) -> tuple[int, bytes, http.client.HTTPMessage]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=PATIENCE)
    try:
        connection.request(method, path, headers=dict(headers or {}))
        answer = connection.getresponse()
        return answer.status, answer.read(), answer.headers
    finally:
        connection.close()


def basic(login: str) -> str:
    return "Basic " + base64.b64encode(login.encode()).decode()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("tls")
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost "
    command += "-addext subjectAltName=IP:127.0.0.1 -keyout key.pem -out certificate.pem"
    subprocess.run(command.split(), cwd=folder, check=True, capture_output=True)
    return folder / "certificate.pem", folder / "key.pem"


@pytest.mark.parametrize("path", ["/", "/metrics/", "/debug", "/../etc/passwd", "/healthz/x"])
def test_nothing_else_is_served(path: str) -> None:
    with serving() as server:
        assert ask(server, path)[0] == 404


@pytest.mark.parametrize(
    ("query", "status"), [("run_id=1f", 200), ("run_id=", 200), ("x=1", 200), ("run_id=2e", 404), ("x&run_id=1f2", 404)]
)
def test_a_scrape_of_another_run_is_not_answered(query: str, status: int) -> None:
    with serving() as server:
        assert ask(server, f"/metrics?{query}")[0] == status
        if status == 200:
            wait_for(lambda: server.last_scrape is not None, "the scrape to be noted")
        assert status == 200 or server.last_scrape is None


def test_only_those_who_may_read_metrics_learn_which_run_is_here(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("secret\n")
    with serving(token_file=tmp_path / "token") as server:
        assert [ask(server, f"/metrics?run_id={run_id}")[0] for run_id in ("1f", "2e")] == [401, 401]


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "TRACE", "OPTIONS", "CONNECT"])
@pytest.mark.parametrize("path", ["/metrics", "/elsewhere"])
def test_nothing_can_be_sent(method: str, path: str) -> None:
    with serving() as server:
        status, _, headers = ask(server, path, method)
        assert (status, headers["Allow"]) == (405, "GET, HEAD")


def test_a_head_is_answered_without_a_body() -> None:
    with serving() as server:
        status, body, headers = ask(server, method="HEAD")
        assert (status, body, headers["Content-Length"]) == (200, b"", "18")
        assert server.last_scrape is None


@pytest.mark.parametrize(
    ("accepted", "is_compressed"), [("gzip", True), ("br, gzip;q=0.5", True), ("identity", False), ("x-gzip2", False)]
)
def test_the_page_is_compressed_for_those_who_ask(accepted: str, is_compressed: bool) -> None:
    with serving() as server:
        _, body, headers = ask(server, headers={"Accept-Encoding": accepted})
        assert headers["Content-Encoding"] == ("gzip" if is_compressed else None)
        assert (gzip.decompress(body) if is_compressed else body) == b"dist_train_step 1\n"
        assert headers["Content-Type"].startswith("text/plain; version=0.0.4")
        assert headers["Content-Length"] == str(len(body))


def test_a_health_page_is_served_to_everybody(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("secret\n")
    with serving(token_file=tmp_path / "token") as server:
        assert ask(server, "/healthz?probe=1")[:2] == (200, b"ok\n")


@pytest.mark.parametrize(
    "authorization",
    [
        "",
        "Bearer",
        "Bearer wrong",
        "Bearer secret2",
        "Basic secret",
        basic("secret:secret"),
        "Basic %%%",
        "Bearer \xe9",
    ],
)
def test_without_the_right_token_the_answer_is_401(authorization: str, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("secret\n")
    with serving(token_file=tmp_path / "token") as server:
        headers = {"Authorization": authorization} if authorization else {}
        status, body, answered = ask(server, headers=headers)
        assert (status, answered["WWW-Authenticate"]) == (401, 'Bearer realm="dist_train"')
        assert b"dist_train_step" not in body
        assert server.last_scrape is None
        assert ask(server, headers={"Authorization": "Bearer secret"})[0] == 200
        assert ask(server, headers={"Authorization": "bearer  secret"})[0] == 200


def test_a_user_and_a_password_are_taken(tmp_path: Path) -> None:
    (tmp_path / "password").write_text("prometheus:päss:word\n")
    with serving(password_file=tmp_path / "password") as server:
        status, _, headers = ask(server, headers={"Authorization": basic("prometheus:pass")})
        assert (status, headers["WWW-Authenticate"]) == (401, 'Basic realm="dist_train", charset="UTF-8"')
        assert ask(server, headers={"Authorization": basic("prometheus:päss:word")})[0] == 200


def test_with_both_either_is_enough(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("token\n")
    (tmp_path / "password").write_text("user:password\n")
    with serving(token_file=tmp_path / "token", password_file=tmp_path / "password") as server:
        for authorization, status in (("Bearer token", 200), (basic("user:password"), 200), ("Bearer user:pass", 401)):
            answered, _, headers = ask(server, headers={"Authorization": authorization})
            assert answered == status
        assert len(headers.get_all("WWW-Authenticate") or ()) == 2


def test_over_tls_the_page_is_read_and_plain_http_is_refused(certificate: tuple[Path, Path]) -> None:
    with serving(certificate_file=certificate[0], key_file=certificate[1]) as server:
        with pytest.raises((ConnectionError, http.client.HTTPException)):
            ask(server)
        trust = ssl.create_default_context(cafile=str(certificate[0]))
        connection = http.client.HTTPSConnection("127.0.0.1", server.server_port, timeout=PATIENCE, context=trust)
        for _ in range(2):
            connection.request("GET", "/metrics")
            assert connection.getresponse().read() == b"dist_train_step 1\n"
        connection.close()


def test_tls_is_1_2_at_least(certificate: tuple[Path, Path]) -> None:
    context = tls_context(plan_of(MetricsSettings(certificate_file=certificate[0], key_file=certificate[1])))
    assert context is not None
    assert context.minimum_version == ssl.TLSVersion.TLSv1_2


def test_a_client_that_never_shakes_hands_delays_nobody(certificate: tuple[Path, Path]) -> None:
    with serving(certificate_file=certificate[0], key_file=certificate[1]) as server, ExitStack() as stack:
        silent = [
            stack.enter_context(socket.create_connection(("127.0.0.1", server.server_port), timeout=PATIENCE))
            for _ in range(5)
        ]
        trust = ssl.create_default_context(cafile=str(certificate[0]))
        connection = http.client.HTTPSConnection("127.0.0.1", server.server_port, timeout=PATIENCE, context=trust)
        connection.request("GET", "/metrics")
        assert connection.getresponse().status == 200
        assert not select.select(silent, [], [], 0)[0], "they have not been let go"
        connection.close()


def test_clients_without_end_give_way_to_one_that_asks() -> None:
    before = threading.active_count()
    with serving() as server, ExitStack() as stack:
        idle = [
            stack.enter_context(socket.create_connection(("127.0.0.1", server.server_port), timeout=PATIENCE))
            for _ in range(200)
        ]
        for client in idle[-20:]:
            client.sendall(b"GET /metrics HTTP/1.1\r\nX-Slow: ")
        assert ask(server)[0] == 200
        assert idle[0].recv(1) == b"", "the one idle longest is disconnected"
        wait_for(lambda: threading.active_count() < before + 64 + 20, "the end of the threads of those disconnected")


def test_a_request_with_a_body_ends_its_connection() -> None:
    with serving() as server:
        with socket.create_connection(("127.0.0.1", server.server_port), timeout=PATIENCE) as client:
            client.sendall(
                b"GET /healthz HTTP/1.1\r\nContent-Length: 40\r\n\r\nGET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"
            )
            received = b""
            while chunk := client.recv(4096):
                received += chunk
        assert received.count(b"HTTP/1.1") == 1


def refusal(**settings: Any) -> UsageError:
    with pytest.raises(UsageError) as caught:
        check_access(MetricsSettings(**settings))
    return caught.value


@pytest.mark.parametrize("key", ["token_file", "password_file", "certificate_file"])
def test_a_file_that_is_missing_is_named_before_training(key: str, tmp_path: Path) -> None:
    error = refusal(**{key: tmp_path / "nowhere"})
    assert error.code == "secret-unreadable"
    assert str(error).startswith(f"metrics.{key}: {tmp_path}/nowhere ")


@pytest.mark.parametrize(
    ("key", "content", "code"),
    [
        ("token_file", "\n", "secret-empty"),
        ("token_file", "one\ntwo\n", "secret-lines"),
        ("token_file", "two words", "token-characters"),
        ("password_file", "", "secret-empty"),
        ("password_file", "password", "password-form"),
        ("password_file", ":password", "password-form"),
        ("password_file", "user:", "password-form"),
        ("certificate_file", "no certificate", "certificate-unusable"),
    ],
)
def test_a_file_that_is_not_what_it_should_be_is_refused(key: str, content: str, code: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text(content)
    assert refusal(**{key: tmp_path / "file"}).code == code


def test_keys_that_cannot_be_used_are_refused(certificate: tuple[Path, Path], tmp_path: Path) -> None:
    assert refusal(key_file=certificate[1]).code == "certificate-missing"
    other, encrypted = tmp_path / "other.pem", tmp_path / "encrypted.pem"
    make = "openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:prime256v1 -out"
    subprocess.run([*make.split(), str(other)], check=True, capture_output=True)
    assert refusal(certificate_file=certificate[0], key_file=other).code == "certificate-unusable"
    command = f"openssl pkey -in {certificate[1]} -aes256 -passout pass:abcdef -out {encrypted}"
    subprocess.run(command.split(), check=True, capture_output=True)
    assert refusal(certificate_file=certificate[0], key_file=encrypted).code == "key-encrypted"


def test_good_files_are_accepted(certificate: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "token").write_text("secret")
    (tmp_path / "password").write_text("user:password\n")
    check_access(
        MetricsSettings(
            token_file=tmp_path / "token",
            password_file=tmp_path / "password",
            certificate_file=certificate[0],
            key_file=certificate[1],
        )
    )
    check_access(MetricsSettings())


def test_a_run_without_progress_is_not_healthy() -> None:
    progress = [True, False]
    with serving(lambda: progress.pop(0)) as server:
        assert [ask(server, "/healthz")[0] for _ in range(2)] == [200, 503]
        assert ask(server)[0] == 200


@pytest.mark.parametrize(
    ("host", "mode", "count"),
    [
        *((host, None, 0) for host in ("127.0.0.1", "::1", "localhost")),
        *((host, None, 1) for host in ("0.0.0.0", "::", "node1")),
        ("0.0.0.0", 0o600, 0),
        ("127.0.0.1", 0o644, 1),
        ("0.0.0.0", 0o604, 1),
    ],
)
def test_what_is_open_to_strangers_is_warned_of(host: str, mode: int | None, count: int, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("sesame")
    if mode is not None:
        token.chmod(mode)
    warnings = access_warnings(MetricsSettings(host=host, token_file=None if mode is None else token))
    assert len(warnings) == count
    assert not any("sesame" in warning for warning in warnings)


@pytest.mark.parametrize("has_file", [True, False])
def test_a_key_that_everybody_can_read_is_warned_of(has_file: bool, tmp_path: Path) -> None:
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    certificate.touch(0o644)
    key.touch(0o600)
    settings = MetricsSettings(certificate_file=certificate, key_file=key if has_file else None)
    with_key = key if has_file else certificate
    with_key.chmod(0o600)
    assert not access_warnings(settings)
    with_key.chmod(0o644)
    [warning] = access_warnings(settings)
    assert str(with_key) in warning
