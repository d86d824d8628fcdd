"""``masked_attention``: bidirectional attention over the keys and queries that take part."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from softdimo_fast.ops import _arguments as check
from softdimo_fast.ops import _backends, _library, _registration
from softdimo_fast.ops._explain import Explanation, explains
from softdimo_fast.ops.reference import attention as reference
from softdimo_fast.ops.reference.common import compute_dtype

NAME = "masked_attention"
SDPA = "sdpa"

# With tile registers our kernel multiplies bfloat16 faster than torch's does, masked or not.
_HAS_TILES = _library.has_tiles()


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
    derivative; ``backend="reference"`` and ``"cpp"`` have one. Where it was measured to be slower than
    the C++ kernel (bfloat16 on processors with AMX) it is passed over.

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
    if call.choice.backend == "cpp":
        output, *_ = _forward(*call[:-1])
        return output  # type: ignore[no-any-return]
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
    query, key, value = _autocast(query), _autocast(key), _autocast(value)
    choice = _choose((query, key, value), key_mask is None and query_mask is None, backend)
    return _Call(query, key, value, key_mask, query_mask, float(scale), choice)


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


def _choose(
    inputs: tuple[Tensor, Tensor, Tensor], dense: bool, backend: str | None
) -> _backends.Choice:
    obstacles = _backends.obstacles(inputs[0], "cpp")
    if dense and backend is None and _backends.PREFERRED != "reference":
        half = all(tensor.dtype == torch.bfloat16 for tensor in inputs)
        if half and _HAS_TILES and "cpp" not in obstacles:
            return _backends.Choice("cpp", "dense call: measured faster than torch's in bfloat16")
        return _backends.Choice(SDPA, "dense call (no masks): torch's fused attention")
    return _backends.choose(NAME, backend, obstacles)


# --------------------------------------------------------------------------------------------------
# torch: fake kernels, autograd, double backward


@torch.library.register_fake("softdimo::masked_attention")
def _fake(
    query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None, query_mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    rows, statistics = query.shape[:-1], compute_dtype(query, key, value)
    output = query.new_empty((*rows, value.shape[-1]))
    row_max, row_sum = (query.new_empty(rows, dtype=statistics) for _ in range(2))
    return output, row_max, row_sum


@torch.library.register_fake("softdimo::masked_attention_backward")
def _fake_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None,
    query_mask: Tensor | None, scale: float, row_max: Tensor, row_sum: Tensor, wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dquery, dkey, dvalue = (
        tensor.new_empty(tensor.shape if needed else 0)
        for tensor, needed in zip((query, key, value), wanted, strict=True)
    )
    return dquery, dkey, dvalue


# Where query, key and value stand in the forward operator's arguments.
_DIFFERENTIABLE = (0, 1, 2)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, row_max, row_sum = output
    ctx.mark_non_differentiable(row_max, row_sum)
    _registration.save_inputs(ctx, (*inputs, row_max, row_sum), output)


def _gradients(ctx: Any, grad: Tensor | None, *_unused: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 6
    wanted = [bool(ctx.needs_input_grad[position]) for position in _DIFFERENTIABLE]
    results = _backward(grad, *_registration.restore_inputs(ctx), wanted)
    return _registration.place(results, _DIFFERENTIABLE, wanted, 6)


def _composite_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None,
    query_mask: Tensor | None, scale: float, row_max: Tensor, row_sum: Tensor, wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The kernel's backward in plain torch: what its own derivative is taken of."""
    return reference.masked_attention_backward(
        grad, query, key, value, key_mask, query_mask, scale, wanted
    )


_forward = _registration.differentiable("softdimo::masked_attention", _gradients, _save)
_backward = _registration.register_double_backward(
    "softdimo::masked_attention_backward", _composite_backward
)
for _operator in ("softdimo::masked_attention", "softdimo::masked_attention_backward"):
    torch.library.register_vmap(_operator, _registration.vmap_refusal(NAME))
_registration.reference_operator(
    NAME,
    reference.masked_attention,
    reference.masked_attention_backward,
    differentiable=("query", "key", "value"),
)


@explains(masked_attention)
def _explain(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Explanation:
    call = _prepare(query, key, value, **options)
    backend = call.choice.backend
    weights = query.shape[:3].numel() * key.shape[2]
    output = query.shape[:3].numel() * value.shape[-1]
    kernel = {
        SDPA: "torch.nn.functional.scaled_dot_product_attention",
        "cpp": f"softdimo::masked_attention, {_library.cpu_isa()}",
    }.get(backend, "plain torch")
    return Explanation(
        operator=NAME,
        backend=backend,
        kernel=kernel,
        reason=call.choice.reason,
        notes=_notes(call),
        bytes=sum(tensor.numel() * tensor.element_size() for tensor in call[:3])
        + output * call.query.element_size(),
        flops=2 * weights * (query.shape[-1] + value.shape[-1]),
        exponentials=weights,
    )


def _notes(call: _Call) -> tuple[str, ...]:
    if call.choice.backend == SDPA:
        return ("torch's kernel: repeatable for equal shapes, not batch-invariant",)
    if call.choice.backend == "reference":
        return (
            "the [B, H, Lq, Lk] weights are written to memory, masked entries are computed too",
        )
    notes = []
    if call.key_mask is not None or call.query_mask is not None:
        notes.append("masked keys and unwanted queries are skipped: the floor counts them all")
    for name, tensor in zip(("query", "key", "value"), call[:3], strict=True):
        if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            notes.append(
                f"{name} has stride {tensor.stride(-1)} along d: one contiguous copy is made"
            )
    return tuple(notes)
