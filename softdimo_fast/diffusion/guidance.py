"""Classifier-free guidance in one convention: guided = u + s (c - u), so s = 1 is the conditional model.

MaskBit and MaskGen write c + w (c - u): s = 1 + w (:func:`guidance_from_weight`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from softdimo_fast.models.conditions import Condition, concatenate
from softdimo_fast.models.protocol import MaskedDiffusionModel

# Hidden states and wanted rows (or None) -> logits.
Head: TypeAlias = Callable[[Tensor, Tensor | None], Tensor]


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
    rows: Tensor | None = None,
    head: Head | None = None,
) -> GuidedLogits:
    """Both branches in one forward pass of twice the batch; one branch where ``guided`` is False.

    Args:
        rows: the positions whose logits are wanted, as for the model's ``head``.
        head: in place of the model's own.
    """
    head = head or model.head
    if not guided:
        return GuidedLogits(head(model(embeddings, condition), rows), None)
    hidden = model(
        torch.cat([embeddings, embeddings]), concatenate(condition, model.unconditional(condition))
    )
    if rows is not None:
        # The second branch's positions follow the first's.
        rows = torch.cat([rows, rows + hidden.shape[:-1].numel() // 2])
    conditional, unconditional = head(hidden, rows).chunk(2)
    return GuidedLogits(conditional, unconditional)


def guided_logits(
    model: MaskedDiffusionModel,
    embeddings: Tensor,
    condition: Condition,
    scale: float,
    *,
    rows: Tensor | None = None,
    head: Head | None = None,
) -> Tensor:
    """u + s (c - u) for a number s; ``rows`` and ``head`` as for :func:`branch_logits`."""
    conditional, unconditional = branch_logits(
        model, embeddings, condition, guided=scale != 1, rows=rows, head=head
    )
    if unconditional is None:
        return conditional
    return torch.lerp(unconditional, conditional, scale)
