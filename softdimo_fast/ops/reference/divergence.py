"""Specification of the divergences between two rows of logits, and of their gradients.

With p = softmax(a / S), q = softmax(b / T) and the log ratio r = log p - log q,

    KL(p || q) = sum_v p (r + expm1(-r)),        KL(q || p) = sum_v q (-r + expm1(r)),

sums of terms that are never negative: nothing cancels when p and q nearly agree (the terms p r of the
usual sum have both signs, and are much larger than the sum there). Di[M]O (arXiv 2503.15457): the
forward, reverse and generalised Jeffrey divergences between a teacher's and an auxiliary model's
token distribution.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from softdimo_fast.ops.reference.common import compute_dtype, mean_divisor, wanted_or_empty

# x + expm1(-x) = x^2 (1/2! - x/3! + x^2/4! - ...)
_SERIES = tuple((-1.0) ** k / math.factorial(k + 2) for k in range(14))
_SERIES_BELOW = 0.5
_SERIES_TERMS = {torch.float32: 8, torch.float64: 14}


class Pair(NamedTuple):
    """Two distributions over the same vocabulary, ``[..., V]`` each.

    ``log_ratio`` is log p - log q; finite, and nothing else, where an entry is -inf on either side;
    NaN over a row that holds no distribution. ``only_p``, ``only_q``: the entry is -inf in the logits
    of the other one alone.
    """

    p: Tensor
    q: Tensor
    log_ratio: Tensor
    only_p: Tensor
    only_q: Tensor

    def swapped(self) -> Pair:
        return Pair(self.q, self.p, -self.log_ratio, self.only_q, self.only_p)


def guide(conditional: Tensor, unconditional: Tensor, scale: float | Tensor) -> Tensor:
    """u + s (c - u), written from its nearer end: exactly c where s = 1 (u is not read there).

    Where both are -inf the result is -inf; +inf in either gives +inf or NaN, and so a row of NaN.
    """
    both = (conditional == -torch.inf) & (unconditional == -torch.inf)
    step = torch.where(both, 0.0, conditional - unconditional)
    step = torch.where(unconditional == torch.inf, torch.nan, step)
    if isinstance(scale, Tensor):
        beyond = conditional + (scale - 1) * step
        guided = torch.where(scale < 1, unconditional + scale * step, beyond)
        return torch.where(scale == 1, conditional, guided)
    if scale == 1:
        return conditional
    return unconditional + scale * step if scale < 1 else conditional + (scale - 1) * step


def compare(a: Tensor, b: Tensor, a_temperature: float, b_temperature: float) -> Pair:
    """The distributions softmax(a / S) and softmax(b / T) and their log ratio."""
    a_top = a.detach().amax(dim=-1, keepdim=True)
    b_top = b.detach().amax(dim=-1, keepdim=True)
    # NaN, +inf or nothing but -inf.
    broken = ~(a_top.isfinite() & b_top.isfinite())
    a_gone, b_gone = (a == -torch.inf) & ~broken, (b == -torch.inf) & ~broken
    p, a_normalizer = _softmax((a - a_top) / a_temperature)
    q, b_normalizer = _softmax((b - b_top) / b_temperature)
    if a_temperature == b_temperature:
        ratio = _finite(_difference(a, b, a_top, b_top) / a_temperature)
    else:
        ratio = _finite((a - a_top) / a_temperature) - _finite((b - b_top) / b_temperature)
    absent = a_gone | b_gone
    pair = Pair(
        p,
        q,
        torch.where(absent, 0.0, ratio - (a_normalizer - b_normalizer)),
        b_gone & ~a_gone,
        a_gone & ~b_gone,
    )
    # The two normalizers are rounded on their own; their difference is corrected (one Newton step) so
    # that sum(p - q), formed from the ratio, is zero. In exact arithmetic the correction is zero.
    excess = torch.log1p(probability_difference(pair).sum(dim=-1, keepdim=True)).detach()
    return pair._replace(log_ratio=pair.log_ratio - excess)


def _softmax(scaled: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities and log normalizer of rows whose maximum is 0."""
    exponentials = torch.exp(scaled)
    total = exponentials.sum(dim=-1, keepdim=True)
    return exponentials / total, torch.log(total)


def _finite(scaled: Tensor) -> Tensor:
    """Keeps logits filled with the most negative number of their dtype from becoming inf / T."""
    return scaled.clamp(min=-1e30, max=1e30)


def _difference(a: Tensor, b: Tensor, a_top: Tensor, b_top: Tensor) -> Tensor:
    """(a - b) - (a_top - b_top) with the rounding errors of both differences added back.

    Exact for nearly equal logits and for rows that differ by a large common offset alike.
    """
    entry, top = a - b, a_top - b_top
    return (entry - top) + (_rounding(a, b, entry) - _rounding(a_top, b_top, top))


@torch.no_grad()
def _rounding(a: Tensor, b: Tensor, difference: Tensor) -> Tensor:
    """a - b - difference, exactly (Knuth's two-sum; The Art of Computer Programming, 4.2.2)."""
    negated_b = difference - a
    return (a - (difference - negated_b)) - (b + negated_b)


def probability_difference(pair: Pair) -> Tensor:
    """p - q from the log ratio, so that nearly equal probabilities do not cancel."""
    r = pair.log_ratio
    relative = -torch.expm1(-r.abs())
    difference = torch.where(r >= 0, pair.p * relative, -(pair.q * relative))
    difference = torch.where(pair.only_p, pair.p, difference)
    return torch.where(pair.only_q, -pair.q, difference)


def kl(pair: Pair) -> Tensor:
    """KL(p || q) of every row.

    0 log 0 = 0; +inf where q has -inf and p has not. The terms are written on the larger of the two
    probabilities, with x = |r|: p (x + expm1(-x)) or q (1 - exp(-x) - x exp(-x)), which cannot
    overflow.
    """
    r = pair.log_ratio
    x = r.abs()
    relative = -torch.expm1(-x)
    small = x < _SERIES_BELOW
    near = torch.where(small, x, 0.0)
    series = near * near * _polynomial(near, _SERIES[: _SERIES_TERMS[x.dtype]])
    p_larger = torch.where(small, series, x - relative)
    q_larger = torch.where(small, near * relative - series, relative - x * torch.exp(-x))
    terms = torch.where(r >= 0, pair.p * p_larger, pair.q * q_larger)
    terms = torch.where(pair.only_q, pair.q, terms)
    return torch.where(pair.only_p, torch.inf, terms).sum(dim=-1)


def _polynomial(x: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    value = torch.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        value = value * x + coefficient
    return value


def divergence(pair: Pair, forward_weight: float, reverse_weight: float) -> Tensor:
    """forward_weight KL(p || q) + reverse_weight KL(q || p) of every row.

    A zero weight leaves its part out: 0 * inf would be NaN.
    """
    value = torch.zeros_like(pair.p[..., 0])
    if forward_weight != 0:
        value = value + forward_weight * kl(pair)
    if reverse_weight != 0:
        value = value + reverse_weight * kl(pair.swapped())
    return value


def gradient_to_q(pair: Pair, forward_weight: float, reverse_weight: float) -> Tensor:
    """The gradient of :func:`divergence` to the scaled logits of q.

    Of KL(p || q): q - p. Of KL(q || p): q (-r - KL(q || p)). Rows sum to zero; in a row with an entry
    q > 1/2 that entry is written as minus the sum of the others, where it would cancel otherwise.
    The gradient to the scaled logits of p is that of the swapped pair with the weights exchanged.
    """
    gradient = torch.zeros_like(pair.q)
    if forward_weight != 0:
        gradient = gradient - forward_weight * probability_difference(pair)
    if reverse_weight != 0:
        mean = kl(pair.swapped()).unsqueeze(-1)
        # An infinite divergence has no such gradient: inf - inf, over the whole row.
        mean = torch.where(mean == torch.inf, torch.nan, mean)
        gradient = gradient - reverse_weight * (pair.q * (pair.log_ratio + mean))
    dominant = (pair.q > 0.5) & ~gradient.isnan()  # a row of one entry must not lose its NaN
    others = torch.where(dominant, 0.0, gradient)
    return torch.where(dominant, -others.sum(dim=-1, keepdim=True), gradient)


# ---------------------------------------------------------------------------------------------------
# The operators


def _compare_rows(
    teacher_logits: Tensor, model_logits: Tensor, teacher_uncond_logits: Tensor | None,
    guidance_scale: float, row_guidance: Tensor | None, teacher_temperature: float,
    model_temperature: float, mask: Tensor | None, dtype: torch.dtype,
) -> tuple[Pair, float | Tensor]:  # fmt: skip
    """The guided teacher's and the model's distributions, and the scale that guided.

    Rows that do not count read as zeros.
    """

    def read(logits: Tensor) -> Tensor:
        wide = logits.to(dtype)
        return wide if mask is None else torch.where(mask.unsqueeze(-1), wide, 0.0)

    teacher, model = read(teacher_logits), read(model_logits)
    scale: float | Tensor = 1.0
    if teacher_uncond_logits is not None:
        scale = guidance_scale
        if row_guidance is not None:
            scale = row_guidance.to(dtype).expand(model_logits.shape[:-1]).unsqueeze(-1)
            if mask is not None:
                scale = torch.where(mask.unsqueeze(-1), scale, 1.0)
        teacher = guide(teacher, read(teacher_uncond_logits), scale)
    return compare(teacher, model, teacher_temperature, model_temperature), scale


def counted(values: Tensor, mask: Tensor | None, weight: Tensor | None) -> Tensor:
    """Values over the rows times the weight; 0 in rows that do not count, whatever both hold there."""
    if mask is not None:
        values = torch.where(mask, values, 0.0)
        weight = None if weight is None else torch.where(mask, weight, 0.0)
    return values if weight is None else values * weight.to(values.dtype)


def token_divergence(
    teacher_logits: Tensor, model_logits: Tensor, teacher_uncond_logits: Tensor | None,
    guidance_scale: float, row_guidance: Tensor | None, teacher_temperature: float,
    model_temperature: float, forward_weight: float, reverse_weight: float, mask: Tensor | None,
    weight: Tensor | None, reduction: str,
) -> Tensor:  # fmt: skip
    """The weighted divergence of every row (0 where not counted), or its sum or mean over those."""
    dtype = compute_dtype(teacher_logits, model_logits, teacher_uncond_logits, row_guidance, weight)
    pair, _ = _compare_rows(
        teacher_logits, model_logits, teacher_uncond_logits, guidance_scale, row_guidance,
        teacher_temperature, model_temperature, mask, dtype,
    )  # fmt: skip
    values = counted(divergence(pair, forward_weight, reverse_weight), mask, weight)
    if reduction == "none":
        return values
    return values.sum() / mean_divisor(values, mask) if reduction == "mean" else values.sum()


def token_divergence_backward(
    grad: Tensor, teacher_logits: Tensor, model_logits: Tensor, teacher_uncond_logits: Tensor | None,
    guidance_scale: float, row_guidance: Tensor | None, teacher_temperature: float,
    model_temperature: float, forward_weight: float, reverse_weight: float, mask: Tensor | None,
    weight: Tensor | None, reduction: str, wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients to (teacher_logits, model_logits, teacher_uncond_logits); empty where not wanted.

    The guided logits u + s (c - u) hand s times their gradient to c and 1 - s times to u.
    """
    dtype = compute_dtype(teacher_logits, model_logits, teacher_uncond_logits, row_guidance, weight)
    pair, scale = _compare_rows(
        teacher_logits, model_logits, teacher_uncond_logits, guidance_scale, row_guidance,
        teacher_temperature, model_temperature, mask, dtype,
    )  # fmt: skip
    upstream = grad.to(dtype).expand(model_logits.shape[:-1])
    if reduction == "mean":
        upstream = upstream / mean_divisor(upstream, mask)
    upstream = counted(upstream, mask, weight).unsqueeze(-1)

    dteacher, dmodel, duncond = (model_logits.new_empty(0) for _ in range(3))
    if wanted[1]:
        dmodel = gradient_to_q(pair, forward_weight, reverse_weight) * (
            upstream / model_temperature
        )
    if wanted[0] or wanted[2]:
        guided = gradient_to_q(pair.swapped(), reverse_weight, forward_weight)
        guided = guided * (upstream / teacher_temperature)
        dteacher = guided * scale
        duncond = guided * (1 - scale)
    uncond = model_logits if teacher_uncond_logits is None else teacher_uncond_logits
    return (
        wanted_or_empty(wanted[0], dteacher, teacher_logits),
        wanted_or_empty(wanted[1], dmodel, model_logits),
        wanted_or_empty(wanted[2], duncond, uncond),
    )


def sample_divisor(mask: Tensor, normalization: str, dtype: torch.dtype) -> Tensor:
    """What each row is divided by, broadcastable to the rows ``[B, ...]``."""
    if normalization == "sum":
        return torch.ones((), dtype=dtype, device=mask.device)
    batch = torch.full((), mask.shape[0], dtype=dtype, device=mask.device).clamp(min=1)
    if normalization == "batch" or mask.dim() == 1:
        return batch
    per_sample = mask.sum(dim=tuple(range(1, mask.dim())), keepdim=True).clamp(min=1)
    return batch * per_sample.to(dtype)


def distribution_matching_loss(
    student_logits: Tensor, teacher_logits: Tensor, auxiliary_logits: Tensor, mask: Tensor,
    teacher_uncond_logits: Tensor | None, guidance_scale: float, row_guidance: Tensor | None,
    teacher_temperature: float, auxiliary_temperature: float, forward_weight: float,
    reverse_weight: float, weight: Tensor | None, normalization: str,
) -> Tensor:  # fmt: skip
    """The normalised sum of weight x D(teacher, auxiliary) over masked rows.

    ``student_logits`` is not read.
    """
    dtype = compute_dtype(
        student_logits,
        teacher_logits,
        auxiliary_logits,
        teacher_uncond_logits,
        row_guidance,
        weight,
    )
    pair, _ = _compare_rows(
        teacher_logits, auxiliary_logits, teacher_uncond_logits, guidance_scale, row_guidance,
        teacher_temperature, auxiliary_temperature, mask, dtype,
    )  # fmt: skip
    values = counted(divergence(pair, forward_weight, reverse_weight), mask, weight)
    return (values / sample_divisor(mask, normalization, dtype)).sum()


def distribution_matching_loss_backward(
    grad: Tensor, student_logits: Tensor, teacher_logits: Tensor, auxiliary_logits: Tensor, mask: Tensor,
    teacher_uncond_logits: Tensor | None, guidance_scale: float, row_guidance: Tensor | None,
    teacher_temperature: float, auxiliary_temperature: float, forward_weight: float,
    reverse_weight: float, weight: Tensor | None, normalization: str, wanted: list[bool],
) -> Tensor:  # fmt: skip
    """The gradient of the value to ``auxiliary_logits``, handed to ``student_logits`` in its dtype."""
    dtype = compute_dtype(
        student_logits,
        teacher_logits,
        auxiliary_logits,
        teacher_uncond_logits,
        row_guidance,
        weight,
    )
    pair, _ = _compare_rows(
        teacher_logits, auxiliary_logits, teacher_uncond_logits, guidance_scale, row_guidance,
        teacher_temperature, auxiliary_temperature, mask, dtype,
    )  # fmt: skip
    upstream = (grad.to(dtype) / sample_divisor(mask, normalization, dtype)).expand(mask.shape)
    upstream = counted(upstream, mask, weight).unsqueeze(-1)
    gradient = gradient_to_q(pair, forward_weight, reverse_weight)
    return wanted_or_empty(wanted[0], gradient * (upstream / auxiliary_temperature), student_logits)
