"""Augmentation whose random numbers are counter-based: a sample looks the same in every batch split."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from softdimo_fast.diffusion.draws import Draws

BACKGROUND = -1.0


def random_affine(
    images: Tensor,
    draws: Draws,
    *,
    degrees: float = 8.0,
    translate: float = 0.08,
    scale: float = 0.06,
) -> Tensor:
    """Rotates, scales and shifts every image by its own small random amount.

    An image is sampled bicubically at A x + t, where A turns by an angle, uniform in ± ``degrees``, and
    scales by a factor, uniform in 1 ± ``scale``; t is uniform in ± ``translate`` on both axes, in units of
    half the image's width and height. What lies outside of the image is background (-1).

    Args:
        images: floating ``[B, C, h, w]`` in [-1, 1].
        draws: of the same B samples; the streams "augment/rotation", "augment/scale" and
            "augment/shift" are used.
        degrees, translate, scale: not negative; scale < 1.

    Returns:
        A new tensor like ``images``, clamped to [-1, 1]. Rows depend on their own sample number alone.

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, shape or value.
    """
    _check(images, draws, degrees, translate, scale)
    angle = math.radians(degrees) * _symmetric(draws, "rotation")
    factor = 1 + scale * _symmetric(draws, "scale")
    shift = translate * _symmetric(draws, "shift", 2)
    grid = _grid(angle, factor, shift, *images.shape[-2:]).to(images)
    # Padding is zero: shift the values so that zero means background.
    moved = functional.grid_sample(
        images - BACKGROUND, grid, mode="bicubic", padding_mode="zeros", align_corners=False
    )
    return (moved + BACKGROUND).clamp(-1, 1)


def _symmetric(draws: Draws, stream: str, *shape: int) -> Tensor:
    """Uniform on (-1, 1), ``[B, *shape]``."""
    return 2 * draws.uniform(f"augment/{stream}", *shape) - 1


def _grid(angle: Tensor, factor: Tensor, shift: Tensor, height: int, width: int) -> Tensor:
    """Where to sample, ``[B, h, w, 2]`` = (x, y), each in [-1, 1] over the image.

    Written out instead of ``affine_grid``, whose batched matrix product may round differently in batches
    of different sizes.
    """

    def centres(size: int) -> Tensor:
        return (2 * torch.arange(size, device=angle.device) + 1) / size - 1

    x, y = centres(width)[None, None, :], centres(height)[None, :, None]
    cos, sin = ((factor * turn)[:, None, None] for turn in (torch.cos(angle), torch.sin(angle)))
    # A rotation of pixels: coordinates are in half widths and half heights, which may differ.
    aspect = height / width
    source_x = cos * x - sin * (y * aspect) + shift[:, 0, None, None]
    source_y = sin * (x / aspect) + cos * y + shift[:, 1, None, None]
    return torch.stack([source_x, source_y], dim=-1)


def _check(images: Tensor, draws: Draws, degrees: float, translate: float, scale: float) -> None:
    if not images.is_floating_point():
        raise TypeError(f"random_affine: images must be floating point, got {images.dtype}")
    if images.dim() != 4 or len(images) != len(draws):
        raise ValueError(
            f"random_affine: images must have shape [{len(draws)}, C, h, w] for {len(draws)} samples of "
            f"draws, got {list(images.shape)}"
        )
    for name, value in (("degrees", degrees), ("translate", translate), ("scale", scale)):
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"random_affine: {name} must be finite and not negative, got {value}")
    if scale >= 1:
        raise ValueError(f"random_affine: scale must be below 1, got {scale}")
