"""docker/compose.yaml, started by podman-compose: Prometheus finds the run beside it.

The images of Prometheus and Alertmanager are stand-ins with this machine's programs; Grafana's only answers requests.
"""

from __future__ import annotations

import json
import shutil
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from tests.containers.engine import PYTHON_IMAGE, ROOT, Engine
from tests.containers.test_image import fashion_mnist
from tests.services.servers import fetch
from tests.waiting import wait_for

pytestmark = [pytest.mark.services, pytest.mark.ranks, pytest.mark.lengthy, pytest.mark.timeout(1800)]

COMPOSE = ROOT / "docker" / "compose.yaml"
SERVERS = {"prometheus": "prometheus", "alertmanager": "prometheus-alertmanager"}
GRAFANA = """\
import http.server, os
class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/api/health" else 404)
        self.end_headers()
address = os.environ["GF_SERVER_HTTP_ADDR"], int(os.environ["GF_SERVER_HTTP_PORT"])
http.server.HTTPServer(address, Answer).serve_forever()
"""
SHORT = """\
base: /opt/dist_train/configs/demo.yaml
run: {max_steps: 30}
batch: {global_size: 256}
evaluation: {train_samples: 200}
"""


def make_stand_in(engine: Engine, folder: Path, service: str, image: str) -> None:
    folder.mkdir()
    lines = [f"FROM {PYTHON_IMAGE}", "RUN ln -s /bin/busybox /bin/wget", f"COPY program /bin/{service}"]
    if service == "grafana":
        (folder / "program").write_text(GRAFANA)
        lines.append('ENTRYPOINT ["python3", "/bin/grafana"]')
    else:
        found = shutil.which(SERVERS[service])
        assert found
        shutil.copy(found, folder / "program")
        # Debian's Alertmanager reads templates from there; the others have no such folder.
        shared = Path("/usr/share/prometheus") / service
        if shared.is_dir():
            shutil.copytree(shared, folder / "shared")
            lines.append(f"COPY shared {shared}")
        lines.append(f"RUN mkdir -p /{service} && chown nobody /{service}")
        lines += ["USER nobody", f'ENTRYPOINT ["/bin/{service}"]']
    (folder / "Containerfile").write_text("\n".join(lines) + "\n")
    engine.build(f"docker.io/{image}", folder / "Containerfile", folder)


@pytest.fixture
def stand_ins(engine: Engine, tmp_path: Path) -> None:
    """The images that compose.yaml names, except the trainer's."""
    missing = [name for name in ("podman-compose", *SERVERS.values()) if not shutil.which(name)]
    if missing:
        pytest.skip(f"these programs are missing: {' '.join(missing)} (docker/debian_packages.sh installs them)")
    for port in (9090, 9093, 3000):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                pytest.skip(f"port {port} is taken")
    for service, settings in yaml.safe_load(COMPOSE.read_text())["services"].items():
        if service != "train":
            make_stand_in(engine, tmp_path / service, service, settings["image"])


@contextmanager
def health_checks(engine: Engine) -> Iterator[None]:
    """Check the health of all containers periodically, as systemd's timers would; podman has no daemon."""
    ended = threading.Event()

    def check() -> None:
        while not ended.wait(1):
            for name in engine.call("podman", "ps", "--format={{.Names}}", check=False).stdout.split():
                engine.call("podman", "healthcheck", "run", name, check=False)

    checker = threading.Thread(target=check)
    checker.start()
    try:
        yield
    finally:
        ended.set()
        checker.join()


def test_services_find_a_run_beside_them(engine: Engine, image: str, stand_ins: None, tmp_path: Path) -> None:
    runs, targets = tmp_path / "runs", tmp_path / "targets"
    for folder in (tmp_path, runs, targets):
        folder.mkdir(exist_ok=True)
        folder.chmod(0o1777)
    (runs / "short.yaml").write_text(SHORT)
    compose = ("podman-compose", "--in-pod=0", "--project-name=dist-train-test", f"--file={COMPOSE}", "--profile=train")
    variables = {
        "DIST_TRAIN_IMAGE": image,
        "DIST_TRAIN_CONFIG": "/opt/dist_train/runs/short.yaml",
        "DIST_TRAIN_TARGETS": str(targets),
        "DIST_TRAIN_RUNS": str(runs),
        "DIST_TRAIN_DATA": fashion_mnist(),
    }

    def all_healthy() -> bool:
        filters = ("--filter=health=healthy", "--filter=label=io.podman.compose.project=dist-train-test")
        names = engine.call("podman", "ps", "--format={{.Names}}", *filters).stdout
        return all(service in names for service in ("prometheus", "alertmanager", "grafana"))

    def status() -> dict[str, object]:
        file = runs / "demo" / "status.json"
        return dict(json.loads(file.read_text())) if file.exists() else {}

    def steps_seen() -> bool:
        query = "http://127.0.0.1:9090/api/v1/query?query=max_over_time(dist_train_step[10m])"
        return bool(json.loads(fetch(query))["data"]["result"])

    try:
        with health_checks(engine):
            engine.call(*compose, "up", "--detach", timeout=180, variables=variables)
            wait_for(lambda: any(targets.glob("*.json")), "the run's target")
            wait_for(steps_seen, "the run in Prometheus")
            wait_for(all_healthy, "health of Prometheus, Alertmanager and Grafana")
            wait_for(lambda: status().get("finished"), "the end of the run")
        assert (status()["state"], status()["world_size"]) == ("finished", 2)
    finally:
        print(engine.call(*compose, "logs", check=False, variables=variables).stdout[-6000:])
        engine.call(*compose, "down", "--volumes", check=False, timeout=180, variables=variables)
