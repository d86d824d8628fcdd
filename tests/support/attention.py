"""Calls of masked_attention for the tests: inputs, masks, and what a user would write."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from softdimo_fast.ops.masked_attention import masked_attention

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
BACKENDS = ("reference", "cpp")
Inputs = tuple[Tensor, Tensor, Tensor]


def composed(
    query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None, query_mask: Tensor | None,
    scale: float | None = None,
) -> Tensor:  # fmt: skip
    """What a user would write; a row without any key is made zero afterwards."""
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = query @ key.transpose(-1, -2) * scale
    wanted = torch.ones(query.shape[0], 1, query.shape[2], 1, dtype=torch.bool)
    if key_mask is not None:
        some = key_mask.any(-1)[:, None, None, None]
        scores = scores.masked_fill(~key_mask[:, None, None, :] & some, -torch.inf)
        wanted = wanted & some
    if query_mask is not None:
        wanted = wanted & query_mask[:, None, :, None]
    return torch.where(wanted, torch.softmax(scores, -1) @ value, 0)


def inputs(
    batch: int = 2, heads: int = 2, queries: int = 5, keys: int = 6, width: int = 4,
    value_width: int = 3, dtype: torch.dtype = torch.float64, scale: float = 1.0,
) -> Inputs:  # fmt: skip
    return (
        (scale * torch.randn(batch, heads, queries, width)).to(dtype),
        torch.randn(batch, heads, keys, width).to(dtype),
        torch.randn(batch, heads, keys, value_width).to(dtype),
    )


def masks(batch: int = 2, queries: int = 5, keys: int = 6) -> tuple[Tensor, Tensor]:
    key_mask, query_mask = torch.rand(batch, keys) > 0.4, torch.rand(batch, queries) > 0.4
    key_mask[:, 0] = True
    query_mask[:, -1] = True
    return key_mask, query_mask


def masked_call(backend: str | None) -> Callable[..., Tensor]:
    """Masked keys and queries; the second sample has no key at all."""
    key_mask, query_mask = masks()
    key_mask[1] = False

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return masked_attention(
            q, k, v, key_mask=key_mask, query_mask=query_mask, scale=0.7, backend=backend
        )

    return call


def dense_call(backend: str) -> Callable[..., Tensor]:
    return lambda q, k, v: masked_attention(q, k, v, backend=backend)
