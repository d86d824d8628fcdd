"""Stopping a run between two steps, so that it can save itself."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """While entered, SIGINT (Ctrl-C), SIGTERM and SIGUSR1 only set ``requested``; a second SIGINT interrupts.

        with StopRequest() as stop:
            while not done and not stop.requested:
                step()

    A signal that the process ignores (under nohup, say) stays ignored. The handlers of before are back
    afterwards. Python lets only the main thread handle signals: entered in
    another one, ``request`` is the only way to stop.
    """

    def __init__(self) -> None:
        self._before: dict[signal.Signals, Any] = {}
        self._signal: signal.Signals | None = None
        self._requested = False
        self._interrupted = False

    @property
    def requested(self) -> bool:
        """Whether to stop after the present step."""
        return self._requested

    @property
    def signal(self) -> signal.Signals | None:
        """The first signal that asked for it."""
        return self._signal

    def request(self) -> None:
        """Asks for a stop without a signal."""
        self._requested = True

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            # None stands for a handler that was not set from Python and cannot be set from there.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # No more than flags: the handler may run between any two bytecodes, in the middle of a save too.
        if number == signal.SIGINT and self._interrupted:
            raise KeyboardInterrupt
        self._interrupted = self._interrupted or number == signal.SIGINT
        self._signal = self._signal or signal.Signals(number)
        self._requested = True
