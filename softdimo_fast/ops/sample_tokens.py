"""``sample_tokens``: exact draws from the token distribution of every row."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from softdimo_fast.ops import _arguments as check
from softdimo_fast.ops import _backends, _library, _random, _registration
from softdimo_fast.ops._explain import Explanation, explains
from softdimo_fast.ops.reference import sample_tokens as reference
from softdimo_fast.ops.reference.common import compute_dtype

NAME = "sample_tokens"

# As in csrc/cuda/sample_tokens.cu: the longest row that fits on chip.
_MOST_RESIDENT_BYTES = 32 * 1024


class _Call(NamedTuple):
    """A checked call: the arguments of the operator, and the choice of a backend."""

    logits: Tensor
    temperature: float
    row_temperature: Tensor | None
    top_k: int | None
    top_p: float | None
    seed: Tensor
    row_ids: Tensor | None
    log_prob: bool
    choice: _backends.Choice


@overload
def sample_tokens(
    logits: Tensor, *, temperature: float | Tensor = ..., top_k: int | None = ...,
    top_p: float | None = ..., seed: int | Tensor | None = ..., row_ids: Tensor | None = ...,
    generator: torch.Generator | None = ..., return_log_prob: Literal[False] = ...,
    backend: str | None = ...,
) -> Tensor: ...  # fmt: skip


@overload
def sample_tokens(
    logits: Tensor, *, temperature: float | Tensor = ..., top_k: int | None = ...,
    top_p: float | None = ..., seed: int | Tensor | None = ..., row_ids: Tensor | None = ...,
    generator: torch.Generator | None = ..., return_log_prob: Literal[True],
    backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def sample_tokens(
    logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | Tensor | None = None,
    row_ids: Tensor | None = None,
    generator: torch.Generator | None = None,
    return_log_prob: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Draws one token per row from :math:`\mathrm{softmax}(z_n / T)`, truncated if asked.

    The Gumbel-max trick: :math:`\mathrm{argmax}_v (z_{nv} / T + g_{nv})` over the kept entries,
    with counter-based noise g, the lowest index on ties. Truncation comes first (``top_k``, then
    ``top_p``, on ``logits / temperature``), then the noise. Nothing is differentiated: the logits
    are detached.

    Args:
        logits: ``[..., V]``, any strides, V >= 1. Autocast leaves them as they are.
        temperature: T, a positive number, or a tensor that broadcasts to the rows
            ``logits.shape[:-1]``.
        top_k: keep exactly min(k, V) entries, ties to the lowest index.
        top_p: keep the shortest prefix in (value descending, index ascending) order whose mass
            reaches p.
        seed: an int, or an int64 tensor ``[2]`` = (seed, offset) on the logits' device. None draws
            it from torch's generator.
        row_ids: int64, broadcasts to the rows: the row numbers that key the noise; default
            0 .. N-1. A row's token depends on its logits, its number and the seed alone.
        generator: eager only; draws the seed from this generator.
        return_log_prob: also return the log-probability of each drawn token.
        backend: None chooses; ``"reference" | "cpp" | "cuda" | "triton"`` insist.

    Returns:
        int64 tokens over the rows; with ``return_log_prob`` the pair (tokens, log-probabilities
        under the tempered, truncated law), the latter float32 (float64 where an input is float64).
        A row that holds no distribution (NaN, +inf, or nothing but -inf) gives token -1 and
        log-probability NaN.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or value; the
            message names it. A temperature tensor that is not positive raises on the CPU in eager;
            elsewhere that row gives token -1 and log-probability NaN.
    """
    call = _prepare(
        logits, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, row_ids=row_ids,
        generator=generator, return_log_prob=return_log_prob, backend=backend,
    )  # fmt: skip
    compiled = call.choice.backend in ("cpp", "cuda")
    namespace = torch.ops.softdimo if compiled else torch.ops.softdimo_reference
    tokens, log_prob = namespace.sample_tokens(*call[:-1])
    return (tokens, log_prob) if call.log_prob else tokens


def _prepare(
    logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | Tensor | None = None,
    row_ids: Tensor | None = None,
    generator: torch.Generator | None = None,
    return_log_prob: bool = False,
    backend: str | None = None,
) -> _Call:
    """Checks the arguments and chooses a backend."""
    check.require_floating(NAME, "logits", logits)
    check.require_vocabulary(NAME, "logits", logits)
    rows, device = logits.shape[:-1], logits.device
    scalar, row_temperature = check.number_or_rows(
        NAME, "temperature", temperature, rows, device, positive=True, dtype=compute_dtype(logits)
    )
    check.require_truncation(NAME, top_k, top_p)
    if row_temperature is not None:
        row_temperature = row_temperature.detach()
    return _Call(
        logits.detach(), scalar, row_temperature, top_k, None if top_p is None else float(top_p),
        _random.seed_pair(NAME, seed, generator, device),
        _random.row_numbers(NAME, row_ids, rows, device), bool(return_log_prob),
        _backends.choose(NAME, backend, _obstacles(logits, row_temperature)),
    )  # fmt: skip


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


@torch.library.register_fake("softdimo::sample_tokens")
def _fake(
    logits: Tensor, temperature: float, row_temperature: Tensor | None, top_k: int | None,
    top_p: float | None, seed: Tensor, row_ids: Tensor | None, log_prob: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    rows = logits.shape[:-1]
    on_cuda = logits.device.type == "cuda"  # whose kernel computes in float32
    dtype = torch.float32 if on_cuda else compute_dtype(logits, row_temperature)
    tokens = logits.new_empty(rows, dtype=torch.int64)
    return tokens, logits.new_empty(rows if log_prob else (0,), dtype=dtype)


torch.library.register_vmap("softdimo::sample_tokens", _registration.vmap_refusal(NAME))
_registration.reference_operator(NAME, reference.sample_tokens)


@explains(sample_tokens)
def _explain(logits: Tensor, **options: Any) -> Explanation:
    call = _prepare(logits, **_random.without_draw(options))
    rows, item = logits.numel() // logits.shape[-1], logits.element_size()
    backend = call.choice.backend
    truncates = call.top_k is not None or (call.top_p is not None and call.top_p < 1)
    kernels = {
        "cpp": f"softdimo::sample_tokens, {_library.cpu_vector_isa()}",
        "cuda": "softdimo::sample_tokens, CUDA",
    }
    notes = []
    if backend != "reference" and logits.stride(-1) != 1 and logits.shape[-1] > 1:
        notes.append(f"logits have stride {logits.stride(-1)} along V: one contiguous copy is made")
    if backend == "cpp" and truncates:
        notes.append(
            "truncation is exact and sorts nothing: a few sweeps over the row in the cache"
        )
    if backend == "cuda" and truncates:
        notes.append("truncation is exact and sorts nothing: sweeps over the row in shared memory")
    if backend == "cuda" and logits.shape[-1] * item > _MOST_RESIDENT_BYTES:
        notes.append(
            f"a row is longer than {_MOST_RESIDENT_BYTES // 1024} KB: every sweep reads it again"
        )
    if backend == "reference":
        notes.append("the noise and the probabilities are written to memory ([N, V])")
        notes.append("exponentials counts the two logarithms of the noise of every entry")
    each = {
        "cpp": int(call.log_prob) + int(call.top_p is not None and call.top_p < 1),
        "cuda": 1 + int(call.log_prob) + int(call.top_p is not None and call.top_p < 1),
    }
    return Explanation(
        operator=NAME,
        backend=backend,
        kernel=kernels.get(backend, "plain torch"),
        reason=call.choice.reason,
        notes=tuple(notes),
        bytes=logits.numel() * item + rows * (8 + (max(item, 4) if call.log_prob else 0)),
        flops=2 * logits.numel(),
        exponentials=logits.numel() * each.get(backend, int(call.log_prob) + 2),
    )
