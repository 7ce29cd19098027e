"""docker/Dockerfile built for CUDA, as far as can be tested without a GPU."""

from __future__ import annotations

import pytest

from tests.containers.engine import Engine

pytestmark = [pytest.mark.services, pytest.mark.lengthy, pytest.mark.timeout(3600)]

BUILT = "import torch, horovod.torch as hvd; print(torch.version.cuda is not None, hvd.nccl_built() > 0)"


def test_horovod_has_nccl(engine: Engine, cuda_image: str) -> None:
    assert engine.run(cuda_image, "-c", BUILT, options=["--entrypoint=python3"]).stdout.split() == ["True", "True"]


def test_doctor_reports_that_there_is_no_gpu(engine: Engine, cuda_image: str) -> None:
    doctor = engine.run(cuda_image, "doctor").stdout
    assert "no GPU" in doctor
    assert "NCCL" in doctor
