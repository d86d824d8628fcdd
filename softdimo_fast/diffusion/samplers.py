"""Samplers: MaskGIT's confidence-based decoding of a teacher, and the one step of a generator."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from softdimo_fast import _config
from softdimo_fast.diffusion.decoding import (
    DecodingPlan,
    DecodingStep,
    InjectedNoise,
    Observer,
    SamplerConfig,
    decode_masked,
)
from softdimo_fast.diffusion.draws import Draws
from softdimo_fast.diffusion.initial import NoiseScale, initial_tokens, perturbed_embeddings
from softdimo_fast.models.conditions import Condition, batch_size
from softdimo_fast.models.protocol import MaskedDiffusionModel, Tokenizer
from softdimo_fast.ops import sample_tokens

Decode = Literal["sample", "argmax", "soft"]


@dataclass(frozen=True, kw_only=True)
class ConfidenceSamplerConfig:
    """MaskGIT's iterative decoding (arXiv 2202.04200, section 3.2).

    Attributes:
        steps: forward passes; more than the number of positions are not made.
        guidance_scale: s of u + s (c - u).
        temperature: of the tokens' softmax.
        confidence_temperature: of the Gumbel noise on the confidences, annealed linearly to 0.
    """

    steps: int = 16
    guidance_scale: float = 1.0
    temperature: float = 1.0
    confidence_temperature: float = 4.0

    def __post_init__(self) -> None:
        _config.require_types(self)
        _config.require_range(self, "steps", self.steps, minimum=1)
        _config.require_range(self, "temperature", self.temperature, above=0)
        _config.require_range(
            self, "confidence_temperature", self.confidence_temperature, minimum=0
        )

    def plan(self, positions: int) -> DecodingPlan:
        """The passes for a sample of so many positions."""
        steps: list[DecodingStep] = []
        before = positions
        for i in range(self.steps):
            left = masked_after(i, self.steps, positions)
            heat = self.confidence_temperature * (1 - (i + 1) / self.steps)
            steps.append(
                DecodingStep(
                    number=i, fixed=before - left, left=left, guidance=self.guidance_scale,
                    temperature=self.temperature, heat=heat,
                )
            )  # fmt: skip
            before = left
            if left == 0:
                break
        return DecodingPlan(steps=tuple(steps))


def masked_after(step: int, steps: int, positions: int) -> int:
    """How many positions are still [MASK] after ``step`` + 1 of ``steps`` passes: the cosine schedule.

    Every pass fixes at least one position, and the last fixes all that are left.
    """
    if step + 1 >= steps:
        return 0
    left = round(positions * math.cos(math.pi / 2 * (step + 1) / steps))
    return max(0, min(left, positions - 1 - step))


@torch.no_grad()
def confidence_sample(
    model: MaskedDiffusionModel,
    condition: Condition,
    noise: Draws | InjectedNoise,
    config: SamplerConfig,
    *,
    observe: Observer | None = None,
) -> Tensor:
    """Tokens ``[B, *token_shape]`` of a teacher, starting from nothing but [MASK].

    Each pass draws a token at every [MASK] position and keeps the most confident ones: the largest
    log-probability of the drawn token plus Gumbel noise.

    Args:
        condition: of B samples.
        noise: of B samples; tensors repeat another implementation's run.
        config: :class:`ConfidenceSamplerConfig`, or the sampler that a teacher was published with:
            :class:`MaskGitSamplerConfig`, :class:`MaskBitSamplerConfig`, :class:`MaskGenSamplerConfig`,
            :class:`MeissonicSamplerConfig`.
        observe: called in each pass with its number, the tokens that it sees, and these with a draw at
            every [MASK] position.

    Raises:
        ValueError: injected noise of another shape; a [MASK] column that the model does not have.
    """
    plan = config.plan(math.prod(model.token_shape))
    return decode_masked(
        model, condition, noise, plan, samples=batch_size(condition), observe=observe
    )


@dataclass(frozen=True, kw_only=True)
class OneStepConfig:
    """The input and the draw of a one-step generator.

    Attributes:
        initial_ratio: r_init, the share of [MASK] in the input; a pair draws it for each sample.
        sigma: the noise on the input embeddings.
        noise_scale: see :func:`softdimo_fast.diffusion.initial_embeddings`.
        temperature: of the tokens' softmax.
    """

    initial_ratio: float | tuple[float, float] = 0.6
    sigma: float = 0.1
    noise_scale: NoiseScale = "unit"
    temperature: float = 1.0

    def __post_init__(self) -> None:
        _config.require_types(self)
        ratio = self.initial_ratio
        low, high = ratio if isinstance(ratio, tuple) else (ratio, ratio)
        _config.require(
            0 <= low <= high <= 1,
            self,
            "initial_ratio",
            self.initial_ratio,
            "a number in [0, 1], or a pair low <= high",
        )
        _config.require_range(self, "sigma", self.sigma, minimum=0, maximum=1)
        _config.require_range(self, "temperature", self.temperature, above=0)


def one_step_logits(
    generator: MaskedDiffusionModel, condition: Condition, draws: Draws, config: OneStepConfig
) -> Tensor:
    """z_theta(x_init, c): the logits ``[B, *token_shape, V]`` of one forward pass."""
    return generator.generator_logits(*one_step_input(generator, condition, draws, config))


def one_step_input(
    generator: MaskedDiffusionModel, condition: Condition, draws: Draws, config: OneStepConfig
) -> tuple[Tensor, Condition]:
    """x_init as ``generator_logits`` takes it, and the condition with what the model is told of its mask."""
    tokens = initial_tokens(generator, draws, config.initial_ratio)
    inputs = perturbed_embeddings(
        generator, tokens, draws, sigma=config.sigma, noise_scale=config.noise_scale
    )
    return inputs, generator.masked_condition(condition, tokens == generator.mask_id)


def draw_tokens(logits: Tensor, draws: Draws, *, temperature: float = 1.0) -> Tensor:
    """x_theta ~ softmax(z_theta / T): int64, over the rows of ``logits``."""
    rows = logits.shape[:-1]
    return sample_tokens(
        logits,
        temperature=temperature,
        seed=draws.key("generator/tokens"),
        row_ids=draws.row_ids(math.prod(rows[1:])).view(rows),
    )


def decode_logits(
    tokenizer: Tokenizer, logits: Tensor, draws: Draws, decode: Decode, *, temperature: float = 1.0,
    condition: Condition = None,
) -> Tensor:  # fmt: skip
    """Images of a generator's logits: a sampled token, the likeliest one, or the soft embedding."""
    if decode == "soft":
        return tokenizer.decode_soft(logits, condition, temperature=temperature)
    logits = logits[..., : tokenizer.codebook.shape[-2]]
    if decode == "argmax":
        return tokenizer.decode(logits.argmax(-1), condition=condition)
    tokens = draw_tokens(logits, draws, temperature=temperature)
    return tokenizer.decode(tokens, condition=condition)


@torch.no_grad()
def one_step_sample(
    generator: MaskedDiffusionModel,
    tokenizer: Tokenizer,
    condition: Condition,
    draws: Draws,
    config: OneStepConfig,
    *,
    decode: Decode = "sample",
) -> Tensor:
    """Images ``[B, C, height, width]`` in one forward pass."""
    logits = one_step_logits(generator, condition, draws, config)
    return decode_logits(
        tokenizer, logits, draws, decode, temperature=config.temperature, condition=condition
    )
