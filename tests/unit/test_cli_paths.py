"""Paths that commands are given: devices and links."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import dist_train
from dist_train.cli.main import main
from dist_train.outcome import ExitCode, UsageError
from tests.raising import raises
from tests.unit.test_cli_commands import write_config

pytestmark = pytest.mark.usefixtures("threads_as_before")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has finished."""
    folder = tmp_path_factory.mktemp("trained")
    config = write_config(folder, run={"max_steps": 1})
    assert main(["train", config, "--run-dir", str(folder / "run")]) == ExitCode.FINISHED
    return folder / "run"


def test_an_export_replaces_no_pipe(trained: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with raises(UsageError, code="output-unwritable"):
        dist_train.export(trained, "safetensors", tmp_path / "pipe")
    assert (tmp_path / "pipe").is_fifo()


def test_an_export_to_a_link_is_written_where_that_leads(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "there")
    assert dist_train.export(trained, "safetensors", tmp_path / "link").path == tmp_path / "link"
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "there").is_file()
