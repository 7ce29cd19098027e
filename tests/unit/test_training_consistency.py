"""Ranks of other code, settings or data than the rest are named, with what differs, before the first step."""

from __future__ import annotations

import sys
from pathlib import Path
from unittest.mock import Mock

import pytest

from dist_train.cluster.communicator import Communicator
from dist_train.config import parse_config
from dist_train.config.plugins import plugin_files
from dist_train.kernels import operators
from dist_train.outcome import PeerFailedError, UsageError
from dist_train.training import consistency
from dist_train.training.consistency import (
    check_consistent_across_ranks,
    check_same_data,
    code_listing,
    settings_listing,
)
from tests.unit.simulated_ranks import SimulatedRanks, on_ranks, results

CONFIG = parse_config({}, source="test")
OTHER = parse_config({"optimizer": {"learning_rate": 0.7}}, source="test")


def told(ended: list[Exception | None], code: str) -> str:
    """Return what the one rank that knows says, under this code; the others must know that it failed."""
    own = [error for error in ended if isinstance(error, UsageError) and not isinstance(error, PeerFailedError)]
    assert len(own) == 1, ended
    assert sum(isinstance(error, PeerFailedError) for error in ended) == len(ended) - 1
    assert own[0].code == code
    return str(own[0])


def test_equal_ranks_go_on() -> None:
    assert results(3, lambda comm: check_consistent_across_ranks(comm, CONFIG)) == [None] * 3


@pytest.mark.parametrize("odd", [0, 1, 2])
def test_another_setting_is_named_with_both_values_and_the_rank(odd: int) -> None:
    ended = on_ranks(3, lambda comm: check_consistent_across_ranks(comm, OTHER if comm.rank == odd else CONFIG))
    message = told(ended, "ranks-differ-in-settings")
    assert f"rank {odd} of" in message
    assert "optimizer.learning_rate (" in message
    assert "0.7 on rank" in message


def test_of_two_ranks_the_one_that_is_not_rank_0_is_named() -> None:
    ended = on_ranks(2, lambda comm: check_consistent_across_ranks(comm, OTHER if comm.rank == 0 else CONFIG))
    message = told(ended, "ranks-differ-in-settings")
    assert "rank 1 of" in message
    assert "0.7 on rank 0" in message


def test_another_source_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "package"
    (package / "inner").mkdir(parents=True)
    (package / "inner" / "module.py").write_text("x = 1\n")
    before = code_listing(package)
    (package / "inner" / "module.py").write_text("x = 2\n")
    listings = [before, before, code_listing(package)]

    def check(comm: SimulatedRanks) -> None:
        consistency._compare(comm, "code", listings[comm.rank], "Install the same on all nodes")

    message = told(on_ranks(3, check), "ranks-differ-in-code")
    assert "rank 2 of" in message
    assert "package/inner/module.py (" in message


def test_the_code_is_every_source_file_and_what_computes() -> None:
    listing = code_listing()
    files = {"dist_train/training/step.py", "dist_train/cluster/communicator.py"}
    assert {*files, "torch", "torchvision", "timm", "numpy", "Python"} <= set(listing)


def test_a_link_to_nowhere_by_which_an_editor_marks_a_file_is_no_source_file(tmp_path: Path) -> None:
    (tmp_path / "step.py").touch()
    before = code_listing(tmp_path)
    (tmp_path / ".#step.py").symlink_to("user@node.4711:1700000000")
    assert code_listing(tmp_path) == before


def test_a_script_beside_a_plug_in_is_no_part_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text("import beside_mine\n\n\ndef model(): ...\n")
    (tmp_path / "beside_mine.py").touch()
    (tmp_path / "script.py").touch()
    monkeypatch.setattr(sys.modules["__main__"], "__file__", str(tmp_path / "script.py"), raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    files = plugin_files({"model": {"name": f"{tmp_path}/mine.py:model"}})
    assert list(files) == [f"{tmp_path.name}/beside_mine.py", f"{tmp_path.name}/mine.py"]


def test_the_files_of_plug_ins_are_part_of_the_code(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def model(images, width, norm): ...\n")
    config = parse_config({"model": {"name": f"{tmp_path}/mine.py:model"}}, source="test")
    assert f"{tmp_path.name}/mine.py" in consistency.code_of(config)


def test_other_code_of_a_plug_in_is_named_before_the_settings_that_name_it(tmp_path: Path) -> None:
    configs = []
    for rank in range(2):
        file = tmp_path / f"node-{rank}" / "own" / "mine.py"
        file.parent.mkdir(parents=True)
        file.write_text(f"def model(images, width, norm): ...  # {rank}\n")
        configs.append(parse_config({"model": {"name": f"{file}:model"}}, source="test"))
    ended = on_ranks(2, lambda comm: check_consistent_across_ranks(comm, configs[comm.rank]))
    assert "own/mine.py (" in told(ended, "ranks-differ-in-code")


def test_an_environment_beside_a_plug_in_is_no_part_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = tmp_path / ".venv" / "lib" / "python3" / "site-packages"
    installed.mkdir(parents=True)
    (installed / "installed_beside_mine.py").touch()
    (tmp_path / "mine.py").write_text("import installed_beside_mine\n\n\ndef model(): ...\n")
    monkeypatch.syspath_prepend(str(installed))
    assert list(plugin_files({"model": {"name": f"{tmp_path}/mine.py:model"}})) == [f"{tmp_path.name}/mine.py"]


def test_the_kernels_of_the_device_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(consistency, "has_cpu_kernels", lambda: False)
    assert consistency.code_of(CONFIG)["CPU kernels"] == "none"
    assert "Triton" not in consistency.code_of(CONFIG)
    monkeypatch.setattr(consistency, "device_type", lambda asked: "cuda")
    monkeypatch.setattr(operators, "has_triton", lambda: False)
    assert consistency.code_of(CONFIG)["Triton"] == "none"
    monkeypatch.setattr(operators, "has_triton", lambda: True)
    monkeypatch.setitem(sys.modules, "triton", Mock(__version__="3.9.0+git1"))  # of a distribution of any name
    assert consistency.code_of(CONFIG)["Triton"] == "3.9.0+git1"


def test_every_setting_counts() -> None:
    listing = settings_listing(CONFIG)
    assert {"noise.schedule.kind", "run.seed", "comm.timeout"} <= set(listing)
    changed = {name for name, value in settings_listing(OTHER).items() if listing[name] != value}
    assert changed == {"optimizer.learning_rate"}


def test_other_data_are_named() -> None:
    def check(comm: SimulatedRanks) -> None:
        check_same_data(comm, "other" if comm.rank == 1 else "same", "fashion-mnist")

    message = told(on_ranks(3, check), "ranks-differ-in-data")
    assert "fashion-mnist (other on rank 1, same on rank 0)" in message


def test_a_rank_that_joins_does_not_compare_its_data_with_those_that_it_has_not_met() -> None:
    comm = Communicator()  # which cannot reach anybody
    comm.rank, comm.size, comm.is_joining = 1, 2, True
    check_same_data(comm, "same", "fashion-mnist")
