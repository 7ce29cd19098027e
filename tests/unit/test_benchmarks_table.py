"""The table of `python -m benchmarks`: its ratios, its groups, what it refuses and what it writes down."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import benchmarks.__main__ as program
from benchmarks.groups import GROUPS, Group, groups_on
from benchmarks.machine import this_machine
from benchmarks.record import read_record
from benchmarks.timing import Ratio, compare, ratio_of

ROOT = Path(__file__).parents[2]


def test_a_ratio_is_the_median_of_the_pairs_with_their_quartiles() -> None:
    row = ratio_of("row", "a", "b", [(1.0, 1.0), (2.0, 1.0), (3.0, 1.0)], 2.0, images=10)
    assert (row.lower, row.median, row.upper, row.pairs) == (1.5, 2.0, 2.5, 3)
    assert row.holds
    assert row.images_per_second == 5.0
    assert not ratio_of("row", "a", "b", [(3.0, 1.0)], 2.0).holds
    assert ratio_of("row", "a", "b", [(3.0, 1.0)], None).images_per_second is None


def test_sides_take_turns_after_calls_that_do_not_count() -> None:
    calls: list[str] = []
    row = compare(
        "row", ("a", lambda: calls.append("a")), ("b", lambda: calls.append("b")), pairs=2, bar=None, warm_up=1
    )
    assert "".join(calls) == "ab" + "ab" + "ba"
    assert row.pairs == 2


def test_the_machine_is_told_with_its_versions_and_no_name_of_its_own() -> None:
    machine = this_machine()
    assert machine.versions["torch"] == torch.__version__
    assert machine.memory_bytes > 1 << 28
    assert f"{machine.cores} cores" in machine.in_words()


def one_row(pairs: int) -> list[Ratio]:
    print("hidden: what a run prints")
    return [ratio_of("row", "a", "b", [(float(pairs), 1.0)], 5.0, images=10)]


def test_rows_are_kept_with_machine_and_versions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr(program, "groups_on", lambda device: {"data": Group(one_row)})
    output = tmp_path / "rows.json"
    assert program.main(["--only", "data", "--pairs", "4", "--json", str(output)]) == 0
    assert program.main(["--only", "data", "--pairs", "6"]) == 1
    kept = read_record(output)["data"]
    assert kept.machine.versions["torch"] == torch.__version__
    assert kept.rows[0].median == 4.0
    printed = capsys.readouterr().out
    assert "missed" in printed
    assert "hidden" not in printed


def test_rows_of_a_group_replace_its_last_ones_beside_those_of_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(pairs: int) -> list[Ratio]:
        raise RuntimeError("the machine is gone")

    groups = {"data": Group(one_row), "memory": Group(one_row), "kernels": Group(lost)}
    monkeypatch.setattr(program, "groups_on", lambda device: groups)
    output = tmp_path / "rows.json"
    program.main(["--only", "data", "--only", "memory", "--pairs", "2", "--json", str(output)])
    with pytest.raises(RuntimeError, match="the machine is gone"):
        program.main(["--only", "data", "--only", "kernels", "--pairs", "3", "--json", str(output)])
    assert {name: kept.rows[0].median for name, kept in read_record(output).items()} == {"data": 3.0, "memory": 2.0}


@pytest.mark.parametrize("content", ["rows", "[1]", '{"data": 1}', '{"data": {"machine": {}, "rows": []}}'])
def test_a_file_of_another_kind_is_left_alone(content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "notes.json"
    file.write_text(content)
    assert program.main(["--only", "data", "--json", str(file)]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "name another file" in line
    assert file.read_text() == content


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main(["--device", "cuda"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "no GPU" in line


def test_a_group_for_cpus_alone_is_refused_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert program.main(["--device", "cuda", "--only", "allocator"]) == 2
    assert "--only allocator" in capsys.readouterr().err


def test_every_group_can_be_measured_on_a_cpu_and_those_of_a_step_on_a_gpu() -> None:
    assert groups_on("cpu") == dict(GROUPS)
    assert {"throughput-1", "noise-scale", "kernels", "evaluation"} <= set(groups_on("cuda"))
    assert not {"allocator", "scaling-1", "memory"} & set(groups_on("cuda"))


def test_the_page_names_every_group() -> None:
    page = (ROOT / "docs" / "performance.md").read_text()
    assert [name for name in GROUPS if f"`{name}`" not in page] == []
