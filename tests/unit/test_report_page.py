"""What a report says of where its runs come from: the versions that they ran with, as they recorded them."""

from __future__ import annotations

import html
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

from dist_train.report.chart import Frame
from dist_train.report.figures import figures_of_run
from dist_train.report.page import render, tables_in_markdown, versions
from dist_train.report.stored_run import StoredRun, Subject, read_run, read_subject
from dist_train.watch.figure import Chart
from tests.unit.records import evaluation, train, write_records
from tests.unit.report_study import make_run, make_study, treatments, write_status

RECORDED = {"dist_train": "0.0.9 (abc1234)", "Python": "3.9.1", "torch": "1.2.3+cu99", "device": "Abacus & Sons"}


def run_with(folder: Path, environment: Mapping[str, str], name: str = "run") -> StoredRun:
    directory = folder / name
    directory.mkdir()
    write_status(directory, "finished", 7, environment=environment)
    return read_run(directory, name)


def test_versions_are_those_that_the_run_recorded(tmp_path: Path) -> None:
    assert versions([run_with(tmp_path, RECORDED)]) == tuple(RECORDED.items())


def test_where_runs_differ_it_is_said_how_many_had_which(tmp_path: Path) -> None:
    runs = [
        run_with(tmp_path, {**RECORDED, "torch": torch_version} if torch_version else {}, f"run-{number}")
        for number, torch_version in enumerate(["1.2.3", "1.2.4", "1.2.4", ""])
    ]
    told = dict(versions(runs))
    assert told["torch"] == "runs differ: 1.2.4 (2), 1.2.3 (1), not recorded (1)"
    assert dict(versions(runs[:3]))["Python"] == "3.9.1"


def test_runs_that_recorded_none_say_so(tmp_path: Path) -> None:
    directory = tmp_path / "old"
    directory.mkdir()
    write_status(directory, "finished", 7)
    fields = json.loads((directory / "status.json").read_text())
    del fields["environment"]
    (directory / "status.json").write_text(json.dumps(fields))
    assert versions([read_run(directory, "old")]) == (("versions", "not recorded"),)


def test_runs_that_have_not_begun_count_for_nothing(tmp_path: Path) -> None:
    missing = read_run(tmp_path / "missing", "missing")
    assert versions([missing]) == ()
    assert versions([run_with(tmp_path, RECORDED), missing]) == tuple(RECORDED.items())


def test_the_page_shows_the_runs_versions_and_none_of_this_machine_s(tmp_path: Path) -> None:
    treatment = treatments()[0]
    directory = make_run(tmp_path / "run", treatment, 0, dict(treatment.settings))
    write_status(directory, "finished", 200, environment=RECORDED)
    page = render(read_subject(directory))
    assert "<div><dt>torch</dt><dd>1.2.3+cu99</dd></div>" in page
    assert "<div><dt>device</dt><dd>Abacus &amp; Sons</dd></div>" in page
    for version in (torch.__version__, np.__version__):
        assert version not in page


def test_the_page_of_a_run_has_the_settings_of_its_sharpness(tmp_path: Path) -> None:
    treatment = treatments()[0]
    directory = make_run(tmp_path / "run", treatment, 0, dict(treatment.settings))
    [settings] = re.findall("Sharpness: (.*)\\.</p>", html.unescape(render(read_subject(directory))))
    assert {"samples: 2000", 'statistics: "checkpoint"'} <= set(settings.split("; "))


def test_the_tables_have_the_settings_of_the_sharpness_once(tmp_path: Path) -> None:
    tables = tables_in_markdown(read_subject(make_study(tmp_path / "study", (0, 1))))
    [settings] = re.findall(r"^Sharpness: (.*)\.$", tables, re.MULTILINE)
    assert {"samples: 2000", 'statistics: "checkpoint"'} <= set(settings.split("; "))


def test_the_command_that_repeats_a_run_is_one_command_whatever_its_files_say(tmp_path: Path) -> None:
    directory = make_run(tmp_path / "my run", treatment := treatments()[0], 0, dict(treatment.settings))
    (directory / "config.yaml").write_text("run: {name: 'x; touch pwned #'}\n")
    command = f"<code>dist-train train '{directory}/config.yaml' 'run.name=x; touch pwned #-again' run.resume=never<"
    assert command in html.unescape(render(read_subject(directory)))


def test_the_command_that_repeats_a_run_begins_where_the_run_began(tmp_path: Path) -> None:
    treatment = treatments()[0]
    directory = make_run(tmp_path / "run", treatment, 0, {**treatment.settings, "run.resume": "runs/first@32"})
    page = render(read_subject(directory))
    assert f"<code>dist-train train {directory}/config.yaml run.name=run-again</code>" in page


def test_stored_titles_of_several_lines_give_the_same_tables(tmp_path: Path) -> None:
    study = make_study(tmp_path / "study", seeds=(0,))
    tables = tables_in_markdown(read_subject(study))
    planned = json.loads((study / "runs.json").read_text())
    broken = [each | {"title": each["title"].replace(", ", ",\n  ") + "\n"} for each in planned]
    (study / "runs.json").write_text(json.dumps(broken))
    assert tables_in_markdown(read_subject(study)) == tables


def test_a_run_s_records_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    treatment = treatments()[0]
    directory = make_run(tmp_path / "run", treatment, 0, dict(treatment.settings))
    opened: list[str] = []
    genuine = os.open

    def counting(path: Path, flags: int, mode: int = 0o777) -> int:
        opened.append(Path(path).name)
        return genuine(path, flags, mode)

    monkeypatch.setattr(os, "open", counting)
    subject: Subject = read_subject(directory)
    render(subject)
    assert len(subject.runs[0].train) == treatment.epochs * treatment.steps_per_epoch
    assert opened.count("metrics.jsonl") == 1


@pytest.mark.parametrize("batch_schedule", [[], [{"epoch": 2, "global_size": 256}]])
def test_the_points_of_updates_name_recorded_ones_for_the_command_that_replays_them(
    tmp_path: Path, batch_schedule: list[dict[str, int]]
) -> None:
    treatment = treatments()[0]
    settings = {**treatment.settings, "batch.schedule": batch_schedule, "batch.micro_size": 64}
    directory = make_run(tmp_path / "my run", treatment, 0, {**settings, "metrics.every_steps": 10})
    records = [train(step) for step in range(10, 100_000, 10)]
    write_records(directory, [*records, evaluation(99_990)])
    subject = read_subject(directory)
    page = html.unescape(render(subject))
    assert f"data-replay=\"dist-train replay '{directory}'@\"" in page
    assert f"<code>dist-train replay '{directory}'@99990</code>" in page
    [loss, *_] = figures_of_run(subject.runs[0])["curves"].rows[0]
    assert isinstance(loss, Chart)
    drawn = {each.series.style: json.loads(each.points) for each in Frame(loss).drawn()}
    steps = [step for *_, step in drawn["batch"]]
    assert len(steps) < len(records)  # means of several updates each
    assert {record.step for record in records} >= set(steps)
    assert steps[-1] == 99_990
    assert [len(point) for point in drawn["test"]] == [4]
