"""Branches of ``token_divergence``."""

from __future__ import annotations

import torch

from softdimo_fast.ops.token_divergence import token_divergence
from support.branches import Branch, Results
from support.divergence_calls import rows_of_every_sort

# Eight threads per row, 64, 256 and 512; rows that are read again; aligned and not.
VOCABULARIES = (1, 100, 128, 1000, 1025, 4104, 9001)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _divergence(vocabulary: int, dtype: torch.dtype, device: str, *, guided: bool) -> Results:
    """The value and every gradient, of direct and centred rows; with guidance also mask and weights."""
    torch.manual_seed(vocabulary)
    logits = [t.clamp(min=-1e4) for t in rows_of_every_sort(13, vocabulary, dtype)]
    teacher, model, uncond = (t.to(device).requires_grad_() for t in logits)
    scale, weight = (3 * torch.rand(13)).to(device), torch.rand(13).to(device)
    mask = (torch.rand(13) < 0.7).to(device)
    if not guided:
        value = token_divergence(teacher, model, kind="jeffreys", beta=0.3, reduction="none")
        return value.detach(), *torch.autograd.grad(value.sum(), (teacher, model))
    value = token_divergence(
        teacher, model, kind="reverse_kl", teacher_uncond_logits=uncond, guidance_scale=scale,
        teacher_temperature=0.8, model_temperature=1.3, mask=mask, weight=weight,
    )  # fmt: skip
    return value.detach(), *torch.autograd.grad(value, (teacher, model, uncond))


def branches() -> list[Branch]:
    found: list[Branch] = []
    for vocabulary in VOCABULARIES:
        for dtype in DTYPES:
            for guided in (False, True):
                found.append(
                    (
                        f"token_divergence-{vocabulary}-{dtype}-{guided}",
                        lambda device, v=vocabulary, d=dtype, g=guided: _divergence(
                            v, d, device, guided=g
                        ),
                    )
                )
    return found
