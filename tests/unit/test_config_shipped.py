"""The configurations that are shipped: the paper's pair, and the demonstration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from dist_train.config import Config, load_config
from dist_train.config.combinations import unused_settings
from dist_train.data.plan import BatchPlan
from dist_train.models import build_model

FOLDER = Path(__file__).parents[2] / "configs"
SHIPPED = sorted(FOLDER.glob("*.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_each_loads_and_has_no_idle_setting(path: Path) -> None:
    assert unused_settings(load_config(path)) == {}


@pytest.mark.parametrize(("name", "global_size"), [("sb_128", 128), ("lb_8192", 8192)])
def test_the_paper_s_pair_is_as_the_paper_says(name: str, global_size: int) -> None:
    config = load_config(FOLDER / f"{name}.yaml")
    assert config.batch.global_size == global_size
    assert (config.model.name, config.model.width) == ("vgg9", 1.0)
    assert (config.data.name, config.data.augment, config.data.normalize) == ("cifar10", "none", False)
    assert config.run.epochs == 300
    assert config.schedule.milestones == (150.0, 225.0, 275.0)
    assert (config.noise.method, config.noise.distribution) == ("smoothout", "uniform")
    assert sum(parameter.numel() for parameter in build_model(config).parameters()) == 2_789_706


def test_the_pair_differs_in_the_batch_the_name_and_the_warm_up_alone() -> None:
    small, large = (load_config(FOLDER / f"{name}.yaml").model_dump() for name in ("sb_128", "lb_8192"))
    changed = {
        f"{section}.{key}" for section in small for key in small[section] if small[section][key] != large[section][key]
    }
    assert changed == {"run.name", "batch.global_size", "schedule.warmup_epochs"}


@pytest.mark.parametrize("name", [path.stem for path in SHIPPED if path.stem not in ("base", "paper")])
def test_ghost_norm_has_its_size_on_any_number_of_ranks(name: str) -> None:
    config = load_config(FOLDER / f"{name}.yaml")
    assert isinstance(config.batch.micro_size, int)
    assert config.batch.micro_size >= config.model.ghost_size


def test_the_large_batch_is_the_same_run_on_1_to_64_ranks_none_of_which_is_idle() -> None:
    config = load_config(FOLDER / "lb_8192.yaml")
    assert isinstance(config.batch.micro_size, int)
    assert config.batch.micro_size % config.model.ghost_size == 0
    plan = BatchPlan(config.batch.global_size, config.batch.micro_size)
    assert all(plan.share(rank, 64) for rank in range(64))


def test_the_demonstration_is_a_large_batch_with_noise_on_fashion_mnist() -> None:
    config = load_config(FOLDER / "demo.yaml")
    assert (config.data.name, config.batch.global_size, config.model.width) == ("fashion-mnist", 8192, 0.25)
    assert config.noise.method == "smoothout"
    assert config.noise.amplitude > 0


def test_no_file_repeats_what_its_base_says() -> None:
    for path in SHIPPED:
        own = leaves(path)
        below = leaves(path.parent / own["base"]) if "base" in own else {}
        assert not {name for name, value in own.items() if below.get(name) == value and name != "base"}, path.name


def leaves(path: Path) -> dict[str, Any]:
    """Return what the file itself says, by dotted path."""
    found: dict[str, Any] = {}
    for section, settings in yaml.safe_load(path.read_text()).items():
        if isinstance(settings, dict):
            found |= {f"{section}.{key}": value for key, value in settings.items()}
        else:
            found[section] = settings
    return found


def test_every_setting_has_a_default_and_every_class_of_the_schema_forbids_other_keys() -> None:
    schema = Config.model_json_schema()
    assert "required" not in schema
    assert all(part["additionalProperties"] is False for part in schema["$defs"].values())
    assert schema["$defs"]["RunSettings"]["properties"]["seed"]["description"] == "Seed of all randomness."
