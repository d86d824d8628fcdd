"""``token_divergence`` on Triton: the operators' registration with torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from softdimo_fast.ops import _registration
from softdimo_fast.ops.reference import divergence as reference
from softdimo_fast.ops.reference.common import mean_divisor
from softdimo_fast.ops.triton import divergence as kernels
from softdimo_fast.ops.triton.divergence import ROW_STATISTICS

NAME = "token_divergence"


def _forward(
    teacher_logits: Tensor, model_logits: Tensor, teacher_uncond_logits: Tensor | None,
    guidance_scale: float, row_guidance: Tensor | None, teacher_temperature: float,
    model_temperature: float, forward_weight: float, reverse_weight: float, mask: Tensor | None,
    weight: Tensor | None, reduction: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    call = kernels.Arguments(
        teacher_logits, model_logits, teacher_uncond_logits, guidance_scale, row_guidance,
        teacher_temperature, model_temperature, forward_weight, reverse_weight, mask,
    )  # fmt: skip
    values, statistics = kernels.row_divergences(call)
    values = reference.counted(values, mask, weight)
    if reduction == "none":
        return values, statistics
    total = values.sum(dtype=torch.float64)
    if reduction == "mean":
        total = total / mean_divisor(values, mask)
    return total.float(), statistics


def _fake(
    teacher_logits: Tensor, model_logits: Tensor, teacher_uncond_logits: Tensor | None,
    guidance_scale: float, row_guidance: Tensor | None, teacher_temperature: float,
    model_temperature: float, forward_weight: float, reverse_weight: float, mask: Tensor | None,
    weight: Tensor | None, reduction: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    rows = model_logits.shape[:-1]
    value = model_logits.new_empty(rows if reduction == "none" else (), dtype=torch.float32)
    return value, model_logits.new_empty((*rows, ROW_STATISTICS), dtype=torch.float64)


def _backward(
    grad: Tensor, teacher_logits: Tensor, model_logits: Tensor, teacher_uncond_logits: Tensor | None,
    guidance_scale: float, row_guidance: Tensor | None, teacher_temperature: float,
    model_temperature: float, forward_weight: float, reverse_weight: float, mask: Tensor | None,
    weight: Tensor | None, reduction: str, statistics: Tensor, wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    call = kernels.Arguments(
        teacher_logits, model_logits, teacher_uncond_logits, guidance_scale, row_guidance,
        teacher_temperature, model_temperature, forward_weight, reverse_weight, mask,
    )  # fmt: skip
    upstream = grad.float().expand(model_logits.shape[:-1])
    if reduction == "mean":
        upstream = upstream / mean_divisor(upstream, mask)
    upstream = reference.counted(upstream, mask, weight)
    return kernels.gradients(call, upstream, statistics, wanted, model_logits.dtype)


def _fake_backward(
    grad: Tensor, teacher_logits: Tensor, model_logits: Tensor, teacher_uncond_logits: Tensor | None,
    guidance_scale: float, row_guidance: Tensor | None, teacher_temperature: float,
    model_temperature: float, forward_weight: float, reverse_weight: float, mask: Tensor | None,
    weight: Tensor | None, reduction: str, statistics: Tensor, wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return kernels.empty_gradients(
        teacher_logits, model_logits, teacher_uncond_logits, wanted, model_logits.dtype
    )


# Where teacher_logits, model_logits and teacher_uncond_logits stand in the forward operator's arguments.
_DIFFERENTIABLE = (0, 1, 2)


def _gradients(ctx: Any, grad: Tensor | None, _statistics: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 12
    wanted = [bool(ctx.needs_input_grad[position]) for position in _DIFFERENTIABLE]
    results = torch.ops.softdimo_triton.token_divergence_backward(
        grad, *_registration.restore_inputs(ctx), wanted
    )
    return _registration.place(results, _DIFFERENTIABLE, wanted, 12)


def _composite_backward(
    grad: Tensor, teacher_logits: Tensor, model_logits: Tensor, teacher_uncond_logits: Tensor | None,
    guidance_scale: float, row_guidance: Tensor | None, teacher_temperature: float,
    model_temperature: float, forward_weight: float, reverse_weight: float, mask: Tensor | None,
    weight: Tensor | None, reduction: str, statistics: Tensor, wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The kernel's backward in plain torch: what its own derivative is taken of."""
    return reference.token_divergence_backward(
        grad, teacher_logits, model_logits, teacher_uncond_logits, guidance_scale, row_guidance,
        teacher_temperature, model_temperature, forward_weight, reverse_weight, mask, weight, reduction,
        wanted,
    )  # fmt: skip


_registration.triton_operator(
    NAME, _forward, _fake, _backward, _fake_backward, save=kernels.save,
    gradients=_gradients, formula=_composite_backward,
)  # fmt: skip
