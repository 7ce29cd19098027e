"""Twenty recorded losses of a small float32 run."""

from __future__ import annotations

import json

import pytest

from dist_train.kernels.operators import has_cpu_kernels
from tests.golden.regenerate import LOSSES, golden_losses


@pytest.mark.skipif(not has_cpu_kernels(), reason="recorded with the compiled kernels, which make setup builds")
def test_losses_are_those_recorded() -> None:
    # Other processors may round differently; a change of the computation shows in the third digit at the latest.
    assert golden_losses() == pytest.approx(json.loads(LOSSES.read_text()), rel=1e-3)
