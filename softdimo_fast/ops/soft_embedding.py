"""``soft_embedding``: the expected embedding of a token distribution."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from softdimo_fast.ops import _arguments as check
from softdimo_fast.ops import _backends, _library, _random, _registration
from softdimo_fast.ops._explain import Explanation, explains
from softdimo_fast.ops.reference import soft_embedding as reference
from softdimo_fast.ops.reference.common import compute_dtype
from softdimo_fast.ops.triton import layout as triton_layout
from softdimo_fast.ops.triton import soft_embedding as triton_kernels

NAME = "soft_embedding"

# The widest codebook of the CUDA kernels; vocabularies and widths up to TINY have kernels of their own, on
# CPUs from TINY_LEAST entries on (csrc/include/softdimo/cpu/soft_embedding_tiny.h).
CUDA_WIDTH = 128
TINY_LEAST, TINY_VOCABULARY, TINY_WIDTH = 16, 256, 16


class _Call(NamedTuple):
    """A checked call: the arguments every backend takes, and the choice of one."""

    logits: Tensor
    codebook: Tensor
    temperature: float
    row_temperature: Tensor | None
    mask: Tensor | None
    mask_embedding: Tensor | None
    seed: Tensor | None
    row_ids: Tensor | None
    hard: bool
    top_k: int | None
    top_p: float | None
    high_precision: bool
    choice: _backends.Choice


def soft_embedding(
    logits: Tensor,
    codebook: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    mask_embedding: Tensor | None = None,
    noise: str | None = None,
    hard: bool = False,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | Tensor | None = None,
    row_ids: Tensor | None = None,
    generator: torch.Generator | None = None,
    precision: str = "default",
    backend: str | None = None,
) -> Tensor:
    r"""The expected embedding of a token distribution: :math:`e_n = \sum_v \mathrm{softmax}(z_n / T)_v E_v`.

    The soft embedding of Soft-Di[M]O (arXiv 2509.22925): it replaces a sampled token's embedding, and
    gradients flow to the logits. Probabilities are never written to memory by the fused backends.

    Order of the options: truncation (``top_k``, then ``top_p``, on ``logits / temperature`` without noise),
    then noise, then softmax, then (``hard``) the straight-through value, then the mask.

    Args:
        logits: ``[..., V]``, any strides, V >= 1; with a grouped codebook ``[..., G, V]``.
        codebook: ``[V, D]``, or ``[G, V, D]`` for grouped vocabularies (MaskBit's splits).
        temperature: T, a positive number, or a tensor that broadcasts to the rows ``logits.shape[:-1]``
            (then it gets a gradient).
        mask: bool, broadcasts to the rows. A True row is a [MASK] position: it gives ``mask_embedding``,
            its logits are never read and get zero gradient.
        mask_embedding: ``[D]`` or ``[G, D]``; required with ``mask``, an error without.
        noise: ``"gumbel"`` gives softmax((logits + g) / T), the Concrete relaxation (as F.gumbel_softmax).
        hard: the value is ``codebook[argmax]`` (lowest index on ties), the gradient that of the soft value.
        top_k: keep exactly min(k, V) entries, ties to the lowest index. Gradients over the kept entries.
        top_p: keep the shortest prefix in (value descending, index ascending) order whose mass reaches p.
        seed: of the noise; an int, or an int64 tensor ``[2]`` = (seed, offset) on the logits' device. None
            draws it from torch's generator.
        row_ids: int64, broadcasts to the rows: the row numbers that key the noise; default 0 .. N-1.
        generator: eager only; draws the seed from this generator.
        precision: ``"default"`` or ``"high"``: probabilities enter the products in one or in two 16-bit
            terms (relative error 2^-9 or 2^-17 in bfloat16, 2^-12 or 2^-22 in float16). Only kernels that
            multiply in half precision differ. The C++ kernels do so for a bfloat16 codebook of more than 8
            columns, with sums in float32, on processors with AVX512-BF16 or AMX (but for up to 16 columns
            of 16 to 256 entries, without options beyond temperature and mask); the CUDA kernels for
            bfloat16 and float16 codebooks, where they may take two terms in either case
            (:func:`softdimo_fast.explain` tells). Everywhere else they, and the reference always, multiply
            in float32 or wider.
        backend: None chooses; ``"reference" | "cpp" | "cuda" | "triton"`` insist.

    Returns:
        ``[..., D]`` (grouped ``[..., G, D]``) in the codebook's dtype, contiguous. A row that holds NaN, +inf
        or nothing but -inf gives NaN. Where its dtype is that of the computation (a float32 codebook),
        backward needs it: add to it, do not change it in place.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or value; the message
            names it. A temperature tensor that is not positive raises on the CPU in eager; elsewhere that
            row becomes NaN.
    """
    call = _prepare(
        logits, codebook, temperature=temperature, mask=mask, mask_embedding=mask_embedding, noise=noise,
        hard=hard, top_k=top_k, top_p=top_p, seed=seed, row_ids=row_ids, generator=generator,
        precision=precision, backend=backend,
    )  # fmt: skip
    if call.choice.backend in ("cpp", "cuda"):
        output, *_ = _forward(
            call.logits, call.codebook, call.temperature, call.row_temperature, call.mask,
            call.mask_embedding, call.seed, call.row_ids, call.top_k, call.top_p, call.high_precision,
            call.hard,
        )  # fmt: skip
        return output  # type: ignore[no-any-return]
    if call.choice.backend == "triton":
        output, *_ = torch.ops.softdimo_triton.soft_embedding(
            call.logits, call.codebook, call.temperature, call.row_temperature, call.mask,
            call.mask_embedding, call.seed, call.row_ids, call.high_precision, call.hard,
        )  # fmt: skip
        return output  # type: ignore[no-any-return]
    return torch.ops.softdimo_reference.soft_embedding(*call[:-2])  # type: ignore[no-any-return]


def _prepare(
    logits: Tensor,
    codebook: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    mask_embedding: Tensor | None = None,
    noise: str | None = None,
    hard: bool = False,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | Tensor | None = None,
    row_ids: Tensor | None = None,
    generator: torch.Generator | None = None,
    precision: str = "default",
    backend: str | None = None,
) -> _Call:
    """Checks the arguments and chooses a backend."""
    check.require_floating(NAME, "logits", logits)
    check.require_floating(NAME, "codebook", codebook)
    check.require_vocabulary(NAME, "logits", logits)
    codebook = check.autocast(codebook)  # type: ignore[assignment]
    rows, device = logits.shape[:-1], logits.device
    _check_codebook(logits, codebook)
    check.require_same_device(
        NAME, "logits", device, codebook=codebook, mask_embedding=mask_embedding
    )
    mask = check.rows_mask(NAME, "mask", mask, rows, device)
    check.require_mask_embedding(NAME, mask, mask_embedding, codebook)
    mask_embedding = check.autocast(mask_embedding)
    scalar, row_temperature = check.number_or_rows(
        NAME, "temperature", temperature, rows, device, positive=True,
        dtype=compute_dtype(logits, codebook, mask_embedding),
    )  # fmt: skip
    check.require_choice(NAME, "precision", precision, ("default", "high"))
    check.require_truncation(NAME, top_k, top_p)
    seed_tensor = _check_noise(noise, seed, row_ids, generator, device)
    if noise is not None:
        row_ids = _random.row_numbers(NAME, row_ids, rows, device)
    tensors = (logits, codebook, row_temperature, mask_embedding)
    choice = _backends.choose(
        NAME, backend, _obstacles(*tensors, truncates=top_k is not None or top_p is not None)
    )
    return _Call(
        logits, codebook, scalar, row_temperature, mask, mask_embedding, seed_tensor, row_ids, bool(hard),
        top_k, None if top_p is None else float(top_p), precision == "high", choice,
    )  # fmt: skip


def _obstacles(
    logits: Tensor, codebook: Tensor, *others: Tensor | None, truncates: bool
) -> dict[str, str]:
    obstacles = _backends.obstacles(logits, "cpp", "cuda", "triton")
    if "triton" not in obstacles:
        beyond = triton_kernels.obstacle(logits, codebook, *others, truncates=truncates)
        if beyond is not None:
            obstacles["triton"] = beyond
    if "cuda" in obstacles:
        return obstacles
    width = codebook.shape[-1]
    beyond = _library.cuda_obstacle(logits.device, _shared_kilobytes(*codebook.shape[-2:]))
    if beyond is not None:
        obstacles["cuda"] = beyond
    elif compute_dtype(logits, codebook, *others) == torch.float64:
        obstacles["cuda"] = "the CUDA kernels compute in float32, and an input is float64"
    elif width > CUDA_WIDTH:
        obstacles["cuda"] = (
            f"the CUDA kernels take codebooks of at most {CUDA_WIDTH} columns, this one has {width}"
        )
    elif truncates:
        obstacles["cuda"] = "the CUDA kernels do not truncate, and top_k or top_p is given"
    return obstacles


def _shared_kilobytes(vocabulary: int, width: int) -> int:
    """The most that a block of the CUDA kernels shares (is_tiny in csrc/include/softdimo/cuda)."""
    return 48 if vocabulary <= 256 and width <= 16 else 144


def _check_codebook(logits: Tensor, codebook: Tensor) -> None:
    if codebook.dim() not in (2, 3):
        raise ValueError(
            f"{NAME}: codebook must have shape [V, D] or [G, V, D], got {check.shape(codebook)}"
        )
    if codebook.shape[-2] != logits.shape[-1]:
        raise ValueError(
            f"{NAME}: codebook must have V = {logits.shape[-1]} rows (logits have shape "
            f"{check.shape(logits)}), got shape {check.shape(codebook)}"
        )
    if 0 in (codebook.shape[0], codebook.shape[-1]):
        raise ValueError(
            f"{NAME}: codebook must have a width D >= 1 (and at least one group), got shape "
            f"{check.shape(codebook)}"
        )
    if codebook.dim() == 3 and (logits.dim() < 2 or logits.shape[-2] != codebook.shape[0]):
        raise ValueError(
            f"{NAME}: a grouped codebook {check.shape(codebook)} needs logits [..., G, V] with G = "
            f"{codebook.shape[0]}, got logits of shape {check.shape(logits)}"
        )


def _check_noise(
    noise: object,
    seed: object,
    row_ids: object,
    generator: torch.Generator | None,
    device: torch.device,
) -> Tensor | None:
    """The seed pair where noise is asked for; settings of noise without noise are refused."""
    if noise is None:
        for name, value in (("seed", seed), ("row_ids", row_ids), ("generator", generator)):
            if value is not None:
                raise ValueError(f"{NAME}: {name} is given, but noise is None; pass noise='gumbel'")
        return None
    if noise != "gumbel":
        raise ValueError(f"{NAME}: noise must be None or 'gumbel', got {noise!r}")
    return _random.seed_pair(NAME, seed, generator, device)


# ---------------------------------------------------------------------------------------------------
# torch: fake kernels, autograd, double backward


def _keeps_soft(codebook: Tensor, statistics: torch.dtype, hard: bool) -> bool:
    """Whether the wide soft value that backward needs differs from the output and is kept apart."""
    return hard or codebook.dtype != statistics


@torch.library.register_fake("softdimo::soft_embedding")
def _fake(
    logits: Tensor, codebook: Tensor, temperature: float, row_temperature: Tensor | None, mask: Tensor | None,
    mask_embedding: Tensor | None, seed: Tensor | None, row_ids: Tensor | None, top_k: int | None,
    top_p: float | None, high_precision: bool, hard: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    rows, width = logits.shape[:-1], codebook.shape[-1]
    statistics = compute_dtype(logits, codebook, row_temperature, mask_embedding)
    output = codebook.new_empty((*rows, width))
    soft = (*rows, width) if _keeps_soft(codebook, statistics, hard) else (0,)
    truncation = (0,) if top_k is None and top_p is None else rows
    return (
        output,
        logits.new_empty(rows, dtype=torch.float64),
        logits.new_empty(rows, dtype=statistics),
        logits.new_empty(soft, dtype=statistics),
        logits.new_empty(truncation, dtype=statistics),
        logits.new_empty(truncation, dtype=torch.int64),
    )


@torch.library.register_fake("softdimo::soft_embedding_backward")
def _fake_backward(
    grad: Tensor, logits: Tensor, codebook: Tensor, temperature: float, row_temperature: Tensor | None,
    mask: Tensor | None, mask_embedding: Tensor | None, seed: Tensor | None, row_ids: Tensor | None,
    top_k: int | None, top_p: float | None, high_precision: bool, row_max: Tensor, row_sum: Tensor,
    soft: Tensor, row_threshold: Tensor, row_last: Tensor, wanted: list[bool],
) -> reference.Gradients:  # fmt: skip
    inputs = (logits, codebook, row_temperature, mask_embedding)
    gradients = [
        logits.new_empty(0) if tensor is None or not needed else tensor.new_empty(tensor.shape)
        for tensor, needed in zip(inputs, wanted, strict=True)
    ]
    return gradients[0], gradients[1], gradients[2], gradients[3]


# Where logits, codebook, row_temperature and mask_embedding stand in the forward operator's arguments.
_DIFFERENTIABLE = (0, 1, 3, 5)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    value, row_max, row_sum, soft, *truncation = output
    ctx.mark_non_differentiable(*output[1:])
    *arguments, hard = inputs
    kept = soft if _keeps_soft(inputs[1], row_sum.dtype, hard) else value
    _registration.save_inputs(ctx, (*arguments, row_max, row_sum, kept, *truncation), output)


def _gradients(ctx: Any, grad: Tensor | None, *_unused: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 12
    inputs = _registration.restore_inputs(ctx)
    wanted = [bool(ctx.needs_input_grad[position]) for position in _DIFFERENTIABLE]
    results = _backward(grad, *inputs, wanted)
    return _registration.place(results, _DIFFERENTIABLE, wanted, 12)


def _composite_backward(
    grad: Tensor, logits: Tensor, codebook: Tensor, temperature: float, row_temperature: Tensor | None,
    mask: Tensor | None, mask_embedding: Tensor | None, seed: Tensor | None, row_ids: Tensor | None,
    top_k: int | None, top_p: float | None, high_precision: bool, row_max: Tensor, row_sum: Tensor,
    soft: Tensor, row_threshold: Tensor, row_last: Tensor, wanted: list[bool],
) -> reference.Gradients:  # fmt: skip
    """The kernel's backward in plain torch: what its own derivative is taken of."""
    return reference.soft_embedding_backward(
        grad, logits, codebook, temperature, row_temperature, mask, mask_embedding, seed, row_ids, False,
        top_k, top_p, wanted,
    )  # fmt: skip


_forward = _registration.differentiable("softdimo::soft_embedding", _gradients, _save)
_backward = _registration.register_double_backward(
    "softdimo::soft_embedding_backward", _composite_backward
)
for _operator in ("softdimo::soft_embedding", "softdimo::soft_embedding_backward"):
    torch.library.register_vmap(_operator, _registration.vmap_refusal(NAME))
_registration.reference_operator(
    NAME,
    reference.soft_embedding,
    reference.soft_embedding_backward,
    differentiable=("logits", "codebook", "row_temperature", "mask_embedding"),
)


def _cuda_kernel(call: _Call) -> str:
    """The CUDA kernel of a call: what it multiplies in."""
    vocabulary, width = call.codebook.shape[-2:]
    dtype = call.codebook.dtype
    if vocabulary <= TINY_VOCABULARY and width <= TINY_WIDTH:
        products = "float32"
    elif dtype == torch.float32:
        products = "bfloat16, p and codebook in three terms"
    elif call.high_precision or call.seed is not None or call.logits.dtype == torch.float32:
        products = f"{str(dtype).removeprefix('torch.')}, p in two terms"
    else:
        products = str(dtype).removeprefix("torch.")
    return f"softdimo::soft_embedding, CUDA, products in {products}"


def _triton_kernel(call: _Call) -> str:
    return triton_kernels.kernel(call.logits, call.codebook, call.high_precision)


def _is_tiny(call: _Call) -> bool:
    """Whether the C++ kernels for tiny vocabularies take a call that computes in float32."""
    vocabulary, width = call.codebook.shape[-2:]
    plain = call.seed is None and call.top_k is None and call.top_p is None and not call.hard
    return plain and TINY_LEAST <= vocabulary <= TINY_VOCABULARY and width <= TINY_WIDTH


def _cpp_kernel(call: _Call) -> str:
    """The C++ kernel of a call: its instruction set and what it multiplies in."""
    isa = _library.cpu_isa()
    tensors = (call.logits, call.codebook, call.row_temperature, call.mask_embedding)
    if compute_dtype(*tensors) == torch.float64:
        products = "float64"
    elif _is_tiny(call):
        products = "float32, tiny vocabulary"
    elif call.codebook.shape[-1] <= reference.NARROW_WIDTH:
        products = "float32, sums in float64"
    elif call.codebook.dtype == torch.bfloat16 and isa.endswith("bf16"):
        products = "bfloat16, p in two terms" if call.high_precision else "bfloat16"
    else:
        products = "float32"
    return f"softdimo::soft_embedding, {isa}, products in {products}"


@explains(soft_embedding)
def _explain(logits: Tensor, codebook: Tensor, **options: Any) -> Explanation:
    noisy = options.get("noise") is not None
    call = _prepare(logits, codebook, **(_random.without_draw(options) if noisy else options))
    vocabulary, width = codebook.shape[-2:]
    rows = logits.numel() // vocabulary
    backend = call.choice.backend
    cpp, fused = backend == "cpp", backend != "reference"
    kernels = {"cpp": _cpp_kernel, "cuda": _cuda_kernel, "triton": _triton_kernel}
    notes = []
    if backend in ("cpp", "cuda") and logits.stride(-1) != 1 and vocabulary > 1:
        notes.append(f"logits have stride {logits.stride(-1)} along V: one contiguous copy is made")
    if cpp and (options.get("top_k") is not None or options.get("top_p") is not None):
        notes.append("top_k and top_p take a pass over the logits of their own")
    if backend == "triton":
        notes += triton_layout.copy_notes(logits=logits)
    if not fused:
        notes.append("the [N, V] probabilities are written to memory; rows are not batch-invariant")
    return Explanation(
        operator=NAME,
        backend=backend,
        kernel=kernels[backend](call) if fused else "plain torch",
        reason=call.choice.reason,
        notes=tuple(notes),
        bytes=logits.numel() * logits.element_size()
        + (codebook.numel() + rows * width) * call.codebook.element_size(),
        flops=2 * rows * vocabulary * width,
        exponentials=rows * vocabulary,
    )
