"""Specification of ``sample_tokens``: argmax of (z - max z) / T + g over the kept entries.

Adding Gumbel noise g and taking the best is an exact draw from softmax(z / T) (the Gumbel-max
trick; Maddison, Tarlow, Minka, "A* sampling", 2014). The row maximum is subtracted before the
division, so that keys near the maximum keep their full precision at any scale of the logits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from softdimo_fast.ops.reference.common import compute_dtype
from softdimo_fast.ops.reference.random import default_row_ids, gumbel
from softdimo_fast.ops.reference.soft_embedding import kept_entries, temperature_divisor


def sample_tokens(
    logits: Tensor, temperature: float, row_temperature: Tensor | None, top_k: int | None,
    top_p: float | None, seed: Tensor, row_ids: Tensor | None, log_prob: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One token per row and, if wanted, its log-probability (else an empty tensor).

    ``row_ids``: already of the rows' shape. A row without a distribution gives -1 and NaN.
    """
    dtype = compute_dtype(logits, row_temperature)
    z = logits.to(dtype)
    t = temperature_divisor(temperature, row_temperature, dtype)
    top = z.amax(dim=-1, keepdim=True)
    valid = top.isfinite()
    if isinstance(t, Tensor):
        valid = valid & t.isfinite()
    valid = valid.squeeze(-1)
    keep = kept_entries(z / t, top_k, top_p)
    scaled = (z - top) / t
    if keep is not None:
        scaled = scaled.masked_fill(~keep, -torch.inf)
    rows = default_row_ids(row_ids, logits.shape[:-1], logits.device)
    noise = gumbel(seed, rows, logits.shape[-1], dtype)
    best = (scaled + noise).argmax(dim=-1, keepdim=True)
    tokens = torch.where(valid, best.squeeze(-1), -1)
    if not log_prob:
        return tokens, scaled.new_empty(0)
    # 1 / p[best] - 1: exact near p = 1, and finite, because the noise spans less than 30.
    others = torch.exp(scaled - scaled.gather(-1, best)).scatter(-1, best, 0.0).sum(dim=-1)
    return tokens, torch.where(valid, -torch.log1p(others), torch.nan)
