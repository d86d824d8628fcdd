"""The forward process of a masked diffusion model: how many positions are [MASK], and which.

Sources: MaskGIT (arXiv 2202.04200); Di[M]O (arXiv 2503.15457) and its public code, which masks exactly
round(N m(r)) positions, at least one, for r uniform on (0, 1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from softdimo_fast.diffusion.draws import Draws, send

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


@dataclass(frozen=True)
class MaskedRows:
    """Which tokens of B samples are [MASK], and the positions where any is.

    Attributes:
        mask: bool ``[B, *token_shape]``.
        rows: int64 ``[R]``, ascending: position l of sample b has number b x L + l. They are what a loss
            over ``mask`` looks at, and all that the head has to compute.
        counts: int64 ``[B]``, how many tokens of each sample are [MASK].
    """

    mask: Tensor
    rows: Tensor
    counts: Tensor

    @classmethod
    def find(cls, mask: Tensor) -> MaskedRows:
        """Of a mask. How many rows there are is read: on a device that is a wait for it."""
        positions = mask if mask.dim() == 2 else mask.flatten(2).any(2)
        return cls(mask, positions.flatten().nonzero()[:, 0], mask.flatten(1).sum(1))

    def of(self, values: Tensor) -> Tensor:
        """``[B, *token_shape, ...]`` at the rows: ``[R, ...]``, or ``[R, G, ...]`` for grouped tokens."""
        return values.flatten(0, 1).index_select(0, self.rows)

    def spread(self, values: Tensor) -> Tensor:
        """``[B]``, a number for each sample, over its tokens at the rows: ``[R]``, or ``[R, G]``."""
        return self.of(values.view(-1, *[1] * (self.mask.dim() - 1)).expand(self.mask.shape))

    def put(self, values: Tensor, into: Tensor) -> Tensor:
        """``into``, ``[B, *token_shape]``, with ``values`` (``[R]``, or ``[R, G]``) in place at the rows."""
        return into.flatten(0, 1).index_copy(0, self.rows, values).view_as(into)

    @property
    def row_mask(self) -> Tensor:
        """:attr:`mask` at the rows. Only grouped tokens have any that is False there."""
        return self.of(self.mask)


def draw_mask(
    draws: Draws, stream: str, schedule: MaskSchedule, token_shape: tuple[int, ...]
) -> MaskedRows:
    """The mask of the forward process, from streams under ``stream``, on the draws' device.

    It is drawn on the host, which must know how many rows there are: to ask the device would be to wait for
    it. The copies to the device do not wait.
    """
    host, device = draws.on_host, draws.samples.device
    counts = draw_masked_count(host, stream, schedule, math.prod(token_shape))
    found = MaskedRows.find(random_mask(counts, host.uniform(f"{stream}/positions", *token_shape)))
    return MaskedRows(*(send(t, device) for t in (found.mask, found.rows, found.counts)))


def draw_masked_count(draws: Draws, stream: str, schedule: MaskSchedule, positions: int) -> Tensor:
    """int64 ``[B]`` on the CPU: how many tokens :func:`draw_mask` masks, without saying which."""
    r = draws.on_host.uniform(f"{stream}/ratio", 1)[:, 0]
    return masked_count(mask_ratio(schedule, r), positions)
