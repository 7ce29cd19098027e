"""A study's file: which runs it stands for, and what is said where it is wrong."""

from __future__ import annotations

import json
import re
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from dist_train.cli.main import main, parse
from dist_train.config import ConfigError, load_config
from dist_train.config.loading import with_overrides, write_override
from dist_train.launching.preflight import check_launch, refusals
from dist_train.outcome import UsageError
from dist_train.rundir.paths import RunDirectory
from dist_train.sweep.planned_runs import Plan, analysis_commands, plan_study, write_plan
from tests.raising import raises, raises_problems
from tests.unit.studies import small_plan, write_study

SHIPPED = sorted((Path(__file__).parents[2] / "studies").glob("*.yaml"))

SEEDS_APART = {"a": {"seeds": [0]}, "b": {"seeds": [1], "settings": {"optimizer.momentum": 0.5}}}


@cache
def planned(path: Path) -> Plan:
    """Return the plan of a shipped study, which several tests look at."""
    return plan_study(path)


def faults(folder: Path, **changes: Any) -> list[tuple[str, str]]:
    """Return the path and the code of each."""
    with pytest.raises(ConfigError) as refused:
        small_plan(folder, **changes)
    return [(fault.path, fault.code) for fault in refused.value.problems]


class TestRuns:
    def test_they_are_every_variant_with_every_seed_seed_by_seed(self, tmp_path: Path) -> None:
        plan = small_plan(tmp_path)
        assert [(run.number, run.name, run.variant, run.seed) for run in plan.runs] == [
            (1, "plain-seed-0", "plain", 0),
            (2, "noisy-seed-0", "noisy", 0),
            (3, "plain-seed-1", "plain", 1),
            (4, "noisy-seed-1", "noisy", 1),
        ]
        assert [run.config.run.seed for run in plan.runs] == [0, 0, 1, 1]
        assert [run.config.noise.method for run in plan.runs] == ["none", "smoothout"] * 2
        assert plan.runs[3].directory == tmp_path / "runs" / "small" / "noisy-seed-1"

    def test_an_variant_with_seeds_of_its_own_is_run_with_these_alone(self, tmp_path: Path) -> None:
        variants = {"often": {}, "once": {"seeds": [2], "settings": {"optimizer.momentum": 0.5}}}
        assert [run.name for run in small_plan(tmp_path, variants=variants, seeds=[1, 2]).runs] == [
            "often-seed-1",
            "often-seed-2",
            "once-seed-2",
        ]
        found = faults(tmp_path, variants={**variants, "once": {"seeds": [3]}}, seeds=[1, 2])
        assert found == [("variants.once.seeds", "unknown-seed")]

    def test_an_variant_begins_with_the_settings_of_the_variant_that_it_is_like(self, tmp_path: Path) -> None:
        variants = {
            "first": {"settings": {"model.width": 0.0625, "noise.amplitude": 0.3}},
            "second": {"like": "first", "settings": {"noise.amplitude": 0.2}},
            "third": {"like": "second", "settings": {"optimizer.momentum": 0.5}},
        }
        settings = {"optimizer.momentum": 0.7, "model.width": 0.5}
        configs = [run.config for run in small_plan(tmp_path, variants=variants, settings=settings, seeds=[0]).runs]
        assert [config.noise.amplitude for config in configs] == [0.3, 0.2, 0.2]
        assert [config.model.width for config in configs] == [0.0625] * 3
        assert [config.optimizer.momentum for config in configs] == [0.7, 0.7, 0.5]

    @pytest.mark.parametrize("where", ["like", "grid", "search"])
    def test_what_is_set_later_counts_whether_it_sets_a_part_or_the_whole(self, tmp_path: Path, where: str) -> None:
        own = {"noise.schedule": {"kind": "constant"}, "noise.amplitude": 0.2}
        first = {"settings": {"noise.schedule.kind": "linear", "noise.amplitude": 0.1}}
        listed = {path: [value] for path, value in own.items()}
        changes: dict[str, Any] = {"variants": {"first": first}}
        if where == "like":
            changes["variants"]["second"] = {"like": "first", "settings": own}
        elif where == "grid":
            changes["grid"] = listed
        else:
            space = {path: {"kind": "choice", "values": values} for path, values in listed.items()}
            changes["search"] = {"method": "random", "trials": 1, "space": space}
        run = small_plan(tmp_path, **changes, seeds=[0]).runs[-1]
        assert (run.config.noise.schedule.kind, run.config.noise.amplitude) == ("constant", 0.2)
        assert run.settings == own

    def test_a_grid_is_every_combination_and_each_is_an_variant_of_its_own(self, tmp_path: Path) -> None:
        schedules = [{"kind": "cosine"}, {"kind": "exponential", "final_fraction": 0.5}]
        variants = {"noisy": {"title": "Noise", "grid": {"noise.schedule": schedules}}}
        plan = small_plan(tmp_path, variants=variants, grid={"noise.amplitude": [1e-4, 0.1]}, seeds=[5])
        assert [run.name for run in plan.runs] == [
            "noisy-schedule-cosine-amplitude-0.0001-seed-5",
            "noisy-schedule-cosine-amplitude-0.1-seed-5",
            "noisy-schedule-exponential-final_fraction-0.5-amplitude-0.0001-seed-5",
            "noisy-schedule-exponential-final_fraction-0.5-amplitude-0.1-seed-5",
        ]
        assert plan.runs[0].title == "Noise, schedule cosine, amplitude 0.0001"
        assert len({run.variant for run in plan.runs}) == 4
        assert plan.runs[3].config.noise.schedule.model_dump() == {"kind": "exponential", "final_fraction": 0.5}
        assert plan.runs[3].config.noise.amplitude == 0.1

    def test_what_a_run_records_of_its_variant_is_the_study_s(self, tmp_path: Path) -> None:
        variants = {"a": {"title": "A", "grid": {"noise.amplitude": [0.1]}}, "a-amplitude": {}}
        plan = small_plan(tmp_path, variants=variants, seeds=[0])
        write_plan(plan)
        stored = json.loads((plan.directory / "runs.json").read_text())
        assert [(run["variant"], run["family"], run["has_title"]) for run in stored] == [
            ("a-amplitude-0.1", "a", True),
            ("a-amplitude", "a-amplitude", False),
        ]

    def test_titles_are_one_line(self, tmp_path: Path) -> None:
        variants = {"a": {"title": "A,\n  long\n"}, "b": {"settings": {"optimizer.momentum": 0.5}}}
        contrasts = [{"title": "A\nand B", "variants": ["a"], "against": "b"}]
        plan = small_plan(tmp_path, title="A\nstudy\n", variants=variants, contrasts=contrasts, seeds=[0])
        assert (plan.study.title, plan.runs[0].title, plan.study.contrasts[0].title) == (
            "A study",
            "A, long",
            "A and B",
        )

    def test_a_setting_s_name_may_have_digits(self, tmp_path: Path) -> None:
        [run] = small_plan(tmp_path, variants={"a": {"grid": {"precision.tf32": [True]}}}, seeds=[0]).runs
        assert run.config.precision.tf32

    def test_what_train_is_told_gives_the_planned_configuration(self, tmp_path: Path) -> None:
        variants = {"one": {"settings": {"noise.exclude": ["bias", "a b*"], "noise.schedule": {"kind": "linear"}}}}
        plan = plan_study(write_study(tmp_path, variants=variants), tmp_path / "a 'b'", ["data.synthetic_classes=4"])
        for run in plan.runs:
            assert load_config(plan.base_file, run.overrides) == run.config
            assert run.config.data.synthetic_classes == 4
            assert not any("\n" in word for word in run.overrides)
        assert plan.directory == tmp_path / "a 'b'" / "small"

    def test_the_study_s_folder_says_what_its_runs_are(self, tmp_path: Path) -> None:
        plan = small_plan(tmp_path)
        write_plan(plan)
        assert load_config(plan.directory / "base.yaml") == plan.base
        assert yaml.safe_load((plan.directory / "study.yaml").read_text())["seeds"] == [0, 1]
        last = json.loads((plan.directory / "runs.json").read_text())[-1]
        assert (last["number"], last["name"], last["variant"], last["seed"]) == (4, "noisy-seed-1", "noisy", 1)
        assert last["settings"] == {"noise.amplitude": 0.02}

    def test_the_folder_has_the_long_names_of_plugins(self, tmp_path: Path) -> None:
        (tmp_path / "nets.py").write_text(
            "from torch import nn\nfrom dist_train import register\n\n"
            '@register("models", "short")\n'
            "def network(images, width, norm):\n    return nn.Flatten()\n"
        )
        path = write_study(tmp_path, variants={"a": {"settings": {"model.name": "short"}}})
        base = yaml.safe_load((tmp_path / "base.yaml").read_text())
        (tmp_path / "base.yaml").write_text(yaml.safe_dump({**base, "plugins": ["nets.py"]}))
        plan = plan_study(path)
        write_plan(plan)
        [overrides, *_] = (run["overrides"] for run in json.loads((plan.directory / "runs.json").read_text()))
        assert load_config(plan.directory / "base.yaml", overrides) == plan.runs[0].config

    def test_a_plugin_s_file_is_relative_to_the_study_s(self, tmp_path: Path) -> None:
        names = ("first", "second", "third")
        (tmp_path / "nets.py").write_text("".join(f"def {name}(images, width, norm): ...\n" for name in names))
        settings = {"model.name": "nets.py:first"}
        grid = {"model.name": ["nets.py:second", "nets.py:third"]}
        runs = small_plan(tmp_path, seeds=[0], variants={"a": {"settings": settings}, "b": {"grid": grid}}).runs
        assert [run.config.model.name for run in runs] == [f"{tmp_path}/nets.py:{name}" for name in names]
        assert runs[-1].variant == "b-name-nets.py-third"


class TestFaults:
    def test_all_are_told_at_once_each_with_its_place(self, tmp_path: Path) -> None:
        variants = {
            "plain": {"settings": {"noise.amplitud": 1}},
            "noisy": {"grid": {"noise.amplitude": [0.1, -1]}},
        }
        found = faults(tmp_path, variants=variants, settings={"model.width": "wide"})
        assert found == [
            ("settings.model.width", "wrong-type"),
            ("variants.plain.settings.noise.amplitud", "unknown-key"),
            ("variants.noisy.grid.noise.amplitude", "out-of-range"),
        ]

    def test_a_list_with_a_wrong_item_is_not_called_too_short(self, tmp_path: Path) -> None:
        assert faults(tmp_path, seeds=[-1]) == [("seeds.0", "out-of-range")]

    def test_an_unknown_key_is_named(self, tmp_path: Path) -> None:
        found = faults(tmp_path, seed=[1], variants={"a": {"setings": {}}})
        assert {("seed", "unknown-key"), ("variants.a.setings", "unknown-key")} <= set(found)

    @pytest.mark.parametrize(
        ("changes", "fault"),
        [
            ({"name": "a/b"}, ("name", "wrong-form")),
            ({"variants": {}}, ("variants", "out-of-range")),
            ({"variants": {"a": 3}}, ("variants.a", "wrong-type")),
            ({"variants": 3}, ("variants", "wrong-type")),
            ({"seeds": []}, ("seeds", "out-of-range")),
            ({"seeds": [1, 1]}, ("seeds", "seed-twice")),
            ({"variants": {"a": {"seeds": [1, 1]}}}, ("variants.a.seeds", "seed-twice")),
            ({"analyse": [{"kind": "sharpness", "seeds": [1, 1]}]}, ("analyse.0.seeds", "seed-twice")),
            ({"settings": {"run.seed": 3}}, ("settings.run.seed", "set-by-study")),
            ({"settings": {"noise": {"amplitude": 1}}}, ("settings.noise", "wrong-form")),
            ({"grid": {"noise.amplitude": []}}, ("grid.noise.amplitude", "empty-grid")),
            ({"grid": {"noise.amplitude": 0.1}}, ("grid.noise.amplitude", "wrong-type")),
            ({"variants": {"a": {"like": "b"}, "bb": {}}}, ("variants.a.like", "unknown-variant")),
            ({"variants": {"a": {"like": "b"}, "b": {"like": "a"}}}, ("variants.a.like", "like-itself")),
            ({"variants": {"a": {}, "b": {"settings": {}}}}, ("variants.b", "same-settings")),
            ({"variants": {"a": {"grid": {"noise.exclude": [["x" * 255]]}}}}, ("variants.a", "out-of-range")),
            ({"analyse": [{"kind": "directon"}]}, ("analyse.0.kind", "unknown-kind")),
            ({"analyse": [{"kind": "direction", "variants": ["plian"]}]}, ("analyse.0.variants", "unknown-variant")),
            ({"analyse": [{"kind": "interpolate", "between": ["plain"]}]}, ("analyse.0.between.1", "missing")),
            (
                {"analyse": [{"kind": "interpolate", "between": ["plain", "plain"]}]},
                ("analyse.0.between", "same-checkpoint"),
            ),
            ({"analyse": [{"kind": "sharpness", "seeds": [7]}]}, ("analyse.0.seeds", "unknown-seed")),
            (
                {"contrasts": [{"variants": ["plian"], "against": "plain"}]},
                ("contrasts.0.variants", "unknown-variant"),
            ),
            (
                {"variants": SEEDS_APART, "contrasts": [{"variants": ["a"], "against": "b"}]},
                ("contrasts.0.variants", "no-such-runs"),
            ),
            ({"contrasts": [{"variants": ["plain"], "against": "plain"}]}, ("contrasts.0.variants", "no-such-runs")),
            (
                {"variants": SEEDS_APART, "analyse": [{"kind": "interpolate", "between": ["a", "b"]}]},
                ("analyse.0", "no-such-runs"),
            ),
            (
                {"variants": SEEDS_APART, "analyse": [{"kind": "sharpness", "variants": ["a"], "seeds": [1]}]},
                ("analyse.0", "no-such-runs"),
            ),
            (
                {"grid": {"noise.amplitude": [0.1]}, "contrasts": [{"variants": ["noise"], "against": "plain"}]},
                ("contrasts.0.against", "several-variants"),
            ),
            (
                {"analyse": [{"kind": "plane", "variant": []}]},
                ("analyse.0.variant", "unknown-key"),
            ),
        ],
    )
    def test_each_is_named(self, tmp_path: Path, changes: dict[str, Any], fault: tuple[str, str]) -> None:
        assert fault in faults(tmp_path, **changes)

    def test_a_configuration_is_no_study_with_a_fault_for_each_section(self) -> None:
        with raises_problems(("variants", "missing")):
            plan_study(Path(__file__).parents[2] / "configs" / "demo.yaml")

    @pytest.mark.parametrize(
        ("changes", "allowed"),
        [
            ({"grid": {"noise.amplitude": 0.1}}, "a list"),
            ({"grid": {"lr": [0.1]}}, "the dotted path of a setting, such as optimizer.learning_rate"),
            ({"settings": {"momentun": 0.9}}, "the dotted path of a setting, such as optimizer.momentum"),
            ({"settings": {"noise": {}}}, "the dotted path of a setting, such as noise.amplitude"),
            ({"variants": {"a b": {}}}, "a name of the form ^[A-Za-z0-9][A-Za-z0-9._-]*$"),
            (
                {"analyse": [{"kind": "sharpness", "options": {"keskar_starts": 1}}]},
                "a name of the form ^[a-z][a-z-]*$",
            ),
            (
                {"analyse": [{"kind": "sharpness", "options": {"keskar-starts": {"a": 1}}}]},
                "text or a whole number or a number or true or false or a list",
            ),
        ],
    )
    def test_what_a_key_of_a_mapping_takes_is_told(self, tmp_path: Path, changes: dict[str, Any], allowed: str) -> None:
        with pytest.raises(ConfigError) as refused:
            small_plan(tmp_path, **changes)
        assert [fault.allowed for fault in refused.value.problems] == [allowed]

    @pytest.mark.parametrize("override", ["run.seed=5", "run.name=x", "run.directory=/x", "run.resume=never", "run={}"])
    def test_an_override_of_what_the_study_sets_itself_is_refused(self, tmp_path: Path, override: str) -> None:
        with pytest.raises(ConfigError) as refused:
            plan_study(write_study(tmp_path), overrides=["run.epochs=2", override])
        assert [(fault.path, fault.code) for fault in refused.value.problems] == [
            (override.partition("=")[0], "set-by-study")
        ]

    def test_no_shipped_study_has_the_name_of_a_shipped_configuration_s_run(self) -> None:
        configurations = (Path(__file__).parents[2] / "configs").glob("*.yaml")
        names = {load_config(str(path)).run.name for path in configurations}
        assert names.isdisjoint(yaml.safe_load(path.read_text())["name"] for path in SHIPPED)

    def test_a_study_and_a_run_share_no_folder(self, tmp_path: Path) -> None:
        plan = small_plan(tmp_path)
        run = RunDirectory(plan.directory)
        run.create()
        with raises(UsageError, "folder-is-run"):
            small_plan(tmp_path)
        shutil.rmtree(run.root)
        write_plan(plan)
        with raises(UsageError, "folder-is-study"):
            check_launch(plan.base, run)
        assert [error.code for error in refusals(plan.base, run.root)] == ["folder-is-study"]
        run.create()  # a folder that holds both already: both resume
        check_launch(plan.base, run)
        assert small_plan(tmp_path).runs == plan.runs

    @pytest.mark.parametrize("own", ["study.yaml", "base.yaml"])
    def test_no_file_of_the_user_s_in_the_study_s_folder_is_replaced(self, tmp_path: Path, own: str) -> None:
        study = write_study(tmp_path, name=tmp_path.name)
        with raises(UsageError, "folder-is-source"):
            plan_study(study, tmp_path.parent)
        (tmp_path / "elsewhere").mkdir()
        study = write_study(tmp_path / "elsewhere")
        folder = tmp_path / "elsewhere/runs/small"
        folder.mkdir(parents=True)
        (folder / own).write_text("run: {}\n")
        with raises(UsageError, "folder-foreign-file"):
            plan_study(study)
        (folder / own).unlink()
        write_plan(plan_study(study))
        (folder / "base.yaml").write_text("run: {}\n")  # a plan replaces a former one
        plan_study(study)

    def test_a_base_whose_runs_would_not_resume_is_refused(self, tmp_path: Path) -> None:
        study = write_study(tmp_path, base="never.yaml")
        (tmp_path / "never.yaml").write_text("base: base.yaml\nrun: {resume: never}\n")
        with raises_problems(("run.resume", "set-by-study")):
            plan_study(study)

    def test_what_a_sweep_has_written_can_be_swept(self, tmp_path: Path) -> None:
        plan = small_plan(tmp_path)
        write_plan(plan)
        assert plan_study(plan.directory / "study.yaml").runs == plan.runs

    def test_a_base_above_a_folder_that_is_a_link_is_that_above_its_target(self, tmp_path: Path) -> None:
        studies = tmp_path / "project" / "studies"
        studies.mkdir(parents=True)
        study = write_study(studies, base="../base.yaml")
        base = (studies / "base.yaml").rename(tmp_path / "project" / "base.yaml")
        assert plan_study(study).base_file == base
        (tmp_path / "base.yaml").write_text("run: {epochs: 9}\n")
        (tmp_path / "link").symlink_to(studies)
        plan = plan_study(tmp_path / "link" / study.name)
        assert plan.base_file.samefile(base)
        assert plan.base == load_config(base)

    def test_a_grid_that_would_give_one_name_twice_is_refused(self, tmp_path: Path) -> None:
        found = faults(tmp_path, variants={"a": {"grid": {"noise.exclude": [["x y"], ["x  y"]]}}})
        assert ("variants", "name-twice") in found

    def test_a_section_in_a_variant_is_told_its_place(self, tmp_path: Path) -> None:
        with raises_problems(("variants.a.run", "unknown-key")) as refused:
            plan_study(write_study(tmp_path, variants={"a": {"run": {"epochs": 1}}}))
        assert "write settings: {run.epochs: ...}" in str(refused.value)

    def test_a_base_that_is_not_there_is_named_with_the_study(self, tmp_path: Path) -> None:
        study = write_study(tmp_path, base="bas.yaml")
        with raises_problems(("(file)", "file-missing")) as refused:
            plan_study(study)
        assert str(study) in str(refused.value)

    def test_settings_that_do_not_go_together_are_found_before_anything_starts(self, tmp_path: Path) -> None:
        found = faults(tmp_path, variants={"a": {"settings": {"noise.method": "sam"}}})
        assert ("noise.sharing (variant a)", "sam-sharing") in found


def test_settings_without_effect_are_named_with_their_variant(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    variants = {
        "plain": {"settings": {"noise.method": "none", "optimizer.momentum": 0.5}},
        "quiet": {"settings": {"noise.method": "none", "noise.amplitude": 0.1}},
        "noisy": {"settings": {"noise.method": "smoothout"}},
    }
    settings = {"noise.sharing": "micro_batch", "averaging.every_steps": 2}
    study = str(write_study(tmp_path, variants=variants, settings=settings))
    for command in (["sweep", study, "--list"], ["submit", study, "--study", "--dry-run"]):
        assert main(command) == 0
        found = re.findall(r"variant (\w+): (\S+) has no effect", capsys.readouterr().err)
        # All share noise.sharing, which has an effect in one.
        assert sorted(found) == [
            *((name, "averaging.every_steps") for name in ("noisy", "plain")),
            ("quiet", "averaging.every_steps"),
            ("quiet", "noise.amplitude"),
        ]


@pytest.mark.parametrize(
    ("settings", "is_said"),
    [({}, True), ({"model.norm_statistics": "recomputed"}, False), ({"model.norm": "group"}, False)],
)
def test_norm_statistics_that_differ_between_variants_are_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], settings: dict[str, str], is_said: bool
) -> None:
    study = str(write_study(tmp_path, settings=settings))
    for command in (["sweep", study, "--list"], ["submit", study, "--study", "--dry-run"]):
        assert main(command) == 0
        assert ("set model.norm_statistics for all" in capsys.readouterr().err) == is_said


@pytest.mark.parametrize(
    "value", [1e-05, 0.1, 3, True, None, "cosine", "true", "1e-4", "2020-01-01", "...", [1, "a, b"], {"a": "#"}]
)
def test_an_override_is_read_back_as_it_was(value: object) -> None:
    word = write_override("section.key", value)
    assert with_overrides({}, [word]) == {"section": {"key": value}}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
class TestShipped:
    def test_no_setting_is_without_effect(self, path: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        assert main(["sweep", str(path), "--list", "--directory", str(tmp_path)]) == 0
        assert capsys.readouterr().err == ""

    def test_every_run_is_valid_and_the_documented_number_is_that_of_the_runs(self, path: Path) -> None:
        text = (path.parents[1] / "docs/studies.md").read_text()
        [number] = re.findall(rf"^\| `studies/{path.name}` \| .*?\b(\w+) (?:tiny )?runs\b", text, re.MULTILINE)
        assert len(planned(path).runs) == (6 if number == "six" else int(number))

    def test_what_the_norm_averages_over_is_the_same_in_every_variant(self, path: Path) -> None:
        # but where the norm is what a variant is about
        configs = [run.config for run in planned(path).runs if "ghost" not in run.variant]
        assert len({(config.model.norm, config.model.ghost_size) for config in configs}) == 1
        assert all(config.recomputes_statistics for config in configs)
        assert all(config.batch.micro_size != "auto" for config in configs)


def test_the_paper_s_study_has_the_paper_s_runs() -> None:
    plan = planned(next(path for path in SHIPPED if path.stem == "paper"))
    for size in (128, 8192):
        plain = [run.config for run in plan.runs if run.config.batch.global_size == size]
        amplitudes = {
            config.noise.amplitude
            for config in plain
            if config.noise.method == "smoothout" and config.noise.scale == "absolute"
        }
        assert amplitudes == {0.1, 0.01, 0.001, 0.0001}
        assert sum(config.noise.method == "none" for config in plain) == 3
    assert all((run.config.data.name, run.config.run.epochs) == ("cifar10", 300) for run in plan.runs)
    assert {run.seed for run in plan.runs} == {0, 1, 2}


class TestAnalyses:
    def test_each_finished_run_has_its_commands(self, tmp_path: Path) -> None:
        analyse = [
            {"kind": "interpolate", "between": ["plain", "noisy"]},
            {"kind": "interpolate", "between": ["noisy", "noisy"], "seeds": [1]},
            {"kind": "direction", "variants": ["noisy"], "seeds": [1], "options": {"range": [-2, 2.5], "points": 5}},
            {"kind": "plane", "variants": ["plain"], "options": {"trajectory": True}},
            {"kind": "sharpness", "variants": ["plain"], "options": {"only": ["width", "rise"], "width-rises": [1, 2]}},
        ]
        plan = small_plan(
            tmp_path, variants={"plain": {}, "noisy": {"grid": {"noise.amplitude": [1, 2]}}}, analyse=analyse
        )
        folder = f"{tmp_path}/runs/small/"
        commands = [" ".join(command).replace(folder, "") for command in analysis_commands(plan.study, plan.runs[1:])]
        assert commands == [
            "landscape interpolate plain-seed-1 noisy-amplitude-1-seed-1",
            "landscape interpolate plain-seed-1 noisy-amplitude-2-seed-1",
            "landscape interpolate noisy-amplitude-1-seed-1 noisy-amplitude-2-seed-1",
            "landscape direction noisy-amplitude-1-seed-1 --range -2 2.5 --points 5",
            "landscape direction noisy-amplitude-2-seed-1 --range -2 2.5 --points 5",
            "landscape plane plain-seed-1 --trajectory",
            "sharpness plain-seed-1 --only width,rise --width-rises 1,2",
        ]

    @pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
    def test_the_shipped_ones_are_commands_that_there_are(self, path: Path) -> None:
        plan = planned(path)
        commands = list(analysis_commands(plan.study, plan.runs))
        assert len(commands) >= len(plan.study.analyse)
        for command in commands:
            parse(list(command))
