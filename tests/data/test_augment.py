"""random_affine: the right geometry, counter-based draws, and the values it promises."""

from __future__ import annotations

import math

import pytest
import torch
from support.checks import assert_same_bits
from torch import Tensor
from torch.nn import functional

from softdimo_fast.data.augment import random_affine
from softdimo_fast.diffusion.draws import Draws


def smooth_images(count: int, height: int = 8, width: int = 8) -> Tensor:
    return functional.interpolate(
        torch.rand(count, 1, 3, 3) * 2 - 1, (height, width), mode="bilinear"
    )


def test_agrees_with_affine_grid() -> None:
    images, draws = smooth_images(64), Draws.of(3, 5, 64)
    angle, factor = (2 * draws.uniform(f"augment/{stream}") - 1 for stream in ("rotation", "scale"))
    shift = 0.08 * (2 * draws.uniform("augment/shift", 2) - 1)
    angle, factor = angle * 8 * math.pi / 180, 1 + 0.06 * factor
    cos, sin = factor * angle.cos(), factor * angle.sin()
    theta = torch.stack([cos, -sin, shift[:, 0], sin, cos, shift[:, 1]], 1).reshape(-1, 2, 3)
    grid = functional.affine_grid(theta, list(images.shape), align_corners=False)
    expected = functional.grid_sample(images + 1, grid, mode="bicubic", align_corners=False)
    torch.testing.assert_close(
        random_affine(images, draws), expected.clamp(0, 2) - 1, atol=1e-5, rtol=0
    )


def test_nothing_moves_without_strength() -> None:
    images = torch.rand(4, 2, 8, 6) * 2 - 1
    same = random_affine(images, Draws.of(0, 0, 4), degrees=0, translate=0, scale=0)
    torch.testing.assert_close(same, images, atol=1e-6, rtol=0)


def test_a_shift_moves_the_pixels_and_brings_in_background() -> None:
    """The middle pixels of a ramp see no border; torch's cubic keeps a slope up to a tenth of a pixel."""
    centres = (2 * torch.arange(8) + 1) / 8 - 1
    ramp = (0.5 * centres).expand(40, 1, 8, 8)
    draws = Draws.of(0, 0, 40)
    drawn = 2 * draws.uniform("augment/shift", 2) - 1
    moved = random_affine(ramp, draws, degrees=0, scale=0, translate=0.2)
    expected = (0.5 * (centres + 0.2 * drawn[:, :1]))[:, None, None, 3:5].expand(40, 1, 2, 2)
    torch.testing.assert_close(moved[:, :, 3:5, 3:5], expected, atol=0.0125, rtol=0)
    # More than an image and the two pixels of the cubic's tail.
    gone = drawn.abs().amax(1) > 2.6 / 4
    far = random_affine(ramp, draws, degrees=0, scale=0, translate=4)
    assert 5 < int(gone.sum()) < 40
    assert bool((far[gone] == -1).all())


def test_a_rotation_keeps_distances_in_images_that_are_not_square() -> None:
    """The second moments of a moved bar turn: their trace and determinant stay."""
    y, x = torch.meshgrid(torch.arange(32) - 15.5, torch.arange(64) - 31.5, indexing="ij")
    bar = (-((x / 5) ** 2) - (y / 2) ** 2).exp() * 2 - 1
    images = bar.expand(16, 1, 32, 64)
    moved = random_affine(images, Draws.of(1, 0, 16), degrees=40, translate=0, scale=0) + 1
    mass = moved.sum((-2, -1))
    xx, yy, xy = ((moved * m).sum((-2, -1)) / mass for m in (x * x, y * y, x * y))
    before = bar + 1
    trace = ((before * (x * x + y * y)).sum() / before.sum()).expand(16, 1)
    torch.testing.assert_close(xx + yy, trace, rtol=2e-2, atol=0)
    determinant = (before * x * x).sum() * (before * y * y).sum() / before.sum() ** 2
    torch.testing.assert_close(xx * yy - xy**2, determinant.expand(16, 1), rtol=4e-2, atol=0)
    assert float(xy.abs().max()) > 1


def test_a_sample_does_not_depend_on_its_batch() -> None:
    images, draws = smooth_images(37), Draws.of(11, 2, 37)
    whole = random_affine(images, draws)
    parts = [
        random_affine(images[a:b], Draws.of(11, 2, b - a, first=a))
        for a, b in ((0, 1), (1, 8), (8, 24), (24, 37))
    ]
    assert_same_bits(whole, torch.cat(parts))


def test_draws_differ_by_seed_step_and_sample_and_leave_the_global_generator_alone() -> None:
    images = smooth_images(1).expand(3, 1, 8, 8)
    state = torch.get_rng_state()
    first = random_affine(images, Draws.of(0, 0, 3))
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first, random_affine(images, Draws.of(1, 0, 3)))
    assert not torch.equal(first, random_affine(images, Draws.of(0, 1, 3)))


def test_values_stay_in_range_and_keep_their_dtype() -> None:
    images = torch.where(torch.rand(50, 1, 8, 8) > 0.5, 1.0, -1.0)
    for dtype in (torch.float32, torch.float64):
        moved = random_affine(images.to(dtype), Draws.of(0, 0, 50))
        assert moved.dtype == dtype
        assert float(moved.abs().max()) <= 1
    assert random_affine(images[:0], Draws.of(0, 0, 0)).shape == (0, 1, 8, 8)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"images": torch.zeros(2, 1, 8, 8, dtype=torch.int64)},
            TypeError,
            "images must be floating",
        ),
        ({"images": torch.zeros(3, 1, 8, 8)}, ValueError, r"images must have shape \[2, C, h, w\]"),
        ({"images": torch.zeros(2, 8, 8)}, ValueError, r"got \[2, 8, 8\]"),
        ({"degrees": -1.0}, ValueError, "degrees must be finite and not negative, got -1.0"),
        ({"translate": math.nan}, ValueError, "translate must be finite and not negative, got nan"),
        ({"scale": 1.0}, ValueError, "scale must be below 1, got 1.0"),
    ],
)
def test_errors(change: dict[str, object], error: type[Exception], message: str) -> None:
    arguments = {"images": torch.zeros(2, 1, 8, 8), "draws": Draws.of(0, 0, 2), **change}
    with pytest.raises(error, match=message):
        random_affine(**arguments)  # type: ignore[arg-type]
