"""Specification of ``masked_cross_entropy`` and of its gradient.

With s = z - max z, l = sum exp(s), y the target and e the label smoothing (Szegedy et al. 2016):

    loss = log l - (1 - e) s_y - (e / V) sum_v s_v,        dz = softmax(z) - (1 - e) 1_y - e / V.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from softdimo_fast.ops.reference.common import compute_dtype, mean_divisor, wanted_or_empty


class _Rows(NamedTuple):
    """What forward and backward both need; rows that do not count read as zeros, with target 0."""

    shifted: Tensor  # z - max z
    exponentials: Tensor
    top: Tensor  # one-hot of the first maximum
    target: Tensor  # one-hot
    broken: Tensor  # [..., 1]: NaN, +inf, nothing but -inf, or a target out of range


def _read(logits: Tensor, targets: Tensor, mask: Tensor | None) -> _Rows:
    z, vocabulary = logits.to(compute_dtype(logits)), logits.shape[-1]
    target = targets.unsqueeze(-1)
    if mask is not None:
        counts = mask.unsqueeze(-1)
        z, target = torch.where(counts, z, 0.0), torch.where(counts, target, 0)
    # Not amax: its derivative is shared among ties, and the loss treats one entry as the maximum.
    top = z.detach().argmax(dim=-1, keepdim=True)
    maximum = z.gather(-1, top)
    shifted = z - maximum
    index = torch.arange(vocabulary, device=logits.device)
    broken = ~maximum.isfinite() | (target < 0) | (target >= vocabulary)
    return _Rows(shifted, torch.exp(shifted), top == index, target == index, broken)


def masked_cross_entropy(
    logits: Tensor, targets: Tensor, mask: Tensor | None, label_smoothing: float, reduction: str
) -> Tensor:
    """The loss of every row (0 where not counted), or its sum or mean over counted rows."""
    rows = _read(logits, targets, mask)
    # The maximum contributes exactly 1: log1p keeps a confident row's loss from rounding to 0.
    others = torch.where(rows.top, 0.0, rows.exponentials).sum(dim=-1)
    at_target = torch.where(rows.target, rows.shifted, 0.0).sum(dim=-1)
    loss = torch.log1p(others) - (1 - label_smoothing) * at_target
    if label_smoothing != 0:
        loss = loss - (label_smoothing / logits.shape[-1]) * rows.shifted.sum(dim=-1)
    loss = torch.where(rows.broken.squeeze(-1), torch.nan, loss)
    if mask is not None:
        loss = torch.where(mask, loss, 0.0)
    if reduction == "none":
        return loss
    return loss.sum() / mean_divisor(loss, mask) if reduction == "mean" else loss.sum()


def masked_cross_entropy_backward(
    grad: Tensor, logits: Tensor, targets: Tensor, mask: Tensor | None, label_smoothing: float,
    reduction: str, wanted: list[bool],
) -> Tensor:  # fmt: skip
    """The gradient to ``logits``.

    In a row with an entry p > 1/2 that entry is written as minus the sum of the others.
    """
    rows = _read(logits, targets, mask)
    p = rows.exponentials / rows.exponentials.sum(dim=-1, keepdim=True)
    share = label_smoothing / logits.shape[-1]
    gradient = torch.where(rows.target, p - (1 - label_smoothing + share), p - share)
    dominant = p > 0.5
    others = torch.where(dominant, 0.0, gradient)
    gradient = torch.where(dominant, -others.sum(dim=-1, keepdim=True), gradient)
    gradient = torch.where(rows.broken, torch.nan, gradient)
    upstream = grad.to(p.dtype).expand(logits.shape[:-1])
    if reduction == "mean":
        upstream = upstream / mean_divisor(upstream, mask)
    gradient = gradient * upstream.unsqueeze(-1)
    if mask is not None:
        gradient = torch.where(mask.unsqueeze(-1), gradient, 0.0)
    return wanted_or_empty(wanted[0], gradient, logits)
