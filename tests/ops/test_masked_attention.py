"""masked_attention: accuracy, masks, special values, gradients, torch integration, dense dispatch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.checks import (
    assert_compiles_bitwise,
    assert_exports,
    assert_same_bits,
    gradients,
    operators_run,
)
from support.contract import assert_contract
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import scaled_dot_product_attention

from softdimo_fast.ops import _backends
from softdimo_fast.ops._explain import explain
from softdimo_fast.ops.masked_attention import masked_attention
from softdimo_fast.ops.reference import attention as reference

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
OPERATOR = "softdimo_reference::masked_attention"
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
)
def test_contract(
    lengths: tuple[int, int], widths: tuple[int, int], dtype: torch.dtype, sharpness: float,
    masked_keys: bool, masked_queries: bool, scale: float | None,
) -> None:  # fmt: skip
    """Values and gradients over at least 256 rows, to attention weights that are one-hot."""
    tensors = inputs(2, 2, *lengths, *widths, dtype, sharpness)
    key_mask, query_mask = masks(2, *lengths)
    options = (key_mask if masked_keys else None, query_mask if masked_queries else None, scale)
    upstream = torch.randn(2, 2, lengths[0], widths[1]).to(dtype)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return masked_attention(
            q, k, v, key_mask=options[0], query_mask=options[1], scale=scale, backend="reference"
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


def masked_call() -> Callable[..., Tensor]:
    key_mask, query_mask = masks()
    key_mask[1] = False

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return masked_attention(q, k, v, key_mask=key_mask, query_mask=query_mask, scale=0.7)

    return call


def dense_call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return masked_attention(q, k, v, backend="reference")


@pytest.mark.parametrize("call", [masked_call(), dense_call], ids=["masked", "dense"])
def test_gradcheck_and_gradgradcheck(call: Callable[..., Tensor]) -> None:
    """One sample of the masked call has no key at all."""
    leaves = [tensor.requires_grad_() for tensor in inputs()]
    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)


@pytest.mark.parametrize(
    "wanted", [w for w in itertools.product([False, True], repeat=3) if any(w)]
)
def test_frozen_inputs(wanted: tuple[bool, ...]) -> None:
    call, tensors = masked_call(), inputs(dtype=torch.float32)
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


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
def test_what_takes_no_part_is_never_read(garbage: float) -> None:
    tensors = inputs(dtype=torch.float32)
    key_mask, query_mask = masks()

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return masked_attention(q, k, v, key_mask=key_mask, query_mask=query_mask)

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


def test_masked_keys_equal_absent_keys() -> None:
    q, k, v = inputs()
    mask = torch.tensor([True, False, True, True, False, True])
    found = masked_attention(q, k, v, key_mask=mask)
    expected = scaled_dot_product_attention(q, k[:, :, mask], v[:, :, mask])
    torch.testing.assert_close(found, expected)


def test_unwanted_queries_are_zero_and_leave_the_others_alone() -> None:
    q, k, v = inputs(dtype=torch.float32)
    query_mask = torch.tensor([[True, False, True, True, False], [False, True, True, True, True]])
    found = masked_attention(q, k, v, query_mask=query_mask)
    full = masked_attention(q, k, v, backend="reference")
    shown = query_mask[:, None, :, None]
    assert_same_bits(found, torch.where(shown, full, 0))


def test_a_row_without_any_key_is_zero() -> None:
    tensors = inputs(dtype=torch.float32)
    key_mask = torch.ones(2, 6, dtype=torch.bool)
    key_mask[1] = False

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return masked_attention(q, k, v, key_mask=key_mask)

    value, grads = gradients(call, tensors)
    assert not bool(value[1].any())
    assert bool(value[0].any())
    for grad in grads:
        assert not bool(grad[1].any())
        assert bool(grad.isfinite().all())


@pytest.mark.parametrize("which", [0, 1, 2])
def test_nan_that_takes_part_stays_in_its_rows(which: int) -> None:
    tensors = [tensor.clone() for tensor in inputs(dtype=torch.float32)]
    clean = masked_attention(*tensors, backend="reference")
    tensors[which][0, 1, 2, 0] = math.nan
    found = masked_attention(*tensors, backend="reference")
    bad = torch.zeros_like(clean, dtype=torch.bool)
    if which == 0:
        bad[0, 1, 2] = True
    elif which == 1:
        bad[0, 1] = True
    else:
        bad[0, 1, :, 0] = True
    assert torch.equal(found.isnan(), bad)
    assert_same_bits(found[~bad], clean[~bad])


def test_full_masks_change_no_bit_and_masks_broadcast() -> None:
    q, k, v = inputs(dtype=torch.float32)
    expected = masked_attention(q, k, v, backend="reference")
    all_keys, all_queries = torch.ones(2, 6) > 0, torch.ones(2, 5) > 0
    assert_same_bits(masked_attention(q, k, v, key_mask=all_keys, query_mask=all_queries), expected)
    one = torch.tensor([True, True, False, True, True, False])
    assert_same_bits(
        masked_attention(q, k, v, key_mask=one),
        masked_attention(q, k, v, key_mask=one.expand(2, 6).clone()),
    )
    nothing = torch.zeros(1, dtype=torch.bool)
    assert not bool(masked_attention(q, k * math.nan, v, key_mask=nothing).any())
    assert not bool(masked_attention(q * math.nan, k, v, query_mask=nothing).any())


@pytest.mark.parametrize(
    "sizes", [(0, 2, 5, 6), (2, 0, 5, 6), (2, 2, 0, 6), (2, 2, 5, 0), (1, 1, 1, 1)]
)
@pytest.mark.parametrize("backend", [None, "reference"])
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


def test_strides_do_not_matter() -> None:
    q, k, v = inputs(dtype=torch.float32)
    key_mask, _ = masks()
    expected = masked_attention(q, k, v, key_mask=key_mask)
    spread = [
        torch.full((2, x.shape[2], 2, 2 * x.shape[3]), math.nan).transpose(1, 2)[..., ::2]
        for x in (q, k, v)
    ]
    for view, tensor in zip(spread, (q, k, v), strict=True):
        view.copy_(tensor)
    found = masked_attention(*spread, key_mask=key_mask)
    torch.testing.assert_close(found, expected)
    assert found.is_contiguous()


@pytest.mark.parametrize("dtypes", [
    (torch.bfloat16, torch.float32, torch.float32), (torch.float32, torch.float64, torch.float16),
    (torch.bfloat16, torch.float16, torch.bfloat16),
])  # fmt: skip
@pytest.mark.parametrize("backend", [None, "reference"])
def test_mixed_dtypes(dtypes: tuple[torch.dtype, ...], backend: str | None) -> None:
    tensors = [x.to(dtype) for x, dtype in zip(inputs(), dtypes, strict=True)]
    value, grads = gradients(lambda *x: masked_attention(*x, backend=backend), tensors)
    assert value.dtype == dtypes[0]
    assert tuple(grad.dtype for grad in grads) == dtypes
    truth = scaled_dot_product_attention(*(tensor.double() for tensor in tensors))
    eps = torch.finfo(dtypes[0]).eps
    torch.testing.assert_close(value.double(), truth, rtol=eps, atol=2 * eps)


# --------------------------------------------------------------------------------------------------
# torch


@pytest.mark.parametrize(
    ("masked", "requires_grad", "wanted"),
    [(False, False, [False, True, False]), (True, True, [True, True, True])],
)
def test_opcheck(masked: bool, requires_grad: bool, wanted: list[bool]) -> None:
    key_mask, query_mask = masks() if masked else (None, None)
    tensors = tuple(tensor.float().requires_grad_(requires_grad) for tensor in inputs())
    operators = torch.ops.softdimo_reference
    torch.library.opcheck(operators.masked_attention.default, (*tensors, key_mask, query_mask, 0.5))
    upstream = torch.randn(2, 2, 5, 3, requires_grad=requires_grad)
    torch.library.opcheck(
        operators.masked_attention_backward.default,
        (upstream, *tensors, key_mask, query_mask, 0.5, wanted),
    )


def test_compile_and_export_give_the_same_bits() -> None:
    tensors = inputs(dtype=torch.float32)
    assert_compiles_bitwise(masked_call(), *tensors)
    assert_exports(masked_call(), *tensors)


def test_autocast_casts_query_key_value() -> None:
    tensors = inputs(dtype=torch.float32)
    call = masked_call()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value, grads = gradients(call, tensors)
        dense = masked_attention(*tensors)
        wide = call(*(tensor.double() for tensor in tensors))
    halves = tuple(tensor.bfloat16() for tensor in tensors)
    expected, half_grads = gradients(call, halves)
    assert_same_bits(value, expected)
    for grad, half_grad in zip(grads, half_grads, strict=True):
        assert grad.dtype == torch.float32
        assert_same_bits(grad, half_grad.float())
    assert_same_bits(dense, scaled_dot_product_attention(*halves))
    assert wide.dtype == torch.float64


def test_gradients_of_an_expanded_upstream_and_twice() -> None:
    call, tensors = masked_call(), inputs(dtype=torch.float32)
    leaves = [tensor.requires_grad_() for tensor in tensors]
    value = call(*leaves)
    first = torch.autograd.grad(value.sum(), leaves, retain_graph=True)
    second = torch.autograd.grad(value, leaves, torch.ones_like(value))
    for a, b in zip(first, second, strict=True):
        assert_same_bits(a, b)


def test_fake_tensors() -> None:
    with FakeTensorMode():
        q, k = torch.empty(2, 3, 5, 4, dtype=torch.bfloat16), torch.empty(2, 3, 6, 4)
        found = masked_attention(
            q, k, torch.empty(2, 3, 6, 7), key_mask=torch.ones(6, dtype=torch.bool)
        )
    assert found.shape == (2, 3, 5, 7)
    assert found.dtype == torch.bfloat16


def test_vmap_and_jvp_raise_clearly() -> None:
    call, tensors = masked_call(), inputs(dtype=torch.float32)
    with pytest.raises(RuntimeError, match=r"masked_attention does not support torch\.vmap"):
        torch.func.vmap(call)(*(tensor[None] for tensor in tensors))
    with pytest.raises(RuntimeError, match="query carries a forward-mode tangent"):
        torch.func.jvp(call, tensors, tensors)


# --------------------------------------------------------------------------------------------------
# Which kernel


def test_dense_calls_go_to_torch_and_masked_ones_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = inputs(dtype=torch.float32)
    assert operators_run(lambda: masked_attention(*tensors)) == []
    assert_same_bits(masked_attention(*tensors), scaled_dot_product_attention(*tensors))
    assert_same_bits(
        masked_attention(*tensors, scale=0.3), scaled_dot_product_attention(*tensors, scale=0.3)
    )
    assert operators_run(lambda: masked_attention(*tensors, backend="reference")) == [OPERATOR]
    assert operators_run(lambda: masked_call()(*tensors)) == [OPERATOR]
    monkeypatch.setattr(_backends, "PREFERRED", "reference")
    assert operators_run(lambda: masked_attention(*tensors)) == [OPERATOR]


def test_explain_names_the_kernel_and_the_floor() -> None:
    tensors = inputs(dtype=torch.bfloat16)
    dense = explain(masked_attention, *tensors)
    assert dense.backend == "sdpa"
    assert dense.kernel == "torch.nn.functional.scaled_dot_product_attention"
    masked = explain(masked_attention, *tensors, key_mask=torch.ones(6, dtype=torch.bool))
    assert masked.backend == "reference"
    weights = 2 * 2 * 5 * 6
    for explanation in (dense, masked):
        assert explanation.flops == 2 * weights * (4 + 3)
        assert explanation.exponentials == weights
        assert explanation.bytes == 2 * 4 * (5 * 4 + 6 * 4 + 6 * 3 + 5 * 3)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"query": [1.0]}, TypeError, "query must be a torch.Tensor, got list"),
        ({"key": torch.ones(2, 2, 6, 4).int()}, TypeError, "key must have dtype"),
        ({"value": None}, TypeError, "value must be a torch.Tensor, got NoneType"),
        ({"query": torch.ones(2, 5, 4)}, ValueError, r"query must have shape \[B, H, Lq, d\]"),
        ({"query": torch.ones(2, 2, 5, 0)}, ValueError, "query must have .* d >= 1"),
        ({"key": torch.ones(2, 2, 6, 5)}, ValueError, r"key must have shape .* \[2, 2, Lk, 4\]"),
        ({"key": torch.ones(2, 1, 6, 4)}, ValueError, "key must have shape"),
        ({"value": torch.ones(2, 2, 5, 3)}, ValueError, r"value must have .* \[2, 2, 6, d_v\]"),
        ({"value": torch.ones(2, 2, 6, 0)}, ValueError, "value must have shape .* d_v >= 1"),
        ({"key": torch.ones(2, 2, 6, 4, device="meta")}, ValueError, "key is on meta"),
        ({"key_mask": torch.ones(2, 6)}, TypeError, "key_mask must have dtype bool"),
        ({"key_mask": torch.ones(2, 5) > 0}, ValueError, r"key_mask must .*\[B, Lk\] = \[2, 6\]"),
        ({"query_mask": [True]}, TypeError, "query_mask must be a bool tensor or None"),
        ({"query_mask": torch.ones(6) > 0}, ValueError, "query_mask must broadcast to the rows"),
        ({"scale": math.inf}, ValueError, "scale must be finite"),
        ({"scale": "1"}, TypeError, "scale must be a float, got str"),
        ({"backend": "sdpa"}, ValueError, "backend must be None or one of"),
        ({"backend": "cpp"}, ValueError, r"backend='cpp' cannot run: this operator has no C\+\+"),
        (
            {"backend": "cuda"},
            ValueError,
            "backend='cuda' cannot run: this operator has no CUDA kernel",
        ),
    ],
)
def test_bad_arguments_are_named(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    query, key, value = inputs(dtype=torch.float32)
    tensors = {"query": query, "key": key, "value": value} | options
    with pytest.raises(error, match="masked_attention: " + message):
        masked_attention(**tensors)
