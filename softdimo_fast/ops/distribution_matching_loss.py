"""``distribution_matching_loss``: Di[M]O's generator objective."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from softdimo_fast.ops import _arguments as check
from softdimo_fast.ops import _backends, _registration
from softdimo_fast.ops._explain import Explanation, explains
from softdimo_fast.ops.reference import divergence as reference
from softdimo_fast.ops.reference.common import compute_dtype
from softdimo_fast.ops.token_divergence import (
    check_guidance,
    check_weight,
    copy_notes,
    fake_statistics,
    kernel,
    kl_weights,
    obstacles,
    require_like,
    save_statistics,
    work,
)
from softdimo_fast.ops.triton import distribution_matching_loss as _triton  # noqa: F401  (registers it)

NAME = "distribution_matching_loss"


class _Call(NamedTuple):
    """A checked call: the arguments every backend takes, and the choice of one."""

    student_logits: Tensor
    teacher_logits: Tensor
    auxiliary_logits: Tensor
    mask: Tensor
    teacher_uncond_logits: Tensor | None
    guidance_scale: float
    row_guidance: Tensor | None
    teacher_temperature: float
    auxiliary_temperature: float
    forward_weight: float
    reverse_weight: float
    weight: Tensor | None
    normalization: str
    choice: _backends.Choice


def distribution_matching_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    auxiliary_logits: Tensor,
    mask: Tensor,
    *,
    kind: str = "forward_kl",
    beta: float | None = None,
    teacher_uncond_logits: Tensor | None = None,
    guidance_scale: float | Tensor = 1.0,
    teacher_temperature: float = 1.0,
    auxiliary_temperature: float = 1.0,
    weight: Tensor | None = None,
    normalization: str = "batch",
    backend: str | None = None,
) -> Tensor:
    r"""Di[M]O's generator objective: a divergence whose gradient is handed to the student.

    The value is the divergence :math:`D(p_\phi, p_\psi)` between the teacher's and the auxiliary
    model's token distributions at the masked positions of a re-masked student sample, as
    :func:`token_divergence` defines it. The gradient to ``student_logits`` is the gradient of that
    value to ``auxiliary_logits``, at the same positions: Di[M]O's token-level distribution matching
    (arXiv 2503.15457). For the forward KL it is :math:`w_n (p_\psi - p_\phi) / T`, times the
    normalisation.

    Args:
        student_logits: ``[B, ..., V]``: the one-step generator's logits. Only their shape and dtype
            matter: the values are never read.
        teacher_logits: the shape of ``student_logits``: the teacher's (conditional) logits.
        auxiliary_logits: the shape of ``student_logits``. Nothing flows to the teacher's or the
            auxiliary's logits: they may require gradients and get none.
        mask: bool, broadcasts to the rows ``student_logits.shape[:-1]``; True = a [MASK] position of
            the re-masked sample, which counts. The others are never read and get zero gradient.
        kind: as in :func:`token_divergence`.
        beta: as in :func:`token_divergence`.
        teacher_uncond_logits: as in :func:`token_divergence`, without a gradient.
        guidance_scale: as in :func:`token_divergence`.
        teacher_temperature: as in :func:`token_divergence`.
        auxiliary_temperature: T of the auxiliary's softmax, a positive number. Its 1 / T is part of
            the gradient.
        weight: as in :func:`token_divergence`.
        normalization: ``"sum"``: S = the sum of weight x D over the masked rows. ``"batch"``: S / B.
            ``"masked"``: the mean over samples of (the sample's sum / max(its number of masked rows,
            1)).
        backend: None chooses; ``"reference" | "cpp" | "cuda" | "triton"`` insist.

    Returns:
        A scalar, float32, or float64 when an input is float64; 0 when nothing is masked. The gradient
        has ``student_logits``' dtype. Autocast has no effect. Special values as in
        :func:`token_divergence`.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or value; the
            message names it.
    """
    call = _prepare(
        student_logits, teacher_logits, auxiliary_logits, mask, kind=kind, beta=beta,
        teacher_uncond_logits=teacher_uncond_logits, guidance_scale=guidance_scale,
        teacher_temperature=teacher_temperature, auxiliary_temperature=auxiliary_temperature,
        weight=weight, normalization=normalization, backend=backend,
    )  # fmt: skip
    if call.choice.backend in ("cpp", "cuda"):
        loss, _ = _forward(*call[:-1])
    elif call.choice.backend == "triton":
        loss, _ = torch.ops.softdimo_triton.distribution_matching_loss(*call[:-1])
    else:
        loss = torch.ops.softdimo_reference.distribution_matching_loss(*call[:-1])
    return loss  # type: ignore[no-any-return]


def _prepare(
    student_logits: Tensor,
    teacher_logits: Tensor,
    auxiliary_logits: Tensor,
    mask: Tensor,
    *,
    kind: str = "forward_kl",
    beta: float | None = None,
    teacher_uncond_logits: Tensor | None = None,
    guidance_scale: float | Tensor = 1.0,
    teacher_temperature: float = 1.0,
    auxiliary_temperature: float = 1.0,
    weight: Tensor | None = None,
    normalization: str = "batch",
    backend: str | None = None,
) -> _Call:
    """Checks the arguments and chooses a backend."""
    check.require_floating(NAME, "student_logits", student_logits)
    check.require_dim(NAME, "student_logits", student_logits, 2, "[B, ..., V]")
    check.require_vocabulary(NAME, "student_logits", student_logits)
    require_like(NAME, "teacher_logits", teacher_logits, "student_logits", student_logits)
    require_like(NAME, "auxiliary_logits", auxiliary_logits, "student_logits", student_logits)
    forward_weight, reverse_weight = kl_weights(NAME, kind, beta)
    scale, row_guidance = check_guidance(
        NAME, teacher_uncond_logits, guidance_scale, teacher_logits
    )
    check.require_positive(NAME, "teacher_temperature", teacher_temperature)
    check.require_positive(NAME, "auxiliary_temperature", auxiliary_temperature)
    rows, device = student_logits.shape[:-1], student_logits.device
    if mask is None:
        raise TypeError(f"{NAME}: mask must be a bool tensor, got NoneType")
    row_mask = check.rows_mask(NAME, "mask", mask, rows, device, "student_logits.shape[:-1]")
    assert row_mask is not None
    check_weight(NAME, weight, rows, device)
    check.require_choice(NAME, "normalization", normalization, ("sum", "batch", "masked"))
    able = obstacles(
        student_logits,
        teacher_logits,
        auxiliary_logits,
        teacher_uncond_logits,
        row_guidance,
        weight,
    )
    choice = _backends.choose(NAME, backend, able)
    # Detached: the gradient is transplanted, so no derivative of any order leads to these.
    uncond = None if teacher_uncond_logits is None else teacher_uncond_logits.detach()
    return _Call(
        student_logits, teacher_logits.detach(), auxiliary_logits.detach(), row_mask, uncond, scale,
        row_guidance, float(teacher_temperature), float(auxiliary_temperature), forward_weight,
        reverse_weight, weight, normalization, choice,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------
# torch: fake kernels, autograd, double backward


@torch.library.register_fake("softdimo::distribution_matching_loss")
def _fake(
    student_logits: Tensor, teacher_logits: Tensor, auxiliary_logits: Tensor, mask: Tensor,
    teacher_uncond_logits: Tensor | None, guidance_scale: float, row_guidance: Tensor | None,
    teacher_temperature: float, auxiliary_temperature: float, forward_weight: float,
    reverse_weight: float, weight: Tensor | None, normalization: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    dtype = compute_dtype(
        student_logits,
        teacher_logits,
        auxiliary_logits,
        teacher_uncond_logits,
        row_guidance,
        weight,
    )
    return student_logits.new_empty((), dtype=dtype), fake_statistics(student_logits)


@torch.library.register_fake("softdimo::distribution_matching_loss_backward")
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
    gradient = _backward(grad, *_registration.restore_inputs(ctx), [True])
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


_forward = _registration.differentiable(
    "softdimo::distribution_matching_loss", _gradients, save_statistics
)
_backward = _registration.register_double_backward(
    "softdimo::distribution_matching_loss_backward", _composite_backward
)
for _operator in (
    "softdimo::distribution_matching_loss",
    "softdimo::distribution_matching_loss_backward",
):
    torch.library.register_vmap(_operator, _registration.vmap_refusal(NAME))
_registration.reference_operator(
    NAME,
    reference.distribution_matching_loss,
    reference.distribution_matching_loss_backward,
    differentiable=("student_logits",),
)


@explains(distribution_matching_loss)
def _explain(
    student_logits: Tensor,
    teacher_logits: Tensor,
    auxiliary_logits: Tensor,
    mask: Tensor,
    **options: Any,
) -> Explanation:
    call = _prepare(student_logits, teacher_logits, auxiliary_logits, mask, **options)
    read, flops, exponentials = work(
        call.teacher_logits, call.auxiliary_logits, call.teacher_uncond_logits
    )
    notes = copy_notes(
        call.choice, teacher_logits=teacher_logits, auxiliary_logits=auxiliary_logits,
        teacher_uncond_logits=call.teacher_uncond_logits,
    )  # fmt: skip
    if call.choice.backend == "reference":
        notes = (
            "several [N, V] tensors are written to memory, in forward and in backward; rows are not "
            "batch-invariant",
        )
    return Explanation(
        operator=NAME,
        backend=call.choice.backend,
        kernel=kernel(NAME, call.choice),
        reason=call.choice.reason,
        notes=notes,
        bytes=read,
        flops=flops,
        exponentials=exponentials,
    )
