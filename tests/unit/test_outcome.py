"""Exit codes: the numbers that scripts rely on, and the errors that lead to them."""

from __future__ import annotations

import pytest

from dist_train.checkpoint.files import DamagedCheckpointError
from dist_train.cluster.communicator import PeerFailedError, RankLostError
from dist_train.outcome import (
    DisagreementError,
    DivergedError,
    ExitCode,
    FaultError,
    StoppedError,
    UsageError,
    exit_code_of,
)


def test_the_numbers_are_the_documented_ones() -> None:
    assert {code.name: int(code) for code in ExitCode} == {
        "FINISHED": 0,
        "FAULT": 1,
        "USAGE": 2,
        "DIVERGED": 3,
        "DISAGREEMENT": 4,
        "STOPPED": 75,
    }


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UsageError("x"), 2),
        (DamagedCheckpointError("x"), 2),
        (PeerFailedError("x"), 2),
        (DivergedError("x"), 3),
        (DisagreementError("x"), 4),
        (StoppedError("x"), 75),
        (FaultError("x"), 1),
        (RankLostError("x"), 1),
        (OSError("x"), 1),
        (ValueError("x"), 1),
    ],
)
def test_each_error_leads_to_its_code(error: Exception, code: int) -> None:
    assert exit_code_of(error) == code
