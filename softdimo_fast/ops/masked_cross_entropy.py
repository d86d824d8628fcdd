"""``masked_cross_entropy``: cross-entropy over the rows that a mask counts."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from softdimo_fast.ops import _arguments as check
from softdimo_fast.ops import _backends, _library, _registration
from softdimo_fast.ops._explain import Explanation, explains
from softdimo_fast.ops.reference import cross_entropy as reference
from softdimo_fast.ops.reference.common import compute_dtype

NAME = "masked_cross_entropy"


class _Call(NamedTuple):
    """A checked call: the arguments every backend takes, and the choice of one."""

    logits: Tensor
    targets: Tensor
    mask: Tensor | None
    label_smoothing: float
    reduction: str
    choice: _backends.Choice


def masked_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    mask: Tensor | None,
    *,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    r"""Cross-entropy over the counted rows: the loss of a masked-token model.

    .. math:: \ell_n = -(1 - \epsilon) \log q_{n, y_n} - \frac{\epsilon}{V} \sum_v \log q_{n, v},
       \qquad q_n = \mathrm{softmax}(z_n)

    with label smoothing :math:`\epsilon` (Szegedy et al., Rethinking the Inception Architecture,
    2016), as ``torch.nn.functional.cross_entropy`` has it. There is no ignore_index: the mask says
    what counts.

    Args:
        logits: ``[..., V]``, any strides, V >= 1.
        targets: int64, the rows' shape ``logits.shape[:-1]``; in [0, V) where the row counts, anything
            elsewhere.
        mask: bool, broadcasts to the rows; True = the row counts. Rows that do not count are never
            read and get zero gradient. None counts every row.
        label_smoothing: in [0, 1).
        reduction: ``"none"`` gives the rows (0 where not counted), ``"sum"`` their sum, ``"mean"`` that
            sum over the number of counted rows (0 when no row counts).
        backend: None chooses; ``"reference" | "cpp" | "cuda" | "triton"`` insist.

    Returns:
        The rows' shape for ``"none"``, else a scalar; float32, or float64 for float64 logits. Autocast
        has no effect. A target whose logit is -inf, or with label smoothing any -inf logit, gives
        +inf; a row that holds NaN, +inf or nothing but -inf gives NaN.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or value; the
            message names it. A target out of range on a counted row raises on the CPU in eager;
            elsewhere that row becomes NaN.
    """
    call = _prepare(
        logits, targets, mask, label_smoothing=label_smoothing, reduction=reduction, backend=backend
    )
    loss: Tensor
    if call.choice.backend in ("cpp", "cuda"):
        loss, *_ = _forward(*call[:-1])
    else:
        loss = torch.ops.softdimo_reference.masked_cross_entropy(*call[:-1])
    return loss


def _prepare(
    logits: Tensor,
    targets: Tensor,
    mask: Tensor | None,
    *,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    backend: str | None = None,
) -> _Call:
    """Checks the arguments and chooses a backend."""
    check.require_floating(NAME, "logits", logits)
    check.require_vocabulary(NAME, "logits", logits)
    rows, device = logits.shape[:-1], logits.device
    check.require_tensor(NAME, "targets", targets)
    if targets.dtype != torch.int64:
        raise TypeError(f"{NAME}: targets must have dtype int64, got {targets.dtype}")
    check.require_shape(NAME, "targets", targets, rows, "logits.shape[:-1]")
    check.require_same_device(NAME, "logits", device, targets=targets)
    mask = check.rows_mask(NAME, "mask", mask, rows, device)
    check.require_number(NAME, "label_smoothing", label_smoothing)
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"{NAME}: label_smoothing must be in [0, 1), got {label_smoothing}")
    check.require_choice(NAME, "reduction", reduction, ("none", "sum", "mean"))
    if check.checks_values(targets):
        _check_range(targets, mask, logits.shape[-1])
    choice = _backends.choose(NAME, backend, _obstacles(logits))
    return _Call(logits, targets, mask, float(label_smoothing), reduction, choice)


def _obstacles(logits: Tensor) -> dict[str, str]:
    obstacles = _backends.obstacles(logits, "cpp", "cuda")
    if "cuda" in obstacles:
        return obstacles
    beyond = _library.cuda_obstacle(logits.device)
    if beyond is not None:
        obstacles["cuda"] = beyond
    elif logits.dtype == torch.float64:
        obstacles["cuda"] = "the CUDA kernel computes in float32, and logits are float64"
    return obstacles


def _check_range(targets: Tensor, mask: Tensor | None, vocabulary: int) -> None:
    wrong = (targets < 0) | (targets >= vocabulary)
    if mask is not None:
        wrong = wrong & mask
    if bool(wrong.any()):
        raise ValueError(
            f"{NAME}: targets must be in [0, {vocabulary}) on counted rows, got "
            f"{targets[wrong][0].item()} ({int(wrong.sum())} such rows); mask leaves rows out"
        )


# ---------------------------------------------------------------------------------------------------
# torch: fake kernels, autograd, double backward


@torch.library.register_fake("softdimo::masked_cross_entropy")
def _fake(
    logits: Tensor, targets: Tensor, mask: Tensor | None, label_smoothing: float, reduction: str
) -> tuple[Tensor, Tensor, Tensor]:
    rows, dtype = logits.shape[:-1], compute_dtype(logits)
    loss = logits.new_empty(rows if reduction == "none" else (), dtype=dtype)
    return loss, logits.new_empty(rows, dtype=dtype), logits.new_empty(rows, dtype=dtype)


@torch.library.register_fake("softdimo::masked_cross_entropy_backward")
def _fake_backward(
    grad: Tensor, logits: Tensor, targets: Tensor, mask: Tensor | None, label_smoothing: float,
    reduction: str, row_max: Tensor, row_rest: Tensor,
) -> Tensor:  # fmt: skip
    return logits.new_empty(logits.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    _registration.save_inputs(ctx, (*inputs, *output[1:]), output)


def _gradients(ctx: Any, grad: Tensor | None, *_unused: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None or not ctx.needs_input_grad[0]:
        return (None,) * 5
    inputs = _registration.restore_inputs(ctx)
    return (_backward(grad, *inputs), *(None,) * 4)


def _composite_backward(
    grad: Tensor, logits: Tensor, targets: Tensor, mask: Tensor | None, label_smoothing: float,
    reduction: str, row_max: Tensor, row_rest: Tensor,
) -> Tensor:  # fmt: skip
    """The kernel's backward in plain torch: what its own derivative is taken of."""
    return reference.masked_cross_entropy_backward(
        grad, logits, targets, mask, label_smoothing, reduction, [True]
    )


_forward = _registration.differentiable("softdimo::masked_cross_entropy", _gradients, _save)
_backward = _registration.register_double_backward(
    "softdimo::masked_cross_entropy_backward", _composite_backward
)
for _operator in ("softdimo::masked_cross_entropy", "softdimo::masked_cross_entropy_backward"):
    torch.library.register_vmap(_operator, _registration.vmap_refusal(NAME))
_registration.reference_operator(
    NAME,
    reference.masked_cross_entropy,
    reference.masked_cross_entropy_backward,
    differentiable=("logits",),
)


@explains(masked_cross_entropy)
def _explain(logits: Tensor, targets: Tensor, mask: Tensor | None, **options: Any) -> Explanation:
    call = _prepare(logits, targets, mask, **options)
    rows = targets.numel()
    backend = call.choice.backend
    kernels = {
        "cpp": f"softdimo::{NAME}, {_library.cpu_vector_isa()}",
        "cuda": f"softdimo::{NAME}, CUDA",
    }
    notes = []
    if backend == "reference":
        notes.append("several [N, V] tensors are written to memory; rows are not batch-invariant")
    else:
        notes += check.copy_notes(logits)
    written = (rows if call.reduction == "none" else 1) * compute_dtype(logits).itemsize
    return Explanation(
        operator=NAME,
        backend=backend,
        kernel=kernels.get(backend, "plain torch"),
        reason=call.choice.reason,
        notes=tuple(notes),
        bytes=logits.numel() * logits.element_size() + rows * targets.element_size() + written,
        # Per entry: shift and sum, and one more sum for the smoothing.
        flops=(3 if call.label_smoothing else 2) * logits.numel(),
        exponentials=logits.numel(),
    )
