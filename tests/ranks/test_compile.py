"""`precision.compile`: the compiled graph sees the perturbed weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.launching import launch, records, small_settings, write_config

pytestmark = pytest.mark.ranks


@pytest.mark.lengthy
def test_a_compiled_run_has_the_losses_of_a_plain_one_under_noise(tmp_path: Path) -> None:
    losses = {}
    for name, overrides in (
        ("plain", ()),
        ("compiled", ("precision.compile=true",)),
        ("calm", ("noise.method=none",)),
    ):
        settings = small_settings(
            run={"max_steps": 3},
            batch={"global_size": 96},
            noise={"amplitude": 0.2, "sharing": "micro_batch"},
        )
        config = write_config(tmp_path, settings)
        ended = launch(1, "alone", "train", config, *overrides, "--run-dir", str(tmp_path / name))
        assert ended.code == 0, ended.output
        losses[name] = [record["loss"] for record in records(tmp_path / name, "train")]
    assert losses["compiled"] == pytest.approx(losses["plain"], rel=1e-3)
    assert losses["calm"] != pytest.approx(losses["plain"], rel=1e-2)
