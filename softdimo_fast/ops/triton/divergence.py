"""The divergences on Triton: layout and launches that their two operators share."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from softdimo_fast.ops import _registration
from softdimo_fast.ops.triton import layout

# Numbers that the forward saves of a row: two tops, two inverse sums, centre, excess, two divergences.
ROW_STATISTICS = 8


class Arguments(NamedTuple):
    """The logits and settings of a call, as the operators take them."""

    teacher: Tensor
    model: Tensor
    uncond: Tensor | None
    guidance: float
    row_guidance: Tensor | None
    teacher_temperature: float
    model_temperature: float
    forward_weight: float
    reverse_weight: float
    mask: Tensor | None


class Tile(NamedTuple):
    """The shape of a program's work. Fixed by V, never by the number of rows."""

    rows: int
    vocabulary: int
    warps: int


def tile(vocabulary: int) -> Tile:
    """The configuration table: eight entries a thread; short rows several to a program."""
    chunk = max(16, min(1024, 1 << (vocabulary - 1).bit_length()))
    return Tile(min(1024 // chunk, 16), chunk, 4)


def temperature_scale(temperature: float) -> tuple[float, float, float]:
    """1 / T in two float32 terms, and -1e30 T: the least distance that is told apart from -inf."""
    if layout.float32(temperature) == 0:
        return float("nan"), 0.0, -1.0
    # Nothing finite is told apart above this, and absent entries must stay out of reach of exp.
    temperature = min(temperature, 3.4e36)
    return *layout.two_term_inverse(temperature), max(-1e30 * temperature, -3.4e38)


def _positional(a: Arguments) -> dict[str, Any]:
    """What both kernels take, but for constants."""
    rows = a.model.shape[:-1]
    guided = a.uncond is not None and (a.row_guidance is not None or a.guidance != 1)
    found: dict[str, Any] = {
        "mask": layout.row_values(a.mask, rows),
        "row_guidance": layout.row_values(a.row_guidance, rows) if guided else None,
        "guidance": a.guidance if guided else 1.0,
        "rows": rows.numel(),
        "vocabulary": a.model.shape[-1],
        "forward_weight": a.forward_weight,
        "reverse_weight": a.reverse_weight,
        "uncond": None,
        "inner_u": 1,
        "outer_u": 0,
        "within_u": 0,
    }
    logits = [("teacher", "a", a.teacher), ("model", "b", a.model)]
    if guided and a.uncond is not None:
        logits.append(("uncond", "u", a.uncond))
    for name, letter, tensor in logits:
        walked = layout.rows_of(tensor)
        found |= {
            name: walked.data,
            f"inner_{letter}": walked.inner,
            f"outer_{letter}": walked.outer_stride,
            f"within_{letter}": walked.inner_stride,
        }
    for letter, temperature in (("a", a.teacher_temperature), ("b", a.model_temperature)):
        inverse, low, least = temperature_scale(temperature)
        found |= {
            f"inverse_{letter}": inverse,
            f"inverse_low_{letter}": low,
            f"least_{letter}": least,
        }
    return found


def _constant(a: Arguments) -> tuple[int, dict[str, Any]]:
    """The number of programs, and the constants of both kernels."""
    shape = tile(a.model.shape[-1])
    rows = a.model.shape[:-1].numel()
    return -(-rows // shape.rows), {
        "SAME": a.teacher_temperature == a.model_temperature,
        "STATISTICS": ROW_STATISTICS,
        "BLOCK_N": shape.rows,
        "BLOCK_V": shape.vocabulary,
        "num_warps": shape.warps,
        "num_stages": 2,
    }


def row_divergences(a: Arguments) -> tuple[Tensor, Tensor]:
    """The divergence of every row, float32, 0 where it does not count; and the statistics of the rows."""
    rows = a.model.shape[:-1]
    values = a.model.new_empty(rows, dtype=torch.float32)
    statistics = a.model.new_empty((*rows, ROW_STATISTICS), dtype=torch.float64)
    if values.numel() == 0:
        return values, statistics
    from softdimo_fast.ops.triton.divergence_kernels import divergence_forward_kernel

    programs, constant = _constant(a)
    with layout.on_device_of(values):
        divergence_forward_kernel[(programs,)](
            values=values, statistics=statistics, **_positional(a), **constant
        )
    return values, statistics


def gradients(
    a: Arguments, upstream: Tensor, statistics: Tensor, wanted: list[bool], model_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to (teacher, model, uncond), empty where not wanted; the model's in ``model_dtype``.

    Args:
        upstream: what the gradient of each row's divergence is multiplied by; broadcasts to the rows.
    """
    dteacher, dmodel, duncond = empty_gradients(a.teacher, a.model, a.uncond, wanted, model_dtype)
    if a.model.numel() == 0 or not any(wanted):
        return dteacher, dmodel, duncond
    from softdimo_fast.ops.triton.divergence_kernels import divergence_backward_kernel

    programs, constant = _constant(a)
    with layout.on_device_of(dmodel):
        divergence_backward_kernel[(programs,)](
            statistics=statistics.contiguous(),
            upstream=layout.row_values(upstream.float(), a.model.shape[:-1]),
            dteacher=dteacher if wanted[0] else None, dmodel=dmodel if wanted[1] else None,
            duncond=duncond if wanted[2] else None, INTERPRETED=layout.interpreted(), **_positional(a),
            **constant,
        )  # fmt: skip
    return dteacher, dmodel, duncond


def empty_gradients(
    teacher: Tensor, model: Tensor, uncond: Tensor | None, wanted: list[bool], model_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Room for the gradients that are wanted."""
    inputs = ((teacher, teacher.dtype), (model, model_dtype), (uncond, None))
    first, second, third = (
        model.new_empty(0, dtype=model_dtype)
        if tensor is None or not needed
        else model.new_empty(tensor.shape, dtype=dtype or tensor.dtype)
        for (tensor, dtype), needed in zip(inputs, wanted, strict=True)
    )
    return first, second, third


def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Keeps the inputs and the statistics of the rows, which get no gradient, for the backward."""
    _, statistics = output
    ctx.mark_non_differentiable(statistics)
    _registration.save_inputs(ctx, (*inputs, statistics), output)
