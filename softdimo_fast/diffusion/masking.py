"""The forward process of a masked diffusion model: how many positions are [MASK], and which.

Sources: MaskGIT (arXiv 2202.04200); Di[M]O (arXiv 2503.15457) and its public code, which masks exactly
round(N m(r)) positions, at least one, for r uniform on (0, 1).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

MaskSchedule = Literal["linear", "square", "cosine", "arccos", "mage"]
MASK_SCHEDULES: tuple[str, ...] = ("linear", "square", "cosine", "arccos", "mage")


def mask_ratio(schedule: MaskSchedule, r: Tensor) -> Tensor:
    """The share of masked positions m(r) in [0, 1] for ``r`` in (0, 1), any shape.

    ``linear`` r, ``square`` r^2, ``cosine`` cos(pi r / 2), ``arccos`` arccos(r) / (pi / 2); ``mage`` is the
    normal law N(0.55, 0.25^2) truncated to [0.5, 1]. The mean of cosine and of arccos is 2 / pi.

    Raises:
        ValueError: ``schedule`` is none of these.
    """
    match schedule:
        case "linear":
            return r
        case "square":
            return r.square()
        case "cosine":
            return torch.cos(math.pi / 2 * r)
        case "arccos":
            angle: Tensor = torch.arccos(r)
            return angle / (math.pi / 2)
        case "mage":
            return _truncated_normal(r, 0.55, 0.25, 0.5, 1.0)
    raise ValueError(
        f"mask_ratio: schedule must be one of {', '.join(MASK_SCHEDULES)}, got {schedule!r}"
    )


def _truncated_normal(r: Tensor, mean: float, deviation: float, low: float, high: float) -> Tensor:
    """The inverse distribution function of a normal law cut to [low, high]."""
    below, above = (0.5 * (1 + math.erf((x - mean) / deviation / 2**0.5)) for x in (low, high))
    mass = (below + r * (above - below)).double()
    quantile: Tensor = torch.special.ndtri(mass)
    return (mean + deviation * quantile).to(r.dtype).clamp(low, high)


def masked_count(ratio: Tensor, positions: int) -> Tensor:
    """round(positions * ratio), at least 1: int64, shaped as ``ratio``."""
    return (ratio * positions).round().long().clamp(1, positions)


def random_mask(count: Tensor, u: Tensor) -> Tensor:
    """bool, shaped as ``u``: True at exactly ``count[b]`` uniformly chosen positions of sample b.

    Args:
        count: int64 ``[B]``.
        u: ``[B, *token_shape]``, independent uniforms.
    """
    flat = u.flatten(1)
    # Stable: a tie of two float32 uniforms must not be decided by the batch's shape.
    rank = flat.argsort(dim=1, stable=True).argsort(dim=1)
    return (rank < count[:, None]).reshape(u.shape)
