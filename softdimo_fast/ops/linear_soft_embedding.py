"""``linear_soft_embedding``: the soft embedding of a linear head's logits, without holding them all."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from softdimo_fast.ops import _arguments as check
from softdimo_fast.ops import _backends, _registration
from softdimo_fast.ops._explain import Explanation, explains
from softdimo_fast.ops.reference import linear_soft_embedding as reference
from softdimo_fast.ops.reference.common import compute_dtype

NAME = "linear_soft_embedding"

# memory="auto" keeps the logits when they take at most this many bytes.
KEEP_BYTES = 256 * 2**20


class _Call(NamedTuple):
    """A checked call: the arguments of the operator, and the choice of a backend."""

    hidden: Tensor
    weight: Tensor
    codebook: Tensor
    bias: Tensor | None
    temperature: float
    row_temperature: Tensor | None
    mask: Tensor | None
    mask_embedding: Tensor | None
    keep_logits: bool
    choice: _backends.Choice


def linear_soft_embedding(
    hidden: Tensor,
    weight: Tensor,
    codebook: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    mask_embedding: Tensor | None = None,
    memory: str = "auto",
    precision: str = "default",
    backend: str | None = None,
) -> Tensor:
    r"""The soft embedding of a linear head: :math:`e_n = \sum_v \mathrm{softmax}((W h_n + b) / T)_v E_v`.

    Equal to ``soft_embedding(hidden @ weight.T + bias, codebook)`` (Soft-Di[M]O, arXiv 2509.22925), but the
    ``[N, V]`` logits need not exist: forward and backward compute them for one slice of rows at a time.

    Args:
        hidden: ``[..., H]``, any strides: the input of the head.
        weight: ``[V, H]``, or ``[G, V, H]`` for grouped vocabularies (then every group reads the same hidden).
        codebook: ``[V, D]``, or ``[G, V, D]`` with a grouped weight.
        bias: broadcasts to the logits ``[..., V]`` (grouped ``[..., G, V]``), e.g. ``[V]`` or ``[L, V]``.
        temperature: T, a positive number, or a tensor that broadcasts to the rows ``hidden.shape[:-1]``
            (grouped ``[..., G]``; then it gets a gradient).
        mask: bool, broadcasts to the rows. A True row is a [MASK] position: it gives ``mask_embedding``, its
            hidden is not read and gets zero gradient.
        mask_embedding: ``[D]`` or ``[G, D]``; required with ``mask``, an error without.
        memory: ``"recompute"`` never holds the logits of more than one slice of rows, 4 MiB (or one row).
            ``"keep"`` holds all of them, in float32 or wider, from forward to backward, which saves
            backward one product. ``"auto"`` keeps them when they take at most 256 MiB. Where no input
            requires a gradient nothing is kept. The choice does not change a bit of the results.
        precision: ``"default"`` or ``"high"``, as in :func:`soft_embedding`; the reference backend always
            multiplies in float32 or wider.
        backend: None chooses; ``"reference" | "cpp" | "cuda" | "triton"`` insist.

    Returns:
        ``[..., D]`` (grouped ``[..., G, D]``) in the codebook's dtype, contiguous. A row whose logits hold NaN,
        +inf or nothing but -inf gives NaN.

    Gradients go to hidden, weight, codebook, bias, a temperature tensor and mask_embedding, each only when
    required. The second derivative (eager) holds all logits.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or value; the message
            names it. A temperature tensor that is not positive raises on the CPU in eager; elsewhere that
            row becomes NaN.
    """
    call = _prepare(
        hidden, weight, codebook, bias=bias, temperature=temperature, mask=mask,
        mask_embedding=mask_embedding, memory=memory, precision=precision, backend=backend,
    )  # fmt: skip
    output, _ = torch.ops.softdimo_reference.linear_soft_embedding(*call[:-1])
    return output  # type: ignore[no-any-return]


def _prepare(
    hidden: Tensor,
    weight: Tensor,
    codebook: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    mask_embedding: Tensor | None = None,
    memory: str = "auto",
    precision: str = "default",
    backend: str | None = None,
) -> _Call:
    """Checks the arguments, decides whether the logits are kept, and chooses a backend."""
    for name, tensor in (("hidden", hidden), ("weight", weight), ("codebook", codebook)):
        check.require_floating(NAME, name, tensor)
    _check_shapes(hidden, weight, codebook)
    device, grouped = hidden.device, weight.dim() == 3
    check.require_same_device(
        NAME,
        "hidden",
        device,
        weight=weight,
        codebook=codebook,
        bias=bias,
        mask_embedding=mask_embedding,
    )
    _check_bias(bias, hidden, weight)
    rows = [*hidden.shape[:-1], *weight.shape[:-2]]
    pattern = "[*hidden.shape[:-1], G]" if grouped else "hidden.shape[:-1]"
    mask = check.rows_mask(NAME, "mask", mask, rows, device, pattern)
    _check_mask_embedding(mask, mask_embedding, codebook)
    scalar, row_temperature = check.number_or_rows(
        NAME, "temperature", temperature, rows, device, positive=True, pattern=pattern
    )
    check.require_choice(NAME, "memory", memory, ("auto", "keep", "recompute"))
    check.require_choice(NAME, "precision", precision, ("default", "high"))
    choice = _backends.choose(NAME, backend, _obstacles(hidden))
    hidden, weight, codebook, bias, mask_embedding = (
        check.autocast(tensor) for tensor in (hidden, weight, codebook, bias, mask_embedding)
    )  # type: ignore[assignment]
    call = _Call(
        hidden, weight, codebook, bias, scalar, row_temperature, mask, mask_embedding, False, choice
    )
    return call._replace(keep_logits=_keeps_logits(call, memory))


def _check_shapes(hidden: Tensor, weight: Tensor, codebook: Tensor) -> None:
    check.require_dim(NAME, "hidden", hidden, 1, "[..., H]")
    if weight.dim() not in (2, 3):
        raise ValueError(
            f"{NAME}: weight must have shape [V, H] or [G, V, H], got {check.shape(weight)}"
        )
    if weight.shape[-1] != hidden.shape[-1]:
        raise ValueError(
            f"{NAME}: weight must have H = {hidden.shape[-1]} columns (hidden has shape "
            f"{check.shape(hidden)}), got shape {check.shape(weight)}"
        )
    if 0 in weight.shape:
        raise ValueError(
            f"{NAME}: weight must have V >= 1 and H >= 1, got shape {check.shape(weight)}"
        )
    if codebook.dim() != weight.dim() or codebook.shape[:-1] != weight.shape[:-1]:
        pattern = "[V, D]" if weight.dim() == 2 else "[G, V, D]"
        raise ValueError(
            f"{NAME}: codebook must have shape {pattern} for a weight of shape {check.shape(weight)}, got "
            f"{check.shape(codebook)}"
        )
    if codebook.shape[-1] < 1:
        raise ValueError(
            f"{NAME}: codebook must have a width D >= 1, got shape {check.shape(codebook)}"
        )


def _check_bias(bias: Tensor | None, hidden: Tensor, weight: Tensor) -> None:
    if bias is None:
        return
    check.require_floating(NAME, "bias", bias)
    logits = [*hidden.shape[:-1], *weight.shape[:-1]]
    check.rows_tensor(NAME, "bias", bias, logits, "of the logits")


def _check_mask_embedding(
    mask: Tensor | None, mask_embedding: Tensor | None, codebook: Tensor
) -> None:
    if mask is None:
        if mask_embedding is not None:
            raise ValueError(
                f"{NAME}: mask_embedding is given, but mask is None; pass both or neither"
            )
        return
    if mask_embedding is None:
        raise ValueError(f"{NAME}: mask_embedding is required when mask is given, got None")
    check.require_floating(NAME, "mask_embedding", mask_embedding)
    expected = [*codebook.shape[:-2], codebook.shape[-1]]
    pattern = "[D]" if codebook.dim() == 2 else "[G, D]"
    check.require_shape(NAME, "mask_embedding", mask_embedding, expected, pattern)


def _keeps_logits(call: _Call, memory: str) -> bool:
    """Whether forward returns the logits: never without a gradient, which alone would read them."""
    inputs = _differentiable_inputs(call)
    needed = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
    if memory == "recompute" or not needed:
        return False
    return memory == "keep" or _logits_bytes(call) <= KEEP_BYTES


def _differentiable_inputs(call: _Call) -> list[Tensor]:
    return [call[i] for i in _DIFFERENTIABLE if call[i] is not None]


def _logits_bytes(call: _Call) -> int:
    dtype = compute_dtype(*_differentiable_inputs(call))
    rows = call.hidden.numel() // call.hidden.shape[-1]
    return rows * call.weight.shape[:-1].numel() * dtype.itemsize


def _obstacles(hidden: Tensor) -> dict[str, str]:
    obstacles = _backends.device_obstacles(hidden)
    obstacles.setdefault("cpp", "this operator has no C++ kernel")
    obstacles.setdefault("cuda", "this operator has no CUDA kernel")
    return obstacles


# ---------------------------------------------------------------------------------------------------
# torch: fake kernels, autograd, double backward

# Where hidden, weight, codebook, bias, row_temperature and mask_embedding stand in the arguments.
_DIFFERENTIABLE = (0, 1, 2, 3, 5, 7)


def _fake(
    hidden: Tensor, weight: Tensor, codebook: Tensor, bias: Tensor | None, temperature: float,
    row_temperature: Tensor | None, mask: Tensor | None, mask_embedding: Tensor | None, keep_logits: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    dtype = compute_dtype(hidden, weight, codebook, bias, row_temperature, mask_embedding)
    output, logits = reference.output_shapes(hidden, weight, codebook)
    return codebook.new_empty(output), hidden.new_empty(logits if keep_logits else 0, dtype=dtype)


def _fake_backward(
    grad: Tensor, hidden: Tensor, weight: Tensor, codebook: Tensor, bias: Tensor | None, temperature: float,
    row_temperature: Tensor | None, mask: Tensor | None, mask_embedding: Tensor | None,
    logits: Tensor | None, wanted: list[bool],
) -> reference.Gradients:  # fmt: skip
    inputs = (hidden, weight, codebook, bias, row_temperature, mask_embedding)
    found = [
        hidden.new_empty(0) if tensor is None or not needed else tensor.new_empty(tensor.shape)
        for tensor, needed in zip(inputs, wanted, strict=True)
    ]
    return found[0], found[1], found[2], found[3], found[4], found[5]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits = output[1]
    ctx.mark_non_differentiable(logits)
    _registration.save_inputs(ctx, (*inputs[:-1], logits if inputs[-1] else None), output)


def _gradients(ctx: Any, grad: Tensor | None, _logits: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 9
    inputs = _registration.restore_inputs(ctx)
    wanted = [bool(ctx.needs_input_grad[position]) for position in _DIFFERENTIABLE]
    results = torch.ops.softdimo_reference.linear_soft_embedding_backward(grad, *inputs, wanted)
    return _registration.place(results, _DIFFERENTIABLE, wanted, 9)


def _composite_backward(
    grad: Tensor, hidden: Tensor, weight: Tensor, codebook: Tensor, bias: Tensor | None, temperature: float,
    row_temperature: Tensor | None, mask: Tensor | None, mask_embedding: Tensor | None,
    logits: Tensor | None, wanted: list[bool],
) -> reference.Gradients:  # fmt: skip
    """Backward as a function of the inputs alone: kept logits would hide how they depend on them."""
    return reference.linear_soft_embedding_backward(
        grad,
        hidden,
        weight,
        codebook,
        bias,
        temperature,
        row_temperature,
        mask,
        mask_embedding,
        None,
        wanted,
    )


def _register() -> None:
    namespace = _registration.REFERENCE
    forward = torch.library.custom_op(
        f"{namespace}::{NAME}", reference.linear_soft_embedding, mutates_args=()
    )
    backward = torch.library.custom_op(
        f"{namespace}::{NAME}_backward", reference.linear_soft_embedding_backward, mutates_args=()
    )
    forward.register_fake(_fake)
    backward.register_fake(_fake_backward)
    forward.register_autograd(_gradients, setup_context=_save)
    _registration.register_double_backward(f"{namespace}::{NAME}_backward", _composite_backward)
    for operator in (forward, backward):
        torch.library.register_vmap(operator, _registration.vmap_refusal(NAME))


_register()


@explains(linear_soft_embedding)
def _explain(hidden: Tensor, weight: Tensor, codebook: Tensor, **options: Any) -> Explanation:
    call = _prepare(hidden, weight, codebook, **options)
    groups, (vocabulary, width) = codebook.shape[:-2].numel(), codebook.shape[-2:]
    hidden_width = hidden.shape[-1]
    rows = hidden.numel() // hidden_width
    itemsize = compute_dtype(*_differentiable_inputs(call)).itemsize
    size = reference.slice_rows(groups, vocabulary, hidden_width, width, itemsize)
    tensors = [tensor for tensor in call[:-2] if isinstance(tensor, Tensor)]
    kept = "kept for backward" if call.keep_logits else "not kept"
    return Explanation(
        operator=NAME,
        backend=call.choice.backend,
        kernel=f"plain torch, {size} rows at a time",
        reason=call.choice.reason,
        notes=(
            f"the logits ({_logits_bytes(call) / 2**20:.3g} MiB) are {kept}",
            "products through torch.matmul: repeatable for equal shapes, rows are not batch-invariant",
        ),
        bytes=sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        + rows * groups * width * call.codebook.element_size(),
        flops=2 * rows * groups * vocabulary * (hidden_width + width),
        exponentials=rows * groups * vocabulary,
    )
