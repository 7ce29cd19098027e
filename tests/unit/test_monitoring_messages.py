"""Messages between a trainer and its exporter: encoded and decoded, over a pair of sockets."""

from __future__ import annotations

import math
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest

from dist_train.config.sections import MetricsSettings
from dist_train.monitoring.prometheus import messages
from dist_train.monitoring.prometheus.exporter import Exporter, ExporterError
from dist_train.monitoring.prometheus.messages import (
    Begin,
    Channel,
    Ending,
    Message,
    Progress,
    Serving,
    ServingPlan,
    Warned,
    decode,
    encode,
    socket_pair,
)
from dist_train.rundir.records import EvaluationRecord, EventRecord, Measurement
from tests.unit.exporting import FACTS, ON_A_DEVICE, OUTCOME, measurement, serving, train

PLAN = ServingPlan(host="::", port=9400, token_file=Path("/etc/token"), last_scrape_seconds=2.5)
MESSAGES: tuple[Message, ...] = (
    Begin(PLAN, FACTS, {"resumed": 2, "checkpoint": 10**12}),
    Begin(ServingPlan("", 0), replace(FACTS, nodes=()), {}),
    Progress(7),
    train(3),
    EvaluationRecord(7, 1.0, "test", 0.5, 0.9, 10_000, 1_700_000_000.25),
    EventRecord(7, "checkpoint", 1.5, {"path": 'a "b"\n\0é', "bytes": 3, "seconds": 0.5, "best": True, "none": None}),
    replace(measurement(3), ranks=()),
    OUTCOME,
    replace(OUTCOME, test_accuracy=0.75, last_checkpoint=Path("runs/demo/checkpoints/step-00000040.pt")),
    Serving("http://node1:9400/metrics", Path("targets/demo.json")),
    Serving("http://node1:9400/metrics", None),
    Warned("metrics port 9400 is in use"),
    Ending(5.0, 2.0),
)


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_a_message_comes_back_as_it_was(message: Message) -> None:
    assert decode(encode(message)) == message


@pytest.mark.parametrize("number", [math.inf, -math.inf, 5e-324, -0.0, 0.1, 1e300])
def test_numbers_come_back_bit_identically(number: float) -> None:
    returned = decode(encode(replace(train(3), loss=number)))
    assert repr(returned) == repr(replace(train(3), loss=number))


def test_a_measurement_comes_back_with_every_rank_and_what_is_not_a_number() -> None:
    sent = measurement(3, ranks=5)
    returned = decode(encode(sent))
    assert isinstance(returned, Measurement)
    assert repr(returned) == repr(sent)
    assert math.isnan(returned.ranks[4].device_bytes)
    assert hash(returned.ranks), "a tuple, as declared"


def test_paths_that_are_no_text_survive() -> None:
    path = Path(os.fsdecode(b"targets/\xff.json"))
    assert decode(encode(Serving("", path))) == Serving("", path)


def test_texts_that_are_not_utf8_are_sent_with_escapes() -> None:
    name = os.fsdecode(b"\xff.pt")
    assert decode(encode(Warned(name))) == Warned("\\udcff.pt")
    event = EventRecord(7, "resumed", 1.5, {"file": name, "step": 3})
    assert decode(encode(event)) == replace(event, details={"file": "\\udcff.pt", "step": 3})


def test_a_value_that_is_not_plain_is_refused_when_it_is_sent() -> None:
    with pytest.raises(TypeError):
        encode(Warned(cast(str, object())))


def envelope(message: Message) -> tuple[int, str, dict[str, Any]]:
    form, name, values = msgspec.msgpack.decode(encode(message))
    return form, name, values


@pytest.mark.parametrize("name", ["RunFacts", "ServingPlan", "Path", "Popen", ""])
def test_a_type_that_is_no_message_is_refused(name: str) -> None:
    form, _, values = envelope(Progress(7))
    with pytest.raises(msgspec.ValidationError):
        decode(msgspec.msgpack.encode((form, name, values)))


def test_a_message_of_another_version_is_refused() -> None:
    form, name, values = envelope(Progress(7))
    with pytest.raises(msgspec.ValidationError):
        decode(msgspec.msgpack.encode((form + 1, name, values)))


@pytest.mark.parametrize("content", [b"", b"\xff", b"\x07", b"\x90", b"\x80", b"\x93\x01\xa1\xff\xc0", b"{}"])
def test_what_is_no_message_is_refused(content: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        decode(content)


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_a_message_that_is_cut_off_is_refused(message: Message) -> None:
    content = encode(message)
    for end in {1, len(content) // 2, len(content) - 1}:
        with pytest.raises(msgspec.DecodeError):
            decode(content[:end])


@pytest.mark.parametrize(
    ("message", "field", "value"),
    [
        (Progress(7), "step", 7.5),
        (Progress(7), "step", True),
        (Progress(7), "step", None),
        (Ending(1.0, 0.0), "seconds", "1"),
        (Ending(1.0, 0.0), "seconds", False),
        (Serving("", None), "target", 5),
        (Warned(""), "text", ["a"]),
        (Begin(PLAN, FACTS, {}), "counts", {"resumed": "2"}),
        (Begin(PLAN, FACTS, {}), "counts", [1]),
        (Begin(PLAN, FACTS, {}), "plan", {"host": "::"}),
        (measurement(3), "ranks", {}),
        (measurement(3), "ranks", [1.0]),
        (EventRecord(1, "signal", 0.0, {}), "details", {"nested": {}}),
    ],
    ids=str,
)
def test_fields_that_are_not_as_declared_are_refused(message: Message, field: str, value: object) -> None:
    form, name, values = envelope(message)
    assert field in values
    with pytest.raises(msgspec.ValidationError):
        decode(msgspec.msgpack.encode((form, name, {**values, field: value})))
    with pytest.raises(msgspec.ValidationError):
        decode(msgspec.msgpack.encode((form, name, {key: each for key, each in values.items() if key != field})))


def test_a_step_of_one_rank_is_written_in_well_under_a_tenth_of_a_millisecond() -> None:
    assert _seconds_to_write(train(3)) + _seconds_to_write(measurement(3, ranks=1)) < 1e-4


def test_a_measurement_of_a_thousand_ranks_is_written_in_milliseconds_and_fits_a_buffer() -> None:
    rank = ON_A_DEVICE._replace(busy_seconds=1 / 3, wait_seconds=1 / 7)
    everybody = replace(measurement(3), ranks=(rank,) * 1024)
    assert _seconds_to_write(everybody) < 0.02
    assert len(encode(everybody)) < 160_000, "a kernel may give a buffer of no more than 400 KB"
    ours, theirs = map(Channel, socket_pair())
    try:
        assert ours.send(everybody)
        assert list(theirs.receive()) == [everybody]
    finally:
        ours.close()
        theirs.close()


def test_a_full_buffer_drops_no_part_of_a_message() -> None:
    ours, theirs = map(Channel, socket_pair())
    try:
        sent = 0
        while ours.send(Warned(f"{sent:0100000}")):
            sent += 1
        received = list(theirs.receive())
        assert received == [Warned(f"{number:0100000}") for number in range(sent)]
        assert sent
        ours.close()
        with pytest.raises(EOFError):
            next(theirs.receive())
    finally:
        theirs.close()


def test_a_process_that_talks_another_way_is_given_up_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(content: bytes) -> Message:
        raise ValueError("not a message")

    monkeypatch.setattr(messages, "decode", refuse)
    exporter = Exporter(MetricsSettings(port=0))
    assert exporter._link is not None
    process = exporter._link.process.pid
    with pytest.raises(ExporterError):
        exporter.begin(FACTS)
    assert exporter._link is None
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)


def test_the_process_runs_its_trainer_s_code_although_another_copy_is_installed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "dist_train").mkdir()
    (tmp_path / "dist_train" / "__init__.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with serving() as exporter:
        assert exporter.address is not None


def _seconds_to_write(message: Message) -> float:
    """Return the least of several tries, in seconds of the processor: the machine may have other work."""

    def seconds() -> float:
        begun = time.thread_time()
        encode(message)
        return time.thread_time() - begun

    return min(seconds() for _ in range(30))
