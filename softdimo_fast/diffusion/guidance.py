"""Classifier-free guidance in one convention: guided = u + s (c - u), so s = 1 is the conditional model.

MaskBit and MaskGen write c + w (c - u): s = 1 + w (:func:`guidance_from_weight`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from softdimo_fast.models.conditions import Condition, concatenate
from softdimo_fast.models.protocol import MaskedDiffusionModel


class GuidedLogits(NamedTuple):
    """Logits of the conditional branch, and of the unconditional one where guidance needs it."""

    conditional: Tensor
    unconditional: Tensor | None


def guidance_from_weight(w: float) -> float:
    """The scale s of this package for the weight w of MaskBit and MaskGen."""
    return 1 + w


def branch_logits(
    model: MaskedDiffusionModel,
    embeddings: Tensor,
    condition: Condition,
    *,
    guided: bool,
    logits: Callable[[Tensor, Condition], Tensor] | None = None,
) -> GuidedLogits:
    """Both branches in one forward pass of twice the batch; one branch where ``guided`` is False.

    ``logits`` of embeddings and condition are the model's own if not given.
    """
    function = logits or model.logits
    if not guided:
        return GuidedLogits(function(embeddings, condition), None)
    both = function(
        torch.cat([embeddings, embeddings]), concatenate(condition, model.unconditional(condition))
    )
    conditional, unconditional = both.chunk(2)
    return GuidedLogits(conditional, unconditional)


def guided_logits(
    model: MaskedDiffusionModel,
    embeddings: Tensor,
    condition: Condition,
    scale: float,
    logits: Callable[[Tensor, Condition], Tensor] | None = None,
) -> Tensor:
    """u + s (c - u) for a number s; ``logits`` as for :func:`branch_logits`."""
    conditional, unconditional = branch_logits(
        model, embeddings, condition, guided=scale != 1, logits=logits
    )
    if unconditional is None:
        return conditional
    return torch.lerp(unconditional, conditional, scale)
