"""What this machine can do at all: measured first, in the process and on the threads of everything else."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from softdimo_fast.benchmark.timing import Stopwatch, stopwatch
from softdimo_fast.benchmark.workloads.common import Work


@dataclass(frozen=True)
class Ceilings:
    """Best rates of torch's own simplest calls.

    Attributes:
        copy: bytes per second of ``copy_``, each byte read and written counted.
        read: bytes per second of ``sum`` or ``dot``, whichever is faster.
        sgemm: float32 operations per second of ``mm`` (on CUDA without TF32).
        bf16_gemm: bfloat16 operations per second of ``mm``.
        exp: exponentials per second of ``torch.exp`` in cache. A kernel's own polynomial may be faster, so
            that this one is shown, and binds no floor.
    """

    copy: float
    read: float
    sgemm: float
    bf16_gemm: float
    exp: float

    @property
    def seconds_per_written_byte(self) -> float:
        """What a copy costs beyond its reads: 2 / copy - 1 / read, at least 1 / copy."""
        return max(2 / self.copy - 1 / self.read, 1 / self.copy)

    def memory_seconds(self, work: Work) -> float:
        """The least time of the traffic alone."""
        return work.read / self.read + work.written * self.seconds_per_written_byte

    def product_seconds(self, work: Work, dtype: str) -> float:
        """The least time of the multiply-adds alone."""
        return work.flops / (self.sgemm if dtype == "float32" else self.bf16_gemm)

    def floor(self, work: Work, dtype: str) -> tuple[float, str]:
        """The least seconds, and what binds: "memory" or "product"."""
        memory, product = self.memory_seconds(work), self.product_seconds(work, dtype)
        return (memory, "memory") if memory >= product else (product, "product")


def measure(device: str, *, seconds: float = 0.6, scale: float = 1.0) -> Ceilings:
    """Measures all of them, ``seconds`` each. ``scale`` shrinks the tensors, for tests."""
    place = torch.device(device)
    large = max(1, round((2**29 if place.type == "cuda" else 2**26) * scale))
    side = max(16, round((8192 if place.type == "cuda" else 2048) * scale**0.5))
    watch = stopwatch(place)
    copy, read = _traffic(large, place, watch, seconds)
    small = torch.randn(2**18 if place.type == "cpu" else 2**24, device=place)
    result = torch.empty_like(small)
    exp = small.numel() / _best(lambda: torch.exp(small, out=result), watch, seconds)
    return Ceilings(
        copy, read, _gemm(side, torch.float32, place, watch, seconds),
        _gemm(side, torch.bfloat16, place, watch, seconds), exp,
    )  # fmt: skip


def _traffic(
    count: int, device: torch.device, watch: Stopwatch, seconds: float
) -> tuple[float, float]:
    source = torch.randn(count, device=device)
    target = torch.empty_like(source)
    size = 4 * count
    copy = 2 * size / _best(lambda: target.copy_(source), watch, seconds)
    read = max(
        size / _best(source.sum, watch, seconds / 2),
        2 * size / _best(lambda: torch.dot(source, target), watch, seconds / 2),
    )
    return copy, read


def _gemm(
    side: int, dtype: torch.dtype, device: torch.device, watch: Stopwatch, seconds: float
) -> float:
    """Random numbers: zeros draw less power, and run faster."""
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return 2 * side**3 / _best(lambda: left @ right, watch, seconds)


def _best(call: Callable[[], object], watch: Stopwatch, seconds: float) -> float:
    """The fastest of the calls that fit into ``seconds``: a ceiling is a best case."""
    call()
    best, begun = float("inf"), time.perf_counter()
    while True:
        watch.start()
        call()
        watch.lap()
        best = min(best, watch.read()[0])
        if time.perf_counter() - begun >= seconds:
            return best
