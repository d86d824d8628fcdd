"""Iterative decoding of a masked-diffusion teacher: one loop for every published sampler.

A sampler's config makes a :class:`DecodingPlan`, which says for each pass how strong guidance is, how hot the
draws are and how many positions stay [MASK]; the loop knows nothing else. Its randomness comes from
:class:`Draws`, or from noise tensors that are handed in (to repeat another implementation's run).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from softdimo_fast.diffusion.draws import Draws
from softdimo_fast.diffusion.guidance import Head, guided_logits
from softdimo_fast.diffusion.masking import MaskedRows
from softdimo_fast.models.conditions import Condition
from softdimo_fast.models.protocol import MaskedDiffusionModel
from softdimo_fast.ops import sample_tokens

Ties = Literal["exact", "fixed", "masked"]
Confidence = Literal["log_prob", "logit"]
# Called in each pass with its number, the tokens it saw, and these with a draw at every [MASK] position.
Observer = Callable[[int, Tensor, Tensor], None]


class DecodingStep(NamedTuple):
    """One pass.

    Attributes:
        number: counts from 0; it names its random numbers.
        fixed: how many positions leave [MASK].
        left: how many are [MASK] afterwards.
        guidance: s of u + s (c - u).
        temperature: T, by which the logits are divided.
        heat: factor on the standard Gumbel noise that is added to the confidences.
        draw_heat: factor on the Gumbel noise of the draw, argmax(logits / T + draw_heat g); 1 samples.
        time: the timestep of models that take one (``timed_condition``); None tells them of the mask
            (``masked_condition``).
    """

    number: int
    fixed: int
    left: int
    guidance: float = 1.0
    temperature: float = 1.0
    heat: float = 0.0
    draw_heat: float = 1.0
    time: float | None = None


@dataclass(frozen=True, kw_only=True)
class DecodingPlan:
    """All passes; the last leaves nothing at [MASK].

    Attributes:
        steps: the passes.
        ties: what happens to equally confident positions: ``"exact"`` fixes the planned number, whichever;
            ``"fixed"`` fixes all that are as confident as the last of these; ``"masked"`` fixes none that
            is as unconfident as the last of those that stay [MASK].
        confidence: the log-probability of the drawn token, or its guided logit / T.
        mask_column: also draw the [MASK] column, which counts as a token until the end.
    """

    steps: tuple[DecodingStep, ...]
    ties: Ties = "exact"
    confidence: Confidence = "log_prob"
    mask_column: bool = False


class SamplerConfig(Protocol):
    """What every sampler's config can do."""

    def plan(self, positions: int) -> DecodingPlan:
        """The passes for a sample of so many positions (counting each split of a group)."""


@dataclass(frozen=True)
class InjectedNoise:
    """Noise from outside, for S passes.

    Attributes:
        tokens: standard Gumbel noise of the draws ``[S, B, *token_shape, V]`` (V + 1 where the [MASK] column
            is drawn); None draws the likeliest token.
        order: standard Gumbel noise of the confidences ``[S, B, *token_shape]``; None adds none.
    """

    tokens: Tensor | None = None
    order: Tensor | None = None

    def draw(self, step: DecodingStep, logits: Tensor, masked: MaskedRows) -> tuple[Tensor, Tensor]:
        """Token and log-probability of every row of the logits ``[R, V]``, or ``[R, G, V]``."""
        scaled = logits.float() if logits.dtype.itemsize < 4 else logits
        # The logarithm of the probabilities, as the published samplers take it: where one is 1 to rounding,
        # its logarithm is 0.
        log_prob = (scaled / step.temperature).softmax(-1).log()
        keys = log_prob
        if self.tokens is not None:
            expected = (*masked.mask.shape, logits.shape[-1])
            if self.tokens.shape[1:] != expected:
                raise ValueError(
                    f"InjectedNoise: tokens must have shape [S, {', '.join(map(str, expected))}], "
                    f"got {list(self.tokens.shape)}"
                )
            keys = log_prob + step.draw_heat * masked.of(self.tokens[step.number])
        drawn = keys.argmax(-1)
        return drawn, log_prob.gather(-1, drawn[..., None])[..., 0]

    def gumbel(self, step: DecodingStep, shape: torch.Size) -> Tensor | None:
        """The order's noise of one pass."""
        if self.order is None:
            return None
        if self.order.shape[1:] != shape:
            raise ValueError(
                f"InjectedNoise: order must have shape [S, {', '.join(map(str, shape))}], got "
                f"{list(self.order.shape)}"
            )
        return self.order[step.number]


@dataclass(frozen=True)
class _DrawnNoise:
    """The same from counter-based random numbers."""

    draws: Draws

    def draw(self, step: DecodingStep, logits: Tensor, masked: MaskedRows) -> tuple[Tensor, Tensor]:
        if step.draw_heat == 0:
            return InjectedNoise().draw(step, logits, masked)
        shape = masked.mask.shape
        drawn, log_prob = sample_tokens(
            logits,
            temperature=step.temperature * step.draw_heat,
            seed=self.draws.key(f"confidence/tokens/{step.number}"),
            row_ids=masked.of(self.draws.row_ids(math.prod(shape[1:])).view(shape)),
            return_log_prob=True,
        )
        if step.draw_heat != 1:
            law = (logits / step.temperature).log_softmax(-1)
            log_prob = law.gather(-1, drawn[..., None])[..., 0]
        return drawn, log_prob

    def gumbel(self, step: DecodingStep, shape: torch.Size) -> Tensor:
        u = self.draws.uniform(f"confidence/order/{step.number}", *shape[1:])
        return -torch.log(-torch.log(u))


def _head(model: MaskedDiffusionModel, plan: DecodingPlan) -> Head:
    if not plan.mask_column:
        return model.head
    head: Head | None = getattr(model, "head_with_mask", None)
    if head is None:
        raise ValueError(
            f"confidence_sample: mask_column needs a model with a [MASK] column (head_with_mask), "
            f"{type(model).__name__} has none"
        )
    return head


def _fixed(confidence: Tensor, masked: Tensor, step: DecodingStep, ties: Ties) -> Tensor:
    """Which positions leave [MASK]: bool, shaped as the two ``[B, *token_shape]``."""
    flat = masked.flatten(1)
    if ties == "masked":
        ranked = confidence.masked_fill(~masked, math.inf).flatten(1)
        staying = (flat.sum(1, keepdim=True) - 1).clamp(max=step.left)
        last = ranked.sort(dim=1).values.gather(1, (staying - 1).clamp(min=0))
        fixed = flat & ~((ranked <= last) & (staying > 0))
    else:
        ranked = confidence.masked_fill(~masked, -math.inf).flatten(1)
        values, indices = ranked.topk(step.fixed, dim=1)
        if ties == "exact":
            fixed = torch.zeros_like(flat).scatter_(1, indices, True)
        else:
            fixed = flat & (ranked >= values[:, -1:])
    return fixed.view(masked.shape)


def decode_masked(
    model: MaskedDiffusionModel,
    condition: Condition,
    noise: Draws | InjectedNoise,
    plan: DecodingPlan,
    *,
    samples: int,
    observe: Observer | None = None,
) -> Tensor:
    """Tokens ``[samples, *token_shape]`` from nothing but [MASK].

    Logits are computed at the [MASK] positions alone. How many there are is read in each pass, for ties
    decide.
    """
    source = _DrawnNoise(noise) if isinstance(noise, Draws) else noise
    device = model.token_table.device
    tokens = torch.full((samples, *model.token_shape), model.mask_id, device=device)
    # Kept apart from the tokens: with a [MASK] column a drawn [MASK] is a token like the others.
    mask = torch.ones_like(tokens, dtype=torch.bool)
    head = _head(model, plan)
    for step in plan.steps:
        if step.time is None:
            told = model.masked_condition(condition, mask)
        else:
            told = model.timed_condition(condition, step.time)
        masked = MaskedRows.find(mask)
        logits = guided_logits(
            model, model.embed(tokens), told, step.guidance, rows=masked.rows, head=head
        )
        rows, confidence = source.draw(step, logits, masked)
        drawn = torch.where(mask, masked.put(rows, tokens), tokens)
        if observe is not None:
            observe(step.number, tokens, drawn)
        if step.left == 0:
            tokens = drawn
            break
        if plan.confidence == "logit":
            confidence = logits.gather(-1, rows[..., None])[..., 0] / step.temperature
        confidence = masked.put(confidence, confidence.new_zeros(tokens.shape))
        gumbel = source.gumbel(step, tokens.shape) if step.heat else None
        if gumbel is not None:
            confidence = confidence + step.heat * gumbel
        fixed = _fixed(confidence, mask, step, plan.ties)
        tokens = torch.where(fixed, drawn, tokens)
        mask = mask & ~fixed
    return tokens.clamp(max=model.vocabulary - 1) if plan.mask_column else tokens
