"""Philox4x32-10 in plain torch: the same bits as the kernels (csrc/include/softdimo/philox.h).

Source: J. K. Salmon, M. A. Moraes, R. O. Dror, D. E. Shaw, "Parallel random numbers: as easy as 1, 2, 3"
(SC 2011).
"""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def _high_low(a: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """The two 32-bit halves of the 64-bit product; int64 wraps, which keeps every bit."""
    product = a * multiplier
    return (product >> 32) & _WORD, product & _WORD


def philox4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]
) -> list[Tensor]:
    """Ten rounds of Philox4x32 on broadcastable int64 tensors that hold 32-bit words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _high_low(c0, _MULTIPLIERS[0])
        high1, low1 = _high_low(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return [c0, c1, c2, c3]


def uniform(seed: Tensor, row_ids: Tensor, vocabulary: int) -> Tensor:
    """Uniform(n, v) on the open interval (0, 1), float32, shape ``[*row_ids.shape, vocabulary]``.

    Word ``v % 4`` of Philox with key = seed and counter = (row_ids[n] low, row_ids[n] high, v // 4, offset),
    where ``seed`` is int64 ``[2]`` = (seed, offset) and the offset counts modulo 2^32. A word ``w`` becomes
    ``min((float32(w) + 0.5) * 2^-32, 1 - 2^-24)``: never 0, never 1, and exact to the last bit near 0.
    """
    key = (seed[0] & _WORD, (seed[0] >> 32) & _WORD)
    blocks = torch.arange((vocabulary + 3) // 4, dtype=torch.int64, device=row_ids.device)
    rows = row_ids.unsqueeze(-1)
    counter = (rows & _WORD, (rows >> 32) & _WORD, blocks & _WORD, seed[1] & _WORD)
    words = torch.stack(torch.broadcast_tensors(*philox4x32(counter, key)), dim=-1)
    words = words.flatten(-2)[..., :vocabulary]
    return ((words.to(torch.float32) + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24)


def gumbel(seed: Tensor, row_ids: Tensor, vocabulary: int, dtype: torch.dtype) -> Tensor:
    """Standard Gumbel noise ``-log(-log(1 - u))`` from :func:`uniform`.

    The winners of a Gumbel-max draw come from u near 0, where ``u`` has full relative precision: no ties
    and no cut tail at large vocabularies (``-log(-log(u))`` has both in float32).
    """
    u = uniform(seed, row_ids, vocabulary).to(dtype)
    return -torch.log(-torch.log1p(-u))


def default_row_ids(row_ids: Tensor | None, rows: torch.Size, device: torch.device) -> Tensor:
    """0 .. N-1 over the rows where the caller gave no numbers."""
    if row_ids is not None:
        return row_ids
    return torch.arange(rows.numel(), dtype=torch.int64, device=device).reshape(rows)
