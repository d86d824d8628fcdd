"""``linear_soft_embedding``: the soft embedding of a linear head, without holding its logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from softdimo_fast.ops import _arguments as check
from softdimo_fast.ops import _backends, _library, _registration
from softdimo_fast.ops._explain import Explanation, explains
from softdimo_fast.ops.reference import linear_soft_embedding as reference
from softdimo_fast.ops.reference import soft_embedding as reference_soft_embedding
from softdimo_fast.ops.reference.common import compute_dtype

NAME = "linear_soft_embedding"

# memory="auto" keeps the logits when they take at most this many bytes.
KEEP_BYTES = 256 * 2**20

# What a forward keeps for its backward: nothing, statistics of the rows, the logits too.
NOTHING, STATISTICS, LOGITS = range(3)


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
    high_precision: bool
    keep: int
    choice: _backends.Choice

    @property
    def differentiable(self) -> tuple[Tensor | None, ...]:
        """The arguments that get a gradient, in the order of the backward operator's results."""
        linear = (self.hidden, self.weight, self.codebook, self.bias)
        return (*linear, self.row_temperature, self.mask_embedding)

    @property
    def multiplies_bfloat16(self) -> bool:
        """Whether the C++ kernels do, as they decide it."""
        tables = (self.hidden, self.weight, self.codebook)
        return (
            self.choice.backend == "cpp"
            and _library.cpu_isa().endswith("-bf16")
            and all(tensor.dtype == torch.bfloat16 for tensor in tables)
            and compute_dtype(*self.differentiable) == torch.float32
            and self.codebook.shape[-1] > reference_soft_embedding.NARROW_WIDTH
            and not (self.mask is not None and self.weight.shape[:-2].numel() > 1)
            and not self.high_precision
        )

    @property
    def logits_bytes(self) -> int:
        rows = self.hidden.numel() // self.hidden.shape[-1]
        itemsize = compute_dtype(*self.differentiable).itemsize
        return rows * self.weight.shape[:-1].numel() * itemsize


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
    r"""Soft embedding of a linear head: :math:`e_n = \sum_v \mathrm{softmax}(z_n / T)_v E_v`.

    With :math:`z_n = W h_n + b` it equals ``soft_embedding(hidden @ weight.T + bias, codebook)``
    (Soft-Di[M]O, arXiv 2509.22925), but the ``[N, V]`` logits need not exist: forward and backward
    compute them for one slice of rows at a time.

    Args:
        hidden: ``[..., H]``, any strides: the input of the head.
        weight: ``[V, H]``, or ``[G, V, H]`` for grouped vocabularies (every group reads the same
            hidden).
        codebook: ``[V, D]``, or ``[G, V, D]`` with a grouped weight.
        bias: broadcasts to the logits ``[..., V]`` (grouped ``[..., G, V]``), e.g. ``[V]`` or
            ``[L, V]``.
        temperature: T, a positive number, or a tensor that broadcasts to the rows
            ``hidden.shape[:-1]`` (grouped ``[..., G]``; then it gets a gradient).
        mask: bool, broadcasts to the rows. A True row is a [MASK] position: it gives
            ``mask_embedding``, its hidden is never read and gets zero gradient.
        mask_embedding: ``[D]`` or ``[G, D]``; required with ``mask``, an error without.
        memory: ``"recompute"`` never holds more than a slice of the logits: forward and backward
            take at most 4 MiB for each thread (for V to 20,000 and H to 8,000) beyond what they
            return and the wide sums of the gradients to weight, codebook and bias. ``"keep"`` holds
            all logits, in float32 or wider, from forward to backward, which saves backward one
            product and, with up to 32 MiB of scratch, many passes over weight and codebook: the
            faster one at large vocabularies, about as fast at V = 1024.
            ``"auto"`` keeps them when they take at most 256 MiB. Where no input requires a
            gradient nothing is kept. The choice does not change a bit of the results.
        precision: ``"default"`` or ``"high"``. By default the C++ backend multiplies in bfloat16,
            with float32 sums, where hidden, weight and codebook are bfloat16 and the processor has
            such products; ``"high"`` asks for float32. The reference always multiplies in float32
            or wider.
        backend: None chooses; ``"reference" | "cpp" | "cuda" | "triton"`` insist.

    Returns:
        ``[..., D]`` (grouped ``[..., G, D]``) in the codebook's dtype, contiguous. A row whose
        logits hold NaN, +inf or nothing but -inf gives NaN. Backward may need it: add to it, do not
        change it in place.

    Gradients go to hidden, weight, codebook, bias, a temperature tensor and mask_embedding, each
    only when required. A second derivative (eager only) holds all logits.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or value; the
            message names it. A temperature tensor that is not positive raises on the CPU in eager;
            elsewhere that row becomes NaN.
    """
    call = _prepare(
        hidden, weight, codebook, bias=bias, temperature=temperature, mask=mask,
        mask_embedding=mask_embedding, memory=memory, precision=precision, backend=backend,
    )  # fmt: skip
    if call.choice.backend == "cpp":
        output, *_ = _forward(*call[:-1])
        return output  # type: ignore[no-any-return]
    output, _ = torch.ops.softdimo_reference.linear_soft_embedding(*call[:-3], call.keep == LOGITS)
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
    device = hidden.device
    _check_bias(bias, hidden, weight)
    rows = [*hidden.shape[:-1], *weight.shape[:-2]]
    pattern = "hidden.shape[:-1]" if weight.dim() == 2 else "[*hidden.shape[:-1], G]"
    mask = check.rows_mask(NAME, "mask", mask, rows, device, pattern)
    check.require_mask_embedding(NAME, mask, mask_embedding, codebook)
    check.require_same_device(
        NAME, "hidden", device, weight=weight, codebook=codebook, bias=bias,
        mask_embedding=mask_embedding,
    )  # fmt: skip
    scalar, row_temperature = check.number_or_rows(
        NAME, "temperature", temperature, rows, device, positive=True, pattern=pattern,
        dtype=compute_dtype(hidden, weight, codebook, bias, mask_embedding),
    )  # fmt: skip
    check.require_choice(NAME, "memory", memory, ("auto", "keep", "recompute"))
    check.require_choice(NAME, "precision", precision, ("default", "high"))
    call = _Call(
        _autocast(hidden), _autocast(weight), _autocast(codebook), check.autocast(bias), scalar,
        row_temperature, mask, check.autocast(mask_embedding), precision == "high", NOTHING,
        _backends.choose(NAME, backend, _backends.obstacles(hidden, "cpp")),
    )  # fmt: skip
    return call._replace(keep=_what_to_keep(call, memory))


def _autocast(tensor: Tensor) -> Tensor:
    return check.autocast(tensor)  # type: ignore[return-value]


def _check_shapes(hidden: Tensor, weight: Tensor, codebook: Tensor) -> None:
    check.require_dim(NAME, "hidden", hidden, 1, "[..., H]")
    if weight.dim() not in (2, 3) or 0 in weight.shape:
        raise ValueError(
            f"{NAME}: weight must have shape [V, H] or [G, V, H] with no size 0, got "
            f"{check.shape(weight)}"
        )
    if weight.shape[-1] != hidden.shape[-1]:
        raise ValueError(
            f"{NAME}: weight must have H = {hidden.shape[-1]} columns (hidden has shape "
            f"{check.shape(hidden)}), got shape {check.shape(weight)}"
        )
    pattern = "[V, D]" if weight.dim() == 2 else "[G, V, D]"
    if codebook.shape[:-1] != weight.shape[:-1] or codebook.shape[-1] < 1:
        raise ValueError(
            f"{NAME}: codebook must have shape {pattern} with D >= 1 for a weight of shape "
            f"{check.shape(weight)}, got {check.shape(codebook)}"
        )


def _check_bias(bias: Tensor | None, hidden: Tensor, weight: Tensor) -> None:
    if bias is not None:
        check.require_floating(NAME, "bias", bias)
        logits = [*hidden.shape[:-1], *weight.shape[:-1]]
        check.rows_tensor(NAME, "bias", bias, logits, "and vocabulary, the logits' shape")


def _what_to_keep(call: _Call, memory: str) -> int:
    """What forward returns beside its result: nothing without a gradient, which alone would read it."""
    needed = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in call.differentiable
    )
    if not needed:
        return NOTHING
    if memory == "keep" or (memory == "auto" and call.logits_bytes <= KEEP_BYTES):
        return LOGITS
    return STATISTICS


# --------------------------------------------------------------------------------------------------
# torch: fake kernels, autograd, double backward

# Where _Call.differentiable stands in the forward operator's arguments.
_DIFFERENTIABLE = (0, 1, 2, 3, 5, 7)


def _fake_reference(
    hidden: Tensor, weight: Tensor, codebook: Tensor, bias: Tensor | None, temperature: float,
    row_temperature: Tensor | None, mask: Tensor | None, mask_embedding: Tensor | None,
    keep_logits: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    dtype = compute_dtype(hidden, weight, codebook, bias, row_temperature, mask_embedding)
    output, logits = reference.output_shapes(hidden, weight, codebook)
    kept = hidden.new_empty(logits if keep_logits else 0, dtype=dtype)
    return codebook.new_empty(output), kept


@torch.library.register_fake("softdimo::linear_soft_embedding")
def _fake(
    hidden: Tensor, weight: Tensor, codebook: Tensor, bias: Tensor | None, temperature: float,
    row_temperature: Tensor | None, mask: Tensor | None, mask_embedding: Tensor | None,
    high_precision: bool, keep: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    output, _ = _fake_reference(
        hidden, weight, codebook, bias, temperature, row_temperature, mask, mask_embedding, False
    )  # fmt: skip
    dtype = compute_dtype(hidden, weight, codebook, bias, row_temperature, mask_embedding)
    positions = hidden.shape[:-1].numel()
    kept = (weight.shape[:-2].numel(), weight.shape[-2], positions) if keep == LOGITS else (0,)
    logits = hidden.new_empty(kept, dtype=dtype)
    statistics = output.shape[:-1] if keep >= STATISTICS else (0,)
    keeps_soft = keep >= STATISTICS and codebook.dtype != logits.dtype
    return (
        output,
        logits,
        logits.new_empty(statistics),
        logits.new_empty(statistics),
        logits.new_empty(output.shape if keeps_soft else (0,)),
    )


def _fake_gradients(
    hidden: Tensor, weight: Tensor, codebook: Tensor, bias: Tensor | None,
    row_temperature: Tensor | None, mask_embedding: Tensor | None, wanted: list[bool],
) -> reference.Gradients:  # fmt: skip
    inputs = (hidden, weight, codebook, bias, row_temperature, mask_embedding)
    found = [
        hidden.new_empty(0) if tensor is None or not needed else tensor.new_empty(tensor.shape)
        for tensor, needed in zip(inputs, wanted, strict=True)
    ]
    return found[0], found[1], found[2], found[3], found[4], found[5]


def _fake_reference_backward(
    grad: Tensor, hidden: Tensor, weight: Tensor, codebook: Tensor, bias: Tensor | None,
    temperature: float, row_temperature: Tensor | None, mask: Tensor | None,
    mask_embedding: Tensor | None, logits: Tensor | None, wanted: list[bool],
) -> reference.Gradients:  # fmt: skip
    return _fake_gradients(hidden, weight, codebook, bias, row_temperature, mask_embedding, wanted)


@torch.library.register_fake("softdimo::linear_soft_embedding_backward")
def _fake_backward(
    grad: Tensor, hidden: Tensor, weight: Tensor, codebook: Tensor, bias: Tensor | None,
    temperature: float, row_temperature: Tensor | None, mask: Tensor | None,
    mask_embedding: Tensor | None, high_precision: bool, logits: Tensor | None, row_max: Tensor,
    row_sum: Tensor, soft: Tensor, wanted: list[bool],
) -> reference.Gradients:  # fmt: skip
    return _fake_gradients(hidden, weight, codebook, bias, row_temperature, mask_embedding, wanted)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    value, logits, row_max, row_sum, soft = output
    ctx.mark_non_differentiable(logits, row_max, row_sum, soft)
    kept = logits if inputs[-1] == LOGITS else None
    # The wide value is the output itself where they have the same dtype.
    wide = value if value.dtype == row_sum.dtype else soft
    _registration.save_inputs(ctx, (*inputs[:-1], kept, row_max, row_sum, wide), output)


def _save_reference(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits = output[1]
    ctx.mark_non_differentiable(logits)
    _registration.save_inputs(ctx, (*inputs[:-1], logits if inputs[-1] else None), output)


def _gradients_through(backward: Any) -> Callable[..., tuple[Tensor | None, ...]]:
    """The autograd formula that calls one of the backward operators."""

    def gradients(
        ctx: Any, grad: Tensor | None, *_kept: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        inputs = _registration.restore_inputs(ctx)
        wanted = [bool(ctx.needs_input_grad[position]) for position in _DIFFERENTIABLE]
        results = backward(grad, *inputs, wanted)
        return _registration.place(results, _DIFFERENTIABLE, wanted, len(ctx.needs_input_grad))

    return gradients


def _composite_backward(
    grad: Tensor, hidden: Tensor, weight: Tensor, codebook: Tensor, bias: Tensor | None,
    temperature: float, row_temperature: Tensor | None, mask: Tensor | None,
    mask_embedding: Tensor | None, *kept: Any,
) -> reference.Gradients:  # fmt: skip
    """Either backward as a function of the inputs: what was kept would hide how it depends on them."""
    return reference.linear_soft_embedding_backward(
        grad, hidden, weight, codebook, bias, temperature, row_temperature, mask, mask_embedding,
        None, kept[-1],
    )  # fmt: skip


_registration.opaque(
    f"{NAME}_backward", NAME, reference.linear_soft_embedding_backward, _fake_reference_backward
)
# A second output and what is kept between forward and backward: more than reference_operator covers.
_registration.opaque(
    NAME, NAME, reference.linear_soft_embedding, _fake_reference
).register_autograd(
    _gradients_through(torch.ops.softdimo_reference.linear_soft_embedding_backward),
    setup_context=_save_reference,
)
_backward = _registration.register_double_backward(
    f"{_registration.KERNELS}::{NAME}_backward", _composite_backward
)
_forward = _registration.differentiable(
    f"{_registration.KERNELS}::{NAME}", _gradients_through(_backward), _save
)
for _operator in (NAME, f"{NAME}_backward"):
    torch.library.register_vmap(
        f"{_registration.KERNELS}::{_operator}", _registration.vmap_refusal(NAME)
    )
_registration.register_double_backward(
    f"{_registration.REFERENCE}::{NAME}_backward", _composite_backward
)


@explains(linear_soft_embedding)
def _explain(hidden: Tensor, weight: Tensor, codebook: Tensor, **options: Any) -> Explanation:
    call = _prepare(hidden, weight, codebook, **options)
    groups, vocabulary = codebook.shape[:-2].numel(), codebook.shape[-2]
    hidden_width, width = hidden.shape[-1], codebook.shape[-1]
    rows = hidden.numel() // hidden_width
    kept = "kept for backward" if call.keep == LOGITS else "not kept"
    notes = [f"the logits ({call.logits_bytes / 2**20:.3g} MiB) are {kept}"]
    if call.multiplies_bfloat16:
        notes.append("products of bfloat16 with float32 sums; precision='high': of float32")
    if call.choice.backend == "cpp":
        kernel = f"softdimo::{NAME}, {_library.cpu_isa()}"
    else:
        itemsize = compute_dtype(*call.differentiable).itemsize
        slice_rows = reference.slice_rows(groups, vocabulary, hidden_width, width, itemsize)
        kernel = f"plain torch, {slice_rows} rows at a time"
        notes.append(
            "products by torch.matmul: repeatable for equal shapes, rows are not batch-invariant"
        )
    tensors = [tensor for tensor in call[:-1] if isinstance(tensor, Tensor)]
    return Explanation(
        operator=NAME,
        backend=call.choice.backend,
        kernel=kernel,
        reason=call.choice.reason,
        notes=tuple(notes),
        bytes=sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        + rows * groups * width * call.codebook.element_size(),
        flops=2 * rows * groups * vocabulary * (hidden_width + width),
        exponentials=rows * groups * vocabulary,
    )
