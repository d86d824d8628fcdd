"""What the convolutional tokenizers share: grids and sequences, group norms, quantised latents."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F


class Quantized(NamedTuple):
    """What a quantizer makes of a latent ``[B, D, h, w]``.

    Attributes:
        latent: the nearest codes ``[B, D, h, w]``; gradients pass straight through to the latent.
        codes: their ids, int64 ``[B, h, w]``.
        loss: of the quantizer, a scalar.
    """

    latent: Tensor
    codes: Tensor
    loss: Tensor


def group_norm(width: int) -> nn.GroupNorm:
    """32 groups, epsilon 1e-6, as in every published tokenizer of this kind."""
    return nn.GroupNorm(32, width, eps=1e-6)


def upsample(x: Tensor) -> Tensor:
    """Twice the height and width, nearest neighbour."""
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


def latent_to_codes(latent: Tensor) -> Tensor:
    """``[B, D, h, w]`` to ``[B, h w, D]``, row-major."""
    return latent.flatten(2).transpose(1, 2)


def codes_to_latent(codes: Tensor, grid: tuple[int, int] | None) -> Tensor:
    """``[B, L, D]`` to ``[B, D, h, w]``; without a ``grid`` (h, w) it is square.

    Raises:
        ValueError: L is no square, or not h w.
    """
    length = codes.shape[1]
    if grid is None:
        side = round(length**0.5)
        grid = (side, side)
    if grid[0] * grid[1] != length:
        raise ValueError(
            f"decode: {length} codes do not fill the grid {grid[0]} x {grid[1]}; give grid=(h, w)"
        )
    # At batch 1 a transposed view passes for channels-last in the compiler and not in the convolutions:
    # compiled attention after them then read other memory (torch 2.13, CPU).
    latent: Tensor = codes.transpose(1, 2).unflatten(2, grid).contiguous()
    return latent
