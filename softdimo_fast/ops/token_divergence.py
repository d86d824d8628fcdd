"""``token_divergence``: the divergence between a teacher's and a model's token distributions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from softdimo_fast.ops import _arguments as check
from softdimo_fast.ops import _backends, _library, _registration
from softdimo_fast.ops._explain import Explanation, explains
from softdimo_fast.ops.reference import divergence as reference
from softdimo_fast.ops.reference.common import compute_dtype
from softdimo_fast.ops.triton import layout as triton_layout
from softdimo_fast.ops.triton import token_divergence as _triton  # noqa: F401  (registers the operator)

NAME = "token_divergence"
KINDS = ("forward_kl", "reverse_kl", "jeffreys")


class _Call(NamedTuple):
    """A checked call: the arguments every backend takes, and the choice of one."""

    teacher_logits: Tensor
    model_logits: Tensor
    teacher_uncond_logits: Tensor | None
    guidance_scale: float
    row_guidance: Tensor | None
    teacher_temperature: float
    model_temperature: float
    forward_weight: float
    reverse_weight: float
    mask: Tensor | None
    weight: Tensor | None
    reduction: str
    choice: _backends.Choice


def token_divergence(
    teacher_logits: Tensor,
    model_logits: Tensor,
    *,
    kind: str = "forward_kl",
    beta: float | None = None,
    teacher_uncond_logits: Tensor | None = None,
    guidance_scale: float | Tensor = 1.0,
    teacher_temperature: float = 1.0,
    model_temperature: float = 1.0,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    r"""The divergence between the token distributions of a teacher and of a model.

    With :math:`p = \mathrm{softmax}((u + s (c - u)) / S)` (c, u the teacher's conditional and
    unconditional logits, s the guidance scale, S its temperature) and
    :math:`q = \mathrm{softmax}(z / T)`, every row gives

    - ``"forward_kl"``: :math:`\mathrm{KL}(p \| q) = \sum_v p_v (\log p_v - \log q_v)`,
    - ``"reverse_kl"``: :math:`\mathrm{KL}(q \| p)`,
    - ``"jeffreys"``: :math:`(1 - \beta)\,\mathrm{KL}(p \| q) + \beta\,\mathrm{KL}(q \| p)`,

    the divergences of Di[M]O (arXiv 2503.15457). Gradients are those of the value, 1 / T included,
    for all three logits. Nearly equal logits do not cancel, in the value or in the gradients.

    Args:
        teacher_logits: ``[..., V]``, any strides, V >= 1: the teacher's (conditional) logits.
        model_logits: the shape of ``teacher_logits``.
        kind: ``"forward_kl" | "reverse_kl" | "jeffreys"``.
        beta: any real number; required by ``"jeffreys"``, refused by the others.
        teacher_uncond_logits: the shape of ``teacher_logits``: u. None means no guidance.
        guidance_scale: s, a number, or a tensor that broadcasts to the rows ``logits.shape[:-1]`` (no
            gradient). Anything but the number 1 needs ``teacher_uncond_logits``. Where s = 1 they are
            not read.
        teacher_temperature: S, a positive number.
        model_temperature: T, a positive number.
        mask: bool, broadcasts to the rows; True = the row counts. Rows that do not count are never
            read and get zero gradient. None counts every row.
        weight: broadcasts to the rows; multiplies each row's divergence (no gradient).
        reduction: ``"none"`` gives the rows (0 where not counted), ``"sum"`` their sum, ``"mean"`` that
            sum over the number of counted rows (weights do not enter the divisor; 0 when no row
            counts).
        backend: None chooses; ``"reference" | "cpp" | "cuda" | "triton"`` insist.

    Returns:
        The rows' shape for ``"none"``, else a scalar; float32, or float64 when an input is float64.
        Autocast has no effect. 0 log 0 = 0. An entry that is -inf in one distribution alone makes
        the KL from the other one to it +inf; where c and u are both -inf the guided logit is -inf. A
        row that holds NaN, +inf or nothing but -inf gives NaN. Where the value is +inf, gradients
        that contain it are NaN.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or value; the
            message names it.
    """
    call = _prepare(
        teacher_logits, model_logits, kind=kind, beta=beta,
        teacher_uncond_logits=teacher_uncond_logits, guidance_scale=guidance_scale,
        teacher_temperature=teacher_temperature, model_temperature=model_temperature, mask=mask,
        weight=weight, reduction=reduction, backend=backend,
    )  # fmt: skip
    if call.choice.backend in ("cpp", "cuda"):
        value, _ = _forward(*call[:-1])
    elif call.choice.backend == "triton":
        value, _ = torch.ops.softdimo_triton.token_divergence(*call[:-1])
    else:
        value = torch.ops.softdimo_reference.token_divergence(*call[:-1])
    return value  # type: ignore[no-any-return]


def _prepare(
    teacher_logits: Tensor,
    model_logits: Tensor,
    *,
    kind: str = "forward_kl",
    beta: float | None = None,
    teacher_uncond_logits: Tensor | None = None,
    guidance_scale: float | Tensor = 1.0,
    teacher_temperature: float = 1.0,
    model_temperature: float = 1.0,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    backend: str | None = None,
) -> _Call:
    """Checks the arguments and chooses a backend."""
    check.require_floating(NAME, "teacher_logits", teacher_logits)
    check.require_vocabulary(NAME, "teacher_logits", teacher_logits)
    require_like(NAME, "model_logits", model_logits, "teacher_logits", teacher_logits)
    forward_weight, reverse_weight = kl_weights(NAME, kind, beta)
    scale, row_guidance = check_guidance(
        NAME, teacher_uncond_logits, guidance_scale, teacher_logits
    )
    check.require_positive(NAME, "teacher_temperature", teacher_temperature)
    check.require_positive(NAME, "model_temperature", model_temperature)
    rows, device = teacher_logits.shape[:-1], teacher_logits.device
    mask = check.rows_mask(NAME, "mask", mask, rows, device)
    check_weight(NAME, weight, rows, device)
    check.require_choice(NAME, "reduction", reduction, ("none", "sum", "mean"))
    able = obstacles(teacher_logits, model_logits, teacher_uncond_logits, row_guidance, weight)
    choice = _backends.choose(NAME, backend, able)
    return _Call(
        teacher_logits, model_logits, teacher_uncond_logits, scale, row_guidance,
        float(teacher_temperature), float(model_temperature), forward_weight, reverse_weight, mask,
        weight, reduction, choice,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------
# Checks shared with distribution_matching_loss


def require_like(operator: str, name: str, value: object, other: str, like: Tensor) -> None:
    """``value`` is a floating tensor with the shape and device of ``like``."""
    check.require_floating(operator, name, value)
    assert isinstance(value, Tensor)
    if value.shape != like.shape:
        raise ValueError(
            f"{operator}: {name} must have the shape of {other} {check.shape(like)}, got "
            f"{check.shape(value)}"
        )
    check.require_same_device(operator, other, like.device, **{name: value})


def kl_weights(operator: str, kind: object, beta: object) -> tuple[float, float]:
    """The weights of KL(p || q) and of KL(q || p)."""
    check.require_choice(operator, "kind", kind, KINDS)
    if kind == "jeffreys":
        if beta is None:
            raise ValueError(f"{operator}: beta is required by kind='jeffreys', got None")
        check.require_number(operator, "beta", beta)
        return 1.0 - float(beta), float(beta)  # type: ignore[arg-type]
    if beta is not None:
        raise ValueError(
            f"{operator}: beta must be None for kind={kind!r} (only 'jeffreys' takes it), got "
            f"{beta!r}"
        )
    return (1.0, 0.0) if kind == "forward_kl" else (0.0, 1.0)


def check_guidance(
    operator: str, uncond: object, scale: object, teacher_logits: Tensor
) -> tuple[float, Tensor | None]:
    """The guidance scale as ``(number, None)`` or ``(1.0, tensor)``."""
    rows, device = teacher_logits.shape[:-1], teacher_logits.device
    number, per_row = check.number_or_rows(
        operator, "guidance_scale", scale, rows, device, positive=False
    )
    check.require_no_gradient(operator, guidance_scale=per_row)
    if uncond is not None:
        require_like(operator, "teacher_uncond_logits", uncond, "teacher_logits", teacher_logits)
    elif per_row is not None or number != 1:
        got = "a tensor" if per_row is not None else number
        raise ValueError(
            f"{operator}: teacher_uncond_logits is required when guidance_scale is not 1 "
            f"(guidance_scale is {got}), got None"
        )
    return number, per_row


def check_weight(
    operator: str, weight: Tensor | None, rows: Sequence[int], device: torch.device
) -> None:
    if weight is None:
        return
    check.require_floating(operator, "weight", weight)
    check.require_same_device(operator, "the input", device, weight=weight)
    check.require_no_gradient(operator, weight=weight)
    check.rows_tensor(operator, "weight", weight, rows)


def obstacles(logits: Tensor, *others: Tensor | None) -> dict[str, str]:
    """What keeps each backend from a divergence of these tensors."""
    found = _backends.obstacles(logits, "cpp", "cuda", "triton")
    wide = compute_dtype(logits, *others) == torch.float64
    if "triton" not in found and wide:
        found["triton"] = "the Triton kernels compute in float32, and an input is float64"
    if "cuda" in found:
        return found
    beyond = _library.cuda_obstacle(logits.device)
    if beyond is not None:
        found["cuda"] = beyond
    elif wide:
        found["cuda"] = "the CUDA kernel computes in float32, and an input is float64"
    return found


def work(*logits: Tensor | None) -> tuple[int, int, int]:
    """(bytes, FLOPs, exponentials) of a divergence that reads each of these logits once."""
    present = [tensor for tensor in logits if tensor is not None]
    entries = present[0].numel()
    # One exponential for each distribution. Per entry: shift and scale twice, the ratio (3), the
    # product and three sums; guidance adds three.
    flops = 11 + 3 * (len(present) - 2)
    return sum(t.numel() * t.element_size() for t in present), flops * entries, 2 * entries


# ---------------------------------------------------------------------------------------------------
# torch: fake kernels, autograd, double backward

# Numbers that the kernels save of a row (RowStatistics in csrc/include/softdimo/cpu/divergence.h,
# DivergenceStatistics in csrc/include/softdimo/cuda/divergence.h).
ROW_STATISTICS = 9
# Where teacher_logits, model_logits and teacher_uncond_logits stand in the forward operator's arguments.
_DIFFERENTIABLE = (0, 1, 2)


def fake_statistics(logits: Tensor) -> Tensor:
    dtype = torch.float32 if logits.device.type == "cuda" else torch.float64
    return logits.new_empty((*logits.shape[:-1], ROW_STATISTICS), dtype=dtype)


@torch.library.register_fake("softdimo::token_divergence")
def _fake(
    teacher_logits: Tensor, model_logits: Tensor, teacher_uncond_logits: Tensor | None,
    guidance_scale: float, row_guidance: Tensor | None, teacher_temperature: float,
    model_temperature: float, forward_weight: float, reverse_weight: float, mask: Tensor | None,
    weight: Tensor | None, reduction: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    dtype = compute_dtype(teacher_logits, model_logits, teacher_uncond_logits, row_guidance, weight)
    rows = model_logits.shape[:-1]
    value = model_logits.new_empty(rows if reduction == "none" else (), dtype=dtype)
    return value, fake_statistics(model_logits)


@torch.library.register_fake("softdimo::token_divergence_backward")
def _fake_backward(
    grad: Tensor, teacher_logits: Tensor, model_logits: Tensor, teacher_uncond_logits: Tensor | None,
    guidance_scale: float, row_guidance: Tensor | None, teacher_temperature: float,
    model_temperature: float, forward_weight: float, reverse_weight: float, mask: Tensor | None,
    weight: Tensor | None, reduction: str, statistics: Tensor, wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    logits = (teacher_logits, model_logits, teacher_uncond_logits)
    gradients = [
        model_logits.new_empty(0)
        if tensor is None or not needed
        else tensor.new_empty(tensor.shape)
        for tensor, needed in zip(logits, wanted, strict=True)
    ]
    return gradients[0], gradients[1], gradients[2]


def save_statistics(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Keeps the inputs and the statistics of the rows, which get no gradient, for the backward."""
    _, statistics = output
    ctx.mark_non_differentiable(statistics)
    _registration.save_inputs(ctx, (*inputs, statistics), output)


def _gradients(ctx: Any, grad: Tensor | None, _statistics: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 12
    wanted = [bool(ctx.needs_input_grad[position]) for position in _DIFFERENTIABLE]
    results = _backward(grad, *_registration.restore_inputs(ctx), wanted)
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


_forward = _registration.differentiable("softdimo::token_divergence", _gradients, save_statistics)
_backward = _registration.register_double_backward(
    "softdimo::token_divergence_backward", _composite_backward
)
for _operator in ("softdimo::token_divergence", "softdimo::token_divergence_backward"):
    torch.library.register_vmap(_operator, _registration.vmap_refusal(NAME))
_registration.reference_operator(
    NAME,
    reference.token_divergence,
    reference.token_divergence_backward,
    differentiable=("teacher_logits", "model_logits", "teacher_uncond_logits"),
)


def kernel(operator: str, choice: _backends.Choice) -> str:
    kernels = {
        "cpp": f"softdimo::{operator}, {_library.cpu_vector_isa()}",
        "cuda": f"softdimo::{operator}, CUDA",
        "triton": f"softdimo_triton::{operator}",
    }
    return kernels.get(choice.backend, "plain torch")


def copy_notes(choice: _backends.Choice, **logits: Tensor | None) -> tuple[str, ...]:
    """The logits that the kernels cannot walk in place."""
    if choice.backend == "triton":
        return tuple(triton_layout.copy_notes(**logits))
    if choice.backend == "reference":
        return ()
    return tuple(
        f"{name} have stride {tensor.stride(-1)} along V: one contiguous copy is made"
        for name, tensor in logits.items()
        if tensor is not None and tensor.shape[-1] > 1 and tensor.stride(-1) != 1
    )


@explains(token_divergence)
def _explain(teacher_logits: Tensor, model_logits: Tensor, **options: Any) -> Explanation:
    call = _prepare(teacher_logits, model_logits, **options)
    read, flops, exponentials = work(
        call.teacher_logits, call.model_logits, call.teacher_uncond_logits
    )
    dtype = compute_dtype(
        teacher_logits, model_logits, call.teacher_uncond_logits, call.row_guidance, call.weight
    )
    rows = teacher_logits.numel() // teacher_logits.shape[-1]
    notes = copy_notes(
        call.choice, teacher_logits=teacher_logits, model_logits=model_logits,
        teacher_uncond_logits=call.teacher_uncond_logits,
    )  # fmt: skip
    if call.choice.backend == "reference":
        notes = ("several [N, V] tensors are written to memory; rows are not batch-invariant",)
    return Explanation(
        operator=NAME,
        backend=call.choice.backend,
        kernel=kernel(NAME, call.choice),
        reason=call.choice.reason,
        notes=notes,
        bytes=read + (rows if call.reduction == "none" else 1) * dtype.itemsize,
        flops=flops,
        exponentials=exponentials,
    )
