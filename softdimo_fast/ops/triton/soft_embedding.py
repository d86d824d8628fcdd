"""``soft_embedding`` on Triton: layout and launches, and the operators' registration with torch."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from softdimo_fast.ops import _registration
from softdimo_fast.ops.reference import soft_embedding as reference
from softdimo_fast.ops.reference.common import compute_dtype, sum_to_shape
from softdimo_fast.ops.triton import layout

NAME = "soft_embedding"
WIDEST = 128  # columns of a codebook whose sums fit a program's registers
_SPLIT_ROWS = 2048


def obstacle(
    logits: Tensor, codebook: Tensor, *others: Tensor | None, truncates: bool
) -> str | None:
    """What keeps the kernels from a call, beside devices and what is installed."""
    if compute_dtype(logits, codebook, *others) == torch.float64:
        return "the Triton kernels compute in float32, and an input is float64"
    width = codebook.shape[-1]
    if width > WIDEST:
        return (
            f"the Triton kernels take codebooks of at most {WIDEST} columns, this one has {width}"
        )
    if truncates:
        return "the Triton kernels do not truncate, and top_k or top_p is given"
    return None


def in_two_terms(logits: Tensor, codebook: Tensor, high_precision: bool) -> bool:
    """Whether p enters the products in two terms. A float16 codebook alone asks for no less than float32."""
    return high_precision or (codebook.dtype == torch.float16 and logits.dtype != torch.float16)


def kernel(logits: Tensor, codebook: Tensor, high_precision: bool) -> str:
    """What ``explain`` calls the kernel."""
    if codebook.shape[-1] <= reference.NARROW_WIDTH:
        products = "float32, sums in float64"
    elif codebook.dtype == torch.float32:
        products = "float32"
    else:
        name = str(codebook.dtype).removeprefix("torch.")
        two = in_two_terms(logits, codebook, high_precision)
        products = f"{name}, p in two terms" if two else name
    return f"softdimo_triton::{NAME}, products in {products}"


class Tile(NamedTuple):
    """The shape of a program's work. Fixed by V, D, dtype and device, never by the number of rows."""

    rows: int
    vocabulary: int
    warps: int
    stages: int


def tile(vocabulary: int, width: int, half: bool, noise: bool, capability: int) -> Tile:
    """The configuration table: tensor cores want tall tiles, products in float32 and noise small ones."""
    fitting = max(16, min(64, 1 << (vocabulary - 1).bit_length()))
    if width <= reference.NARROW_WIDTH:
        return Tile(16, fitting, 4, 2)
    if half and noise:
        return Tile(32, min(fitting, 32), 4, 2)
    if half:
        return Tile(64, fitting, 4 if width <= 64 else 8, 4 if capability >= 90 else 3)
    return Tile(32, min(fitting, 32), 4 if width <= 64 else 8, 2)


class _Launch(NamedTuple):
    """What every kernel of one call takes."""

    rows: int  # of each group
    groups: int
    blocks: int  # of rows, in all groups
    tile: Tile
    rows_of: layout.Rows
    positional: dict[str, Any]
    constant: dict[str, Any]


def _prepare(
    logits: Tensor, codebook: Tensor, temperature: float, row_temperature: Tensor | None, mask: Tensor | None,
    seed: Tensor | None, row_ids: Tensor | None,
) -> _Launch:  # fmt: skip
    leading, (vocabulary, width) = logits.shape[:-1], codebook.shape[-2:]
    groups = codebook.shape[0] if codebook.dim() == 3 else 1
    half = codebook.dtype in (torch.bfloat16, torch.float16)
    shape = tile(vocabulary, width, half, seed is not None, layout.capability(logits))
    rows = leading.numel() // groups
    walked = layout.rows_of(logits)
    inverse, inverse_low = layout.two_term_inverse(temperature)
    positional = {
        "logits": walked.data, "mask": layout.row_values(mask, leading),
        "row_temperature": layout.row_values(row_temperature, leading), "seed": seed,
        "row_ids": layout.row_values(row_ids, leading), "rows": rows, "vocabulary": vocabulary,
        "groups": groups, "inner": walked.inner, "stride_outer": walked.outer_stride,
        "stride_inner": walked.inner_stride, "inverse": inverse, "inverse_low": inverse_low,
    }  # fmt: skip
    constant = {
        "WIDTH": width, "BLOCK_N": shape.rows, "BLOCK_V": shape.vocabulary,
        "BLOCK_D": max(8 if width <= reference.NARROW_WIDTH else 16, 1 << (width - 1).bit_length()),
        "NARROW": width <= reference.NARROW_WIDTH, "INTERPRETED": layout.interpreted(),
        "num_warps": shape.warps, "num_stages": shape.stages,
    }  # fmt: skip
    return _Launch(
        rows, groups, -(-rows // shape.rows) * groups, shape, walked, positional, constant
    )


def _keeps_soft(codebook: Tensor, hard: bool) -> bool:
    """Whether the float32 soft value that backward needs differs from the output and is kept apart."""
    return hard or codebook.dtype != torch.float32


def _forward(
    logits: Tensor, codebook: Tensor, temperature: float, row_temperature: Tensor | None, mask: Tensor | None,
    mask_embedding: Tensor | None, seed: Tensor | None, row_ids: Tensor | None, high_precision: bool,
    hard: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    output, row_max, row_sum, soft = _fake(
        logits, codebook, temperature, row_temperature, mask, mask_embedding, seed, row_ids, high_precision,
        hard,
    )  # fmt: skip
    if output.numel() == 0:
        return output, row_max, row_sum, soft
    from softdimo_fast.ops.triton.soft_embedding_kernels import soft_embedding_forward_kernel

    call = _prepare(logits, codebook, temperature, row_temperature, mask, seed, row_ids)
    with layout.on_device_of(logits):
        soft_embedding_forward_kernel[(call.blocks,)](
            codebook=codebook.contiguous(),
            mask_embedding=None if mask_embedding is None else mask_embedding.contiguous(),
            output=output, row_max=row_max, row_sum=row_sum,
            soft=soft if _keeps_soft(codebook, hard) else None,
            HARD=hard, HIGH=in_two_terms(logits, codebook, high_precision), **call.positional,
            **call.constant,
        )  # fmt: skip
    return output, row_max, row_sum, soft


def _fake(
    logits: Tensor, codebook: Tensor, temperature: float, row_temperature: Tensor | None, mask: Tensor | None,
    mask_embedding: Tensor | None, seed: Tensor | None, row_ids: Tensor | None, high_precision: bool,
    hard: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    rows, width = logits.shape[:-1], codebook.shape[-1]
    return (
        codebook.new_empty((*rows, width)),
        logits.new_empty(rows, dtype=torch.float64),
        logits.new_empty(rows, dtype=torch.float64),
        logits.new_empty(
            (*rows, width) if _keeps_soft(codebook, hard) else (0,), dtype=torch.float32
        ),
    )


def _backward(
    grad: Tensor, logits: Tensor, codebook: Tensor, temperature: float, row_temperature: Tensor | None,
    mask: Tensor | None, mask_embedding: Tensor | None, seed: Tensor | None, row_ids: Tensor | None,
    high_precision: bool, row_max: Tensor, row_sum: Tensor, soft: Tensor, wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    inputs = (logits, codebook, row_temperature, mask_embedding)
    dlogits, dcodebook, dtemperature, dmask = _empty_gradients(inputs, wanted)
    if logits.numel() == 0:
        for empty in (dcodebook, dtemperature, dmask):
            empty.zero_()
        return dlogits, dcodebook, dtemperature, dmask
    grad = grad.contiguous()
    call = _prepare(logits, codebook, temperature, row_temperature, mask, seed, row_ids)
    with layout.on_device_of(logits):
        if wanted[0] or wanted[2]:
            per_row = _dlogits(call, grad, codebook, row_max, row_sum, soft, dlogits, wanted)
            if row_temperature is not None and wanted[2]:
                wide = per_row.view(logits.shape[:-1]).double()
                dtemperature = sum_to_shape(wide, row_temperature).to(row_temperature.dtype)
        if wanted[1]:
            high = in_two_terms(logits, codebook, high_precision)
            dcodebook = _dcodebook(call, grad, codebook, row_max, row_sum, high)
    if mask_embedding is not None and mask is not None and wanted[3]:
        masked = torch.where(mask.unsqueeze(-1), grad, 0.0).reshape(-1, *mask_embedding.shape)
        dmask = masked.sum(0, dtype=torch.float64).to(mask_embedding.dtype)
    return dlogits, dcodebook, dtemperature, dmask


def _dlogits(
    call: _Launch, grad: Tensor, codebook: Tensor, row_max: Tensor, row_sum: Tensor, soft: Tensor,
    dlogits: Tensor, wanted: list[bool],
) -> Tensor:  # fmt: skip
    """Fills ``dlogits`` and returns dT of each row, where they are wanted."""
    from softdimo_fast.ops.triton.soft_embedding_kernels import soft_embedding_dlogits_kernel

    per_row = grad.new_empty(row_max.shape if wanted[2] else (0,), dtype=torch.float32)
    soft_embedding_dlogits_kernel[(call.blocks,)](
        grad=grad, codebook=codebook.contiguous(), row_max=row_max, row_sum=row_sum, soft=soft.contiguous(),
        dlogits=dlogits if wanted[0] else None, dtemperature=per_row if wanted[2] else None,
        **call.positional, **call.constant,
    )  # fmt: skip
    return per_row


def _dcodebook(
    call: _Launch,
    grad: Tensor,
    codebook: Tensor,
    row_max: Tensor,
    row_sum: Tensor,
    high: bool,
) -> Tensor:
    """Partial sums over fixed ranges of rows, then their sum in order."""
    import triton.language as tl

    from softdimo_fast.ops.triton.soft_embedding_kernels import soft_embedding_dcodebook_kernel

    splits = split_count(call.rows)
    narrow, (vocabulary, width) = call.constant["NARROW"], codebook.shape[-2:]
    partial = grad.new_empty(
        (splits, call.groups, vocabulary, width), dtype=torch.float64 if narrow else torch.float32
    )
    half = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}.get(codebook.dtype)
    tiles = -(-vocabulary // call.tile.vocabulary)
    soft_embedding_dcodebook_kernel[(tiles * call.groups * splits,)](
        grad=grad, row_max=row_max, row_sum=row_sum, partial=partial,
        split_rows=-(-call.rows // splits), HALF=half, HIGH=high, **call.positional,
        **call.constant,
    )  # fmt: skip
    return partial.sum(0).to(codebook.dtype).view(codebook.shape)


def split_count(rows: int) -> int:
    """Into how many ranges the rows of a group are split: a function of their number alone."""
    return max(1, min(32, rows // _SPLIT_ROWS))


def _empty_gradients(
    inputs: tuple[Tensor | None, ...], wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    logits = inputs[0]
    assert logits is not None
    first, second, third, fourth = (
        logits.new_empty(0) if tensor is None or not needed else tensor.new_empty(tensor.shape)
        for tensor, needed in zip(inputs, wanted, strict=True)
    )
    return first, second, third, fourth


def _fake_backward(
    grad: Tensor, logits: Tensor, codebook: Tensor, temperature: float, row_temperature: Tensor | None,
    mask: Tensor | None, mask_embedding: Tensor | None, seed: Tensor | None, row_ids: Tensor | None,
    high_precision: bool, row_max: Tensor, row_sum: Tensor, soft: Tensor, wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return _empty_gradients((logits, codebook, row_temperature, mask_embedding), wanted)


# Where logits, codebook, row_temperature and mask_embedding stand in the forward operator's arguments.
_DIFFERENTIABLE = (0, 1, 3, 5)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    value, row_max, row_sum, soft = output
    ctx.mark_non_differentiable(row_max, row_sum, soft)
    *arguments, hard = inputs
    kept = soft if _keeps_soft(inputs[1], hard) else value
    _registration.save_inputs(ctx, (*arguments, row_max, row_sum, kept), output)


def _gradients(ctx: Any, grad: Tensor | None, *_unused: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 10
    inputs = _registration.restore_inputs(ctx)
    wanted = [bool(ctx.needs_input_grad[position]) for position in _DIFFERENTIABLE]
    results = torch.ops.softdimo_triton.soft_embedding_backward(grad, *inputs, wanted)
    return _registration.place(results, _DIFFERENTIABLE, wanted, 10)


def _composite_backward(
    grad: Tensor, logits: Tensor, codebook: Tensor, temperature: float, row_temperature: Tensor | None,
    mask: Tensor | None, mask_embedding: Tensor | None, seed: Tensor | None, row_ids: Tensor | None,
    high_precision: bool, row_max: Tensor, row_sum: Tensor, soft: Tensor, wanted: list[bool],
) -> reference.Gradients:  # fmt: skip
    """The kernels' backward in plain torch: what its own derivative is taken of."""
    return reference.soft_embedding_backward(
        grad, logits, codebook, temperature, row_temperature, mask, mask_embedding, seed, row_ids, False,
        None, None, wanted,
    )  # fmt: skip


_registration.triton_operator(
    NAME, _forward, _fake, _backward, _fake_backward, save=_save, gradients=_gradients,
    formula=_composite_backward,
)  # fmt: skip
