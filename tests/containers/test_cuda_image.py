"""docker/Dockerfile built for CUDA, as far as can be tested without a GPU."""

from __future__ import annotations

import pytest

from tests.containers.engine import Engine

pytestmark = [pytest.mark.services, pytest.mark.lengthy, pytest.mark.timeout(3600)]

WHY_NO_TRITON = "from dist_train.kernels.operators import why_no_triton; print(why_no_triton())"
BUILT = "import torch, horovod.torch as hvd; print(torch.version.cuda is not None, hvd.nccl_built() > 0)"


def test_horovod_has_nccl(engine: Engine, cuda_image: str) -> None:
    assert engine.run(cuda_image, "-c", BUILT, options=["--entrypoint=python3"]).stdout.split() == ["True", "True"]


def test_triton_has_the_compiler_and_the_headers_that_it_needs(engine: Engine, cuda_image: str) -> None:
    assert not engine.run(cuda_image, "-c", WHY_NO_TRITON, options=["--entrypoint=python3"]).stdout.strip()
    program = "echo '#include <stdlib.h>' | gcc -x c -shared -fPIC -o /tmp/built.so -"
    engine.run(cuda_image, "-c", program, options=["--entrypoint=bash"])


def test_doctor_reports_that_there_is_no_gpu(engine: Engine, cuda_image: str) -> None:
    doctor = engine.run(cuda_image, "doctor").stdout
    assert "no GPU" in doctor
    assert "NCCL" in doctor
