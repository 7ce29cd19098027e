"""Every command that the README and the documentation show works, as it stands there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.launching import environment, small_settings
from tests.waiting import PATIENCE

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in ("configuration", "watching", "monitoring"))]

NEEDS_MORE = ("docker ", "DIST_TRAIN_TARGETS=", "pip ", "tensorboard ", "curl ")
"""Commands that need a Docker daemon, a package index, or a server that is up meanwhile."""

pytestmark = pytest.mark.ranks


def commands(page: Path) -> list[str]:
    blocks = re.findall(r"^```sh\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]
    return [line.split(" #")[0].strip() for line in lines]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like the checkout, but that its demo is a run of a second, also where the package's own is named."""
    folder = tmp_path_factory.mktemp("checkout")
    (folder / "configs").mkdir()
    settings = small_settings(run={"name": "demo", "epochs": 1})
    (folder / "configs" / "demo.yaml").write_text(yaml.safe_dump(settings))
    (folder / "launch").symlink_to(ROOT / "launch")
    return folder


@pytest.mark.parametrize(
    "command",
    # each once, where it stands first
    list(
        dict.fromkeys(
            command
            for page in PAGES
            for command in commands(page)
            if not re.match(r"(\w+=\S+ )*make ", command) and not command.startswith(NEEDS_MORE)
        )
    ),
)
def test_a_documented_command_works(folder: Path, command: str) -> None:
    program = Path(sys.executable).parent / "dist-train"
    assert program.exists()
    ended = subprocess.run(
        ["bash", "-c", command.replace("/shared/", f"{folder}/shared/").replace("dist_train:configs/", "configs/")],
        cwd=folder,
        env=environment(DIST_TRAIN_PYTHON=sys.executable, HOME=str(folder)),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr


@pytest.mark.parametrize("command", [line for page in PAGES for line in commands(page) if line.startswith("make ")])
def test_a_documented_target_is_there(command: str) -> None:
    planned = subprocess.run(
        [*command.split(), "--dry-run"], cwd=ROOT, env=os.environ, capture_output=True, text=True, check=False
    )
    assert planned.returncode == 0, planned.stderr
