"""The generator loss as the public training loop of Di[M]O computes it.

Written anew from its description (architecture and formulas, not its text): guidance as a mix, every softmax
and log-softmax on its own, samples with NaN dropped after a look at the host, the divergence from
``kl_div``, the row gradient assembled and cleaned, and half the squared distance to ``logits - gradient`` as
the loss whose gradient is that row gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def generator_loss(
    student: Tensor,
    teacher: Tensor,
    teacher_uncond: Tensor,
    auxiliary: Tensor,
    mask: Tensor,
    guidance: float,
    beta: float = 0.0,
) -> Tensor:
    """The surrogate of ``[B, L, V]`` logits: its gradient is the loss's, its value is not.

    Args:
        student, teacher, teacher_uncond, auxiliary: logits.
        mask: bool ``[B, L]``, True at [MASK] positions.
        guidance: s in u + s (c - u).
        beta: 0 is the forward KL, 1 the reverse.
    """
    with torch.no_grad():
        guided = teacher_uncond + guidance * (teacher - teacher_uncond)
        p, q = _clean(torch.softmax(guided / 1.0, -1)), _clean(torch.softmax(auxiliary / 1.0, -1))
        log_p, log_q = torch.log_softmax(guided, -1), torch.log_softmax(auxiliary, -1)
        reverse_kl = functional.kl_div(log_p, log_q, log_target=True, reduction="none")
        reverse_kl = reverse_kl.sum(-1, keepdim=True)
        forward, reverse = q - p, q * (log_q - log_p - reverse_kl)
        gradient = (1 - beta) * forward + beta * reverse
        gradient = torch.where(mask[..., None], gradient, torch.zeros_like(gradient))
        gradient = torch.nan_to_num(gradient)
    target = (student - gradient).detach()
    return (
        0.5 * functional.mse_loss(student.float(), target.float(), reduction="sum") / len(student)
    )


def _clean(probabilities: Tensor) -> Tensor:
    """Without the samples that hold NaN; the host waits for the answer."""
    bad = torch.isnan(probabilities).flatten(1).any(1)
    return probabilities[~bad] if bool(bad.any()) else probabilities
