"""Specification of ``token_statistics``: log-normalizer, entropy and largest probability of a row.

With s = (z - max z) / T <= 0 and r = sum exp(s) over all entries but the arg-max:
    log-normalizer  max z / T + log(1 + r)
    entropy         sum p (log(1 + r) - s),  p = exp(s) / (1 + r)
    max p           1 / (1 + r)
No term of the entropy is negative, so nothing cancels, however large the logits or however near p
is to a single token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from softdimo_fast.ops.reference.common import compute_dtype
from softdimo_fast.ops.reference.soft_embedding import temperature_divisor


def token_statistics(
    logits: Tensor, temperature: float, row_temperature: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The three statistics of softmax(logits / T) over the rows; zeros where ``mask`` is False.

    A row that holds NaN, +inf or nothing but -inf, or whose T is not positive, gives NaN.
    """
    dtype = compute_dtype(logits, row_temperature)
    z = logits.to(dtype)
    t = temperature_divisor(temperature, row_temperature, dtype)
    if isinstance(t, Tensor):
        t = t.clamp(max=torch.finfo(dtype).max)  # an infinite one would make NaN of absent entries
    top = z.amax(dim=-1, keepdim=True)
    shifted = (z - top) / t
    weight = torch.exp(shifted)
    others = weight.scatter(-1, z.argmax(dim=-1, keepdim=True), 0.0)
    # The largest s is 0, or NaN in a row that holds no distribution.
    rest = others.sum(dim=-1, keepdim=True) + shifted.amax(dim=-1, keepdim=True)
    log_total = torch.log1p(rest)
    # 0 log 0 = 0: where nothing is left of an entry, its logarithm may be infinite.
    surprise = torch.where(weight == 0, 0.0, log_total - shifted)
    entropy = (weight * surprise).sum(dim=-1, keepdim=True) / (1 + rest)
    found = [top / t + log_total, entropy, 1 / (1 + rest)]
    log_normalizer, entropy, max_prob = (
        value.squeeze(-1) if mask is None else torch.where(mask, value.squeeze(-1), 0.0)
        for value in found
    )
    return log_normalizer, entropy, max_prob
