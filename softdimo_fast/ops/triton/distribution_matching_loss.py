"""``distribution_matching_loss`` on Triton: the operators' registration with torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from softdimo_fast.ops import _registration
from softdimo_fast.ops.reference import divergence as reference
from softdimo_fast.ops.triton import divergence as kernels
from softdimo_fast.ops.triton.divergence import ROW_STATISTICS

NAME = "distribution_matching_loss"


def _forward(
    student_logits: Tensor, teacher_logits: Tensor, auxiliary_logits: Tensor, mask: Tensor,
    teacher_uncond_logits: Tensor | None, guidance_scale: float, row_guidance: Tensor | None,
    teacher_temperature: float, auxiliary_temperature: float, forward_weight: float,
    reverse_weight: float, weight: Tensor | None, normalization: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    call = kernels.Arguments(
        teacher_logits, auxiliary_logits, teacher_uncond_logits, guidance_scale, row_guidance,
        teacher_temperature, auxiliary_temperature, forward_weight, reverse_weight, mask,
    )  # fmt: skip
    values, statistics = kernels.row_divergences(call)
    values = reference.counted(values.double(), mask, weight)
    total = (values / reference.sample_divisor(mask, normalization, torch.float64)).sum()
    return total.float(), statistics


def _fake(
    student_logits: Tensor, teacher_logits: Tensor, auxiliary_logits: Tensor, mask: Tensor,
    teacher_uncond_logits: Tensor | None, guidance_scale: float, row_guidance: Tensor | None,
    teacher_temperature: float, auxiliary_temperature: float, forward_weight: float,
    reverse_weight: float, weight: Tensor | None, normalization: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    statistics = (*student_logits.shape[:-1], ROW_STATISTICS)
    return (
        student_logits.new_empty((), dtype=torch.float32),
        student_logits.new_empty(statistics, dtype=torch.float64),
    )


def _backward(
    grad: Tensor, student_logits: Tensor, teacher_logits: Tensor, auxiliary_logits: Tensor, mask: Tensor,
    teacher_uncond_logits: Tensor | None, guidance_scale: float, row_guidance: Tensor | None,
    teacher_temperature: float, auxiliary_temperature: float, forward_weight: float,
    reverse_weight: float, weight: Tensor | None, normalization: str, statistics: Tensor,
    wanted: list[bool],
) -> Tensor:  # fmt: skip
    call = kernels.Arguments(
        teacher_logits, auxiliary_logits, teacher_uncond_logits, guidance_scale, row_guidance,
        teacher_temperature, auxiliary_temperature, forward_weight, reverse_weight, mask,
    )  # fmt: skip
    divisor = reference.sample_divisor(mask, normalization, torch.float32)
    upstream = reference.counted((grad.float() / divisor).expand(mask.shape), mask, weight)
    _, gradient, _ = kernels.gradients(
        call, upstream, statistics, [False, wanted[0], False], student_logits.dtype
    )
    return gradient


def _fake_backward(
    grad: Tensor, student_logits: Tensor, teacher_logits: Tensor, auxiliary_logits: Tensor, mask: Tensor,
    teacher_uncond_logits: Tensor | None, guidance_scale: float, row_guidance: Tensor | None,
    teacher_temperature: float, auxiliary_temperature: float, forward_weight: float,
    reverse_weight: float, weight: Tensor | None, normalization: str, statistics: Tensor,
    wanted: list[bool],
) -> Tensor:  # fmt: skip
    return student_logits.new_empty(student_logits.shape if wanted[0] else (0,))


def _gradients(ctx: Any, grad: Tensor | None, _statistics: None) -> tuple[Tensor | None, ...]:
    if grad is None or not ctx.needs_input_grad[0]:
        return (None,) * 13
    gradient = torch.ops.softdimo_triton.distribution_matching_loss_backward(
        grad, *_registration.restore_inputs(ctx), [True]
    )
    return (gradient, *(None,) * 12)


def _composite_backward(
    grad: Tensor, student_logits: Tensor, teacher_logits: Tensor, auxiliary_logits: Tensor, mask: Tensor,
    teacher_uncond_logits: Tensor | None, guidance_scale: float, row_guidance: Tensor | None,
    teacher_temperature: float, auxiliary_temperature: float, forward_weight: float,
    reverse_weight: float, weight: Tensor | None, normalization: str, statistics: Tensor,
    wanted: list[bool],
) -> Tensor:  # fmt: skip
    """The kernel's backward in plain torch: what its own derivative is taken of."""
    return reference.distribution_matching_loss_backward(
        grad, student_logits, teacher_logits, auxiliary_logits, mask, teacher_uncond_logits,
        guidance_scale, row_guidance, teacher_temperature, auxiliary_temperature, forward_weight,
        reverse_weight, weight, normalization, wanted,
    )  # fmt: skip


_registration.triton_operator(
    NAME, _forward, _fake, _backward, _fake_backward, save=kernels.save,
    gradients=_gradients, formula=_composite_backward,
)  # fmt: skip
