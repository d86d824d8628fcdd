"""Tokenizers: images to tokens and back, hard and soft."""

from __future__ import annotations

import pytest
import torch
from support.checks import assert_same_bits
from support.training import FAMILIES, VOCABULARY, images, tokenizer
from torch.nn import functional

from softdimo_fast.diffusion import Draws

DRAWS = Draws.of(0, 0, 6)


@pytest.fixture(params=FAMILIES)
def decoder(request: pytest.FixtureRequest) -> torch.nn.Module:
    return tokenizer(request.param)


def test_shapes(decoder: torch.nn.Module) -> None:
    pictures = images(6)[0]
    tokens = decoder.encode(pictures)
    assert tokens.shape == (6, *decoder.token_shape)
    assert tokens.dtype == torch.int64
    assert 0 <= int(tokens.min()) <= int(tokens.max()) < VOCABULARY
    assert decoder.decode(tokens).shape == pictures.shape
    assert decoder.codebook.shape[-2] == VOCABULARY


def test_decode_soft_of_one_hot_is_decode(decoder: torch.nn.Module) -> None:
    tokens = DRAWS.integers("tokens", VOCABULARY, *decoder.token_shape)
    logits = 1e4 * functional.one_hot(tokens, VOCABULARY).float()
    assert_same_bits(decoder.decode_soft(logits), decoder.decode(tokens))
    # Columns beyond the codebook are left out.
    wider = torch.cat([logits, torch.full_like(logits[..., :2], 1e6)], dim=-1)
    assert_same_bits(decoder.decode_soft(wider), decoder.decode(tokens))


def test_decode_soft_gives_gradients_to_the_logits(decoder: torch.nn.Module) -> None:
    logits = DRAWS.normal("logits", *decoder.token_shape, VOCABULARY).requires_grad_()
    (gradient,) = torch.autograd.grad(decoder.decode_soft(logits).square().sum(), logits)
    assert bool((gradient != 0).any())
    # The softmax does not see a constant: the gradient of a row sums to 0.
    torch.testing.assert_close(
        gradient.sum(-1), torch.zeros_like(gradient[..., 0]), atol=1e-6, rtol=0
    )


def test_nearest_is_the_nearest_code_and_the_first_of_equals() -> None:
    vq = tokenizer()
    vectors = DRAWS.normal("vectors", 4, 4)
    expected = torch.cdist(vectors, vq.codebook.expand(6, -1, -1)).argmin(-1)
    assert torch.equal(vq.nearest(vectors), expected)
    vq.codes[5] = vq.codes[2]
    assert vq.nearest(vq.codes)[None].tolist() == [[0, 1, 2, 3, 4, 2, 6, 7]]
    assert torch.equal(vq.nearest(vq.codes[[1, 3]]), torch.tensor([1, 3]))


def test_nearest_is_as_exact_under_autocast() -> None:
    vq = tokenizer()
    vectors = vq.codes[torch.arange(VOCABULARY)] + 1e-3
    vq.codes[4:] = vq.codes[:4] + 4e-3  # nearer than bfloat16 can tell
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(vq.nearest(vectors[:4]), torch.arange(4))


def test_the_codebook_takes_no_gradient_steps() -> None:
    vq = tokenizer()
    names = {name for name, _ in vq.named_parameters()}
    assert not names & {"codes", "usage", "totals"}
    assert {"codes", "usage", "totals"} <= set(vq.state_dict())


def test_an_affine_decoder_makes_no_error_and_a_quadratic_reward_half_the_covariance() -> None:
    """f(e) = E f(E_j) for affine f; for the square of an affine map the gap is tr(A^T A Cov)."""
    decoder = tokenizer("grouped").double()
    logits = 1.5 * DRAWS.normal("logits", *decoder.token_shape, VOCABULARY).double()
    p = logits.softmax(-1)
    # Patches are independent, and the two groups of a patch have 64 joint tokens.
    mean = torch.zeros(6, 1, 4, 4, dtype=torch.float64)
    energy = torch.zeros(6, dtype=torch.float64)
    for first in range(VOCABULARY):
        for second in range(VOCABULARY):
            tokens = torch.tensor([first, second]).expand(1, *decoder.token_shape)
            joint = p[:, :, 0, first] * p[:, :, 1, second]
            weights = joint.view(6, 1, 2, 2).repeat_interleave(2, 2).repeat_interleave(2, 3)
            image = decoder.decode(tokens)
            mean += weights * image
            energy += (weights * image.square()).flatten(1).sum(1)
    soft = decoder.decode_soft(logits)
    torch.testing.assert_close(soft, mean)
    codes = decoder.codebook
    centred = codes - torch.einsum("blgv,gvd->blgd", p, codes)[..., None, :]
    covariance = torch.einsum("blgv,blgvd,blgve->blgde", p, centred, centred)
    a = decoder.decoder.weight.unflatten(1, (2, 3)).transpose(0, 1)  # [G, pixels, bits]
    gap = torch.einsum("gpd,blgde,gpe->b", a, covariance, a)
    torch.testing.assert_close(energy - soft.square().flatten(1).sum(1), gap)
