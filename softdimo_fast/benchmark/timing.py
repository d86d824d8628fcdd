"""Interleaved timing: every implementation once a round, so that what disturbs the machine disturbs all.

Ratios are taken inside a round, between calls that are milliseconds apart, and their median is reported;
the order is rotated from round to round, so that nobody always follows the same neighbour.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from softdimo_fast.benchmark.workloads.common import Absent, Implementation, Workload


@dataclass(frozen=True)
class Budget:
    """How long a pass of a case may take.

    Attributes:
        seconds: of timed rounds.
        warm_up: seconds of calls before them, for each implementation; at least one call.
        fewest: rounds, also where they take longer: up to four times as long, then three are enough.
        most: rounds, also where there is time left.
    """

    seconds: float
    warm_up: float
    fewest: int
    most: int

    def enough(self, rounds: int, seconds: float) -> bool:
        """Whether to stop after so many rounds and seconds."""
        if rounds >= self.most:
            return True
        if rounds >= self.fewest:
            return seconds >= self.seconds
        return rounds >= 3 and seconds >= 4 * self.seconds > 0


class Spread(NamedTuple):
    """Median and the 20 % and 80 % quantiles."""

    median: float
    low: float
    high: float


class Stopwatch(Protocol):
    """Laps of one call."""

    def start(self) -> None: ...

    def lap(self) -> None: ...

    def read(self) -> list[float]:
        """Seconds of every lap since the start."""


class CpuStopwatch:
    """Wall time."""

    def __init__(self) -> None:
        self._marks: list[float] = []

    def start(self) -> None:
        self._marks = [time.perf_counter()]

    def lap(self) -> None:
        self._marks.append(time.perf_counter())

    def read(self) -> list[float]:
        return [end - begin for begin, end in zip(self._marks, self._marks[1:], strict=False)]


class CudaStopwatch:
    """Device time between events.

    Before every call a buffer larger than the L2 cache is written, and the device then sleeps for a
    millisecond while the host queues the call, so that launches are not what is measured.
    """

    SLEEP_CYCLES = 2_000_000

    def __init__(self) -> None:
        cache = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        self._flush = torch.empty(max(2 * int(cache), 2**26), dtype=torch.uint8, device="cuda")
        self._events: list[torch.cuda.Event] = []

    def start(self) -> None:
        torch.cuda.synchronize()
        self._flush.zero_()
        torch.cuda._sleep(self.SLEEP_CYCLES)
        self._events = []
        self.lap()

    def lap(self) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._events.append(event)

    def read(self) -> list[float]:
        torch.cuda.synchronize()
        pairs = zip(self._events, self._events[1:], strict=False)
        return [begin.elapsed_time(end) / 1000 for begin, end in pairs]


def stopwatch(device: torch.device) -> Stopwatch:
    """The stopwatch of a kind of device."""
    return CudaStopwatch() if device.type == "cuda" else CpuStopwatch()


def spread(values: Sequence[float]) -> Spread:
    """Of at least one value."""
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return Spread(statistics.median(values), fifths[0], fifths[3])


def ratios(values: Sequence[float], to: Sequence[float]) -> Spread:
    """Of the ratios inside each round."""
    return spread([value / base for value, base in zip(values, to, strict=True)])


Caller = Callable[[], dict[str, float]]


@dataclass
class Timings:
    """What one pass of a case gave.

    Attributes:
        seconds: implementation -> phase -> seconds of each round.
        absent: comparators that failed, with what they said.
        compile_seconds: of each compiled implementation: its first call.
    """

    seconds: dict[str, dict[str, list[float]]]
    absent: list[Absent]
    compile_seconds: dict[str, float]


def interleave(callers: dict[str, Caller], budget: Budget) -> dict[str, dict[str, list[float]]]:
    """Rounds of calls, until the budget is spent: name -> phase -> seconds of each round."""
    found: dict[str, dict[str, list[float]]] = {name: {} for name in callers}
    order, begun, rounds = list(callers), time.perf_counter(), 0
    with _no_collection():
        while not budget.enough(rounds, time.perf_counter() - begun):
            for name in order:
                for phase, seconds in callers[name]().items():
                    found[name].setdefault(phase, []).append(seconds)
            order.append(order.pop(0))
            rounds += 1
    return found


def measure(workload: Workload, one_pass: str, budget: Budget) -> Timings:
    """Times all implementations of a case in one pass, "forward" or "training".

    A comparator that raises is left out, with its message; an error of ours is raised.
    """
    watch = stopwatch(workload.device)
    callers: dict[str, Caller] = {}
    timings = Timings({}, [], {})
    for position, implementation in enumerate(workload.implementations):
        if implementation.compiled and one_pass == "forward" and workload.wanted:
            continue  # without gradients it would be compiled again, for little news
        try:
            call = caller(workload, implementation, one_pass, watch)
            begun = time.perf_counter()
            call()
            first = time.perf_counter() - begun
            # The call that compiled has warmed up nothing else.
            _repeat(call, budget.warm_up if implementation.compiled else budget.warm_up - first)
        except Exception as error:
            if position == 0:
                raise
            said = (str(error).splitlines() or [""])[0]
            reason = f"{type(error).__name__}: {said}"[:200]
            timings.absent.append(Absent(implementation.name, reason))
            continue
        if implementation.compiled:
            timings.compile_seconds[implementation.name] = first
        callers[implementation.name] = call
    timings.seconds = interleave(callers, budget)
    return timings


def caller(
    workload: Workload, implementation: Implementation, one_pass: str, watch: Stopwatch
) -> Caller:
    """One timed call: seconds by phase. What it returned is freed after the time was taken."""

    def forward() -> dict[str, float]:
        with torch.no_grad():
            watch.start()
            kept = workload.forward(implementation)
            watch.lap()
        (seconds,) = watch.read()
        del kept
        return {"forward": seconds}

    upstream: list[Tensor] = []

    def training() -> dict[str, float]:
        watch.start()
        value = workload.forward(implementation)
        watch.lap()
        if not upstream:  # its shape and dtype are known only now; this call is a warm-up
            upstream.append(workload.upstream(value))
        kept: Any = workload.gradients(value, upstream[0])
        watch.lap()
        first, second = watch.read()
        del kept, value
        return {"backward": second, "both": first + second}

    return forward if one_pass == "forward" else training


def _repeat(call: Caller, seconds: float) -> None:
    """Until so many seconds have passed; not at all where none are left."""
    begun = time.perf_counter()
    while time.perf_counter() - begun < seconds:
        call()


@contextmanager
def _no_collection() -> Iterator[None]:
    """Garbage is collected before and after, not in the middle of a call."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
