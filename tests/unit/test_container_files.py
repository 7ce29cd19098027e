"""The files that images are made of, read as text: what cannot be built everywhere at least fits together."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from dist_train.rundir.lock import pid_namespace

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "docker" / "Dockerfile").read_text()
DEFINITION = (ROOT / "docker" / "dist_train.def").read_text()
HEALTHCHECK = ROOT / "docker" / "healthcheck.sh"


def copied() -> set[str]:
    """Return what the Dockerfile copies from the project."""
    lines = re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE, flags=re.MULTILINE)
    return {name for line in lines for name in line.split()}


def test_only_what_is_copied_reaches_the_builder() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in lines
    assert {line.removeprefix("!") for line in lines if line.startswith("!")} == copied()
    assert all((ROOT / name).exists() for name in copied())


def test_horovod_is_built_by_the_script_of_the_set_up() -> None:
    assert "docker/horovod_wheel.sh /opt/venv/bin/python" in DOCKERFILE
    # The recipe is there and nowhere else.
    assert "HOROVOD_WITH" not in DOCKERFILE + DEFINITION
    assert "pip" not in DEFINITION


def test_the_image_that_runs_has_what_triton_builds_with() -> None:
    runtime = DOCKERFILE.rpartition("\nFROM ")[2]
    # gcc only recommends the headers, and nothing recommended is installed
    assert "packages=(gcc libc6-dev)" in runtime.partition("COPY --from=build /opt/venv")[2]


def test_what_is_copied_is_readable_for_every_user() -> None:
    copies, _, rest = DOCKERFILE.rpartition("\nFROM ")[2].partition("\nRUN chmod -R a+rX ")
    targets = re.findall(r"^COPY (?!--from)\S+ (\S+)$", copies, flags=re.MULTILINE)
    assert targets == rest.partition("\n\n")[0].replace("\\", "").split()
    assert "\nCOPY" not in rest


def test_apptainer_takes_the_image_that_the_dockerfile_makes() -> None:
    header = dict(line.split(": ", 1) for line in DEFINITION.splitlines() if re.match(r"(Bootstrap|From): ", line))
    assert header == {"Bootstrap": "docker-archive", "From": "dist-train.tar"}
    assert f"docker save dist-train -o {header['From']}" in DEFINITION
    assert re.findall(r"^%(\w+)", DEFINITION, flags=re.MULTILINE) == ["test", "help"]


def test_compose_trains_with_two_ranks_where_prometheus_looks() -> None:
    services = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())["services"]
    train = services["train"]
    assert train["profiles"] == ["train"]
    assert (ROOT / train["entrypoint"][0]).is_file()
    assert train["command"][:3] == ["-np", "${DIST_TRAIN_RANKS:-2}", "train"]
    (targets,) = [volume for volume in train["volumes"] if volume.endswith(":/targets")]
    source = targets.removesuffix(":/targets")
    assert f"{source}:/etc/prometheus/targets:ro" in services["prometheus"]["volumes"]
    assert "metrics.targets_directory=/targets" in train["command"]


def write_status(runs: Path, state: str, seconds_ago: float, **place: str) -> None:
    folder = runs / "study" / "a_run"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "status.json"
    here = {"host": socket.gethostname(), "pid_namespace": pid_namespace()}
    file.write_text(json.dumps({"state": state, **here, **place}, indent=2))
    os.utime(file, (time.time() - seconds_ago,) * 2)


def health(runs: Path) -> int:
    return subprocess.run(
        [HEALTHCHECK], env={**os.environ, "HEALTH_RUNS": str(runs), "HEALTH_SECONDS": "3"}, check=False
    ).returncode


@pytest.mark.parametrize("state", ["starting", "running", "stopping"])
def test_a_run_without_a_word_for_too_long_is_unwell(tmp_path: Path, state: str) -> None:
    write_status(tmp_path, state, seconds_ago=5)
    assert health(tmp_path) == 1
    write_status(tmp_path, state, seconds_ago=0)
    assert health(tmp_path) == 0


def test_runs_that_are_over_or_of_others_are_no_illness(tmp_path: Path) -> None:
    assert health(tmp_path) == 0
    write_status(tmp_path, "finished", seconds_ago=5)
    assert health(tmp_path) == 0
    for place in ({"host": "elsewhere"}, {"pid_namespace": "pid:[1]"}):
        write_status(tmp_path, "running", seconds_ago=5, **place)
        assert health(tmp_path) == 0


def test_a_run_that_broke_before_the_container_began_is_no_illness(tmp_path: Path) -> None:
    write_status(tmp_path, "running", seconds_ago=1e9)
    assert health(tmp_path) == 0
