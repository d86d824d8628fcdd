"""``token_statistics``: log-normalizer, entropy and confidence of every row, in one pass."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from softdimo_fast.ops import _arguments as check
from softdimo_fast.ops import _backends, _library, _registration
from softdimo_fast.ops._explain import Explanation, explains
from softdimo_fast.ops.reference import token_statistics as reference
from softdimo_fast.ops.reference.common import compute_dtype

NAME = "token_statistics"


class TokenStatistics(NamedTuple):
    """Statistics of softmax(logits / T), one value per row."""

    log_normalizer: Tensor
    entropy: Tensor
    max_prob: Tensor


class _Call(NamedTuple):
    """A checked call: the arguments every backend takes, and the choice of one."""

    logits: Tensor
    temperature: float
    row_temperature: Tensor | None
    mask: Tensor | None
    choice: _backends.Choice


def token_statistics(
    logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> TokenStatistics:
    r"""Health metrics of a token distribution :math:`p_n = \mathrm{softmax}(z_n / T)`.

    :math:`\log \sum_v e^{z_{nv} / T}`, :math:`-\sum_v p_{nv} \log p_{nv}` (in nats, with
    0 log 0 = 0) and :math:`\max_v p_{nv}`. Nothing is differentiated: the logits are detached.

    Args:
        logits: ``[..., V]``, any strides, V >= 1. Autocast leaves them as they are.
        temperature: T, a positive number, or a tensor that broadcasts to the rows
            ``logits.shape[:-1]``.
        mask: bool, broadcasts to the rows: the rows that count. The others are never read and give
            zeros.
        backend: None chooses; ``"reference" | "cpp" | "cuda" | "triton"`` insist.

    Returns:
        The named tuple (log_normalizer, entropy, max_prob), each over the rows, float32 (float64
        where an input is float64). A row that holds NaN, +inf or nothing but -inf gives NaN.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or value; the
            message names it. A temperature tensor that is not positive raises on the CPU in eager;
            elsewhere that row becomes NaN.
    """
    call = _prepare(logits, temperature=temperature, mask=mask, backend=backend)
    if call.choice.backend in ("cpp", "cuda"):
        return TokenStatistics(*torch.ops.softdimo.token_statistics(*call[:-1]))
    return TokenStatistics(*torch.ops.softdimo_reference.token_statistics(*call[:-1]))


def _prepare(
    logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> _Call:
    """Checks the arguments and chooses a backend."""
    check.require_floating(NAME, "logits", logits)
    check.require_vocabulary(NAME, "logits", logits)
    rows, device = logits.shape[:-1], logits.device
    scalar, row_temperature = check.number_or_rows(
        NAME, "temperature", temperature, rows, device, positive=True, dtype=compute_dtype(logits)
    )
    if row_temperature is not None:
        row_temperature = row_temperature.detach().expand(rows)
    mask = check.rows_mask(NAME, "mask", mask, rows, device)
    choice = _backends.choose(NAME, backend, _obstacles(logits, row_temperature))
    return _Call(logits.detach(), scalar, row_temperature, mask, choice)


def _obstacles(logits: Tensor, row_temperature: Tensor | None) -> dict[str, str]:
    obstacles = _backends.obstacles(logits, "cpp", "cuda")
    if "cuda" in obstacles:
        return obstacles
    beyond = _library.cuda_obstacle(logits.device)
    if beyond is not None:
        obstacles["cuda"] = beyond
    elif torch.float64 in (logits.dtype, row_temperature is not None and row_temperature.dtype):
        obstacles["cuda"] = "the CUDA kernel computes in float32, and an input is float64"
    return obstacles


def _fake(
    logits: Tensor, temperature: float, row_temperature: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    rows = logits.shape[:-1]
    dtype = compute_dtype(logits, row_temperature)
    first, second, third = (logits.new_empty(rows, dtype=dtype) for _ in range(3))
    return first, second, third


torch.library.register_fake("softdimo::token_statistics", _fake)
torch.library.register_vmap("softdimo::token_statistics", _registration.vmap_refusal(NAME))
_registration.reference_operator(NAME, reference.token_statistics)


@explains(token_statistics)
def _explain(logits: Tensor, **options: Any) -> Explanation:
    call = _prepare(logits, **options)
    rows = logits.numel() // logits.shape[-1]
    backend = call.choice.backend
    kernels = {
        "cpp": f"softdimo::token_statistics, {_library.cpu_vector_isa()}",
        "cuda": "softdimo::token_statistics, CUDA",
    }
    notes = []
    if backend == "reference":
        notes.append("the [N, V] probabilities are written to memory")
    elif backend == "cpp":
        notes += check.copy_notes(logits)
    return Explanation(
        operator=NAME,
        backend=backend,
        kernel=kernels.get(backend, "plain torch"),
        reason=call.choice.reason,
        notes=tuple(notes),
        bytes=logits.numel() * logits.element_size() + 3 * rows * max(logits.element_size(), 4),
        flops=2 * logits.numel(),
        exponentials=logits.numel(),
    )
