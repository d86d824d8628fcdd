"""Triton kernels of the divergences of two rows of logits, forward and backward.

    p = softmax((u + s (c - u)) / S), q = softmax(b / T), r = log p - log q
    KL(p || q) = sum p r         gradient to b / T: q - p;  to the teacher's logits / S: p (r - KL(p || q))
    KL(q || p) = -sum q r        the same with p and q exchanged

With N rows, V entries, s bytes a logit and c = 2 tensors of logits (3 with guidance):

    forward   c s N V read (the second and third pass find the row in a cache), 4 N V exponentials
    backward  c s N V read, s N V written for each gradient, 2 N V exponentials
    floor     max(bytes / copy rate, exponentials / exp rate)

A program owns BLOCK_N whole rows and walks V in chunks of BLOCK_V, whatever the batch. Every term is formed
from the entry's own r, taken from exact differences of logits, so that nothing cancels where p and q nearly
agree: with g = r + expm1(-r) = r^2 (1/2 - ...),

    p - q = p (r - g),   p r - (p - q) = p g,   -q r + (p - q) = (p - q) r - p g

The rounding of the normalizers is taken back (``excess``), so that p - q sums to zero.
"""

from __future__ import annotations

import triton
import triton.language as tl

from softdimo_fast.ops.triton.pieces import (
    exponential,
    log1p_rest,
    logarithm,
    reciprocal,
    rounded,
    row_offset,
)


@triton.jit
def _guided(
    teacher: tl.tensor, uncond: tl.tensor, scale: tl.tensor, offset: tl.tensor, wanted: tl.tensor
) -> tl.tensor:
    """u + s (c - u) from its nearer end, with c already read; u is not read where s = 1.

    -inf where both are; +inf in either makes +inf or NaN of it.
    """
    lowest: tl.constexpr = float("-inf")
    s = scale[:, None]
    u = tl.load(uncond + offset, mask=wanted & (s != 1.0), other=lowest).to(tl.float32)
    step = tl.where((teacher == lowest) & (u == lowest), 0.0, teacher - u)
    step = tl.where(u == float("inf"), float("nan"), step)
    mixed = tl.where(s < 1.0, u + s * step, teacher + (s - 1.0) * step)
    return tl.where(s == 1.0, teacher, mixed)


@triton.jit
def _chunk(
    teacher: tl.tensor, model: tl.tensor, uncond: tl.tensor, scale: tl.tensor, starts: tl.tensor,
    counts: tl.tensor, cols: tl.tensor, vocabulary: tl.tensor,
) -> tl.tensor:  # fmt: skip
    """The (guided) teacher's and the model's logits of a chunk; -inf beside the rows and V."""
    wanted = counts[:, None] & (cols < vocabulary)[None, :]
    at = starts[0][:, None] + cols[None, :]
    a = tl.load(teacher + at, mask=wanted, other=float("-inf")).to(tl.float32)
    if uncond is not None:
        a = _guided(a, uncond, scale, starts[2][:, None] + cols[None, :], wanted)
    at = starts[1][:, None] + cols[None, :]
    return a, tl.load(model + at, mask=wanted, other=float("-inf")).to(tl.float32)


@triton.jit
def _below_top(
    logit: tl.tensor, top: tl.tensor, inverse: tl.tensor, inverse_low: tl.tensor, least: tl.tensor
) -> tl.tensor:
    """(logit - top) / temperature, not below -1e30: 0 times such a number is 0. NaN for NaN."""
    distance = logit - top[:, None]
    distance = tl.where(distance < least, least, distance)
    return distance * inverse + distance * inverse_low


@triton.jit
def _rounding(a: tl.tensor, b: tl.tensor, difference: tl.tensor) -> tl.tensor:
    """a - b - difference, exactly (Knuth's two-sum)."""
    negated_b = difference - a
    return (a - (difference - negated_b)) - (b + negated_b)


@triton.jit
def _curvature(x: tl.tensor) -> tl.tensor:
    """(x + expm1(-x)) / x^2 for |x| < 1/2, to the last bit or so."""
    value = x * 2.49224358e-05 - 1.99621762e-04
    value = value * x + 1.38888737e-03
    value = value * x - 8.33318196e-03
    value = value * x + 4.16666679e-02
    value = value * x - 1.66666672e-01
    return value * x + 0.5


@triton.jit
def _entries(
    a: tl.tensor, b: tl.tensor, teacher_top: tl.tensor, model_top: tl.tensor, p_scale: tl.tensor,
    q_scale: tl.tensor, centre: tl.tensor, excess: tl.tensor, teacher_inverse: tl.tensor,
    teacher_inverse_low: tl.tensor, teacher_least: tl.tensor, model_inverse: tl.tensor,
    model_inverse_low: tl.tensor, model_least: tl.tensor, SAME: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """(p, q, r, p - q, terms of KL(p || q), terms of KL(q || p)) of a chunk, without the infinite terms.

    Of two probabilities that differ, the smaller one is the larger times exp(-|r|), so that both belong to
    the same r; nearly equal ones are p and p exp(-r). SAME: both temperatures are one.
    """
    x = _below_top(a, teacher_top, teacher_inverse, teacher_inverse_low, teacher_least)
    y = _below_top(b, model_top, model_inverse, model_inverse_low, model_least)
    d = x - y
    if SAME:
        # The rounding errors of all differences added back: exact for nearly equal logits, and for rows
        # that differ by a large common offset.
        top = teacher_top - model_top
        entry = a - b
        low = _rounding(a, b, entry) - _rounding(teacher_top, model_top, top)[:, None]
        exact = (entry - top[:, None]) + low
        finite = exact - exact == 0.0
        exact = tl.where(exact < teacher_least, teacher_least, exact)
        exact = tl.where(exact > -teacher_least, -teacher_least, exact)
        d = tl.where(finite, exact * teacher_inverse + exact * teacher_inverse_low, d)
    r = (d - centre[:, None]) - excess[:, None]
    far = tl.abs(r)
    near, q_larger = far < 0.5, r <= -0.5
    base = exponential(tl.where(q_larger, y, x)) * tl.where(
        q_larger, q_scale[:, None], p_scale[:, None]
    )
    share = exponential(-far)
    other = base * share
    g = r * r * _curvature(r)
    lost = 1.0 - share
    more = base * (far - lost)
    less = base * (lost - far * share)
    apart = tl.where(near, base * (r - g), tl.where(q_larger, other - base, base - other))
    forward = tl.where(near, base * g, tl.where(q_larger, less, more))
    reverse = tl.where(near, apart * r - forward, tl.where(q_larger, more, less))
    p = tl.where(q_larger, other, base)
    q = tl.where(near, base - apart, tl.where(q_larger, base, other))
    return p, q, r, apart, forward, reverse


@triton.jit
def _rows(
    rows: tl.tensor, mask: tl.tensor, row_guidance: tl.tensor, guidance: tl.tensor, inners: tl.tensor,
    outer_strides: tl.tensor, inner_strides: tl.tensor, BLOCK_N: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """(row, inside, counts, where its logits start in each tensor, guidance scale) of this program's rows."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = row < rows
    counts = inside
    if mask is not None:
        counts = inside & (tl.load(mask + row, mask=inside, other=0) != 0)
    starts = (
        row_offset(row, inners[0], outer_strides[0], inner_strides[0]),
        row_offset(row, inners[1], outer_strides[1], inner_strides[1]),
        row_offset(row, inners[2], outer_strides[2], inner_strides[2]),
    )
    if row_guidance is not None:
        scale = tl.load(row_guidance + row, mask=counts, other=1.0).to(tl.float32)
    else:
        scale = tl.zeros([BLOCK_N], tl.float32) + guidance
    return row, inside, counts, starts, scale


@triton.jit(do_not_specialize=["rows", "inner_a", "inner_b", "inner_u"])
def divergence_forward_kernel(
    teacher: tl.tensor, model: tl.tensor, uncond: tl.tensor, mask: tl.tensor, row_guidance: tl.tensor,
    values: tl.tensor, statistics: tl.tensor, rows: tl.tensor, vocabulary: tl.tensor,
    guidance: tl.tensor, forward_weight: tl.tensor, reverse_weight: tl.tensor, inner_a: tl.tensor,
    outer_a: tl.tensor, within_a: tl.tensor, inner_b: tl.tensor, outer_b: tl.tensor,
    within_b: tl.tensor, inner_u: tl.tensor, outer_u: tl.tensor, within_u: tl.tensor,
    inverse_a: tl.tensor, inverse_low_a: tl.tensor, least_a: tl.tensor, inverse_b: tl.tensor,
    inverse_low_b: tl.tensor, least_b: tl.tensor, SAME: tl.constexpr, STATISTICS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
) -> None:  # fmt: skip
    """The divergence of every row (0 where it does not count), and what the backward needs of it."""
    row, inside, counts, starts, scale = _rows(
        rows, mask, row_guidance, guidance, (inner_a, inner_b, inner_u), (outer_a, outer_b, outer_u),
        (within_a, within_b, within_u), BLOCK_N,
    )  # fmt: skip
    # By place in the chunk, reduced once after the last one.
    a_most = tl.full([BLOCK_N, BLOCK_V], float("-inf"), tl.float32)
    b_most = tl.full([BLOCK_N, BLOCK_V], float("-inf"), tl.float32)
    for first in range(0, vocabulary, BLOCK_V):
        cols = first + tl.arange(0, BLOCK_V)
        a, b = _chunk(teacher, model, uncond, scale, starts, counts, cols, vocabulary)
        a_most = tl.maximum(a_most, a)
        b_most = tl.maximum(b_most, b)
    a_top = tl.max(a_most, axis=1)
    b_top = tl.max(b_most, axis=1)

    p_part = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    q_part = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    for first in range(0, vocabulary, BLOCK_V):
        cols = first + tl.arange(0, BLOCK_V)
        a, b = _chunk(teacher, model, uncond, scale, starts, counts, cols, vocabulary)
        p_part += exponential(_below_top(a, a_top, inverse_a, inverse_low_a, least_a))
        q_part += exponential(_below_top(b, b_top, inverse_b, inverse_low_b, least_b))
    p_sum = tl.sum(p_part, axis=1).to(tl.float64)
    q_sum = tl.sum(q_part, axis=1).to(tl.float64)
    p_scale = reciprocal(p_sum)
    q_scale = reciprocal(q_sum)
    quotient = p_sum / q_sum  # exactly 1 where they are equal
    centre = logarithm(quotient, 1.0 - quotient)

    apart_part = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    forward_part = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    reverse_part = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    only_p_part = tl.zeros([BLOCK_N, BLOCK_V], tl.int32)
    only_q_part = tl.zeros([BLOCK_N, BLOCK_V], tl.int32)
    nothing = tl.zeros([BLOCK_N], tl.float32)
    for first in range(0, vocabulary, BLOCK_V):
        cols = first + tl.arange(0, BLOCK_V)
        a, b = _chunk(teacher, model, uncond, scale, starts, counts, cols, vocabulary)
        _, _, _, apart, more, less = _entries(
            a, b, a_top, b_top, p_scale.to(tl.float32), q_scale.to(tl.float32),
            centre.to(tl.float32), nothing, inverse_a, inverse_low_a, least_a, inverse_b, inverse_low_b,
            least_b, SAME,
        )  # fmt: skip
        apart_part += apart
        forward_part += more
        reverse_part += less
        a_gone, b_gone = a == float("-inf"), b == float("-inf")
        only_p_part = tl.where(b_gone & (a_gone == 0), 1, only_p_part)
        only_q_part = tl.where(a_gone & (b_gone == 0), 1, only_q_part)
    apart_sum = tl.sum(apart_part, axis=1).to(tl.float64)
    forward = tl.sum(forward_part, axis=1).to(tl.float64)
    reverse = tl.sum(reverse_part, axis=1).to(tl.float64)
    only_p, only_q = tl.max(only_p_part, axis=1), tl.max(only_q_part, axis=1)

    # With r off by the excess, which makes the sum of p exp(-r) one, the sums change by known amounts.
    change = log1p_rest(apart_sum)
    shift = change - apart_sum
    forward = tl.where(forward + change < 0, 0.0, forward + change)
    reverse = (reverse - change + apart_sum * shift) * reciprocal(1.0 - apart_sum)
    reverse = tl.where(reverse < 0, 0.0, reverse)
    forward = tl.where(only_p != 0, float("inf"), forward)
    reverse = tl.where(only_q != 0, float("inf"), reverse)
    # A zero weight leaves its part out: 0 * inf would be NaN.
    value = tl.where(forward_weight != 0, forward_weight * forward, 0.0)
    value += tl.where(reverse_weight != 0, reverse_weight * reverse, 0.0)
    # NaN, +inf or nothing but -inf in either row.
    sums = p_sum + q_sum
    whole = sums == sums
    value = tl.where(whole, value, float("nan"))
    tl.store(values + row, tl.where(counts, value, 0.0).to(tl.float32), mask=inside)
    at = statistics + row * STATISTICS
    tl.store(at + 0, tl.where(counts, a_top, 0.0).to(tl.float64), mask=inside)
    tl.store(at + 1, tl.where(counts, b_top, 0.0).to(tl.float64), mask=inside)
    tl.store(at + 2, tl.where(counts, tl.where(whole, p_scale, sums), 0.0), mask=inside)
    tl.store(at + 3, tl.where(counts, tl.where(whole, q_scale, sums), 0.0), mask=inside)
    tl.store(at + 4, tl.where(counts, centre, 0.0), mask=inside)
    tl.store(at + 5, tl.where(counts, -shift, 0.0), mask=inside)
    tl.store(at + 6, tl.where(counts, forward, 0.0), mask=inside)
    tl.store(at + 7, tl.where(counts, reverse, 0.0), mask=inside)


@triton.jit
def _mean_of_side(mean: tl.tensor, own_weight: tl.tensor) -> tl.tensor:
    """The mean that a side's gradient is taken about; an infinite divergence has no such gradient."""
    mean = tl.where(mean - mean == 0, mean, float("nan"))
    return tl.where(own_weight != 0, mean, 0.0).to(tl.float32)


@triton.jit
def _store_share(
    into: tl.tensor,
    value: tl.tensor,
    share: tl.tensor,
    wanted: tl.tensor,
    INTERPRETED: tl.constexpr,
) -> None:
    """value x share (0 where a NaN share belongs to a row that does not count: value is 0 there too)."""
    if into is not None:
        tl.store(into, rounded(value * share, into.dtype.element_ty, INTERPRETED), mask=wanted)


@triton.jit(do_not_specialize=["rows", "inner_a", "inner_b", "inner_u"])
def divergence_backward_kernel(
    teacher: tl.tensor, model: tl.tensor, uncond: tl.tensor, mask: tl.tensor, row_guidance: tl.tensor,
    statistics: tl.tensor, upstream: tl.tensor, dteacher: tl.tensor, dmodel: tl.tensor,
    duncond: tl.tensor, rows: tl.tensor, vocabulary: tl.tensor, guidance: tl.tensor,
    forward_weight: tl.tensor, reverse_weight: tl.tensor, inner_a: tl.tensor, outer_a: tl.tensor,
    within_a: tl.tensor, inner_b: tl.tensor, outer_b: tl.tensor, within_b: tl.tensor,
    inner_u: tl.tensor, outer_u: tl.tensor, within_u: tl.tensor, inverse_a: tl.tensor,
    inverse_low_a: tl.tensor, least_a: tl.tensor, inverse_b: tl.tensor, inverse_low_b: tl.tensor,
    least_b: tl.tensor, SAME: tl.constexpr, STATISTICS: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr, INTERPRETED: tl.constexpr,
) -> None:  # fmt: skip
    """Gradients to the teacher's, the model's and the unconditional logits (contiguous); None: not wanted.

    An entry > 1/2 is written last, as minus the sum of the others. ``upstream``: [N], float32.
    """
    row, inside, counts, starts, scale = _rows(
        rows, mask, row_guidance, guidance, (inner_a, inner_b, inner_u), (outer_a, outer_b, outer_u),
        (within_a, within_b, within_u), BLOCK_N,
    )  # fmt: skip
    at = statistics + row * STATISTICS
    a_top = tl.load(at + 0, mask=counts, other=0.0).to(tl.float32)
    b_top = tl.load(at + 1, mask=counts, other=0.0).to(tl.float32)
    p_scale = tl.load(at + 2, mask=counts, other=0.0).to(tl.float32)
    q_scale = tl.load(at + 3, mask=counts, other=0.0).to(tl.float32)
    centre = tl.load(at + 4, mask=counts, other=0.0).to(tl.float32)
    excess = tl.load(at + 5, mask=counts, other=0.0).to(tl.float32)
    a_mean = _mean_of_side(tl.load(at + 6, mask=counts, other=0.0), forward_weight)
    b_mean = -_mean_of_side(tl.load(at + 7, mask=counts, other=0.0), reverse_weight)
    factor = tl.load(upstream + row, mask=counts, other=0.0)
    to_a, to_b = factor * inverse_a, factor * inverse_b

    a_others = tl.zeros([BLOCK_N], tl.float64)
    b_others = tl.zeros([BLOCK_N], tl.float64)
    a_dominant = tl.full([BLOCK_N], -1, tl.int32)
    b_dominant = tl.full([BLOCK_N], -1, tl.int32)
    begin = row * vocabulary
    for first in range(0, vocabulary, BLOCK_V):
        cols = first + tl.arange(0, BLOCK_V)
        a, b = _chunk(teacher, model, uncond, scale, starts, counts, cols, vocabulary)
        p, q, r, apart, _, _ = _entries(
            a, b, a_top, b_top, p_scale, q_scale, centre, excess, inverse_a, inverse_low_a, least_a,
            inverse_b, inverse_low_b, least_b, SAME,
        )  # fmt: skip
        into = begin[:, None] + cols[None, :]
        within = (cols < vocabulary)[None, :]
        wanted = inside[:, None] & within
        if dteacher is not None or duncond is not None:
            grad = p * (to_a * forward_weight)[:, None] * (r - a_mean[:, None])
            grad += apart * (to_a * reverse_weight)[:, None]
            grad = tl.where(counts[:, None], grad, 0.0)
            large = p > 0.5
            a_dominant = tl.maximum(a_dominant, tl.max(tl.where(large, cols[None, :], -1), axis=1))
            a_others += tl.sum(tl.where(large | (within == 0), 0.0, grad), axis=1)
            if dteacher is not None:
                _store_share(dteacher + into, grad, scale[:, None], wanted, INTERPRETED)
            if duncond is not None:
                _store_share(duncond + into, grad, 1.0 - scale[:, None], wanted, INTERPRETED)
        if dmodel is not None:
            grad = q * (-to_b * reverse_weight)[:, None] * (r - b_mean[:, None])
            grad += apart * (-to_b * forward_weight)[:, None]
            grad = tl.where(counts[:, None], grad, 0.0)
            large = q > 0.5
            b_dominant = tl.maximum(b_dominant, tl.max(tl.where(large, cols[None, :], -1), axis=1))
            b_others += tl.sum(tl.where(large | (within == 0), 0.0, grad), axis=1)
            _store_share(dmodel + into, grad, 1.0, wanted, INTERPRETED)
    tl.debug_barrier()  # the dominant entries have been written by other threads
    a_value, b_value = (-a_others).to(tl.float32), (-b_others).to(tl.float32)
    wanted = counts & (a_dominant >= 0)
    into = begin + tl.where(a_dominant < 0, 0, a_dominant)
    if dteacher is not None:
        _store_share(dteacher + into, a_value, scale, wanted, INTERPRETED)
    if duncond is not None:
        _store_share(duncond + into, a_value, 1.0 - scale, wanted, INTERPRETED)
    if dmodel is not None:
        into = begin + tl.where(b_dominant < 0, 0, b_dominant)
        _store_share(dmodel + into, b_value, 1.0, counts & (b_dominant >= 0), INTERPRETED)
