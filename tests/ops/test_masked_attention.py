"""masked_attention: accuracy, masks, special values, gradients, what a result may depend on."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.attention import BACKENDS, DTYPES, composed, dense_call, inputs, masked_call, masks
from support.checks import assert_same_bits, gradients
from support.contract import assert_contract
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from softdimo_fast.ops.masked_attention import masked_attention
from softdimo_fast.ops.reference import attention as reference

# --------------------------------------------------------------------------------------------------
# Values and gradients


@given(
    lengths=st.sampled_from([(80, 80), (65, 17), (64, 1), (70, 131)]),
    widths=st.sampled_from([(1, 1), (8, 8), (33, 5), (16, 40)]),
    dtype=st.sampled_from(DTYPES),
    sharpness=st.sampled_from([0.0, 1.0, 10.0, 100.0]),
    masked_keys=st.booleans(),
    masked_queries=st.booleans(),
    scale=st.sampled_from([None, 0.3]),
    backend=st.sampled_from(BACKENDS),
)
def test_contract(
    lengths: tuple[int, int], widths: tuple[int, int], dtype: torch.dtype, sharpness: float,
    masked_keys: bool, masked_queries: bool, scale: float | None, backend: str,
) -> None:  # fmt: skip
    """Values and gradients over at least 256 rows, to attention weights that are one-hot."""
    tensors = inputs(2, 2, *lengths, *widths, dtype, sharpness)
    key_mask, query_mask = masks(2, *lengths)
    options = (key_mask if masked_keys else None, query_mask if masked_queries else None, scale)
    upstream = torch.randn(2, 2, lengths[0], widths[1]).to(dtype)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return masked_attention(
            q, k, v, key_mask=options[0], query_mask=options[1], scale=scale, backend=backend
        )

    value, grads = gradients(ours, tensors, upstream)
    yard, yard_grads = gradients(lambda *x: composed(*x, *options), tensors, upstream)
    wide = tuple(tensor.double() for tensor in tensors)
    truth, true_grads = gradients(lambda *x: composed(*x, *options), wide, upstream)
    assert value.dtype == dtype
    assert_contract(value, yard, truth)
    for name, mine, theirs, exact in zip(
        ("query", "key", "value"), grads, yard_grads, true_grads, strict=True
    ):
        assert mine.dtype == dtype
        # Where attention is one-hot or over one key, a gradient is zero up to rounding.
        size = float(exact.norm()) / math.sqrt(exact.numel())
        if size > 1e-6:
            assert_contract(mine, theirs, exact, what=name)
        else:
            bound = 4 * torch.finfo(dtype).eps * float(upstream.norm()) * max(sharpness, 1)
            assert float(mine.abs().max()) <= bound, name


@pytest.mark.parametrize("masked", [(True, True), (True, False), (False, True)])
def test_explicit_backward_is_the_derivative_of_the_forward(masked: tuple[bool, bool]) -> None:
    tensors = inputs()
    key_mask, query_mask = (
        mask if used else None for mask, used in zip(masks(), masked, strict=True)
    )
    upstream = torch.randn(2, 2, 5, 3, dtype=torch.float64)
    _, expected = gradients(
        lambda *x: reference.masked_attention(*x, key_mask, query_mask, 0.7), tensors, upstream
    )
    found = reference.masked_attention_backward(
        upstream, *tensors, key_mask, query_mask, 0.7, [True] * 3
    )
    for first, second in zip(found, expected, strict=True):
        torch.testing.assert_close(first, second)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("make", [masked_call, dense_call])
def test_gradcheck_and_gradgradcheck(
    make: Callable[[str], Callable[..., Tensor]], backend: str
) -> None:
    call = make(backend)
    leaves = [tensor.requires_grad_() for tensor in inputs()]
    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "wanted", [w for w in itertools.product([False, True], repeat=3) if any(w)]
)
def test_frozen_inputs(wanted: tuple[bool, ...], backend: str) -> None:
    call, tensors = masked_call(backend), inputs(dtype=torch.float32)
    _, expected = gradients(call, tensors)
    leaves = [t.detach().requires_grad_(w) for t, w in zip(tensors, wanted, strict=True)]
    call(*leaves).sum().backward()
    for leaf, needed, grad in zip(leaves, wanted, expected, strict=True):
        if needed:
            assert leaf.grad is not None
            assert_same_bits(leaf.grad, grad)
        else:
            assert leaf.grad is None


def test_backward_computes_only_what_is_wanted() -> None:
    tensors, upstream = inputs(), torch.randn(2, 2, 5, 3, dtype=torch.float64)
    found = reference.masked_attention_backward(
        upstream, *tensors, None, None, 1.0, [False, True, False]
    )
    assert [tuple(grad.shape) for grad in found] == [(0,), (2, 2, 6, 4), (0,)]


# --------------------------------------------------------------------------------------------------
# Masks and special values


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
def test_what_takes_no_part_is_never_read(garbage: float, backend: str) -> None:
    tensors = inputs(dtype=torch.float32)
    key_mask, query_mask = masks()

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return masked_attention(q, k, v, key_mask=key_mask, query_mask=query_mask, backend=backend)

    shown = (query_mask, key_mask, key_mask)
    dirty = tuple(
        torch.where(mask[:, None, :, None], tensor, garbage)
        for tensor, mask in zip(tensors, shown, strict=True)
    )
    upstream = torch.where(query_mask[:, None, :, None], torch.randn(2, 2, 5, 3), garbage)
    value, grads = gradients(call, tensors, upstream)
    dirty_value, dirty_grads = gradients(call, dirty, upstream)
    assert_same_bits(value, dirty_value)
    assert bool(value.isfinite().all())
    for grad, dirty_grad, mask in zip(grads, dirty_grads, shown, strict=True):
        assert_same_bits(grad, dirty_grad)
        assert bool(grad.isfinite().all())
        assert not bool(grad.transpose(1, 2)[~mask].any())


@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_keys_equal_absent_keys(backend: str) -> None:
    q, k, v = inputs()
    mask = torch.tensor([True, False, True, True, False, True])
    found = masked_attention(q, k, v, key_mask=mask, backend=backend)
    expected = scaled_dot_product_attention(q, k[:, :, mask], v[:, :, mask])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_unwanted_queries_are_zero_and_leave_the_others_alone(backend: str) -> None:
    q, k, v = inputs(dtype=torch.float32)
    query_mask = torch.tensor([[True, False, True, True, False], [False, True, True, True, True]])
    found = masked_attention(q, k, v, query_mask=query_mask, backend=backend)
    full = masked_attention(q, k, v, backend=backend)
    shown = query_mask[:, None, :, None]
    assert_same_bits(found, torch.where(shown, full, 0))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_without_any_key_is_zero(backend: str) -> None:
    tensors = inputs(dtype=torch.float32)
    key_mask = torch.ones(2, 6, dtype=torch.bool)
    key_mask[1] = False

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return masked_attention(q, k, v, key_mask=key_mask, backend=backend)

    value, grads = gradients(call, tensors)
    assert not bool(value[1].any())
    assert bool(value[0].any())
    for grad in grads:
        assert not bool(grad[1].any())
        assert bool(grad.isfinite().all())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("which", [0, 1, 2])
def test_nan_that_takes_part_stays_in_its_rows(which: int, backend: str) -> None:
    tensors = [tensor.clone() for tensor in inputs(dtype=torch.float32)]
    clean = masked_attention(*tensors, backend=backend)
    tensors[which][0, 1, 2, 0] = math.nan
    found = masked_attention(*tensors, backend=backend)
    bad = torch.zeros_like(clean, dtype=torch.bool)
    if which == 0:
        bad[0, 1, 2] = True
    elif which == 1:
        bad[0, 1] = True
    else:
        bad[0, 1, :, 0] = True
    assert torch.equal(found.isnan(), bad)
    assert_same_bits(found[~bad], clean[~bad])


@pytest.mark.parametrize("backend", BACKENDS)
def test_full_masks_change_no_bit_and_masks_broadcast(backend: str) -> None:
    q, k, v = inputs(dtype=torch.float32)
    expected = masked_attention(q, k, v, backend=backend)
    all_keys, all_queries = torch.ones(2, 6) > 0, torch.ones(2, 5) > 0
    assert_same_bits(
        masked_attention(q, k, v, key_mask=all_keys, query_mask=all_queries, backend=backend),
        expected,
    )
    one = torch.tensor([True, True, False, True, True, False])
    assert_same_bits(
        masked_attention(q, k, v, key_mask=one, backend=backend),
        masked_attention(q, k, v, key_mask=one.expand(2, 6).clone(), backend=backend),
    )
    nothing = torch.zeros(1, dtype=torch.bool)
    assert not bool(masked_attention(q, k * math.nan, v, key_mask=nothing, backend=backend).any())
    assert not bool(masked_attention(q * math.nan, k, v, query_mask=nothing, backend=backend).any())


@pytest.mark.parametrize(
    "sizes", [(0, 2, 5, 6), (2, 0, 5, 6), (2, 2, 0, 6), (2, 2, 5, 0), (1, 1, 1, 1)]
)
@pytest.mark.parametrize("backend", [None, *BACKENDS])
def test_small_shapes(sizes: tuple[int, int, int, int], backend: str | None) -> None:
    batch, heads, queries, keys = sizes
    tensors = inputs(*sizes, dtype=torch.float32)
    value, grads = gradients(lambda *x: masked_attention(*x, backend=backend), tensors)
    assert value.shape == (batch, heads, queries, 3)
    assert [grad.shape for grad in grads] == [tensor.shape for tensor in tensors]
    if keys == 0:
        assert not bool(value.any())
    if keys == 1:
        assert_same_bits(value, tensors[2].expand(value.shape))


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_do_not_matter(backend: str) -> None:
    q, k, v = inputs(dtype=torch.float32)
    key_mask, _ = masks()
    expected = masked_attention(q, k, v, key_mask=key_mask, backend=backend)
    spread = [
        torch.full((2, x.shape[2], 2, 2 * x.shape[3]), math.nan).transpose(1, 2)[..., ::2]
        for x in (q, k, v)
    ]
    for view, tensor in zip(spread, (q, k, v), strict=True):
        view.copy_(tensor)
    found = masked_attention(*spread, key_mask=key_mask, backend=backend)
    torch.testing.assert_close(found, expected)
    assert found.is_contiguous()


@pytest.mark.parametrize("dtypes", [
    (torch.bfloat16, torch.float32, torch.float32), (torch.float32, torch.float64, torch.float16),
    (torch.bfloat16, torch.float16, torch.bfloat16),
])  # fmt: skip
@pytest.mark.parametrize("backend", [None, *BACKENDS])
def test_mixed_dtypes(dtypes: tuple[torch.dtype, ...], backend: str | None) -> None:
    tensors = [x.to(dtype) for x, dtype in zip(inputs(), dtypes, strict=True)]
    value, grads = gradients(lambda *x: masked_attention(*x, backend=backend), tensors)
    assert value.dtype == dtypes[0]
    assert tuple(grad.dtype for grad in grads) == dtypes
    truth = scaled_dot_product_attention(*(tensor.double() for tensor in tensors))
    eps = torch.finfo(dtypes[0]).eps
    torch.testing.assert_close(value.double(), truth, rtol=eps, atol=2 * eps)


# --------------------------------------------------------------------------------------------------
# What the C++ kernels' results may depend on


def ragged_case(
    lengths: tuple[int, int], dtype: torch.dtype, widths: tuple[int, int] = (24, 20)
) -> tuple[tuple[Tensor, ...], Tensor, Tensor, Tensor]:
    """Inputs, upstream gradient and masks; as many keys as the sample wants, none in one sample."""
    queries, keys = lengths
    shares = torch.tensor([0.0, 0.1, 0.5, 1.0])[:, None]
    tensors = inputs(4, 2, queries, keys, *widths, dtype)
    upstream = torch.randn(4, 2, queries, widths[1]).to(dtype)
    return tensors, upstream, torch.rand(4, keys) < shares, torch.rand(4, queries) < shares.flip(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_do_not_depend_on_the_batch(dtype: torch.dtype) -> None:
    """A sample's values and gradients have the same bits alone, and in memory of another layout."""
    tensors, upstream, key_mask, query_mask = ragged_case((130, 210), dtype)

    def run(pick: slice) -> tuple[Tensor, ...]:
        value, grads = gradients(
            lambda q, k, v: masked_attention(
                q, k, v, key_mask=key_mask[pick], query_mask=query_mask[pick], backend="cpp"
            ),
            [tensor[pick] for tensor in tensors],
            upstream[pick],
        )
        return value, *grads

    together = run(slice(None))
    for i in range(4):
        for found, expected in zip(run(slice(i, i + 1)), together, strict=True):
            assert_same_bits(found, expected[i : i + 1])
    tensors = tuple(tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in tensors)
    for found, expected in zip(run(slice(None)), together, strict=True):
        assert_same_bits(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_query_does_not_depend_on_its_neighbours(dtype: torch.dtype) -> None:
    (q, k, v), upstream, key_mask, _ = ragged_case((230, 40), dtype)

    def run(pick: Tensor) -> tuple[Tensor, Tensor]:
        value, grads = gradients(
            lambda q: masked_attention(q, k, v, key_mask=key_mask, backend="cpp"),
            [q[:, :, pick]],
            upstream[:, :, pick],
        )
        return value, grads[0]

    everything = run(torch.arange(230))
    for pick in (torch.tensor([7]), torch.arange(90, 190), torch.randperm(230)):
        for found, expected in zip(run(pick), everything, strict=True):
            assert_same_bits(found, expected[:, :, pick])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_depends_on_the_number_of_threads(dtype: torch.dtype) -> None:
    """Few heads and many threads: the queries of a head are split."""
    tensors, upstream, key_mask, query_mask = ragged_case((500, 600), dtype)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 7):
        torch.set_num_threads(threads)
        try:
            results.append(
                gradients(
                    lambda q, k, v: masked_attention(
                        q, k, v, key_mask=key_mask, query_mask=query_mask, backend="cpp"
                    ),
                    tensors,
                    upstream,
                )
            )
        finally:
            torch.set_num_threads(before)
    for value, grads in results[1:]:
        assert_same_bits(value, results[0][0])
        for mine, first in zip(grads, results[0][1], strict=True):
            assert_same_bits(mine, first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("sharpness", "scale"), [(1.0, None), (20.0, None), (1.0, -0.7), (20.0, -0.3)]
)
@pytest.mark.parametrize("lengths", [(1200, 1100), (130, 2600), (70, 90)])
def test_long_sequences(
    lengths: tuple[int, int], sharpness: float, scale: float | None, dtype: torch.dtype
) -> None:
    """More keys than one block of the forward, or of the backward, holds; scores turned around."""
    tensors = inputs(1, 2, *lengths, 24, 20, dtype, sharpness)
    key_mask, query_mask = masks(1, *lengths)
    upstream = torch.randn(1, 2, lengths[0], 20).to(dtype)

    def ours(*x: Tensor) -> Tensor:
        return masked_attention(
            *x, key_mask=key_mask, query_mask=query_mask, scale=scale, backend="cpp"
        )

    def theirs(*x: Tensor) -> Tensor:
        return composed(*x, key_mask, query_mask, scale)

    value, grads = gradients(ours, tensors, upstream)
    yard, yard_grads = gradients(theirs, tensors, upstream)
    truth, true_grads = gradients(theirs, [t.double() for t in tensors], upstream)
    assert_contract(value, yard, truth)
    for name, *found in zip(("query", "key", "value"), grads, yard_grads, true_grads, strict=True):
        assert_contract(*found, what=name)


def test_scores_of_minus_infinity_are_no_weight() -> None:
    """A block of keys whose scores are all -inf adds nothing; a row of nothing else is NaN."""
    q, k, v = inputs(1, 1, 3, 1200, 1, 5, torch.float32)
    q = q.abs() + 1
    k[:, :, :600] = -math.inf
    found = masked_attention(q, k, v, backend="cpp")
    torch.testing.assert_close(found, scaled_dot_product_attention(q, k[:, :, 600:], v[:, :, 600:]))
    assert bool(masked_attention(q, k[:, :, :600], v[:, :, :600], backend="cpp").isnan().all())
