"""Triton kernels of ``soft_embedding``: e = softmax((z + noise) / T) E and its gradients, for D <= 128.

A program owns BLOCK_N rows of one group and walks V in tiles of BLOCK_V, whatever the batch: a row's bits
depend on that row alone. With N rows, V entries, s bytes a logit, W = BLOCK_N rows in flight:

    forward     s N V read, N V exponentials, 2 N V D flops in products; the codebook N / W times from L2
    dlogits     s N V read and written, N V exponentials, 2 N V D flops
    dcodebook   s N V read, N V exponentials, 2 N V D flops, then partial sums of fixed row ranges in order
    floor       max(bytes / copy rate, flops / product rate, exponentials / exp rate), each

Products: bfloat16 and float16 codebooks on tensor cores, p rounded (HIGH: in two terms), l summed from the
rounded p; float32 codebooks in float32; codebooks of at most 8 columns (NARROW) in float64 sums, because so
few columns may all cancel. Row maximum and row sum are kept apart: p = exp((y - max) / T) / sum.
"""

from __future__ import annotations

import triton
import triton.language as tl

from softdimo_fast.ops.triton.pieces import (
    add_compensated,
    exponential,
    gumbel,
    product,
    reciprocal,
    rounded,
    row_offset,
    scaled,
    two_term_inverse,
)


@triton.jit
def _logits_tile(
    start: tl.tensor, counts: tl.tensor, logits: tl.tensor, vocabulary: tl.tensor, cols: tl.tensor,
    seed: tl.tensor, row_id: tl.tensor, first: tl.tensor,
) -> tl.tensor:  # fmt: skip
    """y = z + noise of a tile: float32 without noise, float64 with it; -inf beside the rows and V.

    Beside large logits float32 cannot hold the noise, and near ties decide nearly one-hot rows.
    """
    wanted = counts[:, None] & (cols < vocabulary)[None, :]
    z = tl.load(logits + start[:, None] + cols[None, :], mask=wanted, other=float("-inf"))
    y = z.to(tl.float32)
    if seed is not None:
        noise = gumbel(tl.load(seed), tl.load(seed + 1), row_id, first, cols.shape[0])
        y = y.to(tl.float64) + noise
    return y


@triton.jit
def _row_ids(row: tl.tensor, inside: tl.tensor, row_ids: tl.tensor) -> tl.tensor:
    if row_ids is not None:
        return tl.load(row_ids + row, mask=inside, other=0)
    return row


@triton.jit
def _inverse_temperature(
    row: tl.tensor, counts: tl.tensor, row_temperature: tl.tensor, inverse: tl.tensor,
    inverse_low: tl.tensor,
) -> tl.tensor:  # fmt: skip
    """1 / T of each row, in two terms."""
    if row_temperature is not None:
        t = tl.load(row_temperature + row, mask=counts, other=1.0).to(tl.float32)
        high, low = two_term_inverse(t)
    else:
        high = tl.zeros(row.shape, tl.float32) + inverse
        low = tl.zeros(row.shape, tl.float32) + inverse_low
    return high, low


@triton.jit
def _counted(row: tl.tensor, inside: tl.tensor, mask: tl.tensor) -> tl.tensor:
    """Rows of this program whose logits count: not beyond the end, not [MASK] positions."""
    if mask is not None:
        return inside & (tl.load(mask + row, mask=inside, other=1) == 0)
    return inside


@triton.jit(do_not_specialize=["rows", "inner"])
def soft_embedding_forward_kernel(
    logits: tl.tensor, codebook: tl.tensor, mask: tl.tensor, mask_embedding: tl.tensor,
    row_temperature: tl.tensor, seed: tl.tensor, row_ids: tl.tensor, output: tl.tensor,
    row_max: tl.tensor, row_sum: tl.tensor, soft: tl.tensor, rows: tl.tensor, vocabulary: tl.tensor,
    groups: tl.tensor, inner: tl.tensor, stride_outer: tl.tensor, stride_inner: tl.tensor,
    inverse: tl.tensor, inverse_low: tl.tensor, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, NARROW: tl.constexpr, HARD: tl.constexpr,
    HIGH: tl.constexpr, INTERPRETED: tl.constexpr,
) -> None:  # fmt: skip
    """Rows in one pass with a running maximum. ``rows``: of each group. ``soft``: float32, may be None."""
    group = tl.program_id(0) % groups
    local = tl.program_id(0) // groups * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = local < rows
    row = local.to(tl.int64) * groups + group
    counts = _counted(row, inside, mask)
    start = row_offset(row, inner, stride_outer, stride_inner)
    row_id = _row_ids(row, inside, row_ids)
    inv, inv_low = _inverse_temperature(row, counts, row_temperature, inverse, inverse_low)
    columns = tl.arange(0, BLOCK_D)
    table = codebook + group.to(tl.int64) * vocabulary * WIDTH

    y_type: tl.constexpr = tl.float64 if seed is not None else tl.float32
    top = tl.full([BLOCK_N], float("-inf"), y_type)
    total = tl.zeros([BLOCK_N], tl.float64)
    acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float64 if NARROW else tl.float32)
    lost = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    best = tl.zeros([BLOCK_N], tl.int32)
    for first in range(0, vocabulary, BLOCK_V):
        cols = first + tl.arange(0, BLOCK_V)
        y = _logits_tile(start, counts, logits, vocabulary, cols, seed, row_id, first)
        tile_top = tl.max(y, axis=1)
        if HARD:
            tile_best = tl.min(tl.where(y == tile_top[:, None], cols[None, :], vocabulary), axis=1)
            best = tl.where(tile_top > top, tile_best, best)
        new_top = tl.maximum(top, tile_top)
        safe = tl.where(new_top == float("-inf"), 0.0, new_top)  # -inf - -inf would be NaN
        decay = exponential(scaled((top - safe).to(tl.float32), inv, inv_low))
        distance = (y - safe[:, None]).to(tl.float32)
        e = exponential(scaled(distance, inv[:, None], inv_low[:, None]))
        top = new_top
        total = total * decay
        if NARROW:
            acc = acc * decay[:, None]
            total += tl.sum(e, axis=1)
            for d in tl.static_range(WIDTH):
                column = tl.load(table + cols * WIDTH + d, mask=cols < vocabulary, other=0.0)
                one = tl.sum(e.to(tl.float64) * column.to(tl.float64)[None, :], axis=1)
                acc += tl.where(columns[None, :] == d, one[:, None], 0.0)
        else:
            at = table + cols[:, None] * WIDTH + columns[None, :]
            wanted = (cols < vocabulary)[:, None] & (columns < WIDTH)[None, :]
            entries = tl.load(at, mask=wanted, other=0.0)
            if entries.dtype == tl.float32:
                total += tl.sum(e, axis=1)
                acc = acc * decay[:, None]
                lost = lost * decay[:, None]
                acc, lost = add_compensated(acc, lost, product(e, entries, INTERPRETED))
            else:
                p = rounded(e, entries.dtype, INTERPRETED)
                total += tl.sum(p.to(tl.float32), axis=1)
                acc = acc * decay[:, None] + product(p, entries, INTERPRETED)
                if HIGH:
                    rest = rounded(e - p.to(tl.float32), entries.dtype, INTERPRETED)
                    total += tl.sum(rest.to(tl.float32), axis=1)
                    acc += product(rest, entries, INTERPRETED)

    value = ((acc + lost) * reciprocal(total)[:, None]).to(tl.float32)
    value = tl.where(counts[:, None], value, 0.0)
    at = row[:, None] * WIDTH + columns[None, :]
    inside_d = inside[:, None] & (columns < WIDTH)[None, :]
    tl.store(row_max + row, tl.where(counts, top, 0.0).to(tl.float64), mask=inside)
    tl.store(row_sum + row, tl.where(counts, total, 0.0), mask=inside)
    if soft is not None:
        tl.store(soft + at, value, mask=inside_d)
    kind: tl.constexpr = output.dtype.element_ty
    if HARD:
        # +inf, NaN or nothing but -inf in a row, or a temperature that is not one, leave no sum above 0.
        chosen = tl.load(table + best[:, None] * WIDTH + columns[None, :], mask=inside_d, other=0.0)
        value = tl.where((total > 0)[:, None], chosen.to(tl.float32), float("nan"))
    if mask is not None:
        given = tl.load(
            mask_embedding + group * WIDTH + columns, mask=columns < WIDTH, other=0.0
        ).to(tl.float32)
        value = tl.where(counts[:, None], value, given[None, :])
    tl.store(output + at, rounded(value, kind, INTERPRETED), mask=inside_d)


@triton.jit
def _probabilities(
    y: tl.tensor, top: tl.tensor, inv_total: tl.tensor, inv: tl.tensor, inv_low: tl.tensor
) -> tl.tensor:
    """p of a tile, and y - max."""
    distance = (y - top[:, None]).to(tl.float32)
    e = exponential(scaled(distance, inv[:, None], inv_low[:, None]))
    return e * inv_total[:, None], distance


@triton.jit
def _saved(
    row: tl.tensor, counts: tl.tensor, row_max: tl.tensor, row_sum: tl.tensor, seed: tl.tensor
) -> tl.tensor:
    """The maximum (as wide as y) and the inverse sum of each row."""
    top = tl.load(row_max + row, mask=counts, other=0.0)
    inv_total = reciprocal(tl.load(row_sum + row, mask=counts, other=1.0)).to(tl.float32)
    if seed is None:
        top = top.to(tl.float32)
    return top, inv_total


@triton.jit(do_not_specialize=["rows", "inner"])
def soft_embedding_dlogits_kernel(
    grad: tl.tensor, logits: tl.tensor, codebook: tl.tensor, mask: tl.tensor,
    row_temperature: tl.tensor, seed: tl.tensor, row_ids: tl.tensor, row_max: tl.tensor,
    row_sum: tl.tensor, soft: tl.tensor, dlogits: tl.tensor, dtemperature: tl.tensor, rows: tl.tensor,
    vocabulary: tl.tensor, groups: tl.tensor, inner: tl.tensor, stride_outer: tl.tensor,
    stride_inner: tl.tensor, inverse: tl.tensor, inverse_low: tl.tensor, WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, NARROW: tl.constexpr,
    INTERPRETED: tl.constexpr,
) -> None:  # fmt: skip
    """dz[v] = p[v] (g . E[v] - g . e) / T, and dT = -(1 / T) sum_v dz[v] (y[v] - mean y) of each row.

    An entry p > 1/2 is written last, as minus the sum of the others, where its own formula cancels.
    dlogits (contiguous) and dtemperature ([N], float32) may be None.
    """
    group = tl.program_id(0) % groups
    local = tl.program_id(0) // groups * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = local < rows
    row = local.to(tl.int64) * groups + group
    counts = _counted(row, inside, mask)
    start = row_offset(row, inner, stride_outer, stride_inner)
    row_id = _row_ids(row, inside, row_ids)
    inv, inv_low = _inverse_temperature(row, counts, row_temperature, inverse, inverse_low)
    top, inv_total = _saved(row, counts, row_max, row_sum, seed)
    columns = tl.arange(0, BLOCK_D)
    table = codebook + group.to(tl.int64) * vocabulary * WIDTH

    at = row[:, None] * WIDTH + columns[None, :]
    wanted_d = counts[:, None] & (columns < WIDTH)[None, :]
    g = tl.load(grad + at, mask=wanted_d, other=0.0)
    e = tl.load(soft + at, mask=wanted_d, other=0.0).to(tl.float32)
    delta = tl.sum(g.to(tl.float32) * e, axis=1)

    others = tl.zeros([BLOCK_N], tl.float64)  # sums over all but the dominant entry: of dz,
    plain = tl.zeros([BLOCK_N], tl.float64)  # of dz for dT,
    moment = tl.zeros([BLOCK_N], tl.float64)  # of dz (y - max),
    mean = tl.zeros([BLOCK_N], tl.float64)  # and of p (y - max)
    dominant = tl.full([BLOCK_N], -1, tl.int32)
    for first in range(0, vocabulary, BLOCK_V):
        cols = first + tl.arange(0, BLOCK_V)
        y = _logits_tile(start, counts, logits, vocabulary, cols, seed, row_id, first)
        p, distance = _probabilities(y, top, inv_total, inv, inv_low)
        if NARROW:
            t = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
            for d in tl.static_range(WIDTH):
                column = tl.load(table + cols * WIDTH + d, mask=cols < vocabulary, other=0.0)
                g_d = tl.load(grad + row * WIDTH + d, mask=counts, other=0.0).to(tl.float32)
                t += g_d[:, None] * column.to(tl.float32)[None, :]
        else:
            turned = table + cols[None, :] * WIDTH + columns[:, None]
            wanted = (cols < vocabulary)[None, :] & (columns < WIDTH)[:, None]
            entries = tl.load(turned, mask=wanted, other=0.0)
            t = product(g.to(entries.dtype), entries, INTERPRETED)
        dz = p * (t - delta[:, None]) * inv[:, None]
        large = p > 0.5
        dominant = tl.maximum(dominant, tl.max(tl.where(large, cols[None, :], -1), axis=1))
        if dlogits is not None:
            into = dlogits + row[:, None] * vocabulary + cols[None, :]
            kind: tl.constexpr = dlogits.dtype.element_ty
            kept = tl.where(counts[:, None], dz, 0.0)
            in_row = inside[:, None] & (cols < vocabulary)[None, :]
            tl.store(into, rounded(kept, kind, INTERPRETED), mask=in_row)
        rest = tl.where(large | (cols >= vocabulary)[None, :], 0.0, dz)
        others += tl.sum(rest, axis=1)
        if dtemperature is not None:
            # In float64: the sum of dz, which is all but nothing, counts times y - max.
            rest = rest.to(tl.float64)
            plain += tl.sum(rest, axis=1)
            reach = tl.where(p > 0, distance, 0.0).to(tl.float64)  # where nothing is, y = -inf
            moment += tl.sum(rest * reach, axis=1)
            mean += tl.sum(p.to(tl.float64) * reach, axis=1)
    if dlogits is not None:
        tl.debug_barrier()  # the entry has been written by another thread
        spot = dlogits + row * vocabulary + tl.where(dominant < 0, 0, dominant)
        value = rounded((-others).to(tl.float32), dlogits.dtype.element_ty, INTERPRETED)
        tl.store(spot, value, mask=counts & (dominant >= 0))
    if dtemperature is not None:
        # About the mean: the rounding of delta is common to a row's dz, and cancels there.
        total = tl.where(dominant >= 0, 0.0, plain)
        dt = -(moment - mean * total) * inv
        tl.store(dtemperature + row, tl.where(counts, dt, 0.0).to(tl.float32), mask=inside)


@triton.jit(do_not_specialize=["rows", "inner", "split_rows"])
def soft_embedding_dcodebook_kernel(
    grad: tl.tensor, logits: tl.tensor, mask: tl.tensor, row_temperature: tl.tensor, seed: tl.tensor,
    row_ids: tl.tensor, row_max: tl.tensor, row_sum: tl.tensor, partial: tl.tensor, rows: tl.tensor,
    split_rows: tl.tensor, vocabulary: tl.tensor, groups: tl.tensor, inner: tl.tensor,
    stride_outer: tl.tensor, stride_inner: tl.tensor, inverse: tl.tensor, inverse_low: tl.tensor,
    WIDTH: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
    NARROW: tl.constexpr, HALF: tl.constexpr, HIGH: tl.constexpr, INTERPRETED: tl.constexpr,
) -> None:  # fmt: skip
    """dE[v] = sum over rows of p[v] g: one tile of V and one range of ``split_rows`` rows of a group.

    HALF: the type the product is taken in, None for float32. partial: [splits, G, V, D].
    """
    tiles = tl.cdiv(vocabulary, BLOCK_V)
    first = tl.program_id(0) % tiles * BLOCK_V
    cols = first + tl.arange(0, BLOCK_V)
    group = tl.program_id(0) // tiles % groups
    split = tl.program_id(0) // tiles // groups
    columns = tl.arange(0, BLOCK_D)
    end = tl.minimum(rows, (split + 1) * split_rows)

    acc = tl.zeros([BLOCK_V, BLOCK_D], tl.float64 if NARROW else tl.float32)
    lost = tl.zeros([BLOCK_V, BLOCK_D], tl.float32)
    for begin in range(split * split_rows, end, BLOCK_N):
        local = begin + tl.arange(0, BLOCK_N)
        inside = local < end
        row = local.to(tl.int64) * groups + group
        counts = _counted(row, inside, mask)
        start = row_offset(row, inner, stride_outer, stride_inner)
        row_id = _row_ids(row, inside, row_ids)
        inv, inv_low = _inverse_temperature(row, counts, row_temperature, inverse, inverse_low)
        top, inv_total = _saved(row, counts, row_max, row_sum, seed)
        y = _logits_tile(start, counts, logits, vocabulary, cols, seed, row_id, first)
        p, _ = _probabilities(y, top, inv_total, inv, inv_low)
        p = tl.where(counts[:, None], p, 0.0)
        if NARROW:
            for d in tl.static_range(WIDTH):
                g_d = tl.load(grad + row * WIDTH + d, mask=counts, other=0.0)
                one = tl.sum(p.to(tl.float64) * g_d.to(tl.float64)[:, None], axis=0)
                acc += tl.where(columns[None, :] == d, one[:, None], 0.0)
        else:
            wanted = counts[:, None] & (columns < WIDTH)[None, :]
            at = grad + row[:, None] * WIDTH + columns[None, :]
            g = tl.load(at, mask=wanted, other=0.0)
            if HALF is None:
                term = product(tl.trans(p), g.to(tl.float32), INTERPRETED)
                acc, lost = add_compensated(acc, lost, term)
            else:
                g = g.to(HALF)
                high = rounded(p, HALF, INTERPRETED)
                acc += product(tl.trans(high), g, INTERPRETED)
                if HIGH:
                    low = rounded(p - high.to(tl.float32), HALF, INTERPRETED)
                    acc += product(tl.trans(low), g, INTERPRETED)
    into = (split * groups + group).to(tl.int64) * vocabulary * WIDTH
    at = partial + into + cols[:, None] * WIDTH + columns[None, :]
    wanted = (cols < vocabulary)[:, None] & (columns < WIDTH)[None, :]
    tl.store(at, acc + lost, mask=wanted)
