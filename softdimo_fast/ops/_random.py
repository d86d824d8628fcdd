"""Counter-based noise: where the (seed, offset) pair of an operator comes from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from softdimo_fast.ops._arguments import require_same_device, rows_tensor, shape

_INT64 = 2**63


def seed_pair(
    operator: str, seed: object, generator: torch.Generator | None, device: torch.device
) -> Tensor:
    """The int64 tensor ``[2]`` = (seed, offset) on ``device``.

    ``seed=None`` draws both with :func:`torch.randint` from torch's own generator (or ``generator``), so
    that ``torch.manual_seed``, activation checkpointing, CUDA graphs and compile treat the operator as
    they treat dropout.
    """
    if seed is None:
        if generator is not None and torch.compiler.is_compiling():
            raise ValueError(
                f"{operator}: generator works in eager only; pass seed= under torch.compile"
            )
        return torch.randint(
            0, _INT64 - 1, (2,), dtype=torch.int64, device=device, generator=generator
        )
    if generator is not None:
        raise ValueError(f"{operator}: seed and generator exclude each other, got both")
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or tuple(seed.shape) != (2,):
            raise ValueError(
                f"{operator}: a seed tensor must be int64 of shape [2] = (seed, offset), got "
                f"{seed.dtype} of shape {shape(seed)}"
            )
        require_same_device(operator, "the input", device, seed=seed)
        return seed
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(
            f"{operator}: seed must be an int, an int64 tensor [2] = (seed, offset) or None, got "
            f"{type(seed).__name__}"
        )
    if not -_INT64 <= seed < _INT64:
        raise ValueError(f"{operator}: seed must fit in 64 signed bits, got {seed}")
    # Filled on the device: torch.tensor([...], device="cuda") would wait for a copy.
    return torch.cat(
        [torch.full((1,), seed, dtype=torch.int64, device=device),
         torch.zeros(1, dtype=torch.int64, device=device)]
    )  # fmt: skip


def without_draw(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a call that is explained, not made: it must not advance any generator."""
    if options.get("seed") is not None:
        return dict(options)
    return {**options, "seed": 0, "generator": None}


def row_numbers(
    operator: str, row_ids: object, rows: Sequence[int], device: torch.device
) -> Tensor | None:
    """``row_ids`` over the rows (a view), or None for 0 .. N-1."""
    if row_ids is None:
        return None
    if not isinstance(row_ids, Tensor) or row_ids.dtype != torch.int64:
        what = row_ids.dtype if isinstance(row_ids, Tensor) else type(row_ids).__name__
        raise TypeError(f"{operator}: row_ids must be an int64 tensor or None, got {what}")
    require_same_device(operator, "the input", device, row_ids=row_ids)
    return rows_tensor(operator, "row_ids", row_ids, rows)
