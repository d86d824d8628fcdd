"""Branches of ``distribution_matching_loss``: the gradient to the student alone, and each normalization."""

from __future__ import annotations

import torch

from softdimo_fast.ops.distribution_matching_loss import distribution_matching_loss
from support.branches import Branch, Results
from support.divergence_calls import rows_of_every_sort


def _loss(vocabulary: int, normalization: str, device: str, *, strided: bool) -> Results:
    torch.manual_seed(vocabulary)
    logits = [
        t.clamp(min=-1e4).reshape(3, 21, vocabulary) for t in rows_of_every_sort(63, vocabulary)
    ]
    teacher, auxiliary, uncond = (t.bfloat16().to(device) for t in logits)
    student = torch.zeros(3, 21, vocabulary, device=device, requires_grad=True)
    mask = (torch.rand(3, 42) < 0.6).to(device)
    value = distribution_matching_loss(
        student, teacher, auxiliary, mask[:, ::2] if strided else mask[:, :21].contiguous(),
        teacher_uncond_logits=uncond, guidance_scale=2.0, normalization=normalization,
    )  # fmt: skip
    return value.detach(), *torch.autograd.grad(value, student)


def branches() -> list[Branch]:
    found: list[Branch] = []
    for vocabulary in (128, 1000, 4104):
        for normalization in ("sum", "batch", "masked"):
            for strided in (False, True):
                found.append(
                    (
                        f"distribution_matching_loss-{vocabulary}-{normalization}-{strided}",
                        lambda device, v=vocabulary, n=normalization, s=strided: _loss(
                            v, n, device, strided=s
                        ),
                    )
                )
    return found
