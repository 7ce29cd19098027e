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
    escaped,
    exit_code_of,
    printable,
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


def test_a_text_does_nothing_to_a_terminal() -> None:
    text = "\x1b]0;title\x07 \0 \x9b31m \r\n \u202e \udcff"
    assert escaped(text) == r"\x1b]0;title\x07 \x00 \x9b31m \r\n \u202e \udcff"
    assert escaped("Größe 8 µm, 図") == "Größe 8 µm, 図"
    assert printable("one\n  two\x1b[2J") == "one\n  two\\x1b[2J"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("at http://user:pass@host:9091/x", "at http://***@host:9091/x"),
        ("at https://t0ken@host", "at https://***@host"),
        ("at http://user:p/a:ss@host", "at http://***@host"),
        ("at user:pass@host:9091", "at ***@host:9091"),
        ("at https://host/x?token=secret&a=b", "at https://host/x?***"),
        ("rank 0: a@b, http://host:9091", "rank 0: a@b, http://host:9091"),
    ],
)
def test_a_message_shows_no_password(text: str, shown: str) -> None:
    assert printable(text) == shown
