"""Real servers for tests: Prometheus, Alertmanager, Pushgateway, and a webhook that receives alerts."""

from __future__ import annotations

import json
import socket
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from random import SystemRandom
from threading import Thread
from typing import Any

from tests.waiting import PATIENCE, wait_for


def free_port() -> int:
    """Return a port of the loopback interface that is free now, and that nobody gets who asks for any free port."""
    first_of_any = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    while True:
        port = SystemRandom().choice(range(10_000, first_of_any) or range(10_000, 30_000))
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


def fetch(url: str, timeout: float = PATIENCE) -> str:
    """Return the text at `url`."""
    with urllib.request.urlopen(url, timeout=timeout) as answer:
        text: str = answer.read().decode()
        return text


@contextmanager
def _running(command: Sequence[str], ready: str, log: Path) -> Iterator[None]:
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
        try:

            def is_ready() -> bool:
                assert process.poll() is None, log.read_text()
                try:
                    fetch(ready)
                except (urllib.error.URLError, ConnectionError):
                    return False
                return True

            wait_for(is_ready, f"{command[0]} is ready")
            yield
        finally:
            process.terminate()
            try:
                process.wait(timeout=PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


Sample = tuple[float, float]
"""Time in seconds since 1970, and value."""


@dataclass(frozen=True)
class Prometheus:
    """A Prometheus server at `url`."""

    url: str

    def ask(self, path: str, **parameters: str | float) -> Any:
        """Return the data of a request to its API."""
        query = urllib.parse.urlencode(parameters)
        try:
            answer = json.loads(fetch(f"{self.url}/api/v1/{path}?{query}"))
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{path} {parameters}: {error.read().decode()}") from error
        assert answer["status"] == "success", answer
        return answer["data"]

    def query(self, expression: str) -> list[tuple[Mapping[str, str], float]]:
        """Return labels and value of each series of `expression` now."""
        result = self.ask("query", query=expression)["result"]
        return [(series["metric"], float(series["value"][1])) for series in result]

    def history(self, selector: str, minutes: int = 30) -> dict[str, list[Sample]]:
        """Return the scraped samples of each series of `selector`, by its label `split`."""
        result = self.ask("query", query=f"{selector}[{minutes}m]")["result"]
        return {
            series["metric"].get("split", ""): [(time, float(value)) for time, value in series["values"]]
            for series in result
        }

    def times_of_samples(self, selector: str, minutes: int = 60) -> list[float]:
        """Return the times of all samples of `selector`, in seconds since 1970."""
        result = self.ask("query", query=f"{selector}[{minutes}m]")["result"]
        return [time for series in result for time, _ in series["values"]]

    def fired_at(self, alert: str, run_id: str) -> float:
        """Return the time at which `alert` first fired for a run, in seconds since 1970."""
        return min(self.times_of_samples(f'ALERTS{{alertname="{alert}",alertstate="firing",run_id="{run_id}"}}'))

    def firing(self) -> set[str]:
        """Return the names of the alerts that fire now."""
        return {name for name, _ in self.alerts()}

    def firing_runs(self, alert: str) -> set[str]:
        """Return the ids of the runs for which `alert` fires now."""
        return {run_id for name, run_id in self.alerts() if name == alert}

    def alerts(self) -> set[tuple[str, str]]:
        """Return each alert that fires now, with the id of its run."""
        firing = (alert["labels"] for alert in self.ask("alerts")["alerts"] if alert["state"] == "firing")
        return {(labels["alertname"], labels["run_id"]) for labels in firing}


@contextmanager
def prometheus(folder: Path, config: Path) -> Iterator[Prometheus]:
    """Run a Prometheus with `config` and its data in `folder`."""
    port = free_port()
    command = ["prometheus", f"--config.file={config}", f"--storage.tsdb.path={folder / 'data'}"]
    command += [f"--web.listen-address=127.0.0.1:{port}", "--log.level=warn"]
    url = f"http://127.0.0.1:{port}"
    with _running(command, f"{url}/-/ready", folder / "prometheus.log"):
        yield Prometheus(url)


@contextmanager
def alertmanager(folder: Path, config: Path) -> Iterator[str]:
    """Run an Alertmanager with `config`; yield its address, host:port."""
    address = f"127.0.0.1:{free_port()}"
    command = ["prometheus-alertmanager", f"--config.file={config}", f"--storage.path={folder / 'alerts'}"]
    command += [f"--web.listen-address={address}", "--cluster.listen-address=", "--log.level=warn"]
    with _running(command, f"http://{address}/-/ready", folder / "alertmanager.log"):
        yield address


@contextmanager
def pushgateway(folder: Path) -> Iterator[str]:
    """Run a Pushgateway; yield its URL."""
    url = f"http://127.0.0.1:{free_port()}"
    command = ["prometheus-pushgateway", f"--web.listen-address={url.removeprefix('http://')}"]
    # Debian's default is a file of the machine, which may have data of other Pushgateways.
    command += [f"--persistence.file={folder / 'pushed'}"]
    with _running(command, f"{url}/-/ready", folder / "pushgateway.log"):
        yield url


@dataclass
class Webhook:
    """The alerts received at `url`."""

    url: str = ""
    alerts: list[Mapping[str, Any]] = field(default_factory=list)

    def received(self, name: str, run: str, status: str) -> Mapping[str, Any] | None:
        """Return the first received alert with this name, run and status (firing, resolved), or None."""
        for alert in list(self.alerts):
            if (alert["labels"]["alertname"], alert["labels"].get("run"), alert["status"]) == (name, run, status):
                return alert
        return None


@contextmanager
def webhook() -> Iterator[Webhook]:
    """Receive alerts from Alertmanager."""
    hook = Webhook()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            hook.alerts.extend(json.loads(body)["alerts"])
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hook.url = f"http://127.0.0.1:{server.server_port}/"
        Thread(target=server.serve_forever, args=(0.1,), daemon=True).start()
        yield hook
        server.shutdown()
