"""A metrics page, a target file and a final push, checked with Prometheus' own programs."""

from __future__ import annotations

import json
import shutil
import ssl
import subprocess
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dist_train.rundir.records import EvaluationRecord, EventRecord
from tests.services.servers import fetch, prometheus, pushgateway
from tests.unit.exporting import FACTS, OUTCOME, STOPPED, get, measurement, serving, train
from tests.waiting import PATIENCE, wait_for

pytestmark = [
    pytest.mark.services,
    pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed (Debian: prometheus)"),
]


def test_promtool_accepts_a_live_page() -> None:
    with serving() as exporter:
        exporter.record(train(20))
        exporter.record(EvaluationRecord(21, 3.0, "test", 0.5, 0.87, 10_000, 1.0))
        exporter.record(EventRecord(21, "checkpoint", 4.0, {"bytes": 1, "seconds": 0.5, "stall_seconds": 0.1}))
        exporter.measurement(measurement(20))
        page = get(exporter)
    checked = subprocess.run(["promtool", "check", "metrics"], input=page, capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")


def test_prometheus_finds_a_run_by_its_target_file_with_token_and_tls(tmp_path: Path) -> None:
    targets = tmp_path / "targets"
    (tmp_path / "token").write_text("secret\n")
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost "
    command += "-addext subjectAltName=IP:127.0.0.1 -keyout key.pem -out certificate.pem"
    subprocess.run(command.split(), cwd=tmp_path, check=True, capture_output=True)
    config = tmp_path / "prometheus.yml"
    job = {
        "job_name": "anything",
        "scrape_interval": "1s",
        "scrape_timeout": "1s",
        "honor_labels": True,
        "file_sd_configs": [{"files": [f"{targets}/*.json"], "refresh_interval": "1s"}],
        "authorization": {"credentials_file": str(tmp_path / "token")},
        "tls_config": {"ca_file": str(tmp_path / "certificate.pem")},
    }
    config.write_text(json.dumps({"scrape_configs": [job]}))
    access = {
        "token_file": tmp_path / "token",
        "certificate_file": tmp_path / "certificate.pem",
        "key_file": tmp_path / "key.pem",
    }
    facts = replace(FACTS, name="demo")
    settings: dict[str, Any] = {"targets_directory": targets, "last_scrape_seconds": PATIENCE, **access}
    with prometheus(tmp_path, config) as server:
        with serving(facts, OUTCOME, **settings) as exporter:
            checked = subprocess.run(
                ["promtool", "check", "config", str(config)], capture_output=True, text=True, check=False
            )
            assert checked.returncode == 0, checked.stdout + checked.stderr
            exporter.measurement(measurement(20))
            found = wait_for(lambda: server.query("dist_train_rank_busy_seconds"), "the run is scraped")
            series = {tuple(sorted(labels.items())): value for labels, value in found}
            assert len(series) == 2
            [step] = server.query("dist_train_step")
            labels = dict(step[0])
            labels.pop("instance")
            assert labels == {
                "__name__": "dist_train_step",
                "job": "dist_train",
                "run": "demo",
                "run_id": "0123456789abcdef",
                "slurm_job": "4711",
                "node": "node1",
                "rank": "0",
            }
            with pytest.raises(OSError, match=r"reset|closed|disconnected"):
                urllib.request.urlopen(f"http://{step[0]['instance']}/metrics", timeout=PATIENCE)
            with pytest.raises(urllib.error.URLError, match="self-signed"):
                urllib.request.urlopen(
                    f"https://{step[0]['instance']}/metrics", timeout=PATIENCE, context=ssl.create_default_context()
                )
        # Prometheus learns the outcome from the target file, without a scrape of the ended run.
        [(ended, _)] = wait_for(lambda: server.query("up{outcome!=''} == 0"), "the target says how the run ended")
        assert (ended["outcome"], ended["run_id"]) == ("finished", labels["run_id"])
        assert ended["instance"] == step[0]["instance"]
        # The run waited for a scrape of its last values.
        finished = server.query('last_over_time(dist_train_state{state="finished"}[1m])')
        assert [value for _, value in finished] == [1]


@pytest.mark.skipif(shutil.which("prometheus-pushgateway") is None, reason="prometheus-pushgateway is not installed")
def test_pushgateway_has_the_last_values_of_a_short_run(tmp_path: Path) -> None:
    with pushgateway(tmp_path) as url:
        for rank in (0, 1):
            facts = replace(FACTS, name="short/run", rank=rank)
            with serving(facts, pushgateway=url) as exporter:
                exporter.record(train(20))
                exporter.measurement(measurement(20))
        page = fetch(f"{url}/metrics")
    lines = page.splitlines()
    states = [line for line in lines if line.startswith("dist_train_state{") and 'state="finished"' in line]
    assert states == [
        'dist_train_state{instance="",job="dist_train",run="short/run",run_id="0123456789abcdef",state="finished"} 1'
    ]
    busy = [line for line in lines if line.startswith("dist_train_rank_busy_seconds{")]
    assert len(busy) == 2
    failed = [line for line in lines if line.startswith("push_failure_time_seconds{")]
    assert len(failed) == 2
    assert all(line.endswith(" 0") for line in failed)


@pytest.mark.skipif(shutil.which("prometheus-pushgateway") is None, reason="prometheus-pushgateway is not installed")
def test_pushgateway_has_no_values_of_a_run_at_work(tmp_path: Path) -> None:
    def state(url: str) -> list[str]:
        lines = [line for line in fetch(f"{url}/metrics").splitlines() if line.startswith("dist_train_state{")]
        return [line.partition('state="')[2].partition('"')[0] for line in lines if line.endswith(" 1")]

    facts = replace(FACTS, name="short/run", rank=0)
    with pushgateway(tmp_path) as url:
        with serving(facts, STOPPED, pushgateway=url):
            pass
        assert state(url) == ["stopped"]
        with serving(facts, OUTCOME, pushgateway=url):
            wait_for(lambda: not state(url), "the values of the earlier launch are deleted")
        assert state(url) == ["finished"]
