"""The conditions of the text-to-image families: NamedTuples of tensors that count the samples first.

They hold what a text encoder made of the prompts; the models run no text encoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

MICRO_CONDITIONS = 5  # of Meissonic
NO_PROMPT = -1  # a condition that was not made of a numbered prompt


class TextCondition(NamedTuple):
    """What MaskGen and TA-TiTok's decoder are told of B samples; make one with :meth:`of`.

    The text of the unconditional branch travels with the samples, so that a condition can be cut, joined and
    sent as one thing, and the models hold no text of their own. What a use does not need has no rows
    (``[B, 0, width]``), and the model that needs it says so.

    Attributes:
        text: ``[B, T, W]``, tokens of the text encoder's penultimate block, without its final norm
            (published: CLIP ViT-L/14-336, T = 77, W = 768).
        pooled: ``[B, W]``, the text encoder's pooled output.
        score: ``[B]``, the aesthetic score asked for.
        null_text, null_pooled: the same of the empty prompt, for guidance.
        guidance: ``[B, T, W]``, tokens of the full text tower after its final norm, for TA-TiTok.
        prompt: int64 ``[B]``, the prompt's number among the run's prompts, for rewards that read the words
            themselves; :data:`NO_PROMPT` where there is none. The models do not look at it.
    """

    text: Tensor
    pooled: Tensor
    score: Tensor
    null_text: Tensor
    null_pooled: Tensor
    guidance: Tensor
    prompt: Tensor

    @classmethod
    def of(
        cls,
        text: Tensor,
        pooled: Tensor,
        *,
        score: float | Tensor = 6.5,
        null_text: Tensor | None = None,
        null_pooled: Tensor | None = None,
        guidance: Tensor | None = None,
        prompt: int | Tensor = NO_PROMPT,
    ) -> TextCondition:
        """A condition of B samples.

        Args:
            text: ``[B, T, W]``.
            pooled: ``[B, W]``.
            score: one for all, or ``[B]``. 6.5 is what the published sampler always asks for.
            null_text, null_pooled: ``[T, W]`` and ``[W]`` for all samples, or with a first dimension of 1
                or B. Guidance and condition dropping need them.
            guidance: ``[B, T, W]``. TA-TiTok's decoder needs it.
            prompt: one number for all, or ``[B]``.
        """
        batch, length, width = text.shape
        score = torch.as_tensor(score, dtype=torch.float32, device=text.device).expand(batch)
        absent = text.new_empty(batch, 0, width)
        return cls(
            text,
            pooled,
            score,
            absent if null_text is None else null_text.expand(batch, length, width),
            absent[:, 0:0, 0] if null_pooled is None else null_pooled.expand(pooled.shape),
            absent if guidance is None else guidance,
            _numbers(prompt, batch, text.device),
        )


class MeissonicCondition(NamedTuple):
    """What Meissonic is told of B samples; make one with :meth:`of`.

    The negative prompt of the unconditional branch travels with the samples, so that a condition can be cut,
    joined and sent as one thing. Where guidance is not wanted it has no rows (``[B, 0, width]``).

    Attributes:
        text: ``[B, T, W]``, tokens of the text encoder's penultimate block (published: CLIP ViT-H/14).
        pooled: ``[B, P]``, its projected pooled output.
        micro: float ``[B, 5]``: width, height, two crop offsets, aesthetic score.
        time: float ``[B]``, the timestep as the published network takes it: the step's index, counted down
            to 0, in sampling; 1000 x mask ratio in training.
        null_text, null_pooled: text and pooled of the negative prompt, for guidance.
        prompt: int64 ``[B]``, as in :class:`TextCondition`.
    """

    text: Tensor
    pooled: Tensor
    micro: Tensor
    time: Tensor
    null_text: Tensor
    null_pooled: Tensor
    prompt: Tensor

    @classmethod
    def of(
        cls,
        text: Tensor,
        pooled: Tensor,
        *,
        micro: Sequence[float] | Tensor = (1024, 1024, 0, 0, 6.0),
        time: float | Tensor = 0.0,
        null_text: Tensor | None = None,
        null_pooled: Tensor | None = None,
        prompt: int | Tensor = NO_PROMPT,
    ) -> MeissonicCondition:
        """A condition of B samples.

        Args:
            text: ``[B, T, W]``.
            pooled: ``[B, P]``.
            micro: five numbers for all, or ``[B, 5]``; the defaults are the published ones.
            time: one for all, or ``[B]``.
            null_text, null_pooled: ``[T, W]`` and ``[P]`` for all samples, or with a first dimension of 1
                or B. Guidance and condition dropping need them.
            prompt: one number for all, or ``[B]``.
        """
        batch, length, width = text.shape

        def numbers(value: Any, *shape: int) -> Tensor:
            return torch.as_tensor(value, dtype=torch.float32, device=text.device).expand(*shape)

        return cls(
            text,
            pooled,
            numbers(micro, batch, MICRO_CONDITIONS),
            numbers(time, batch),
            text.new_empty(batch, 0, width) if null_text is None
            else null_text.expand(batch, length, width),
            pooled.new_empty(batch, 0) if null_pooled is None
            else null_pooled.expand(batch, pooled.shape[1]),
            _numbers(prompt, batch, text.device),
        )  # fmt: skip


def _numbers(prompt: int | Tensor, batch: int, device: torch.device) -> Tensor:
    if isinstance(prompt, int):
        return torch.full((batch,), prompt, dtype=torch.int64, device=device)
    return prompt.to(device, torch.int64).expand(batch)
