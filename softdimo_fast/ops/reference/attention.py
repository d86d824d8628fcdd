"""Specification of ``masked_attention``: o = softmax(scale q k^T over the keys that take part) v.

Scaled dot-product attention (Vaswani et al. 2017), bidirectional, with two masks: keys that may be
attended and queries that are wanted.
"""

from __future__ import annotations

import torch
from torch import Tensor

from softdimo_fast.ops.reference.common import compute_dtype, ieee_float32
from softdimo_fast.ops.reference.soft_embedding import logits_gradient


def masked_attention(
    query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None, query_mask: Tensor | None,
    scale: float,
) -> Tensor:  # fmt: skip
    """``[B, H, Lq, d_v]`` in the query's dtype; zero in rows not wanted and in rows without a key.

    ``key_mask`` ``[B, Lk]`` and ``query_mask`` ``[B, Lq]``: True takes part.
    """
    dtype = compute_dtype(query, key, value)
    q, k, v = _inputs(query, key, value, key_mask, query_mask, dtype)
    p = _probabilities(q, k, key_mask, scale)
    with ieee_float32(p):
        out = p @ v
    return _only(query_mask, out).to(query.dtype)


def masked_attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None,
    query_mask: Tensor | None, scale: float, wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients to (query, key, value); empty tensors where not wanted.

    With g the upstream gradient of wanted rows and p the attention weights:
        dv = p^T g,  ds = p (g v^T - delta),  delta = sum p (g v^T),
        dq = scale ds k,  dk = scale ds^T q
    """
    dtype = compute_dtype(query, key, value)
    q, k, v = _inputs(query, key, value, key_mask, query_mask, dtype)
    g = _only(query_mask, grad.to(dtype))
    p = _probabilities(q, k, key_mask, scale)
    dquery, dkey, dvalue = (tensor.new_empty(0) for tensor in (query, key, value))
    if wanted[0] or wanted[1]:
        ds = scale * logits_gradient(p, g, v, 1.0)
    with ieee_float32(p):
        if wanted[0]:
            dquery = _only(query_mask, ds @ k).to(query.dtype)
        if wanted[1]:
            dkey = _only(key_mask, ds.transpose(-1, -2) @ q).to(key.dtype)
        if wanted[2]:
            dvalue = _only(key_mask, p.transpose(-1, -2) @ g).to(value.dtype)
    return dquery, dkey, dvalue


def _only(mask: Tensor | None, rows: Tensor) -> Tensor:
    """``rows`` ``[B, H, L, d]``, zero where ``mask`` ``[B, L]`` is False, whatever was there."""
    return rows if mask is None else torch.where(mask[:, None, :, None], rows, 0.0)


def _inputs(
    query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None, query_mask: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    q = _only(query_mask, query.to(dtype))
    return q, _only(key_mask, key.to(dtype)), _only(key_mask, value.to(dtype))


def _probabilities(q: Tensor, k: Tensor, key_mask: Tensor | None, scale: float) -> Tensor:
    """``[B, H, Lq, Lk]``; without any key all weights are equal, over values that are zero."""
    with ieee_float32(q):
        scores = (q * scale) @ k.transpose(-1, -2)
    if key_mask is not None:
        left_out = torch.where(key_mask.any(dim=-1, keepdim=True), -torch.inf, 0.0)
        mask, fill = key_mask[:, None, None, :], left_out[:, None, None, :].to(scores.dtype)
        scores = torch.where(mask, scores, fill)
    return torch.softmax(scores, dim=-1)
