"""What the Triton kernels share: exponentials, rounding, Philox and Gumbel noise, lists of rows."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def exponential(x: tl.tensor) -> tl.tensor:
    """exp(x) for float32 x <= 0, to two units in the last place; 0 below the normal range, NaN for NaN.

    ``tl.exp`` rounds x log2(e) to float32, which costs |x| units; here x - n ln 2 takes two exact steps.
    """
    least: tl.constexpr = -87.0
    inside = tl.where(x < least, least, x)  # not tl.maximum, which loses a NaN
    n = tl.floor(inside * 1.4426950408889634 + 0.5)
    r = (inside - n * 0.693359375) - n * -2.1219444005469057e-4
    power = ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    return tl.where(x < least, 0.0, tl.exp2(r * 1.4426950408889634) * power)


@triton.jit
def scaled(distance: tl.tensor, inverse: tl.tensor, inverse_low: tl.tensor) -> tl.tensor:
    """distance / T with 1 / T as a sum of two, rounded like the quotient; -inf stays -inf at any T."""
    quotient = distance * inverse + distance * inverse_low
    return tl.where(distance == float("-inf"), float("-inf"), quotient)


@triton.jit
def two_term_inverse(temperature: tl.tensor) -> tl.tensor:
    """1 / T of each row in two float32 terms; NaN where T is not positive."""
    wide = 1.0 / temperature.to(tl.float64)
    wide = tl.where(temperature > 0, tl.where(wide > 3.4e38, 3.4e38, wide), float("nan"))
    high = wide.to(tl.float32)
    return high, (wide - high.to(tl.float64)).to(tl.float32)


@triton.jit
def reciprocal(x: tl.tensor) -> tl.tensor:
    """1 / x of float64 to 1e-13, NaN for 0 and NaN: without the call that a float64 division is."""
    guess = (1.0 / x.to(tl.float32)).to(tl.float64)
    return guess * (2.0 - x * guess)


@triton.jit
def rounded(x: tl.tensor, dtype: tl.constexpr, INTERPRETED: tl.constexpr) -> tl.tensor:
    """float32 ``x`` in ``dtype``, to nearest even: Triton's interpreter would cut bfloat16 off."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + (0x7FFF + ((bits >> 16) & 1))) & 0xFFFF0000
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(dtype)


@triton.jit
def product(a: tl.tensor, b: tl.tensor, INTERPRETED: tl.constexpr) -> tl.tensor:
    """a @ b, summed in float32; float32 factors are never cut to TF32.

    The interpreter multiplies bfloat16 wrongly, so there the factors, exact in float32, are widened.
    """
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def add_compensated(total: tl.tensor, lost: tl.tensor, term: tl.tensor) -> tl.tensor:
    """total + term, and what rounding has lost so far (Knuth's two-sum)."""
    added = total + term
    rest = added - total
    return added, lost + ((total - (added - rest)) + (term - rest))


# ---------------------------------------------------------------------------------------------------
# rows


@triton.jit
def row_offset(
    row: tl.tensor, inner: tl.tensor, stride_outer: tl.tensor, stride_inner: tl.tensor
) -> tl.tensor:
    """Where a row starts: rows lie in blocks of ``inner``, one stride from block to block, one within."""
    return (row // inner) * stride_outer + (row % inner) * stride_inner


# ---------------------------------------------------------------------------------------------------
# noise


@triton.jit
def uniform(
    key: tl.tensor, offset: tl.tensor, row_id: tl.tensor, first: tl.tensor, COUNT: tl.constexpr
) -> tl.tensor:
    """The uniforms on (0, 1) of ``COUNT`` entries of each row, from entry ``first``, a multiple of 4.

    Entry v has word v % 4 of Philox4x32-10 at (row_id low, row_id high, v // 4, offset): the bits of
    csrc/include/softdimo/philox.h.
    """
    block = first // 4 + tl.arange(0, COUNT // 4)
    zero = (row_id[:, None] * 0 + block[None, :] * 0).to(tl.uint32)
    c0 = zero + row_id.to(tl.uint32)[:, None]
    c1 = zero + (row_id >> 32).to(tl.uint32)[:, None]
    c2 = zero + block.to(tl.uint32)[None, :]
    c3 = zero + offset.to(tl.uint32)
    k0 = key.to(tl.uint32)
    k1 = (key >> 32).to(tl.uint32)
    m0 = tl.full(zero.shape, 0xD2511F53, tl.uint32)
    m1 = tl.full(zero.shape, 0xCD9E8D57, tl.uint32)
    for _ in tl.static_range(10):
        high0 = tl.umulhi(c0, m0)
        high1 = tl.umulhi(c2, m1)
        low0 = c0 * m0
        low1 = c2 * m1
        c0 = high1 ^ c1 ^ k0
        c1 = low1
        c2 = high0 ^ c3 ^ k1
        c3 = low0
        k0 = k0 + 0x9E3779B9
        k1 = k1 + 0xBB67AE85
    word = tl.interleave(tl.interleave(c0, c2), tl.interleave(c1, c3))
    u = (word.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    return tl.minimum(u, 0.99999994)


@triton.jit
def logarithm(x: tl.tensor, below_one: tl.tensor) -> tl.tensor:
    """log(x) in float64 to 1e-12, x > 0; ``below_one`` is 1 - x, used near 1, where ``x`` has lost it.

    By hand, because the libraries of float64 logarithms differ by device, and need three times the work.
    """
    bits = x.to(tl.int64, bitcast=True)
    exponent = ((bits >> 52) - 1023).to(tl.int32)
    mantissa = ((bits & 0xFFFFFFFFFFFFF) | 0x3FF0000000000000).to(tl.float64, bitcast=True)
    large = mantissa > 1.4142135623730951
    mantissa = tl.where(large, mantissa * 0.5, mantissa)
    exponent = tl.where(large, exponent + 1, exponent)
    near = (x > 0.7) & (x < 1.4)
    f = tl.where(near, -below_one, mantissa - 1.0)
    s = f * reciprocal(2.0 + f)
    z = s * s
    series = 1.0 / 17
    series = series * z + 1.0 / 15
    series = series * z + 1.0 / 13
    series = series * z + 1.0 / 11
    series = series * z + 1.0 / 9
    series = series * z + 1.0 / 7
    series = series * z + 1.0 / 5
    series = series * z + 1.0 / 3
    log_near = 2.0 * s + 2.0 * s * (z * series)
    return tl.where(near, log_near, exponent.to(tl.float64) * 0.6931471805599453 + log_near)


@triton.jit
def log1p_rest(d: tl.tensor) -> tl.tensor:
    """log(1 - d) + d in float64, to 1e-10 of itself."""
    series = d * (1.0 / 6) + 1.0 / 5
    series = series * d + 1.0 / 4
    series = series * d + 1.0 / 3
    series = series * d + 1.0 / 2
    return tl.where(tl.abs(d) < 0.01, -d * d * series, logarithm(1.0 - d, d) + d)


@triton.jit
def gumbel(
    key: tl.tensor, offset: tl.tensor, row_id: tl.tensor, first: tl.tensor, COUNT: tl.constexpr
) -> tl.tensor:
    """-log(-log(1 - u)) in float64, from :func:`uniform`."""
    u = uniform(key, offset, row_id, first, COUNT).to(tl.float64)
    rate = -logarithm(1.0 - u, u)
    return -logarithm(rate, 1.0 - rate)
