from __future__ import annotations

import http.client
import json
import logging
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from dist_train.config.sections import MetricsSettings
from dist_train.monitoring.observers import Observers
from dist_train.monitoring.prometheus import exporter as exporter_module
from dist_train.monitoring.prometheus.exporter import Exporter
from dist_train.rundir.metrics_file import to_json
from dist_train.rundir.records import EvaluationRecord, EventRecord, Outcome, Record
from tests.ipv6 import needs_ipv6
from tests.services.servers import free_port
from tests.unit.exporting import FACTS, LEFT, OUTCOME, STOPPED, get, measurement, port_of, read, scrape, serving, train
from tests.waiting import PATIENCE, is_alive, wait_for

ROOT = Path(__file__).parents[2]


@contextmanager
def busy_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def process_of(exporter: Exporter) -> int:
    assert exporter._link is not None
    return exporter._link.process.pid


def outcomes(folder: Path) -> list[str | None]:
    """Return the outcomes in the target files of `folder`; None for runs that have not ended."""
    return [json.loads(path.read_text())[0]["labels"].get("outcome") for path in folder.glob("*.json")]


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_every_change_is_in_the_next_scrape(tmp_path: Path) -> None:
    with serving(replace(FACTS, run_directory=tmp_path)) as exporter:
        for step in range(15, 25):
            exporter.record(train(step))
            assert scrape(exporter)["dist_train_step", ()] == step
        exporter.measurement(measurement(25, ranks=1024))
        values = scrape(exporter)
        assert values["dist_train_rank_resident_memory_bytes", ("", "1023")] == 1e9 + 1023
        assert values["dist_train_checkpoints_total", ()] == 0


def test_counts_and_values_of_earlier_launches_are_served_from_the_start(tmp_path: Path) -> None:
    (tmp_path / "counts.json").write_text('{"checkpoint": 7, "requeued": 2}')
    records: tuple[Record, ...] = (
        train(7),
        EvaluationRecord(7, 1.0, "test", 0.5, 0.91, 10_000, 1.0),
        EvaluationRecord(14, 2.0, "test", 0.6, 0.9, 10_000, 1.0),
        EventRecord(14, "checkpoint", 1_800_000_000.0, {"bytes": 12}),
    )
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(to_json, records)) + "\n{torn")
    with serving(replace(FACTS, run_directory=tmp_path)) as exporter:
        exporter.record(EventRecord(14, "checkpoint", 1_800_000_100.0, {"bytes": 13}))
        wait_for(lambda: ("dist_train_best_accuracy_ratio", ()) in scrape(exporter))
        values = scrape(exporter)
    assert values["dist_train_best_accuracy_ratio", ()] == 0.91
    assert values["dist_train_accuracy_ratio", ("test",)] == 0.9
    assert values["dist_train_checkpoints_total", ()] == 8
    assert values["dist_train_requeues_total", ()] == 2
    assert values["dist_train_checkpoint_size_bytes", ()] == 13


def test_busy_port_is_replaced_by_the_next_free_one_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    with busy_port() as port, caplog.at_level(logging.INFO), serving(port=port) as exporter:
        assert port < port_of(exporter) < port + 50
        assert "dist_train_step" in get(exporter)
        exporter.record(train(20))
        assert warnings_of(caplog) == [f"metrics port {port} is in use; metrics are at port {port_of(exporter)}"]
        assert f"metrics at http://127.0.0.1:{port_of(exporter)}/metrics" in caplog.text


def test_configured_port_is_reserved_for_rank_0(caplog: pytest.LogCaptureFixture) -> None:
    port = free_port()
    with serving(replace(FACTS, rank=1), port=port) as other, serving(port=port) as first:
        assert port_of(first) == port < port_of(other)
        assert "dist_train_step " not in get(other)
    assert not warnings_of(caplog)


@pytest.mark.parametrize("host", ["192.0.2.1", "no host.invalid"])
def test_unusable_address_gives_one_warning(host: str, caplog: pytest.LogCaptureFixture) -> None:
    observers = Observers([Exporter(MetricsSettings(host=host))])
    observers.begin(FACTS)
    observers.record(train(20))
    observers.end(OUTCOME)
    (warning,) = warnings_of(caplog)
    assert "Exporter failed and is disabled" in warning
    assert f"{host}:9810 cannot be served" in warning
    assert "metrics.host" in warning


def test_end_frees_the_port_and_leaves_no_process(tmp_path: Path) -> None:
    with serving(outcome=STOPPED, targets_directory=tmp_path / "targets") as exporter:
        port, process = port_of(exporter), process_of(exporter)
        assert outcomes(tmp_path / "targets") == [None]
    assert exporter.address is None
    assert not is_alive(process)
    assert outcomes(tmp_path / "targets") == ["stopped"]
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", port), timeout=PATIENCE)
    exporter.end(OUTCOME)


def test_end_without_begin_leaves_no_process() -> None:
    exporter = Exporter(MetricsSettings(port=0))
    process = process_of(exporter)
    exporter.end(OUTCOME)
    assert not is_alive(process)


def test_rank_that_becomes_rank_0_leaves_no_target_file_of_its_former_rank(tmp_path: Path) -> None:
    with serving(replace(FACTS, rank=1), replace(OUTCOME, state="running"), targets_directory=tmp_path):
        assert outcomes(tmp_path) == [None]
    assert outcomes(tmp_path) == []


def test_end_of_a_run_that_is_not_served_yet_is_in_its_target_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporter_module, "_START_SECONDS", 0.0)
    monkeypatch.setattr(exporter_module, "_END_SECONDS", PATIENCE)
    exporter = Exporter(MetricsSettings(port=0, last_scrape_seconds=0.0, targets_directory=tmp_path))
    exporter.begin(FACTS)
    assert exporter.address is None
    exporter.end(OUTCOME)
    assert outcomes(tmp_path) == ["finished"]


def test_process_that_cannot_be_started_is_tried_again_for_days(monkeypatch: pytest.MonkeyPatch) -> None:
    exporter = Exporter(MetricsSettings(port=0))
    exporter.begin(FACTS)
    assert exporter._link is not None
    exporter._link.process.kill()

    def is_noticed() -> bool:
        exporter.record(train(20))
        return exporter.address is None

    def refuse() -> None:
        raise OSError("no memory")

    wait_for(is_noticed)
    clock = [time.monotonic()]
    monkeypatch.setattr(exporter_module, "_Link", refuse)
    monkeypatch.setattr("dist_train.monitoring.prometheus.exporter.time.monotonic", lambda: clock[0])
    for _ in range(2000):
        clock[0] += 65.0
        exporter.progress(20)
    assert exporter._restarts == 2000


def test_killed_process_is_reported_once_and_keeps_its_target_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(targets_directory=tmp_path) as exporter:
        os.kill(process_of(exporter), signal.SIGKILL)

        def noticed() -> list[str]:
            exporter.record(train(20))
            return warnings_of(caplog)

        wait_for(noticed)
        exporter.record(train(21))
        exporter.measurement(measurement(21))
        assert outcomes(tmp_path) == [None], "Prometheus must see that the target is down"
    assert warnings_of(caplog) == ["metrics are no longer served; training continues: its process was ended by SIGKILL"]
    assert outcomes(tmp_path) == ["finished"]


def test_killed_process_is_restarted_with_earlier_values(tmp_path: Path) -> None:
    counts = tmp_path / "counts.json"
    facts = replace(FACTS, name="demo", run_directory=tmp_path)
    records = (
        EventRecord(3, "signal", facts.launched - 1, {"name": "SIGTERM"}),  # of an earlier launch
        EventRecord(20, "micro_size", facts.launched + 1, {"before": 256, "now": 128}),
        EventRecord(21, "batch_size", facts.launched + 2, {"before": 8192, "now": 4096}),
    )
    with serving(facts, targets_directory=tmp_path / "targets") as exporter:
        first = process_of(exporter)
        assert Path(f"/proc/{first}/comm").read_text() == "metrics demo\n"
        counts.write_text('{"checkpoint": 3}')
        (tmp_path / "metrics.jsonl").write_text("".join(f"{to_json(record)}\n" for record in records))
        os.kill(first, signal.SIGKILL)

        def served_again() -> bool:
            exporter.progress(40)
            return exporter.address is not None and process_of(exporter) != first

        wait_for(served_again)
        wait_for(lambda: scrape(exporter)["dist_train_micro_batch_size", ()] == 128)
        values = scrape(exporter)
        assert outcomes(tmp_path / "targets") == [None]
    assert values["dist_train_exporter_restarts_total", ()] == 1
    assert values["dist_train_checkpoints_total", ()] == 3
    assert values["dist_train_step", ()] == 40
    assert values["dist_train_micro_batches", ()] == 32
    assert values["dist_train_state", ("running",)] == 1


def test_exporter_of_a_program_with_many_open_files() -> None:
    lowest, highest = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(lowest, 2048), highest))
    with ExitStack() as stack:
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (lowest, highest))
        for _ in range(1100):
            stack.enter_context(open(os.devnull))
        with serving() as exporter:
            exporter.record(train(21))
            assert scrape(exporter)["dist_train_step", ()] == 21


def test_hanging_process_does_not_block_the_trainer(caplog: pytest.LogCaptureFixture) -> None:
    with serving() as exporter:
        process = process_of(exporter)
        os.kill(process, signal.SIGSTOP)
        for step in range(100_000):
            exporter.record(train(step))
        exporter.measurement(measurement(1, ranks=1024))
    assert not is_alive(process)


def test_events_are_kept_for_a_slow_process() -> None:
    with serving() as exporter:
        os.kill(process_of(exporter), signal.SIGSTOP)
        for step in range(30_000):
            exporter.record(train(step))
        for step in range(10):
            exporter.record(EventRecord(step, "checkpoint", 1.0, {}))
        os.kill(process_of(exporter), signal.SIGCONT)

        def counted() -> bool:
            exporter.record(train(0))
            return scrape(exporter)["dist_train_checkpoints_total", ()] == 10

        wait_for(counted)


def test_unwritable_targets_directory_is_reported_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    with serving(targets_directory=tmp_path / "file" / "targets") as exporter:
        exporter.record(train(20))
        assert scrape(exporter)["dist_train_step", ()] == 20
    (warning,) = warnings_of(caplog)
    assert warning.startswith("Prometheus will not find this run: no target file in")


def test_folder_that_cannot_be_listed_is_not_said_to_lack_the_target_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = "from pathlib import Path; Path.iterdir = lambda path: path.read_bytes(); main("  # an OSError
    monkeypatch.setattr(exporter_module, "_CHILD", exporter_module._CHILD.replace("main(", program))
    with serving(targets_directory=tmp_path):
        assert outcomes(tmp_path) == [None]
    assert outcomes(tmp_path) == ["finished"]
    (warning,) = warnings_of(caplog)
    assert "Prometheus" not in warning


@pytest.fixture
def fast_heartbeat(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let exporters' processes touch their target files all the time instead of each minute."""
    program = "from dist_train.monitoring.prometheus import targets; targets.HEARTBEAT_SECONDS = 0.0; main("
    monkeypatch.setattr(exporter_module, "_CHILD", exporter_module._CHILD.replace("main(", program))


def await_warnings(exporter: Exporter, count: int, caplog: pytest.LogCaptureFixture) -> None:
    def are_there() -> bool:
        exporter.record(train(20))
        return len(warnings_of(caplog)) >= count

    wait_for(are_there, f"{count} warnings")


@pytest.mark.usefixtures("fast_heartbeat")
def test_heartbeat_goes_on_after_errors_with_one_warning_each_time(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, away = tmp_path / "targets", tmp_path / "away"
    with serving(targets_directory=folder) as exporter:
        (path,) = folder.glob("*.json")
        for spell in (1, 2):
            folder.rename(away)
            folder.touch()
            await_warnings(exporter, spell, caplog)
            folder.unlink()
            away.rename(folder)
            os.utime(path, (0, 0))
            wait_for(lambda: path.stat().st_mtime > 0, "the file is touched again")
    assert all(warning.startswith("Prometheus may lose sight of this run") for warning in warnings_of(caplog))
    assert len(warnings_of(caplog)) == 2


@pytest.mark.usefixtures("fast_heartbeat")
def test_target_file_that_could_not_be_written_is_written_later(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "targets"
    folder.touch()
    with serving(targets_directory=folder) as exporter:
        await_warnings(exporter, 1, caplog)
        folder.unlink()
        wait_for(lambda: outcomes(folder) == [None], "the file is written")
    assert outcomes(folder) == ["finished"]
    assert len(warnings_of(caplog)) == 1


def test_unreachable_pushgateway_is_reported_once(caplog: pytest.LogCaptureFixture) -> None:
    with busy_port() as port:
        pass
    with serving(pushgateway=f"http://127.0.0.1:{port}") as exporter:
        exporter.record(train(20))
    (warning,) = warnings_of(caplog)
    assert warning.startswith(f"the Pushgateway at http://127.0.0.1:{port} ")
    assert "[Errno 111]" in warning


@contextmanager
def gateway() -> Iterator[tuple[str, list[tuple[str, str, str]]]]:
    """Yield the URL of a Pushgateway, and the method, path and content of each request to it so far."""
    requests: list[tuple[str, str, str]] = []

    class Gateway(BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            requests.append((self.command, self.path, content.decode()))
            self.send_response(202)
            self.end_headers()

        do_DELETE = do_PUT  # noqa: N815 (the name is the library's)

        def log_message(self, format: str, *args: object) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Gateway) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.1,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", requests
        server.shutdown()
        thread.join()


def test_last_values_replace_those_of_an_earlier_launch_in_the_group_of_the_run() -> None:
    with gateway() as (url, requests), serving(replace(FACTS, name="demo"), STOPPED, pushgateway=url) as exporter:
        exporter.record(train(20))
    (deleted, group, _), (pushed, path, page) = requests
    assert (deleted, pushed) == ("DELETE", "PUT")
    assert group == path == "/metrics/job/dist_train/run/demo/run_id/0123456789abcdef"
    assert 'dist_train_state{state="stopped"} 1.0' in page
    assert "dist_train_step 210.0" in page


def test_last_values_of_a_trainer_that_is_killed_as_it_ends_are_pushed() -> None:
    with gateway() as (url, requests), serving(replace(FACTS, name="demo"), pushgateway=url) as exporter:
        assert exporter._link is not None
        os.kill(process_of(exporter), signal.SIGSTOP)
        exporter._send(OUTCOME)
        exporter._link.channel.close()
        os.kill(process_of(exporter), signal.SIGCONT)
        wait_for(lambda: [command for command, _, _ in requests] == ["DELETE", "PUT"])
        exporter._link.close(PATIENCE)
        exporter._link = None
    assert 'dist_train_state{state="finished"} 1.0' in requests[1][2]


def test_scraped_run_waits_for_a_scrape_of_its_last_values() -> None:
    exporter = Exporter(MetricsSettings(port=0, last_scrape_seconds=PATIENCE))
    exporter.begin(FACTS)
    get(exporter)
    seen: list[float] = []

    def watch() -> None:
        # Until the server is closed. The last scrape may find no address, no server, or half an answer.
        with suppress(AssertionError, OSError, http.client.HTTPException):
            while True:
                seen.append(scrape(exporter)["dist_train_state", ("finished",)])

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.monotonic()
    exporter.end(OUTCOME)
    assert time.monotonic() - started < PATIENCE
    watcher.join()
    assert seen[-1] == 1


@pytest.mark.parametrize(
    ("outcome", "scrapes", "waits"), [(OUTCOME, 1, True), (STOPPED, 1, False), (LEFT, 1, False), (OUTCOME, 0, False)]
)
def test_unscraped_stopped_or_left_run_does_not_wait(
    outcome: Outcome, scrapes: int, waits: bool, tmp_path: Path
) -> None:
    seconds = 1.0 if waits else PATIENCE
    exporter = Exporter(MetricsSettings(port=0, last_scrape_seconds=seconds, targets_directory=tmp_path))
    exporter.begin(FACTS)
    for _ in range(scrapes):
        get(exporter)
    started = time.monotonic()
    exporter.end(outcome)
    assert (time.monotonic() - started >= seconds) == waits
    assert outcomes(tmp_path) == ["killed" if outcome.is_left else outcome.state]


TRAINER = """
import sys, time
from dist_train.config.sections import MetricsSettings
from dist_train.monitoring.prometheus.exporter import Exporter
from tests.unit.exporting import FACTS, train
exporter = Exporter(MetricsSettings(port=0, targets_directory=sys.argv[1]))
exporter.begin(FACTS)
exporter.record(train(20))
print(exporter._link.process.pid, flush=True)
time.sleep(60)
"""


def test_killed_trainer_leaves_no_process_or_pipe_and_is_reported(tmp_path: Path) -> None:
    trainer = subprocess.Popen(
        [sys.executable, "-c", TRAINER, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert trainer.stdout is not None
    with trainer.stdout as output:
        line = output.readline()
        assert line.strip().isdigit(), line.decode() + output.read().decode()
        process = int(line)
        assert outcomes(tmp_path) == [None]
        for name in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
            os.kill(process, name)
        trainer.kill()
        assert select.select([output], [], [], PATIENCE)[0]
        assert output.read() == b"", "a launcher waits for the end of the stream"
        trainer.wait()
    wait_for(lambda: outcomes(tmp_path) == ["killed"])
    wait_for(lambda: not is_alive(process))


def test_killed_trainer_is_reported_to_all_scraping_servers(tmp_path: Path) -> None:
    program = TRAINER.replace("process.pid", "process.pid, exporter.address")
    trainer = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE)
    assert trainer.stdout is not None
    with trainer.stdout as output:
        process, address = output.readline().decode().split()

    def outcome_for(server: http.client.HTTPConnection) -> float:
        server.request("GET", "/metrics")
        return read(server.getresponse().read().decode())["dist_train_outcome", ("killed",)]

    def prometheus() -> closing[http.client.HTTPConnection]:
        return closing(http.client.HTTPConnection(urlsplit(address).netloc, timeout=PATIENCE))

    with prometheus() as first, prometheus() as second:
        assert (outcome_for(first), outcome_for(second)) == (0, 0)
        trainer.kill()
        trainer.wait()
        wait_for(lambda: outcome_for(first) == 1)
        assert is_alive(int(process))
        assert outcome_for(second) == 1
        wait_for(lambda: not is_alive(int(process)))
    assert outcomes(tmp_path) == ["killed"]


def memory_of(exporter: Exporter, kind: str) -> int:
    """Return the memory of the exporter's process in bytes: now (VmRSS), or at its peak (VmHWM)."""
    status = Path(f"/proc/{process_of(exporter)}/status").read_text()
    return next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith(kind))


def test_process_of_a_long_run_uses_little_memory(tmp_path: Path) -> None:
    evaluation = EvaluationRecord(200_000, 1.0, "test", 0.5, 0.91, 10_000, 1.0)
    torn = to_json(replace(evaluation, accuracy=0.99))[:-9]
    (tmp_path / "metrics.jsonl").write_text(f"{to_json(train(7))}\n" * 200_000 + f"{to_json(evaluation)}\n{torn}")
    with serving(replace(FACTS, run_directory=tmp_path)) as exporter:
        wait_for(lambda: scrape(exporter).get(("dist_train_best_accuracy_ratio", ())) == 0.91, "the records are read")
        assert memory_of(exporter, "VmHWM") < 60e6


def test_process_loads_few_modules_and_uses_little_memory() -> None:
    script = (
        "import sys, dist_train.monitoring.prometheus.process; print(*{name.split('.')[0] for name in sys.modules})"
    )
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert not {"torch", "numpy", "yaml", "pydantic", "rich", "horovod", "mpi4py"} & set(loaded.stdout.split())
    with serving() as exporter:
        resident = memory_of(exporter, "VmRSS")
        descriptors = sorted(os.readlink(entry) for entry in Path(f"/proc/{process_of(exporter)}/fd").iterdir())
    assert resident < 60e6
    kinds = [name.partition(":")[0] for name in descriptors]
    assert kinds == ["/dev/null", "/dev/null", "anon_inode", "pipe", "socket", "socket"]


def test_fault_in_the_process_gives_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "token").touch()
    observers = Observers([Exporter(MetricsSettings(port=0, token_file=tmp_path / "token"))])
    observers.begin(FACTS)
    observers.end(OUTCOME)
    (warning,) = warnings_of(caplog)
    assert f"metrics.token_file: {tmp_path}/token is empty" in warning


def test_concurrent_scrapes_get_complete_pages() -> None:
    with serving() as exporter:
        pages: list[str] = []
        clients = [threading.Thread(target=lambda: pages.extend(get(exporter) for _ in range(5))) for _ in range(4)]
        for client in clients:
            client.start()
        step = 15
        while any(client.is_alive() for client in clients):
            exporter.record(train(step))
            exporter.record(EventRecord(step, f"event_{step % 50}", 0.0, {}))
            step += 1
            time.sleep(0.001)
    assert len(pages) == 20
    last = "# TYPE dist_train_device_utilization_ratio gauge"
    assert all(page.rstrip().rpartition("\n")[2] == last for page in pages)


@needs_ipv6
def test_ipv6_loopback_address_works() -> None:
    with serving(host="::1") as exporter:
        assert "dist_train_step" in get(exporter)
