"""Promise 7: a signal only sets a flag."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import Mock

import pytest

from dist_train.outcome import UsageError
from dist_train.training.stopping import StopRequests
from tests.raising import raises

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP])
def test_promise_7_a_signal_sets_the_flag_and_nothing_else(number: signal.Signals) -> None:
    with StopRequests() as stop:
        assert not stop.requested()
        signal.raise_signal(number)
        assert stop.requested()
        stop.request("time limit")
        assert stop.reason == number.name, "what came first"


def test_signals_other_than_a_second_interrupt_may_come_again() -> None:
    with StopRequests() as stop:
        for _ in range(3):
            signal.raise_signal(signal.SIGTERM)
        assert stop.requested()


def test_the_first_interrupt_is_answered_at_once_and_a_second_ends_the_process(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with StopRequests() as stop:
        signal.raise_signal(signal.SIGTERM)
        assert capsys.readouterr().err == "", "of which no person waits for the answer"
        signal.raise_signal(signal.SIGINT)
        assert capsys.readouterr().err.count("Ctrl-C again") == 1
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert stop.requested()


@pytest.mark.parametrize(
    "error", [RuntimeError("reentrant call"), OSError("the terminal is gone"), ValueError("it is closed")]
)
def test_an_interrupt_that_cannot_be_answered_is_obeyed(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if it interrupted a write to the same stream."""
    monkeypatch.setattr(sys, "stderr", Mock(write=Mock(side_effect=error)))
    with StopRequests() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.requested()


def test_training_outside_the_main_thread_is_refused() -> None:
    def enter() -> None:
        with StopRequests():
            pass

    with ThreadPoolExecutor(1) as pool, raises(UsageError, "not-the-main-thread"):
        pool.submit(enter).result()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_signal_that_is_ignored_already_stays_so(number: signal.Signals) -> None:
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with StopRequests() as stop:
            signal.raise_signal(number)
            assert not stop.requested()
        assert signal.getsignal(number) == signal.SIG_IGN
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGHUP])
def test_requested_stop_signal_is_obeyed_even_if_it_was_ignored(number: signal.Signals) -> None:
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with StopRequests(number.name) as stop:
            signal.raise_signal(number)
            assert stop.reason == number.name
    finally:
        signal.signal(number, before)


def test_the_signals_are_given_back_also_when_an_error_passes() -> None:
    numbers = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]

    def broken_off() -> None:
        with StopRequests():
            assert [signal.getsignal(number) for number in numbers] != before
            signal.raise_signal(signal.SIGINT)
            raise ValueError("passes")

    with pytest.raises(ValueError, match="passes"):
        broken_off()
    assert [signal.getsignal(number) for number in numbers] == before


def test_a_signal_that_a_library_in_c_handled_before_python_began_gets_its_default_back(tmp_path: Path) -> None:
    """As a profiler does that is loaded by LD_PRELOAD: Python does not know its handler."""
    source, made = tmp_path / "early.c", tmp_path / "early.so"
    source.write_text("""
        #include <signal.h>
        static void note(int number) { (void) number; }
        __attribute__((constructor)) static void begin(void) { signal(SIGUSR2, note); }
    """)
    if not shutil.which("gcc"):
        pytest.skip("needs gcc")
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", str(made), str(source)], check=True)
    script = """
        import signal, sys, types
        # in place of the module that imports torch
        sys.modules["dist_train.checkpoint.state"] = types.SimpleNamespace(Progress=None)
        from dist_train.training.stopping import StopRequests
        with StopRequests() as stop:
            signal.raise_signal(signal.SIGUSR2)
        assert stop.reason == "SIGUSR2"
        assert signal.getsignal(signal.SIGUSR2) == signal.SIG_DFL
    """
    environment = {**os.environ, "LD_PRELOAD": str(made)}
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], cwd=ROOT, env=environment, check=True)
