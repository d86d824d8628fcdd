"""How far a run is, and what it costs: nominal seconds, corrected by what was needed so far."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import TextIO

from softdimo_fast.benchmark import settings
from softdimo_fast.benchmark.cases import Case, select_passes
from softdimo_fast.benchmark.shapes import SHAPES
from softdimo_fast.benchmark.worker import budget

# Seconds on two cores of a server of 2023, beside the budgets: starting, with the ceilings; building and
# checking a case; compiling.
START, QUICK_START, CASE, COMPILATION = 10.0, 6.0, 0.4, 4.0
# Seconds of one call for each multiply-add of a product, and for each entry of the logits, in the mean of
# the implementations; half dtypes are faster in the first.
PRODUCT, ENTRY = 1 / 1.4e11, 3e-9


def nominal_seconds(case: Case, chosen: settings.Settings, allocator: str) -> float:
    """What a case costs, roughly."""
    spent = budget(chosen)
    if chosen.tiny:
        return 0.1
    sizes = SHAPES[case.shape].sizes("cpu")
    entries = sizes.get("N", 0) * sizes.get("G", 1) * sizes.get("V", 0)
    width = sizes["D"] if case.operator == "soft_embedding" else 0
    if case.operator == "linear_soft_embedding":
        width = sizes["D"] + sizes["H"]
    # A GPU's calls are short beside what surrounds them.
    entries = 0 if chosen.device == "cuda" else entries
    call = entries * (ENTRY + width * PRODUCT * (1 if case.dtype == "float32" else 0.2))
    implementations = 3
    seconds = CASE
    for one_pass in select_passes(case, chosen.phases):
        round_seconds = implementations * call * (1 if one_pass == "forward" else 3)
        most = max(3 * round_seconds, 4 * spent.seconds)
        timed = max(spent.seconds, min(spent.fewest * round_seconds, most))
        seconds += timed + round_seconds + implementations * spent.warm_up
    if allocator == settings.DEFAULT:
        seconds += 20 * call
    if case.compiled and not chosen.quick:
        seconds += COMPILATION if allocator == settings.DEFAULT else COMPILATION / 4
    return seconds


def nominal_start(chosen: settings.Settings) -> float:
    """What a worker costs before its first case."""
    return 3.0 if chosen.tiny else QUICK_START if chosen.quick else START


def duration(seconds: float) -> str:
    """``12 min 05 s`` or ``9 s``."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


class Display:
    """One line that is written over on a terminal, a line now and then elsewhere, on ``stream``."""

    EVERY = 15.0

    def __init__(self, expected: Sequence[float], *, stream: TextIO | None = None) -> None:
        """Args:
        expected: nominal seconds of every step to come.
        stream: stderr by default.
        """
        self._stream = stream if stream is not None else sys.stderr
        self._left, self._expected_done = list(expected), 0.0
        self._total, self._done = len(expected), 0
        self._begun = self._last = time.monotonic()
        self._shown = 0

    def finished(self, text: str) -> None:
        """One step is done."""
        self._expected_done += self._left.pop(0)
        self._done += 1
        elapsed = time.monotonic() - self._begun
        pace = elapsed / self._expected_done if self._expected_done else 1.0
        left = duration(pace * sum(self._left))
        self._show(f"{self._done}/{self._total}, {left} left, done: {text}")

    def close(self) -> None:
        """Ends the line."""
        if self._shown:
            with suppress(OSError, ValueError):
                print(file=self._stream, flush=True)
            self._shown = 0

    def _show(self, line: str) -> None:
        with suppress(OSError, ValueError):
            if self._stream.isatty():
                print("\r" + line.ljust(self._shown), end="", file=self._stream, flush=True)
                self._shown = len(line)
            elif time.monotonic() - self._last >= self.EVERY or not self._left:
                self._last = time.monotonic()
                print(line, file=self._stream, flush=True)
