"""The one-step generator's input: random codes, some of them [MASK], on perturbed embeddings.

Source: Di[M]O (arXiv 2503.15457), section on token initialisation, and its public code. With no [MASK]
(r_init = 0) or nothing but [MASK] (r_init = 1) training fails: the input must hold both a question and
the randomness that picks an answer.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from softdimo_fast.diffusion.draws import Draws
from softdimo_fast.diffusion.masking import random_mask
from softdimo_fast.models.protocol import MaskedDiffusionModel

NoiseScale = Literal["unit", "embedding"]


def initial_tokens(
    model: MaskedDiffusionModel, draws: Draws, ratio: float | tuple[float, float]
) -> Tensor:
    """int64 ``[B, *token_shape]``: uniform codes with exactly round(N r_init) positions at [MASK].

    Args:
        ratio: r_init in [0, 1], or a pair (low, high) to draw it uniformly for each sample.
    """
    shape = model.token_shape
    codes = draws.integers("initial/codes", model.vocabulary, *shape)
    positions = codes[0].numel() if len(codes) else 1
    if isinstance(ratio, tuple):
        low, high = ratio
        share = low + (high - low) * draws.uniform("initial/ratio", 1)[:, 0]
        count = (share * positions).round().long()
    else:
        count = torch.full_like(draws.samples, round(ratio * positions))
    mask = random_mask(count, draws.uniform("initial/positions", *shape))
    return model.masked_tokens(codes, mask)


def perturb(embeddings: Tensor, noise: Tensor, sigma: float, scale: Tensor | float = 1.0) -> Tensor:
    """sqrt(1 - sigma^2) h + sigma scale eps: the variance is sigma^2 scale^2 + (1 - sigma^2) Var(h)."""
    kept = math.sqrt(1 - sigma**2)
    return kept * embeddings + sigma * scale * noise.to(embeddings.dtype)


def initial_embeddings(
    model: MaskedDiffusionModel,
    draws: Draws,
    *,
    ratio: float | tuple[float, float],
    sigma: float,
    noise_scale: NoiseScale = "unit",
) -> Tensor:
    """The perturbed inputs ``[B, L, D]`` of one generator call, for its ``generator_logits``."""
    tokens = initial_tokens(model, draws, ratio)
    return perturbed_embeddings(model, tokens, draws, sigma=sigma, noise_scale=noise_scale)


def perturbed_embeddings(
    model: MaskedDiffusionModel,
    tokens: Tensor,
    draws: Draws,
    *,
    sigma: float,
    noise_scale: NoiseScale = "unit",
) -> Tensor:
    """:func:`initial_embeddings` of given initial tokens.

    Args:
        sigma: in [0, 1].
        noise_scale: ``"unit"`` adds N(0, sigma^2) as the public code does; ``"embedding"`` scales it by
            the standard deviation of the token table, for tables far from unit variance.
    """
    embeddings = model.generator_input(model.embed(tokens))
    if sigma == 0:
        return embeddings
    noise = draws.normal("initial/noise", *embeddings.shape[1:])
    scale: Tensor | float = 1.0
    if noise_scale == "embedding":
        scale = model.generator_input(model.token_table.detach()).detach().std()
    return perturb(embeddings, noise, sigma, scale)
