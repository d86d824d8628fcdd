"""``masked_attention``: bidirectional attention over the keys and queries that take part."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from softdimo_fast.ops import _arguments as check
from softdimo_fast.ops import _backends, _registration
from softdimo_fast.ops._explain import Explanation, explains
from softdimo_fast.ops.reference import attention as reference

NAME = "masked_attention"
SDPA = "sdpa"


class _Call(NamedTuple):
    """A checked call: the arguments of the operator, and the choice of a backend."""

    query: Tensor
    key: Tensor
    value: Tensor
    key_mask: Tensor | None
    query_mask: Tensor | None
    scale: float
    choice: _backends.Choice


def masked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    key_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Scaled dot-product attention in which True means *take part*.

    :math:`o_i = \sum_j \mathrm{softmax}_j(s \, q_i \cdot k_j)\, v_j` over the keys j that take part
    (Vaswani et al. 2017), bidirectional. Keys, values and queries that take no part are never read:
    NaN there is harmless, and they get exactly zero gradient.

    A call without masks and without ``backend`` is handed to torch's
    :func:`~torch.nn.functional.scaled_dot_product_attention`, whose fused kernels have no second
    derivative; ``backend="reference"`` has one.

    Args:
        query: ``[B, H, Lq, d]``, any strides.
        key: ``[B, H, Lk, d]``.
        value: ``[B, H, Lk, d_v]``; d_v may differ from d.
        key_mask: bool, broadcasts to ``[B, Lk]``: the keys that may be attended.
        query_mask: bool, broadcasts to ``[B, Lq]``: the queries that are wanted; the rows of the
            others are zero.
        scale: s, a number; default 1 / sqrt(d).
        backend: None chooses; ``"reference" | "cpp" | "cuda" | "triton"`` insist.

    Returns:
        ``[B, H, Lq, d_v]`` in the query's dtype. A row without any key is zero.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or value; the
            message names it.
    """
    call = _prepare(
        query, key, value, key_mask=key_mask, query_mask=query_mask, scale=scale, backend=backend
    )
    if call.choice.backend == SDPA:
        dtype = torch.promote_types(call.query.dtype, call.key.dtype)
        dtype = torch.promote_types(dtype, call.value.dtype)
        q, k, v = call.query.to(dtype), call.key.to(dtype), call.value.to(dtype)
        return scaled_dot_product_attention(q, k, v, scale=call.scale).to(call.query.dtype)
    return torch.ops.softdimo_reference.masked_attention(*call[:-1])  # type: ignore[no-any-return]


def _prepare(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    key_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> _Call:
    """Checks the arguments and chooses a backend."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check.require_floating(NAME, name, tensor)
    _check_shapes(query, key, value)
    device = query.device
    check.require_same_device(NAME, "query", device, key=key, value=value)
    key_mask = check.rows_mask(
        NAME, "key_mask", key_mask, (key.shape[0], key.shape[2]), device, "[B, Lk]"
    )
    query_mask = check.rows_mask(
        NAME, "query_mask", query_mask, (query.shape[0], query.shape[2]), device, "[B, Lq]"
    )
    if scale is None:
        scale = 1 / math.sqrt(query.shape[-1])
    check.require_number(NAME, "scale", scale)
    choice = _choose(query, key_mask is None and query_mask is None, backend)
    return _Call(
        _autocast(query),
        _autocast(key),
        _autocast(value),
        key_mask,
        query_mask,
        float(scale),
        choice,
    )


def _autocast(tensor: Tensor) -> Tensor:
    return check.autocast(tensor)  # type: ignore[return-value]


def _check_shapes(query: Tensor, key: Tensor, value: Tensor) -> None:
    if query.dim() != 4 or query.shape[-1] < 1:
        raise ValueError(
            f"{NAME}: query must have shape [B, H, Lq, d] with d >= 1, got {check.shape(query)}"
        )
    batch, heads, _, width = query.shape
    if key.dim() != 4 or (*key.shape[:2], key.shape[3]) != (batch, heads, width):
        raise ValueError(
            f"{NAME}: key must have shape [B, H, Lk, d] = [{batch}, {heads}, Lk, {width}], got "
            f"{check.shape(key)}"
        )
    if value.dim() != 4 or value.shape[:3] != key.shape[:3] or value.shape[-1] < 1:
        raise ValueError(
            f"{NAME}: value must have shape [B, H, Lk, d_v] = [{batch}, {heads}, {key.shape[2]}, "
            f"d_v] with d_v >= 1, got {check.shape(value)}"
        )


def _choose(query: Tensor, dense: bool, backend: str | None) -> _backends.Choice:
    if dense and backend is None and _backends.PREFERRED != "reference":
        return _backends.Choice(SDPA, "dense call (no masks): torch's fused attention")
    return _backends.choose(NAME, backend, _backends.obstacles(query))


_registration.reference_operator(
    NAME,
    reference.masked_attention,
    reference.masked_attention_backward,
    differentiable=("query", "key", "value"),
)


@explains(masked_attention)
def _explain(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Explanation:
    call = _prepare(query, key, value, **options)
    dense = call.choice.backend == SDPA
    weights = query.shape[:3].numel() * key.shape[2]
    output = query.shape[:3].numel() * value.shape[-1]
    kernel = "torch.nn.functional.scaled_dot_product_attention" if dense else "plain torch"
    if dense:
        note = "torch's kernel: repeatable for equal shapes, not batch-invariant"
    else:
        note = "the [B, H, Lq, Lk] weights are written to memory, masked entries are computed too"
    return Explanation(
        operator=NAME,
        backend=call.choice.backend,
        kernel=kernel,
        reason=call.choice.reason,
        notes=(note,),
        bytes=sum(tensor.numel() * tensor.element_size() for tensor in call[:3])
        + output * call.query.element_size(),
        flops=2 * weights * (query.shape[-1] + value.shape[-1]),
        exponentials=weights,
    )
