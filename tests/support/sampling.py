"""Draws of sample_tokens and the score of their law."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from softdimo_fast.ops.sample_tokens import sample_tokens

BACKENDS = ("reference", "cpp")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def chi_square_score(counts: Tensor, probabilities: Tensor, enough: float = 8.0) -> float:
    """How many standard deviations the chi-square statistic lies above its mean.

    Cells with fewer than ``enough`` expected counts are pooled. The cube root of a chi-square
    variable is close to normal (Wilson and Hilferty 1931).
    """
    expected = probabilities.double() * counts.sum()
    large = expected >= enough
    cells = torch.cat([expected[large], expected[~large].sum().reshape(1)])
    found = torch.cat([counts[large], counts[~large].sum().reshape(1)]).double()
    if float(cells[-1]) < enough:
        assert int(found[-1]) <= float(cells[-1]) + 6 * math.sqrt(float(cells[-1]) + 1)
        cells, found = cells[:-1], found[:-1]
    freedom = cells.numel() - 1
    statistic = float(((found - cells) ** 2 / cells).sum())
    spread = 2 / (9 * freedom)
    return ((statistic / freedom) ** (1 / 3) - (1 - spread)) / math.sqrt(spread)


def draw(row: Tensor, count: int, block: int = 4096, **options: object) -> Tensor:
    """``count`` draws from one row, a block of rows at a time (the row numbers run on)."""
    parts = []
    for start in range(0, count, block):
        numbers = torch.arange(start, min(start + block, count))
        logits = row.expand(numbers.numel(), -1)
        parts.append(sample_tokens(logits, row_ids=numbers, seed=11, **options))  # type: ignore[call-overload]
    return torch.cat(parts)


def operator_of(backend: str) -> Any:
    """The operator itself, which looks at no tensor's values."""
    space = torch.ops.softdimo if backend == "cpp" else torch.ops.softdimo_reference
    return space.sample_tokens


def near_the_cut(scaled: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """Rows, in float64, where the mass before some entry is p but for float32's rounding."""
    if top_p is None or top_p == 1:
        return torch.zeros(scaled.shape[:-1], dtype=torch.bool)
    ranked = scaled.sort(dim=-1, descending=True).values[..., :top_k]
    mass = torch.softmax(ranked, dim=-1)
    before = mass.cumsum(dim=-1) - mass
    return ((before - top_p).abs() < 3e-6).any(dim=-1)
