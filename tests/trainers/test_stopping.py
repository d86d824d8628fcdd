"""A signal asks for a stop and does no more; a second Ctrl-C interrupts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest

from softdimo_fast.trainers.stopping import SIGNALS, StopRequest


def handlers() -> list[object]:
    return [signal.getsignal(number) for number in SIGNALS]


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_only_sets_the_flag(number: signal.Signals) -> None:
    before = handlers()
    with StopRequest() as stop:
        assert not stop.requested
        assert stop.signal is None
        os.kill(os.getpid(), number)
        assert stop.requested
        assert stop.signal is number
    assert handlers() == before
    assert stop.requested


def test_a_second_interrupt_raises_and_handlers_come_back() -> None:
    before = handlers()
    with pytest.raises(KeyboardInterrupt), StopRequest() as stop:  # noqa: PT012
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.signal is signal.SIGTERM
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("the second SIGINT did not interrupt")
    assert handlers() == before


def test_nested_requests() -> None:
    with StopRequest() as outer:
        with StopRequest() as inner:
            os.kill(os.getpid(), signal.SIGTERM)
        assert inner.requested
        assert not outer.requested
        os.kill(os.getpid(), signal.SIGUSR1)
        assert outer.signal is signal.SIGUSR1


def test_another_thread_leaves_the_handlers_alone() -> None:
    before, seen = handlers(), []

    def run() -> None:
        with StopRequest() as stop:
            seen.append((handlers() == before, stop.requested))
            stop.request()
            seen.append((handlers() == before, stop.requested))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [(True, False), (True, True)]


def test_a_handler_that_python_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    real = signal.signal
    before = handlers()
    monkeypatch.setattr(signal, "signal", lambda *args: real(*args) and None)
    with StopRequest():
        pass
    assert handlers() == [signal.SIG_DFL] * len(SIGNALS)
    monkeypatch.undo()
    for number, handler in zip(SIGNALS, before, strict=True):
        signal.signal(number, handler)  # type: ignore[arg-type]


LOOP = """
import time
from softdimo_fast.trainers.stopping import StopRequest
with StopRequest() as stop:
    print("ready", flush=True)
    while not stop.requested:
        time.sleep(0.01)
    print("saved", stop.signal.name)
"""


@pytest.mark.parametrize("number", SIGNALS)
def test_a_process_ends_in_order(number: signal.Signals) -> None:
    process = subprocess.Popen([sys.executable, "-c", LOOP], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    assert process.communicate(timeout=60)[0] == f"saved {number.name}\n"
    assert process.returncode == 0
