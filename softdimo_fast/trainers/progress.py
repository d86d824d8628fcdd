"""How far a run is: one bar with the time left on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol, TextIO


class Progress(Protocol):
    """What the training loop tells of its steps."""

    def update(self, step: int, **text: object) -> None:
        """``step`` steps are done; ``text`` stands behind (floats in four digits), until it is given anew."""

    def close(self) -> None:
        """The end, reached or not."""


class NoProgress:
    """Says nothing."""

    def update(self, step: int, **text: object) -> None:
        pass

    def close(self) -> None:
        pass


class TerminalProgress:
    """A tqdm bar where ``stream`` is a terminal, else lines, one per tenth of the run or per 15 seconds.

        teacher: 300/600 steps (50 %), 12.3 steps/s, 0:24 left, loss 0.5312

    A stream that cannot be written any more (a closed pipe) ends the display, not the run.
    """

    def __init__(
        self,
        total: int,
        label: str,
        *,
        first: int = 0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Args:
        total: steps of the run.
        label: what runs.
        first: the step it starts from, above 0 when resumed; rates count from there.
        stream: ``sys.stderr`` by default.
        clock: seconds.
        """
        self._stream = stream if stream is not None else sys.stderr
        self._total, self._label, self._first, self._clock = total, label, first, clock
        self._step, self._text, self._closed = first, "", False
        self._start = self._last_time = clock()
        self._last_tenth = 10 * first // max(total, 1)
        self._bar = self._make_bar() if self._stream.isatty() else None

    def update(self, step: int, **text: object) -> None:
        """See ``Progress.update``."""
        self._step = step
        if text:
            self._text = ", ".join(f"{name} {_short(value)}" for name, value in text.items())
        with suppress(OSError, ValueError):
            if self._bar is not None:
                self._bar.set_postfix_str(self._text, refresh=False)
                self._bar.update(step - self._bar.n)
            elif self._is_due(step):
                self._print(self._line())

    def close(self) -> None:
        """Ends the bar, or prints a last line. Closing again does nothing."""
        if self._closed:
            return
        self._closed = True
        with suppress(OSError, ValueError):
            if self._bar is not None:
                # The last state is drawn above the other bars; it must not stay where it stood among them.
                self._bar.clear()
                self._bar.close()
            else:
                end = (
                    "done"
                    if self._step >= self._total
                    else f"stopped at {self._step}/{self._total}"
                )
                seconds = self._clock() - self._start
                text = f", {self._text}" if self._text else ""
                self._print(f"{self._label}: {end} after {_duration(seconds)}{text}")

    def _make_bar(self) -> Any:
        from tqdm import tqdm  # type: ignore[import-untyped,unused-ignore]

        # Some terminals do not know their width (0); tqdm would then show nothing.
        known = False
        with suppress(OSError, ValueError):
            known = os.get_terminal_size(self._stream.fileno()).columns > 0
        return tqdm(
            total=self._total, initial=self._first, desc=self._label, file=self._stream,
            unit=" steps", mininterval=0.1, dynamic_ncols=known, ncols=None if known else 80,
        )  # fmt: skip

    def _is_due(self, step: int) -> bool:
        now, tenth = self._clock(), 10 * step // max(self._total, 1)
        if tenth <= self._last_tenth and now - self._last_time < 15:
            return False
        self._last_time, self._last_tenth = now, max(tenth, self._last_tenth)
        return step < self._total  # the last line is that of close()

    def _line(self) -> str:
        done, seconds = self._step - self._first, self._clock() - self._start
        share = 100 * self._step // max(self._total, 1)
        parts = [f"{self._label}: {self._step}/{self._total} steps ({share} %)"]
        if done > 0 and seconds > 0:
            left = (self._total - self._step) * seconds / done
            parts += [_rate(done / seconds), f"{_duration(left)} left"]
        return ", ".join([*parts, self._text] if self._text else parts)

    def _print(self, line: str) -> None:
        print(line, file=self._stream, flush=True)


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _rate(per_second: float) -> str:
    return f"{per_second:.1f} steps/s" if per_second >= 1 else f"{1 / per_second:.1f} s/step"


def _duration(seconds: float) -> str:
    """ "0:24", "12:05" or "1:02:03"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
