"""Kernels that show what single device functions compute."""

from __future__ import annotations

import triton
import triton.language as tl

from softdimo_fast.ops.triton.pieces import exponential, gumbel, uniform


@triton.jit
def fill_uniform(
    seed: tl.tensor, row_ids: tl.tensor, out: tl.tensor, N: tl.constexpr, V: tl.constexpr
) -> None:
    """The uniforms of N rows, in two tiles of V entries."""
    rows = tl.load(row_ids + tl.arange(0, N))
    for first in range(0, 2 * V, V):
        u = uniform(tl.load(seed), tl.load(seed + 1), rows, first, V)
        tl.store(out + tl.arange(0, N)[:, None] * 2 * V + first + tl.arange(0, V)[None, :], u)


@triton.jit
def fill_gumbel(seed: tl.tensor, out: tl.tensor, N: tl.constexpr, V: tl.constexpr) -> None:
    rows = tl.arange(0, N).to(tl.int64)
    g = gumbel(tl.load(seed), tl.load(seed + 1), rows, 0, V)
    tl.store(out + rows[:, None] * V + tl.arange(0, V)[None, :], g)


@triton.jit
def fill_exponential(x: tl.tensor, out: tl.tensor, N: tl.constexpr) -> None:
    at = tl.arange(0, N)
    tl.store(out + at, exponential(tl.load(x + at)))
