"""Specification of ``linear_soft_embedding``: e = softmax((h @ W^T + b) / T) @ E, slice by slice.

Forward and backward walk over slices of rows. A slice's logits, and every other temporary made for
it, take at most ``SLICE_BYTES`` (one row, if a single row takes more): they stay in the cache, and
the memory of a call does not grow with N x V. Where the slices begin follows from the shapes alone.
Kept logits are computed slice by slice too, so keeping or recomputing them gives the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from softdimo_fast.ops.reference.common import compute_dtype, ieee_float32, sum_to_shape
from softdimo_fast.ops.reference.soft_embedding import soft_embedding, soft_embedding_backward

SLICE_BYTES = 4 * 2**20

Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


class _Rows(NamedTuple):
    """A call, or a slice of its rows: leading shape flattened to N, G = 1 where nothing is grouped.

    Everything but ``hidden`` is in the compute dtype.
    """

    hidden: Tensor  # [N, H]
    weight: Tensor  # [G, V, H]
    table: Tensor  # [G, V, D]
    bias: Tensor | None  # [R, G, V]
    bias_row: Tensor | None  # [N]: the row of `bias` that each row adds
    row_temperature: Tensor | None  # [N, G]
    mask: Tensor | None  # [N, G]
    mask_embedding: Tensor | None  # [G, D]


def slice_rows(groups: int, vocabulary: int, hidden_width: int, width: int, itemsize: int) -> int:
    """How many rows a slice has."""
    return max(1, SLICE_BYTES // (itemsize * groups * max(vocabulary, hidden_width, width)))


def output_shapes(hidden: Tensor, weight: Tensor, codebook: Tensor) -> tuple[list[int], list[int]]:
    """The shapes of the result, ``[..., (G,) D]``, and of the logits, ``[..., (G,) V]``."""
    rows = [*hidden.shape[:-1], *weight.shape[:-2]]
    return [*rows, codebook.shape[-1]], [*rows, weight.shape[-2]]


def linear_soft_embedding(
    hidden: Tensor, weight: Tensor, codebook: Tensor, bias: Tensor | None, temperature: float,
    row_temperature: Tensor | None, mask: Tensor | None, mask_embedding: Tensor | None,
    keep_logits: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The expected embedding of every row in the codebook's dtype, and the logits if they are kept.

    ``mask``: already of the rows' shape (``[..., G]`` when grouped). Kept logits have the compute
    dtype; logits that are not kept are an empty tensor.
    """
    call = _flatten(hidden, weight, codebook, bias, row_temperature, mask, mask_embedding)
    groups, vocabulary, _ = call.weight.shape
    count = call.hidden.shape[0]
    output = codebook.new_empty(count, groups, codebook.shape[-1])
    logits = call.weight.new_empty((count, groups, vocabulary) if keep_logits else 0)
    for rows, part in _slices(call):
        z = _logits(part)
        output[rows] = soft_embedding(
            z, part.table, temperature, part.row_temperature, part.mask, part.mask_embedding,
            None, None, False, None, None,
        )  # fmt: skip
        if keep_logits:
            logits[rows] = z
    output_shape, logits_shape = output_shapes(hidden, weight, codebook)
    return output.reshape(output_shape), logits.reshape(logits_shape if keep_logits else [0])


def linear_soft_embedding_backward(
    grad: Tensor, hidden: Tensor, weight: Tensor, codebook: Tensor, bias: Tensor | None,
    temperature: float, row_temperature: Tensor | None, mask: Tensor | None,
    mask_embedding: Tensor | None, logits: Tensor | None, wanted: list[bool],
) -> Gradients:  # fmt: skip
    """Gradients to (hidden, weight, codebook, bias, row_temperature, mask_embedding).

    ``logits``: what forward kept, or None to compute every slice again. A gradient that is not
    wanted is an empty tensor. With dz what the soft embedding sends to its logits:
    dh = dz @ W, dW = sum over rows of dz^T h, db = sum over rows of dz.
    """
    call = _flatten(hidden, weight, codebook, bias, row_temperature, mask, mask_embedding)
    upstream = grad.reshape(-1, *call.table.shape[::2])
    kept = None if logits is None else logits.reshape(-1, *call.weight.shape[:2])
    sums = _zeros(call, wanted)
    soft_wanted = [wanted[0] or wanted[1] or wanted[3], wanted[2], wanted[4], wanted[5]]
    for rows, part in _slices(call):
        z = _logits(part) if kept is None else kept[rows]
        dlogits, dtable, dtemperature, dmask = soft_embedding_backward(
            upstream[rows], z, part.table, temperature, part.row_temperature, part.mask,
            part.mask_embedding, None, None, False, None, None, soft_wanted,
        )  # fmt: skip
        _add_linear(sums, rows, part, dlogits, wanted)
        if wanted[2]:
            sums.table.add_(dtable)
        if wanted[4]:
            sums.row_temperature[rows] = dtemperature
        if wanted[5]:
            sums.mask_embedding.add_(dmask)
    inputs = (hidden, weight, codebook, bias, row_temperature, mask_embedding)
    return _in_shape(sums, inputs, mask, wanted)


# --------------------------------------------------------------------------------------------------
# Rows and slices of them


def _flatten(
    hidden: Tensor, weight: Tensor, codebook: Tensor, bias: Tensor | None,
    row_temperature: Tensor | None, mask: Tensor | None, mask_embedding: Tensor | None,
) -> _Rows:  # fmt: skip
    dtype = compute_dtype(hidden, weight, codebook, bias, row_temperature, mask_embedding)
    vocabulary, width = codebook.shape[-2:]
    groups = weight.shape[0] if weight.dim() == 3 else 1
    bias_rows, bias_row = None, None
    if bias is not None:
        own, full = _bias_shape(bias, weight)
        bias_rows = bias.to(dtype).expand(full).reshape(-1, groups, vocabulary)
        numbers = torch.arange(bias_rows.shape[0], device=bias.device)
        bias_row = numbers.reshape(own).expand(hidden.shape[:-1]).reshape(-1)
    if row_temperature is not None:
        rows = [*hidden.shape[:-1], *weight.shape[:-2]]
        row_temperature = row_temperature.to(dtype).expand(rows).reshape(-1, groups)
    if mask_embedding is not None:
        mask_embedding = mask_embedding.to(dtype).reshape(groups, width)
    return _Rows(
        hidden=hidden.reshape(-1, hidden.shape[-1]),
        weight=weight.to(dtype).reshape(groups, vocabulary, -1),
        table=codebook.to(dtype).reshape(groups, vocabulary, width),
        bias=bias_rows,
        bias_row=bias_row,
        row_temperature=row_temperature,
        mask=None if mask is None else mask.reshape(-1, groups),
        mask_embedding=mask_embedding,
    )


def _bias_shape(bias: Tensor, weight: Tensor) -> tuple[list[int], list[int]]:
    """The leading shape of ``bias`` over the rows, and its shape with G and V written out."""
    trailing = list(weight.shape[:-1])
    own = list(bias.shape[: max(bias.dim() - len(trailing), 0)])
    return own, own + trailing


def _slices(call: _Rows) -> Iterator[tuple[slice, _Rows]]:
    groups, vocabulary, hidden_width = call.weight.shape
    width, itemsize = call.table.shape[-1], call.weight.element_size()
    size = slice_rows(groups, vocabulary, hidden_width, width, itemsize)

    def some(value: Tensor | None) -> Tensor | None:
        return None if value is None else value[rows]

    for start in range(0, call.hidden.shape[0], size):
        rows = slice(start, start + size)
        yield (
            rows,
            call._replace(
                hidden=call.hidden[rows],
                bias_row=some(call.bias_row),
                row_temperature=some(call.row_temperature),
                mask=some(call.mask),
            ),
        )


def _group_hidden(part: _Rows) -> Tensor:
    """``[n, G, H]``, wide: what each group reads; a masked row reads zeros."""
    hidden = part.hidden.to(part.weight.dtype).unsqueeze(1)
    if part.mask is None:
        return hidden.expand(-1, part.weight.shape[0], -1)
    return torch.where(part.mask.unsqueeze(-1), 0.0, hidden)


def _logits(part: _Rows) -> Tensor:
    """``[n, G, V]``; what stands in a masked row the soft embedding ignores."""
    hidden = _group_hidden(part)
    with ieee_float32(hidden):
        z = torch.einsum("ngh,gvh->ngv", hidden, part.weight)
    if part.bias is not None and part.bias_row is not None:
        z = z + part.bias[part.bias_row]
    return z


# --------------------------------------------------------------------------------------------------
# Sums of gradients over the slices


class _Sums(NamedTuple):
    """Gradients in the flat, wide shapes of :class:`_Rows`; empty where not wanted."""

    hidden: Tensor
    weight: Tensor
    table: Tensor
    bias: Tensor
    row_temperature: Tensor
    mask_embedding: Tensor


def _zeros(call: _Rows, wanted: list[bool]) -> _Sums:
    inputs = (call.hidden, call.weight, call.table, call.bias)
    settings = (call.row_temperature, call.mask_embedding)
    return _Sums(
        *(
            call.weight.new_zeros(value.shape if value is not None and needed else 0)
            for value, needed in zip(inputs + settings, wanted, strict=True)
        )
    )


def _add_linear(sums: _Sums, rows: slice, part: _Rows, dlogits: Tensor, wanted: list[bool]) -> None:
    """Adds one slice's part of the gradients to hidden, weight and bias."""
    with ieee_float32(part.weight):
        if wanted[0]:
            sums.hidden[rows] = torch.einsum("ngv,gvh->nh", dlogits, part.weight)
        if wanted[1]:
            sums.weight.add_(torch.einsum("ngv,ngh->gvh", dlogits, _group_hidden(part)))
    if wanted[3] and part.bias_row is not None:
        _add_rows(sums.bias, part.bias_row, dlogits)


def _add_rows(total: Tensor, index: Tensor, rows: Tensor) -> None:
    """total[index[n]] += rows[n], in a fixed order on every device."""
    if total.shape[0] == 1:
        total.add_(rows.sum(dim=0))
    elif total.device.type == "cuda":
        # Sorts the index; index_add_ would add with atomics.
        total.index_put_((index,), rows, accumulate=True)
    else:
        total.index_add_(0, index, rows)


def _in_shape(
    sums: _Sums, inputs: tuple[Tensor | None, ...], mask: Tensor | None, wanted: list[bool]
) -> Gradients:
    """The sums in the shapes and dtypes of the inputs; exactly zero where hidden was not read."""
    hidden, weight, _, bias, row_temperature, _ = inputs
    assert hidden is not None
    assert weight is not None
    shapes = [[] if tensor is None else list(tensor.shape) for tensor in inputs]
    if bias is not None:
        shapes[3] = _bias_shape(bias, weight)[1]
    if row_temperature is not None:
        shapes[4] = [*hidden.shape[:-1], *weight.shape[:-2]]
    found = [
        hidden.new_empty(0)
        if like is None or not needed
        else sum_to_shape(total.reshape(shape), like).to(like.dtype)
        for total, shape, like, needed in zip(sums, shapes, inputs, wanted, strict=True)
    ]
    if wanted[0] and mask is not None:
        unread = mask.unsqueeze(-1) if weight.dim() == 2 else mask.all(dim=-1, keepdim=True)
        found[0] = torch.where(unread, 0.0, found[0])
    return found[0], found[1], found[2], found[3], found[4], found[5]
