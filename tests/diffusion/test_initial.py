"""The generator's input: random codes, an exact number of [MASK], noise of the stated variance."""

from __future__ import annotations

import math

import pytest
import torch
from support.checks import assert_same_bits
from support.training import FAMILIES, VOCABULARY, transformer

from softdimo_fast.diffusion import Draws, initial_embeddings, initial_tokens, perturb


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.6, 1.0])
def test_exactly_the_rounded_share_is_masked(family: str, ratio: float) -> None:
    model = transformer(family)
    tokens = initial_tokens(model, Draws.of(0, 0, 50), ratio)
    assert tokens.shape == (50, *model.token_shape)
    masked = (tokens == model.mask_id).flatten(1)
    assert set(masked.sum(1).tolist()) == {round(ratio * masked.shape[1])}


def test_codes_are_uniform() -> None:
    model = transformer()
    tokens = initial_tokens(model, Draws.of(0, 0, 4000), 0.5)
    counts = tokens.flatten().bincount(minlength=VOCABULARY + 1)[:VOCABULARY].double()
    expected = float(counts.sum()) / VOCABULARY
    # Chi-square with 7 degrees of freedom exceeds 24.3 with probability 0.001.
    assert float(((counts - expected) ** 2 / expected).sum()) < 24.3


def test_a_pair_draws_the_share_for_each_sample() -> None:
    model = transformer("grouped")  # 8 positions
    tokens = initial_tokens(model, Draws.of(0, 0, 2000), (0.25, 0.75))
    counts = (tokens == model.mask_id).flatten(1).sum(1)
    assert set(counts.tolist()) == {2, 3, 4, 5, 6}
    assert float(counts.double().mean()) == pytest.approx(4, abs=0.15)


@pytest.mark.parametrize("ratio", [0.4, (0.1, 0.9)])
def test_no_sample_depends_on_the_cut_of_the_batch(ratio: float | tuple[float, float]) -> None:
    model, whole = transformer(), Draws.of(5, 3, 7)
    options = {"ratio": ratio, "sigma": 0.3, "noise_scale": "embedding"}
    together = initial_embeddings(model, whole, **options)
    parts = [initial_embeddings(model, whole.part(i, 3), **options) for i in (0, 3, 6)]
    assert_same_bits(together, torch.cat(parts))


def test_perturb_keeps_the_stated_variance() -> None:
    draws = Draws.of(0, 0, 1000)
    h, noise = 2.5 * draws.normal("h", 40, 8), draws.normal("noise", 40, 8)
    for sigma, scale in [(0.1, 1.0), (0.6, 2.5), (1.0, 0.3)]:
        result = perturb(h, noise, sigma, scale).double()
        expected = sigma**2 * scale**2 + (1 - sigma**2) * float(h.double().var())
        # Four standard errors of a variance from 320000 numbers.
        assert float(result.var()) == pytest.approx(expected, rel=4 * math.sqrt(2 / 320_000))
    torch.testing.assert_close(perturb(h, noise, 0.0), h)
    assert perturb(h.bfloat16(), noise, 0.5).dtype == torch.bfloat16


@pytest.mark.parametrize("noise_scale", ["unit", "embedding"])
def test_the_noise_of_the_input(noise_scale: str) -> None:
    model, draws, sigma = transformer(), Draws.of(0, 0, 2000), 0.4
    with torch.no_grad():
        clean = model.embed(initial_tokens(model, draws, 0.6))
        options = {"ratio": 0.6, "noise_scale": noise_scale}
        noisy = initial_embeddings(model, draws, sigma=sigma, **options)
        assert_same_bits(initial_embeddings(model, draws, sigma=0.0, **options), clean)
    noise = (noisy - math.sqrt(1 - sigma**2) * clean).double()
    scale = float(model.token_table.detach().std()) if noise_scale == "embedding" else 1.0
    assert float(noise.mean()) == pytest.approx(0, abs=4 * sigma / math.sqrt(noise.numel()))
    assert float(noise.std()) == pytest.approx(sigma * scale, rel=0.02)
