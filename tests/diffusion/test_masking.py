"""Mask schedules and exact masks."""

from __future__ import annotations

import math

import pytest
import torch

from softdimo_fast.diffusion import MASK_SCHEDULES, Draws, mask_ratio, masked_count, random_mask

R = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000

# The truncated normal law of "mage" has mean mu + sd (phi(a) - phi(b)) / (Phi(b) - Phi(a)).
_A, _B = (0.5 - 0.55) / 0.25, (1 - 0.55) / 0.25
_DENSITY = [math.exp(-x * x / 2) / math.sqrt(2 * math.pi) for x in (_A, _B)]
_MASS = 0.5 * (math.erf(_B / math.sqrt(2)) - math.erf(_A / math.sqrt(2)))
MEANS = {
    "linear": 1 / 2,
    "square": 1 / 3,
    "cosine": 2 / math.pi,
    "arccos": 2 / math.pi,
    "mage": 0.55 + 0.25 * (_DENSITY[0] - _DENSITY[1]) / _MASS,
}


@pytest.mark.parametrize("schedule", MASK_SCHEDULES)
def test_mean_and_range(schedule: str) -> None:
    ratio = mask_ratio(schedule, R)  # type: ignore[arg-type]
    assert float(ratio.mean()) == pytest.approx(MEANS[schedule], abs=1e-4)
    assert float(ratio.min()) >= (0.5 if schedule == "mage" else 0)
    assert float(ratio.max()) <= 1
    steps = ratio.diff()
    assert bool((steps >= 0).all()) or bool((steps <= 0).all())
    single = mask_ratio(schedule, R.float())  # type: ignore[arg-type]
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), ratio, atol=1e-4, rtol=0)


def test_values() -> None:
    r = torch.tensor([0.25, 0.5])
    assert mask_ratio("linear", r).tolist() == [0.25, 0.5]
    assert mask_ratio("square", r).tolist() == [0.0625, 0.25]
    torch.testing.assert_close(mask_ratio("cosine", r), torch.tensor([0.923880, 0.707107]))
    torch.testing.assert_close(mask_ratio("arccos", r), torch.tensor([0.839138, 0.666667]))


def test_unknown_schedule() -> None:
    with pytest.raises(ValueError, match=r"must be one of linear, square, .*, got 'sine'"):
        mask_ratio("sine", R)  # type: ignore[arg-type]


def test_counts_are_rounded_and_at_least_one() -> None:
    ratio = torch.tensor([0.0, 0.01, 0.3, 0.449, 0.451, 0.99, 1.0])
    assert masked_count(ratio, 10).tolist() == [1, 1, 3, 4, 5, 10, 10]
    assert masked_count(ratio, 1).tolist() == [1] * 7


@pytest.mark.parametrize("shape", [(6,), (3, 4)])
def test_masks_have_exactly_the_count(shape: tuple[int, ...]) -> None:
    draws, positions = Draws.of(0, 0, 500), math.prod(shape)
    count = draws.integers("count", positions + 1)
    mask = random_mask(count, draws.uniform("u", *shape))
    assert mask.dtype == torch.bool
    assert mask.shape == (500, *shape)
    assert torch.equal(mask.flatten(1).sum(1), count)


def test_positions_are_uniform() -> None:
    n, positions, count = 20_000, 6, 2
    draws = Draws.of(0, 0, n)
    mask = random_mask(torch.full((n,), count), draws.uniform("u", positions)).double()
    each = mask.mean(0)
    p = count / positions
    assert float((each - p).abs().max()) < 4.5 * math.sqrt(p * (1 - p) / n)
    # So is every pair: 1 / 15.
    pairs = (mask.T @ mask / n)[torch.triu_indices(positions, positions, 1).unbind()]
    q = 1 / 15
    assert float((pairs - q).abs().max()) < 4.5 * math.sqrt(q * (1 - q) / n)
