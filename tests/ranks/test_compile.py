"""`precision.compile`: the compiled graph uses the perturbed weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from dist_train.outcome import ExitCode
from tests.launching import launch, records, small_settings, write_config
from tests.waiting import PATIENCE

pytestmark = pytest.mark.ranks


@pytest.mark.lengthy
@pytest.mark.timeout(12 * PATIENCE)
def test_compiled_run_with_noise_has_the_losses_of_an_eager_one(tmp_path: Path) -> None:
    losses = {}
    for name, overrides in (
        ("eager", ()),
        ("compiled", ("precision.compile=true",)),
        ("without noise", ("noise.method=none",)),
    ):
        settings = small_settings(
            run={"max_steps": 3},
            batch={"global_size": 96},
            noise={"amplitude": 0.2, "sharing": "micro_batch"},
        )
        config = write_config(tmp_path, settings)
        arguments = ("train", config, *overrides, "--run-dir", str(tmp_path / name))
        # On a busy machine the C++ compiler alone takes minutes.
        ended = launch(1, "alone", *arguments, timeout=4 * PATIENCE)
        assert ended.code == ExitCode.FINISHED, ended.output
        losses[name] = [record["loss"] for record in records(tmp_path / name, "train")]
    assert losses["compiled"] == pytest.approx(losses["eager"], rel=1e-3)
    assert losses["without noise"] != pytest.approx(losses["eager"], rel=1e-2)
